"""ViLT: seeds, word-patch alignment, and whole-word masking."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from minivlp.data.tokenizer_training import pieces_tokenizer
from minivlp.models.xvlm import XVLM
from minivlp.objectives.masking import TokenMasking, WordMasking
from minivlp.training.checkpoint import bundled, load_model
from minivlp.training.recipes import Recipe
from tables.measures import fusion, masked
from tables.variants import Table, Variant


@dataclass(frozen=True)
class PiecesVariant(Variant):
    """With a tokenizer that splits names of objects into pieces, so that its token embedding is new to the towers."""

    def tokenizer(self) -> Any:
        return pieces_tokenizer()

    def build(self, recipe: Recipe, tokenizer: Any) -> nn.Module:
        """Initialized with all of the recipe's towers but the token embedding."""
        model = super().build(replace(recipe, init_from=None), tokenizer)
        towers = load_model(XVLM, bundled(recipe.init_from))
        towers.text.embed = model.joint.text_embed  # the model's own: it stays as it is
        model.init_from(towers)
        return model


FROM_TOWERS = {"init_from": "towers_nano", "mask_relations_alone": 0.0}

TABLES = {
    "vilt_seeds": Table("ViLT nano as lesson 02 trains it, three seeds", {"ViLT nano": Variant("vilt")}, fusion),
    "vilt_ablation": Table(
        "ViLT without word-patch alignment, from the towers (with it: vilt_relations, usual masking)",
        {"ITM + MLM": Variant("vilt", {"losses": ("itm", "mlm")}, FROM_TOWERS)},
        fusion,
    ),
    "vilt_relations": Table(
        "ViLT and relations: the start and the masking, one at a time (450 steps)",
        {
            f"{start}, {masking}": Variant("vilt", recipe=its_start | its_masking)
            for start, its_start in {"towers": {"init_from": "towers_nano"}, "grounded": {}}.items()
            for masking, its_masking in {"usual masking": {"mask_relations_alone": 0.0}, "relations alone": {}}.items()
            if (start, masking) != ("grounded", "relations alone")  # that is vilt_seeds
        }
        | {"towers, relations alone, 3 x steps": Variant("vilt", recipe={"init_from": "towers_nano", "steps": 1350})},
        fusion,
    ),
    "vilt_words": Table(
        "whole-word masking or single pieces, where names of objects have several (MLM alone, 200 steps)",
        {
            name: PiecesVariant("vilt", {"losses": ("mlm",), "masking": masking}, FROM_TOWERS | {"steps": 200})
            for name, masking in (("whole words", WordMasking()), ("single pieces", TokenMasking()))
        },
        masked,
    ),
}
