"""Checks of lesson 04's exercises: pairs, single images, single texts, layers on both sides of the first VL expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minivlp.layers.attention import attention_mask
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.experts import ExpertBlock
from minivlp.layers.relative import image_index
from minivlp.layers.transformer import BlockConfig
from minivlp.lessons.check import attempt, demand, demand_gradients
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


BLOCK = BlockConfig(width=8, heads=2, hidden=16)  # of the block of exercise 2
LENGTH, TOKENS = 3, 8  # text tokens and all tokens of its pairs
NAMES = {False: ("text", "image"), True: ("text", "image", "vl")}  # experts of a lower and of an upper layer


def check_block(student: Callable[[BlockConfig, tuple[str, ...]], nn.Module]) -> None:
    """Exercise 2: `student(config, names)` -> a block of VLMo, called with x (B, N, D), the number of text tokens in
    front, and mask (B, N), True on tokens that may be attended to; returns (B, N, D).

    Its parts are `norm` and `attention`, shared by all tokens, and `experts`, a module per name. A block that has the
    expert "vl" belongs to the top layers. The check replaces the parts by those of `ExpertBlock`.
    """
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, TOKENS, BLOCK.width, generator=draw)
    mask = torch.ones(3, TOKENS, dtype=torch.bool)
    mask[1, 2] = mask[2, 1:3] = False  # padding of the texts
    for top in (False, True):
        module, right = _blocks(student, top, draw)
        for length, name in ((LENGTH, "a pair"), (0, "an image alone"), (TOKENS, "a text alone")):
            _demand_block(module, right, x, length, mask, name)
        few = x[:1, 1:6], 2, mask[:1, 1:6]  # a batch of one, a view of other tokens
        demand(
            _close(attempt(module.forward, *few), _run(right, *few)),
            "Right for a batch of three, wrong for a single pair of 2 text and 3 image tokens.",
        )
        learned = x.clone().requires_grad_()
        probe = torch.randn(x.shape, generator=draw)
        runs = (attempt(module.forward, learned, LENGTH, mask), _run(right, learned, LENGTH, mask))
        demand_gradients(*((run * probe).sum() for run in runs), x=learned)
        _demand_trained(right, *((run * probe).sum() for run in runs))
    print("ok: attention for all tokens together, then each token's expert; the VL expert for pairs in the top layers.")


def _blocks(student: Callable, top: bool, draw: torch.Generator) -> tuple[nn.Module, ExpertBlock]:
    """The student's block and the library's; both have the same modules as parts, with random weights."""
    right = ExpertBlock(BLOCK, NAMES[top])
    for weights in right.parameters():  # a fresh LayerNorm or bias would not show that it is left out
        weights.data = torch.randn(weights.shape, generator=draw) * (0.5 if weights.dim() > 1 else 1.0)
    module = attempt(student, BLOCK, NAMES[top])
    demand(isinstance(module, nn.Module), "Return a module: a class derived from nn.Module.")
    for name in ("norm", "attention", "experts"):
        demand(isinstance(getattr(module, name, None), nn.Module), f"Your block has no part `self.{name}`.")
    demand(
        set(getattr(module.experts, "keys", list)()) == set(NAMES[top]),
        f"`self.experts` is an nn.ModuleDict with the experts {', '.join(NAMES[top])}.",
    )
    module.norm, module.attention, module.experts = right.self_norm, right.self_attention, right.experts
    return module, right


def _demand_block(module: nn.Module, right: ExpertBlock, x: Tensor, length: int, mask: Tensor, name: str) -> None:
    """Demand the library's output, or say which mistake was made with these inputs."""
    got = attempt(module.forward, x, length, mask)
    demand(
        isinstance(got, Tensor) and got.shape == x.shape,
        f"As many tokens come out as go in: {tuple(x.shape)}, yours is {tuple(getattr(got, 'shape', ()))}.",
    )
    with torch.no_grad():
        wanted = _run(right, x, length, mask)
        for message, wrong in _mistakes(right, x, length, mask).items():
            demand(_close(wrong, wanted) or not _close(got, wrong), message)
    where = "with the VL expert" if "vl" in right.experts else "without a VL expert"
    demand(_close(got, wanted), f"For {name}, in a layer {where}, the library's block gives other numbers.")


