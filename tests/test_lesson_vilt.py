"""Lesson 02's checks: the solution passes, typical wrong answers fail with the message meant for them."""

import pytest
import torch
from torch import nn

from minivlp.layers.attention import attention_mask
from minivlp.layers.transformer import Block, BlockConfig
from minivlp.lessons import vilt
from minivlp.lessons.check import NotYet


def mask_words(word, maskable, rate):
    return (torch.rand(word.shape).gather(1, word) < rate) & maskable


def mask_pieces(word, maskable, rate):
    return (torch.rand(word.shape) < rate) & maskable


def mask_words_of_masked_pieces(word, maskable, rate):
    chosen = mask_pieces(word, maskable, rate)
    same = word[:, :, None] == word[:, None, :]
    return (same & chosen[:, None, :]).any(2) & maskable


def plan(cost, beta, outer, sign=-1, keep=True, shares=True):
    words, patches = cost.shape if shares else (1, 1)
    kernel, moved = (sign * cost / beta).exp(), torch.ones_like(cost)
    rows = torch.full((len(cost), 1), 1 / len(cost))
    for _ in range(outer):
        step = kernel * moved if keep else kernel
        columns = 1 / patches / (step * rows).sum(0, keepdim=True)
        rows = 1 / words / (step * columns).sum(1, keepdim=True)
        moved = rows * step * columns
    return moved


def plan_rows_first(cost, beta, outer):
    """Rescales in the other order, so that the patches' shares are exact, not the words'."""
    return plan(cost.T, beta, outer).T


def sequence(text, text_mask, image, image_mask, token_type):
    return torch.cat([text + token_type[0], image + token_type[1]], 1), torch.cat([text_mask, image_mask], 1)


def with_mask(change):
    """The right sequence with another mask."""

    def answer(text, text_mask, image, image_mask, token_type):
        tokens, _ = sequence(text, text_mask, image, image_mask, token_type)
        return tokens, change(text_mask, image_mask)

    return answer


def zeroed(text, text_mask, image, image_mask, token_type):
    tokens, mask = sequence(text, text_mask, image, image_mask, token_type)
    return tokens * mask[..., None], mask


def plan_that_forgets(cost, beta, outer):
    """Starts from equal row factors again in every step."""
    moved = torch.ones_like(cost)
    for _ in range(outer):
        step = moved * (-cost / beta).exp()
        columns = 1 / cost.shape[1] / step.mean(0, keepdim=True)
        moved = step * columns / (step * columns).sum(1, keepdim=True) / cost.shape[0]
    return moved


def mask_with_seed(word, maskable, rate):
    torch.manual_seed(1)
    return mask_words(word, maskable, rate)


def mask_in_place(word, maskable, rate):
    maskable &= torch.rand(word.shape).gather(1, word) < rate
    return maskable


def plan_in_place(cost, beta, outer):
    return plan(cost.div_(beta), 1.0, outer)


def sequence_in_place(text, text_mask, image, image_mask, token_type):
    text += token_type[0]
    image += token_type[1]
    return torch.cat([text, image], 1), torch.cat([text_mask, image_mask], 1)


