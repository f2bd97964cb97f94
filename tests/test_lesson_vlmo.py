"""Lesson 04's checks: the solution passes, typical wrong answers fail with the message meant for them."""

import pytest
import torch
from torch import nn

from minivlp.layers.attention import Attention
from minivlp.layers.experts import Expert
from minivlp.layers.relative import image_index
from minivlp.lessons import vlmo
from minivlp.lessons.check import NotYet


def route(x, length, layer, vl_from, experts):
    text, image = x[:, :length], x[:, length:]
    if length in (0, x.shape[1]):
        return experts["image" if length == 0 else "text"](x)
    if layer >= vl_from:
        return experts["vl"](x)
    return torch.cat([experts["text"](text), experts["image"](image)], dim=1)


def route_swapped(x, length, layer, vl_from, experts):
    return route(x, length, layer, vl_from, {**experts, "text": experts["image"], "image": experts["text"]})


def route_image_first(x, length, layer, vl_from, experts):
    return torch.cat([experts["image"](x[:, length:]), experts["text"](x[:, :length])], dim=1)


def route_with_residual(x, length, layer, vl_from, experts):
    return x + route(x, length, layer, vl_from, experts)


def route_off_by_one(x, length, layer, vl_from, experts):
    return route(x, length, layer, vl_from + 1, experts)


def route_too_early(x, length, layer, vl_from, experts):
    return route(x, length, layer, vl_from - 1, {"vl": experts["text"], **experts})


def route_all_to_vl(x, length, layer, vl_from, experts):
    return experts["vl"](x) if layer >= vl_from else route(x, length, layer, vl_from, experts)


def route_never_vl(x, length, layer, vl_from, experts):
    return route(x, length, 0, 1, experts)


def route_one_expert(x, length, layer, vl_from, experts):
    return experts["text"](x)


def route_lone_text_as_image(x, length, layer, vl_from, experts):
    return experts["image"](x) if length == x.shape[1] else route(x, length, layer, vl_from, experts)


TRAINED = ("experts.text", "text_embed", "mlm_head", "relative", "joint.norm", "token_type")


