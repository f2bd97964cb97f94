"""VLMo: seeds, experts, and training in stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.evaluation.score import bootstrap
from minivlp.objectives.masking import IGNORE
from minivlp.training.stages import ImageStage, TextStage, freeze_for_images, freeze_for_text, unfreeze
from tables.measures import TEST_SEED, Found, fusion
from tables.variants import Table, Trained, Variant, scenes_of, train_whole

STAGES: dict[str, tuple[Callable[[nn.Module], None], Callable[[nn.Module], nn.Module]]] = {
    "images": (unfreeze, ImageStage),
    "texts": (unfreeze, TextStage),
    "texts, attention frozen": (freeze_for_text, TextStage),
    "images, attention frozen": (freeze_for_images, ImageStage),
    "pairs": (unfreeze, lambda model: model),
}


@dataclass(frozen=True)
class StagedVariant(Variant):
    """Trained in stages: names of `STAGES` in their order, each for the recipe's steps and on scenes of its own.

    If the last one is not "pairs", the stage itself is measured.
    """

    stages: tuple[str, ...] = ()

    def train(self, seed: int, tokenizer: Any) -> Trained:
        recipe, seconds = self.full_recipe(), 0.0
        torch.manual_seed(seed)
        model = self.build(recipe, tokenizer)
        for number, name in enumerate(self.stages):
            freeze, stage_of = STAGES[name]
            freeze(model)
            stage = stage_of(model)
            batches = recipe.batches(scenes_of(recipe, 10 * seed + number), tokenizer, seed, model=model)
            seconds += train_whole(stage, batches, recipe)
        return Trained(stage, seconds, recipe)


@torch.no_grad()
def masked_parts(stage: ImageStage | TextStage, test: Scenes, tokenizer: Any) -> Found:
    """How well a stage predicts what is masked of one modality, without the other.

    Masked words: the share of right ones; chance is the most frequent masked word. Masked patches: the share of the
    pixels' variance that is explained, batch by batch.
    """
    stage, model = stage.cpu().eval(), stage.model
    torch.manual_seed(TEST_SEED)
    loader = Loader(test, tokenizer, min(50, len(test)), model.config.image.image_size, seed=TEST_SEED)
    batches = [loader.batch(step) for step in range(loader.steps_per_epoch)]
    if isinstance(stage, ImageStage):
        explained = [1 - float(stage.losses(batch)["mim"]) for batch in batches]
        return {"masked patches": bootstrap(explained, 0.0)}
    right, labels = [], []
    for batch in batches:
        masked = model.config.masking.apply(batch.text, model.config.text.vocabulary)
        asked = masked.labels != IGNORE  # (B, L)
        predicted = model.mlm_head(model.encode_text(masked.text)[asked]).argmax(dim=-1)
        labels.append(masked.labels[asked])
        right.append(predicted == labels[-1])
    words = torch.cat(labels)
    chance = float((words == words.mode().values).float().mean())
    return {"masked words": bootstrap(torch.cat(right).float(), chance)}


EARLY = {"losses": ("itc", "mlm")}  # matching does not begin to be learned in so few steps from scratch
# Without the grounded start and what comes with it.
PLAIN = {"config": {}, "mask_relations_alone": 0.0}
FROM_TOWERS = PLAIN | {"init_from": "towers_nano"}
STAGE = PLAIN | {"steps": 250, "init_from": None, "negative_captions": False}
BRIEF = STAGE | {"steps": 120}
ORDERS = {
    "pairs alone": ("pairs",),
    "images first": ("images", "pairs"),
    "images, then texts": ("images", "texts, attention frozen", "pairs"),
    "texts, then images": ("texts", "images, attention frozen", "pairs"),
}
TRANSFERS = {
    "texts, attention of images": ("images", "texts, attention frozen"),
    "texts, random attention": ("texts, attention frozen",),
    "texts, attention learns": ("texts",),
    "images, attention of texts": ("texts", "images, attention frozen"),
    "images, random attention": ("images, attention frozen",),
    "images, attention learns": ("images",),
}

TABLES = {
    "vlmo_seeds": Table("VLMo nano as lesson 04 trains it, three seeds", {"VLMo nano": Variant("vlmo")}, fusion),
    "vlmo_ablation": Table(
        "VLMo with experts or with one feed-forward layer for all modalities, at equal compute, from the towers",
        {
            "experts": Variant("vlmo", recipe=FROM_TOWERS),
            "shared feed-forward": Variant("vlmo", {"shared_expert": True}, FROM_TOWERS),
        },
        fusion,
    ),
    "vlmo_stages": Table(
        "VLMo from scratch: pairs alone, or after stages of images and texts (120 steps each)",
        {name: StagedVariant("vlmo", EARLY, BRIEF, stages=stages) for name, stages in ORDERS.items()},
        fusion,
    ),
    "vlmo_frozen": Table(
        "what attention trained on one modality is worth to the other (250 steps a stage)",
        {name: StagedVariant("vlmo", recipe=STAGE, stages=stages) for name, stages in TRANSFERS.items()},
        masked_parts,
    ),
}
