"""Checks of lesson 04's exercises: pairs, single images, single texts, layers on both sides of the first VL expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.relative import image_index
from minivlp.layers.transformer import BlockConfig
from minivlp.lessons.check import attempt, demand
from minivlp.models.vlmo import VLMo, VLMoConfig

ADDED = {"text": 1.0, "image": 10.0, "vl": 100.0}  # what each expert of exercise 1 adds, to recognize it by
Experts = dict[str, Callable[[Tensor], Tensor]]


def _experts_of(x: Tensor, got: Tensor) -> list[str]:
    """The expert of each token, read off what was added; "?" where it was none of them."""
    added = (got.float() - x).transpose(0, 1).flatten(1)  # (N, B * D)
    names = {number: name for name, number in ADDED.items()}
    even = (added - added[:, :1]).abs().amax(1) < 1e-3
    return [names.get(round(row[0].item(), 2), "?") if ok else "?" for row, ok in zip(added, even, strict=True)]


def _names(experts: list[str]) -> str:
    """`text, text, image` as "text x 2, image x 1"."""
    return ", ".join(f"{name} x {experts.count(name)}" for name in dict.fromkeys(experts))


def check_route(student: Callable[[Tensor, int, int, int, Experts], Tensor]) -> None:
    """Exercise 1: `student(x, length, layer, vl_from, experts)` -> what the experts make of x, (B, N, D).

    x (B, N, D): `length` text tokens, then image tokens; `length` is 0 for an image alone, N for a text alone.
    experts: functions by name, "text", "image", and from layer `vl_from` on "vl". Without the residual connection.
    """
    experts: Experts = {name: lambda x, number=number: x + number for name, number in ADDED.items()}
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))

    def ask(length: int, layer: int, of: Tensor = x, vl_from: int = 2) -> list[str]:
        got = attempt(student, of, length, layer, vl_from, experts)
        demand(
            isinstance(got, Tensor) and got.shape == of.shape,
            f"As many tokens come out as go in: {tuple(of.shape)}, yours is {tuple(getattr(got, 'shape', ()))}.",
        )
        return _experts_of(of, got)

    pair = ask(length=3, layer=0)
    demand(
        "vl" not in pair,
        "In layer 0 with vl_from=2 some tokens go to the VL expert, which exists from layer vl_from on: is your "
        f"comparison of `layer` and `vl_from` the wrong way round? Yours: {_names(pair)}.",
    )
    demand(
        "?" not in pair,
        "Some output is not that of an expert for the token at its place: concatenate the parts in the order of the "
        "input, text first, and add nothing.",
    )
    demand(pair != ["image"] * 3 + ["text"] * 5, "Text and image are swapped: the text comes first.")
    demand(
        pair == ["text"] * 3 + ["image"] * 5,
        f"Of 3 text and 5 image tokens in a lower layer, 3 go to the text expert and 5 to the image expert; "
        f"yours: {_names(pair)}.",
    )
    demand(ask(3, 1) == pair, "Layer 1 with vl_from=2 has no VL expert yet: as in layer 0.")
    first, higher = ask(3, 2), ask(3, 3)
    demand(
        higher == ["vl"] * 8, f"In the top layers all tokens of a pair go to the VL expert; yours: {_names(higher)}."
    )
    demand(first == higher, "Layer vl_from is the first that has a VL expert: `layer >= vl_from`, not `>`.")
    for length, name in ((0, "image"), (8, "text")):
        top, low = ask(length, 3), ask(length, 0)
        demand(low == [name] * 8, f"A single {name} goes to the {name} expert; yours: {_names(low)}.")
        demand(
            top == [name] * 8,
            f"A single {name} has nothing to be fused with: it stays with the {name} expert in all layers. In layer 3 "
            f"yours goes to: {_names(top)}.",
        )
    demand(ask(1, 0, x[:, :2]) == ["text", "image"], "One text token and one patch are a pair, too.")
    demand(ask(3, 0, x[:1]) == pair, "Right for a batch of two, wrong for a batch of one.")
    learned = x.clone().requires_grad_()
    got = attempt(student, learned, 3, 0, 2, experts)
    demand(
        got.requires_grad and torch.autograd.grad(got.sum(), learned)[0].all(),
        "No gradient reaches some tokens through your function, so nothing below this layer could learn.",
    )
    print("ok: each token to the expert of its modality, pairs to the VL expert in the top layers.")


def check_frozen(student: Callable[[nn.Module], None]) -> None:
    """Exercise 2: `student(model)` sets `requires_grad` of a VLMo's parameters for stage 2, texts without images."""
    block = BlockConfig(width=8, heads=2, hidden=16, layer_scale=0.1)
    image = ImageConfig(16, 8, 3, block, relative_positions=True)
    text = TextConfig(20, 6, 3, block, embed_norm=True, position_std=None)
    model = VLMo(VLMoConfig(image, text, vl_from=2, embed_width=4))

    def ask(before: bool) -> dict[str, bool]:
        """Which parameters are trained after the call, if all of them were trained (or frozen) before."""
        model.requires_grad_(before)
        attempt(student, model, none_counts=True)
        return {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    trained = ask(before=True)

    def some(*parts: str, value: bool = True) -> str:
        """The first parameter with one of these parts in its name that is (not) trained; "" if there is none."""
        return next((name for name, on in trained.items() if on == value and any(part in name for part in parts)), "")

    demand(not all(trained.values()), "Everything is still trained: set `parameter.requires_grad = False` on the rest.")
    demand(any(trained.values()), "Nothing is trained any more.")
    for parts, message in (
        (("self_attention",), "The attention was trained on images and stays as it is"),
        (("self_norm", "attention_scale", "feed_scale"), "The attention's LayerNorm and the LayerScale stay with it"),
        (("experts.image",), "No text passes through the image experts, and weight decay would shrink them"),
        (("experts.vl",), "The VL experts are trained on pairs"),
        (("image_embed",), "A text has no patches and no image class token"),
        (("itc_head", "match_head"), "The heads for pairs are trained on pairs"),
    ):
        demand(not some(*parts), f"{message}: freeze {some(*parts)}.")
    forgotten = some("experts.text.norm", value=False)
    demand(
        not forgotten or some("experts.text.feed_forward", value=False),
        f"An expert is its LayerNorm and its feed-forward layer: {forgotten} must be trained, too.",
    )
    for parts, message in (
        (("experts.text",), "This stage is there to train the text experts"),
        (("text_embed",), "The token embedding is not trained before"),
        (("mlm_head",), "The head that predicts masked tokens is not trained before"),
        (
            ("relative", "joint.norm", "token_type"),
            "The relative positions, the token types and the final LayerNorm are trained as well in the released code, "
            "although images use them too",
        ),
    ):
        left = some(*parts, value=False)
        demand(not left, f"{message}: {left} must be trained.")
    again = ask(before=False)
    frozen = next((name for name, on in trained.items() if on and not again[name]), "")
    demand(
        not frozen,
        "If the model arrives frozen, as another stage may leave it, yours leaves "
        f"{frozen} frozen: also set `requires_grad = True` on what is trained.",
    )
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"ok: {count:,} of {sum(p.numel() for p in model.parameters()):,} parameters are trained on text.")


