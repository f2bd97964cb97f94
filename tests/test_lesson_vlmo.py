"""Lesson 04's checks: the solution passes, typical wrong answers fail with the message meant for them."""

import pytest
import torch

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


RIGHT = [
    (vlmo.check_route, route),
    (vlmo.check_route, route_in_place),
    (vlmo.check_frozen, freeze(*TRAINED)),
    (vlmo.check_index, index),
]


@pytest.mark.parametrize("check, answer", RIGHT, ids=["route", "route_in_place", "frozen", "index"])
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
