"""CapFilt: every stage is kept, a kill costs nothing, and the final model is trained on the captions that were kept."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from minivlp.data.batch import to_tensor
from minivlp.data.folders import Photos
from minivlp.data.loading import Loader
from minivlp.data.noise import NoisyCaptions
from minivlp.data.recaptioned import Recaptioned
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer, tokenize
from minivlp.layers.generation import DecodingConfig
from minivlp.models.blip import BLIP, BLIPConfig
from minivlp.training import capfilt
from minivlp.training.capfilt import CAPTION, FILTER, PRETRAIN, CapFilt, by_cosine
from minivlp.training.checkpoint import CheckpointError
from minivlp.training.loop import Settings, fit

SETTINGS = Settings(steps=4, warmup=1, save_every=2)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def data():
    """Images with noisy captions, and few with clean ones, of another seed but the same image ids."""
    return NoisyCaptions(Scenes(20, size=32), 0.5), Scenes(8, size=32, seed=1)


def build(losses):
    nano = BLIPConfig.nano()
    block = dataclasses.replace(nano.image.block, width=32, heads=2, hidden=64)
    image = dataclasses.replace(nano.image, image_size=32, layers=1, block=block)
    return BLIP(dataclasses.replace(nano, image=image, text=dataclasses.replace(nano.text, block=block), losses=losses))


def pipeline(data, tokenizer, folder, **changes):
    options = dict(build=build, pretrain=SETTINGS, finetune=SETTINGS, batch_size=4, threshold=0.5, bar=False)
    options |= {"device": "cpu", **changes}
    return CapFilt(options.pop("build"), *data, tokenizer, folder, **options)


@pytest.fixture(scope="module")
def whole(data, tokenizer, tmp_path_factory):
    """A run from beginning to end, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return pipeline(data, tokenizer, folder).final(), folder


def equal(one, other) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------ the pipeline


def test_every_caption_is_scored(whole, data, tokenizer):
    _, folder = whole
    noisy, _ = data
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines == pipeline(data, tokenizer, folder).table()
    web = [(line["row"], line["caption"]) for line in lines if line["source"] == "web"]
    assert web == [(row, text) for row in range(20) for text in noisy.captions(row)]
    assert [line["row"] for line in lines if line["source"] == "synthetic"] == list(range(20))
    for line in lines:
        assert 0 <= line["score"] <= 1 and line["kept"] is (line["score"] >= 0.5 and bool(line["caption"]))
    # and the score is the filter's, of this image and this text
    model = pipeline(data, tokenizer, folder).filter()
    images = to_tensor(noisy.pixels([line["row"] for line in lines], 32))
    with torch.no_grad():
        again = model.match(images, tokenize(tokenizer, [line["caption"] for line in lines], 56))
    assert again.tolist() == pytest.approx([line["score"] for line in lines], abs=1e-5)


def test_the_final_model_is_a_new_one_trained_on_what_was_kept(whole, data, tokenizer):
    final, folder = whole
    noisy, clean = data
    texts = {row: [] for row in range(20)}
    for line in pipeline(data, tokenizer, folder).table():
        if line["kept"] and line["caption"] not in texts[line["row"]]:
            texts[line["row"]].append(line["caption"])
    torch.manual_seed(0)
    fresh = build(PRETRAIN)
    fit(fresh, Loader(Recaptioned(noisy, texts, clean), tokenizer, 4, 32).batch, SETTINGS, device="cpu", bar=False)
    assert equal(final, fresh)


def test_each_stage_learns_its_own_losses_from_its_own_data(data, tokenizer, tmp_path, monkeypatch):
    seen = []

    def watched(model, batch_at, settings, run_dir, **more):
        loader = batch_at.__self__
        seen.append((run_dir.name, model.config.losses, loader.dataset, loader.negative_captions, model.state_dict()))
        seen[-1] = (*seen[-1][:4], {name: value.clone() for name, value in seen[-1][4].items()})
        return fit(model, batch_at, settings, run_dir=run_dir, **more)

    monkeypatch.setattr(capfilt, "fit", watched)
    run = pipeline(data, tokenizer, tmp_path)
    run.final()
    noisy, clean = data
    stages = {name: (losses, dataset, negatives) for name, losses, dataset, negatives, _ in seen}
    assert list(stages) == ["pretrained", "captioner", "filter", "final"]
    assert [stages[name][0] for name in stages] == [PRETRAIN, CAPTION, FILTER, PRETRAIN]
    assert stages["captioner"][1] is clean and stages["filter"][1] is clean
    assert [stages[name][2] for name in stages] == [False, False, True, False]  # scenes can make negative captions
    everything = stages["pretrained"][1]
    assert len(everything) == 28 and [everything.captions(i) for i in range(20)] == [
        noisy.captions(i) for i in range(20)
    ]
    started = {name: state for name, *_, state in seen}
    pretrained = run.pretrained().state_dict()
    for name in ("captioner", "filter"):
        assert all(torch.equal(started[name][key], value) for key, value in pretrained.items()), name
    assert all(torch.equal(started["final"][key], value) for key, value in started["pretrained"].items())


