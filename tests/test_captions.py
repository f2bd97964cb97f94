"""Measures of captions: the values of COCO's own code, facts of scenes whose truth is known, and filters."""

import itertools
import json
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from minivlp.data.english import parse
from minivlp.data.grammar import Mention
from minivlp.data.noise import NoisyCaptions
from minivlp.data.scene import Background, Scene, SceneObject
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer, tokenize
from minivlp.evaluation.captions import bleu_4, captions, cider_d, rouge_l, words_of, write
from minivlp.evaluation.facts import FACTS, check_facts, read_facts, tells_all
from minivlp.evaluation.filtering import filter_quality, roc
from minivlp.evaluation.score import bootstrap_counts
from minivlp.layers.generation import DecodingConfig

COCO = json.loads((Path(__file__).parent / "golden" / "captions_coco.json").read_text())["sets"]


# ---------------------------------------------------------------------------------------------- by overlap of words


@pytest.mark.parametrize("judged", COCO, ids=["nearly right", "scrambled", "random words", "cut short"])
def test_the_numbers_of_cocos_own_code(judged):
    written, references = judged["written"], judged["references"]
    found = [rouge_l(text, refs) for text, refs in zip(written, references, strict=True)]
    assert found == pytest.approx(judged["rouge_l"], abs=1e-9)
    assert cider_d(written, references) == pytest.approx(judged["cider_d"], abs=1e-9)
    bleu = bleu_4(written, references)
    if bleu:
        assert bleu == pytest.approx(judged["bleu_4"], abs=1e-9)
    else:  # no n-gram of four words in common: COCO's code then adds a tiny constant
        assert judged["bleu_4"] < 1e-5


def test_live_against_cocos_own_code():
    scorers = pytest.importorskip("pycocoevalcap", reason="large, and its numbers are stored")
    assert scorers
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    rng = Random(3)
    say = lambda: " ".join(rng.choice("abcdefg") for _ in range(rng.randrange(1, 15)))  # noqa: E731
    references = [[say() for _ in range(rng.randrange(1, 4))] for _ in range(30)]
    written = [say() for _ in references]
    refs, texts = dict(enumerate(references)), {i: [text] for i, text in enumerate(written)}
    assert bleu_4(written, references) == pytest.approx(Bleu(4).compute_score(refs, texts, verbose=0)[0][3], abs=1e-8)
    assert cider_d(written, references) == pytest.approx(Cider().compute_score(refs, texts)[1], abs=1e-9)
    found = [rouge_l(text, of) for text, of in zip(written, references, strict=True)]
    assert found == pytest.approx(Rouge().compute_score(refs, texts)[1], abs=1e-9)


def test_empty_texts_and_other_scripts():
    assert bleu_4(["", "a dog"], [["a dog"], ["a cat"]]) == 0
    assert rouge_l("", ["a dog"]) == 0 == rouge_l("a bus", ["two cars"]) and rouge_l("a dog", ["a dog"]) == 1
    assert cider_d([""], [["a dog"]]).tolist() == [0]
    assert words_of("A dog's ball, 3 cats.") == ["a", "dog's", "ball", "3", "cats"]
    assert words_of("一只狗 IMG狗") == ["一", "只", "狗", "img", "狗"]


def test_counts_of_all_images_are_measured_together():
    counts = np.array([[1.0, 1.0], [0.0, 9.0]])  # found, asked
    score = bootstrap_counts(counts, lambda c: c[:, 0].sum() / c[:, 1].sum(), 0.3, n=10)
    assert score.value == 0.1 and score.n == 10 and score.chance == 0.3
    assert score.low == 0 and score.high == 1  # one of the two images, twice


# --------------------------------------------------------------------------------------------------- fact by fact


def scene(*objects: tuple) -> Scene:
    """Objects in a row from left to right, each (noun, color, size, count), in an image of 100 pixels."""
    placed = []
    for i, (noun, color, size, count) in enumerate(objects):
        side = {"small": 20, "large": 40, None: 33}[size]
        boxes = tuple((i * 45 + 2, 45 * j, i * 45 + 2 + side, 45 * j + side) for j in range(count))
        placed.append(SceneObject(noun, color, size, count, boxes))
    return Scene(tuple(placed), Background(((0, 0, 0), (0, 0, 0))), 100)


HEART_DOG = scene(("heart", "red", "small", 1), ("dog", None, None, 1))  # "a small red heart left of a dog"
HEARTS = scene(("heart", "red", None, 1), ("heart", "blue", None, 1))


