"""The measures, on models whose answers are known: what a perfect, a guessing and a half-perfect model must score."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import nn

from minivlp.data.batch import Region, Sample
from minivlp.data.dataset import height_width
from minivlp.data.text import load_tokenizer
from minivlp.evaluation.attention_maps import attention_in_box, pointing_game
from minivlp.evaluation.cost import Cost, cost
from minivlp.evaluation.forward import caption_likelihood, distinct, images_of, pair_scores
from minivlp.evaluation.grounding import grounding, iou, mean_box_of, predict
from minivlp.evaluation.matching import counterfactual, masked_words
from minivlp.evaluation.records import RECORDS, by_variant, load_runs, save_record
from minivlp.evaluation.region_retrieval import region_retrieval
from minivlp.evaluation.retrieval import (
    chance_of_reaching,
    fill_prompt,
    rank,
    reranked,
    retrieval,
    similarities,
    zero_shot,
)
from minivlp.evaluation.score import Score, Scores, bootstrap, median, spread, table
from minivlp.evaluation.suite import measure
from minivlp.inference import evaluating

NOUNS = ["dog", "cat", "bus", "car", "lion", "panda", "apple", "house"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@dataclass
class Toy:
    """A dataset whose image number r is plain gray of value r: a model can read the row from any pixel."""

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
        return np.stack([np.full((*height_width(size), 3), row, np.uint8) for row in rows])


class Model(nn.Module):
    """What all the models below can do: read the image's row and the words."""

    config = SimpleNamespace(image=SimpleNamespace(image_size=4), text=SimpleNamespace(context_length=24))

    def __init__(self, tokenizer):
        super().__init__()
        self.weight, self.drop = nn.Parameter(torch.zeros(1)), nn.Dropout()
        self.tokenizer, self.images_seen, self.texts_seen, self.pairs_seen = tokenizer, 0, 0, 0

    def rows(self, images):
        assert not self.training and not torch.is_grad_enabled()
        return ((images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()

    def read(self, text):
        rows = zip(text.ids, text.mask, strict=True)
        return [self.tokenizer.decode(ids[mask], skip_special_tokens=True).strip() for ids, mask in rows]


class Knows(Model):
    """A dual encoder that knows which texts belong to which row."""

    def __init__(self, tokenizer, texts):
        super().__init__(tokenizer)
        self.texts = texts

    def embed_images(self, images):
        self.images_seen += len(images)
        return torch.eye(len(self.texts))[self.rows(images)]

    def embed_texts(self, text):
        self.texts_seen += len(text)
        vectors = [[float(any(said in t for t in of_row)) for of_row in self.texts] for said in self.read(text)]
        return nn.functional.normalize(torch.tensor(vectors), dim=-1)

    def score(self, image_features, text_features):
        return 5 * image_features @ text_features.T


class KnowsPairs(Model):
    """The same knowledge, but only pair by pair."""

    def __init__(self, tokenizer, texts):
        super().__init__(tokenizer)
        self.texts = texts

    def match(self, images, text):
        self.pairs_seen += len(images)
        pairs = zip(self.rows(images), self.read(text), strict=True)
        return torch.tensor([float(said in self.texts[row]) for row, said in pairs])


class Shares(KnowsPairs):
    """The same, and an image is encoded once for all of its texts."""

    def match_many(self, images, image_rows, text):
        self.images_seen += len(images)
        return self.match(images[image_rows], text)


# ------------------------------------------------------------------------------------------------------------ the score


def test_bootstrap_is_the_mean_with_an_interval_that_holds_it_and_is_repeatable():
    values = np.random.default_rng(1).random(400) < 0.3
    score = bootstrap(values, 0.1)
    assert score.value == values.mean() and score.n == 400 and score.chance == 0.1
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)  # the textbook's interval
    assert score.high - score.value == pytest.approx(half, rel=0.15) == pytest.approx(score.value - score.low, rel=0.15)
    assert bootstrap(values, 0.1) == score


def test_rows_of_one_image_are_resampled_together():
    hits = np.repeat(np.random.default_rng(0).random(60) < 0.5, 5)  # five captions, all right or all wrong
    alone, together = bootstrap(hits, 0), bootstrap(hits, 0, images=np.repeat(range(60), 5))
    assert together.value == alone.value
    assert together.high - together.low > 1.8 * (alone.high - alone.low)  # sqrt(5) in theory


def test_weights_and_median():
    assert bootstrap([1, 0, 0], 0, weights=[2, 1, 1]).value == 0.5
    for values in ([3.0, 1.0, 2.0], [4.0, 1.0, 3.0, 2.0], [5.0]):
        assert bootstrap(values, 0, statistic=median).value == np.median(values)
    assert median(np.array([1.0, 2.0, 9.0]), np.array([1.0, 1.0, 5.0])) == 9


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match="Nothing to score"):
        bootstrap([], 0)
    with pytest.raises(ValueError, match="Value 1 is nan"):
        bootstrap([1.0, float("nan")], 0)
    with pytest.raises(ValueError, match="must be equal"):
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
    """By sorting and going down the list; the table has no ties."""
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
def test_ranks_equal_the_naive_search_with_several_captions_and_duplicates(seed):
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


