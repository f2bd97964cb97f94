"""Our small tokenizer: WordPiece (Schuster & Nakajima 2012, as in BERT) over bytes.

Text is lower-cased and a space is put around each Chinese character. Then every byte is written as a visible letter, as
GPT-2 does. A word of the scene world is one token, and so is each of its Chinese characters. Any other word is split
into pieces, in the worst case into single bytes. So no text contains [UNK], and decoding gives the text back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from minivlp.data import chinese, english, samples_dir
from minivlp.data.grammar import COLORS, OBJECTS, SHAPES, SIZES, Facts, Mention
from minivlp.data.noise import JUNK
from minivlp.data.text import SPECIAL

_LONGEST_WORD = 10_000  # bytes; only a longer run without a space becomes [UNK]


def train_tokenizer(texts: Iterable[str], whole: Iterable[str] = (), size: int = 1200) -> Any:
    """A WordPiece tokenizer with at most `size` tokens, as a transformers `PreTrainedTokenizerFast`.

    Args:
        texts: the texts that pieces are learned from.
        whole: texts whose words all get a token of their own.

    Raises ValueError if `size` is too small for the special tokens, the bytes and the whole words.
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
    # The trainer breaks ties by id. Fixed ids for the bytes make the result the same for the same texts.
    known = [token for token in vocabulary if token not in SPECIAL and len(token.removeprefix("##")) == 1]
    learner.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=known, show_progress=False)
    )
    for piece, _ in sorted(learner.get_vocab().items(), key=lambda item: item[1]):  # the most useful pieces first
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
            decoders.Replace(Regex(r"(?<=\p{Han}) | (?=[\p{Han}.,?!])"), ""),  # no space next to Chinese
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


def folder_tokenizer(dataset: Any, size: int) -> Any:
    """A tokenizer of at most `size` tokens for the captions and phrases of a dataset: give the part that is trained on.

    Few texts have fewer pieces, so the vocabulary of a small folder is smaller. Chinese needs no spaces: each of its
    characters is a word.
    """
    rows = range(len(dataset))
    captions = (text for row in rows for text in dataset.captions(row))
    phrases = (region.phrase for row in rows for region in dataset.regions(row))
    return train_tokenizer(chain(captions, phrases), size=size)


def sample_texts() -> tuple[list[str], list[str]]:
    """The two arguments of `train_tokenizer` that give our tokenizer.

    Pieces are learned from the English captions of the sample photos and from `noise.JUNK`. Whole are the words of the
    scene world and every Chinese character of our data.
    """
    photos = []
    for line in (samples_dir() / "photos" / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        photos += [*row["captions"], *row["captions_zh"]]
        photos += [text for region in row["regions"] for text in (region["text"], region["text_zh"])]
    texts = photos + [text for texts in JUNK.values() for text in texts]
    return [text for text in texts if text.isascii()], _grammar_texts() + [t for t in texts if not t.isascii()]


def pieces_tokenizer() -> Any:
    """An English tokenizer that splits most names of objects into two or three pieces ("butter ##fl ##y").

    Our tokenizer keeps every word of the scene world whole, so masking whole words and masking single tokens
    (`objectives.masking`) are the same. With this one they differ, as with any tokenizer of general text.
    """
    names = [english.bare(Mention(noun, count=count)) for noun in OBJECTS for count in (1, 2)]
    others = [text for text in _grammar_texts(SHAPES, other="heart") if text.isascii()]
    return train_tokenizer(names, whole=[*others, "an"], size=540)


def _grammar_texts(nouns: Sequence[str] = SHAPES + OBJECTS, other: str = "apple") -> list[str]:
    """Texts with every word of the scene world, or with all that can be said of objects with these nouns."""
    counted = [Mention(noun, count=count) for noun in nouns for count in (1, 2, 3)]
    mentions = counted + [Mention("heart", color, size) for color in COLORS for size in SIZES]
    texts = ["red, blue. yes; no: (0) -"]
    for say in (english, chinese):
        for one in mentions:
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
    """The visible letter of each byte that can occur in lower-cased UTF-8 text, except the space."""
    from tokenizers import normalizers

    ascii = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
    two_bytes = [chr(code) for code in range(0x80, 0x800)]  # every continuation byte, and the first of two bytes
    longer = [chr(code) for code in (*range(0x800, 0xD800, 0x400), *range(0xE000, 0x110000, 0x1000))]
    return sorted(set(normalizers.ByteLevel().normalize_str("".join(ascii + two_bytes + longer))))