def checked(caption: str, of: Scene) -> dict[str, tuple[int, int, int]]:
    """Right, wrong, missing of each kind that is not all zero."""
    return {kind: tuple(n) for kind, n in zip(FACTS, check_facts(caption, of).tolist(), strict=True) if any(n)}


@pytest.mark.parametrize("split", ["test", "composition"])
def test_true_captions_state_every_fact_and_nothing_else(split):
    dataset = Scenes(150, split, seed=5)
    for row in range(150):
        for caption in dataset.captions(row):
            counts = check_facts(caption, dataset.scene(row))
            assert counts[:, 0].sum() > 0 and counts[:, 1:].sum() == 0, caption


def test_what_is_read_is_what_the_grammar_reads():
    dataset = Scenes(150, "test", seed=6)
    for row in range(150):
        for caption in dataset.captions(row):
            assert read_facts(caption) == parse(caption)


def test_a_changed_caption_is_wrong_in_that_fact_alone():
    dataset, kinds = Scenes(150, "test", seed=7), {}
    changed_kind = {"color": "colors", "size": "sizes", "relation": "relations", "count": "counts"}
    for row in range(150):
        for change, caption in dataset.scene(row).counterfactuals(Random(row)).items():
            wrong = [kind for kind, n in checked(caption, dataset.scene(row)).items() if n[1]]
            assert wrong, (change, caption)
            if change in changed_kind and len({one.noun for one in dataset.scene(row).objects}) == len(
                dataset.scene(row).objects
            ):
                assert wrong == [changed_kind[change]], caption
                kinds[change] = kinds.get(change, 0) + 1
    assert set(kinds) == set(changed_kind)


@pytest.mark.parametrize(
    "caption, of, expected",
    [
        ("a small red heart left of a dog", HEART_DOG,
         {"objects": (2, 0, 0), "colors": (1, 0, 0), "sizes": (1, 0, 0), "counts": (2, 0, 0), "relations": (1, 0, 0)}),
        ("a dog right of a small red heart", HEART_DOG,
         {"objects": (2, 0, 0), "colors": (1, 0, 0), "sizes": (1, 0, 0), "counts": (2, 0, 0), "relations": (1, 0, 0)}),
        ("", HEART_DOG,
         {"objects": (0, 0, 2), "colors": (0, 0, 1), "sizes": (0, 0, 1), "counts": (0, 0, 2), "relations": (0, 0, 1)}),
        ("buy now and save 20", HEART_DOG,
         {"objects": (0, 0, 2), "colors": (0, 0, 1), "sizes": (0, 0, 1), "counts": (0, 0, 2), "relations": (0, 0, 1)}),
        ("two large blue hearts above dog dog", HEART_DOG,  # only one dog is there; it is not said how many
         {"objects": (2, 1, 0), "colors": (0, 1, 0), "sizes": (0, 1, 0), "counts": (0, 1, 1), "relations": (0, 1, 0)}),
        ("a red cat", HEART_DOG,
         {"objects": (0, 1, 2), "colors": (0, 1, 1), "sizes": (0, 0, 1), "counts": (0, 1, 2), "relations": (0, 0, 1)}),
        ("dog a left red of of heart small", HEART_DOG,  # broken, but it states facts
         {"objects": (2, 0, 0), "colors": (1, 0, 0), "sizes": (0, 0, 1), "counts": (1, 0, 1), "relations": (0, 1, 0)}),
        ("a blue heart right of a red heart", HEARTS,
         {"objects": (2, 0, 0), "colors": (2, 0, 0), "counts": (2, 0, 0), "relations": (1, 0, 0)}),
        ("a red heart left of a red heart", HEARTS,  # one of them must be the blue one
         {"objects": (2, 0, 0), "colors": (1, 1, 0), "counts": (2, 0, 0), "relations": (1, 0, 0)}),
        ("a picture of dogs", scene(("dog", None, None, 2)), {"objects": (1, 0, 0), "counts": (0, 0, 1)}),
        ("a picture of dog", HEART_DOG,  # one picture; it is not said how many dogs
         {"objects": (1, 0, 1), "colors": (0, 0, 1), "sizes": (0, 0, 1), "counts": (0, 0, 2), "relations": (0, 0, 1)}),
        ("a dogs", scene(("dog", None, None, 2)), {"objects": (1, 0, 0), "counts": (0, 0, 1)}),
        ("two dogs", scene(("dog", None, None, 2)), {"objects": (1, 0, 0), "counts": (1, 0, 0)}),
        ("a small dog", scene(("dog", None, "large", 1)),
         {"objects": (1, 0, 0), "sizes": (0, 1, 0), "counts": (1, 0, 0)}),
    ],
)  # fmt: skip
def test_facts_are_counted(caption, of, expected):
    assert checked(caption, of) == expected


