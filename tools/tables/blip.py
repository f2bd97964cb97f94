"""BLIP: seeds, and what encoder and decoder share."""

from minivlp.models.blip import CROSS_ATTENTION, SELF_ATTENTION, THE_REST
from tables.measures import captioning
from tables.variants import Table, Variant

SHORT = {"steps": 300, "negative_captions": False}

TABLES = {
    "blip_seeds": Table("BLIP nano as lesson 05 trains it, three seeds", {"BLIP nano": Variant("blip")}, captioning),
    "blip_sharing": Table(
        "what BLIP's encoder and decoder share (300 steps)",
        {
            "all but self-attention": Variant("blip", recipe=SHORT),
            "everything": Variant("blip", {"shared": SELF_ATTENTION + CROSS_ATTENTION + THE_REST}, SHORT),
            "nothing": Variant("blip", {"shared": ()}, SHORT),
        },
        captioning,
    ),
}
