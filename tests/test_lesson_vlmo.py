"""Lesson 04's checks: the solution passes, typical wrong answers fail with the message meant for them."""

import pytest
import torch

from minivlp.layers.relative import image_index
from minivlp.lessons import vlmo
from minivlp.lessons.check import NotYet


def route(x, words, layer, vl_from, experts):
    text, image = x[:, :words], x[:, words:]
    if words in (0, x.shape[1]):
        return experts["image" if words == 0 else "text"](x)
    if layer >= vl_from:
        return experts["vl"](x)
    return torch.cat([experts["text"](text), experts["image"](image)], dim=1)


def route_swapped(x, words, layer, vl_from, experts):
    return route(x, words, layer, vl_from, {**experts, "text": experts["image"], "image": experts["text"]})


def route_image_first(x, words, layer, vl_from, experts):
    return torch.cat([experts["image"](x[:, words:]), experts["text"](x[:, :words])], dim=1)


def route_with_residual(x, words, layer, vl_from, experts):
    return x + route(x, words, layer, vl_from, experts)


def route_off_by_one(x, words, layer, vl_from, experts):
    return route(x, words, layer, vl_from + 1, experts)


def route_too_early(x, words, layer, vl_from, experts):
    return route(x, words, layer, vl_from - 1, {"vl": experts["text"], **experts})


def route_all_to_vl(x, words, layer, vl_from, experts):
    return experts["vl"](x) if layer >= vl_from else route(x, words, layer, vl_from, experts)


def route_never_vl(x, words, layer, vl_from, experts):
    return route(x, words, 0, 1, experts)


def route_one_expert(x, words, layer, vl_from, experts):
    return experts["text"](x)


def route_lone_text_as_image(x, words, layer, vl_from, experts):
    return experts["image"](x) if words == x.shape[1] else route(x, words, layer, vl_from, experts)


LEARN = ("experts.text", "words.", "word_head", "relative", "joint.norm", "modality")


def freeze(*learn, but=()):
    """Let parameters learn by parts of their name."""

    def answer(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = any(p in name for p in learn) and not any(p in name for p in but)

    answer.__name__ = f"freeze_all_but {learn} {but}"
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


RIGHT = [(vlmo.check_route, route), (vlmo.check_frozen, freeze(*LEARN)), (vlmo.check_index, index)]


@pytest.mark.parametrize("check, answer", RIGHT, ids=["route", "frozen", "index"])
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


def test_the_library_itself_passes(capsys):
    def stage(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(model.learns_from_text(name))

    vlmo.check_frozen(stage)
    assert torch.equal(vlmo.offset_index(4, 4), image_index(4)[1:, 1:])
    vlmo.check_index(lambda rows, columns: index(rows, columns).tolist())  # another type is right too
    assert capsys.readouterr().out.count("ok") == 2


def stub(*arguments):
    raise NotImplementedError("your turn")


WRONG = [
    (vlmo.check_route, stub, "Nothing written yet"),
    (vlmo.check_route, lambda *a: None, "`return` missing"),
    (vlmo.check_route, lambda x, *a: x[:, :2], "As many tokens"),
    (vlmo.check_route, lambda x, *a: x, "did not come out of an expert"),
    (vlmo.check_route, route_swapped, "wrong way round"),
    (vlmo.check_route, route_image_first, "in the order in which they came in"),
    (vlmo.check_route, route_with_residual, "add nothing"),
    (vlmo.check_route, route_one_expert, "text x 8"),
    (vlmo.check_route, route_off_by_one, "not `>`"),
    (vlmo.check_route, route_too_early, "still lies below"),
    (vlmo.check_route, route_never_vl, "VL expert as a whole"),
    (vlmo.check_route, route_all_to_vl, "A lone image has nothing"),
    (vlmo.check_route, route_lone_text_as_image, "A lone text goes to the text expert"),
    (vlmo.check_frozen, stub, "Nothing written yet"),
    (vlmo.check_frozen, lambda model: None, "Everything still learns"),
    (vlmo.check_frozen, lambda model: model.requires_grad_(False) and None, "Nothing learns"),
    (vlmo.check_frozen, freeze(*LEARN, "self_attention"), "texts must not spoil it"),
    (vlmo.check_frozen, freeze(*LEARN, "norm"), "LayerNorm and the LayerScale"),
    (vlmo.check_frozen, freeze(*LEARN, "_scale"), "LayerNorm and the LayerScale"),
    (vlmo.check_frozen, freeze(*LEARN, "experts"), "image experts"),
    (vlmo.check_frozen, freeze(*LEARN, "experts.vl"), "wait for pairs"),
    (vlmo.check_frozen, freeze(*LEARN, "class_token"), "no patches"),
    (vlmo.check_frozen, freeze(*LEARN, "pooler"), "heads for pairs"),
    (vlmo.check_frozen, freeze(*LEARN, but=("experts.text.norm",)), "its LayerNorm and its feed-forward"),
    (vlmo.check_frozen, freeze(*LEARN[1:]), "what this stage is for"),
    (vlmo.check_frozen, freeze(*LEARN, but=("words.",)), "Nobody has trained the words"),
    (vlmo.check_frozen, freeze(*LEARN, but=("word_head",)), "needs a head"),
    (vlmo.check_frozen, freeze(*LEARN[:3]), "learn as well in the released code"),
    (vlmo.check_frozen, freeze(*LEARN[:5]), "modality must learn"),
    (vlmo.check_index, stub, "Nothing written yet"),
    (vlmo.check_index, lambda r, c: torch.nn.functional.pad(index(r, c), (1, 0, 1, 0)), "class token comes later"),
    (vlmo.check_index, lambda r, c: index(r, c, shift=False), "start at 0"),
    (vlmo.check_index, lambda r, c: index(r, c).T, "wrong end"),
    (vlmo.check_index, lambda r, c: index(r, c, absolute=True), "Left is not right"),
    (vlmo.check_index, lambda r, c: index(r, c, reach=c), "two offsets share one"),
    (vlmo.check_index, lambda r, c: index(r, c, reach=2 * r - 1), "two offsets share one"),
    (
        vlmo.check_index,
        lambda r, c: torch.arange(r * c) + r * c * torch.arange(r * c)[:, None],
        "what makes it relative",
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
