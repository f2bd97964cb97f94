"""Linear probes: what a linear map can read from the tokens of an image tower that stays as it is (Alain and Bengio
2016, "Understanding intermediate layers using linear classifier probes").

Axes: B images, P patches, n patches that lie on an object, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minivlp.data.batch import to_tensor
from minivlp.data.scene import Scene
from minivlp.data.scenes import Scenes
from minivlp.evaluation.score import Score, Scores, bootstrap, bootstrap_counts
from minivlp.inference import evaluating

PENALTY = 10.0  # of the squared weights; tokens are standardized first


class ObjectPatches(NamedTuple):
    """Patches that lie on exactly one object, and what is true of each."""

    tokens: Tensor  # (n, D)
    places: Tensor  # (n, 2) x and y of the patch's center, in 0..1
    nouns: np.ndarray  # (n,) names of objects
    colors: np.ndarray  # (n,) names of colors, "" where an object has none to name
    rows: np.ndarray  # (n,) rows of the scenes


@dataclass(frozen=True)
class LinearMap:
    """A linear map with a constant, of standardized tokens."""

    mean: Tensor  # (D,)
    spread: Tensor  # (D,)
    weights: Tensor  # (D + 1, C)

    @classmethod
    def fit(cls, tokens: Tensor, targets: Tensor) -> LinearMap:
        """The map of tokens (n, D) to targets (n, C) by ridge regression: least squares, weights penalized."""
        mean, spread = tokens.mean(dim=0), tokens.std(dim=0) + 1e-6
        x = F.pad((tokens - mean) / spread, (0, 1), value=1.0)  # a last column of ones, for the constant
        weights = torch.linalg.solve(x.T @ x + PENALTY * torch.eye(x.shape[1]), x.T @ targets.float())
        return cls(mean, spread, weights)

    def __call__(self, tokens: Tensor) -> Tensor:
        """What is read from tokens (n, D): (n, C)."""
        return F.pad((tokens - self.mean) / self.spread, (0, 1), value=1.0) @ self.weights


def object_patches(model: Any, scenes: Scenes, rows: Sequence[int], layer: int | None = None) -> ObjectPatches:
    """The patches of these scenes that lie on an object, with the tokens of `model.image` after its block number
    `layer` (1 is the first; None is the tower's output, behind its last LayerNorm).

    A patch belongs to the object whose box holds the patch's center. Patches in two boxes or in none are left out.
    """
    image = model.image
    with evaluating(model):
        pixels = to_tensor(scenes.pixels(rows, image.config.size)).to(next(image.parameters()).device)
        tokens = image(pixels) if layer is None else image.run(image.embed(pixels), range(layer))
    tokens = tokens[:, int(image.config.class_token) :].float().cpu()  # (B, P, D)
    centers = patch_centers(*image.config.grid)
    scenes_of_rows = [scenes.scene(row) for row in rows]
    which = torch.stack([only_object_at(scene, centers) for scene in scenes_of_rows])  # (B, P)
    images, patches = (which >= 0).nonzero(as_tuple=True)
    shown = [scenes_of_rows[i].objects[which[i, p]] for i, p in zip(images.tolist(), patches.tolist(), strict=True)]
    return ObjectPatches(
        tokens[images, patches],
        centers[patches],
        np.array([one.noun for one in shown]),
        np.array([one.color or "" for one in shown]),
        np.asarray(rows)[images.numpy()],
    )


def patch_centers(rows: int, columns: int) -> Tensor:
    """Where the centers of the patches of a grid are, (P, 2) as x and y in 0..1, row by row."""
    y, x = ((torch.arange(n) + 0.5) / n for n in (rows, columns))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)


def only_object_at(scene: Scene, points: Tensor) -> Tensor:
    """(P,) the number of the object in whose box each of `points` (P, 2) lies; -1 for no box and for several."""
    boxes = [(number, box) for number, one in enumerate(scene.objects) for box in one.boxes]  # corners in pixels
    numbers, corners = torch.tensor([n for n, _ in boxes]), torch.tensor([box for _, box in boxes]) / scene.side
    inside = ((points[:, None] >= corners[:, :2]) & (points[:, None] <= corners[:, 2:])).all(dim=-1)  # (P, boxes)
    return torch.where(inside.sum(dim=1) == 1, numbers[inside.int().argmax(dim=1)], -1)


def linear_probe(model: Any, fitted_on: Scenes, scenes: Scenes, layer: int | None = None) -> Scores:
    """How well a linear map, fitted on the scenes `fitted_on`, reads from one patch of other `scenes` its position
    (R² of x and y together: 1 is perfect, 0 is no better than the mean), and the object and the color that it shows
    (share right; classes are fitted as one-hot vectors)."""
    seen, new = (object_patches(model, some, range(len(some)), layer) for some in (fitted_on, scenes))
    return Scores(
        {
            "position R²": read_position(seen, new),
            "object": _read_class(seen, new, seen.nouns, new.nouns),
            "color": _read_class(seen, new, seen.colors, new.colors),
        }
    )


def read_position(seen: ObjectPatches, new: ObjectPatches) -> Score:
    """R² of a linear map from token to position, fitted on `seen`."""
    wrong = ((LinearMap.fit(seen.tokens, seen.places)(new.tokens) - new.places) ** 2).sum(dim=1)  # (n,)
    spread = ((new.places - new.places.mean(dim=0)) ** 2).sum(dim=1)
    _, image = np.unique(new.rows, return_inverse=True)
    sums = np.stack([np.bincount(image, values.numpy()) for values in (wrong, spread)], axis=1)  # (B, 2)
    return bootstrap_counts(sums, lambda part: 1 - part[:, 0].sum() / part[:, 1].sum(), 0.0, len(image))


def _read_class(seen: ObjectPatches, new: ObjectPatches, known: np.ndarray, truth: np.ndarray) -> Score:
    """The share of patches whose class a linear map finds; those without one ("") are left out. Chance is the share of
    the most frequent class."""
    classes = np.unique(known[known != ""])
    fit_on, asked = known != "", np.isin(truth, classes)
    targets = torch.from_numpy(known[fit_on, None] == classes)
    found = LinearMap.fit(seen.tokens[fit_on], targets)(new.tokens[asked]).argmax(dim=1)
    right = classes[found.numpy()] == truth[asked]
    _, counts = np.unique(truth[asked], return_counts=True)
    return bootstrap(right, counts.max() / counts.sum(), images=new.rows[asked])
