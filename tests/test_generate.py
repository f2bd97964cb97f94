"""Text generation with made-up models whose every answer is known: a table of what follows what."""

import itertools

import pytest
import torch

from minivlp.data.batch import Text
from minivlp.layers.attention import KVCache
from minivlp.layers.embeddings import TextConfig
from minivlp.layers.generation import DecodingConfig, generate, nucleus
from minivlp.layers.towers import TextEncoder
from minivlp.layers.transformer import BlockConfig
from minivlp.objectives.captioning import caption_logprob, caption_loss, next_tokens

STOP, PAD, VOCABULARY = 1, 0, 7
SHORT = DecodingConfig(max_length=6)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def run(step, start, decoding: DecodingConfig = SHORT, longest: int = 99, generator=None) -> torch.Tensor:
    return generate(step, torch.as_tensor(start), decoding, STOP, PAD, longest, generator)


class Memory:
    """A model whose next token depends on *all* tokens so far; each call passes only the new ones."""

    def __init__(self, texts: int, seed: int = 0) -> None:
        self.table = torch.randn(texts, 50, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2
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


def greedily(model: Memory, row: int, text: list[int], decoding: DecodingConfig) -> list[int]:
    """One token after the other, the naive way."""
    while len(text) < decoding.max_length and text[-1] != STOP:
        scores = model.logits(row, text).clone()
        for token in set(text):
            scores[token] *= decoding.repetition_penalty if scores[token] < 0 else 1 / decoding.repetition_penalty
        if len(text) < decoding.min_length:
            scores[STOP] = -torch.inf
        text = [*text, int(scores.argmax())]
    return text


@pytest.mark.parametrize(
    "decoding",
    [
        SHORT,
        DecodingConfig(max_length=9),
        DecodingConfig(max_length=9, min_length=6),
        DecodingConfig(max_length=9, repetition_penalty=3.0),
    ],
    ids=["short", "long", "at least", "no repetition"],
)
@pytest.mark.parametrize("start", [[[2], [3], [4], [2], [5]], [[2, 3], [2, 4], [5, 6], [6, 5], [3, 3]]])
def test_greedy_decoding_is_the_naive_loop_for_all_rows_at_once(decoding, start):
    model = Memory(5)
    written = run(model.step, start, decoding)
    expected = [greedily(model, row, text, decoding) for row, text in enumerate(start)]
    assert [text_of(row) for row in written] == expected
    assert written.shape[1] == max(map(len, expected))  # stops with the last of them
    for row, text in zip(written, expected, strict=True):
        assert (row[len(text) :] == PAD).all()
    assert model.calls == [(5, len(start[0]))] + [(5, 1)] * (len(model.calls) - 1)  # no token is passed twice


@pytest.mark.parametrize("beams", [1, 3])
def test_the_longest_text_is_the_shorter_of_config_and_model(beams):
    def never_stops(ids, rows):
        return torch.arange(7.0).expand(len(ids), -1)  # the token 6 is likeliest

    for wanted, longest, expected in ((None, 5, 5), (4, 9, 4), (9, 4, 4)):
        written = run(never_stops, [[2], [3]], DecodingConfig(beams, max_length=wanted), longest)
        assert written.shape == (2, expected) and (written[:, 1:] == 6).all()


def likeliest(model: Memory, row: int, start: list[int], longest: int, length_penalty: float) -> list[int]:
    """The best of all possible texts."""
    best, winner = -torch.inf, None
    for count in range(1, longest - len(start) + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=count):
            if STOP in tokens[:-1] or (tokens[-1] != STOP and count < longest - len(start)):
                continue
            text, score = list(start), 0.0
            for token in tokens:
                score += float(model.logits(row, text).log_softmax(-1)[token])
                text.append(token)
            if score / count**length_penalty > best:
                best, winner = score / count**length_penalty, text
    return winner


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_search_with_enough_beams_finds_the_best_text(length_penalty):
    model = Memory(3, seed=4)
    start = torch.tensor([[2, 3], [4, 2], [2, 6]])
    written = run(model.step, start, DecodingConfig(beams=60, max_length=5, length_penalty=length_penalty))
    assert [text_of(row) for row in written] == [
        likeliest(model, row, text, 5, length_penalty) for row, text in enumerate(start.tolist())
    ]


def test_beams_find_better_texts_than_greedy_decoding_and_respect_the_lengths():
    better = 0
    for seed in range(20):
        model = Memory(2, seed)
        start = torch.tensor([[2], [3]])
        greedy, model.seen = run(model.step, start), None
        searched = run(model.step, start, DecodingConfig(beams=4, max_length=6, length_penalty=0.0))
        for row in range(2):
            g, s = (logprob(model, row, text_of(texts[row])) for texts in (greedy, searched))
            better += s > g + 1e-9
    assert better > 10
    model = Memory(2)
    written = run(model.step, start, DecodingConfig(beams=3, max_length=8, min_length=8, repetition_penalty=9.0))
    assert written.shape == (2, 8) and (written[:, :-1] != STOP).all()


def logprob(model: Memory, row: int, text: list[int]) -> float:
    return sum(float(model.logits(row, text[:i]).log_softmax(-1)[text[i]]) for i in range(1, len(text)))


def test_length_penalty_decides_between_a_short_and_a_long_text():
    """The short text is likelier as a whole, the long one per token."""
    table = torch.full((8, 8), -20.0)
    table[2, 3], table[2, 4] = 0.55, 0.45  # 2 3 stop, or 2 4 5 6 stop
    table[2, 3:5] = table[2, 3:5].log()
    table[3, STOP] = table[4, 5] = table[5, 6] = table[6, STOP] = 0.0

    def step(ids, rows):
        return table[ids[:, -1]]

    def best(penalty):
        start = [[7, 7, 7, 2]]  # given tokens are not counted, or the short text would win both times
        return text_of(run(step, start, DecodingConfig(beams=2, max_length=12, length_penalty=penalty))[0])[4:]

    assert best(0.0) == [3, STOP] and best(1.0) == [4, 5, 6, STOP]


def test_when_a_beam_ends_another_takes_its_place():
    """Two beams: one ends at once, so the third-best beginning is kept as well, and it leads to the best text."""
    table = torch.full((8, 8), -20.0)
    table[2, STOP], table[2, 3], table[2, 4] = torch.tensor([0.5, 0.3, 0.2]).log()
    table[3, 3:] = -1.6  # one of five tokens at each step, without end
    table[5:, 3:] = -1.6
    table[4, STOP] = 0.0

    def step(ids, rows):
        return table[ids[:, -1]]

    written = run(step, [[2]], DecodingConfig(beams=2, max_length=9, length_penalty=2.0))
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


def test_drawn_tokens_follow_the_nucleus_and_the_generator():
    from scipy.stats import chisquare

    model = Memory(1)
    logits = model.logits(0, [2])

    def draw(seed):
        decoding, generator = DecodingConfig(top_p=0.9, max_length=2), torch.Generator().manual_seed(seed)
        return run(lambda ids, rows: logits.expand(2000, -1), torch.full((2000, 1), 2), decoding, 99, generator)[:, 1]

    truth = nucleus(logits, 0.9).softmax(-1)
    often = torch.bincount(draw(0), minlength=VOCABULARY)
    inside = truth > 0
    assert 1 < inside.sum() < VOCABULARY and (often[~inside] == 0).all()
    assert chisquare(often[inside].numpy(), 2000 * truth[inside].numpy()).pvalue > 1e-3
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize(
    "options",
    [{"beams": 0}, {"beams": -1}, {"beams": 2, "top_p": 0.9}, {"top_p": 0.0}, {"top_p": -0.1}, {"top_p": 1.5}],
)
def test_a_config_that_contradicts_itself_is_refused_at_once(options):
    with pytest.raises(ValueError, match="beams .* and top_p"):
        DecodingConfig(**options)


def test_configs_that_are_fine():
    for options in ({}, {"beams": 2}, {"top_p": 1.0}, {"top_p": 0.1}, {"beams": 1, "top_p": 0.9}):
        assert DecodingConfig(**options)
    with pytest.raises(AttributeError):
        DecodingConfig().beams = 2  # frozen: it can be a default argument


@pytest.mark.parametrize("beams", [1, 2])
def test_a_start_that_leaves_no_token_is_refused(beams):
    step, start = Memory(1).step, torch.tensor([[2, 3]])
    for length, longest in ((2, 99), (None, 2), (1, 99), (0, 99)):
        with pytest.raises(ValueError, match="start has 2 tokens"):
            run(step, start, DecodingConfig(beams, max_length=length), longest)


# ------------------------------------------------------------------------------------------- the cache, and the loss


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_text_read_part_by_part_is_the_text_read_at_once(norm_first):
    config = TextConfig(
        30, 12, 2, BlockConfig(16, 2, 32, norm_first=norm_first), causal=True, embed_norm=not norm_first
    )
    encoder = TextEncoder(config, context_width=8)
    ids, image = torch.randint(0, 30, (3, 9)), torch.randn(3, 5, 8)
    whole = encoder(text(ids), image)
    cache, context, parts = [KVCache(), KVCache()], encoder.keys_values(image), []
    for part in ids.split([4, 1, 1, 3], dim=1):
        parts.append(encoder(text(part), context, cache=cache))
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-12)
    # continues with other rows
    rows = torch.tensor([2, 0, 2, 1])
    for layer in cache:
        layer.gather(rows)
    new = torch.randint(0, 30, (4, 1))
    continued = encoder(text(new), encoder.keys_values(image[rows]), cache=cache)
    at_once = encoder(text(torch.cat([ids[rows], new], dim=1)), image[rows])
    assert torch.allclose(continued[:, 0], at_once[:, -1], atol=1e-12)
    assert len(cache[1]) == 10
    last = encoder(text(torch.cat([new, new], dim=1)), image[rows], cache=cache, rows=slice(-1, None))
    at_once = encoder(text(torch.cat([ids[rows], new, new, new], dim=1)), image[rows])
    assert last.shape == (4, 1, 16) and torch.allclose(last[:, 0], at_once[:, -1], atol=1e-12)
    with pytest.raises(ValueError, match="texts of 13 tokens"):
        encoder(text(new), image[rows], cache=cache)


