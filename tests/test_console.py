"""The command line at the terminal: any encoding, signals, and one line that names file, option and remedy."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from minivlp import commands, option_words
from minivlp.__main__ import main
from minivlp.console import REMEDIES, did_you_mean, explained
from minivlp.data.folders import DataError
from minivlp.data.text import load_tokenizer
from minivlp.data.tokenizer_training import train_tokenizer
from minivlp.errors import NotFinite, UserError
from minivlp.evaluation import suite
from minivlp.evaluation.score import Scores
from minivlp.training import checkpoint, loop, recipes
from minivlp.training.checkpoint import save_tensors
from minivlp.training.recipes import Recipe
from minivlp.training.tokenizer_of_run import tokenizer_fingerprint

ROOT = Path(__file__).resolve().parents[1]


def folder_of(path: Path, rows: list[dict]) -> Path:
    """A folder with a picture for each row of `captions.jsonl`."""
    path.mkdir(exist_ok=True)
    for number, row in enumerate(rows):
        row.setdefault("file", f"{number}.png")
        Image.new("RGB", (20, 16), (8 * number, 90, 20)).save(path / row["file"])
    (path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pictures(tmp_path):
    """24 pictures with captions, in a folder that does not say its splits."""
    return folder_of(tmp_path / "pictures", [{"caption": f"picture number {n}"} for n in range(24)])


@pytest.fixture
def tiny(monkeypatch):
    """A run takes two steps, and nothing is measured: `measured` has what would be."""
    measured = []
    for profile in ("quick", "laptop"):
        monkeypatch.setitem(recipes.CLIP, profile, Recipe("nano", 16, 64, (1, 2), 8, 2))
    monkeypatch.setattr(suite, "measure", lambda *given: measured.append(given) or Scores())
    monkeypatch.setattr(commands, "browse", lambda *_: None)
    monkeypatch.delenv("MINIVLP_PROFILE", raising=False)
    return measured


def refused(arguments, capsys) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("minivlp: ") and "Traceback" not in error
    return error.removeprefix("minivlp: ")


# ------------------------------------------------------------------------------------ a run knows its tokenizer


@pytest.fixture
def trained(tiny, pictures, tmp_path):
    """A run whose tokenizer is not ours: its folder, and the arguments that made it."""
    words = [f"picture number {n}" for n in range(24)]
    train_tokenizer(words, size=400).save_pretrained(tmp_path / "words")
    same = ["train", "clip", "--data", f"folder:{pictures}", "--steps", "2", "--batch", "8"]
    same += ["--out", str(tmp_path / "run")]
    assert main([*same, "--tokenizer", str(tmp_path / "words")]) == 0
    return tmp_path / "run", same


def test_the_tokenizer_of_a_run_need_not_be_named_again(trained, tiny, pictures, tmp_path, capsys):
    """Not to measure, not to resume, not to start from; and a checkpoint moved alone is refused."""
    run, same = trained
    weights, data = run / "model.safetensors", f"folder:{pictures}"
    wanted = tokenizer_fingerprint(tiny[-1][2])
    assert tokenizer_fingerprint(load_tokenizer()) != wanted
    capsys.readouterr()
    for arguments in (
        ["evaluate", "clip", "--weights", str(weights), "--data", data],
        same,
        [*same[:-1], str(tmp_path / "next"), "--start", str(weights)],
    ):
        assert main(arguments) == 0
        assert tokenizer_fingerprint(tiny[-1][2]) == wanted
    assert "the weights were trained on these very data" in capsys.readouterr().out
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    for arguments in (
        ["evaluate", "clip", "--weights", moved, "--data", data],
        [*same[:-1], tmp_path / "third", "--start", moved],
    ):
        said = refused(arguments, capsys)
        assert "moved.safetensors was trained with another tokenizer" in said and "--tokenizer FOLDER" in said
    assert (
        main(["evaluate", "clip", "--weights", str(moved), "--data", data, "--tokenizer", str(tmp_path / "words")]) == 0
    )


def test_what_the_weights_were_trained_on_is_said(trained, pictures, tmp_path, capsys):
    run, same = trained
    evaluate = ["evaluate", "clip", "--weights", str(run / "model.safetensors"), "--data"]
    others = folder_of(tmp_path / "others", [{"caption": f"another {n}"} for n in range(12)])
    for arguments, line in (
        ([f"folder:{pictures}", "--split", "train"], "on these very data"),
        ([f"folder:{pictures}"], "trained on Folder("),
        ([f"folder:{others}", "--split", "all"], "trained on other data: Folder("),
    ):
        capsys.readouterr()
        assert main([*evaluate, *arguments]) == 0
        assert line in capsys.readouterr().out
    captions = pictures / "captions.jsonl"
    captions.write_text(captions.read_text().replace("number", "no."), encoding="utf-8")
    capsys.readouterr()
    assert main([*evaluate, f"folder:{pictures}", "--split", "train"]) == 0
    assert "trained on other data: Folder(" in capsys.readouterr().out, "the folder has changed"
    assert "names, captions or boxes of --data: there" in refused(same, capsys)


def test_the_identity_is_checked_before_the_frozen_tower_runs(trained, capsys, tmp_path, monkeypatch):
    run, same = trained
    monkeypatch.setattr(Recipe, "batches", lambda *_, **__: pytest.fail("the tower was run"))
    assert "--frozen: there false, now true" in refused([*same, "--frozen"], capsys)
    assert not (tmp_path / "features").exists()


def test_more_steps_of_a_finished_run_are_a_new_run(trained, capsys, tmp_path):
    run, same = trained
    longer = [*same[:5], "3", *same[6:]]
    assert longer[4:6] == ["--steps", "3"]
    said = refused(longer, capsys)
    assert "(--steps: there 2, now 3)" in said and f"--start {run / 'model.safetensors'} --out {run}-more" in said
    assert main([*longer[:-1], f"{run}-more", "--start", str(run / "model.safetensors")]) == 0, "the advice works"
    (run / "model.safetensors").unlink()
    assert "finish this one with --steps 2, then" in refused(longer, capsys)


# ------------------------------------------------------------------------------------------------------------- splits


def split_folder(path, *splits):
    return folder_of(path, [{"caption": f"a thing {n}", "split": split} for n, split in enumerate(splits)])


@pytest.mark.parametrize(
    "splits, option, used",
    [
        (("train", "val", "val"), [], 2),
        (("train", "val", "test", "test", "test"), [], 3),
        (("train", "val", "val"), ["--split", "val"], 2),
        (("train", "dev", "val"), ["--split", "dev"], 2),
        (("train", "val", "test"), ["--split", "all"], 3),
    ],
)
def test_evaluate_uses_test_or_else_validation(splits, option, used, tiny, tmp_path, capsys):
    data = f"folder:{split_folder(tmp_path / 'data', *splits)}"
    assert main(["evaluate", "clip", "--data", data, *option]) == 0
    assert len(tiny[0][1]) == used
    assert ("has no test split: using validation" in capsys.readouterr().out) == ("test" not in splits and not option)


def test_coco_as_the_help_says_it(tiny, tmp_path, capsys):
    """COCO has no captions of its test pictures."""
    (tmp_path / "annotations").mkdir()
    for number, split in enumerate(("train2017", "val2017")):
        name = f"{number}.jpg"
        Image.new("RGB", (20, 16)).save(tmp_path / name)
        held = {
            "images": [{"id": number, "file_name": name}],
            "annotations": [{"id": number, "image_id": number, "caption": "a cat"}],
        }
        (tmp_path / "annotations" / f"captions_{split}.json").write_text(json.dumps(held), encoding="utf-8")
    assert main(["evaluate", "clip", "--data", f"coco:{tmp_path}"]) == 0
    assert len(tiny[0][1]) == 1 and tiny[0][1].image_id(0) == 1
    said = refused(["evaluate", "clip", "--data", f"coco:{tmp_path}", "--split", "test"], capsys)
    assert "no image in split 'test'" in said and "Or take all: --split all." in said and "None" not in said


def test_a_damaged_test_split_is_not_replaced(tiny, tmp_path, capsys):
    folder = split_folder(tmp_path / "data", "train", "val", "test")
    (folder / "2.png").unlink()
    said = refused(["evaluate", "clip", "--data", f"folder:{folder}"], capsys)
    assert "missing image" in said and "with --skip-errors" in said and "on_error" not in said and not tiny


def test_advice_that_a_command_does_not_have_is_left_out(tiny, tmp_path, capsys):
    folder = split_folder(tmp_path / "data", "val", "test")
    said = refused(["train", "clip", "--data", f"folder:{folder}", "--out", tmp_path / "run"], capsys)
    assert said.endswith("There are: validation, test.")


# ------------------------------------------------------------------------------------------------------- one line each


def test_a_file_in_place_of_the_runs_folder(tiny, pictures, tmp_path, capsys):
    (tmp_path / "afile").write_text("text")
    for out in (tmp_path / "afile", tmp_path / "afile" / "run"):
        said = refused(["train", "clip", "--data", f"folder:{pictures}", "--out", out], capsys)
        assert said.startswith(f"{out} (--out): a file stands where a folder is needed: choose another")
    assert (tmp_path / "afile").read_text() == "text"


@pytest.mark.parametrize(
    "number, says", [(errno.ENOSPC, "disk is full"), (errno.EROFS, "can only be read"), (errno.EDQUOT, "quota")]
)
def test_a_state_that_cannot_be_written(number, says, tiny, pictures, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise checkpoint.SafetensorError(f"Error while serializing: I/O error: refused (os error {number})")

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    out = tmp_path / "run"
    said = refused(["train", "clip", "--data", f"folder:{pictures}", "--steps", "2", "--out", out], capsys)
    assert said.startswith(f"{out / 'state.safetensors'} (--out): ") and says in said
    assert not list(out.glob("*.part"))


def test_paths_that_do_not_fit(tiny, pictures, tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"half")
    data = ["--data", f"folder:{pictures}"]
    for arguments, *parts in (
        (["data", f"folder:{pictures}", "--sheet", tmp_path / "no" / "x.png"], "no/x.png (--sheet)", "check the path"),
        (["data", f"folder:{pictures}", "--sheet", tmp_path], "(--sheet)", "a folder stands where a file is needed"),
        (["evaluate", "clip", *data, "--weights", tmp_path], "did you mean", "model.safetensors?"),
        (["evaluate", "clip", *data, "--weights", tmp_path / "modle.safetensors"], "did you mean", "/model.safet"),
        (["evaluate", "clip", *data, "--weights", tmp_path / "model.safetensors"], "copy it again"),
        (["evaluate", "clip", *data, "--tokenizer", "nobody/nothing"], "nobody/nothing", "save_pretrained"),
        (["evaluate", "clip", *data, "--tokenizer", pictures], f"no tokenizer in {pictures}"),
        (["train", "clip", *data, "--start", pictures / "x.safetensors"], "no such checkpoint"),
        (["train", "clip", "--tower-weights", "FILE"], "Name it with --tower."),
        (["train", "vilt", "--frozen"], "Leave out --frozen."),
        (["data", tmp_path / "nowhere"], "no such folder"),
    ):
        said = refused(arguments, capsys)
        assert all(part in said for part in parts), said


def test_too_many_open_files_are_not_broken_pictures(pictures, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files", "0.png")

    monkeypatch.setattr(Image, "open", refuse)
    said = refused(["data", f"folder:{pictures}", "--skip-errors"], capsys)
    assert "too many files are open" in said and "ulimit" in said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"),
    ],
)
def test_memory_that_runs_out_says_what_needs_less(error, tiny, tmp_path, capsys, monkeypatch):
    def fit(*_, **__):
        raise error

    monkeypatch.setattr(loop, "fit", fit)
    said = refused(["train", "clip", "--out", tmp_path / "run"], capsys)
    assert said == "not enough memory: try a smaller --batch or --subset"


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("minivlp.__main__.info", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        main(["info"])


@pytest.mark.parametrize("number", sorted(REMEDIES))
def test_every_error_of_the_system_names_file_option_and_remedy(number):
    options = {"out": Path("runs/mine"), "data": "coco:/pictures", "seed": 0, "run": main}
    said = explained(OSError(number, os.strerror(number), "runs/mine/log.jsonl"), options, {})
    assert said == f"runs/mine/log.jsonl (--out): {REMEDIES[number]}"
    said = explained(OSError(number, os.strerror(number), b"/pictures/1.jpg"), options, {})
    assert said == f"/pictures/1.jpg (--data): {REMEDIES[number]}"
    assert explained(OSError(number, "Refused"), {}, {}) == f"Refused: {REMEDIES[number]}"


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError("a sentence\n of a library"), "a sentence of a library"),
        (OSError(9999, "Odd", "x"), "x: Odd"),
        (ModuleNotFoundError("No module named 'timm.data'", name="timm.data"), "`pip install timm`"),
        (
            NotFinite("not finite at step 3.", "Lower the learning rate: {}.", "Settings.lr"),
            "Lower the learning rate: --lr.",
        ),
        (DataError("no.", "Or take all: {}.", "split=None"), "no. Or take all: --split all."),
        (UserError("no."), "no."),
        (ValueError("plain"), "plain"),
    ],
)
def test_errors_in_the_words_of_the_command_line(error, said):
    assert explained(error, {}, option_words.OPTIONS).endswith(said)


def test_ours_that_cannot_be_imported_is_a_fault_of_ours():
    assert explained(ImportError("cannot import name 'x'", name="minivlp.data"), {}, {}) is None
    assert explained(KeyError("x"), {}, {}) is None and explained(TypeError("x"), {}, {}) is None


def test_every_advice_has_an_option():
    """Whatever argument an error of ours names in Python has a word here."""
    used = set()
    for file in (ROOT / "minivlp").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = getattr(getattr(node, "func", None), "id", getattr(getattr(node, "func", None), "attr", ""))
            if name.endswith(("Error", "NotFinite", "__init__")) and len(getattr(node, "args", ())) == 3:
                fixed = [] if isinstance(node.args[2], ast.JoinedStr) else ast.walk(node.args[2])
                used |= {part.value for part in fixed if isinstance(part, ast.Constant)}

    assert {"split=None", "language", "tower", "Settings.lr", "image_tokens"} <= used
    assert {word for word in used if isinstance(word, str)} <= set(option_words.OPTIONS)


# ----------------------------------------------------------------------------------------------------------- near names


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["trian", "clip"], "did you mean train?"),
        (["train", "clp"], "did you mean clip?"),
        (["train", "X-VLM"], "did you mean xvlm?"),
        (["evaluate", "CLIP"], "did you mean clip?"),
        (["train", "something"], "'something' is none of albef, blip, clip"),
        (["train", "clip", "--tokeniser", "x"], "there is no option --tokeniser; did you mean --tokenizer?"),
        (["data", "scenes", "--split", "tets"], "did you mean test?"),
        (["data", "scenes", "--language", "cn"], "'cn' is none of en, zh"),
        (["train", "clip", "--lr", "-1"], "'-1' is not a positive number"),
        (["train", "clip", "--lr", "nan"], "'nan' is not a positive number"),
    ],
)
def test_a_word_that_is_unknown_is_answered_with_the_nearest(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "spec, meant",
    [("cocco:~/x", "coco:~/x"), ("flick:x", "flickr:x"), ("folders:x/y", "folder:x/y"), ("scene", "scenes")],
)
def test_data_that_are_nearly_named_right(spec, meant, capsys):
    assert refused(["data", spec], capsys).endswith(f"did you mean {meant}?")


def test_what_is_far_from_everything_is_not_guessed():
    assert did_you_mean("something", ["clip", "vilt"]) == "" and did_you_mean("", ["clip"]) == ""


# ------------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def ctrl_c_interrupts():
    """As in a terminal: a shell starts what runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("came, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("where", ["fit", "batches"])
@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_a_stopped_run_says_what_is_saved_and_how_to_go_on(came, status, where, tiny, tmp_path, capsys, monkeypatch):
    """At the loop, which keeps its history, or before it."""
    out = tmp_path / "my run"

    def stop(*_, **__):
        save_tensors(out / "state.safetensors", {"x": torch.ones(1)}, {"step": 150, "seconds": 1.0})
        try:
            signal.raise_signal(came)
        except KeyboardInterrupt:
            if where == "batches":
                raise
        return loop.History(interrupted=True)

    monkeypatch.setattr(*((loop, "fit") if where == "fit" else (Recipe, "batches")), stop)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["train", "clip", "--out", str(out)]) == status
    said = capsys.readouterr().err
    assert f"stopped. The first 150 steps are saved in {out}" in said
    assert f"python -m minivlp train clip --out '{out}'" in said
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_saved_before_the_first_save_and_after_the_last(tiny, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "run"
    same = ["train", "clip", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stop)
        assert main(same) == 130
    assert "No step was saved yet" in capsys.readouterr().err
    monkeypatch.setattr(suite, "measure", stop)
    assert main(same) == 130
    assert f"The trained model is in {out / 'model.safetensors'}" in capsys.readouterr().err
    monkeypatch.setattr(suite, "measure", lambda *_: Scores())
    assert main(same) == 0, "the command that it names"


# ------------------------------------------------------------------------------------------------------------ encoding


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "cp437"])
def test_output_never_ends_at_the_consoles_encoding(encoding, tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "猫", [{"caption": "一只猫 — é", "split": "train"}])
    raw, errors = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(errors, encoding=encoding))
    assert main(["data", f"folder:{folder}"]) == 0
    assert main(["data", f"folder:{folder}", "--split", "test"]) == 1
    sys.stderr.flush()
    assert b"\\u4e00\\u53ea\\u732b" in raw.getvalue() and b"\\u732b: no image in split" in errors.getvalue()


def test_a_stream_that_takes_anything_stays_as_it_is(pictures, monkeypatch):
    class Notebook(io.StringIO):
        """It has no `reconfigure`."""

    out = Notebook()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["data", f"folder:{pictures}"]) == 0 and "24 images" in out.getvalue()


def test_a_pipe_in_another_encoding(tmp_path):
    """The whole program, as it is started under Windows or in the locale C."""
    folder = folder_of(tmp_path / "data", [{"caption": "一只猫", "split": "train"}])
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-m", "minivlp", "data", f"folder:{folder}"]
    done = subprocess.run(program, capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and b"\\u4e00\\u53ea\\u732b" in done.stdout, done.stderr
