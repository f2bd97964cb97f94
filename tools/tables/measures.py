"""What is measured of a trained model; several tables share each of these."""

from __future__ import annotations

from typing import Any

from minivlp.data.scenes import Scenes
from minivlp.evaluation.captions import captions
from minivlp.evaluation.grounding import grounding, mean_box_of
from minivlp.evaluation.matching import counterfactual, masked_words
from minivlp.evaluation.retrieval import retrieval
from minivlp.evaluation.score import Score
from minivlp.evaluation.suite import named

TEST_SCENES, TEST_SEED = 1500, 7

Found = dict[str, Score]


def retrieval_and_counterfactuals(model: Any, test: Scenes, tokenizer: Any) -> Found:
    """R@k among 500 unique captions, and the true caption against one with a single fact changed."""
    changed = counterfactual(model, test, tokenizer)
    return {**retrieval(model, test, tokenizer), **named("counterfactual", changed)}


def boxes_and_retrieval(model: Any, test: Scenes, tokenizer: Any) -> Found:
    """Predicted boxes, with the mean box of training as a baseline, and R@k of the two towers."""
    mean_box = mean_box_of(Scenes(2000, "train", TEST_SEED))
    return {**grounding(model, test, tokenizer, mean_box=mean_box, limit=500), **retrieval(model, test, tokenizer)}


def boxes_and_counterfactuals(model: Any, test: Scenes, tokenizer: Any) -> Found:
    """`boxes_and_retrieval`, and the true caption against one with a single fact changed."""
    return boxes_and_retrieval(model, test, tokenizer) | retrieval_and_counterfactuals(model, test, tokenizer)


def masked(model: Any, test: Scenes, tokenizer: Any) -> Found:
    """Masked content words, with the right image, a wrong one and none."""
    return named("masked word", masked_words(model, test, tokenizer, limit=600))


def fusion(model: Any, test: Scenes, tokenizer: Any) -> Found:
    """One fact changed, masked words, and R@k where the model has vectors of images and of texts."""
    scores = named("counterfactual", counterfactual(model, test, tokenizer, limit=600))
    scores |= masked(model, test, tokenizer)
    return scores | (dict(retrieval(model, test, tokenizer)) if hasattr(model, "embed_images") else {})


def captioning(model: Any, test: Scenes, tokenizer: Any) -> Found:
    """Captions of 500 scenes with one or two objects, R@k, and one fact changed."""
    simple = Scenes(min(500, len(test)), "test", TEST_SEED, objects=(1, 2))
    return {**captions(model, simple, tokenizer), **retrieval_and_counterfactuals(model, test, tokenizer)}
