"""X-VLM: seeds, and what boxes, objects and regions are worth."""

from tables.measures import boxes_and_counterfactuals, boxes_and_retrieval
from tables.variants import Table, Variant

MIXED = {"steps": 400, "batch_size": 32, "regions_per_image": 2, "pairs_between": True, "negative_captions": True}
WITH_BOXES, WITHOUT = {"losses": ("itc", "itm", "box_l1", "box_giou")}, {"losses": ("itc", "itm")}

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
        },
        boxes_and_counterfactuals,
    ),
}
