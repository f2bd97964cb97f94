"""A table is a set of variants, each trained with several seeds and measured on the same test scenes.

Settings were chosen on validation scenes. What is recorded is measured on test scenes that no choice has used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from minivlp.data.batch import Batch
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.evaluation.score import Score
from minivlp.papers import PAPERS
from minivlp.training.loop import fit
from minivlp.training.recipes import Recipe
from tables.measures import retrieval_and_counterfactuals

Measure = Callable[[Any, Scenes, Any], Mapping[str, Score]]  # (model, test scenes, tokenizer)


class Trained(NamedTuple):
    """A trained model, the seconds that its training took, and the recipe that it followed."""

    model: Any
    seconds: float
    recipe: Recipe


@dataclass(frozen=True)
class Variant:
    """One row of a table: a paper, and what differs from its laptop recipe in `config` and in the recipe's fields."""

    model: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> Any:
        """The tokenizer of this variant: ours."""
        return load_tokenizer()

    def full_recipe(self) -> Recipe:
        """The laptop recipe with what differs."""
        recipe = replace(PAPERS[self.model].recipe("laptop"), **self.recipe)
        return replace(recipe, config=recipe.config | self.config)

    def build(self, recipe: Recipe, tokenizer: Any) -> nn.Module:
        """The model before its training."""
        return recipe.build(PAPERS[self.model].model_class(), tokenizer)

    def train(self, seed: int, tokenizer: Any) -> Trained:
        """Build and train by the recipe; the seed is that of the weights, the scenes and their order."""
        recipe = self.full_recipe()
        torch.manual_seed(seed)
        model = self.build(recipe, tokenizer)
        batches = recipe.batches(scenes_of(recipe, seed), tokenizer, seed, model=model)
        return Trained(model, train_whole(model, batches, recipe), recipe)


@dataclass(frozen=True)
class Table:
    """Variants by name, and what is measured of each."""

    purpose: str
    variants: dict[str, Variant]
    measure: Measure = retrieval_and_counterfactuals
    seeds: tuple[int, ...] = (0, 1, 2)


def scenes_of(recipe: Recipe, seed: int) -> Scenes:
    """The training scenes of a recipe."""
    return Scenes(recipe.scenes, "train", seed, recipe.size, recipe.objects)


def train_whole(model: nn.Module, batches: Callable[[int], Batch], recipe: Recipe) -> float:
    """Train, and return the seconds it took. The stop button ends the program: half a run must not be recorded."""
    history = fit(model, batches, recipe.settings(), bar=sys.stderr.isatty())
    if history.interrupted:
        sys.exit(f"stopped after {len(history.steps)} of {recipe.steps} steps: this run is not recorded")
    return history.seconds
