"""Fusion models without initialization from the shared towers."""

from tables.measures import fusion
from tables.variants import Table, Variant

SCRATCH = {"steps": 300, "init_from": None, "frozen": (), "mask_relations_alone": 0.0}

TABLES = {
    "from_scratch": Table(
        "fusion models from random weights (300 steps, one seed)",
        {name: Variant(model, recipe=SCRATCH) for name, model in (("ALBEF nano", "albef"), ("ViLT nano", "vilt"))},
        fusion,
        seeds=(0,),
    ),
}