def freeze(*trained, but=()):
    """Train the parameters with these parts in their names."""

    def answer(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = any(p in name for p in trained) and not any(p in name for p in but)

    answer.__name__ = f"freeze_all_but {trained} {but}"
    return answer


def index(rows, columns, shift=True, reach=None, absolute=False):
    patch = torch.arange(rows * columns)
    y, x = patch // columns, patch % columns
    down, right = y[:, None] - y[None, :], x[:, None] - x[None, :]
    if absolute:
        down, right = down.abs(), right.abs()
    elif shift:
        down, right = down + rows - 1, right + columns - 1
    return down * (2 * columns - 1 if reach is None else reach) + right


def index_right_first(rows, columns):
    return index(columns, rows).unflatten(0, (columns, rows)).unflatten(2, (columns, rows)).permute(
        1, 0, 3, 2
    ).flatten(2).flatten(0, 1)  # fmt: skip


def index_square_only(rows, columns):
    return index(rows, columns) if (rows, columns) == (2, 3) else index(rows, columns, reach=2 * rows - 1)


def route_in_place(x, length, layer, vl_from, experts):
    x[:] = route(x, length, layer, vl_from, experts)
    return x


def route_the_wrong_way_round(x, length, layer, vl_from, experts):
    return experts["vl"](x) if 0 < length < x.shape[1] and layer < vl_from else route(x, length, 0, 1, experts)


def route_only_two(x, length, layer, vl_from, experts):
    return route(x, length, layer, vl_from, experts) if len(x) == 2 else experts["text"](x)


def freeze_only(model):
    """Freezes what is not trained, and leaves all else as it was."""
    for name, parameter in model.named_parameters():
        if not any(part in name for part in TRAINED):
            parameter.requires_grad = False


class Block(nn.Module):
    """A right answer to exercise 2; subclasses change one step."""

    def __init__(self, config, names):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(config.width), Attention(config.width, config.heads)
        self.experts = nn.ModuleDict({name: Expert(config) for name in names})

    def forward(self, x, length, mask):
        h = self.attend(x, length, mask)
        return h + self.route(h, length)

    def attend(self, x, length, mask):
        return x + self.attention(self.norm(x), mask=mask[:, None, None])

    def route(self, h, length):
        return route(h, length, int("vl" in self.experts), 1, self.experts)


def block(**changes):
    """`Block` with other methods."""
    return type("Mine", (Block,), changes)


def attend_apart(self, x, length, mask):
    halves = [slice(length), slice(length, None)] if 0 < length < x.shape[1] else [slice(None)]
    return torch.cat([Block.attend(self, x[:, some], length, mask[:, some]) for some in halves], dim=1)


def vl_for_all(self, h, length):
    return self.experts["vl"](h) if "vl" in self.experts else Block.route(self, h, length)


def without_vl(self, h, length):
    return route(h, length, 0, 1, self.experts)


def block_in_place(self, x, length, mask):
    h = Block.attend(self, x, length, mask)
    mask.fill_(False)
    new = Block.route(self, h, length)
    new += h
    return new


def only_three(self, x, length, mask):
    return Block.forward(self, x, length, mask) if len(x) == 3 else x


RIGHT = [
    (vlmo.check_block, Block),
    (vlmo.check_block, block(forward=block_in_place)),
    (vlmo.check_route, route),
    (vlmo.check_route, route_in_place),
    (vlmo.check_frozen, freeze(*TRAINED)),
    (vlmo.check_index, index),
]


@pytest.mark.parametrize(
    "check, answer", RIGHT, ids=["block", "block_in_place", "route", "route_in_place", "frozen", "index"]
)
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


def test_the_library_itself_passes(capsys):
    def stage(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(model.learns_from_text(name))

    vlmo.check_frozen(stage)
    assert torch.equal(vlmo.offset_index(4, 4), image_index((4, 4))[1:, 1:])
    vlmo.check_index(lambda rows, columns: index(rows, columns).tolist())  # another type is right too
    assert capsys.readouterr().out.count("ok") == 2


def stub(*arguments):
    raise NotImplementedError("your turn")


WRONG = [
    (vlmo.check_block, stub, "Nothing written yet"),
    (vlmo.check_block, block(forward=stub), "Nothing written yet"),
    (vlmo.check_block, lambda *a: 3, "derived from nn.Module"),
    (vlmo.check_block, lambda *a: nn.Linear(2, 2), "no part `self.norm`"),
    (vlmo.check_block, block(forward=lambda self, x, n, m: Block.forward(self, x, n, m)[:, :1]), "As many tokens"),
    (vlmo.check_block, block(attend=lambda self, x, n, m: Block.attend(self, x, n, m) - x), "attention's residual"),
    (vlmo.check_block, block(forward=lambda self, x, n, m: self.route(self.attend(x, n, m), n)), "experts' residual"),
    (
        vlmo.check_block,
        block(attend=lambda self, x, n, m: x + self.attention(x, mask=m[:, None, None])),
        "LayerNorm in front",
    ),
    (vlmo.check_block, block(attend=lambda self, x, n, m: x + self.attention(self.norm(x))), "attend to padding"),
    (vlmo.check_block, block(attend=lambda self, x, n, m: x), "attention is missing"),
    (vlmo.check_block, block(attend=attend_apart), "attend to themselves only"),
    (
        vlmo.check_block,
        block(forward=lambda self, x, n, m: self.attend(x, n, m) + self.route(x, n)),
        "instead of h",
    ),
    (
        vlmo.check_block,
        block(forward=lambda self, x, n, m: self.attend(x + self.route(x, n), n, m)),
        "in front of the attention",
    ),
    (
        vlmo.check_block,
        block(route=lambda self, h, n: route_swapped(h, n, int("vl" in self.experts), 1, self.experts)),
        "swapped",
    ),
    (vlmo.check_block, block(route=without_vl), "uses text and image experts"),
    (vlmo.check_block, block(route=vl_for_all), "keeps its own expert"),
    (vlmo.check_block, block(route=lambda self, h, n: self.experts["text"](h)), "went to the text expert"),
    (vlmo.check_block, block(forward=lambda self, x, n, m: 2 * Block.forward(self, x, n, m)), "other numbers"),
    (vlmo.check_block, block(forward=only_three), "wrong for a single pair"),
    (
        vlmo.check_block,
        block(attend=lambda self, x, n, m: Block.attend(self, x.detach(), n, m)),
        "`x` no gradient",
    ),
    (
        vlmo.check_block,
        block(route=lambda self, h, n: Block.route(self, h, n).detach()),
        "part of the loss is detached",
    ),
    (vlmo.check_route, stub, "Nothing written yet"),
    (vlmo.check_route, lambda *a: None, "`return` missing"),
    (vlmo.check_route, lambda x, *a: x[:, :2], "As many tokens"),
    (vlmo.check_route, lambda x, *a: x, "not that of an expert"),
    (vlmo.check_route, route_swapped, "swapped"),
    (vlmo.check_route, route_image_first, "in the order of the input"),
    (vlmo.check_route, route_with_residual, "add nothing"),
    (vlmo.check_route, route_one_expert, "text x 8"),
    (vlmo.check_route, route_off_by_one, "not `>`"),
    (vlmo.check_route, route_too_early, "no VL expert yet"),
    (vlmo.check_route, route_never_vl, "all tokens of a pair go to the VL expert"),
    (vlmo.check_route, route_all_to_vl, "A single image has nothing"),
    (vlmo.check_route, route_lone_text_as_image, "A single text goes to the text expert"),
    (vlmo.check_route, route_the_wrong_way_round, "wrong way round"),
    (vlmo.check_route, route_only_two, "wrong for a batch of one"),
    (vlmo.check_route, lambda x, *a: route(x.detach(), *a), "No gradient"),
    (vlmo.check_frozen, freeze_only, "arrives frozen"),
    (vlmo.check_index, lambda r, c: index(r, c).float(), "integers"),
    (vlmo.check_index, lambda r, c: index(r, c) / 1, "integers"),
    (vlmo.check_frozen, stub, "Nothing written yet"),
    (vlmo.check_frozen, lambda model: None, "Everything is still trained"),
    (vlmo.check_frozen, lambda model: model.requires_grad_(False) and None, "Nothing is trained"),
    (vlmo.check_frozen, freeze(*TRAINED, "self_attention"), "trained on images and stays"),
    (vlmo.check_frozen, freeze(*TRAINED, "norm"), "LayerNorm and the LayerScale"),
    (vlmo.check_frozen, freeze(*TRAINED, "feed_scale"), "LayerNorm and the LayerScale"),
    (vlmo.check_frozen, freeze(*TRAINED, "experts"), "image experts"),
    (vlmo.check_frozen, freeze(*TRAINED, "experts.vl"), "trained on pairs"),
    (vlmo.check_frozen, freeze(*TRAINED, "class_token"), "no patches"),
    (vlmo.check_frozen, freeze(*TRAINED, "pooler"), "heads for pairs"),
    (vlmo.check_frozen, freeze(*TRAINED, but=("experts.text.norm",)), "its LayerNorm and its feed-forward"),
    (vlmo.check_frozen, freeze(*TRAINED[1:]), "to train the text experts"),
    (vlmo.check_frozen, freeze(*TRAINED, but=("text_embed",)), "The token embedding is not trained before"),
    (vlmo.check_frozen, freeze(*TRAINED, but=("mlm_head",)), "The head that predicts masked tokens"),
    (vlmo.check_frozen, freeze(*TRAINED[:3]), "trained as well in the released code"),
    (vlmo.check_frozen, freeze(*TRAINED[:5]), "token_type must be trained"),
    (vlmo.check_index, stub, "Nothing written yet"),
    (vlmo.check_index, lambda r, c: torch.nn.functional.pad(index(r, c), (1, 0, 1, 0)), "class token is left out"),
    (vlmo.check_index, lambda r, c: index(r, c, shift=False), "start at 0"),
    (vlmo.check_index, lambda r, c: index(r, c).T, "other sign"),
    (vlmo.check_index, lambda r, c: index(r, c, absolute=True), "Left differs from right"),
    (vlmo.check_index, lambda r, c: index(r, c, reach=c), "two offsets share one"),
    (vlmo.check_index, lambda r, c: index(r, c, reach=2 * r - 1), "two offsets share one"),
    (
        vlmo.check_index,
        lambda r, c: torch.arange(r * c) + r * c * torch.arange(r * c)[:, None],
        "makes the position relative",
    ),
    (vlmo.check_index, lambda r, c: 2 * index(r, c), "0 to 14"),
    (vlmo.check_index, lambda r, c: index(r, c) + 1, "0 to 14"),
    (vlmo.check_index, index_right_first, "Up and down count first"),
    (vlmo.check_index, index_square_only, "wrong for 3 x 1"),
]


@pytest.mark.parametrize("check, answer, message", WRONG)
def test_a_wrong_answer_is_told_what_failed(check, answer, message):
    with pytest.raises(NotYet, match=message):
        check(answer)
