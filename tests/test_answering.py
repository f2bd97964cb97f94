"""Questions about an image: as batches, answered by models, and measured."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minivlp.data import questions
from minivlp.data.batch import Batch, Text, to_tensor
from minivlp.data.questions import (
    QuestionLoader,
    answer_list,
    answers_of,
    draw_question,
    draw_statement,
    kind_of,
    tokenize_questions,
)
from minivlp.data.scene_questions import LABELS
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.evaluation.answering import GRAY, GrayImages, answering, entailment, normalize_answer, reply
from minivlp.evaluation.forward import images_of
from minivlp.layers.generation import DecodingConfig
from minivlp.models.blip import BLIP, BLIPConfig
from minivlp.models.vilt_answers import AnswersConfig, ViLTAnswers
from minivlp.objectives.captioning import next_tokens

QUESTION, ANSWER = "is there a dog?", "no"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def scenes():
    return Scenes(24, "test", seed=5, size=32)


def as_read(tokenizer, text):
    """The text after tokenizing and decoding."""
    return tokenizer.decode(tokenizer(text)["input_ids"][1:-1])


def small(kind, **changes):
    """A nano model, smaller still, every parameter moved."""
    torch.manual_seed(1)
    nano = kind.Config.nano()
    block = replace(nano.image.block, width=32, heads=2, hidden=64)
    text = replace(nano.text, block=replace(nano.text.block, width=32, heads=2, hidden=64))
    model = kind(replace(nano, image=replace(nano.image, image_size=32, block=block), text=text, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


# ------------------------------------------------------------------------------------------------- models that know


class Knows(nn.Module):
    """Answers by `say(row, question)`; the row is None where the image is none of the dataset's."""

    def __init__(self, dataset, tokenizer, say):
        super().__init__()
        self.config = SimpleNamespace(image=SimpleNamespace(image_size=32), text=SimpleNamespace(context_length=56))
        self.tokenizer, self.say = tokenizer, say
        self.rows = {to_tensor(dataset.pixels([r], 32))[0].numpy().tobytes(): r for r in range(len(dataset))}

    def _row(self, image):
        return self.rows.get(image.numpy().tobytes())


class Writes(Knows):
    def generate(self, images, prompt, decoding=None, generator=None):
        texts = []
        for image, ids in zip(images, prompt, strict=True):
            said = self.say(self._row(image), self.tokenizer.decode(ids.tolist()))
            texts.append([*ids.tolist(), *self.tokenizer(said)["input_ids"][1:]])  # ends with [SEP]
        return nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)


class Ranks(Knows):
    def caption_logprob(self, images, text, prefix_length):
        likely = []
        for image, ids, mask, n in zip(images, text.ids, text.mask, prefix_length, strict=True):
            question = self.tokenizer.decode(ids[1:n].tolist())
            answer = self.tokenizer.decode(ids[mask].tolist()[n:], skip_special_tokens=True)
            likely.append(float(self.say(self._row(image), question) == answer) - 20)
        return torch.tensor(likely)


class Chooses(Knows):
    answers: list

    def answer(self, images, text):
        questions = [self.tokenizer.decode(i[m].tolist()[1:-1]) for i, m in zip(text.ids, text.mask, strict=True)]
        said = [self.say(self._row(image), text) for image, text in zip(images, questions, strict=True)]
        return F.one_hot(torch.tensor([self.answers.index(text) for text in said]), len(self.answers)).float()


def each_way(dataset, tokenizer, say):
    """A model that writes, one that ranks, one that chooses, with what `answering` needs for it."""
    answers = answers_of(dataset)
    chooser = Chooses(dataset, tokenizer, say)
    chooser.answers = answer_list(answers)
    return (Writes(dataset, tokenizer, say), None), (Ranks(dataset, tokenizer, say), answers), (chooser, answers)


