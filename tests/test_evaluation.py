"""The measures, on models whose answers are known: what a perfect, a blind and a half-blind model must score."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from minivlp.data.batch import Region, Sample
from minivlp.data.text import load_tokenizer
from minivlp.evaluation.cost import Cost, cost
from minivlp.evaluation.grounding import (
    attention_in_box,
    grounding,
    iou,
    mean_box_of,
    pointing_game,
    predict,
    region_retrieval,
)
from minivlp.evaluation.matching import counterfactual, masked_words
from minivlp.evaluation.retrieval import (
    chance_of_reaching,
    fill_prompt,
    rank,
    reranked,
    retrieval,
    similarities,
    zero_shot,
)
from minivlp.evaluation.score import Score, bootstrap, median, spread, table

NOUNS = ["dog", "cat", "bus", "car", "lion", "panda", "apple", "house"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@dataclass
class Toy:
    """A dataset whose picture number r is plain grey of value r: a model can read the row off any pixel."""

    texts: list[list[str]]
    boxes: list[list[Region]] = field(default_factory=list)
    truths: list = field(default_factory=list)

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, row):
        truth = self.truths[row] if self.truths else None
        return Sample(np.full((4, 4, 3), row, np.uint8), row, self.texts[row], self.regions(row), truth=truth)

    def captions(self, row):
        return self.texts[row]

    def regions(self, row):
        return self.boxes[row] if self.boxes else []

    def image_id(self, row):
        return row

    def pixels(self, rows, size):
        return np.stack([np.full((size, size, 3), row, np.uint8) for row in rows])


class Model(nn.Module):
    """What all the models below can do: read the picture's row and the words."""

    config = SimpleNamespace(image=SimpleNamespace(image_size=4), text=SimpleNamespace(context_length=24))

    def __init__(self, tokenizer):
        super().__init__()
        self.weight, self.drop = nn.Parameter(torch.zeros(1)), nn.Dropout()
        self.tokenizer, self.images_seen, self.texts_seen, self.pairs_seen = tokenizer, 0, 0, 0

    def rows(self, images):
        assert not self.training and not torch.is_grad_enabled()
        return ((images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()

    def read(self, ids, mask):
        return [self.tokenizer.decode(i[m], skip_special_tokens=True).strip() for i, m in zip(ids, mask, strict=True)]


class Knows(Model):
    """A dual encoder that knows which texts belong to which row."""

    def __init__(self, tokenizer, texts):
        super().__init__(tokenizer)
        self.texts = texts

    def embed_images(self, images):
        self.images_seen += len(images)
        return torch.eye(len(self.texts))[self.rows(images)]

    def embed_texts(self, ids, mask):
        self.texts_seen += len(ids)
        vectors = [[float(any(text in t for t in of_row)) for of_row in self.texts] for text in self.read(ids, mask)]
        return nn.functional.normalize(torch.tensor(vectors), dim=-1)


class KnowsPairs(Model):
    """The same knowledge, but only pair by pair."""

    def __init__(self, tokenizer, texts):
        super().__init__(tokenizer)
        self.texts = texts

    def match(self, images, ids, mask):
        self.pairs_seen += len(images)
        pairs = zip(self.rows(images), self.read(ids, mask), strict=True)
        return torch.tensor([float(text in self.texts[row]) for row, text in pairs])


class Shares(KnowsPairs):
    """The same, and an image is looked at once for all of its texts."""

    def match_many(self, images, rows, ids, mask):
        self.images_seen += len(images)
        return self.match(images[rows], ids, mask)


# ------------------------------------------------------------------------------------------------------------ the score


def test_bootstrap_is_the_mean_with_an_interval_that_holds_it_and_is_repeatable():
    values = np.random.default_rng(1).random(400) < 0.3
    score = bootstrap(values, 0.1)
    assert score.value == values.mean() and score.n == 400 and score.chance == 0.1
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)  # the textbook's interval
    assert score.high - score.value == pytest.approx(half, rel=0.15) == pytest.approx(score.value - score.low, rel=0.15)
    assert bootstrap(values, 0.1) == score


def test_rows_of_one_image_are_resampled_together():
    hits = np.repeat(np.random.default_rng(0).random(60) < 0.5, 5)  # five captions that stand and fall together
    alone, together = bootstrap(hits, 0), bootstrap(hits, 0, images=np.repeat(range(60), 5))
    assert together.value == alone.value
    assert together.high - together.low > 1.8 * (alone.high - alone.low)  # sqrt(5) in theory


def test_weights_and_median():
    assert bootstrap([1, 0, 0], 0, weights=[2, 1, 1]).value == 0.5
    for values in ([3.0, 1.0, 2.0], [4.0, 1.0, 3.0, 2.0], [5.0]):
        assert bootstrap(values, 0, statistic=median).value == np.median(values)
    assert median(np.array([1.0, 2.0, 9.0]), np.array([1.0, 1.0, 5.0])) == 9


def test_what_cannot_be_averaged_is_said():
    with pytest.raises(ValueError, match="Nothing to score"):
        bootstrap([], 0)
    with pytest.raises(ValueError, match="Value 1 is nan"):
        bootstrap([1.0, float("nan")], 0)
    with pytest.raises(ValueError, match="as many"):
        bootstrap([1, 2], 0, images=[1])


def test_scores_print_with_their_chance():
    score = Score(0.8234, 0.79, 0.856, 0.002, 500)
    assert str(score) == "0.82 [0.79 .. 0.86], chance 0.002, n = 500"
    assert "| R@1 | 0.82 | 0.79 .. 0.86 | 0.002 | 500 |" in table({"R@1": score})
    assert float(score) == 0.8234


def test_spread_over_seeds():
    runs = [{"R@1": Score(v, 0, 1, 0, 9)} for v in (0.8, 0.83, 0.79)]
    assert spread(runs) == {"R@1": "0.79 .. 0.83 over 3 seeds"}
    with pytest.raises(ValueError, match="different|same way"):
        spread([runs[0], {}])


# ------------------------------------------------------------------------------------------------------------ retrieval


def naive_ranks(similarity, owner, captions):
    """By sorting and walking down the list; no ties in the table."""
    of_images, of_captions = [], []
    for i in range(len(similarity)):
        mine = {captions[j] for j in range(len(owner)) if owner[j] == i}
        order = np.argsort(-similarity[i])
        of_images.append(1 + next(place for place, j in enumerate(order) if captions[j] in mine))
    for j in range(len(owner)):
        right = {owner[other] for other in range(len(owner)) if captions[other] == captions[j]}
        order = np.argsort(-similarity[:, j])
        of_captions.append(1 + next(place for place, i in enumerate(order) if i in right))
    return of_images, of_captions


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_the_naive_walk_with_several_captions_and_duplicates(seed):
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(7), rng.integers(7, size=11)])
    captions = [str(c) for c in rng.integers(12, size=18)]
    similarity = rng.normal(size=(7, 18))
    ranks = rank(torch.tensor(similarity), owner, captions)
    of_images, of_captions = naive_ranks(similarity, owner, captions)
    assert ranks.of_images.tolist() == of_images and ranks.of_captions.tolist() == of_captions