class Attention(nn.Module):
    """A right answer to exercise 2; subclasses change one step."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, mask):
        return x + self.out(self.mix(self.norm(x), mask))

    def mix(self, x, mask):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return (self.weights(q @ k.mT / q.shape[-1] ** 0.5, mask) @ v).transpose(1, 2).flatten(2)

    def weights(self, scores, mask):
        return scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)


def right_weights(scores, mask):
    return Attention.weights(None, scores, mask)


def attention(name, **changes):
    """`Attention` with other methods."""
    return type(name, (Attention,), changes)


def attention_in_place(self, x, mask):
    mixed = self.out(self.mix(self.norm(x), mask))
    mask.fill_(False)
    mixed += x
    return mixed


def attention_in_place_of_what_the_gradient_needs(self, x, mask):
    x += self.out(self.mix(self.norm(x), mask))
    return x


def attention_of_a_loop(self, x, mask):
    """Row by row, head by head: slow and right."""
    rows = []
    for row, real in zip(self.norm(x), mask, strict=True):
        q, k, v = self.qkv(row).chunk(3, dim=-1)
        size, heads = x.shape[-1] // self.heads, []
        for h in range(self.heads):
            some = slice(h * size, (h + 1) * size)
            scores = q[:, some] @ k[:, some].T / size**0.5
            heads.append(scores.masked_fill(~real, -1e9).softmax(1) @ v[:, some])
        rows.append(self.out(torch.cat(heads, dim=1)))
    return x + torch.stack(rows)


def mix_in_the_wrong_shape(self, x, mask):
    q, k, v = (part.reshape(len(x), self.heads, x.shape[1], -1) for part in self.qkv(x).chunk(3, dim=-1))
    return (self.weights(q @ k.mT / q.shape[-1] ** 0.5, mask) @ v).transpose(1, 2).flatten(2)


def mix_without_transposing_back(self, x, mask):
    q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
    return (self.weights(q @ k.mT / q.shape[-1] ** 0.5, mask) @ v).reshape(x.shape)


def mix_with_keys_first(self, x, mask):
    k, q, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
    return (self.weights(q @ k.mT / q.shape[-1] ** 0.5, mask) @ v).transpose(1, 2).flatten(2)


def one_head(self, x, mask):
    self.heads = 1
    return Attention.mix(self, x, mask)


def only_the_first_row(self, x, mask):
    return Attention.forward(self, x, mask[:1] if len(x) == 1 else mask) * (1 if len(x) > 1 else 2)


def right(self, x, mask):
    return Attention.forward(self, x, mask)


RIGHT = [
    (vilt.check_attention, Attention),
    (vilt.check_attention, attention("attention_in_place", forward=attention_in_place)),
    (vilt.check_attention, attention("attention_of_a_loop", forward=attention_of_a_loop)),
    (vilt.check_whole_words, mask_in_place),
    (vilt.check_plan, plan_in_place),
    (vilt.check_sequence, sequence_in_place),
    (vilt.check_whole_words, mask_words),
    (vilt.check_plan, plan),
    (vilt.check_sequence, sequence),
]


@pytest.mark.parametrize("check, answer", RIGHT, ids=[a.__name__ for _, a in RIGHT])
def test_the_solution_passes(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("ok")


def test_answers_may_be_of_another_type(capsys):
    """A plan in float64, and choices as 0 and 1, are right too."""
    vilt.check_whole_words(lambda *a: mask_words(*a).int())
    vilt.check_plan(lambda cost, beta, outer: plan(cost.double(), beta, outer))
    vilt.check_sequence(lambda *a: [x.int() if x.dtype == torch.bool else x.double() for x in sequence(*a)])
    assert capsys.readouterr().out.count("ok:") == 3


@pytest.mark.parametrize("seed", range(5))
def test_luck_does_not_decide(seed, capsys):
    torch.manual_seed(seed)
    vilt.check_whole_words(mask_words)


def stub(*arguments):
    raise NotImplementedError("your turn")


WRONG = [
    (vilt.check_whole_words, stub, "Nothing written yet"),
    (vilt.check_whole_words, lambda w, m, r: None, "`return` missing"),
    (vilt.check_whole_words, lambda w, m, r: mask_words(w, m, r)[:, 0], "One answer per token"),
    (vilt.check_whole_words, lambda w, m, r: mask_words(w, torch.ones_like(m), r), "only where `maskable`"),
    (vilt.check_whole_words, lambda w, m, r: m & False, "nothing is masked"),
    (vilt.check_whole_words, mask_pieces, "one number per word"),
    (vilt.check_whole_words, mask_words_of_masked_pieces, "Draw once per word"),
    (vilt.check_whole_words, lambda w, m, r: mask_words(w, m, 1 - r), "below the rate"),
    (vilt.check_whole_words, lambda w, m, r: (torch.rand(1, 10).expand_as(w).gather(1, w) < max(r, 0.5)) & m, "anew"),
    (vilt.check_whole_words, lambda w, m, r: (torch.rand(len(w), 1) < r) & m, "all words are masked or none"),
    (vilt.check_whole_words, lambda w, m, r: mask_words(w, m, r / 2), "with probability 0.15"),
    (vilt.check_whole_words, lambda w, m, r: mask_words(w, m, min(r, 0.15)), "At rate 1"),
    (vilt.check_whole_words, mask_with_seed, "do not set a seed"),
    (vilt.check_plan, plan_rows_first, "rows first"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o if o > 9 else o + 1), "of ones"),
    (vilt.check_plan, plan_that_forgets, "All patches take"),
    (vilt.check_plan, stub, "Nothing written yet"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o).T, "(4, 6)"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o) / 0 * 0, "NaN or infinity"),
    (vilt.check_plan, lambda c, b, o: -plan(c, b, o), "negative"),
    (vilt.check_plan, lambda c, b, o: 4 * plan(c, b, o), "words give 1 each"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o, shares=False), "1 each"),
    (vilt.check_plan, lambda c, b, o: (-c / b).softmax(1) / 4, "All patches take"),
    (vilt.check_plan, lambda c, b, o: (-c / b).softmax(0) / 6, "All words give"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o, sign=1), "highest cost"),
    (vilt.check_plan, lambda c, b, o: torch.full_like(c, 1 / c.numel()), "does not depend on the cost"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, o, keep=False), "Sinkhorn"),
    (vilt.check_plan, lambda c, b, o: 0.9 * plan(c, b, o) + 0.1 / 24, "The lowest cost"),
    (vilt.check_plan, lambda c, b, o: plan(c, b, 200), "use `outer`"),
    (vilt.check_plan, lambda c, b, o: plan(c, 0.5, o), "beta"),
    (vilt.check_attention, stub, "Nothing written yet"),
    (vilt.check_attention, attention("A", forward=stub), "Nothing written yet"),
    (vilt.check_attention, lambda width, heads: None, "`return` missing"),
    (vilt.check_attention, lambda width, heads: 3, "derived from nn.Module"),
    (vilt.check_attention, lambda width, heads: nn.Linear(width, width), "`self.norm` is an nn.LayerNorm"),
    (vilt.check_attention, attention("A", forward=lambda self, x, mask: right(self, x, mask)[:, :1]), "As many tokens"),
    (vilt.check_attention, attention("A", forward=lambda self, x, mask: right(self, x, mask) - x), "residual"),
    (
        vilt.check_attention,
        attention("A", forward=lambda self, x, mask: self.norm(x) + self.out(self.mix(self.norm(x), mask))),
        "adds x itself",
    ),
    (
        vilt.check_attention,
        attention("A", forward=lambda self, x, mask: x + self.out(self.mix(x, mask))),
        "LayerNorm is missing",
    ),
    (
        vilt.check_attention,
        attention("A", forward=lambda self, x, mask: self.norm(x + self.out(self.mix(x, mask)))),
        "as in BERT",
    ),
    (vilt.check_attention, attention("A", forward=lambda self, x, mask: x + self.mix(self.norm(x), mask)), "`out` is"),
    (vilt.check_attention, attention("A", weights=lambda self, s, m: right_weights(s * 2, m)), "not scaled"),
    (vilt.check_attention, attention("A", weights=lambda self, s, m: right_weights(s / 2**0.5, m)), "whole width"),
    (vilt.check_attention, attention("A", weights=lambda self, s, m: right_weights(s / 2, m)), "its square root"),
    (vilt.check_attention, attention("A", weights=lambda self, s, m: s.softmax(-1)), "use the mask"),
    (vilt.check_attention, attention("A", weights=lambda self, s, m: right_weights(s, ~m)), "NaN or infinity: are all"),
    (
        vilt.check_attention,
        attention("A", weights=lambda self, s, m: s.masked_fill(m[:, None, None], -1e30).softmax(-1)),
        "padding only",
    ),
    (vilt.check_attention, attention("A", forward=attention_in_place_of_what_the_gradient_needs), "changed in place"),
    (
        vilt.check_attention,
        attention("A", weights=lambda self, s, m: (s * m[:, None, None]).softmax(-1)),
        "set to 0, and exp",
    ),
    (
        vilt.check_attention,
        attention("A", weights=lambda self, s, m: s.softmax(-1) * m[:, None, None]),
        "no longer sum to 1",
    ),
    (
        vilt.check_attention,
        attention("A", weights=lambda self, s, m: s.masked_fill(~m[:, None, :, None], -1e30).softmax(-1)),
        "Padded queries",
    ),
    (
        vilt.check_attention,
        attention("A", weights=lambda self, s, m: s.masked_fill(~m[:, None, None], -1e30).softmax(-2)),
        "over the queries",
    ),
    (vilt.check_attention, attention("A", mix=one_head), "only one head"),
    (vilt.check_attention, attention("A", mix=mix_in_the_wrong_shape), "cut wrongly"),
    (vilt.check_attention, attention("A", mix=mix_without_transposing_back), "put together"),
    (vilt.check_attention, attention("A", mix=mix_with_keys_first), "in another order"),
    (vilt.check_attention, attention("A", forward=lambda self, x, mask: right(self, 1.1 * x, mask)), "other numbers"),
    (vilt.check_attention, attention("A", forward=lambda self, x, mask: x / 0 * 0), "NaN or infinity"),
    (vilt.check_attention, attention("A", forward=only_the_first_row), "batch of one"),
    (
        vilt.check_attention,
        attention("A", forward=lambda self, x, mask: right(self, x.detach(), mask)),
        "`x` no gradient",
    ),
    (
        vilt.check_attention,
        attention("A", weights=lambda self, s, m: right_weights(s, m).detach()),
        "part of the loss is detached",
    ),
    (
        vilt.check_attention,
        attention(
            "A", forward=lambda self, x, m: x + self.mix(self.norm(x), m) @ self.out.weight.data.T + self.out.bias
        ),
        "`out.weight` does not get its gradient",
    ),
    (vilt.check_sequence, stub, "Nothing written yet"),
    (vilt.check_sequence, lambda *a: sequence(*a)[0], "two things"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p[:, 1:], s[:, 1:], t), "are eight"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(p, s, w, m, t.flip(0)), "Text comes first"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p, s, 0 * t), "add the token-type embedding"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p, s, t.flip(0)), "Row 0"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p, s, t.detach()), "`token_type` no gradient"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w.detach(), m, p, s, t), "`text` no gradient"),
    (vilt.check_sequence, lambda *a: [x.squeeze(0) for x in sequence(*a)], "A single pair"),
    (vilt.check_sequence, zeroed, "Padding need not be zero"),
    (vilt.check_sequence, lambda w, m, p, s, t: sequence(w, m, p, s, 2 * t), "plus its token type"),
    (vilt.check_sequence, with_mask(lambda m, s: m), "One entry per token"),
    (vilt.check_sequence, with_mask(lambda m, s: ~torch.cat([m, s], 1)), "inverted"),
    (vilt.check_sequence, with_mask(lambda m, s: torch.ones(2, 8)), "all tokens attend to padding"),
    (vilt.check_sequence, with_mask(lambda m, s: torch.cat([s, m], 1)), "another order"),
    (vilt.check_sequence, with_mask(lambda m, s: torch.cat([m, torch.ones_like(s)], 1)), "of the first's image"),
]


@pytest.mark.parametrize("check, answer, message", WRONG)
def test_a_wrong_answer_is_told_what_failed(check, answer, message):
    with pytest.raises(NotYet, match=message):
        check(answer)


def test_the_attention_of_a_whole_model_passes(capsys):
    """The library's block is a right answer, too."""

    class Ours(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            block = Block(BlockConfig(width, heads, 16))
            self.norm, self.qkv, self.out = block.self_norm, block.self_attention.qkv, block.self_attention.out
            self.attend = block.attend

        def forward(self, x, mask):
            return self.attend(x, attention_mask(mask))

    vilt.check_attention(Ours)
    assert capsys.readouterr().out.startswith("ok")
