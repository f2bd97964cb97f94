"""The papers of this library, one row each: where the class is, how it is trained, which releases load, which lesson.

A row holds names as strings, which are looked up when they are needed, so that listing the papers imports none of
them. A new paper is a file with its config and class, recipes, and a row here; tests/toy_paper.py is an example.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Paper:
    """One paper.

    model: "module:name" of its class. recipes: of a dict with a recipe for each profile. on_folder: of a function that
    makes of it the recipe for a folder of real pictures. releases: of a tuple that says how each form of its released
    weights is read; None where there are none. weights: these forms, in words. lesson: number of its notebook, or "".
    related: of further classes that a checkpoint of this family may hold.
    """

    name: str
    title: str
    model: str
    recipes: str
    releases: str | None = None
    weights: str = ""
    lesson: str = ""
    related: tuple[str, ...] = ()
    on_folder: str = "minivlp.training.recipes:on_folder"

    def model_class(self) -> type:
        """The class of the model."""
        return look_up(self.model)

    def related_classes(self) -> tuple[type, ...]:
        """All classes that a checkpoint of this family may hold, the model's first."""
        return (self.model_class(), *map(look_up, self.related))

    def recipe(self, profile: str) -> Any:
        """The recipe of this profile: quick, laptop or gpu."""
        return look_up(self.recipes)[profile]

    def folder_recipe(self, profile: str, pictures: int, frozen: bool) -> Any:
        """The recipe for a folder of so many pictures; `frozen`: with an image tower that is not trained."""
        return look_up(self.on_folder)(self.recipe(profile), pictures, frozen)

    def release_list(self) -> tuple[Any, ...]:
        """The forms of its released weights; empty where there are none."""
        return look_up(self.releases) if self.releases else ()


def look_up(place: str) -> Any:
    """What "module:name" names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def of_minivlp(
    name: str, title: str, model: str, weights: str, lesson: str, *related: str, on_folder: str = "on_folder"
) -> Paper:
    """A row whose parts are in the places where minivlp has them."""
    return Paper(
        name,
        title,
        model=f"minivlp.models.{name}:{model}",
        recipes=f"minivlp.training.recipes:{name.upper()}",
        releases=f"minivlp.pretrained.{name}:RELEASES",
        weights=weights,
        lesson=lesson,
        related=tuple(f"minivlp.models.{place}" for place in related),
        on_folder=f"minivlp.training.recipes:{on_folder}",
    )


ROWS = (
    of_minivlp(
        "clip",
        "CLIP (Radford et al. 2021)",
        "CLIP",
        "transformers, open_clip",
        "01",
        "negclip:NegCLIP",
        on_folder="clip_on_folder",
    ),
    of_minivlp(
        "vilt", "ViLT (Kim et al. 2021)", "ViLT", "transformers, authors' .ckpt", "02", "vilt_answers:ViLTAnswers"
    ),
    of_minivlp("albef", "ALBEF (Li et al. 2021)", "ALBEF", "authors' .pth", "03"),
    of_minivlp("vlmo", "VLMo (Bao et al. 2022)", "VLMo", "authors' .pth", "04"),
    of_minivlp(
        "blip", "BLIP (Li et al. 2022)", "BLIP", "transformers, authors' .pth", "05", on_folder="blip_on_folder"
    ),
    of_minivlp("xvlm", "X-VLM (Zeng et al. 2022)", "XVLM", "authors' .pth", "07"),
    of_minivlp("coca", "CoCa (Yu et al. 2022)", "CoCa", "open_clip", ""),
    of_minivlp("git", "GIT (Wang et al. 2022)", "GIT", "transformers, authors' .pt", ""),
)
PAPERS: dict[str, Paper] = {row.name: row for row in ROWS}


def paper(name: str) -> Paper:
    """The row of this name. Raises ValueError that lists the names."""
    if name not in PAPERS:
        raise ValueError(f"no model called {name!r}; there are: {', '.join(sorted(PAPERS))}")
    return PAPERS[name]