def test_a_caption_that_fits_two_images_is_right_for_both():
    similarity = torch.tensor([[0.1, 0.9], [0.9, 0.1]])  # each image prefers the other's caption
    assert rank(similarity, [0, 1]).of_images.tolist() == [2, 2]
    assert rank(similarity, [0, 1], ["a dog", "a dog"]).of_images.tolist() == [1, 1]


def test_a_collapsed_model_ends_in_the_middle_not_on_top():
    ranks = rank(torch.zeros(101, 101), range(101))
    assert set(ranks.of_images) == set(ranks.of_captions) == {51}


def test_broken_similarities_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        rank(torch.full((2, 2), float("nan")), [0, 1])
    with pytest.raises(ValueError, match="as many"):
        rank(torch.zeros(2, 3), [0, 1])
    with pytest.raises(ValueError, match="Image 1 has no caption"):
        rank(torch.zeros(2, 2), [0, 0])


def test_chance_is_that_of_a_random_order():
    assert chance_of_reaching(np.array([1, 1]), 10) == pytest.approx(np.arange(1, 11) / 10)
    rng = np.random.default_rng(0)
    right = np.array([1, 3])
    shuffled = [[rng.permutation(8)[:count].min() + 1 for count in right] for _ in range(4000)]
    drawn = [(np.array(shuffled) <= k).mean() for k in range(1, 9)]
    assert chance_of_reaching(right, 8) == pytest.approx(drawn, abs=0.02)


