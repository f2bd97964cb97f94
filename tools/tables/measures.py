"""What is measured of a trained model; several tables share each of these."""

from __future__ import annotations

from typing import Any

import torch

from minivlp.data.english import RELATION_WORDS
from minivlp.data.scenes import Scenes
from minivlp.data.text import word_ids
from minivlp.evaluation.captions import captions
from minivlp.evaluation.grounding import grounding, mean_box_of
from minivlp.evaluation.matching import counterfactual, masked_words
from minivlp.evaluation.retrieval import retrieval
from minivlp.evaluation.score import Score, bootstrap
from minivlp.evaluation.suite import named
from minivlp.objectives.boxes import iou
from minivlp.training.grounded_stream import GroundedStream, grounded_batches

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
    """One fact changed, masked words if the model predicts them, R@k if it has vectors of images and of texts."""
    scores = named("counterfactual", counterfactual(model, test, tokenizer, limit=600))
    scores |= masked(model, test, tokenizer) if hasattr(model, "mlm_logits") else {}
    return scores | (dict(retrieval(model, test, tokenizer)) if hasattr(model, "embed_images") else {})


def captioning(model: Any, test: Scenes, tokenizer: Any) -> Found:
    """Captions of 500 scenes with one or two objects, R@k, and one fact changed."""
    simple = Scenes(min(500, len(test)), "test", TEST_SEED, objects=(1, 2))
    return {**captions(model, simple, tokenizer), **retrieval_and_counterfactuals(model, test, tokenizer)}


@torch.no_grad()
def grounded(model: GroundedStream, test: Scenes, tokenizer: Any) -> Found:
    """What a start of single streams knows: boxes of nouns, and masked nouns and relation words, one of each caption.

    Chance of a box is 0; of a masked word the share of the most frequent one.
    """
    model = model.cpu().eval()
    batch = grounded_batches(test, tokenizer, len(test))(0)
    overlap = iou(model.boxes(batch), batch.boxes)
    nouns = torch.zeros_like(batch.text.mask)
    nouns[batch.rows, batch.places] = True
    relations = torch.isin(batch.text.ids, torch.tensor(word_ids(tokenizer, RELATION_WORDS)))
    scores = {"boxes of nouns, Acc@0.5": bootstrap((overlap > 0.5).float(), 0.0)}
    for kind, places in (("noun", nouns), ("relation word", relations)):
        first = places & (places.cumsum(dim=1) == 1)  # (B, L)
        hidden = batch.text.with_ids(batch.text.ids.masked_fill(first, tokenizer.mask_token_id))
        right = (model.mlm_logits(batch.images, hidden).argmax(dim=-1) == batch.text.ids)[first]
        words = batch.text.ids[first]
        chance = float((words == words.mode().values).float().mean())
        scores[f"masked {kind}"] = bootstrap(right.float(), chance)
    return scores