def test_a_collapsed_model_gets_the_middle_rank():
    ranks = rank(torch.zeros(101, 101), range(101))
    assert set(ranks.of_images) == set(ranks.of_captions) == {51}


def test_broken_similarities_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        rank(torch.full((2, 2), float("nan")), [0, 1])
    with pytest.raises(ValueError, match="3 columns, 2 captions"):
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
    assert model.training and not model.drop.training  # every part has its earlier mode again


def test_unique_leaves_out_repeated_captions_and_none_takes_all(tokenizer):
    data = Toy([["a dog", "a small dog"], ["a cat"], ["a dog", "a dog"]])
    model = Knows(tokenizer, data.texts)
    assert retrieval(model, data, tokenizer, unique=500)["image to text R@1"].n == 2
    model.texts_seen = 0
    everything = retrieval(model, data, tokenizer, unique=None)
    assert model.texts_seen == 3  # of five captions three are different
    assert everything["image to text R@1"].n == 3 and everything["text to image R@1"].n == 5
    assert everything["text to image R@1"].value == 1  # "a dog" is right for both dogs


class Compares(Knows):
    """The same knowledge, by `similarity` alone."""

    def similarity(self, images, text):
        return 5 * Knows.embed_images(self, images) @ Knows.embed_texts(self, text).T

    embed_images = embed_texts = score = property()  # raises AttributeError: hasattr says no


@pytest.mark.parametrize("other", [Compares, KnowsPairs, Shares])
def test_all_ways_of_comparing_give_the_same_order_at_their_own_cost(tokenizer, other):
    data = Toy([[f"a {noun}", f"the {noun}"] for noun in NOUNS] + [["a dog"]])
    dual, model = Knows(tokenizer, data.texts), other(tokenizer, data.texts)
    rows, texts = range(len(data)), [t for of_row in data.texts for t in of_row]
    with torch.no_grad():
        dual.eval(), model.eval()
        wanted = similarities(dual, data, tokenizer, rows, texts, 3)
        found = similarities(model, data, tokenizer, rows, texts, 3)
    assert wanted.shape == (9, 17) and torch.equal(wanted > 0, found > 0)
    assert dual.images_seen == 9 and dual.texts_seen == 16  # "a dog" occurs twice
    assert model.pairs_seen in (0, 9 * 16)
    assert model.images_seen == {Compares: 6 * 9, KnowsPairs: 0, Shares: 6 * 9}[other]  # six batches of texts


class Blurred(Shares):
    """Towers whose vectors are random, and a `match` that knows."""

    def embed_images(self, images):
        return self.vectors(self.rows(images))

    def embed_texts(self, text):
        return self.vectors([1000 + crc32(said.encode()) for said in self.read(text)])

    def score(self, image_features, text_features):
        return 20 * image_features @ text_features.T

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
    assert 40 * 5 < model.pairs_seen <= 2 * 40 * 5  # pairs that both directions ask for are computed once
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