def _route(right: ExpertBlock, length: int, tokens: int) -> tuple[tuple[str, int], ...]:
    """The experts of a block: the VL expert for pairs where there is one."""
    if 0 < length < tokens and "vl" in right.experts:
        return (("vl", tokens),)
    return tuple((name, count) for name, count in (("text", length), ("image", tokens - length)) if count)


def _run(right: ExpertBlock, x: Tensor, length: int, mask: Tensor) -> Tensor:
    return right(x, attention_mask(mask), parts=_route(right, length, x.shape[1]))


def _mistakes(right: ExpertBlock, x: Tensor, length: int, mask: Tensor) -> dict[str, Tensor]:
    """Typical wrong outputs, by the message that they get."""
    route, keep = _route(right, length, x.shape[1]), attention_mask(mask)

    def experts(attended: Tensor, parts: tuple[tuple[str, int], ...] = route) -> Tensor:
        return right.feed(attended, parts)

    attended = right.attend(x, keep)
    found = {
        "The attention's residual connection is missing: h = x + Attention(...).": experts(attended - x),
        "The experts' residual connection is missing: y = h + the output of the experts.": experts(attended) - attended,
        "LayerNorm in front of the attention is missing.": experts(x + right.self_attention(x, mask=keep)),
        "All tokens attend to padding: give the mask to the attention.": experts(right.attend(x)),
        "The attention is missing: no token attends to any other.": experts(x),
        "The experts read x instead of h, the tokens after the attention.": attended + experts(x) - x,
        "The experts run in front of the attention; they come behind it.": right.attend(experts(x), keep),
    }
    if 0 < length < x.shape[1]:
        apart = [right.attend(x[:, some], keep[..., some]) for some in (slice(length), slice(length, None))]
        message = "Text and image attend to themselves only: run the attention once, on all tokens together."
        found[message] = experts(torch.cat(apart, dim=1))
        swapped = (("image", length), ("text", x.shape[1] - length))
        found["Text and image expert are swapped: the text comes first."] = experts(attended, swapped)
        own = (("text", length), ("image", x.shape[1] - length))
        message = 'A block with the expert "vl" uses it for all tokens of a pair; yours uses text and image experts.'
        found[message] = experts(attended, own)
    elif "vl" in right.experts:
        message = "Text or image alone went to the VL expert; a single modality keeps its own expert in all layers."
        found[message] = experts(attended, (("vl", x.shape[1]),))
    for name in set(right.experts) - ({route[0][0]} if len(route) == 1 else set()):
        message = f"All tokens went to the {name} expert. Which tokens are text is said by `length`."
        found.setdefault(message, experts(attended, ((name, x.shape[1]),)))
    return found


def _demand_trained(right: ExpertBlock, loss: Tensor, wanted: Tensor) -> None:
    """Demand the right gradient of all weights, which both blocks share."""
    weights = dict(right.named_parameters())
    results = [torch.autograd.grad(one, list(weights.values()), allow_unused=True) for one in (loss, wanted)]
    for name, mine, other in zip(weights, *results, strict=True):
        demand(
            (mine is None) == (other is None) and (mine is None or torch.allclose(mine, other, rtol=1e-3, atol=1e-4)),
            f"The output is right, but `{name}` does not get its gradient: compute with tensors all the way, without "
            ".detach(), .data or torch.no_grad().",
        )


def _close(got: Tensor, wanted: Tensor) -> bool:
    return isinstance(got, Tensor) and got.shape == wanted.shape and torch.allclose(got.float(), wanted, atol=1e-4)


def check_frozen(student: Callable[[nn.Module], None]) -> None:
    """Exercise 4: `student(model)` sets `requires_grad` of a VLMo's parameters for stage 2, texts without images."""
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
