"""Text to token ids: our small tokenizer, any pretrained one of transformers, and one way to call both.

Ours is a WordPiece tokenizer (Schuster & Nakajima 2012, as in BERT) over bytes. Text is lower-cased and its Chinese
characters are set apart; then every byte is written as a visible letter, as GPT-2 does. A word of the scene world is
one token, a Chinese character of it too; anything else falls to pieces, in the worst case to single bytes, so nothing
becomes [UNK] and decoding gives the text back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlp.data import chinese, english, samples_dir
from minivlp.data.grammar import COLORS, OBJECTS, SHAPES, SIZES, Facts, Mention

SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[DEC]", "[ENC]")  # ids 0 to 6
_LONGEST_WORD = 10_000  # bytes; only a longer run without a space becomes [UNK]


def load_tokenizer(name_or_path: str | PathLike | None = None) -> Any:
    """Our tokenizer (None), one saved in a folder, or a pretrained one by its name on the model hub (which downloads).

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


def encode(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """ids (B, L) long and mask (B, L) bool, True on real tokens; L is the longest text, at most `max_tokens`.

    A longer text is cut so that its closing token ([SEP], or what the tokenizer ends with) stays. A tokenizer without
    a padding token (GPT-2) is padded with its end token, which the mask hides, and is not changed.
    Raises TypeError for one bare string or a text that is not a string.
    """
    if isinstance(texts, str):
        raise TypeError(f"encode needs a list of texts, not the one string {texts[:40]!r}: put it in a list")
    texts = list(texts)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {row} is {type(text).__name__} {text!r}, not a string")
    rows = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"] if texts else []
    longest = max((len(row) for row in rows), default=0)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)  # (B, L)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return ids, mask


def words(tokenizer: Any, ids: Iterable[int] | Tensor) -> list[tuple[str, list[int]]]:
    """The words of one text (L,) and the positions of their pieces; special tokens but the mask are left out.

    Knows the marks of WordPiece ("##" goes on), GPT-2 and SentencePiece ("Ġ", "▁" begin) and CLIP ("</w>" ends).
    """
    ids = [int(i) for i in ids]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    special.discard(tokenizer.mask_token_id)
    vocabulary = tokenizer.get_vocab()
    begin = next((mark for mark in ("Ġ", "▁") if f"{mark}a" in vocabulary), None)
    ends = "a</w>" in vocabulary
    groups: list[list[int]] = []
    for position, (i, piece) in enumerate(zip(ids, pieces, strict=True)):
        if i in special:
            continue
        before = pieces[position - 1] if groups and groups[-1][-1] == position - 1 else None
        if ends:
            goes_on = before is not None and not before.endswith("</w>")
        elif begin:
            goes_on = before is not None and not piece.startswith(begin)
        else:
            goes_on = before is not None and piece.startswith("##")
        if goes_on:
            groups[-1].append(position)
        else:
            groups.append([position])
    return [(tokenizer.decode([ids[p] for p in group]).strip(), group) for group in groups]


