"""Check of lesson 15's exercise: the names of a released state dict, and one fused projection that has to be split.

The released model is `torch.nn.TransformerDecoder`, made on the spot; ours is `layers.transformer.Transformer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.layers.transformer import Block, BlockConfig, Transformer
from minivlp.lessons.check import attempt, demand

SELF, CROSS = "self_attn.in_proj_", "multihead_attn.in_proj_"
NAMES = {  # in one layer: theirs -> ours
    "self_attn.in_proj_": "self_attention.qkv.",
    "self_attn.out_proj.": "self_attention.out.",
    "multihead_attn.out_proj.": "cross_attention.out.",
    "linear1.": "feed_forward.up.",
    "linear2.": "feed_forward.down.",
    "norm1.": "self_norm.",
    "norm2.": "cross_norm.",
    "norm3.": "feed_norm.",
}


def made_release(layers: int = 2, width: int = 16, heads: int = 4, hidden: int = 24) -> nn.TransformerDecoder:
    """A decoder of PyTorch with random weights, also in its LayerNorms and biases: no two tensors are alike."""
    layer = nn.TransformerDecoderLayer(width, heads, hidden, 0.0, batch_first=True, norm_first=True)
    model = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width)).eval()
    generator = torch.Generator().manual_seed(layers)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3 + (weight.ndim == 1) * 0.5)
    return model


def ours_like(layers: int = 2, width: int = 16, heads: int = 4, hidden: int = 24) -> Transformer:
    """Our stack of the same sizes, with weights of its own."""
    config = BlockConfig(width, heads, hidden, activation="relu")
    return Transformer(config, (Block(config, width) for _ in range(layers))).eval()


def converted(released: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released tensors under our names."""
    found = {}
    for name, tensor in released.items():
        if not name.startswith("layers."):
            found[name] = tensor  # the last LayerNorm is called `norm` in both
            continue
        _, number, rest = name.split(".", 2)
        prefix = f"blocks.{number}."
        if rest.startswith(CROSS):
            kind, width = rest.removeprefix(CROSS), len(tensor) // 3
            found[f"{prefix}cross_attention.q.{kind}"] = tensor[:width]
            found[f"{prefix}cross_attention.kv.{kind}"] = tensor[width:]
            continue
        theirs = next(key for key in NAMES if rest.startswith(key))
        found[prefix + NAMES[theirs] + rest.removeprefix(theirs)] = tensor
    return found


def check_converter(student: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Exercise: `student(released)`, a state dict of `made_release`, -> a state dict of `ours_like`."""
    for layers, dtype in ((1, torch.float32), (2, torch.float32), (11, torch.float32), (2, torch.float64)):
        release = made_release(layers).to(dtype)
        released = release.state_dict()
        got: Any = attempt(student, dict(released))
        _check_names(got, converted(released), layers)
        _check_values(got, released, layers)
        model = ours_like(layers).to(dtype)
        model.load_state_dict(got)
        generator = torch.Generator().manual_seed(0)
        text, image = (torch.randn(2, n, 16, generator=generator, dtype=dtype) for n in (5, 7))
        with torch.no_grad():
            same = torch.allclose(model(text, context=image), release(text, image), atol=1e-4)
        demand(same, "All tensors are in their places, but the outputs differ.")
    print("ok: every tensor has its place, and our stack computes what the released model computes.")


def _check_names(got: Any, wanted: dict[str, Tensor], layers: int) -> None:
    kind = f"A model of {layers} layer{'s' if layers > 1 else ''}: "
    demand(isinstance(got, dict), "Return a dict: our name -> tensor.")
    left = [name for name in got if name.startswith("layers.")]
    demand(not left, f"{kind}`{left[0] if left else ''}` still has its released name.")
    fused = [name for name in got if "cross_attention.qkv" in name]
    demand(
        not fused,
        "Our cross-attention has no `qkv`: its queries come from the text and its keys and values from the image, so "
        "it has `q` and `kv`. Split the fused matrix.",
    )
    parts = [name for name in got if name.rsplit(".", 1)[0].endswith(("self_attention.q", "self_attention.kv"))]
    demand(not parts, "Our self-attention keeps queries, keys and values in one matrix, `qkv`: do not split it.")
    missing, extra = sorted(wanted.keys() - got.keys()), sorted(got.keys() - wanted.keys())
    demand(not missing, f"{kind}{len(missing)} names are missing, the first is `{missing[0] if missing else ''}`.")
    demand(not extra, f"{kind}our stack has no `{extra[0] if extra else ''}`.")
    for name, tensor in wanted.items():
        shape = tuple(getattr(got[name], "shape", ()))
        demand(shape == tuple(tensor.shape), f"`{name}` must have shape {tuple(tensor.shape)}, yours has {shape}.")


def _check_values(got: dict[str, Tensor], released: dict[str, Tensor], layers: int) -> None:
    wanted = converted(released)
    for number in range(layers):
        ours, fused = f"blocks.{number}.", released[f"layers.{number}.{CROSS}weight"]
        q, kv = got[f"{ours}cross_attention.q.weight"], got[f"{ours}cross_attention.kv.weight"]
        width = len(q)
        for part, rows in (("keys", fused[width : 2 * width]), ("values", fused[2 * width :])):
            demand(
                not torch.equal(q, rows),
                f"Your `q` has the rows of the {part}. The fused matrix has the queries first, then keys, then values.",
            )
        demand(
            not torch.equal(kv, torch.cat([fused[2 * width :], fused[width : 2 * width]])),
            "Your `kv` has the values first. Keys come first in both models.",
        )
        demand(
            not torch.equal(kv, fused[: 2 * width]),
            "Your `kv` has the rows of queries and keys; it must have those of keys and values.",
        )
        pair = wanted[f"{ours}feed_norm.weight"], wanted[f"{ours}cross_norm.weight"]
        swapped = torch.equal(got[f"{ours}cross_norm.weight"], pair[0])
        demand(
            not swapped or torch.equal(*pair),
            "`norm2` and `norm3` are exchanged. Their order is that of the layer: self-attention, cross-attention, "
            "feed-forward.",
        )
    for name, tensor in wanted.items():
        demand(torch.equal(got[name], tensor), f"`{name}` has other values than the tensor that belongs there.")