def test_a_missing_verb_is_named(tokenizer):
    truths = [Pair("dog", "cat"), Pair("cat", "dog")]
    data = Toy([["a dog"], ["a cat"]], [[Region((0.5, 0.5, 0.1, 0.1), "a dog")], []], truths)
    verbs = {
        counterfactual: "match or embed_images",
        masked_words: "mlm_logits",
        grounding: "ground",
        region_retrieval: "embed_regions",
        retrieval: "embed_images or similarity or match",
        reranked: "embed_images",
        cost: "embed_images or match",
    }
    for measured, verb in verbs.items():
        with pytest.raises(TypeError, match=f"Model has no {verb}:"):
            measured(Model(tokenizer), data, tokenizer)
    with pytest.raises(TypeError, match="Model has no caption_logprob:"):
        counterfactual(Model(tokenizer), data, tokenizer, score=caption_likelihood)
    with pytest.raises(ValueError, match="empty"):
        retrieval(Knows(tokenizer, []), Toy([]), tokenizer)


def test_the_suite_measures_what_a_model_can_do_and_nothing_else(tokenizer):
    """On scenes, too: a model without `match` and `embed_images` has no counterfactual score."""
    data = pairs_of_objects()
    data.scene, data.language = data.truths.__getitem__, "en"
    bare, fills = Model(tokenizer), Fills(tokenizer, data)
    dual, pairs = BagOfWords(tokenizer, data), KnowsPairs(tokenizer, data.texts)
    for model in (bare, fills, dual, pairs):
        model.config = SimpleNamespace(image=SimpleNamespace(image_size=4, size=(4, 4)), text=Model.config.text)
    assert measure(bare, data, tokenizer) == {}
    assert set(measure(fills, data, tokenizer)) == {f"masked word: {x} image" for x in ("right", "wrong", "no")}
    assert {"counterfactual: mean"} < set(measure(pairs, data, tokenizer))
    assert {"counterfactual: mean", "text to image R@1"} < set(measure(dual, data, tokenizer))


# --------------------------------------------------------------------------------------------- features of other shapes


class LateInteraction(Model):
    """As FILIP (Yao et al. 2022): one vector per patch and per token; a pair's score is the mean over tokens of the
    best patch, and back. An image has the vectors of its caption's words, a text one per word, padded with zeros."""

    def __init__(self, tokenizer, captions):
        super().__init__(tokenizer)
        self.captions, self.largest = captions, 0
        self.table = nn.functional.normalize(torch.randn(len(tokenizer), 16), dim=-1)

    def embed_images(self, images):
        self.images_seen += len(images)
        said = [self.tokenizer(self.captions[row], add_special_tokens=False)["input_ids"] for row in self.rows(images)]
        return torch.stack([self.table[(ids * 8)[:8]] for ids in said])  # (M, P, E)

    def embed_texts(self, text):
        self.texts_seen += len(text)
        words = text.mask & (text.ids > 6)
        return self.table[text.ids] * words[..., None]  # (N, T, E)

    def score(self, image_features, text_features):
        assert image_features.dim() == text_features.dim() == 3
        cosines = torch.einsum("mpe,nte->mnpt", image_features, text_features)
        self.largest = max(self.largest, cosines.shape[0] * cosines.shape[1])
        real = text_features.abs().sum(-1) > 0  # (N, T)
        by_token = (cosines.amax(2) * real).sum(-1) / real.sum(-1)
        by_patch = cosines.masked_fill(~real[None, :, None], -1).amax(3).mean(-1)
        return 10 * (by_token + by_patch)