def test_retrieval_by_a_model_that_knows_is_perfect_and_encodes_each_once(tokenizer):
    data = Toy([[f"a {a} left of a {b}"] for a in NOUNS for b in NOUNS if a != b])
    model = Knows(tokenizer, data.texts).train()
    model.drop.eval()
    scores = retrieval(model, data, tokenizer, unique=50, batch_size=16)
    for way in ("image to text", "text to image"):
        assert scores[f"{way} R@1"].value == 1 and scores[f"{way} median rank"].value == 1
        assert scores[f"{way} R@1"].chance == pytest.approx(1 / 50) and scores[f"{way} R@1"].n == 50
        assert scores[f"{way} R@10"].chance == pytest.approx(10 / 50)
        assert scores[f"{way} median rank"].chance == 25
    assert model.images_seen == model.texts_seen == 50
    assert model.training and not model.drop.training  # every part is given back as it was


def test_unique_leaves_out_repeated_captions_and_none_takes_all(tokenizer):
    data = Toy([["a dog", "a small dog"], ["a cat"], ["a dog", "a dog"]])
    model = Knows(tokenizer, data.texts)
    assert retrieval(model, data, tokenizer, unique=500)["image to text R@1"].n == 2
    model.texts_seen = 0
    everything = retrieval(model, data, tokenizer, unique=None)
    assert model.texts_seen == 3  # of five captions three are different
    assert everything["image to text R@1"].n == 3 and everything["text to image R@1"].n == 5
    assert everything["text to image R@1"].value == 1  # "a dog" is right for both dogs


def test_a_model_that_only_matches_scores_the_same_at_the_price_of_all_pairs(tokenizer):
    data = Toy([[f"a {noun}"] for noun in NOUNS])
    dual, pairs = Knows(tokenizer, data.texts), KnowsPairs(tokenizer, data.texts)
    rows, texts = range(len(data)), [t for of_row in data.texts for t in of_row]
    with torch.no_grad():
        dual.eval(), pairs.eval()
        assert torch.equal(
            similarities(dual, data, tokenizer, rows, texts, 3), similarities(pairs, data, tokenizer, rows, texts, 3)
        )
    assert dual.images_seen + dual.texts_seen == 16 and pairs.pairs_seen == 64