# ---------------------------------------------------------------------------------------------------------- resuming


class Killed(Exception):
    pass


def test_a_run_killed_between_stages_ends_like_an_uninterrupted_one(whole, data, tokenizer, tmp_path):
    final, _ = whole
    expected = {"captioner": CAPTION, "filter": FILTER, "final": PRETRAIN}
    for kills, stage in enumerate(expected):

        def killed(losses, stage=stage):
            if losses == expected[stage] and (stage != "final" or (tmp_path / "captions.jsonl").exists()):
                raise Killed  # before this stage begins
            return build(losses)

        torch.manual_seed(123 + kills)  # another process has drawn other numbers
        with pytest.raises(Killed):
            pipeline(data, tokenizer, tmp_path, build=killed).final()
    assert equal(pipeline(data, tokenizer, tmp_path).final(), final)


def test_a_run_killed_within_a_stage_ends_like_an_uninterrupted_one(whole, data, tokenizer, tmp_path):
    final, _ = whole
    steps = []

    def kill(row):
        steps.append(row["step"])
        if len(steps) in (4, 9):  # in pre-training, after its first save, and in the captioner
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            pipeline(data, tokenizer, tmp_path, on_step=[kill]).final()
        assert not list(tmp_path.rglob("*.part"))
    assert equal(pipeline(data, tokenizer, tmp_path).final(), final)
    assert steps[:6] == [0, 1, 2, 3, 2, 3]  # resumed from step 2


def test_what_is_done_is_not_done_again(whole, data, tokenizer, monkeypatch):
    final, folder = whole

    def never(*arguments, **options):
        raise AssertionError("done again")

    monkeypatch.setattr(capfilt, "fit", never)
    monkeypatch.setattr(BLIP, "generate", never)
    run = pipeline(data, tokenizer, folder)
    assert equal(run.final(), final) and not run.final().training
    assert len(run.synthetic()) == 20
    (folder / "captions.jsonl").unlink()  # scored again, by the same filter
    assert equal(run.final(), final)


def test_another_runs_folder_is_refused(whole, data, tokenizer):
    _, folder = whole
    others = {
        "decoding.top_p: there 0.9, now 0.5": {"decoding": DecodingConfig(top_p=0.5)},
        "threshold: there 0.5, now 0.7": {"threshold": 0.7},
        "noisy.seed: there 0, now 1": {"seed": 1},
        "scorer": {"scorer": by_cosine},
    }
    for difference, changes in others.items():
        with pytest.raises(CheckpointError, match=f"holds another run .*{difference}"):
            pipeline(data, tokenizer, folder, **changes)
    with pytest.raises(CheckpointError, match="clean.hash"):
        pipeline((data[0], Scenes(8, size=32, seed=2)), tokenizer, folder)


def test_a_frozen_image_tower_runs_once_per_image(data, tokenizer, tmp_path, monkeypatch):
    torch.manual_seed(3)
    tower = build(PRETRAIN).image.state_dict()

    def frozen(losses):
        model = build(losses)
        model.image.load_state_dict(tower)
        model.image.requires_grad_(False)
        return model

    batches = []

    def watched(model, batch_at, settings, **options):
        batches.append(batch_at(0))
        return fit(model, batch_at, settings, **options)

    monkeypatch.setattr(capfilt, "fit", watched)
    short = dataclasses.replace(SETTINGS, steps=2)
    model = pipeline(data, tokenizer, tmp_path, build=frozen, pretrain=short, finetune=short).final()
    assert len(batches) == 4 and all(batch.images is None for batch in batches)
    assert {batch.image_tokens.shape for batch in batches} == {(4, 17, 32)}
    assert all(torch.equal(weight, tower[name]) for name, weight in model.image.state_dict().items())


# ------------------------------------------------------------------------------------------------- other data, scorers


def test_photos_and_another_scorer(tokenizer, tmp_path):
    photos = Photos()
    noisy = NoisyCaptions(photos, 0.5, kinds=("swapped", "junk"))
    short = dataclasses.replace(SETTINGS, steps=1)
    changes = dict(pretrain=short, finetune=short, scorer=by_cosine, threshold=0.0, decoding=DecodingConfig(beams=2))
    run = pipeline((noisy, photos), tokenizer, tmp_path, **changes)
    assert run.final() is not None
    scores = [line["score"] for line in run.table()]
    assert min(scores) >= -1 and max(scores) <= 1


