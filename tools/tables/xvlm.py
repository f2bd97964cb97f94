"""X-VLM: seeds, what boxes, objects and regions are worth, and what its image tower keeps."""

from __future__ import annotations

from typing import Any

from minivlp.data.scenes import Scenes
from minivlp.evaluation.probing import linear_probe
from minivlp.evaluation.score import Score
from minivlp.evaluation.suite import named
from tables.measures import TEST_SEED, boxes_and_counterfactuals, boxes_and_retrieval
from tables.variants import Table, Variant

MIXED = {"steps": 400, "batch_size": 32, "regions_per_image": 2, "pairs_between": True, "negative_captions": True}
WITH_BOXES, WITHOUT = {"losses": ("itc", "itm", "box_l1", "box_giou")}, {"losses": ("itc", "itm")}
PROBED_SCENES = 400


def probed(model: Any, test: Scenes, tokenizer: Any) -> dict[str, Score]:
    """What a linear map reads from a patch: of the tower's output, and after the block before the last one, whose
    patches are the last that CLIP's loss trains (of the last block it reads the class token alone)."""
    fitted_on = Scenes(PROBED_SCENES, "validation", 3)
    scenes = Scenes(min(PROBED_SCENES, len(test)), "test", TEST_SEED)
    before = linear_probe(model, fitted_on, scenes, model.config.image.layers - 1)
    return {**linear_probe(model, fitted_on, scenes), **named("block before", before)}


TABLES = {
    "xvlm_seeds": Table(
        "X-VLM nano from scratch, box losses and region-text contrast, three seeds",
        {"X-VLM nano": Variant("xvlm")},
        boxes_and_retrieval,
    ),
    "xvlm_ablation": Table(
        "X-VLM from scratch without boxes, objects, regions (400 steps)",
        {
            "everything": Variant("xvlm", WITH_BOXES, MIXED),
            "no box loss": Variant("xvlm", WITHOUT, MIXED),
            "no objects": Variant("xvlm", WITH_BOXES, MIXED | {"kinds": ("phrase", "relation", "image")}),
            "no regions": Variant("xvlm", WITH_BOXES, MIXED | {"kinds": ("object", "image")}),
            "no attributes": Variant("xvlm", WITH_BOXES, MIXED | {"kinds": ("object", "relation", "image")}),
            "no relations": Variant("xvlm", WITH_BOXES, MIXED | {"kinds": ("object", "phrase", "image")}),
        },
        boxes_and_counterfactuals,
    ),
    "xvlm_probe": Table(
        "what a linear map reads from a patch after CLIP's and X-VLM's training, equal steps and pictures (400 steps)",
        {
            "CLIP": Variant("clip", recipe={"steps": MIXED["steps"], "batch_size": MIXED["batch_size"]}),
            "X-VLM": Variant("xvlm", WITH_BOXES, MIXED),
            "X-VLM without box losses": Variant("xvlm", WITHOUT, MIXED),
        },
        probed,
    ),
}