def test_a_size_is_that_of_the_whole_group():
    dogs = SceneObject("dog", count=2, boxes=((0, 0, 20, 20), (50, 50, 95, 95)))  # one small, one large
    assert checked("two small dogs", Scene((dogs,), HEARTS.background, 100))["sizes"] == (0, 1, 0)


def test_the_best_reading_is_taken_whatever_the_order_of_words():
    """As in a naive search over all ways to assign mentions to objects."""
    rng = Random(0)
    words = "a two red blue small heart hearts dog left above of".split()
    for _ in range(60):
        caption = " ".join(rng.choice(words) for _ in range(rng.randrange(12)))
        said = read_facts(caption).objects
        right = 0
        for meant in itertools.product([None, 0, 1], repeat=len(said)):
            chosen = [m for m in meant if m is not None]
            if len(set(chosen)) < len(chosen) or any(
                m is not None and HEARTS.objects[m].noun != mention.noun for m, mention in zip(meant, said, strict=True)
            ):
                continue
            right = max(right, sum(1 + (s.color == HEARTS.objects[m].color) + (s.count == 1)
                                   for m, s in zip(meant, said, strict=True) if m is not None))  # fmt: skip
        counts = check_facts(caption, HEARTS)
        assert counts[:, 0].sum() >= right
        assert counts[1, 1] + counts[1, 0] == sum(mention.color is not None for mention in said)


def test_mentions_without_a_number_are_no_single_objects():
    assert read_facts("dog left of the red hearts").objects == (
        Mention("dog", count=0),
        Mention("heart", "red", count=0),
    )
    assert read_facts("the dog two fish fish").relations == ("", "")
    assert [m.count for m in read_facts("the dog two fish fish").objects] == [1, 2, 0]


# ------------------------------------------------------------------------------------------------ a model's captions


