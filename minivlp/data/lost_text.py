"""What is lost of texts on the way to token ids: cut ends, unknown words, texts that are no longer different.

Axes: N texts, L text tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minivlp.data.batch import Text
from minivlp.data.text import special_ids, tokenize
from minivlp.data.validation import DataError
from minivlp.errors import Notice


@dataclass(frozen=True)
class LostText:
    """Counts over different texts.

    Args:
        texts: how many there are.
        max_tokens: the length at which they are cut.
        cut: how many are longer.
        merged: how many have the same token ids as another text, which says something else.
        kept: how many different rows of ids these have.
        unknown: how many have words that the tokenizer does not know.
        empty: the texts of which nothing but special and unknown tokens is left.
    """

    texts: int
    max_tokens: int
    cut: int
    merged: int
    kept: int
    unknown: int
    empty: tuple[str, ...]

    def __str__(self) -> str:
        parts = []
        if self.cut:
            parts.append(f"{self.cut:,} of {self.texts:,} are longer than {self.max_tokens} tokens and cut there")
        if self.merged:
            rows = "one row" if self.kept == 1 else f"{self.kept:,} rows"
            parts.append(f"{self.merged:,} different ones become {rows} of token ids: the model cannot tell them apart")
        if self.unknown:
            parts.append(f"{self.unknown:,} of {self.texts:,} have words that the tokenizer does not know")
        if blank := sum(not text.strip() for text in self.empty):
            parts.append(f"{blank:,} of {self.texts:,} are blank")
        return "; ".join(parts)


def lost_text(tokenizer: Any, texts: Sequence[str], encoded: Text, max_tokens: int) -> LostText:
    """Compare N texts with their tokens `encoded` (N, L), which `tokenize(tokenizer, texts, max_tokens)` made.

    Letter case and spaces make no texts different.
    """
    texts = list(texts)
    first = {text: row for row, text in reversed(list(enumerate(texts)))}  # equal texts count once
    rows = torch.tensor(sorted(first.values()), dtype=torch.long)
    texts, ids, mask = [texts[row] for row in rows.tolist()], encoded.ids.cpu()[rows], encoded.mask.cpu()[rows]
    special = special_ids(tokenizer)
    unknown = tokenizer.unk_token_id
    says_nothing = torch.tensor(sorted(special - {tokenizer.mask_token_id}), dtype=torch.long)
    has_content = (mask & ~torch.isin(ids, says_nothing)).any(1).tolist()
    groups: dict[bytes, set[str]] = {}
    for text, row, real in zip(texts, ids.numpy(), mask.numpy(), strict=True):
        groups.setdefault(row[real].tobytes(), set()).add("".join(text.casefold().split()))
    merged = [same for same in groups.values() if len(same) > 1]
    # GPT-2 and CLIP use one token for unknown words and for the end; they can spell everything.
    is_own = unknown is not None and unknown not in (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return LostText(
        texts=len(texts),
        max_tokens=max_tokens,
        cut=_count_longer(tokenizer, [texts[row] for row in (mask.sum(1) >= max_tokens).nonzero()[:, 0]], max_tokens),
        merged=sum(map(len, merged)),
        kept=len(merged),
        unknown=int((mask & (ids == unknown)).any(1).sum()) if is_own else 0,
        empty=tuple(text for text, content in zip(texts, has_content, strict=True) if not content),
    )


def _count_longer(tokenizer: Any, texts: list[str], max_tokens: int) -> int:
    """How many texts have more than `max_tokens` tokens."""
    return int((tokenize(tokenizer, texts, max_tokens + 1).mask.sum(1) > max_tokens).sum())


def check_text(
    tokenizer: Any,
    texts: Sequence[str],
    encoded: Text,
    max_tokens: int,
    what: str = "texts",
    place: Callable[[str], str] | None = None,
) -> None:
    """Warn once, with numbers, if a part of the texts is lost. The arguments are those of `lost_text`, and:

    Args:
        what: the texts are called this, such as "captions".
        place: the file and row of a text, for the error.

    The same warning is shown once, as Python does with warnings, however many measures read the same texts.
    Raises DataError for a text of which nothing is left: the model would take it for any other such text.
    """
    lost = lost_text(tokenizer, texts, encoded, max_tokens)
    written = [text for text in lost.empty if text.strip()]
    if written:
        where = f" ({place(written[0])})" if place else ""
        message = (
            f"{len(written):,} of {lost.texts:,} {what} are nothing but unknown or special tokens to this tokenizer: "
            f"the first is {written[0][:60]!r}{where}. Is it a tokenizer of another language? Or delete these {what}."
        )
        raise DataError(message, "Or use another {}.", "tokenizer")
    if said := str(lost):
        warnings.warn(f"{what}: {said}", Notice, stacklevel=1)


def check_texts(tokenizer: Any, texts: Iterable[str], max_tokens: int, what: str = "texts") -> None:
    """`check_text` of texts that are not tokenized yet."""
    texts = list(dict.fromkeys(texts))
    check_text(tokenizer, texts, tokenize(tokenizer, texts, max_tokens), max_tokens, what)