def test_late_interaction_needs_no_special_case(tokenizer):
    """Captions of three to seven words: the features of different batches have different lengths."""
    said = [f"a {a}" + " left of a red dog" * (i % 3) for i, a in enumerate(NOUNS[1:])]
    data = Toy([[text] for text in said])
    model = LateInteraction(tokenizer, said)
    scores = retrieval(model, data, tokenizer, batch_size=3)
    assert scores["image to text R@1"].value == scores["text to image R@1"].value == 1
    assert model.images_seen == model.texts_seen == 7 and model.largest == 9  # one block of 3 x 3 at a time
    model.eval()
    with torch.no_grad():
        images = images_of(model, data, range(7))
        whole = similarities(model, data, tokenizer, range(7), said)
        for batch_size in (1, 2, 5):
            assert torch.allclose(similarities(model, data, tokenizer, range(7), said, batch_size), whole, atol=1e-5)
            rows = [0, 0, 4, 2, 4]
            texts = [said[i] for i in (1, 0, 3, 6, 3)]
            pairs = pair_scores(model, data, tokenizer, rows, texts, batch_size)
            assert torch.allclose(pairs, whole[rows, [1, 0, 3, 6, 3]], atol=1e-5)
        assert len(images) == 7


def test_other_measures_of_late_interaction(tokenizer):
    data = pairs_of_objects()
    captions = [of_row[0] for of_row in data.texts]
    model = LateInteraction(tokenizer, captions)
    found = counterfactual(model, data, tokenizer, batch_size=9)
    assert found["object"].value == 1 and 0.4 < found["swap"].value < 0.6  # no order of words in its features
    assert cost(model, data, tokenizer, images=3, texts=4).seconds_once > 0
    single = Toy([["x"]] * 8, [[Region((0.5, 0.5, 0.4, 0.4), f"a {noun}")] for noun in NOUNS])
    model.captions = [f"a {noun}" for noun in NOUNS]
    scores = zero_shot(model, single, tokenizer, NOUNS, ["a {}", "a picture of a {}"], batch_size=5)
    assert scores["top-1"].value == 1 and scores["top-1"].n == 8

    def embed_regions(images, boxes, image_rows):
        return model.embed_images(images)[image_rows]

    model.embed_regions = embed_regions
    regions = region_retrieval(model, single, tokenizer, batch_size=3)
    assert regions["text to region R@1"].value == regions["region to text R@1"].value == 1


def test_the_score_need_not_be_a_dot_product(tokenizer):
    """Vectors that are not of unit length, compared by their distance."""
    data = Toy([[f"a {a} and a {b}"] for a in NOUNS for b in NOUNS if a != b])

    class Distances(Knows):
        def embed_images(self, images):
            return torch.tensor(self.rows(images), dtype=torch.float32)[:, None]

        def embed_texts(self, text):
            rows = {of_row[0]: row for row, of_row in enumerate(self.texts)}
            return torch.tensor([float(rows.get(said, 999)) for said in self.read(text)])[:, None]

        def score(self, image_features, text_features):
            return -(image_features - text_features.T).abs()

    model = Distances(tokenizer, data.texts)
    assert retrieval(model, data, tokenizer, batch_size=10)["text to image R@1"].value == 1
    with torch.no_grad():
        model.eval()
        assert pair_scores(model, data, tokenizer, [3, 5], [data.texts[3][0], data.texts[3][0]]).tolist() == [0, -2]


def test_images_may_be_higher_than_wide_and_are_decoded_once(tokenizer):
    data = Toy([["a dog"], ["a cat"], ["a bus"]])
    model, asked = Model(tokenizer), []
    model.config = SimpleNamespace(image=SimpleNamespace(image_size=(8, 4)), text=Model.config.text)
    pixels = data.pixels
    data.pixels = lambda rows, size: asked.append((list(rows), size)) or pixels(rows, size)
    images = images_of(model, data, np.array([2, 0, 2]))
    assert images.shape == (3, 3, 8, 4) and asked == [([2, 0], (8, 4))]
    assert [round((i.mean().item() + 1) * 127.5) for i in images] == [2, 0, 2]


def test_distinct_items_and_where_they_are():
    items, index = distinct(["b", "a", "b", "c", "a"])
    assert items == ["b", "a", "c"] and index.tolist() == [0, 1, 0, 2, 1]
    items, index = distinct([])
    assert items == [] and index.shape == (0,) and index.dtype == torch.long


# -------------------------------------------------------------------------------------------------------------- records