def train_tokenizer(texts: Iterable[str], whole: Iterable[str] = (), size: int = 1200) -> Any:
    """A WordPiece tokenizer with at most `size` tokens, as a transformers `PreTrainedTokenizerFast`.

    Args:
        texts: what to learn pieces from. whole: texts whose every word gets a token of its own, come what may.
    Raises ValueError when `size` does not hold the special tokens, the bytes and the whole words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=True),
            normalizers.ByteLevel(),
        ]
    )
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("Ġ", "removed"),  # a space, as ByteLevel writes it
            pre_tokenizers.Split(Regex(r"[!-/:-@\[-`{-~]"), "isolated"),  # ASCII punctuation
        ]
    )

    def split(text: str) -> list[str]:
        return [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]

    letters = _byte_letters()
    vocabulary = dict.fromkeys([*SPECIAL, *letters, *("##" + letter for letter in letters)])
    vocabulary |= dict.fromkeys(sorted({word for text in whole for word in split(text)}))
    if len(vocabulary) > size:
        raise ValueError(f"{len(vocabulary)} tokens are needed before any piece is learned: size {size} is too small")

    learner = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
    learner.normalizer, learner.pre_tokenizer = normalizer, splitter
    # The trainer breaks ties by id, so the ids of the bytes are fixed first: the same texts give the same pieces.
    known = [token for token in vocabulary if token not in SPECIAL and len(token.removeprefix("##")) == 1]
    learner.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=known, show_progress=False)
    )
    for piece, _ in sorted(learner.get_vocab().items(), key=lambda item: item[1]):  # the most useful first
        if len(vocabulary) < size:
            vocabulary.setdefault(piece)
    ids = {token: i for i, token in enumerate(vocabulary)}

    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Replace(" ", "Ġ"),
            decoders.ByteLevel(),
            decoders.Replace(Regex(r"(?<=\p{Han}) | (?=[\p{Han}.,?!])"), ""),  # no space beside Chinese
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def sample_texts() -> tuple[list[str], list[str]]:
    """What our own tokenizer is made from: texts to learn pieces from (photos, junk) and texts whose words stay whole.

    Whole are the words of the scene world and every Chinese character that stands in our data.
    """
    import json

    from minivlp.data.noise import JUNK

    photos = []
    for line in (samples_dir() / "photos" / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        photos += [*row["captions"], *row["captions_zh"]]
        photos += [text for region in row["regions"] for text in (region["text"], region["text_zh"])]
    texts = photos + [text for texts in JUNK.values() for text in texts]
    return [text for text in texts if text.isascii()], _grammar_texts() + [t for t in texts if not t.isascii()]


def pieces_tokenizer() -> Any:
    """A tokenizer in which most names of objects fall to two or three pieces ("butter ##fl ##y"), in English only.

    Ours keeps every word of the scene world whole, so that hiding whole words or single tokens (`objectives.masking`)
    is all the same. Here it is not, as with any tokenizer of everyday texts.
    """
    names = [english.bare(Mention(noun, count=count)) for noun in OBJECTS for count in (1, 2)]
    others = [text for text in _grammar_texts(SHAPES, other="heart") if text.isascii()]
    return train_tokenizer(names, whole=[*others, "an"], size=540)


def _grammar_texts(names: Sequence[str] = SHAPES + OBJECTS, other: str = "apple") -> list[str]:
    """Texts that hold every word of the scene world, or of what can be said of the things of these names."""
    nouns = [Mention(noun, count=count) for noun in names for count in (1, 2, 3)]
    things = nouns + [Mention("heart", color, size) for color in COLORS for size in SIZES]
    texts = ["red, blue. yes; no: (0) -"]
    for say in (english, chinese):
        for one in things:
            for relation in english.RELATIONS:
                texts += say.captions(Facts((one, Mention(other)), (relation,)))
                texts += [say.ask_what(relation, one), say.say_where(relation, one)]
                texts += [say.ask_relation(one, relation, one), say.again(one) if say is chinese else ""]
            texts += say.captions(Facts((one,))) + say.neutral(one)
            texts += [say.ask_color(one), say.ask_count(one), say.say_count(one), say.ask_where(one)]
            texts += [say.ask_there(one), say.YES, say.NO]
        texts += [say.say_color(color) for color in COLORS]
    return texts


def _byte_letters() -> list[str]:
    """The visible letter of each byte that can stand in lower-cased UTF-8 text, the space left out."""
    from tokenizers import normalizers

    ascii = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
    two_bytes = [chr(code) for code in range(0x80, 0x800)]  # every byte that follows, and the first of two
    longer = [chr(code) for code in (*range(0x800, 0xD800, 0x400), *range(0xE000, 0x110000, 0x1000))]
    return sorted(set(normalizers.ByteLevel().normalize_str("".join(ascii + two_bytes + longer))))
