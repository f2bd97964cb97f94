"""How each paper's model is trained, by profile: one place for lessons, command line and experiments.

Each dict holds the recipes `quick`, `laptop` and `gpu` of a paper; `minivlp.papers` names the dicts. The `gpu` numbers
are estimates (compute and memory counted, nothing measured on a GPU): about ten minutes on one card that computes 20
TFLOP/s and has 10 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from minivlp.data.batch import Batch
from minivlp.data.english import RELATION_WORDS
from minivlp.data.loading import Loader
from minivlp.data.noise import NoisyCaptions
from minivlp.data.processes import ALONE, Processes
from minivlp.data.text import SpecialTokens, content_free_ids, word_ids
from minivlp.layers.transformer import BlockConfig
from minivlp.models import xvlm
from minivlp.objectives.masking import WordDropout
from minivlp.training.cached import token_cache
from minivlp.training.checkpoint import TOWERS, bundled, init_from, load_model, load_tensors
from minivlp.training.grounded_stream import GroundedStream
from minivlp.training.loop import Settings


@dataclass(frozen=True)
class Recipe:
    """The model's size, what it is trained on, and for how long.

    preset: name of a preset of the model's config that takes the vocabulary size. scenes, size, objects: number of
    training scenes, side of their pictures in pixels, smallest and largest number of objects. batch_size, steps, lr:
    see `Settings`. regions_per_image, kinds, negative_captions: see `Loader`. pairs_between: every other batch has
    image-caption pairs instead of regions (X-VLM mixes both). noise: share of wrong captions (`NoisyCaptions`).
    init_from: bundled checkpoint whose towers initialize the model, as DeiT and BERT do in the papers; None is random.
    init_parts: prefixes of the parameter names that are taken from it. frozen: parts of the model that are not trained.
    mask_rate: share of the tokens that masked language modeling predicts; None is the preset's. mask_content_only: it
    never predicts words that say nothing about an image ("a", "of"). mask_relations_alone: the share of the texts with
    words such as "left" in which these are masked without any others (`TokenMasking.alone`); 0: they are masked like
    all other words. config: other fields of the model's config that differ from the
    preset; a mapping holds fields of the nested config of that name. epochs: passes over the pictures;
    where given, `sized` makes `steps` of it. vocabulary: most tokens of a tokenizer that is trained on the captions;
    None is a given tokenizer.
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
    negative_captions: bool = False
    pairs_between: bool = False
    noise: float = 0.0
    init_from: str | None = None
    init_parts: tuple[str, ...] = TOWERS
    frozen: tuple[str, ...] = ()
    mask_rate: float | None = None
    mask_content_only: bool = False
    mask_relations_alone: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    vocabulary: int | None = None

    def build(self, model_class: type, tokenizer: Any) -> Any:
        """A model of this recipe's size for this tokenizer; random, except for what `init_from` initializes.

        Raises ValueError for a tokenizer without a special token that the model needs.
        """
        preset = getattr(model_class.Config, self.preset)(len(tokenizer))
        model = model_class(self._with_masking(with_ids_of(tokenizer, changed(preset, self.config)), tokenizer))
        if self.init_from and self.init_parts == TOWERS and hasattr(model, "init_from"):
            model.init_from(load_start(self.init_from))  # the model knows where each part belongs
        elif self.init_from:
            init_from(model, bundled(self.init_from), self.init_parts)
        for part in self.frozen:
            getattr(model, part).requires_grad_(False)
        return model

    def _with_masking(self, config: Any, tokenizer: Any) -> Any:
        """The config with this recipe's choice of masked tokens."""
        changes: dict[str, Any] = {} if self.mask_rate is None else {"rate": self.mask_rate}
        if self.mask_content_only:
            never = {*config.masking.never_mask, *content_free_ids(tokenizer)}
            changes["never_mask"] = tuple(sorted(never))
        if self.mask_relations_alone:
            changes |= {"alone": word_ids(tokenizer, RELATION_WORDS), "alone_rate": self.mask_relations_alone}
        return replace(config, masking=replace(config.masking, **changes)) if changes else config

    def for_folder(self) -> Recipe:
        """The same recipe for real images: without what serves scenes only, in epochs, with a tokenizer of its own.

        The bundled towers know only scenes, negative captions need a known truth, and longer captions than those of
        scenes are masked as in the paper. The wide initial embeddings of the nano models suit a hundred words, not
        thousands. Boxes of a folder may come without captions (COCO's categories), so batches of image-caption pairs
        come between those of regions.
        """
        return replace(
            self,
            init_from=None,
            frozen=(),
            negative_captions=False,
            pairs_between=self.regions_per_image > 0,
            mask_rate=None,
            mask_content_only=False,
            mask_relations_alone=0.0,
            config={**self.config, "text": SMALL_SPREADS},
            epochs=12,
            vocabulary=8000,
        )

    def sized(
        self, pictures: int, batch_size: int | None = None, epochs: int | None = None, steps: int | None = None
    ) -> Recipe:
        """The recipe with batches and steps for so many pictures, and no epochs any more.

        batch_size, epochs, steps: in place of the recipe's own. Its own batch is at most all pictures, and its own
        epochs are at least `FEWEST_STEPS` steps: a small folder is passed over more often.
        """
        batch_size = batch_size or max(1, min(self.batch_size, pictures))
        in_epoch = max(1, pictures // batch_size)
        if steps is None and epochs is not None:
            steps = epochs * in_epoch
        elif steps is None and self.epochs is not None:
            steps = max(self.epochs * in_epoch, FEWEST_STEPS)
        return replace(self, batch_size=batch_size, steps=self.steps if steps is None else steps, epochs=None)

    def batches(
        self,
        dataset: Any,
        tokenizer: Any,
        seed: int = 0,
        *,
        model: Any = None,
        cache_dir: Path | str | None = None,
        processes: Processes = ALONE,
    ) -> Callable[[int], Batch]:
        """The batch of a training step, for `fit`.

        model: the model that is to be trained. Images then have its size, and texts are cut to its context length. If
        its image tower is frozen, the tower runs once per image, and batches hold its output in place of the images.
        cache_dir: a folder for that output, which later runs then reuse; None keeps it in memory.
        processes: those that train together; each gets its rows, and the first one fills the folder.
        Raises ValueError where `Loader` and `token_cache` do.
        """
        if self.noise:
            dataset = NoisyCaptions(dataset, self.noise, seed)
        options: dict[str, Any] = {"seed": seed, "negative_captions": self.negative_captions, "processes": processes}
        size = self.size
        if model is not None:
            size = model.config.image.image_size
            options["max_tokens"] = model.config.text.context_length
            if reads_frozen_tower(model):
                with processes.first_in_line():
                    options["image_tokens"] = token_cache(model, dataset, cache_dir)
        loader = partial(Loader, dataset, tokenizer, self.batch_size, size, **options)
        regions = loader(regions_per_image=self.regions_per_image, kinds=self.kinds)
        if not self.pairs_between:
            return regions.batch
        pairs = loader()
        return lambda step: (pairs if step % 2 else regions).batch(step)

    def settings(self, **changes: Any) -> Settings:
        """Settings for `fit`; the warm-up is a sixth of a short run."""
        steps = changes.get("steps", self.steps)
        return Settings(**{"steps": steps, "lr": self.lr, "warmup": min(50, steps // 6), **changes})


def load_start(name: str) -> Any:
    """The bundled checkpoint of this name, which models start from: two towers, or a single stream."""
    path = bundled(name)
    kinds = {kind.__name__: kind for kind in (xvlm.XVLM, GroundedStream)}
    return load_model(kinds[load_tensors(path)[1]["model"]], path)


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The config with other values in these fields; a mapping changes fields of the nested config of that name."""
    nested = {name: changed(getattr(config, name), new) for name, new in changes.items() if isinstance(new, Mapping)}
    return replace(config, **{**changes, **nested})


def with_ids_of(tokenizer: Any, config: Any) -> Any:
    """A model's config with the special tokens of `tokenizer` in place of ours.

    Which tokens these are stays the model's choice: where ALBEF's preset never masks [PAD] and [CLS], the result never
    masks this tokenizer's [PAD] and [CLS]. A token that the tokenizer does not have need not be excluded. For word
    dropout, [UNK] serves as well as [MASK]; a tokenizer with neither goes without.
    Raises ValueError where the tokenizer lacks a token that the model uses.
    """
    ours, theirs = SpecialTokens(), SpecialTokens.of(tokenizer)
    changes: dict[str, Any] = {}
    absent: list[str] = []
    if (masking := getattr(config, "masking", None)) is not None:
        role_of = {token: role for role, token in asdict(ours).items()}
        never = [getattr(theirs, role_of[token]) if token in role_of else token for token in masking.never_mask]
        ids = tuple(token for token in never if token is not None)
        drops = isinstance(masking, WordDropout)
        mask = theirs.unk if drops and theirs.mask is None else theirs.mask
        changes["masking"] = None if mask is None else replace(masking, mask_id=mask, never_mask=ids)
        absent += [] if mask is not None or drops else ["[MASK]"]
    if hasattr(config, "tokens"):
        changes["tokens"] = theirs
        needed = getattr(config, "needed_tokens", ("pad", "sep", "dec", "enc"))
        absent += [f"[{role.upper()}]" for role in needed if getattr(theirs, role) is None]
    if absent:
        name = type(config).__name__.removesuffix("Config")
        raise ValueError(f"{name} needs a tokenizer like BERT's: this one has no {', '.join(absent)}")
    return replace(config, **changes) if changes else config


def reads_frozen_tower(model: Any) -> bool:
    """Whether all that the model reads of an image is the output of an image tower that is not trained.

    X-VLM with `region_blocks` runs part of its tower once per region, so it needs the image.
    """
    tower = getattr(model, "image", None)
    if tower is None or getattr(model.config, "region_blocks", 0):
        return False
    return not any(parameter.requires_grad for parameter in tower.parameters())


# ------------------------------------------------------------------------------------------- folders of real pictures

# Each value and what it is worth: docs/recipe.md. Fewer pictures than this: a text is the mean of its words; from here
# on it is read by transformer layers. Where the two cross has not been measured.
LAYERS_FROM = 20_000
FEWEST_STEPS = 300  # of a folder so small that its epochs would end before anything is learned
SMALL_SPREADS = {"word_std": 0.02, "position_std": 0.02}
MEAN_OF_WORDS = {
    "layers": 0,
    "block": BlockConfig(width=512, heads=1, hidden=512, norm_first=False),  # the width counts; no LayerNorm at the end
    "causal": False,
    "word_std": 0.02,
    "position_std": None,
}


def clip_on_folder(recipe: Recipe, pictures: int, frozen: bool) -> Recipe:
    """CLIP on so many real pictures. `frozen`: the image tower has learned before and stays as it is."""
    recipe, few = recipe.for_folder(), pictures < LAYERS_FROM
    config = {
        **recipe.config,
        "text": MEAN_OF_WORDS if few else SMALL_SPREADS,
        "mean_text": few,
        "embed_width": 512,
        "masking": WordDropout(0.2),
        "image_dropout": 0.5 if frozen else 0.0,
    }
    recipe = replace(recipe, config=config, epochs=20 if few else 12)
    return replace(recipe, batch_size=128, lr=2e-3) if frozen else recipe


def blip_on_folder(recipe: Recipe, pictures: int, frozen: bool) -> Recipe:
    """BLIP as a captioner: language modeling alone, so neither search nor matching is learned."""
    recipe = recipe.for_folder()
    text = {"word_std": 0.1, "position_std": 0.05}
    config = {**recipe.config, "text": text, "losses": ("lm",), "momentum": None}
    return replace(recipe, config=config, epochs=10, vocabulary=4000, batch_size=64, lr=2e-3)


def on_folder(recipe: Recipe, pictures: int, frozen: bool) -> Recipe:
    """Any other paper's model on real pictures."""
    return recipe.for_folder()


# ------------------------------------------------------------------------------------------------- the scene world

quick = partial(Recipe, preset="nano", scenes=1500, size=64, objects=(1, 3))
laptop = partial(Recipe, preset="nano", scenes=12_000, size=64, objects=(1, 3))
gpu = partial(Recipe, preset="small", scenes=100_000, size=128, objects=(1, 3), steps=6000, lr=1e-3)

# The towers that the nano models begin with have learned what things are and where.
TOWERS_NANO: dict[str, Any] = {"negative_captions": True, "init_from": "towers_nano"}
# Such an image tower can stay as it is: a step without its gradients takes two thirds of the time.
FROZEN_TOWER: dict[str, Any] = {**TOWERS_NANO, "frozen": ("image",)}
# Captions of scenes are short: more of their tokens are masked than in the papers, and only those that name something.
SHORT_CAPTIONS: dict[str, Any] = {"mask_rate": 0.4, "mask_content_only": True}
# In half of the captions with a relation its words are masked and nothing else: docs/recipe.md.
RELATIONS_ALONE: dict[str, Any] = {"mask_relations_alone": 0.5}
# A single stream that has grounded nouns: what ViLT and VLMo begin with.
GROUNDED_STREAM: dict[str, Any] = {
    "negative_captions": True,
    "init_from": "joint_nano",
    **SHORT_CAPTIONS,
    **RELATIONS_ALONE,
}
# The paper's LayerNorm behind the embedded words, which the single stream has, too.
VLMO_WORDS: dict[str, Any] = {"config": {"text": {"embed_norm": True}}}
# X-VLM from scratch learns where things are first. In our prototype, matching and masked language modeling learned
# nothing about relations in minutes unless the towers knew positions already; they are for a second stage.
LOCALIZATION: dict[str, Any] = {"regions_per_image": 3, "config": {"losses": ("itc", "box_l1", "box_giou")}}

CLIP = {
    "quick": quick(batch_size=64, steps=60),
    "laptop": laptop(batch_size=64, steps=500),
    "gpu": gpu(batch_size=256),
}
VILT = {
    "quick": quick(batch_size=32, steps=15, **GROUNDED_STREAM),
    "laptop": laptop(batch_size=48, steps=450, **GROUNDED_STREAM),
    "gpu": gpu(batch_size=128, negative_captions=True),
}
ALBEF = {
    "quick": quick(batch_size=48, steps=20, **FROZEN_TOWER, **SHORT_CAPTIONS),
    "laptop": laptop(batch_size=48, steps=700, **FROZEN_TOWER, **SHORT_CAPTIONS),
    "gpu": gpu(batch_size=192, negative_captions=True),
}
VLMO = {
    "quick": quick(batch_size=32, steps=15, **GROUNDED_STREAM, **VLMO_WORDS),
    "laptop": laptop(batch_size=32, steps=350, **GROUNDED_STREAM, **VLMO_WORDS),
    "gpu": gpu(batch_size=128, negative_captions=True),
}
BLIP = {
    "quick": quick(batch_size=48, steps=20, **FROZEN_TOWER),
    # At the usual rate of 2e-3, captioning, which is learned from scratch, needs twice the steps.
    "laptop": laptop(batch_size=48, steps=650, lr=4e-3, **FROZEN_TOWER),
    "gpu": gpu(batch_size=192, negative_captions=True),
}
XVLM = {
    "quick": quick(batch_size=48, steps=40, **LOCALIZATION),
    "laptop": laptop(batch_size=48, steps=500, **LOCALIZATION),
    "gpu": gpu(batch_size=192, **{**LOCALIZATION, "regions_per_image": 4}),
}
COCA = {
    "quick": quick(batch_size=48, steps=20, **{**FROZEN_TOWER, "negative_captions": False}),
    "laptop": laptop(batch_size=48, steps=900, lr=4e-3, **{**FROZEN_TOWER, "negative_captions": False}),
    "gpu": gpu(batch_size=256),
}
GIT = {
    "quick": quick(batch_size=48, steps=20, **{**FROZEN_TOWER, "negative_captions": False}),
    "laptop": laptop(batch_size=48, steps=900, lr=4e-3, **{**FROZEN_TOWER, "negative_captions": False}),
    "gpu": gpu(batch_size=192),
}
