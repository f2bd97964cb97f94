"""A tower that stays as it is need see each picture only once: its tokens are kept on disk, and epochs take seconds.

    with kept_tokens(model, dataset, folder) as numbered:          # the tower runs here, unless it has before
        fit(model, recipe.batches(numbered, tokenizer), settings)  # reads tokens; decodes no picture

Nothing else changes: loader and model go on as always, only that a "picture" is the number of its row (`Numbered`), and
the tower looks up the tokens of that number (`KeptTower`). Axes: B batch, P patches, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.data.batch import to_tensor
from minivlp.machine import device as best_device

CHUNK = 64  # pictures that the tower sees at a time, and at most what a kill costs


class Numbered:
    """The dataset with its row's number in place of each picture: all of its pixels are the number's three bytes."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def __repr__(self) -> str:
        return repr(self.dataset)

    def pixels(self, rows: Sequence[int], size: int) -> np.ndarray:
        """uint8 (B, size, size, 3)."""
        digits = np.asarray(rows)[:, None] // (65536, 256, 1) % 256  # (B, 3)
        return np.tile(digits.astype(np.uint8)[:, None, None], (1, size, size, 1))


def numbers(images: Tensor) -> Tensor:
    """The rows (B,), on the CPU, that `Numbered` pictures (B, 3, H, W) in [-1, 1] stand for."""
    digits = ((images[:, :, 0, 0].cpu() + 1) * 127.5).round().long()  # (B, 3)
    return (digits * torch.tensor([65536, 256, 1])).sum(dim=1)


class KeptTower(nn.Module):
    """What `Numbered` pictures (B, 3, H, W) stand for: their tokens (B, 1+P, D), or (B, 1, D) if only these are kept.

    The file is mapped anew for each batch: pages that were read then do not stay in memory.
    """

    def __init__(self, file: Path, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.file, self.shape = file, shape

    def forward(self, images: Tensor) -> Tensor:
        tokens = np.memmap(self.file, np.float16, "r", shape=self.shape)[numbers(images).numpy()]  # a copy
        return torch.from_numpy(np.asarray(tokens)).to(images)


@contextmanager
def kept_tokens(model: Any, dataset: Any, folder: Path | str) -> Iterator[Numbered]:
    """Within, `model.image` only looks up what it says of each picture of the dataset; after, it is as before.

    The tokens are written to a file in `folder`, whose name says the pictures and the tower: another run with the same
    finds them there, and one that was stopped goes on where it was. Half precision; of a model without fusion only the
    first token, as it reads no other. The tower is not trained, so it must not be: freeze it first.
    Raises ValueError for a tower that can be trained and for more than 16,777,216 pictures.
    """
    tower, size = model.image, model.config.image.image_size
    if any(weight.requires_grad for weight in tower.parameters()):
        raise ValueError("the image tower can be trained, so what it says will change: freeze it to keep its tokens")
    if len(dataset) > 1 << 24:
        raise ValueError(f"{len(dataset):,} pictures: three bytes count 16,777,216")
    only = 1 if not hasattr(model, "match") else None
    file = Path(folder) / f"{fingerprint(tower, dataset, f'{model.config.image} {only}')}.f16"
    shape = write_tokens(tower.to(best_device()).eval(), dataset, size, file, only)
    teacher = getattr(model, "teacher", None)  # whose tower is the same
    holders = [model] if teacher is None else [model, teacher.model]
    towers = [holder.image for holder in holders]
    try:
        for holder in holders:
            holder.image = KeptTower(file, shape)
        yield Numbered(dataset)
    finally:
        for holder, own in zip(holders, towers, strict=True):
            holder.image = own.to(model.project_image.weight.device)


@torch.no_grad()
def write_tokens(tower: nn.Module, dataset: Any, size: int, file: Path, only: int | None) -> tuple[int, int, int]:
    """Write the first `only` tokens (None: all) of each picture that the file does not hold yet, picture by picture.

    Returns the file's shape (pictures, tokens, D). How far it got is its length; two runs that write at once write the
    same. Raises FloatingPointError where half precision cannot hold the tokens.
    """
    from tqdm.auto import tqdm

    device = next(tower.parameters()).device

    def tokens(rows: Sequence[int]) -> np.ndarray:
        out = tower(to_tensor(dataset.pixels(rows, size)).to(device))[:, :only].half().cpu().numpy()
        if not np.isfinite(out).all():
            raise FloatingPointError("the tower's features are too large for half precision: leave it unfrozen")
        return out

    one = tokens([0])[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    done = file.stat().st_size // one.nbytes
    starts = range(done, len(dataset), CHUNK)
    with open(file, "r+b", buffering=0) as out:
        for start in tqdm(starts, desc=f"the tower sees {len(dataset) - done:,} pictures", disable=not starts):
            out.seek(start * one.nbytes)
            out.write(tokens(range(start, min(start + CHUNK, len(dataset)))).tobytes())
    return len(dataset), *one.shape


def fingerprint(tower: nn.Module, dataset: Any, about: str) -> str:
    """A name for what this tower says of these pictures: another weight, file, order or `about` gives another."""
    digest = hashlib.sha256(about.encode())
    for name, tensor in tower.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for row in dataset.rows:
        known = row.file.stat()
        digest.update(f"{row.file} {known.st_size} {known.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
