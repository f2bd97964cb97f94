"""The tokenizer of a training run: its files are kept in the run's folder, and checkpoints note its fingerprint.

    keep_tokenizer(tokenizer, "runs/mine")                     writes runs/mine/tokenizer
    kept_tokenizer("runs/mine")                                reads it again; None if there is none
    tokenizer_of_checkpoint("runs/mine/model.safetensors")     the tokenizer that this model was trained with

With another tokenizer a model gets other ids for the same words: its scores fall to chance, and nothing else shows it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from minivlp.data.text import load_tokenizer
from minivlp.training.checkpoint import CHECKPOINTS, CheckpointError, naming, read_notes

FOLDER = "tokenizer"  # inside a run's folder
FILES = ("tokenizer.json", "vocab.txt", "vocab.json")  # at least one of them makes a folder a tokenizer's
OF_BLIP = ["[DEC]", "[ENC]"]
PROBE = ("A small Red_dog, isn't it? (2)", "naïve Café 12.5", "一只湿漉漉的狗", "ﬁnal\tline\n¡😀!")


def open_tokenizer(name_or_path: str | os.PathLike | None = None) -> Any:
    """As `data.text.load_tokenizer`, with BLIP's tokens [DEC] and [ENC] added where the tokenizer lacks them.

    Raises CheckpointError for a folder or name without a tokenizer that can be read.
    """
    try:
        tokenizer = load_tokenizer(os.path.expanduser(name_or_path) if name_or_path else None)
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from None
    except Exception as error:  # transformers and tokenizers raise anything, from OSError to a plain Exception
        if isinstance(error, MemoryError):
            raise
        if os.path.isdir(os.path.expanduser(name_or_path or "")):
            reason = f"its files cannot be read ({_first_line(error)}): save the tokenizer there again"
        else:
            reason = (
                "there is no such folder here, and the model hub has no such public tokenizer or cannot be reached: "
                "name a folder that `save_pretrained` has written"
            )
        raise CheckpointError(f"no tokenizer in {name_or_path}: {reason}") from None
    if missing := [token for token in OF_BLIP if token not in tokenizer.get_vocab()]:
        tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Size and hash: equal for tokenizers that number the same pieces alike and split a few difficult texts alike."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    ids = tokenizer(list(PROBE))["input_ids"]
    return f"{len(vocabulary)} tokens, {hashlib.sha256(json.dumps([vocabulary, ids]).encode()).hexdigest()[:16]}"


def is_ours(tokenizer: Any) -> bool:
    """Whether this is the tokenizer that comes with minivlp, which the bundled checkpoints were trained with."""
    return tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(open_tokenizer())


def keep_tokenizer(tokenizer: Any, run: Path | str) -> None:
    """Write the tokenizer's files into the folder of a run, whole or not at all; once.

    Raises CheckpointError if the run has another tokenizer already.
    """
    run = Path(run)
    if (there := kept_tokenizer(run)) is not None:
        if (old := tokenizer_fingerprint(there)) != (new := tokenizer_fingerprint(tokenizer)):
            raise CheckpointError(f"{run / FOLDER} holds another tokenizer ({old}) than this one ({new})")
        return
    temporary = run / f"{FOLDER}.{os.getpid()}.part"
    try:
        with naming(run / FOLDER):
            tokenizer.save_pretrained(temporary)
            os.replace(temporary, run / FOLDER)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def kept_tokenizer(run: Path | str) -> Any | None:
    """The tokenizer that `keep_tokenizer` wrote into this run's folder; None if there is none."""
    folder = Path(run) / FOLDER
    return open_tokenizer(folder) if _holds_tokenizer(folder) else None


def tokenizer_of_checkpoint(checkpoint: Path | str, given: str | os.PathLike | None = None) -> Any:
    """The tokenizer that a checkpoint was trained with.

    It is looked for in this order: `given` by the user (a folder or a name), `tokenizer/` beside the checkpoint, the
    checkpoint's own folder, and ours. Raises CheckpointError if what is found is not the one that the checkpoint notes.
    """
    checkpoint = Path(checkpoint)
    notes = read_notes(checkpoint)
    if checkpoint.resolve().parent == CHECKPOINTS:  # bundled ones were trained with ours
        notes = {"tokenizer": tokenizer_fingerprint(open_tokenizer()), **notes}
    beside = next((f for f in (checkpoint.parent / FOLDER, checkpoint.parent) if _holds_tokenizer(f)), None)
    tokenizer = open_tokenizer(given or beside)
    if fault := _misfit(notes, tokenizer, foreign=given is None and beside == checkpoint.parent):
        name = given or beside or "ours"
        raise CheckpointError(
            f"{checkpoint} was trained with another tokenizer ({fault[0]}) than {name} ({fault[1]}).",
            "Name the one it was trained with: {}." if given is None else "Name that one, or leave {} out.",
            "tokenizer=FOLDER" if given is None else "tokenizer",
        )
    return tokenizer


def _misfit(notes: dict[str, Any], tokenizer: Any, foreign: bool) -> tuple[str, str] | None:
    """How the checkpoint describes its tokenizer and how this one is, if they differ.

    A checkpoint without a fingerprint has the size of its vocabulary. A `foreign` one came with a tokenizer of its own,
    whose vocabulary may be smaller than the model's.
    """
    if known := notes.get("tokenizer"):
        found = tokenizer_fingerprint(tokenizer)
        return None if found == known else (known, found)
    text = (notes.get("config") or {}).get("text") or {}
    size = text.get("vocabulary") if isinstance(text, dict) else None
    found = len(tokenizer)
    if size is None or found == size or found - len(OF_BLIP) == size or (foreign and found < size):
        return None
    return f"{size} tokens", f"{found} tokens"


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in FILES)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
