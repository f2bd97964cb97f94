"""What each model is trained with, by profile: one place for lessons, command line and experiments.

The `gpu` numbers are sized on paper (compute and memory counted, nothing measured on a GPU): about ten minutes on one
card of 20 TFLOP/s in use and 10 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from minivlp.data.batch import Batch
from minivlp.data.loading import Loader
from minivlp.data.noise import NoisyCaptions
from minivlp.models.xvlm import XVLM
from minivlp.training.checkpoint import TOWERS, load_model, shipped, start_from
from minivlp.training.loop import Settings


@dataclass(frozen=True)
class Recipe:
    """Scenes to learn from, the batch, and how long. `preset` names the model's size, `size` is the pictures'.

    start: a shipped checkpoint whose towers the model begins with, as the papers begin with DeiT and BERT; None is from
    scratch. start_parts: beginnings of the names that are taken from it. frozen: parts of the model that stay as they
    are. noise: share of wrong captions. wrong_captions, regions_per_image, kinds: see `Loader`. pairs_between: every
    other batch is one of image-caption pairs (X-VLM mixes both kinds of batch).
    """

    preset: str
    scenes: int
    size: int
    objects: tuple[int, int]
    batch_size: int
    steps: int
    lr: float = 2e-3
    regions_per_image: int = 0
    kinds: tuple[str, ...] | None = None
    wrong_captions: bool = False
    pairs_between: bool = False
    noise: float = 0.0
    start: str | None = None
    start_parts: tuple[str, ...] = TOWERS
    frozen: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)  # what differs from the preset

    def build(self, kind: type, vocabulary: int) -> Any:
        """A model of this recipe's size, fresh but for the towers it starts from."""
        model = kind(replace(getattr(kind.Config, self.preset)(vocabulary), **self.config))
        whole = self.start_parts == TOWERS
        if self.start and whole and hasattr(model, "start_from"):  # takes from the towers what it can use, and where
            model.start_from(load_model(XVLM, shipped(self.start)))
        elif self.start:
            start_from(model, shipped(self.start), self.start_parts)
        for part in self.frozen:
            getattr(model, part).requires_grad_(False)
        return model

    def batches(self, dataset: Any, tokenizer: Any, seed: int = 0, max_tokens: int = 56) -> Callable[[int], Batch]:
        """The batch of a training step, for `fit`; longer texts are cut to `max_tokens`."""
        if self.noise:
            dataset = NoisyCaptions(dataset, self.noise, seed)
        more = dict(seed=seed, max_tokens=max_tokens, wrong_captions=self.wrong_captions)
        loader = partial(Loader, dataset, tokenizer, self.batch_size, self.size, **more)
        regions = loader(regions_per_image=self.regions_per_image, kinds=self.kinds)
        if not self.pairs_between:
            return regions.batch
        pairs = loader()
        return lambda step: (pairs if step % 2 else regions).batch(step)

    def settings(self, **changes) -> Settings:
        """Settings for `fit`; the warm-up is a sixth of a short run."""
        steps = changes.get("steps", self.steps)
        return Settings(**{"steps": steps, "lr": self.lr, "warmup": min(50, steps // 6), **changes})


# X-VLM from scratch: where things are, first. In our prototype matching and masked words learnt nothing of relations in
# minutes before the towers kept positions; they are for a second stage.
WHERE = {"losses": ("itc", "box_l1", "box_giou")}
# Fusion on the shared towers: the image tower knows where things are and stays as it is, which saves a third of a step.
# More of the words are hidden than in the papers, since our captions are short, and only words that name something: the
# special tokens and "a", "of", "there is", "a picture" are never asked.
EMPTY = (0, 1, 2, 3, 4, 5, 6, 45, 376, 379, 443, 458, 465, 466, 497, 498, 500, 843, 848, 873, 876, 891, 1115, 1148)
FUSE = {
    "wrong_captions": True,
    "start": "towers_nano",
    "frozen": ("image",),
    "config": {"mask_rate": 0.4, "never_mask": EMPTY},
}
# Only what was never trained learns here, and the captioner wants a higher rate: 2e-3 needs twice the steps.
WRITE = {"wrong_captions": True, "start": "towers_nano", "frozen": ("image",)}
ONE = {"wrong_captions": True, "start": "towers_nano", "config": {"mask_rate": 0.4, "never_mask": EMPTY}}
RECIPES: dict[str, dict[str, Recipe]] = {
    "clip": {
        "quick": Recipe("nano", 1500, 64, (1, 3), 64, 60),
        "laptop": Recipe("nano", 12000, 64, (1, 3), 64, 500),
        "gpu": Recipe("small", 100_000, 128, (1, 3), 256, 6000, lr=1e-3),
    },
    "xvlm": {
        "quick": Recipe("nano", 1500, 64, (1, 3), 48, 40, regions_per_image=3, config=WHERE),
        "laptop": Recipe("nano", 12000, 64, (1, 3), 48, 500, regions_per_image=3, config=WHERE),
        "gpu": Recipe("small", 100_000, 128, (1, 3), 192, 6000, lr=1e-3, regions_per_image=4, config=WHERE),
    },
    "albef": {
        "quick": Recipe("nano", 1500, 64, (1, 3), 48, 20, **FUSE),
        "laptop": Recipe("nano", 12000, 64, (1, 3), 48, 700, **FUSE),
        "gpu": Recipe("small", 100_000, 128, (1, 3), 192, 6000, lr=1e-3, wrong_captions=True),
    },
    "vilt": {
        "quick": Recipe("nano", 1500, 64, (1, 3), 32, 15, **ONE),
        "laptop": Recipe("nano", 12000, 64, (1, 3), 48, 450, **ONE),
        "gpu": Recipe("small", 100_000, 128, (1, 3), 128, 6000, lr=1e-3, wrong_captions=True),
    },
    "vlmo": {
        "quick": Recipe("nano", 1500, 64, (1, 3), 32, 15, **ONE),
        "laptop": Recipe("nano", 12000, 64, (1, 3), 32, 350, **ONE),
        "gpu": Recipe("small", 100_000, 128, (1, 3), 128, 6000, lr=1e-3, wrong_captions=True),
    },
    "blip": {
        "quick": Recipe("nano", 1500, 64, (1, 3), 48, 20, **WRITE),
        "laptop": Recipe("nano", 12000, 64, (1, 3), 48, 650, lr=4e-3, **WRITE),
        "gpu": Recipe("small", 100_000, 128, (1, 3), 192, 6000, lr=1e-3, wrong_captions=True),
    },
}
