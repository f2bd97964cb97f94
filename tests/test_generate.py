"""Writing texts, asked of made-up models whose every answer is known: a table of what follows what."""

import itertools

import pytest
import torch

from minivlp.layers.attention import Past
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import TextConfig, TextEncoder
from minivlp.layers.generate import Rules, generate, nucleus
from minivlp.objectives.captioning import caption_logprob, caption_loss, next_words

STOP, PAD, WORDS = 1, 0, 7
RULES = Rules(STOP, PAD, 6)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Memory:
    """A model whose next word depends on *all* words so far, and that is only ever told the new ones."""

    def __init__(self, texts: int, seed: int = 0) -> None:
        self.table = torch.randn(texts, 50, WORDS, generator=torch.Generator().manual_seed(seed)) * 2
        self.table[..., PAD] = -30.0
        self.seen, self.calls = None, []

    def logits(self, row: int, text: list[int]) -> torch.Tensor:
        return self.table[row, sum((i + 1) * (w + 3) for i, w in enumerate(text)) % 50]

    def step(self, ids: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        self.calls.append(tuple(ids.shape))
        if self.seen is None:
            self.beams = len(ids) // len(self.table)
            self.seen = ids
        else:
            self.seen = torch.cat([self.seen if rows is None else self.seen[rows], ids], dim=1)
        return torch.stack([self.logits(i // self.beams, text) for i, text in enumerate(self.seen.tolist())])


def text_of(row: torch.Tensor) -> list[int]:
    row = row.tolist()
    return row[: row.index(STOP) + 1] if STOP in row else row


def greedily(model: Memory, row: int, text: list[int], rules: Rules) -> list[int]:
    """One word after the other, the plain way."""
    while len(text) < rules.max_length and text[-1] != STOP:
        scores = model.logits(row, text).clone()
        for word in set(text):
            scores[word] *= rules.repetition_penalty if scores[word] < 0 else 1 / rules.repetition_penalty
        if len(text) < rules.min_length:
            scores[STOP] = -torch.inf
        text = [*text, int(scores.argmax())]
    return text


@pytest.mark.parametrize(
    "rules",
    [RULES, Rules(STOP, PAD, 9), Rules(STOP, PAD, 9, min_length=6), Rules(STOP, PAD, 9, repetition_penalty=3.0)],
    ids=["short", "long", "at least", "no repetition"],
)
@pytest.mark.parametrize("start", [[[2], [3], [4], [2], [5]], [[2, 3], [2, 4], [5, 6], [6, 5], [3, 3]]])
def test_greedy_writing_is_the_plain_way_for_all_rows_at_once(rules, start):
    model = Memory(5)
    written = generate(model.step, torch.tensor(start), rules)
    expected = [greedily(model, row, text, rules) for row, text in enumerate(start)]
    assert [text_of(row) for row in written] == expected
    assert written.shape[1] == max(map(len, expected))  # stops with the last of them
    for row, text in zip(written, expected, strict=True):
        assert (row[len(text) :] == PAD).all()
    assert model.calls == [(5, len(start[0]))] + [(5, 1)] * (len(model.calls) - 1)  # no word is read twice


def likeliest(model: Memory, row: int, start: list[int], longest: int, length_penalty: float) -> list[int]:
    """Of all texts there are, the best."""
    best, winner = -torch.inf, None
    for count in range(1, longest - len(start) + 1):
        for words in itertools.product(range(WORDS), repeat=count):
            if STOP in words[:-1] or (words[-1] != STOP and count < longest - len(start)):
                continue
            text, score = list(start), 0.0
            for word in words:
                score += float(model.logits(row, text).log_softmax(-1)[word])
                text.append(word)
            if score / count**length_penalty > best:
                best, winner = score / count**length_penalty, text
    return winner


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_search_with_enough_beams_finds_the_best_text_there_is(length_penalty):
    model = Memory(3, seed=4)
    rules = Rules(STOP, PAD, 5)
    start = torch.tensor([[2, 3], [4, 2], [2, 6]])
    written = generate(model.step, start, rules, beams=60, length_penalty=length_penalty)
    assert [text_of(row) for row in written] == [
        likeliest(model, row, text, 5, length_penalty) for row, text in enumerate(start.tolist())
    ]


def test_beams_find_better_texts_than_greed_and_end_by_the_rules():
    better = 0
    for seed in range(20):
        model = Memory(2, seed)
        start = torch.tensor([[2], [3]])
        greedy, model.seen = generate(model.step, start, RULES), None
        searched = generate(model.step, start, RULES, beams=4, length_penalty=0.0)
        for row in range(2):
            g, s = (logprob(model, row, text_of(texts[row])) for texts in (greedy, searched))
            better += s > g + 1e-9
    assert better > 10
    model = Memory(2)
    written = generate(model.step, start, Rules(STOP, PAD, 8, min_length=8, repetition_penalty=9.0), beams=3)
    assert written.shape == (2, 8) and (written[:, :-1] != STOP).all()


def logprob(model: Memory, row: int, text: list[int]) -> float:
    return sum(float(model.logits(row, text[:i]).log_softmax(-1)[text[i]]) for i in range(1, len(text)))


def test_length_penalty_decides_between_a_short_and_a_long_text():
    """The short text is likelier as a whole, the long one word for word."""
    table = torch.full((8, 8), -20.0)
    table[2, 3], table[2, 4] = 0.55, 0.45  # 2 3 stop, or 2 4 5 6 stop
    table[2, 3:5] = table[2, 3:5].log()
    table[3, STOP] = table[4, 5] = table[5, 6] = table[6, STOP] = 0.0

    def step(ids, rows):
        return table[ids[:, -1]]

    def best(penalty):
        start = torch.tensor([[7, 7, 7, 2]])  # given words are not counted, or the short text would win both times
        return text_of(generate(step, start, Rules(STOP, PAD, 12), beams=2, length_penalty=penalty)[0])[4:]

    assert best(0.0) == [3, STOP] and best(1.0) == [4, 5, 6, STOP]


def test_when_a_beam_ends_another_takes_its_place():
    """Two beams: one ends at once, so the third-best beginning comes in, and it is the one that leads somewhere."""
    table = torch.full((8, 8), -20.0)
    table[2, STOP], table[2, 3], table[2, 4] = torch.tensor([0.5, 0.3, 0.2]).log()
    table[3, 3:] = -1.6  # one of five, and so on for ever
    table[5:, 3:] = -1.6
    table[4, STOP] = 0.0

    def step(ids, rows):
        return table[ids[:, -1]]

    written = generate(step, torch.tensor([[2]]), Rules(STOP, PAD, 9), beams=2, length_penalty=2.0)
    assert text_of(written[0]) == [2, 4, STOP]


def test_the_nucleus_is_the_smallest_set_that_reaches_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[torch.tensor([2, 0, 3, 1])]  # .15 .5 .05 .3
    kept = {p: nucleus(logits, p).isfinite().nonzero()[:, 0].tolist() for p in (0.4, 0.5001, 0.79, 0.81, 0.96, 1.0)}
    assert kept == {0.4: [1], 0.5001: [1, 3], 0.79: [1, 3], 0.81: [0, 1, 3], 0.96: [0, 1, 2, 3], 1.0: [0, 1, 2, 3]}
    batch = torch.randn(20, 30) * 3
    filtered = nucleus(batch, 0.7)
    for row, left in zip(batch, filtered, strict=True):
        inside = left.isfinite()
        probabilities = row.softmax(-1)
        assert torch.equal(left[inside], row[inside])
        assert probabilities[inside].sum() >= 0.7 > probabilities[inside].sum() - probabilities[inside].min()
        assert inside.all() or probabilities[inside].min() >= probabilities[~inside].max()


def test_drawn_words_follow_the_nucleus_and_the_generator():
    from scipy.stats import chisquare

    model = Memory(1)
    logits = model.logits(0, [2])

    def draw(seed):
        return generate(
            lambda ids, rows: logits.expand(2000, -1), torch.full((2000, 1), 2), Rules(STOP, PAD, 2), top_p=0.9,
            generator=torch.Generator().manual_seed(seed),
        )[:, 1]  # fmt: skip

    truth = nucleus(logits, 0.9).softmax(-1)
    often = torch.bincount(draw(0), minlength=WORDS)
    inside = truth > 0
    assert 1 < inside.sum() < WORDS and (often[~inside] == 0).all()
    assert chisquare(often[inside].numpy(), 2000 * truth[inside].numpy()).pvalue > 1e-3
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_what_cannot_be_asked_is_refused():
    step, start = Memory(1).step, torch.tensor([[2, 3]])
    for options in ({"beams": 0}, {"beams": 2, "top_p": 0.9}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="top_p"):
            generate(step, start, RULES, **options)
    with pytest.raises(ValueError, match="leaves none of 2"):
        generate(step, start, Rules(STOP, PAD, 2))


# --------------------------------------------------------------------------------- reading bit by bit, and the loss


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_text_read_bit_by_bit_is_the_text_read_at_once(norm_first):
    config = TextConfig(
        30, 12, 2, BlockConfig(16, 2, 32, norm_first=norm_first), causal=True, embed_norm=not norm_first
    )
    text = TextEncoder(config, context_width=8)
    ids, image = torch.randint(0, 30, (3, 9)), torch.randn(3, 5, 8)
    whole = text(ids, None, image)
    past, context, parts = [Past(), Past()], text.keys_values(image), []
    for bit in ids.split([4, 1, 1, 3], dim=1):
        parts.append(text(bit, None, context, past=past))
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-12)
    # and goes on from other rows
    rows = torch.tensor([2, 0, 2, 1])
    for memory in past:
        memory.take(rows)
    new = torch.randint(0, 30, (4, 1))
    gone_on = text(new, None, text.keys_values(image[rows]), past=past)
    at_once = text(torch.cat([ids[rows], new], dim=1), None, image[rows])
    assert torch.allclose(gone_on[:, 0], at_once[:, -1], atol=1e-12)
    assert len(past[1]) == 10
    with pytest.raises(ValueError, match="texts of 13 tokens"):
        text(torch.zeros(4, 3, dtype=torch.long), None, image[rows], past=past)


def test_the_loss_of_captions_is_the_naive_loop():
    ids = torch.tensor([[5, 9, 8, 2, 0], [5, 7, 2, 0, 0]])
    mask = ids > 0
    logits = torch.randn(2, 5, 11)
    labels = next_words(ids, mask)
    assert labels.tolist() == [[9, 8, 2, -100], [7, 2, -100, -100]]
    for smoothing in (0.0, 0.1):
        costs = []
        for row, place in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
            target = torch.full((11,), smoothing / 11)
            target[ids[row, place + 1]] += 1 - smoothing
            costs.append(-(target * logits[row, place].log_softmax(-1)).sum())
        assert torch.isclose(caption_loss(logits[:, :-1], labels, smoothing), torch.stack(costs).mean())
        if not smoothing:
            sums = torch.stack([-sum(costs[:3]), -sum(costs[3:])])
            assert torch.allclose(caption_logprob(logits[:, :-1], labels), sums)
    assert next_words(ids, mask, 0).tolist() == labels.tolist()  # the start is never asked
    nothing = caption_loss(logits[:, :-1], torch.full_like(labels, -100))
    assert nothing == 0 and caption_loss(torch.zeros(2, 4, 11), labels) == pytest.approx(
        torch.tensor(11.0).log().item()
    )
