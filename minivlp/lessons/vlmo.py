"""Checks of lesson 04's exercises: pairs, single images, single texts, layers on both sides of the first VL expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.lessons.check import attempt, demand
from minivlp.models.vlmo import VLMo, VLMoConfig

MARKS = {"text": 1.0, "image": 10.0, "vl": 100.0}  # what each expert of exercise 1 adds, so that it can be recognised
Experts = dict[str, Callable[[Tensor], Tensor]]


def _who(x: Tensor, got: Tensor) -> list[str]:
    """Which expert each token has been to, read off what was added; "?" where it was none of them."""
    added = (got.float() - x).transpose(0, 1).flatten(1)  # (N, B * D)
    names = {mark: name for name, mark in MARKS.items()}
    even = (added - added[:, :1]).abs().amax(1) < 1e-3
    return [names.get(round(row[0].item(), 2), "?") if ok else "?" for row, ok in zip(added, even, strict=True)]


def _names(experts: list[str]) -> str:
    """`text, text, image` as "text x 2, image x 1"."""
    return ", ".join(f"{name} x {experts.count(name)}" for name in dict.fromkeys(experts))


def check_route(student: Callable[[Tensor, int, int, int, Experts], Tensor]) -> None:
    """Exercise 1: `student(x, words, layer, vl_from, experts)` -> what the experts make of x, (B, N, D).

    x (B, N, D): `words` tokens of text, then those of the image; `words` is 0 for an image alone, N for a text alone.
    experts: functions by name, "text", "image", and from layer `vl_from` on "vl". No residual, the block adds that.
    """
    experts: Experts = {name: lambda x, mark=mark: x + mark for name, mark in MARKS.items()}
    below = {name: experts[name] for name in ("text", "image")}
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))

    def ask(words: int, layer: int, of: Tensor = x, vl_from: int = 2) -> list[str]:
        got = attempt(student, of.clone(), words, layer, vl_from, experts if layer >= vl_from else below)
        demand(
            isinstance(got, Tensor) and got.shape == of.shape,
            f"As many tokens come out as went in: {tuple(of.shape)}, yours is {tuple(getattr(got, 'shape', ()))}.",
        )
        return _who(of, got)

    pair = ask(words=3, layer=0)
    demand(
        "?" not in pair,
        "Some token did not come out of an expert at its own place: put the parts together in the order in which they "
        "came in, text first, and add nothing.",
    )
    demand(pair != ["image"] * 3 + ["text"] * 5, "You have text and image the wrong way round: the text comes first.")
    demand(
        pair == ["text"] * 3 + ["image"] * 5,
        f"Of 3 words and 5 image tokens in a lower layer, 3 go to the text expert and 5 to the image expert; "
        f"yours: {_names(pair)}.",
    )
    demand(ask(3, 1) == pair, "Layer 1 of vl_from=2 still lies below the VL experts: as in layer 0.")
    first, higher = ask(3, 2), ask(3, 3)
    demand(higher == ["vl"] * 8, f"In the top layers a pair goes to the VL expert as a whole; yours: {_names(higher)}.")
    demand(first == higher, "Layer vl_from is the first that has a VL expert: `layer >= vl_from`, not `>`.")
    for words, name in ((0, "image"), (8, "text")):
        top, low = ask(words, 3), ask(words, 0)
        demand(low == [name] * 8, f"A lone {name} goes to the {name} expert; yours: {_names(low)}.")
        demand(
            top == [name] * 8,
            f"A lone {name} has nothing to be fused with: it keeps the {name} expert up to the top, else it could not "
            f"be encoded alone. In layer 3 yours goes to: {_names(top)}.",
        )
    demand(ask(1, 0, x[:, :2]) == ["text", "image"], "One word and one patch are a pair too.")
    print("ok: below, each token to its own expert; on top, pairs to the VL expert; who comes alone stays alone.")


def check_frozen(student: Callable[[nn.Module], None]) -> None:
    """Exercise 2: `student(model)` sets `requires_grad` of a VLMo's parameters for stage 2, texts without images."""
    block = BlockConfig(width=8, heads=2, hidden=16)
    text = TextConfig(20, 6, 3, block, embed_norm=True)
    model = VLMo(VLMoConfig(ImageConfig(16, 8, 3, block), text, vl_from=2, embed_width=4))
    attempt(student, model, none_counts=True)
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def some(*parts: str, value: bool = True) -> str:
        """The first parameter with one of these parts in its name that does (or not) learn; "" if there is none."""
        return next((name for name, on in learns.items() if on == value and any(part in name for part in parts)), "")

    demand(not all(learns.values()), "Everything still learns: set `parameter.requires_grad = False` on what must not.")
    demand(any(learns.values()), "Nothing learns any more.")
    for parts, message in (
        (("self_attention",), "The attention has learned from images, and texts must not spoil it"),
        (("self_norm", "_scale"), "What belongs to the attention, its LayerNorm and the LayerScale, stays with it"),
        (("experts.image",), "No text passes through the image experts, and weight decay would shrink them"),
        (("experts.vl",), "The VL experts wait for pairs"),
        (("patches", "class_token"), "A text has no patches and no image class token"),
        (("project_", "match_head", "pooler", "log_"), "The heads for pairs wait for pairs"),
    ):
        demand(not some(*parts), f"{message}: freeze {some(*parts)}.")
    forgotten = some("experts.text.norm", value=False)
    demand(
        not forgotten or some("experts.text.feed_forward", value=False),
        f"An expert is its LayerNorm and its feed-forward layer: {forgotten} learns too.",
    )
    for parts, message in (
        (("experts.text",), "The text experts are what this stage is for"),
        (("words.",), "Nobody has trained the words before"),
        (("word_head",), "Who is to guess words needs a head that learns to"),
        (
            ("relative", "joint.norm", "modality"),
            "The relative positions, the modality vectors and the final LayerNorm learn as well in the released code, "
            'although images use them too ("only the text experts" is the idea, not the code)',
        ),
    ):
        left = some(*parts, value=False)
        demand(not left, f"{message}: {left} must learn.")
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"ok: {count:,} of {sum(p.numel() for p in model.parameters()):,} numbers learn from text.")