class Blurred(Shares):
    """Towers that see no more than a coin does, under a `match` that knows."""

    def embed_images(self, images):
        return self.vectors(self.rows(images))

    def embed_texts(self, ids, mask):
        return self.vectors([1000 + sum(map(ord, text)) for text in self.read(ids, mask)])

    def vectors(self, seeds):
        made = [torch.randn(16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return nn.functional.normalize(torch.stack(made), dim=-1)


def forty_pairs(tokenizer):
    data = Toy([[f"a {a} left of a {b}"] for a in NOUNS for b in NOUNS if a != b][:40])
    return data, Blurred(tokenizer, data.texts)


def test_reranking_everything_is_as_good_as_match_and_nothing_as_good_as_the_towers(tokenizer):
    data, model = forty_pairs(tokenizer)
    towers = retrieval(model, data, tokenizer)
    assert towers["image to text R@1"].value < 0.2
    assert reranked(model, data, tokenizer, k=0) == towers and model.pairs_seen == 0
    everything = reranked(model, data, tokenizer, k=40)
    assert everything["image to text R@1"].value == everything["text to image R@1"].value == 1
    assert everything["text to image R@1"].chance == towers["text to image R@1"].chance
    assert reranked(model, data, tokenizer, k=99) == everything


def test_reranking_reorders_the_k_nearest_alone(tokenizer):
    data, model = forty_pairs(tokenizer)
    towers, found = retrieval(model, data, tokenizer), reranked(model, data, tokenizer, k=5, batch_size=400)
    for way in ("image to text", "text to image"):
        assert found[f"{way} R@5"] == towers[f"{way} R@5"] and found[f"{way} R@10"] == towers[f"{way} R@10"]
        assert found[f"{way} R@1"].value == towers[f"{way} R@5"].value  # `match` puts what is among the five first
    assert 40 * 5 < model.pairs_seen <= 2 * 40 * 5  # pairs that both ways ask for are looked at once
    assert model.images_seen == 40  # once each, not once per pair
    assert reranked(model, data, tokenizer, k=5, batch_size=7) == found


def test_reranking_needs_towers_and_match(tokenizer):
    data = Toy([["a dog"], ["a cat"]])
    for model, verb in ((Knows(tokenizer, data.texts), "match"), (KnowsPairs(tokenizer, data.texts), "embed_images")):
        with pytest.raises(TypeError, match=f"no {verb}"):
            reranked(model, data, tokenizer)


def test_cost_counts_all_ways(tokenizer):
    data = Toy([[f"a {noun}"] for noun in NOUNS])
    dual = Knows(tokenizer, data.texts)
    found = cost(dual, data, tokenizer, images=4, texts=5)
    assert (found.encodings, found.pairs) == (9, 20) and found.seconds_shared is None
    assert dual.images_seen == 4 + 20 and dual.texts_seen == 5 + 20
    pairs = cost(KnowsPairs(tokenizer, data.texts), data, tokenizer, images=4, texts=5)
    assert pairs.seconds_once is None and pairs.seconds_best(3) is None
    both = Blurred(tokenizer, data.texts)
    assert cost(both, data, tokenizer, images=4, texts=5).seconds_shared > 0
    assert both.images_seen == 4 and both.pairs_seen == 2 * 20  # alone and shared


def test_cost_of_more_is_extrapolated_and_says_so():
    small = Cost(10, 10, seconds_once=1.0, seconds_pairs=2.0, seconds_shared=1.0)
    large = small.scaled(1000, 1000)
    assert (large.seconds_once, large.seconds_pairs, large.seconds_shared) == (100, 20_000, 10_000)
    assert large.pairs_of_best(16) == 32_000 and large.seconds_best(16) == 100 + 32_000 * 0.01
    assert small.pairs_of_best(16) == 100  # there are no more
    assert "extrapolated" not in str(small) and "1,000 images x 1,000 texts (extrapolated from 10 x 10)" in str(large)
    for row in ("2,000 encodings", "1,000,000 passes", "1,000,000 fusions", "32,000 fusions"):
        assert row in str(large) and row in large._repr_markdown_()
    assert large.scaled(10, 10).measured == (10, 10)
    assert "not possible" in str(Cost(2, 2, None, 1.0))


def test_a_model_without_the_verb_is_named(tokenizer):
    data = Toy([["a dog"], ["a cat"]])
    for measure in (counterfactual, masked_words, grounding, region_retrieval, retrieval, reranked):
        with pytest.raises(TypeError, match="Model has no"):
            measure(Model(tokenizer), data, tokenizer)
    with pytest.raises(ValueError, match="empty"):
        retrieval(Knows(tokenizer, []), Toy([]), tokenizer)


# ------------------------------------------------------------------------------------------------------------ zero-shot


def test_zero_shot_asks_single_objects_only_and_averages_prompts(tokenizer):
    where = (0.5, 0.5, 0.4, 0.4)
    data = Toy([["x"]] * 8, [[Region(where, f"{'an' if n == 'apple' else 'a'} {n}")] for n in NOUNS])
    data.boxes[0].append(Region(where, "a cup"))  # two objects: not asked
    model = Knows(tokenizer, [[f"a picture of {r.phrase}" for r in of_row] for of_row in data.boxes])
    scores = zero_shot(model, data, tokenizer, NOUNS[:-1], ["a {}", "a picture of a {}"])
    assert scores["top-1"].n == 6  # of 8: one with two objects, one whose name is no label
    assert scores["top-1"].value == 1 and scores["top-1"].chance == pytest.approx(1 / 7)
    wrong = zero_shot(model, data, tokenizer, NOUNS, ["a {}"], answers=NOUNS[1:] + NOUNS[:1])
    assert wrong["top-1"].value == 0 and wrong["top-1"].n == 8
    pairs = KnowsPairs(tokenizer, [[f"a {noun}", f"the {noun}"] for noun in NOUNS])
    assert zero_shot(pairs, data, tokenizer, ["dog", "cat", "bus"], ["a {}", "the {}"])["top-1"].value == 1


def test_prompts_are_checked_and_articles_fit(tokenizer):
    assert fill_prompt("a picture of a {}", "apple") == "a picture of an apple"
    assert fill_prompt("an image of the {}", "apple") == "an image of the apple"
    assert fill_prompt("a {}", "dog") == "a dog"
    with pytest.raises(ValueError, match="{}"):
        zero_shot(Model(tokenizer), Toy([["x"]]), tokenizer, ["dog"], ["a picture"])
    with pytest.raises(ValueError, match="single-object"):
        zero_shot(Model(tokenizer), Toy([["x"]]), tokenizer, ["dog"], ["a {}"])


# ------------------------------------------------------------------------------------------------------------- matching


class Pair:
    """A scene of two things side by side, as far as counterfactual captions ask."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def captions(self, language):
        return [f"a {self.first} left of a {self.second}", "something else"]

    def counterfactuals(self, rng, language):
        changed = {"object": f"a {self.first} left of a snail", "swap": f"a {self.second} left of a {self.first}"}
        return changed if self.first != "dog" else {"object": changed["object"]}


class BagOfWords(Model):
    """Knows which words belong to the picture, and nothing of their order."""

    def __init__(self, tokenizer, data):
        super().__init__(tokenizer)
        self.bags = [set(of_row[0].split()) for of_row in data.texts]

    def embed_images(self, images):
        return torch.stack([self.vector(self.bags[row]) for row in self.rows(images)])

    def embed_texts(self, ids, mask):
        return torch.stack([self.vector(set(text.split())) for text in self.read(ids, mask)])

    def vector(self, bag):
        words = [*NOUNS, "snail", "left", "of", "a"]
        return nn.functional.normalize(torch.tensor([float(word in bag) for word in words]), dim=0)


def pairs_of_things():
    things = [(a, b) for a in NOUNS for b in NOUNS if a != b]
    truths = [Pair(a, b) for a, b in things]
    return Toy([truth.captions("en") for truth in truths], truths=truths)


def test_a_bag_of_words_tells_objects_but_not_their_order(tokenizer):
    data = pairs_of_things()
    scores = counterfactual(BagOfWords(tokenizer, data), data, tokenizer, batch_size=7)
    assert set(scores) == {"object", "swap", "mean"}
    assert scores["object"].value == 1 and scores["object"].n == 56
    assert scores["swap"].value == 0.5 == scores["swap"].chance and scores["swap"].n == 49  # ties count half
    assert scores["mean"].value == pytest.approx(0.75)  # of the kinds, however often each applies


def test_matching_is_preferred_to_embedding(tokenizer):
    data = pairs_of_things()
    model = BagOfWords(tokenizer, data)
    model.match = KnowsPairs(tokenizer, data.texts).eval().match
    assert counterfactual(model, data, tokenizer, limit=20)["mean"].value == 1


def test_photos_have_no_known_truth(tokenizer):
    data = Toy([["a dog"], ["a cat"]])
    with pytest.raises(ValueError, match="Row 0 has no known truth"):
        counterfactual(Knows(tokenizer, data.texts), data, tokenizer)


class Fills(Model):
    """Fills in what it sees in the picture, or, blindfolded, always the same word."""

    def __init__(self, tokenizer, data, blind=False):
        super().__init__(tokenizer)
        self.captions, self.blind = [of_row[0] for of_row in data.texts], blind

    def fill(self, images, ids, mask):
        assert ((ids == self.tokenizer.mask_token_id).sum(1) == 1).all()
        rows = [0] * len(images) if self.blind else self.rows(images)
        seen = self.tokenizer([self.captions[row % len(self.captions)] for row in rows], return_tensors="pt")
        return nn.functional.one_hot(seen["input_ids"], len(self.tokenizer)).float()


def test_masked_words_with_the_right_a_wrong_and_no_image(tokenizer):
    data = Toy([[f"a {a} and a {b}"] for a, b in zip(NOUNS, NOUNS[1:] + NOUNS[:1], strict=True)])
    scores = masked_words(Fills(tokenizer, data), data, tokenizer, batch_size=3)
    assert scores["right image"].value == 1 and scores["wrong image"].value == 0
    assert scores["no image"].value < 0.5 and scores["no image"].n == 8
    assert scores["right image"].chance < 0.5  # the most frequent of about eight nouns
    blind = masked_words(Fills(tokenizer, data, blind=True), data, tokenizer)
    assert blind["right image"] == blind["wrong image"] == blind["no image"]


# ------------------------------------------------------------------------------------------------------------ grounding


def boxes_toy():
    small, large = (0.2, 0.2, 0.2, 0.2), (0.7, 0.7, 0.5, 0.5)
    regions = [Region(small, "a dog"), Region(large, "a cat"), Region(small, "a red dog", "phrase")]
    return Toy([["x"]] * 6, [[*regions, Region((0.5, 0.5, 1, 1), "a dog and a cat", "image")]] * 6)


class Points(Model):
    """Answers with the box of the phrase, or with a box of its own whatever the phrase."""

    def __init__(self, tokenizer, data, always=None):
        super().__init__(tokenizer)
        self.book, self.always = {r.phrase: r.box for r in data.boxes[0]}, always

    def ground(self, images, ids, mask):
        return torch.tensor([self.always or self.book[text] for text in self.read(ids, mask)])


def test_a_model_that_finds_everything(tokenizer):
    data = boxes_toy()
    scores = grounding(Points(tokenizer, data), data, tokenizer, mean_box=mean_box_of(data), batch_size=4)
    for name in ("Acc@0.5", "Acc@0.7", "mean IoU", "Acc@0.5 object", "Acc@0.5 phrase"):
        assert scores[name].value == pytest.approx(1)
    assert scores["Acc@0.5"].n == 18 and scores["Acc@0.5 object"].n == 12  # whole images are not asked
    assert scores["Acc@0.5 large"].n + scores["Acc@0.5 medium"].n == 18  # 12 equal small boxes fill two thirds
    assert scores["baseline: another object's phrase"].value == 0
    assert scores["baseline: whole image"].value == 0 and "baseline: mean training box" in scores


def test_a_phrase_of_several_things_is_asked_once_and_any_of_them_is_right(tokenizer):
    small, large, low = (0.2, 0.2, 0.2, 0.2), (0.7, 0.6, 0.5, 0.5), (0.2, 0.8, 0.2, 0.2)
    data = Toy([["x"]] * 3, [[Region(small, "person"), Region(large, "person"), Region(low, "dog")]] * 3)
    scores = grounding(Points(tokenizer, data), data, tokenizer)  # its book holds the second of the two
    assert scores["Acc@0.5"].value == 1 and scores["Acc@0.5"].n == 6
    assert scores["baseline: another object's phrase"].value == 0 and scores["baseline: another object's phrase"].n == 6
    always = grounding(Points(tokenizer, data, always=large), data, tokenizer)
    assert always["Acc@0.5"].value == 0.5 == always["baseline: another object's phrase"].value
    apart = [[Region(small, "person"), Region(large, "person")]] * 3
    assert "baseline: another object's phrase" not in grounding(
        Points(tokenizer, data), Toy([["x"]] * 3, apart), tokenizer
    )  # another person is no other object


def test_a_model_that_ignores_the_words_is_found_out(tokenizer):
    data = boxes_toy()
    scores = grounding(Points(tokenizer, data, always=(0.2, 0.2, 0.2, 0.2)), data, tokenizer)
    assert scores["Acc@0.5"].value == pytest.approx(2 / 3)
    assert scores["baseline: another object's phrase"].value == 0.5  # as good with the wrong phrase
    whole = grounding(Points(tokenizer, data, always=(0.5, 0.5, 1.0, 1.0)), data, tokenizer)
    assert whole["mean IoU"].value == pytest.approx(whole["mean IoU"].chance)  # looking at nothing is chance


class PointsOnce(Points):
    """The same, and an image is looked at once for all of its phrases."""

    def ground_many(self, images, rows, ids, mask):
        self.images_seen += len(images)
        return self.ground(images[rows], ids, mask)


def test_phrases_of_one_image_are_grounded_together(tokenizer):
    data = boxes_toy()
    once = PointsOnce(tokenizer, data)
    rows, phrases = [0, 0, 1, 4, 4], ["a dog", "a cat", "a red dog", "a cat", "a dog"]
    once.eval()
    with torch.no_grad():
        found = predict(once, data, tokenizer, rows, phrases)
    assert torch.equal(found, torch.tensor([once.book[phrase] for phrase in phrases])) and once.images_seen == 3
    once.images_seen = 0
    assert grounding(once, data, tokenizer) == grounding(Points(tokenizer, data), data, tokenizer)
    assert once.images_seen == 2 * 6  # the right phrases, then another object's


class Places(Model):
    """Vectors of places and of texts as they are given: {(row, box): vector}, {text: vector}."""

    def __init__(self, tokenizer, places, texts):
        super().__init__(tokenizer)
        self.places, self.vectors = places, texts

    def embed_regions(self, images, boxes, rows):
        self.images_seen += len(images)
        keys = [
            (self.rows(images)[row], tuple(round(x, 4) for x in box))
            for row, box in zip(rows, boxes.tolist(), strict=True)
        ]
        return torch.stack([self.places[key] for key in keys])

    def embed_texts(self, ids, mask):
        return torch.stack([self.vectors[text] for text in self.read(ids, mask)])


LEFT, RIGHT, WHOLE = (0.2, 0.5, 0.2, 0.2), (0.7, 0.5, 0.2, 0.2), (0.5, 0.5, 1.0, 1.0)


def grains_toy():
    """Four pictures of two things each; the first thing has a relation too, and "a dog" is in all of them."""
    regions = [
        [
            Region(LEFT, f"a red {noun}", "phrase"),
            Region(LEFT, f"a red {noun} left of a dog", "relation"),
            Region(RIGHT, "a dog", "object"),
            Region(WHOLE, f"a red {noun} and a dog", "image"),
        ]
        for noun in NOUNS[1:5]
    ]
    return Toy([["x"]] * 4, regions)


def known_places(data, texts_of_place):
    """One-hot places, and each text the sum of the places that it is true of, or what `texts_of_place` makes of it."""
    places = list(dict.fromkeys((row, r.box) for row in range(len(data)) for r in data.regions(row)))
    vectors = dict(zip(places, torch.eye(len(places)), strict=True))
    texts = {}
    for row in range(len(data)):
        for region in data.regions(row):
            texts[region.phrase] = texts.get(region.phrase, 0) + texts_of_place(region) * vectors[row, region.box]
    return vectors, texts


def test_every_phrase_finds_its_region_and_every_region_its_phrase(tokenizer):
    data = grains_toy()
    model = Places(tokenizer, *known_places(data, lambda region: 1.0)).train()
    scores = region_retrieval(model, data, tokenizer, batch_size=3)
    assert all(score.value == 1 for score in scores.values()) and model.images_seen == 4 and model.training
    assert len(scores) == 2 * 2 * 5  # two ways, R@1 and R@5, all grains and each of four
    one = scores["text to region R@1 phrase"]
    assert one.n == 4 and one.chance == pytest.approx(1 / 12)  # 4 pictures of 3 places, one of them is right
    dog = scores["text to region R@1 object"]
    assert dog.n == 4 and dog.chance == pytest.approx(4 / 12)  # "a dog" is right for the dogs of all pictures
    assert scores["text to region R@5 phrase"].chance == pytest.approx(5 / 12)
    assert scores["region to text R@1 relation"].chance == pytest.approx(1 / 12)  # of 13 texts one is true otherwise
    assert scores["text to region R@1"].n == 16


def test_a_text_of_another_grain_is_no_wrong_answer(tokenizer):
    data = grains_toy()
    louder = {"relation": 3.0}  # a place is nearer to its relation than to its phrase
    model = Places(tokenizer, *known_places(data, lambda region: louder.get(region.kind, 1.0)))
    scores = region_retrieval(model, data, tokenizer)
    assert scores["region to text R@1 phrase"].value == scores["region to text R@1 relation"].value == 1


def test_region_retrieval_by_grain_equals_the_naive_walk(tokenizer):
    data = grains_toy()
    places, texts = known_places(data, lambda region: 1.0)
    draw = torch.Generator().manual_seed(0)
    places = {key: torch.randn(6, generator=draw) for key in places}
    texts = {key: torch.randn(6, generator=draw) for key in texts}
    scores = region_retrieval(Places(tokenizer, places, texts), data, tokenizer)
    every = [(row, region) for row in range(4) for region in data.regions(row)]
    for kind in ("object", "phrase", "relation", "image"):
        hits = {"text to region": [], "region to text": []}
        for row, region in (pair for pair in every if pair[1].kind == kind):
            order = sorted(places, key=lambda key: -float(places[key] @ texts[region.phrase]))
            right = {(r, other.box) for r, other in every if other.phrase == region.phrase}
            hits["text to region"].append(min(order.index(key) for key in right))
            mine, here = region.phrase, (row, region.box)
            otherwise = {o.phrase for r, o in every if (r, o.box) == here and o.kind != kind}
            order = sorted(set(texts) - otherwise, key=lambda text: -float(places[here] @ texts[text]))
            hits["region to text"].append(order.index(mine))
        for way, places_behind in hits.items():
            for k in (1, 5):
                assert scores[f"{way} R@{k} {kind}"].value == np.mean([place < k for place in places_behind])


def test_region_retrieval_says_what_is_wrong(tokenizer):
    with pytest.raises(ValueError, match="no regions"):
        region_retrieval(Places(tokenizer, {}, {}), Toy([["x"]]), tokenizer)
    data = grains_toy()
    places, texts = known_places(data, lambda region: float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        region_retrieval(Places(tokenizer, places, texts), data, tokenizer)


def test_iou_by_hand():
    first = torch.tensor([[0.5, 0.5, 1, 1], [0.25, 0.5, 0.5, 1], [0.1, 0.1, 0.1, 0.1], [0.5, 0.5, -1, 0.2]])
    second = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.5, 1], [0.9, 0.9, 0.1, 0.1], [0.5, 0.5, 0, 0]])
    assert iou(first, second).tolist() == pytest.approx([0.25, 1 / 3, 0, 0])
    many = torch.rand(600, 4)
    assert torch.allclose(iou(many, many), torch.ones(600))


def test_boxes_that_are_no_numbers_are_refused(tokenizer):
    data = boxes_toy()
    with pytest.raises(ValueError, match="'a dog'.*not finite"):
        grounding(Points(tokenizer, data, always=(float("nan"),) * 4), data, tokenizer)
    with pytest.raises(ValueError, match="no regions"):
        grounding(Points(tokenizer, data), Toy([["x"]]), tokenizer)


def test_attention_inside_the_box():
    box = torch.tensor([[0.25, 0.5, 0.5, 1.0]])  # the left half
    even = torch.ones(1, 3, 4)
    assert attention_in_box(even, box).value == pytest.approx(0.5) == attention_in_box(even, box).chance
    left = torch.zeros(1, 3, 4)
    left[0, 1, 0] = 7  # any total
    assert attention_in_box(left, box).value == 1 and pointing_game(left, box).value == 1
    cut = torch.tensor([[0.5, 0.5, 0.75, 1.0]])  # cuts the outer columns in half
    assert attention_in_box(left, cut).value == pytest.approx(0.5)
    low = torch.tensor([[0.5, 0.9, 1.0, 0.2]])  # a strip at the foot: rows and columns must not be mixed up
    foot = torch.zeros(1, 4, 3)
    foot[0, 3] = 1
    assert attention_in_box(foot, low).value == pytest.approx(0.8) and attention_in_box(foot, low).chance < 0.21


def test_pointing_game_counts_hits_against_the_share_of_patches():
    maps = torch.rand(300, 8, 8, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[0.25, 0.25, 0.5, 0.5]]).expand(300, 4)
    score = pointing_game(maps, box)
    assert score.chance == 0.25 and score.low < 0.25 < score.high  # looking anywhere is chance
    with pytest.raises(ValueError, match="zero everywhere"):
        pointing_game(torch.zeros(1, 2, 2), box[:1])