def text(ids: torch.Tensor) -> Text:
    return Text(ids, torch.ones_like(ids, dtype=torch.bool))


def test_the_loss_of_captions_is_the_naive_loop():
    ids = torch.tensor([[5, 9, 8, 2, 0], [5, 7, 2, 0, 0]])
    captions = Text(ids, ids > 0)
    logits = torch.randn(2, 5, 11)
    labels = next_tokens(captions)
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
    assert next_tokens(captions, 0).tolist() == labels.tolist()  # the first token is never predicted
    nothing = caption_loss(logits[:, :-1], torch.full_like(labels, -100))
    assert nothing == 0 and caption_loss(torch.zeros(2, 4, 11), labels) == pytest.approx(
        torch.tensor(11.0).log().item()
    )


def test_given_tokens_are_not_predicted():
    """As many in all rows, or in each row its own number: a question, or a prompt."""
    ids = torch.tensor([[5, 9, 8, 2, 0], [5, 7, 6, 4, 2]])
    captions = Text(ids, ids > 0)
    assert next_tokens(captions, 3).tolist() == [[-100, -100, 2, -100], [-100, -100, 4, 2]]
    assert next_tokens(captions, torch.tensor([2, 4])).tolist() == [[-100, 8, 2, -100], [-100, -100, -100, 2]]
    assert (next_tokens(captions, torch.tensor([9, 5])) == -100).all()


def test_given_tokens_are_not_part_of_the_log_probability():
    captions, logits = text(torch.tensor([[5, 9, 8, 2], [5, 6, 7, 2], [5, 6, 7, 2]])), torch.randn(3, 3, 11)
    whole = caption_logprob(logits, next_tokens(captions))
    rest = caption_logprob(logits, next_tokens(captions, torch.tensor([2, 1, 4])))  # the last row is given entirely
    first = logits[0, 0].log_softmax(-1)[9]
    assert torch.allclose(rest, torch.stack([whole[0] - first, whole[1], torch.tensor(0.0)]))


def test_a_caption_without_labels_keeps_the_graph():
    logits = torch.randn(2, 4, 11, requires_grad=True)
    caption_loss(logits, torch.full((2, 4), -100)).backward()
    assert (logits.grad == 0).all()