def test_a_perfect_model_scores_one_and_a_guessing_one_scores_chance(scenes, tokenizer):
    known = {(row, as_read(tokenizer, q)): a for row in range(24) for q, a in scenes.questions(row)}
    frequent = answers_of(scenes)  # the most frequent first
    blind = lambda row, question: frequent[kind_of(question)][0]  # noqa: E731
    oracle = lambda row, question: known.get((row, question)) or blind(row, question)  # noqa: E731
    for model, answers in each_way(scenes, tokenizer, oracle):
        scores = answering(model, scenes, tokenizer, answers=answers, batch_size=50)
        asked = {name for name in scores if not name.endswith(GRAY)}
        assert asked == {"how many", "color", "what", "where", "is there", "relation", "mean"}
        for name in asked:
            assert scores[name].value == pytest.approx(1) and scores[name + GRAY].value == pytest.approx(
                scores[name].chance
            )
    for model, answers in each_way(scenes, tokenizer, blind):
        scores = answering(model, scenes, tokenizer, answers=answers, limit=24)
        assert all(score.value == pytest.approx(score.chance) for score in scores.values())
        assert scores["relation"].chance == 0.5 and scores["what"].chance < 0.2
    counts = Counter(a for r in range(24) for q, a in scenes.questions(r) if q.startswith("how many"))
    assert scores["how many"].n == counts.total() and scores["how many"].chance == counts["one"] / counts.total()
    assert scores["mean"].n == sum(score.n for name, score in scores.items() if GRAY not in name and name != "mean")
    weighed = np.mean([scores[name].value for name in asked - {"mean"}])
    assert scores["mean"].value == pytest.approx(weighed) and scores["mean"].chance == pytest.approx(weighed)


def test_labels_of_statements_are_recognized_by_a_model_that_sees(scenes, tokenizer):
    right = {}
    rng = np.random.default_rng(3)
    for row in range(24):
        for text, label in scenes.statements(row, rng):
            right[row, as_read(tokenizer, text)] = label
    oracle = lambda row, text: right[row, text] if row is not None else "neutral"  # noqa: E731
    chooser = Chooses(scenes, tokenizer, oracle)
    chooser.answers = list(LABELS)
    for model in (chooser, Ranks(scenes, tokenizer, oracle)):
        scores = entailment(model, scenes, tokenizer, seed=3, batch_size=20)
        assert [scores[label].value for label in (*LABELS, "mean")] == pytest.approx([1, 1, 1, 1])
        assert [scores[label + GRAY].value for label in LABELS] == [0, 1, 0]
        assert scores["neutral"].n == 24 and all(score.chance == pytest.approx(1 / 3) for score in scores.values())
    with pytest.raises(TypeError, match="answer or caption_logprob"):
        entailment(Writes(scenes, tokenizer, oracle), scenes, tokenizer)
    photos = [SimpleNamespace(truth=None)]
    with pytest.raises(ValueError, match="not photos"):
        entailment(chooser, photos, tokenizer)


