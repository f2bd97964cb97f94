"""The image tokens of a model whose image tower is frozen, computed once per picture and kept.

    cache = token_cache(model, dataset)            # in memory, filled as pictures are asked for
    cache = token_cache(model, dataset, folder)    # in a file that is filled now and found again by later runs
    fit(model, Loader(dataset, tokenizer, 48, 64, image_tokens=cache).batch, settings)

Tokens are kept in half precision. Axes: B batch, P patches, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.data.batch import to_tensor
from minivlp.device import bf16_is_fast, reuse_memory
from minivlp.device import device as best_device
from minivlp.errors import NotFinite
from minivlp.inference import device_of, evaluating
from minivlp.training.checkpoint import naming
from minivlp.training.prefetch import Prefetch

GROUP = 16  # pictures in one pass: 8 to 16 were fastest on a CPU. At most this many are lost by a kill
MEMORY_BUDGET = 1 << 30  # bytes that a cache in memory may take
READS_PATCHES = ("cross_encode", "match", "mlm_logits", "generate", "ground")  # verbs that need all tokens


class TokenCache:
    """`cache(rows)` returns `model.encode_image` of these pictures, (B, 1+P, D) float32 on the CPU.

    Made by `token_cache`. `tokens`: how many tokens of each picture are kept; None for all. Without `file` they are in
    memory, and a picture is encoded when it is first asked for; `fill` completes a file. It is mapped anew at each
    call, so the pages read do not stay resident.
    """

    def __init__(self, model: Any, dataset: Any, tokens: int | None = None, file: Path | None = None) -> None:
        self.model, self.tower, self.dataset, self.tokens, self.file = model, model.image, dataset, tokens, file
        self.size = model.config.image.image_size
        one = self.encode(self.dataset.pixels([0], self.size))
        self.shape = (len(dataset), *one.shape[1:])  # (pictures, 1+P, D)
        self.bytes_per_picture = one.nbytes
        if file is None:
            if (needed := len(dataset) * one.nbytes) > MEMORY_BUDGET:
                gigabytes = f"{needed / 2**30:.1f} GiB, more than {MEMORY_BUDGET / 2**30:.1f} GiB"
                raise ValueError(f"image tokens in memory would take {gigabytes}: keep them in a `folder`")
            self._memory = np.empty(self.shape, np.float16)  # its pages are taken when they are first written
            self._known = np.zeros(len(dataset), bool)

    def __call__(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        rows = np.asarray(rows, dtype=np.int64)
        if self.file is None:
            self._fill(np.unique(rows[~self._known[rows]]))
            tokens = self._memory[rows]
        else:
            tokens = np.asarray(np.memmap(self.file, np.float16, "r", shape=self.shape)[rows])
        return torch.from_numpy(tokens).float()

    def _fill(self, rows: np.ndarray) -> None:
        for start in range(0, len(rows), GROUP):
            group = rows[start : start + GROUP]
            self._memory[group] = self.encode(self.dataset.pixels(group, self.size))
            self._known[group] = True

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """At most GROUP pictures (B, H, W, 3) uint8 -> tokens (B, 1+P, D) float16.

        The tower always gets GROUP pictures, some of them twice if need be: products of another size may be rounded
        differently, and a resumed run, which asks for other pictures together, must find the same values.
        Raises NotFinite where half precision cannot hold the tokens.
        """
        count, device = len(pixels), device_of(self.tower)
        images = to_tensor(pixels[np.arange(GROUP) % count]).to(device)
        autocast = torch.autocast(device.type, torch.bfloat16) if bf16_is_fast(device) else nullcontext()
        with evaluating(self.tower), autocast:  # the tower only: meanwhile, the rest of the model may be trained
            tokens = self.model.encode_image(images)[:count, : self.tokens].half().cpu()
        if not tokens.isfinite().all():
            message = "the tower's tokens are too large for half precision, in which they would be kept."
            raise NotFinite(message, "Train without {}.", "image_tokens")
        return tokens.numpy()

    def fill(self) -> None:
        """Encode all pictures now, on the best device, with a progress bar; in a file only those it lacks."""
        device, fastest = device_of(self.tower), best_device()
        self.tower.to(fastest)
        try:
            # every pass allocates the same large tensors: without this, a CPU spends half of its time on fresh pages
            with reuse_memory() if fastest.type == "cpu" else nullcontext():
                self._fill_file() if self.file else self._fill(np.flatnonzero(~self._known))
        finally:
            self.tower.to(device)

    def _fill_file(self) -> None:
        """The file's length says how many pictures it holds; two runs that write at once write the same."""
        from tqdm.auto import tqdm

        count, size = len(self.dataset), self.bytes_per_picture
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.touch()
        there = self.file.stat().st_size // size
        starts = range(there // GROUP * GROUP if there < count else count, count, GROUP)

        def read(start: int) -> np.ndarray:
            return self.dataset.pixels(range(start, min(start + GROUP, count)), self.size)

        with (
            naming(self.file),
            open(self.file, "r+b") as out,
            Prefetch(read, starts) as groups,
            tqdm(total=count, initial=starts.start, desc="image tokens", unit="picture", disable=not starts) as bar,
        ):
            for start, pixels in groups:
                out.seek(start * size)
                out.write(self.encode(pixels).tobytes())
                out.flush()
                bar.update(len(pixels))


def token_cache(model: Any, dataset: Any, folder: Path | str | None = None) -> TokenCache:
    """A cache of `model.encode_image` for each picture of the dataset, for `Loader(image_tokens=...)`.

    Without `folder` it is in memory. With one, it is a file there, whose name depends on the tower's weights and on the
    pictures; it is completed now. Of models that attend to patches (`READS_PATCHES`) all tokens are kept, of others the
    first.
    Raises ValueError for a model without an image tower, for a tower that is trained (freeze it first), and for a cache
    in memory of more than MEMORY_BUDGET bytes.
    """
    tower = getattr(model, "image", None)
    if not isinstance(tower, nn.Module):
        raise ValueError(f"{type(model).__name__} has no image tower whose output could be kept")
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError("the image tower is trained, so its output will change: freeze it before keeping its tokens")
    tokens = None if any(hasattr(model, verb) for verb in READS_PATCHES) else 1
    file = None if folder is None else Path(folder) / f"{fingerprint(model, dataset, tokens)}.f16"
    cache = TokenCache(model, dataset, tokens, file)
    if file or best_device().type == "mps":  # MPS is not made for several threads, and batches come from another one
        cache.fill()
    return cache


def fingerprint(model: Any, dataset: Any, tokens: int | None) -> str:
    """A name for these image tokens: other weights, pictures or another order of them give another.

    Models share a file if their `encode_image` is nothing but the tower (X-VLM's replaces the first token).
    """
    size = model.config.image.image_size
    with evaluating(model):
        images = to_tensor(dataset.pixels([0], size)).to(device_of(model.image))
        only_tower = torch.equal(model.encode_image(images), model.image(images))
    digest = hashlib.sha256(f"{model.config.image} {tokens} {only_tower or type(model).__name__}".encode())
    for name, tensor in model.image.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    for part in _pictures(dataset):
        digest.update(str(part).encode())
    return digest.hexdigest()[:16]


def _pictures(dataset: Any) -> list[Any]:
    """What identifies a dataset's pictures: its own `fingerprint()`, else its files, else samples of the pictures."""
    if hasattr(dataset, "fingerprint"):
        return [dataset.fingerprint()]
    rows = getattr(dataset, "rows", ())
    if len(rows) == len(dataset) and all(hasattr(row, "file") for row in rows):
        stats = [row.file.stat() for row in rows]
        return [(str(row.file), stat.st_size, stat.st_mtime_ns) for row, stat in zip(rows, stats, strict=True)]
    some = np.linspace(0, len(dataset) - 1, min(8, len(dataset)), dtype=int)
    ids = [dataset.image_id(row) for row in range(len(dataset))]
    return [type(dataset).__name__, ids, dataset.pixels(some, 64).tobytes().hex()]