def test_a_record_is_read_as_it_was_written(tmp_path):
    runs = [
        {"variant": variant, "seed": seed, "seconds": 3, "scores": Scores({"R@1": Score(0.123456, 0, 1, 0.5, 9)})}
        for variant, seed in (("one", 0), ("one", 1), ("two", 0))
    ]
    path = save_record("test", "python tools/experiments.py test", runs, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no unfinished file is left
    assert load_runs("test", tmp_path)[0] == {**runs[0], "scores": {"R@1": Score(0.1235, 0, 1, 0.5, 9)}}
    found = by_variant("test", tmp_path)
    assert {variant: len(scores) for variant, scores in found.items()} == {"one": 2, "two": 1}
    with pytest.raises(FileNotFoundError, match="experiments.py nothing"):
        load_runs("nothing", tmp_path)


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.json")), ids=lambda path: path.stem)
def test_every_record_is_read_and_has_the_names_of_today(path):
    for scores in (scores for of_variant in by_variant(path.stem).values() for scores in of_variant):
        assert scores and not [name for name in scores if "colour" in name or "grey" in name]
        assert all(score.low <= score.value <= score.high for score in scores.values())


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
    """A scene of two objects, as far as counterfactual captions need it."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def captions(self, language):
        return [f"a {self.first} left of a {self.second}", "something else"]

    def counterfactuals(self, rng, language):
        changed = {"object": f"a {self.first} left of a snail", "swap": f"a {self.second} left of a {self.first}"}
        return changed if self.first != "dog" else {"object": changed["object"]}


class BagOfWords(Model):
    """Knows which words belong to the image, and nothing of their order."""

    def __init__(self, tokenizer, data):
        super().__init__(tokenizer)
        self.bags = [set(of_row[0].split()) for of_row in data.texts]

    def embed_images(self, images):
        return torch.stack([self.vector(self.bags[row]) for row in self.rows(images)])

    def embed_texts(self, text):
        return torch.stack([self.vector(set(said.split())) for said in self.read(text)])

    def score(self, image_features, text_features):
        return image_features @ text_features.T

    def vector(self, bag):
        words = [*NOUNS, "snail", "left", "of", "a"]
        return nn.functional.normalize(torch.tensor([float(word in bag) for word in words]), dim=0)


def pairs_of_objects():
    truths = [Pair(a, b) for a in NOUNS for b in NOUNS if a != b]
    return Toy([truth.captions("en") for truth in truths], truths=truths)


def test_a_bag_of_words_tells_objects_but_not_their_order(tokenizer):
    data = pairs_of_objects()
    scores = counterfactual(BagOfWords(tokenizer, data), data, tokenizer, batch_size=7)
    assert set(scores) == {"object", "swap", "mean"}
    assert scores["object"].value == 1 and scores["object"].n == 56
    assert scores["swap"].value == 0.5 == scores["swap"].chance and scores["swap"].n == 49  # ties count half
    assert scores["mean"].value == pytest.approx(0.75)  # of the kinds, however often each applies


def test_matching_is_preferred_to_embedding(tokenizer):
    data = pairs_of_objects()
    model = BagOfWords(tokenizer, data)
    model.match = KnowsPairs(tokenizer, data.texts).eval().match
    assert counterfactual(model, data, tokenizer, limit=20)["mean"].value == 1


class WritesLikely(KnowsPairs):
    """Its captioner knows which captions are true, its matching head prefers what is not."""

    def caption_logprob(self, images, text):
        return super().match(images, text) - text.mask.sum(dim=1)

    def match(self, images, text):
        return 1 - super().match(images, text)


def test_a_pair_can_be_judged_by_the_likelihood_of_its_caption(tokenizer):
    data = pairs_of_objects()
    model = WritesLikely(tokenizer, data.texts)
    assert counterfactual(model, data, tokenizer, score=caption_likelihood, batch_size=9)[
        "mean"
    ].value == pytest.approx(1)
    assert counterfactual(model, data, tokenizer, batch_size=9)["mean"].value == 0
    said = [data.texts[row][0] for row in (3, 3, 0)]
    with evaluating(model):
        scores = [caption_likelihood(model, data, tokenizer, (3, 0, 0), said, size) for size in (1, 2, 8)]
    assert all(torch.equal(found, scores[0]) for found in scores)
    tokens = len(tokenizer(said[0])["input_ids"])
    assert scores[0][:2].tolist() == [1 - tokens, -tokens]  # true of image 3, not of image 0


def test_photos_have_no_known_truth(tokenizer):
    data = Toy([["a dog"], ["a cat"]])
    with pytest.raises(ValueError, match="truth of row 0 is not known"):
        counterfactual(Knows(tokenizer, data.texts), data, tokenizer)


class Fills(Model):
    """Predicts the masked word from the image, or, if `blind`, always the same word."""

    def __init__(self, tokenizer, data, blind=False):
        super().__init__(tokenizer)
        self.captions, self.blind = [of_row[0] for of_row in data.texts], blind

    def mlm_logits(self, images, text):
        assert ((text.ids == self.tokenizer.mask_token_id).sum(1) == 1).all()
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

    def ground(self, images, text):
        return torch.tensor([self.always or self.book[said] for said in self.read(text)])


def test_a_model_that_finds_everything(tokenizer):
    data = boxes_toy()
    scores = grounding(Points(tokenizer, data), data, tokenizer, mean_box=mean_box_of(data), batch_size=4)
    for name in ("Acc@0.5", "Acc@0.7", "mean IoU", "Acc@0.5 object", "Acc@0.5 phrase"):
        assert scores[name].value == pytest.approx(1)
    assert scores["Acc@0.5"].n == 18 and scores["Acc@0.5 object"].n == 12  # whole images are not asked
    assert scores["Acc@0.5 large"].n + scores["Acc@0.5 medium"].n == 18  # 12 equal small boxes fill two thirds
    assert scores["baseline: another object's phrase"].value == 0
    assert scores["baseline: whole image"].value == 0 and "baseline: mean training box" in scores


def test_a_phrase_of_several_objects_is_asked_once_and_any_of_them_is_right(tokenizer):
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


def test_the_baseline_shows_that_a_model_ignores_the_words(tokenizer):
    data = boxes_toy()
    scores = grounding(Points(tokenizer, data, always=(0.2, 0.2, 0.2, 0.2)), data, tokenizer)
    assert scores["Acc@0.5"].value == pytest.approx(2 / 3)
    assert scores["baseline: another object's phrase"].value == 0.5  # as good with the wrong phrase
    whole = grounding(Points(tokenizer, data, always=(0.5, 0.5, 1.0, 1.0)), data, tokenizer)
    assert whole["mean IoU"].value == pytest.approx(whole["mean IoU"].chance)  # guessing is chance


class PointsOnce(Points):
    """The same, and an image is encoded once for all of its phrases."""

    def ground_many(self, images, image_rows, text):
        self.images_seen += len(images)
        return self.ground(images[image_rows], text)


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
    """Given vectors of places and of texts: {(row, box): vector}, {text: vector}."""

    def __init__(self, tokenizer, places, texts):
        super().__init__(tokenizer)
        self.places, self.vectors = places, texts

    def embed_regions(self, images, boxes, image_rows):
        self.images_seen += len(images)
        keys = [
            (self.rows(images)[row], tuple(round(x, 4) for x in box))
            for row, box in zip(image_rows, boxes.tolist(), strict=True)
        ]
        return torch.stack([self.places[key] for key in keys])

    def embed_texts(self, text):
        return torch.stack([self.vectors[said] for said in self.read(text)])

    def score(self, image_features, text_features):
        return image_features @ text_features.T


LEFT, RIGHT, WHOLE = (0.2, 0.5, 0.2, 0.2), (0.7, 0.5, 0.2, 0.2), (0.5, 0.5, 1.0, 1.0)


def kinds_toy():
    """Four images of two objects each; the first object also has a relation, and "a dog" is in all of them."""
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
    """One-hot places; the vector of a text is the sum of its places, each with the weight `texts_of_place(region)`."""
    places = list(dict.fromkeys((row, r.box) for row in range(len(data)) for r in data.regions(row)))
    vectors = dict(zip(places, torch.eye(len(places)), strict=True))
    texts = {}
    for row in range(len(data)):
        for region in data.regions(row):
            texts[region.phrase] = texts.get(region.phrase, 0) + texts_of_place(region) * vectors[row, region.box]
    return vectors, texts


def test_every_phrase_finds_its_region_and_every_region_its_phrase(tokenizer):
    data = kinds_toy()
    model = Places(tokenizer, *known_places(data, lambda region: 1.0)).train()
    scores = region_retrieval(model, data, tokenizer, batch_size=3)
    assert all(score.value == 1 for score in scores.values()) and model.images_seen == 4 and model.training
    assert len(scores) == 2 * 2 * 5  # two directions, R@1 and R@5, all kinds and each of four
    one = scores["text to region R@1 phrase"]
    assert one.n == 4 and one.chance == pytest.approx(1 / 12)  # 4 images of 3 places, one of them is right
    dog = scores["text to region R@1 object"]
    assert dog.n == 4 and dog.chance == pytest.approx(4 / 12)  # "a dog" is right for the dogs of all images
    assert scores["text to region R@5 phrase"].chance == pytest.approx(5 / 12)
    assert scores["region to text R@1 relation"].chance == pytest.approx(1 / 12)  # 13 texts, one left out
    assert scores["text to region R@1"].n == 16


def test_a_text_of_another_kind_is_no_wrong_answer(tokenizer):
    data = kinds_toy()
    louder = {"relation": 3.0}  # a place is nearer to its relation than to its phrase
    model = Places(tokenizer, *known_places(data, lambda region: louder.get(region.kind, 1.0)))
    scores = region_retrieval(model, data, tokenizer)
    assert scores["region to text R@1 phrase"].value == scores["region to text R@1 relation"].value == 1


def test_region_retrieval_by_kind_equals_the_naive_search(tokenizer):
    data = kinds_toy()
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
        for direction, indices in hits.items():
            for k in (1, 5):
                assert scores[f"{direction} R@{k} {kind}"].value == np.mean([index < k for index in indices])


def test_region_retrieval_refuses_what_it_cannot_rank(tokenizer):
    with pytest.raises(ValueError, match="no regions"):
        region_retrieval(Places(tokenizer, {}, {}), Toy([["x"]]), tokenizer)
    data = kinds_toy()
    places, texts = known_places(data, lambda region: float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        region_retrieval(Places(tokenizer, places, texts), data, tokenizer)


def test_iou_by_hand():
    first = torch.tensor([[0.5, 0.5, 1, 1], [0.25, 0.5, 0.5, 1], [0.1, 0.1, 0.1, 0.1], [0.5, 0.5, -1, 0.2]])
    second = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0.5, 1], [0.9, 0.9, 0.1, 0.1], [0.5, 0.5, 0, 0]])
    assert iou(first, second).tolist() == pytest.approx([0.25, 1 / 3, 0, 0])
    many = torch.rand(600, 4)
    assert torch.allclose(iou(many, many), torch.ones(600))


def test_boxes_that_are_not_finite_are_refused(tokenizer):
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
    low = torch.tensor([[0.5, 0.9, 1.0, 0.2]])  # a strip at the bottom: rows and columns must not be mixed up
    bottom = torch.zeros(1, 4, 3)
    bottom[0, 3] = 1
    assert attention_in_box(bottom, low).value == pytest.approx(0.8) and attention_in_box(bottom, low).chance < 0.21


def test_pointing_game_counts_hits_against_the_share_of_patches():
    maps = torch.rand(300, 8, 8, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[0.25, 0.25, 0.5, 0.5]]).expand(300, 4)
    score = pointing_game(maps, box)
    assert score.chance == 0.25 and score.low < 0.25 < score.high  # random maps are at chance
    with pytest.raises(ValueError, match="zero everywhere"):
        pointing_game(torch.zeros(1, 2, 2), box[:1])
