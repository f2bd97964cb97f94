"""The tables of experiments and the bundled checkpoints: every variant builds and trains, recorded runs are kept."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from functools import cache

import pytest
import ship
import tables.capfilt
import tables.questions
import tables.running
from tables import TABLES
from tables.measures import captioning, fusion
from tables.variants import Table, Trained, Variant

from minivlp.data.questions import answers_of
from minivlp.data.scenes import Scenes
from minivlp.evaluation import score as score_module
from minivlp.evaluation.records import RECORDS, load_runs, save_record
from minivlp.evaluation.score import Score
from minivlp.papers import PAPERS

TINY = {"scenes": 40, "batch_size": 4, "steps": 2}
VARIANTS = {f"{name}, {label}": (name, v) for name, table in TABLES.items() for label, v in table.variants.items()}
MEASURED = {  # one of each kind
    "clip_temperature, fixed at 1",
    "xvlm_ablation, no objects",
    "xvlm_probe, CLIP",
    "albef_ablation, + momentum model on MLM",
    "albef_noise, 40% noise, momentum model",
    "vilt_words, single pieces",
    "vlmo_stages, images, then texts",
    "vlmo_frozen, images, attention of texts",
    "vlmo_frozen, texts, attention of images",
    "blip_sharing, nothing",
    "blip_filter, beam",
    "blip_capfilt, captioner only",
    "blip_capfilt, both, cosine filter",
    "answers, BLIP",
    "answers, ViLT",
    "entailment, ViLT",
    "clip_negatives, blocks of 16",
    "family, CLIP, towers, negative captions",
    "family, BLIP, clip, negative captions",
    "family, X-VLM, clip",
}


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """No run or record outside of this test, a short list of answers, and rough intervals."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(score_module, "RESAMPLES", 10)
    scenes = Scenes(40, "train", 0)
    monkeypatch.setattr(tables.questions, "known_answers", lambda: answers_of(scenes))
    for module in (tables.running, tables.capfilt):
        monkeypatch.setattr(module, "RECORDS", tmp_path / "records")
    return tmp_path


@cache
def tokenizer_of(kind: type[Variant]):
    return kind("vilt").tokenizer()


def tiny(variant: Variant) -> Variant:
    return dataclasses.replace(variant, recipe=variant.recipe | TINY)


def test_every_measured_kind_is_a_variant():
    assert MEASURED <= VARIANTS.keys()
    kinds = {type(variant) for _, variant in VARIANTS.values()}
    assert kinds == {type(VARIANTS[name][1]) for name in MEASURED} | {Variant}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_builds_with_its_choices(name, small_world):
    variant = VARIANTS[name][1]
    recipe = variant.full_recipe()
    config = variant.build(recipe, tokenizer_of(type(variant))).config
    for key, value in variant.config.items():
        found = getattr(config, key)
        if isinstance(value, Mapping):  # fields of a nested config
            assert {name: getattr(found, name) for name in value} == value
        else:
            assert type(found) is type(value) if key == "masking" else found == value  # the recipe sets what it masks
    for key, value in variant.recipe.items():
        assert getattr(recipe, key) == (value | variant.config if key == "config" else value)


@pytest.mark.parametrize("name", sorted(MEASURED))
def test_two_training_steps_and_the_measure(name, small_world):
    table, variant = TABLES[VARIANTS[name][0]], tiny(VARIANTS[name][1])
    tokenizer = tokenizer_of(type(variant))
    model, seconds, recipe = variant.train(1, tokenizer)
    assert recipe.steps == 2 and seconds > 0
    if name == "blip_filter, beam":  # an untrained captioner generates nothing that could be kept
        assert len(model.table()) > 40 and (small_world / "runs" / "capfilt-1-beam" / "captions.jsonl").exists()
        return
    scores = table.measure(model, Scenes(10, "test", 7), tokenizer)
    assert scores and all(isinstance(score, Score) for score in scores.values())
    name, label = name.split(", ", 1)
    recorded = [run["scores"] for run in runs_of(name) if run["variant"] == label]
    assert all(scores.keys() <= run.keys() for run in recorded)  # few test scenes do not have all kinds of questions


def runs_of(name: str) -> list:
    """The recorded runs of a table, none if it is not recorded yet."""
    return load_runs(name) if (RECORDS / f"{name}.json").exists() else []


