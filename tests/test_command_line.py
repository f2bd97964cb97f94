"""The command line: what it prints, what it leaves behind, and how it refuses."""

import json

import pytest
from PIL import Image

from minivlp.__main__ import main
from minivlp.evaluation import matching
from minivlp.training import recipes
from minivlp.training.recipes import Recipe


@pytest.fixture
def tiny(monkeypatch):
    """The command's own way, with a run of a few steps."""
    for model in ("clip", "xvlm"):
        regions = 2 if model == "xvlm" else 0
        small = Recipe("nano", 60, 64, (1, 2), 8, 3, regions_per_image=regions)
        monkeypatch.setitem(recipes.RECIPES[model], "laptop", small)
    monkeypatch.delenv("MINIVLP_PROFILE", raising=False)
    monkeypatch.setattr("minivlp.__main__.EVALUATION_SCENES", 40)


@pytest.fixture
def flickr(tmp_path):
    folder = tmp_path / "flickr8k"
    (folder / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    for n in range(12):
        Image.new("RGB", (40 + n, 50), (20 * n, 100, 255 - 20 * n)).save(folder / "Images" / f"{n}.jpg")
        lines += [f'{n}.jpg,"Picture {n}, plain."', f"{n}.jpg,A colour numbered {n}."]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_info_lists_every_model_with_its_size(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "clip" in printed and "151 M" in printed and "xvlm" in printed and "216 M" in printed
    assert printed.count("transformers") == 3 and "open_clip" in printed and printed.count("authors'") == 5


@pytest.mark.parametrize("model", ["clip", "xvlm"])
def test_train_leaves_a_model_that_evaluate_reads(model, tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", model, "--out", str(out)]) == 0
    first = capsys.readouterr().out
    assert "R@1" in first and "counterfactual: object" in first
    assert ("Acc@0.5" in first) == (model == "xvlm")
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert main(["evaluate", model, "--weights", str(out / "model.safetensors")]) == 0
    assert "R@1" in capsys.readouterr().out


def test_a_chinese_run_is_measured_in_chinese_and_not_taken_for_another(tiny, flickr, tmp_path, monkeypatch, capsys):
    asked, out = [], ["--out", str(tmp_path / "run")]
    plain = matching.counterfactual
    monkeypatch.setattr(matching, "counterfactual", lambda *a, **k: asked.append(k["language"]) or plain(*a, **k))
    assert main(["train", "clip", "--language", "zh", *out]) == 0
    assert asked == ["zh"]
    assert main(["train", "clip", "--data", f"flickr:{flickr}", *out]) == 1
    assert "holds a run with --data scenes, --language zh" in capsys.readouterr().err


def test_the_photos_are_not_measured_on_themselves(tiny, tmp_path, capsys):
    assert main(["train", "clip", "--data", "photos", "--out", str(tmp_path / "run")]) == 0
    assert "not measured" in capsys.readouterr().out


def test_a_number_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["train", "clip", "--steps", "0"])
    assert "whole number" in capsys.readouterr().err


def test_train_on_a_real_folder_by_changing_one_argument(tiny, flickr, tmp_path, capsys):
    assert main(["train", "clip", "--data", f"flickr:{flickr}", "--out", str(tmp_path / "run")]) == 0
    assert "R@1" in capsys.readouterr().out


def test_data_describes_a_folder_and_draws_it(flickr, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["data", f"flickr:{flickr}", "--sheet", str(sheet)]) == 0
    assert "12 images, 24 captions" in capsys.readouterr().out and Image.open(sheet).width > 300


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["data", "flickr:/nowhere/at/all"], "/nowhere/at/all"),
        (["evaluate", "clip", "--weights", "/nowhere.safetensors"], "no such checkpoint"),
    ],
)
def test_faults_are_told_in_one_line_without_a_traceback(arguments, said, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("minivlp: ") and said in error and "Traceback" not in error
