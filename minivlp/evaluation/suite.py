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

PIXELS = 250 * 64 * 64  # of the images that a model gets at a time: memory stays the same at any image size


def measure(model: Any, dataset: Any, tokenizer: Any) -> Scores:
    """All scores of this model on this dataset, by name; empty if it has none of the verbs that are measured.

    Retrieval needs `embed_images` or `similarity`; by `match` alone it would take an hour. Scenes add counterfactual
    captions, for `match` or `embed_images`, and masked words, for `mlm_logits`. `generate` adds captions. Regions add
    grounding, for `ground`, and region retrieval, for `embed_regions`.
    """
    is_scenes = hasattr(dataset, "scene")
    has_boxes = any(dataset.regions(row) for row in range(min(50, len(dataset))))
    height, width = model.config.image.size
    batch_size = max(8, PIXELS // (height * width))
    data = model, dataset, tokenizer
    scores = Scores()
    if hasattr(model, "embed_images") or hasattr(model, "similarity"):
        scores.update(retrieval(*data, unique=500 if is_scenes else None, batch_size=batch_size))
    if is_scenes and (hasattr(model, "match") or hasattr(model, "embed_images")):
        scores.update(named("counterfactual", counterfactual(*data, language=dataset.language)))
    if is_scenes and hasattr(model, "mlm_logits"):
        scores.update(named("masked word", masked_words(*data)))
    if hasattr(model, "generate") and len(dataset) > 1:
        scores.update(named("caption", captions(*data, batch_size=batch_size)))
    if has_boxes and hasattr(model, "ground"):
        scores.update(grounding(*data, batch_size=batch_size))
    if has_boxes and hasattr(model, "embed_regions"):
        scores.update(region_retrieval(*data, batch_size=min(50, batch_size)))
    return scores


def named(prefix: str, scores: Mapping[str, Score]) -> dict[str, Score]:
    """The scores under names that say which measure they are of."""
    return {f"{prefix}: {name}": score for name, score in scores.items()}