def offset_index(rows: int, columns: int) -> Tensor:
    """Row of the table for patch i looking at patch j of any grid, (P, P): `layers.relative` without class token."""
    patch = torch.arange(rows * columns)
    y, x = patch // columns, patch % columns
    down, right = y[:, None] - y[None, :] + rows - 1, x[:, None] - x[None, :] + columns - 1
    return down * (2 * columns - 1) + right


def check_index(student: Callable[[int, int], Tensor]) -> None:
    """Exercise 3: `student(rows, columns)` -> which row of the table serves patch i looking at patch j, (P, P).

    Patches are numbered row by row. The offset is the looking patch's place minus the other's; offsets (down, right)
    are numbered like patches: first the one most up, and of these the one most left.
    """
    rows, columns = 2, 3
    wanted = offset_index(rows, columns)
    got = torch.as_tensor(attempt(student, rows, columns))
    demand(
        got.shape == (6, 6),
        f"A row for every patch that looks and a column for every patch it looks at: (6, 6), yours is "
        f"{tuple(got.shape)}. The class token comes later.",
    )
    got = got.long()
    demand((got >= 0).all(), "Rows of a table start at 0: shift the offsets, which go from -(rows - 1) on, up.")
    demand(
        not torch.equal(got, wanted.T),
        "Yours is the other's place minus the looking patch's: the table is read from the wrong end.",
    )
    apart = wanted.unique().numel()
    demand(
        got.unique().numel() >= apart,
        f"There are {apart} different offsets on a grid of 2 x 3, but yours use {got.unique().numel()} rows: two "
        "offsets share one. Left is not right, and one step down must skip all 2 * columns - 1 offsets of a row.",
    )
    same = all(len(set(got[wanted == row].tolist())) == 1 for row in wanted.unique())
    demand(same, "Patches at the same offset must share a row, wherever they are: that is what makes it relative.")
    demand(
        int(got.max()) < (2 * rows - 1) * (2 * columns - 1),
        f"The table has (2 * 2 - 1) * (2 * 3 - 1) = 15 rows, 0 to 14; yours goes up to {int(got.max())}.",
    )
    demand(
        torch.equal(got, wanted),
        f"Patch 0 looks at itself with row {int(wanted[0, 0])} and at patch 1, its right neighbour, with row "
        f"{int(wanted[0, 1])}; yours are {int(got[0, 0])} and {int(got[0, 1])}. Up and down count first, then left and "
        "right.",
    )
    for more in ((4, 4), (3, 1), (1, 5)):
        wrong = torch.as_tensor(attempt(student, *more)).long() != offset_index(*more)
        demand(not wrong.any(), f"Right for 2 x 3 patches, wrong for {more[0]} x {more[1]}.")
    print("ok: one row per offset, (2 rows - 1) x (2 columns - 1) of them, however large the picture.")