def offset_index(rows: int, columns: int) -> Tensor:
    """Row of the table for patch i attending to patch j of a grid, (P, P)."""
    return image_index((rows, columns))[1:, 1:]  # without the class token


def check_index(student: Callable[[int, int], Tensor]) -> None:
    """Exercise 3: `student(rows, columns)` -> which row of the table belongs to patch i attending to patch j, (P, P).

    Patches are numbered row by row. The offset is the position of patch i minus that of patch j; offsets (down, right)
    are numbered like patches: first the one most up, and of these the one most to the left.
    """
    rows, columns = 2, 3
    wanted = offset_index(rows, columns)
    got = torch.as_tensor(attempt(student, rows, columns))
    demand(
        got.shape == (6, 6),
        f"One row for every query patch and one column for every key patch: (6, 6), yours is {tuple(got.shape)}. The "
        "class token is left out here.",
    )
    demand(
        not got.is_floating_point() and got.dtype != torch.bool,
        f"These numbers are used as indices, so they must be integers (torch.long); yours are {got.dtype}. "
        "`/` makes floats, `//` integers.",
    )
    got = got.long()
    demand((got >= 0).all(), "Rows of a table start at 0: shift the offsets, which start at -(rows - 1).")
    demand(
        not torch.equal(got, wanted.T), "Your offset has the other sign: it is patch i minus patch j, not j minus i."
    )
    apart = wanted.unique().numel()
    demand(
        got.unique().numel() >= apart,
        f"There are {apart} different offsets on a grid of 2 x 3, but yours use {got.unique().numel()} rows: two "
        "offsets share one. Left differs from right, and one step down is 2 * columns - 1 rows of the table.",
    )
    same = all(len(set(got[wanted == row].tolist())) == 1 for row in wanted.unique())
    demand(same, "Patches at the same offset must share a row, wherever they are: this makes the position relative.")
    demand(
        int(got.max()) < (2 * rows - 1) * (2 * columns - 1),
        f"The table has (2 * 2 - 1) * (2 * 3 - 1) = 15 rows, 0 to 14; yours goes up to {int(got.max())}.",
    )
    demand(
        torch.equal(got, wanted),
        f"Patch 0 attends to itself with row {int(wanted[0, 0])} and to patch 1, its right neighbor, with row "
        f"{int(wanted[0, 1])}; yours are {int(got[0, 0])} and {int(got[0, 1])}. Up and down count first, then left and "
        "right.",
    )
    for grid in ((4, 4), (3, 1), (1, 5), (1, 1)):
        right = torch.equal(torch.as_tensor(attempt(student, *grid)).long(), offset_index(*grid))
        demand(right, f"Right for 2 x 3 patches, wrong for {grid[0]} x {grid[1]}.")
    print("ok: one row per offset, (2 rows - 1) x (2 columns - 1) of them, for any grid.")