def test_what_cannot_be_asked_is_refused(scenes, tokenizer):
    say = lambda row, text: "yes"  # noqa: E731
    chooser = Chooses(scenes, tokenizer, say)
    with pytest.raises(TypeError, match="has no generate"):
        answering(chooser, scenes, tokenizer)
    chooser.answers = ["yes", "no"]
    with pytest.raises(ValueError, match="2 answers, the list has 3"):
        reply(chooser, scenes, tokenizer, [0], [QUESTION], {"is there": ["yes", "no", "one"]})
    with pytest.raises(ValueError, match="No image has a question"):
        answering(chooser, [SimpleNamespace(questions=[])], tokenizer)
    chooser.answer = lambda images, text: torch.full((len(text), 2), torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        reply(chooser, scenes, tokenizer, [0], [QUESTION], {"is there": ["yes", "no"]})


# ---------------------------------------------------------------------------------------------------- in real models


def test_ranking_is_the_naive_loop_over_the_tokens_of_the_answers(scenes, tokenizer):
    model = small(BLIP)
    texts = ["what colour is the heart?", "where is the dog?", "how many cats are there?", "tell me"]
    answers = {"color": ["red", "blue", "green"], "where": ["left of the cat", "above the small red heart"]}
    rows = [3, 4, 3, 0]
    for batch_size in (250, 2):
        said = reply(model, scenes, tokenizer, rows, texts, answers, batch_size=batch_size)
        for row, text, best in zip(rows, texts, said, strict=True):
            image = images_of(model, scenes, [row])
            tokens, question = model.encode_image(image), tokenizer(text)["input_ids"][1:-1]
            likely = {}
            for answer in answers.get(kind_of(text)) or answer_list(answers):
                ids, total = [model.config.tokens.dec, *question], 0.0
                for token in tokenizer(answer)["input_ids"][1:]:  # with [SEP]
                    prefix = torch.tensor([ids])
                    logits = model.caption_head(model.decode(Text(prefix, prefix >= 0), tokens)[0, -1])
                    total += logits.log_softmax(-1)[token].item()
                    ids.append(token)
                likely[answer] = total
            assert max(likely, key=likely.get) == best
            joined, prefix_length = tokenize_questions(tokenizer, [text] * len(likely), list(likely), 56)
            scores = model.caption_logprob(image.expand(len(likely), -1, -1, -1), joined, prefix_length)
            assert scores.tolist() == pytest.approx(list(likely.values()), abs=1e-4)
            padded = Text(F.pad(joined.ids, (0, 3), value=30), F.pad(joined.mask, (0, 3)))
            first = torch.zeros(len(likely), dtype=torch.long)
            assert torch.allclose(model.caption_logprob_many(image, first, padded, prefix_length), scores, atol=1e-5)


def test_without_a_question_all_tokens_of_a_caption_count():
    model, images = small(BLIP), torch.randn(2, 3, 32, 32)
    text = Text(torch.randint(7, 1200, (2, 6)), torch.ones(2, 6, dtype=torch.bool))
    whole = model.caption_logprob(images, text)
    assert torch.equal(whole, model.caption_logprob(images, text, torch.tensor([1, 1])))
    parts = [model.caption_logprob(images, text.first(4)), model.caption_logprob(images, text, torch.tensor([4, 4]))]
    assert torch.allclose(sum(parts), whole, atol=1e-4)


def test_the_model_continues_the_question_whatever_else_is_asked(scenes, tokenizer):
    model, short = small(BLIP), DecodingConfig(max_length=12)
    texts = ["is there a dog?", "where is the small red heart?", "is there a cat?", "what colour is the ring?"]
    together = reply(model, scenes, tokenizer, [0, 1, 2, 3], texts, decoding=short)
    for row, text in enumerate(texts):
        assert reply(model, scenes, tokenizer, [row], [text], decoding=short) == together[row : row + 1]
        prompt = torch.tensor(tokenizer(text)["input_ids"][1:-1])
        ids = model.generate(images_of(model, scenes, [row]), prompt, short)[0]
        assert together[row] == tokenizer.decode(ids[len(prompt) :].tolist(), skip_special_tokens=True).strip()
    with_cat = reply(model, scenes, tokenizer, [2, 2], ["is there a cat?"] * 2, batch_size=1, decoding=short)
    assert with_cat == [together[2]] * 2


def test_a_gray_image_shows_nothing():
    for size in (32, (16, 32)):
        images = to_tensor(GrayImages().pixels([0, 7], size))
        assert images.shape == ((2, 3, 32, 32) if size == 32 else (2, 3, 16, 32))
        assert images.unique().numel() == 1 and images.abs().max() < 0.01


@pytest.mark.parametrize(
    ("answer", "same"),
    [("A cat.", "cat"), ("two", "2"), ("Left of the cat", "left of cat"), ("一个", "一 个"), ("", "")],
)
def test_answers_are_compared_as_words(answer, same):
    assert normalize_answer(answer) == same == normalize_answer(same)


# ------------------------------------------------------------------------------------------------------- as batches


def test_kinds_are_the_same_in_both_languages(scenes):
    kinds = Counter()
    for row in range(len(scenes)):
        scene = scenes.scene(row)
        for (english, _), (chinese, _) in zip(scene.questions(), scene.questions("zh"), strict=True):
            assert kind_of(english) == kind_of(chinese)
            kinds[kind_of(english)] += 1
    assert kinds.keys() == questions.KINDS.keys() and kind_of("why?") == questions.OTHER


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_written_question_is_what_the_model_will_be_asked(tokenizer, language):
    """The prefix has the tokens of the prompt; the loss predicts the answer and the end, nothing else."""
    scenes = Scenes(32, "train", size=32, language=language)
    loader = QuestionLoader(scenes, tokenizer, 16, 32, seed=3)
    batch = loader.batch(1)
    labels = next_tokens(batch.text, batch.prefix_length)
    pictures = {scenes.image_id(row): row for row in range(32)}
    for row in range(16):
        n = batch.prefix_length[row]
        question = tokenizer.decode(batch.text.ids[row, 1:n].tolist())
        pairs = dict(scenes.questions(pictures[int(batch.image_ids[row])]))
        (asked,) = [q for q in pairs if as_read(tokenizer, q) == question]
        assert batch.text.ids[row, :n].tolist() == tokenizer(asked)["input_ids"][:-1]
        assert labels[row][labels[row] >= 0].tolist() == tokenizer(pairs[asked])["input_ids"][1:]
        assert torch.equal(batch.images[row], to_tensor(scenes.pixels([pictures[int(batch.image_ids[row])]]))[0])
    assert torch.equal(QuestionLoader(scenes, tokenizer, 16, 32, seed=3).batch(1).text.ids, batch.text.ids)
    seen = torch.cat([batch.image_ids, loader.batch(0).image_ids])
    assert seen.unique().numel() == 32, "an epoch shows every image once"


def test_a_chosen_answer_is_an_index_in_the_list(tokenizer):
    scenes = Scenes(32, "train", size=32)
    answers = answer_list(answers_of(scenes))
    batch = QuestionLoader(scenes, tokenizer, 32, 32, answers=answers).batch(0)
    pictures = {scenes.image_id(row): row for row in range(32)}
    for ids, mask, image, index in zip(batch.text.ids, batch.text.mask, batch.image_ids, batch.answers, strict=True):
        read = tokenizer.decode(ids[mask].tolist()[1:-1])
        pairs = {as_read(tokenizer, q): a for q, a in scenes.questions(pictures[int(image)])}
        assert pairs[read] == answers[index]
    assert batch.prefix_length is None
    with pytest.raises(ValueError, match="not in the list of 1"):
        QuestionLoader(scenes, tokenizer, 32, 32, answers=["so"]).batch(0)
    with pytest.raises(ValueError, match="batch of 33"):
        QuestionLoader(scenes, tokenizer, 33, 32)
    with pytest.raises(ValueError, match="only scenes"):
        QuestionLoader([None, None], tokenizer, 2, 32)


def test_every_kind_of_question_is_as_likely():
    scene = Scenes(1, "train", seed=2, size=32, objects=(2, 2))
    rng = np.random.default_rng(0)
    drawn = Counter(kind_of(draw_question(scene, 0, rng)[0]) for _ in range(1200))
    there = {kind_of(q) for q, _ in scene.questions(0)}
    assert drawn.keys() == there and all(abs(n - 1200 / len(there)) < 100 for n in drawn.values())


def test_statements_are_batches_too(tokenizer):
    scenes = Scenes(16, "train", size=32)
    batch = QuestionLoader(scenes, tokenizer, 16, 32, answers=LABELS, ask=draw_statement).batch(0)
    assert set(batch.answers.tolist()) == {0, 1, 2}
    texts = [tokenizer.decode(i[m].tolist()[1:-1]) for i, m in zip(batch.text.ids, batch.text.mask, strict=True)]
    neutral = [any(word in text for word in ("likes", "yesterday", "tomorrow", "somebody")) for text in texts]
    assert neutral == (batch.answers == 1).tolist()


def test_wording_does_not_tell_true_statements_from_false_ones():
    scenes, rng = Scenes(300, "train", seed=4, size=32), np.random.default_rng(0)
    openings, lengths = {label: Counter() for label in LABELS}, {label: [] for label in LABELS}
    for row in range(300):
        for text, label in scenes.statements(row, rng):
            openings[label][text.split()[1]] += 1
            lengths[label].append(len(text.split()))
    for word in ("is", "picture"):  # "there is", "a picture of"
        assert abs(openings["entailed"][word] - openings["contradicted"][word]) < 40
    assert abs(np.mean(lengths["entailed"]) - np.mean(lengths["contradicted"])) < 0.6


# ---------------------------------------------------------------------------------------------------------- training


def test_only_the_answer_is_predicted(tokenizer):
    model = small(BLIP, losses=("lm",), smoothing=0.0)
    text, prefix_length = tokenize_questions(
        tokenizer, [QUESTION, "where is the dog?"], [ANSWER, "left of the cat"], 56
    )
    batch = Batch(torch.randn(2, 3, 32, 32), text, torch.arange(2), prefix_length=prefix_length)
    loss = model.losses(batch)["lm"]
    predicted = next_tokens(text, prefix_length) >= 0
    assert predicted.sum(1).tolist() == [2, 5]
    logprob = model.caption_logprob(batch.images, text, prefix_length)
    assert torch.isclose(loss, -logprob.sum() / 7, atol=1e-5)
    whole = model.losses(replace(batch, prefix_length=None))["lm"]
    assert torch.isclose(whole, -model.caption_logprob(batch.images, text).sum() / (text.mask.sum() - 2), atol=1e-5)


def test_a_classifier_is_asked_for_the_index_of_the_answer():
    model = small(ViLTAnswers, answers=5)
    ids = torch.randint(7, 1200, (3, 6))
    text = Text(ids, ids > 0)
    batch = Batch(torch.randn(3, 3, 32, 32), text, torch.arange(3), answers=torch.tensor([4, 0, 2]))
    probabilities = model.answer(batch.images, text).softmax(-1)
    expected = -(probabilities[0, 4].log() + probabilities[1, 0].log() + probabilities[2, 2].log()) / 3
    assert torch.isclose(model.losses(batch)["answering"], expected)


def test_an_overfit_batch_is_answered(tokenizer):
    """Training batches and evaluation give the model the same inputs."""
    scenes = Scenes(6, "train", size=32)
    answers = answers_of(scenes)
    flat = answer_list(answers)
    for model, listed in ((small(BLIP, losses=("lm",)), None), (small(ViLTAnswers, answers=len(flat)), flat)):
        loader = QuestionLoader(scenes, tokenizer, 6, 32, answers=listed)
        batch, optimizer = loader.batch(0), torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            sum(model.losses(batch).values()).backward()
            optimizer.step()
        rows = [int(i) % 100_000_000 for i in batch.image_ids]
        ends = batch.text.mask.sum(1) - 1 if listed else batch.prefix_length
        texts = [tokenizer.decode(ids[1:n].tolist()) for ids, n in zip(batch.text.ids, ends, strict=True)]
        asked = {(r, as_read(tokenizer, q)): a for r in rows for q, a in scenes.questions(r)}
        right = [normalize_answer(asked[pair]) for pair in zip(rows, texts, strict=True)]
        for choices in (None, answers) if listed is None else (answers,):
            replies = reply(model, scenes, tokenizer, rows, texts, choices, batch_size=64)
            assert [normalize_answer(answer) for answer in replies] == right


def test_nano_models_exist_for_any_number_of_answers():
    model = ViLTAnswers(replace(AnswersConfig.nano(), answers=3))
    text = Text(torch.ones(1, 4).long(), torch.ones(1, 4).bool())
    assert model.answer(torch.zeros(1, 3, 64, 64), text).shape == (1, 3)
    assert BLIPConfig.nano().text.context_length == model.config.text.context_length
