"""CLIP: seeds, temperature, batch size."""

from minivlp.evaluation.retrieval import retrieval
from tables.variants import Table, Variant

SHORT = {"steps": 150}

TABLES = {
    "clip_seeds": Table("CLIP nano as lesson 01 trains it, three seeds", {"CLIP nano": Variant("clip")}),
    "clip_temperature": Table(
        "temperature learned or fixed (150 steps)",
        {
            "learned from .07": Variant("clip", recipe=SHORT),
            "fixed at .07": Variant("clip", {"learn_temperature": False}, SHORT),
            "fixed at 1": Variant("clip", {"learn_temperature": False, "temperature": 1.0}, SHORT),
        },
        retrieval,
    ),
    "clip_batch": Table(
        "batch size at the same number of training pairs (9,600)",
        {
            f"batch {size}": Variant("clip", recipe={"batch_size": size, "steps": 9600 // size})
            for size in (16, 64, 256)
        },
        retrieval,
    ),
}
