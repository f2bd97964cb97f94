"""The filters that the table of CapFilt compares: by truth, and by the cosine with the same share of captions kept."""

from random import Random
from types import SimpleNamespace

from tables.capfilt import cosine, oracle

from minivlp.data.noise import NoisyCaptions
from minivlp.data.scenes import Scenes
from minivlp.evaluation.facts import check_facts, is_true
from minivlp.training.capfilt import candidates, judged, merge


def lines_of(noisy, written):
    lines = candidates(noisy, written)
    return judged(lines, [0.25 if line["source"] == "synthetic" else 0.75 for line in lines], 0.5)


def test_the_oracle_keeps_the_true_captions_of_the_web_and_of_the_captioner():
    noisy = NoisyCaptions(Scenes(90, objects=(1, 2)), 0.4)
    written = [noisy.true_captions(row)[0] if row % 3 else "a car red" for row in range(90)]
    run = SimpleNamespace(noisy=noisy, table=lambda: lines_of(noisy, written))
    kept = {(line["row"], line["source"]) for line in oracle(run)}
    assert kept == {(row, "web") for row in range(90) if noisy.is_clean(row)} | {
        (row, "synthetic") for row in range(90) if row % 3
    }


def test_a_true_caption_may_leave_things_out_but_states_nothing_wrong():
    scenes = Scenes(200)
    for row in range(200):
        scene = scenes.scene(row)
        for caption in [f"a {one.noun}" for one in scene.objects if one.count == 1] + scene.captions():
            assert is_true(caption, scene) and not check_facts(caption, scene)[:, 1].any()
        false = scene.counterfactuals(Random(row)).values()
        assert not any(is_true(caption, scene) for caption in [*false, "best price free shipping", ""])


def test_the_cosine_keeps_as_many_captions_as_matching_does():
    noisy = NoisyCaptions(Scenes(10), 0.4)
    lines = lines_of(noisy, ["", *["a car"] * 9])
    scores = [float(-i) if line["source"] == "web" else 1.0 + i for i, line in enumerate(lines)]
    run = SimpleNamespace(noisy=noisy, table=lambda: lines, scores=lambda lines, scorer: scores)
    kept = cosine(run)
    assert len(kept) == sum(line["kept"] for line in lines) and kept == [line for line in lines if line in kept]
    assert [line["row"] for line in kept if line["source"] == "synthetic"] == list(range(1, 10))  # not the empty one
    web = [line for line in kept if line["source"] == "web"]
    assert web == [line for line in lines if line["source"] == "web"][: len(web)]
    assert merge(kept)[1][-1] == "a car"