def test_an_oracle_as_scorer_leaves_no_false_caption(data, tokenizer, tmp_path, monkeypatch):
    noisy, _ = data
    texts_seen = {}

    def oracle(model, images, image_rows, text):
        true = [noisy.true_captions(row) for row in range(20)]
        captions = [caption.strip() for caption in tokenizer.batch_decode(text.ids, skip_special_tokens=True)]
        return torch.tensor([float(c in true[row]) for row, c in zip(image_rows.tolist(), captions, strict=True)])

    def watched(model, batch_at, settings, run_dir, **more):
        texts_seen[run_dir.name] = batch_at.__self__.dataset
        return fit(model, batch_at, settings, run_dir=run_dir, **more)

    monkeypatch.setattr(capfilt, "fit", watched)
    pipeline(data, tokenizer, tmp_path, scorer=oracle).final()
    chosen = texts_seen["final"]
    assert len(chosen) == 10 + 8  # the synthetic captions of an untrained model are all false
    assert sorted(chosen.captions(i) for i in range(10)) == sorted(
        noisy.captions(row) for row in range(20) if noisy.is_clean(row)
    )


def test_a_caption_that_is_generated_again_counts_once(data, tokenizer, tmp_path, monkeypatch):
    noisy, _ = data
    datasets = {}

    def watched(model, batch_at, settings, run_dir, **more):
        datasets[run_dir.name] = batch_at.__self__.dataset
        return fit(model, batch_at, settings, run_dir=run_dir, **more)

    monkeypatch.setattr(capfilt, "fit", watched)
    generated = [{"row": row, "caption": noisy.captions(row)[0] if row % 2 else ""} for row in range(20)]
    (tmp_path / "synthetic.jsonl").write_text("".join(json.dumps(line) + "\n" for line in generated))
    pipeline(data, tokenizer, tmp_path, scorer=keep_all).final()
    assert [datasets["final"].captions(row) for row in range(20)] == [noisy.captions(row) for row in range(20)]


def keep_all(model, images, image_rows, text):
    return torch.ones(len(image_rows))


# --------------------------------------------------------------------------------------------- recaptioned images


def test_recaptioned_images_are_a_dataset(data):
    noisy, clean = data
    mixed = Recaptioned(noisy, {3: ["a dog", "two dogs"], 1: [], 0: ["a cat"]}, clean)
    assert len(mixed) == 2 + 8
    assert mixed.captions(0) == ["a cat"] and mixed.captions(1) == ["a dog", "two dogs"]
    assert mixed.captions(2) == clean.captions(0) and mixed[2].captions == clean.captions(0)
    assert mixed[1].captions == ["a dog", "two dogs"] and np.array_equal(mixed[1].image, noisy[3].image)
    ids = [mixed.image_id(row) for row in range(len(mixed))]
    assert len(set(ids)) == len(ids)  # though the two datasets number their images alike
    images = mixed.pixels([9, 1, 0, 2], 32)
    assert np.array_equal(images[[0, 3]], clean.pixels([7, 0], 32))
    assert np.array_equal(images[[1, 2]], noisy.pixels([3, 0], 32))
    assert mixed.pixels([], 32).shape == (0, 32, 32, 3)
    assert all(region.kind != "image" for row in range(len(mixed)) for region in mixed.regions(row))
    with pytest.raises(IndexError):
        mixed.captions(10)


def test_the_ablation_has_one_source_alone_and_everything_unfiltered(data, tokenizer, tmp_path, monkeypatch):
    noisy, _ = data
    run = pipeline(data, tokenizer, tmp_path)
    lines = [
        {"row": row, "source": source, "caption": f"a {source} dog", "score": 0.9, "kept": row < 5}
        for row in range(len(noisy))
        for source in ("web", "synthetic")
    ]
    monkeypatch.setattr(run, "table", lambda: lines)
    seen = {}
    monkeypatch.setattr(run, "_train", lambda name, losses, dataset, settings: seen.update({name: dataset}))
    run.final(), run.final(("web",)), run.final(("web", "synthetic"), filtered=False)
    both = {"a web dog", "a synthetic dog"}
    for name, texts, rows in (
        ("final", both, 5),
        ("final-web", {"a web dog"}, 5),
        ("final-web-synthetic-unfiltered", both, len(noisy)),
    ):
        assert {text for row in range(rows) for text in seen[name].captions(row)} == texts
        assert len(seen[name]) == rows + len(data[1])