def test_what_is_recorded_is_what_the_table_measures():
    """Records were made by variants and measures that are still there under these names; runs may be missing still."""
    for name, table in TABLES.items():
        if not (runs := runs_of(name)):
            continue
        record = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
        assert record["command"] == f"python tools/experiments.py {name}"
        assert {(run["variant"], run["seed"]) for run in runs} <= {(v, s) for v in table.variants for s in table.seeds}
        for run in runs:
            assert run["steps"] == table.variants[run["variant"]].full_recipe().steps
            if table.measure in (fusion, captioning):
                assert {"counterfactual: color", "counterfactual: mean"} <= run["scores"].keys()


# ---------------------------------------------------------------------------------------------------------- the script


@dataclasses.dataclass(frozen=True)
class Counted(Variant):
    """Counts what is trained."""

    def train(self, seed, tokenizer):
        calls.append((self.model, seed))
        return Trained(None, 1.4, self.full_recipe())


calls: list = []


def test_recorded_runs_are_kept_and_each_new_one_is_recorded(small_world, monkeypatch, capsys):
    score = Score(0.5, 0.4, 0.6, 0.1, 10)
    table = Table("a test", {"a": Counted("clip"), "b": Counted("vilt")}, lambda *_: {"R@1": score}, seeds=(0, 1))
    folder = tables.running.RECORDS
    monkeypatch.setattr(tables.running, "save_record", lambda *run: save_record(*run, folder))
    monkeypatch.setattr(tables.running, "load_runs", lambda name: load_runs(name, folder))
    calls.clear()
    tables.running.run("t", table, only="b", seeds=(1,))
    assert calls == [("vilt", 1)]
    calls.clear()
    tables.running.run("t", table)
    assert calls == [("clip", 0), ("vilt", 0), ("clip", 1)]  # all variants of a seed before those of the next
    calls.clear()
    record = json.loads((folder / "t.json").read_text(encoding="utf-8"))
    del record["runs"][2]
    (folder / "t.json").write_text(json.dumps(record), encoding="utf-8")
    tables.running.run("t", table)
    assert calls == [("vilt", 0)]
    runs = load_runs("t", folder)
    assert [(run["variant"], run["seed"]) for run in runs] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert runs[2]["steps"] == PAPERS["vilt"].recipe("laptop").steps and runs[2]["seconds"] == 1
    assert "t: b, seed 0" in capsys.readouterr().out


def test_the_list_names_every_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments.py", "--list"])
    with pytest.raises(SystemExit) as end:
        tables.running.main("about")
    assert end.value.code == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(TABLES)


# ------------------------------------------------------------------------------------------------ bundled checkpoints


@pytest.mark.parametrize("name", ["xvlm_nano", "albef_nano"])
def test_a_bundled_checkpoint_is_trained_and_described(name, small_world, monkeypatch):
    monkeypatch.setattr(ship, "CHECKPOINTS", small_world)
    monkeypatch.setattr(ship, "TEST_SCENES", 10)
    bundled = ship.BUNDLED[name]
    monkeypatch.setitem(ship.BUNDLED, name, dataclasses.replace(bundled, variant=tiny(bundled.variant)))
    ship.ship(name)
    card = (small_world / f"{name}.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {name}\n") and f"`python tools/ship.py {name}`: 2 steps of 4 images" in card
    assert "trained from `towers_nano`" in card and "| image to text R@1 |" in card and " \n" not in card
    assert len((small_world / f"{name}.log.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_the_image_tower_is_trained_and_described(small_world, monkeypatch):
    monkeypatch.setattr(ship, "CHECKPOINTS", small_world)
    monkeypatch.setattr(ship, "SCENES", 70)
    monkeypatch.setattr(ship, "Settings", lambda steps, **options: ship_settings(2, **options))
    ship.ship_image()
    card = (small_world / "image_nano.md").read_text(encoding="utf-8")
    assert "2 steps of 64 images" in card and "noun right 0." in card


def test_the_start_of_single_streams_is_trained_and_described(small_world, monkeypatch):
    monkeypatch.setattr(ship, "CHECKPOINTS", small_world)
    monkeypatch.setattr(ship, "SCENES", 70)
    monkeypatch.setattr(ship, "TEST_SCENES", 40)
    monkeypatch.setattr(ship, "JOINT", ship.JOINT | {"steps": 2, "batch_size": 4})
    ship.ship_joint()
    card = (small_world / "joint_nano.md").read_text(encoding="utf-8")
    assert "2 steps of 4 images" in card and "| masked relation word |" in card and "in 75%" in card.replace("\n", " ")


def ship_settings(steps, **options):
    from minivlp.training.loop import Settings

    return Settings(steps, warmup=1, **options)


def test_every_bundled_checkpoint_is_one_that_ship_makes():
    files = {path.stem for path in ship.CHECKPOINTS.glob("*.safetensors")}
    assert files == {*ship.BUNDLED, *ship.OTHERS, "clip_nano"}
