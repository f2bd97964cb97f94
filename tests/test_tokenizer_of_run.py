"""A checkpoint is used with the tokenizer that it was trained with, or not at all."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from transformers import BertTokenizerFast

from minivlp.data.tokenizer_training import train_tokenizer
from minivlp.training.checkpoint import CheckpointError, bundled, save_tensors
from minivlp.training.tokenizer_of_run import (
    is_ours,
    keep_tokenizer,
    kept_tokenizer,
    open_tokenizer,
    tokenizer_fingerprint,
    tokenizer_of_checkpoint,
)


def made_of(seed: int, size: int):
    """A tokenizer of random words, with exactly `size` tokens."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 8))) for _ in range(size)]
    tokenizer = train_tokenizer(words, size=size)
    assert len(tokenizer) == size
    return tokenizer


@pytest.fixture(scope="module")
def one():
    return made_of(1, 600)


@pytest.fixture(scope="module")
def other():
    """As large as `one`, with other words."""
    return made_of(2, 600)


def checkpoint(folder, of, **notes):
    """As much of a checkpoint as is read here: its notes."""
    config = {"text": {"vocabulary": len(of)}}
    path = folder / "model.safetensors"
    save_tensors(path, {"weight": torch.ones(1)}, {"model": "CLIP", "config": config, **notes})
    return path


@pytest.fixture
def run(tmp_path, one):
    """The folder of a run with the tokenizer `one`, and its checkpoint."""
    keep_tokenizer(one, tmp_path / "run")
    checkpoint(tmp_path / "run", one, tokenizer=tokenizer_fingerprint(one))
    return tmp_path / "run"


def same(left, right):
    return tokenizer_fingerprint(left) == tokenizer_fingerprint(right)


def test_it_is_found_without_asking(run, one):
    found = tokenizer_of_checkpoint(run / "model.safetensors")
    assert same(found, one) and found("picture of a dog")["input_ids"] == one("picture of a dog")["input_ids"]
    assert same(tokenizer_of_checkpoint(run / "model.safetensors", run / "tokenizer"), one)
    assert not list(run.glob("*.part"))


def test_a_checkpoint_moved_alone_asks_for_it(run, tmp_path, one):
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(run / "model.safetensors", moved)
    with pytest.raises(CheckpointError) as raised:
        tokenizer_of_checkpoint(moved)
    said = raised.value.told({"tokenizer=FOLDER": "--tokenizer FOLDER"})
    assert "elsewhere.safetensors" in said and "600 tokens" in said and "ours (1200 tokens" in said
    assert said.endswith("--tokenizer FOLDER.") and "tokenizer=FOLDER" in str(raised.value)
    assert same(tokenizer_of_checkpoint(moved, run / "tokenizer"), one)


def test_one_of_the_same_size_is_told_apart(run, tmp_path, other):
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="another tokenizer .*600 tokens.*other .600 tokens.*leave tokenizer out"):
        tokenizer_of_checkpoint(run / "model.safetensors", tmp_path / "other")


def test_another_one_copied_beside_it_is_noticed(run, other):
    shutil.rmtree(run / "tokenizer")
    keep_tokenizer(other, run)
    with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
        tokenizer_of_checkpoint(run / "model.safetensors")


def test_the_same_pieces_split_in_another_way_are_another_tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyzAR", "Red", "red"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    lower, cased = (BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=flag) for flag in (True, False))
    assert lower.get_vocab() == cased.get_vocab() and not same(lower, cased)


def test_without_a_note_the_size_of_the_vocabulary_decides(tmp_path, one):
    """As in runs of earlier versions."""
    path = checkpoint(tmp_path, one)
    with pytest.raises(CheckpointError, match="600 tokens.*ours .1200 tokens"):
        tokenizer_of_checkpoint(path)
    one.save_pretrained(tmp_path / "words")
    assert same(tokenizer_of_checkpoint(path, tmp_path / "words"), one)
    assert is_ours(tokenizer_of_checkpoint(checkpoint(tmp_path, open_tokenizer())))


def test_a_saved_released_model_may_have_more_tokens_than_its_tokenizer(tmp_path, one):
    """`save_pretrained` puts both into one folder; vocabularies are often rounded up."""
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"weight": torch.ones(1)}, {"config": {"text": {"vocabulary": 640}}})
    one.save_pretrained(tmp_path)
    assert same(tokenizer_of_checkpoint(path), one)


def test_bundled_checkpoints_take_ours_only(tmp_path):
    assert is_ours(tokenizer_of_checkpoint(bundled("clip_nano")))
    made_of(3, 1200).save_pretrained(tmp_path / "as_large")
    with pytest.raises(CheckpointError, match="clip_nano.safetensors was trained with another tokenizer"):
        tokenizer_of_checkpoint(bundled("clip_nano"), tmp_path / "as_large")


def test_a_run_keeps_one_tokenizer(run, one, other):
    keep_tokenizer(one, run)
    with pytest.raises(CheckpointError, match="holds another tokenizer"):
        keep_tokenizer(other, run)
    assert same(kept_tokenizer(run), one) and kept_tokenizer(run.parent / "nowhere") is None


@pytest.mark.parametrize("damage", [b"{}", b'{"version": "1.0", ', b"\xff\xfe", b"[]"])
def test_a_damaged_tokenizer_is_said(run, damage):
    (run / "tokenizer" / "tokenizer.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match="no tokenizer in .*tokenizer.*save the tokenizer there again"):
        tokenizer_of_checkpoint(run / "model.safetensors")


@pytest.mark.parametrize("name", ["nobody/nothing", "./absent", "~/absent", "words", "a b"])
def test_a_name_without_a_tokenizer_is_said(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="save_pretrained") as raised:
        open_tokenizer(name)
    assert name.strip("~./") in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_without_a_tokenizer_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=f"no tokenizer in {tmp_path}"):
        open_tokenizer(tmp_path)
