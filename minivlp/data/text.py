"""From texts to token ids: load a tokenizer, tokenize, and find out which pieces form a word.

Everything works with our tokenizer (`tokenizer_training`) and with any tokenizer of transformers.
Axes: B batch, L text tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minivlp.data import samples_dir
from minivlp.data.batch import Text
from minivlp.data.english import FUNCTION_WORDS

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[DEC]", "[ENC]")  # of our tokenizer: ids 0 to 6


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens; the defaults are those of our tokenizer, and None is a token that does not exist.

    `dec` and `enc` are BLIP's first tokens: they tell the text transformer to decode, or to encode with the image.
    """

    pad: int | None = 0
    cls: int | None = 1
    sep: int | None = 2
    mask: int | None = 3
    unk: int | None = 4
    dec: int | None = 5
    enc: int | None = 6

    @staticmethod
    def of(tokenizer: Any) -> SpecialTokens:
        """The ids of this tokenizer."""
        named = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep", "mask", "unk")}
        vocabulary = tokenizer.get_vocab()
        return SpecialTokens(**named, dec=vocabulary.get("[DEC]"), enc=vocabulary.get("[ENC]"))


def load_tokenizer(name_or_path: str | PathLike | None = None) -> Any:
    """Our tokenizer (None), one saved in a folder, or a pretrained one by its name on the model hub (a download).

    Raises FileNotFoundError for a folder without a tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name_or_path is None:
        return PreTrainedTokenizerFast.from_pretrained(samples_dir() / "tokenizer")
    folder = Path(name_or_path)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.txt", "vocab.json")):
            raise FileNotFoundError(f"no tokenizer in {folder}: save_pretrained would have written a tokenizer.json")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if folder.is_absolute() or str(name_or_path).startswith((".", "~")):
        raise FileNotFoundError(f"no folder {folder}: name a folder made by save_pretrained, or nothing for ours")
    return AutoTokenizer.from_pretrained(str(name_or_path))


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> Text:
    """The texts as `Text` (B, L), where L is the length of the longest one, at most `max_tokens`.

    A longer text is cut such that its last token ([SEP], or whatever the tokenizer ends with) stays. Special tokens
    and padding belong to no word. A tokenizer without a padding token (GPT-2) is padded with its end token.
    Raises TypeError for a single string and for a text that is not a string.
    """
    if isinstance(texts, str):
        raise TypeError(f"tokenize needs a list of texts, not the one string {texts[:40]!r}: put it in a list")
    texts = list(texts)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {row} is {type(text).__name__} {text!r}, not a string")
    if not texts:
        return pad_rows([], [], 0)
    encoded = tokenizer(texts, truncation=True, max_length=max_tokens)
    text = pad_rows(encoded["input_ids"], _words_of_pieces(tokenizer, encoded), pad_id(tokenizer))
    # A fast tokenizer counts a special token inside a text as a word.
    text.word[torch.isin(text.ids, torch.tensor(sorted(special_ids(tokenizer)), dtype=torch.long))] = -1
    return text


def pad_rows(ids: Sequence[list[int]], word: Sequence[list[int]], pad: int) -> Text:
    """Lists of token ids and of word indices as `Text` (B, L), padded to the longest with the id `pad`."""
    lengths = torch.tensor([len(row) for row in ids], dtype=torch.long)
    longest = int(lengths.max()) if len(ids) else 0
    padded = [[*row, *[pad] * (longest - len(row))] for row in ids]
    words = [[*row, *[-1] * (longest - len(row))] for row in word]
    mask = torch.arange(longest) < lengths[:, None]
    table, words = (torch.tensor(rows, dtype=torch.long).view(mask.shape) for rows in (padded, words))
    return Text(table, mask, words)


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: the padding token, else the end token, else 0."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def special_ids(tokenizer: Any) -> set[int]:
    """The ids of all special tokens, with those that were added to the tokenizer such as [DEC]."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def content_free_ids(tokenizer: Any, words: Iterable[str] = FUNCTION_WORDS) -> tuple[int, ...]:
    """The ids that say nothing about an image, sorted: all special tokens, and `words` that are single tokens.

    Masked language modeling leaves them out: their prediction needs grammar, not the image.
    """
    return tuple(sorted(special_ids(tokenizer).union(word_ids(tokenizer, words))))


def word_ids(tokenizer: Any, words: Iterable[str]) -> tuple[int, ...]:
    """The ids of those `words` that are single tokens, sorted.

    A word counts in the forms in which the tokenizer writes it: at the start of a text, after a space, and capitalized.
    """
    forms = [form for word in words for form in (word, f" {word}", word.capitalize(), f" {word.capitalize()}")]
    rows = tokenizer(forms, add_special_tokens=False)["input_ids"] if forms else []
    return tuple(sorted({row[0] for row in rows if len(row) == 1}))


def group_words(tokenizer: Any, ids: Iterable[int] | Tensor) -> list[tuple[str, list[int]]]:
    """The words of one text (L,), each with the positions of its pieces. Of the special tokens, only [MASK] is a word.

    It recognizes the marks of WordPiece ("##" continues a word), GPT-2 and SentencePiece ("Ġ", "▁" begin one) and CLIP
    ("</w>" ends one).
    """
    ids = [int(i) for i in ids]
    groups = _Marks.of(tokenizer).group(ids, tokenizer.convert_ids_to_tokens(ids))
    return [(tokenizer.decode([ids[position] for position in group]).strip(), group) for group in groups]


def _words_of_pieces(tokenizer: Any, encoded: Any) -> list[list[int]]:
    """For each text, the index of the word that each piece belongs to; -1 on special tokens."""
    rows = encoded["input_ids"]
    # A fast tokenizer knows where it split the text. One without a pre-tokenizer never does: all would be one word.
    if getattr(encoded, "is_fast", False) and tokenizer.backend_tokenizer.pre_tokenizer is not None:
        return [[-1 if word is None else word for word in encoded.word_ids(i)] for i in range(len(rows))]
    marks, found = _Marks.of(tokenizer), []
    for row in rows:
        words = [-1] * len(row)
        for index, group in enumerate(marks.group(row, tokenizer.convert_ids_to_tokens(row))):
            for position in group:
                words[position] = index
        found.append(words)
    return found


class _Marks(NamedTuple):
    """How a tokenizer marks the pieces of a word."""

    begin: str | None  # the mark on the first piece of a word
    ends: bool  # whether the last piece of a word has the mark "</w>"
    special: frozenset[int]  # ids that are no part of a word

    @staticmethod
    def of(tokenizer: Any) -> _Marks:
        vocabulary = tokenizer.get_vocab()
        begin = next((mark for mark in ("Ġ", "▁") if f"{mark}a" in vocabulary), None)
        return _Marks(begin, "a</w>" in vocabulary, frozenset(special_ids(tokenizer) - {tokenizer.mask_token_id}))

    def group(self, ids: Sequence[int], pieces: Sequence[str]) -> list[list[int]]:
        """The positions of the pieces of each word."""
        groups: list[list[int]] = []
        for position, (i, piece) in enumerate(zip(ids, pieces, strict=True)):
            if i in self.special:
                continue
            before = pieces[position - 1] if groups and groups[-1][-1] == position - 1 else None
            if self.ends:
                continues = before is not None and not before.endswith("</w>")
            elif self.begin:
                continues = before is not None and not piece.startswith(self.begin)
            else:
                continues = before is not None and piece.startswith("##")
            if continues:
                groups[-1].append(position)
            else:
                groups.append([position])
        return groups
