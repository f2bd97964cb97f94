"""Every measure that a model's verbs and a dataset allow, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minivlp.evaluation.captions import captions
from minivlp.evaluation.grounding import grounding
from minivlp.evaluation.matching import counterfactual, masked_words
from minivlp.evaluation.region_retrieval import region_retrieval
from minivlp.evaluation.retrieval import retrieval
from minivlp.evaluation.score import Score, Scores
from minivlp.layers.generation import DecodingConfig

PIXELS = 250 * 64 * 64  # of the images that a model gets at a time: memory stays the same at any image size
LEARNED_BY = {  # the losses without which the head behind a verb stays random
    "embed_images": {"itc"},
    "similarity": {"itc"},
    "match": {"itm"},
    "mlm_logits": {"mlm"},
    "generate": {"lm"},
    "ground": {"box_l1", "box_giou"},
    "embed_regions": {"itc"},
}


def measure(model: Any, dataset: Any, tokenizer: Any) -> Scores:
    """All scores of this model on this dataset, by name; empty if it has none of the verbs that are measured.

    Retrieval needs `embed_images` or `similarity`; by `match` alone it would take an hour. Scenes add counterfactual
    captions, for `match` or `embed_images`, and masked words, for `mlm_logits`. `generate` adds captions: greedy ones
    of scenes, with three beams of photographs. Regions add grounding, for `ground`, and region retrieval, for
    `embed_regions`. A verb that the model was not trained for (`untrained_verbs`) is not measured.
    """
    is_scenes = hasattr(dataset, "scene")
    has_boxes = any(dataset.regions(row) for row in range(min(50, len(dataset))))
    height, width = model.config.image.size
    batch_size = max(8, PIXELS // (height * width))
    data = model, dataset, tokenizer
    scores = Scores()
    learned = {verb for verb in LEARNED_BY if hasattr(model, verb)} - set(untrained_verbs(model))
    if learned & {"embed_images", "similarity"}:
        scores.update(retrieval(*data, unique=500 if is_scenes else None, batch_size=batch_size))
    if is_scenes and ("match" if hasattr(model, "match") else "embed_images") in learned:
        scores.update(named("counterfactual", counterfactual(*data, language=dataset.language)))
    if is_scenes and "mlm_logits" in learned:
        scores.update(named("masked word", masked_words(*data)))
    if "generate" in learned and len(dataset) > 1:
        decoding = None if is_scenes else DecodingConfig(beams=3)
        scores.update(named("caption", captions(*data, decoding=decoding, batch_size=batch_size)))
    if has_boxes and "ground" in learned:
        scores.update(grounding(*data, batch_size=batch_size))
    if has_boxes and "embed_regions" in learned:
        scores.update(region_retrieval(*data, batch_size=min(50, batch_size)))
    return scores


def untrained_verbs(model: Any) -> list[str]:
    """The verbs of this model whose head no loss of `config.losses` has trained: their answers mean nothing.

    Only losses that have the names of `LEARNED_BY` tell: a model that learns by another loss (SigLIP's "sigmoid") is
    taken to be trained for all of its verbs, as is one whose config names no losses.
    """
    losses = set(getattr(getattr(model, "config", None), "losses", ()))
    if not losses & set().union(*LEARNED_BY.values()):
        return []
    return [verb for verb, by in LEARNED_BY.items() if hasattr(model, verb) and not losses & by]


def named(prefix: str, scores: Mapping[str, Score]) -> dict[str, Score]:
    """The scores under names that say which measure they are of."""
    return {f"{prefix}: {name}": score for name, score in scores.items()}
