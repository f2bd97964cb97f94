"""The family: every model from every start, with and without negative captions, at equal pairs and schedule.

What is equal: 500 steps of 32 scenes (16,000 image-caption pairs), learning rate 2e-3 with 50 warm-up steps, 12,000
scenes, all parameters trained, masked words as in `MASKED`. What differs is in the name of a variant: the model, its
start, and whether each picture also comes with a negative caption. X-VLM sees as many pictures; in every other batch
they come with regions and boxes in place of their captions.

Starts. scratch: random. towers: image and text tower of `towers_nano`, trained with boxes; fusion layers and heads are
new (for ViLT and VLMo: the image blocks and word embeddings). grounded: the same with fusion layers that have grounded
phrases; for ViLT and VLMo the single stream `joint_nano`. clip: the towers of `clip_nano`, trained without boxes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from minivlp.data.scenes import Scenes
from minivlp.evaluation.captions import captions
from minivlp.evaluation.forward import caption_likelihood
from minivlp.evaluation.grounding import grounding
from minivlp.evaluation.matching import counterfactual
from minivlp.evaluation.suite import named
from minivlp.models.negclip import NegCLIP
from minivlp.training.recipes import RELATIONS_ALONE, SHORT_CAPTIONS, Recipe
from tables.measures import TEST_SEED, Found, fusion
from tables.variants import Table, Variant

MASKED = SHORT_CAPTIONS | RELATIONS_ALONE
EQUAL = {"scenes": 12_000, "steps": 500, "batch_size": 32, "lr": 2e-3, "frozen": (), "noise": 0.0}
BOTH = ("image.", "text.")
# BLIP's text layers have cross-attention, which no tower has.
SHARED_WITH_TEXT = ("self_attention", "self_norm", "feed_forward", "feed_norm")
OF_BLIP = (
    "image.",
    "text.embed.",
    "text.norm.",
    *(f"text.blocks.{layer}.{part}." for layer in range(2) for part in SHARED_WITH_TEXT),
)
LIKE_CLIP = {"image": {"ln_pre": True}}  # CLIP's image tower has a LayerNorm in front of its blocks
SCRATCH = {"init_from": None}
TOWERS = {"init_from": "towers_nano", "init_parts": BOTH}
CLIP_TOWERS = {"init_from": "clip_nano", "init_parts": BOTH}
GROUNDED, JOINT = {"init_from": "towers_nano"}, {"init_from": "joint_nano"}


@dataclass(frozen=True)
class NegCLIPVariant(Variant):
    """CLIP whose images also tell their captions from negative ones."""

    def build(self, recipe: Recipe, tokenizer: Any) -> nn.Module:
        return recipe.build(NegCLIP, tokenizer)


def everything(model: Any, test: Scenes, tokenizer: Any) -> Found:
    """What a model's verbs allow: `fusion`, caption likelihood as a second judge, captions, boxes."""
    scores = fusion(model, test, tokenizer)
    if hasattr(model, "caption_logprob"):
        judged = counterfactual(model, test, tokenizer, limit=600, score=caption_likelihood)
        scores |= named("caption likelihood", judged)
        scores |= captions(model, Scenes(min(300, len(test)), "test", TEST_SEED, objects=(1, 2)), tokenizer)
    if hasattr(model, "ground"):
        scores |= grounding(model, test, tokenizer, limit=300)
    return scores


def of(paper: str) -> Callable[..., Variant]:
    """How a variant of this paper is made."""
    return partial(Variant, paper)


def variants_of(
    title: str,
    make: Callable[..., Variant],
    starts: dict[str, Start],
    recipe: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> dict[str, Variant]:
    """A model from each of its starts, without and with negative captions; `recipe`, `config`: what it has in all."""
    return {
        f"{title}, {start}{name}": make(
            (config or {}) | its_config, EQUAL | (recipe or {}) | its_recipe | {"negative_captions": negatives}
        )
        for negatives, name in ((False, ""), (True, ", negative captions"))
        for start, (its_recipe, its_config) in starts.items()
    }


Start = tuple[dict[str, Any], dict[str, Any]]  # fields of the recipe, and of the model's config
FOR_CLIP = {"scratch": (SCRATCH, {}), "towers": (TOWERS, {"image": {"ln_pre": False}})}
ONE_STREAM = {"scratch": (SCRATCH, {}), "towers": (GROUNDED, {}), "grounded": (JOINT, {})}
TWO_TOWERS = {
    "scratch": (SCRATCH, {}),
    "towers": (TOWERS, {}),
    "grounded": (GROUNDED, {}),
    "clip": (CLIP_TOWERS, LIKE_CLIP),
}
FOR_BLIP = TWO_TOWERS | {
    name: (TWO_TOWERS[name][0] | {"init_parts": OF_BLIP}, TWO_TOWERS[name][1]) for name in ("towers", "clip")
}
X_VLM = MASKED | {"regions_per_image": 2, "pairs_between": True}
ALL_LOSSES = {"losses": ("itc", "itm", "mlm", "box_l1", "box_giou")}
EMBED_NORM = {"text": {"embed_norm": True}}  # as in the paper, and as `joint_nano` has it

WITH_NEGATIVES = variants_of("CLIP", partial(NegCLIPVariant, "clip"), FOR_CLIP)
VARIANTS = {
    **variants_of("CLIP", of("clip"), FOR_CLIP),
    **{name: variant for name, variant in WITH_NEGATIVES.items() if variant.recipe["negative_captions"]},
    **variants_of("ViLT", of("vilt"), ONE_STREAM, MASKED),
    **variants_of("ALBEF", of("albef"), TWO_TOWERS, MASKED),
    **variants_of("VLMo", of("vlmo"), ONE_STREAM, MASKED, EMBED_NORM),
    **variants_of("BLIP", of("blip"), FOR_BLIP),
    **variants_of("X-VLM", of("xvlm"), TWO_TOWERS, X_VLM, ALL_LOSSES),
}

TABLES = {
    "family": Table("every model from every start, with and without negative captions", VARIANTS, everything),
}
