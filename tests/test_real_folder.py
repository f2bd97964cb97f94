"""A real folder, end to end and by the command line: a timm tower, tokens kept on disk, kills, measures, a page."""

import json
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minivlp.__main__ import main
from minivlp.data.scenes import Scenes
from minivlp.data.text import SpecialTokens
from minivlp.papers import PAPERS
from minivlp.training.checkpoint import bundled, load_model


def flickr8k(folder, count):
    """Scenes as a folder of Flickr8k's layout: JPEGs, five captions each, lists of names for the splits."""
    scenes = Scenes(count, split="all", size=64)
    (folder / "Images").mkdir(parents=True)
    captions, splits = [], {"train": [], "dev": [], "test": []}
    for row in range(count):
        name = f"{row:05}.jpg"
        Image.fromarray(scenes[row].image).save(folder / "Images" / name)
        said = scenes.captions(row)
        captions += [f"{name}#{n}\t{said[n % len(said)]}{' .' * (n // len(said))}" for n in range(5)]
        splits[{8: "dev", 9: "test"}.get(row % 10, "train")].append(name)
    (folder / "Flickr8k.token.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    for split, names in splits.items():
        (folder / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    return folder


def coco(folder):
    """Scenes as a folder of COCO's layout, with categories and their boxes."""
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train2017", 24), ("val2017", 8)):
        scenes = Scenes(count, split="train", size=64, seed=count)
        (folder / split).mkdir()
        names, images, captions, boxes = {}, [], [], []
        for row in range(count):
            Image.fromarray(scenes[row].image).save(folder / split / f"{split}_{row}.jpg")
            images.append({"id": row, "file_name": f"{split}_{row}.jpg", "width": 64, "height": 64})
            for text in scenes.captions(row):
                captions.append({"id": len(captions), "image_id": row, "caption": text})
            for region in scenes.regions(row):
                if region.kind == "object":
                    cx, cy, w, h = (64 * side for side in region.box)
                    category = names.setdefault(region.phrase.removeprefix("a "), len(names) + 1)
                    box = {"id": len(boxes) + 1, "image_id": row, "category_id": category, "iscrowd": 0}
                    boxes.append({**box, "bbox": [cx - w / 2, cy - h / 2, w, h]})
        categories = [{"id": number, "name": name} for name, number in names.items()]
        for what, rows in (("captions", captions), ("instances", boxes)):
            text = json.dumps({"images": images, "annotations": rows, "categories": categories})
            (folder / "annotations" / f"{what}_{split}.json").write_text(text, encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------------------------ the whole, and kills


def run(out, *more, kill_when=None):
    """The command in a process of its own, killed once `kill_when` is true; returns what it printed."""
    command = [sys.executable, "-m", "minivlp", "train", "clip", "--out", str(out), "--frozen", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while kill_when is not None and not kill_when():
        assert process.poll() is None, f"it ended before it could be killed: {process.communicate()[0]}"
        time.sleep(0.005)
    if kill_when is not None:
        process.send_signal(signal.SIGKILL)
    printed = process.communicate()[0]
    assert process.returncode == (0 if kill_when is None else -signal.SIGKILL), printed
    return printed


def test_a_thousand_pictures_through_two_kills_end_as_without_them(tmp_path):
    folder = flickr8k(tmp_path / "flickr8k", 1000)
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    how = ["--data", f"flickr:{folder}", "--tower", "test_vit", "--tower-weights", str(tmp_path / "vit.safetensors")]
    how += ["--steps", "150", "--batch", "32"]
    printed = run(tmp_path / "plain" / "run", *how)
    assert "Folder(800 images, 4,000 captions" in printed and "on Folder(100 images, 500 captions" in printed
    assert "text to image R@1" in printed and "n = 500" in printed  # all five captions of each picture

    killed = tmp_path / "killed" / "run"

    def tokens():
        return list((tmp_path / "killed" / "features").glob("*.f16"))

    run(killed, *how, kill_when=lambda: tokens() and tokens()[0].stat().st_size > 0)
    assert not (killed / "state.safetensors").exists()
    run(killed, *how, kill_when=(killed / "state.safetensors").exists)
    assert not (killed / "model.safetensors").exists()
    printed = run(killed, *how)
    plain = tmp_path / "plain" / "run"
    weights, expected = load_file(killed / "model.safetensors"), load_file(plain / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (killed, plain)]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] and np.mean(losses[0][-10:]) < np.mean(losses[0][:10])
    assert (killed / "retrieval.html").stat().st_size > 50_000 and str(killed / "retrieval.html") in printed
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit < 2e9


# --------------------------------------------------------------------------------------------- other models and words

FEW = ["--steps", "2", "--batch", "8"]


def test_boxes_of_a_coco_folder_are_learnt_and_measured(tmp_path, capsys):
    out = tmp_path / "run"
    tower = ["--tower", "test_convnext", "--frozen"]
    assert main(["train", "xvlm", "--data", f"coco:{coco(tmp_path / 'coco')}", *tower, *FEW, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Acc@0.5" in printed and "text to region R@1" in printed and "on Folder(8 images" in printed
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert "box_l1" in rows[0] and "box_l1" not in rows[1]  # boxes have their batches, captions theirs


def test_captions_of_a_folder_are_written_and_measured(tmp_path, capsys):
    folder = flickr8k(tmp_path / "flickr8k", 30)
    out = tmp_path / "run"
    assert main(["train", "blip", "--data", f"flickr:{folder}", "--tower", "test_vit", *FEW, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "caption: BLEU-4" in printed and "caption: CIDEr-D" in printed
    again = ["--weights", str(out / "model.safetensors"), "--data", f"flickr:{folder}"]
    assert main(["evaluate", "blip", *again]) == 0
    measured = printed[printed.index("caption: BLEU-4") :]
    assert measured in capsys.readouterr().out  # the same tower was saved, and the same numbers come out


@pytest.fixture
def chinese(tmp_path):
    """A folder with Chinese captions, and a tokenizer with the special tokens and ids of BERT's Chinese one."""
    from transformers import BertTokenizerFast

    scenes = Scenes(24, split="all", language="zh")
    (tmp_path / "zh").mkdir()
    rows = []
    for row in range(24):
        Image.fromarray(scenes[row].image).save(tmp_path / "zh" / f"{row}.jpg")
        split = "test" if row < 4 else "train"
        rows.append({"file": f"{row}.jpg", "captions": scenes.captions(row), "split": split})
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "zh" / "captions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    letters = sorted({letter for row in rows for text in row["captions"] for letter in text})
    words = ["[PAD]", *(f"[unused{n}]" for n in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    return tmp_path / "zh", tmp_path / "bert", len(words)


@pytest.mark.parametrize("model", ["blip", "albef"])
def test_chinese_captions_need_only_another_tokenizer(model, chinese, tmp_path, capsys):
    folder, tokenizer, words = chinese
    how = ["--data", f"folder:{folder}", "--tokenizer", str(tokenizer)]
    weights = tmp_path / "run" / "model.safetensors"
    assert main(["train", model, *how, "--tower", "test_vit", *FEW, "--out", str(weights.parent)]) == 0
    config = load_model(PAPERS[model].model_class(), weights).config
    assert config.text.vocabulary == words + 2
    if model == "blip":
        assert config.tokens == SpecialTokens(0, 101, 102, 103, 100, dec=words, enc=words + 1)
    else:
        assert config.masking.mask_id == 103 and config.masking.never_mask == (0, 101)
    assert main(["evaluate", model, *how, "--weights", str(weights)]) == 0
    assert ("caption: BLEU-4" in capsys.readouterr().out) == (model == "blip")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["vilt", "--tower", "test_vit"], "no image tower"),
        (["vlmo", "--frozen", "--data", "photos"], "no image tower"),
        (["clip", "--tower", "test_vit", "--start", str(bundled("clip_nano"))], "brings its own image tower"),
        (["clip", "--tower-weights", "FILE"], "need the name of the tower"),
        (["clip", "--tower", "test_vitt"], "did you mean test_vit"),
    ],
)
def test_options_that_exclude_each_other_are_refused_before_training(arguments, said, tmp_path, capsys):
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()
