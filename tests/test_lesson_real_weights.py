"""Lesson 15's check: the solution passes, typical wrong converters fail with the message meant for them."""

import pytest
import torch

from minivlp.lessons import real_weights
from minivlp.lessons.check import NotYet

TABLE = (
    ("self_attn.in_proj_", "self_attention.qkv."),
    ("self_attn.out_proj", "self_attention.out"),
    ("multihead_attn.out_proj", "cross_attention.out"),
    ("multihead_attn.in_proj_", "cross_attention.qkv."),
    ("linear1", "feed_forward.up"),
    ("linear2", "feed_forward.down"),
    ("norm1", "self_norm"),
    ("norm2", "cross_norm"),
    ("norm3", "feed_norm"),
    ("layers.", "blocks."),
)


def convert(released, table=TABLE, q=slice(0, 1), kv=slice(1, 3), order=(0, 1, 2)):
    found = {}
    for name, tensor in released.items():
        for theirs, ours in table:
            name = name.replace(theirs, ours)
        if "cross_attention.qkv" in name:
            parts = [tensor.chunk(3)[i] for i in order]
            found[name.replace("qkv", "q")] = torch.cat(parts[q])
            found[name.replace("qkv", "kv")] = torch.cat(parts[kv])
        else:
            found[name] = tensor
    return found


def in_place(released):
    for name in list(released):
        released.update(convert({name: released.pop(name)}))
    return released


def renamed_only(released):
    found = {}
    for name, tensor in released.items():
        for theirs, ours in TABLE:
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found


def exchanged(*pair):
    """A table in which two of our names have changed places."""
    first, second = pair
    places = {first: second, second: first}
    return tuple((theirs, places.get(ours, ours)) for theirs, ours in TABLE)


def one_digit(released):
    """Layer 10 is taken for layer 1."""
    return convert({name: tensor for name, tensor in released.items() if not name.startswith("layers.10.")})


def splits_self(released):
    found = convert(released)
    return {
        part: rows
        for name, tensor in found.items()
        for part, rows in (
            [(name.replace("qkv", x), r) for x, r in zip(("q", "kv"), tensor.split([16, 32]), strict=True)]
            if "qkv" in name
            else [(name, tensor)]
        )
    }


def stub(released):
    raise NotImplementedError("your turn")


@pytest.mark.parametrize("answer", [convert, in_place, real_weights.converted])
def test_the_solution_passes(answer, capsys):
    real_weights.check_converter(answer)
    assert capsys.readouterr().out.startswith("ok")


def without(word):
    return lambda released: {name: t for name, t in convert(released).items() if word not in name}


WRONG = [
    (stub, "Nothing written yet"),
    (lambda released: list(convert(released).items()), "Return a dict"),
    (lambda released: convert(released, TABLE[:-1]), "still has its released name"),
    (renamed_only, "has no `qkv`"),
    (splits_self, "do not split it"),
    (without("bias"), "names are missing"),
    (lambda released: convert(released) | {"scale": torch.ones(1)}, "our stack has no `scale`"),
    (lambda released: convert(released, order=(1, 0, 2)), "rows of the keys"),
    (lambda released: convert(released, order=(2, 0, 1)), "rows of the values"),
    (lambda released: convert(released, order=(0, 2, 1)), "values first"),
    (lambda released: convert(released, kv=slice(0, 2)), "queries and keys"),
    (lambda released: convert(released, kv=slice(1, 2)), "must have shape"),
    (lambda released: convert(released, exchanged("cross_norm", "feed_norm")), "are exchanged"),
    (lambda released: convert(released, exchanged("self_norm", "feed_norm")), "has other values"),
    (lambda released: convert(released, exchanged("self_attention.out", "cross_attention.out")), "has other values"),
    (one_digit, "11 layers"),
]


@pytest.mark.parametrize("answer, message", WRONG)
def test_a_wrong_answer_is_told_what_failed(answer, message):
    with pytest.raises(NotYet, match=message):
        real_weights.check_converter(answer)