class Writer(nn.Module):
    """Writes `say(row)`; the datasets below paint the row into the image."""

    config = SimpleNamespace(image=SimpleNamespace(image_size=4), text=SimpleNamespace(context_length=56))

    def __init__(self, tokenizer, say):
        super().__init__()
        self.tokenizer, self.say, self.asked = tokenizer, say, []
        self.weight = nn.Parameter(torch.zeros(1))

    def generate(self, images, prompt=None, decoding=None, generator=None):
        assert not self.training
        self.asked.append((prompt, decoding, generator))
        rows = ((images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()
        return tokenize(self.tokenizer, [self.say(row) for row in rows], 56).ids[:, 1:]  # tokens, [SEP], padding


class Painted:
    """A dataset whose images show their row number."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getattr__(self, name):
        return getattr(self.dataset, name)

    def __len__(self):
        return len(self.dataset)

    def pixels(self, rows, size):
        return np.stack([np.full((size, size, 3), row, np.uint8) for row in rows])


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_a_perfect_a_blind_and_a_silent_writer(tokenizer):
    dataset = Painted(Scenes(40, "test", seed=9))
    perfect = captions(Writer(tokenizer, lambda row: dataset.captions(row)[2 % len(dataset.captions(row))]), dataset,
                       tokenizer, batch_size=16)  # fmt: skip
    for name in ("BLEU-4", "ROUGE-L", "exact", "facts right"):
        assert perfect[name].value == pytest.approx(1) and perfect[name].chance < 0.75, name
    assert perfect["facts wrong"].value == 0 == perfect["facts missing"].value
    assert perfect["CIDEr-D"].value > 3 * perfect["CIDEr-D"].chance
    assert perfect["exact"].n == 40 < perfect["facts right"].n == sum(perfect[f"{kind} right"].n for kind in FACTS)
    blind = captions(Writer(tokenizer, lambda row: dataset.captions((row + 20) % 40)[0]), dataset, tokenizer)
    for name, score in blind.items():
        assert score.value == pytest.approx(score.chance), name
    silent = captions(Writer(tokenizer, lambda row: ""), dataset, tokenizer)
    assert silent["facts missing"].value == 1 and silent["BLEU-4"].value == 0


def test_decoding_is_passed_on_and_photos_have_no_facts(tokenizer):
    dataset = Painted(Scenes(3, "test"))
    model = Writer(tokenizer, lambda row: "a dog")
    beams, draw = DecodingConfig(beams=3), torch.Generator()
    assert write(model, dataset, tokenizer, [2, 0], decoding=beams, generator=draw) == ["a dog", "a dog"]
    assert model.asked == [(None, beams, draw)]
    captions(model, dataset, tokenizer, decoding=beams)
    assert model.asked[1:] == [(None, beams, None)]
    photos = SimpleNamespace(captions=dataset.captions, pixels=dataset.pixels)
    photos = type("Photos", (), {"__len__": lambda self: 3, **{k: staticmethod(v) for k, v in vars(photos).items()}})()
    assert set(captions(model, photos, tokenizer)) == {"BLEU-4", "ROUGE-L", "CIDEr-D", "exact"}
    with pytest.raises(TypeError, match="no generate"):
        write(nn.Linear(1, 1), dataset, tokenizer, [0])
    with pytest.raises(ValueError, match="at least two"):
        captions(model, dataset, tokenizer, limit=1)


# ------------------------------------------------------------------------------------------------------ the filter


def test_a_perfect_a_guessing_and_an_inverted_filter():
    clean = np.array([NoisyCaptions(Scenes(60), 0.4).is_clean(row) for row in range(60)])
    knows = filter_quality(clean.astype(float), clean)
    assert [knows[n].value for n in ("AUC", "precision", "recall")] == [1, 1, 1] and knows["kept"].value == 0.6
    assert knows["precision"].chance == 0.6 and knows["recall"].chance == 0.6 and knows["AUC"].chance == 0.5
    assert filter_quality(1.0 - clean, clean)["AUC"].value == 0
    same = filter_quality(np.ones(60), clean)
    assert same["AUC"].value == 0.5 and same["recall"].value == 1 and same["precision"].value == 0.6
    nothing = filter_quality(np.zeros(60), clean)
    assert nothing["kept"].value == 0 == nothing["precision"].value
    with pytest.raises(ValueError, match="needs both"):
        filter_quality([1, 2], [True, True])


def test_auc_precision_and_recall_are_the_naive_counts():
    rng = np.random.default_rng(0)
    clean = rng.random(80) < 0.7
    scores = np.round(clean * 0.3 + rng.random(80), 1)  # with ties
    pairs = [(a, b) for a in scores[clean] for b in scores[~clean]]
    quality = filter_quality(scores, clean, threshold=0.6)
    assert quality["AUC"].value == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))
    assert quality["precision"].value == pytest.approx(clean[scores >= 0.6].mean())
    assert quality["recall"].value == pytest.approx((scores[clean] >= 0.6).mean())
    assert quality["AUC"].low < quality["AUC"].value < quality["AUC"].high
    noisy_kept, clean_kept = roc(scores, clean)
    assert (noisy_kept[0], clean_kept[0], noisy_kept[-1], clean_kept[-1]) == (0, 0, 1, 1)
    area = ((clean_kept[1:] + clean_kept[:-1]) / 2 * np.diff(noisy_kept)).sum()
    assert area == pytest.approx(quality["AUC"].value)


def test_every_caption_of_a_scene_tells_all_and_one_with_a_fact_changed_does_not():
    scenes = Scenes(60, "test", 3)
    rng = np.random.default_rng(0)
    for row in range(60):
        scene = scenes.scene(row)
        assert all(tells_all(caption, scene) for caption in scene.captions())
        assert not any(tells_all(caption, scene) for caption in scene.counterfactuals(rng).values())


def test_a_complete_caption_needs_every_object_its_color_and_grammar_but_no_size():
    scenes = Scenes(400, "test", 3)
    scene = next(
        s for s in map(scenes.scene, range(400)) if len(s.objects) == 2 and s.objects[0].size and s.objects[0].color
        and s.objects[1].count == 1
    )  # fmt: skip
    short, size, color = scene.captions()[0], scene.objects[0].size, scene.objects[0].color
    assert tells_all(short.replace(f"{size} ", "", 1), scene)
    for broken in (
        short.replace(size, {"small": "large", "large": "small"}[size], 1),
        short.replace(f" {color}", "", 1),
        short.split(scene.objects[0].noun)[0] + scene.objects[0].noun,
        short.replace("a", "", 1).replace("  ", " "),
        short + " and a dog",
    ):
        assert not tells_all(broken, scene), broken
