"""The command line: what it prints, what it leaves behind, and what it refuses."""

import json

import pytest
import torch
from PIL import Image
from transformers import BertTokenizerFast

from minivlp.__main__ import main
from minivlp.evaluation import suite
from minivlp.objectives.masking import IGNORE, TokenMasking, WordMasking
from minivlp.training import loop, recipes
from minivlp.training.recipes import Recipe


@pytest.fixture
def tiny(monkeypatch):
    """A run takes a few steps."""
    for dict_of, regions in ((recipes.CLIP, 0), (recipes.XVLM, 2)):
        monkeypatch.setitem(dict_of, "laptop", Recipe("nano", 60, 64, (1, 2), 8, 3, regions_per_image=regions))
    monkeypatch.delenv("MINIVLP_PROFILE", raising=False)
    monkeypatch.setattr("minivlp.commands.EVALUATION_SCENES", 40)


@pytest.fixture
def flickr(tmp_path):
    folder = tmp_path / "flickr8k"
    (folder / "Images").mkdir(parents=True)
    lines = ["image,caption"]
    for n in range(12):
        Image.new("RGB", (40 + n, 50), (20 * n, 100, 255 - 20 * n)).save(folder / "Images" / f"{n}.jpg")
        lines += [f'{n}.jpg,"Picture {n}, plain."', f"{n}.jpg,A color numbered {n}."]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_info_lists_every_model_with_its_size(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "clip" in printed and "151 M" in printed and "xvlm" in printed and "216 M" in printed
    assert printed.count("transformers") == 4 and "open_clip" in printed and printed.count("authors'") == 6


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


def test_a_chinese_run_is_measured_in_chinese(tiny, tmp_path, monkeypatch):
    asked, plain = [], suite.counterfactual
    monkeypatch.setattr(suite, "counterfactual", lambda *a, **k: asked.append(k["language"]) or plain(*a, **k))
    assert main(["train", "clip", "--language", "zh", "--out", str(tmp_path / "run")]) == 0
    assert asked == ["zh"]


@pytest.mark.parametrize(
    "other, named",
    [
        (["--language", "zh"], "names, captions or boxes of --data: there"),
        (["--seed", "1"], "--seed: there 0, now 1"),
        (["--batch", "4"], "--batch: there 8, now 4"),
        (["--steps", "5"], "(--steps: there 3, now 5)"),
        (["--frozen"], "(--frozen: there false, now true)"),
    ],
)
def test_a_folder_holds_one_run_only(other, named, tiny, tmp_path, capsys):
    same = ["train", "clip", "--out", str(tmp_path / "run")]
    assert main(same) == 0
    rows = (tmp_path / "run" / "log.jsonl").read_text()
    assert main(same) == 0, "the same command finds itself at its end"
    capsys.readouterr()
    assert main([*same, *other]) == 1
    error = capsys.readouterr().err
    assert "holds another run" in error and named in error
    assert (tmp_path / "run" / "log.jsonl").read_text() == rows


def test_the_photos_are_not_measured_on_themselves(tiny, tmp_path, capsys):
    assert main(["train", "clip", "--data", "photos", "--out", str(tmp_path / "run")]) == 0
    assert "not measured" in capsys.readouterr().out


def test_a_number_of_nothing_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["train", "clip", "--steps", "0"])
    assert "whole number" in capsys.readouterr().err


def test_train_on_a_real_folder_by_changing_one_argument(tiny, flickr, tmp_path, capsys):
    out = ["--steps", "3", "--out", str(tmp_path / "run")]
    assert main(["train", "clip", "--data", f"flickr:{flickr}", *out]) == 0
    assert "R@1" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ what is masked, and where


@pytest.fixture
def begun(monkeypatch):
    """Model and batches of runs that stop before their first step."""
    runs = []

    def fit(model, batch_at, settings, **options):
        runs.append((model, batch_at))
        return loop.History(interrupted=True)

    monkeypatch.setattr(loop, "fit", fit)
    return runs


@pytest.fixture
def bert(tmp_path):
    """A folder with a tokenizer that has BERT's special tokens at BERT's ids, and knows hardly any whole word."""
    words = ["[PAD]", *(f"[unused{n}]" for n in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "picture"]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,."
    (tmp_path / "vocab.txt").write_text("\n".join([*words, *letters, *(f"##{c}" for c in letters)]), encoding="utf-8")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize("model", ["vilt", "vlmo"])
def test_train_masks_whole_words(model, begun, flickr, bert, tmp_path):
    """All pieces of a word or none, by the tokenizer in use."""
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", model, "--data", f"flickr:{flickr}", "--tokenizer", str(bert), *out]) == 130
    (trained, batch_at), split = begun[0], 0
    torch.manual_seed(0)
    for step in range(20):
        encoded = trained.encode(batch_at(step % 1))
        word, masked = encoded.batch.text.word, encoded.masked.labels != IGNORE
        for row in range(len(word)):
            for number in range(int(word[row].max()) + 1):
                of_word = masked[row, word[row] == number]
                assert of_word.all() or not of_word.any()
                split += len(of_word) > 1 and bool(of_word.all())
    assert split > 5, "words of several pieces were among the masked ones"


@pytest.mark.parametrize(
    "model, masking",
    [("albef", TokenMasking(never_mask=(0, 1))), ("vilt", WordMasking()), ("vlmo", WordMasking())],
)
def test_a_real_folder_is_masked_as_in_the_paper(model, masking, begun, flickr, bert, tmp_path):
    """Four tenths of the content words are masked in scenes only, whose captions are short."""
    data = ["--data", f"flickr:{flickr}"]
    for number, arguments in enumerate((data, [*data, "--tokenizer", str(bert)], [])):
        assert main(["train", model, *arguments, "--out", str(tmp_path / f"run{number}")]) == 130
    (plain, _), (other, _), (scenes, _) = begun
    assert plain.config.masking == masking and masking.rate == 0.15
    never = {0, 101} if model == "albef" else {0, 100, 101, 102, 103, *other_special(bert)}
    assert type(other.config.masking) is type(masking) and other.config.masking.rate == 0.15
    assert other.config.masking.mask_id == 103 and set(other.config.masking.never_mask) == never
    assert scenes.config.masking.rate == 0.4 and len(scenes.config.masking.never_mask) == 24


def other_special(folder):
    """The ids that [DEC] and [ENC] get: they are added behind the vocabulary."""
    size = len(BertTokenizerFast.from_pretrained(folder))
    return size, size + 1


# ---------------------------------------------------------------------------------------------------------- the others


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
def test_errors_are_one_line_without_a_traceback(arguments, said, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("minivlp: ") and said in error and "Traceback" not in error
