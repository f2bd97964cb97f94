"""Tokenizers: words of the scene world stay whole, no text is lost, and all tokenizers give the same `Text`."""

import json
import random
import unicodedata

import pytest
import torch

from minivlp.data.english import FUNCTION_WORDS
from minivlp.data.grammar import COLORS, OBJECTS, SHAPES, SIZES
from minivlp.data.noise import JUNK
from minivlp.data.scenes import Scenes
from minivlp.data.text import (
    SPECIAL,
    SpecialTokens,
    content_free_ids,
    group_words,
    load_tokenizer,
    pad_id,
    special_ids,
    tokenize,
)
from minivlp.data.tokenizer_training import pieces_tokenizer, sample_texts, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def gpt2():
    """A tokenizer like GPT-2's: byte-level BPE, an end token, no padding token, no special tokens around a text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(["a dog left of a cat"] * 3, vocab_size=280, special_tokens=["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A WordPiece tokenizer in pure Python: it does not report the word of a piece."""
    from transformers import PreTrainedTokenizer

    class Slow(PreTrainedTokenizer):
        def __init__(self, **more):
            names = [*SPECIAL[:5], "a", "b", "dog", "##icycle", "##s"]
            self.ids = {name: i for i, name in enumerate(names)}
            roles = ("pad_token", "cls_token", "sep_token", "mask_token", "unk_token")
            super().__init__(**dict(zip(roles, SPECIAL, strict=False)), special_tokens_pattern="cls_sep", **more)

        vocab_size = property(lambda self: len(self.ids))

        def get_vocab(self):
            return dict(self.ids)

        def _tokenize(self, text):
            return [piece for word in text.split() for piece in self._pieces(word)]

        def _pieces(self, word):
            split = {"bicycle": ["b", "##icycle"], "dogs": ["dog", "##s"]}
            return split.get(word, [word])

        def _convert_token_to_id(self, token):
            return self.ids.get(token, 4)

        def _convert_id_to_token(self, index):
            return list(self.ids)[index]

        def build_inputs_with_special_tokens(self, ids, other=None):
            return [1, *ids, 2]

        def convert_tokens_to_string(self, tokens):
            return " ".join(tokens).replace(" ##", "")

    return Slow()


def test_special_tokens_have_their_ids(tokenizer):
    assert tokenizer.convert_ids_to_tokens(list(range(7))) == list(SPECIAL)
    assert tokenizer("a dog")["input_ids"][0] == 1 and tokenizer("a dog")["input_ids"][-1] == 2
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id) == (0, 3, 4)
    assert tokenizer("[DEC] [MASK]")["input_ids"] == [1, 5, 3, 2]
    assert len(tokenizer) <= 1200


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_word_of_the_scene_world_is_one_token(tokenizer, language):
    dataset = Scenes(800, "all", seed=4, language=language)
    texts = [text for row in range(800) for text in dataset.captions(row)]
    for row in range(0, 800, 8):
        sample = dataset[row]
        texts += [text for pair in sample.questions for text in pair]
        texts += [text for text, _ in sample.truth.statements(random.Random(row), language)]
    pieces = {piece for ids in tokenizer(texts)["input_ids"] for piece in tokenizer.convert_ids_to_tokens(ids)}
    assert "[UNK]" not in pieces
    assert not [piece for piece in pieces if piece.startswith("##")]


TEXTS = [
    "ein süßer hund läuft über die straße",
    "日本語のテキスト",
    "привет мир 🐶",
    "कुत्ता",
    "한국어",
    "§¶• “quoted” … 42%",
    "rhinoceros",
    "龘",
]


@pytest.mark.parametrize("text", TEXTS + list(JUNK["zh"]))
def test_any_text_survives_without_unknown_tokens(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    want = unicodedata.normalize("NFKC", text).lower()
    assert decoded.replace(" ", "") == want.replace(" ", "")


def test_decoding_gives_the_caption_back(tokenizer):
    for text in ("a red heart left of two bees", "一个红色爱心在一只狗的左边", "what colour is the ring?"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("A Red  HEART")["input_ids"] == tokenizer("a red heart")["input_ids"]


def test_texts_are_padded_to_the_longest_and_cut_before_sep(tokenizer):
    text = tokenize(tokenizer, ["a dog", "a red heart left of a dog", ""], 6)
    assert text.ids.shape == text.mask.shape == text.word.shape == (3, 6)
    assert text.ids.dtype == text.word.dtype == torch.long and text.mask.dtype == torch.bool
    assert text.mask.sum(1).tolist() == [4, 6, 2]
    assert (text.ids[~text.mask] == tokenizer.pad_token_id).all()
    assert [text.ids[row, text.mask[row]][-1].item() for row in range(3)] == [2, 2, 2]
    assert tokenize(tokenizer, ["a dog"], 40).ids.shape == (1, 4)
    assert tokenize(tokenizer, [], 40).ids.shape == tokenize(tokenizer, [], 40).word.shape == (0, 0)


def test_what_is_not_a_list_of_texts_is_explained(tokenizer):
    with pytest.raises(TypeError, match="put it in a list"):
        tokenize(tokenizer, "a dog", 8)
    with pytest.raises(TypeError, match="text 1 is NoneType"):
        tokenize(tokenizer, ["a dog", None], 8)


def test_a_tokenizer_without_padding_works_and_is_not_changed(gpt2):
    text = tokenize(gpt2, ["a dog left", "a"], 16)
    assert text.mask[1].sum() == 1 and text.mask[0].all()
    assert (text.ids[~text.mask] == gpt2.eos_token_id).all() and pad_id(gpt2) == gpt2.eos_token_id
    assert gpt2.pad_token is None


def test_the_pieces_of_a_word_have_its_index(tokenizer):
    text = tokenize(tokenizer, ["a bicycle left of a dog", "a dog"], 40)
    pieces = [tokenizer.convert_ids_to_tokens(row) for row in text.ids.tolist()]
    assert pieces[0][1:8] == ["a", "b", "##ic", "##y", "##c", "##le", "left"]
    assert text.word.tolist() == [[-1, 0, 1, 1, 1, 1, 1, 2, 3, 4, 5, -1], [-1, 0, 1, *[-1] * 9]]
    assert ((text.word >= 0) == (text.mask & ~torch.isin(text.ids, torch.arange(7)))).all()
    cut = tokenize(tokenizer, ["a bicycle left of a dog"], 5)
    assert cut.word.tolist() == [[-1, 0, 1, 1, -1]]


def test_special_tokens_inside_a_text_belong_to_no_word(tokenizer):
    text = tokenize(tokenizer, ["[DEC] a [MASK] left", "两只蜜蜂"], 40)
    assert [word >= 0 for word in text.word[0].tolist()] == [False, False, True, False, True, False]
    assert text.word[1].tolist() == [-1, 0, 1, 2, 3, -1]  # every Chinese character is a word


def test_the_words_of_a_byte_level_bpe(gpt2):
    text = tokenize(gpt2, ["a dogs left bicycle", "a"], 40)
    pieces = gpt2.convert_ids_to_tokens(text.ids[0].tolist())
    assert pieces[1:3] == ["Ġdog", "s"] and len(pieces) > 8
    starts = [place for place, piece in enumerate(pieces) if place == 0 or piece.startswith("Ġ")]
    assert text.word[0].tolist() == [sum(start <= place for start in starts) - 1 for place in range(len(pieces))]
    assert text.word[0].max() == 3 and text.word[1].tolist() == [0, *[-1] * (len(pieces) - 1)]


def test_the_words_of_a_slow_tokenizer(slow):
    assert not slow.is_fast
    text = tokenize(slow, ["a bicycle", "dogs", "a b a dog"], 40)
    assert text.ids.tolist() == [[1, 5, 6, 8, 2, 0], [1, 7, 9, 2, 0, 0], [1, 5, 6, 5, 7, 2]]
    assert text.word.tolist() == [[-1, 0, 1, 1, -1, -1], [-1, 0, 0, -1, -1, -1], [-1, 0, 1, 2, 3, -1]]
    assert group_words(slow, text.ids[0]) == [("a", [1]), ("bicycle", [2, 3])]


def test_a_fast_tokenizer_that_does_not_split_its_input_is_grouped_by_its_marks():
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("▁b", -1.0), ("icycle", -1.0)], unk_id=0))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    unsplit = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    assert tokenize(unsplit, ["a bicycle a"], 40).word.tolist() == [[0, 1, 1, 2]]


@pytest.mark.parametrize("name", ["tokenizer", "gpt2", "slow"])
def test_words_agree_with_their_pieces(name, request):
    """`Text.word` groups the pieces exactly as `group_words` does."""
    some = request.getfixturevalue(name)
    for text in ("a dog", "a bicycle a dog", "dogs a b bicycle dog"):
        found = tokenize(some, [text], 40)
        groups = group_words(some, found.ids[0])
        word = found.word[0].tolist()
        assert [[place for place, w in enumerate(word) if w == n] for n in range(len(groups))] == [g for _, g in groups]


def test_pieces_are_grouped_into_words(tokenizer, gpt2):
    ids = tokenize(tokenizer, ["a rhinoceros left of [MASK], süß"], 40).ids
    found = group_words(tokenizer, ids[0])
    assert [word for word, _ in found] == ["a", "rhinoceros", "left", "of", "[MASK]", ",", "süß"]
    assert [place for _, places in found for place in places] == list(range(1, ids.shape[1] - 1))
    padded = tokenize(tokenizer, ["a dog", "a red heart left of a dog"], 40).ids[0]
    assert group_words(tokenizer, padded) == [("a", [1]), ("dog", [2])]
    assert group_words(tokenizer, tokenizer("[DEC] two bees")["input_ids"]) == [("two", [2]), ("bees", [3])]
    assert [w for w, _ in group_words(tokenizer, tokenizer("两只蜜蜂")["input_ids"])] == list("两只蜜蜂")
    assert [word for word, _ in group_words(gpt2, gpt2(" a dogs")["input_ids"])] == ["a", "dogs"]


def test_clip_style_marks():
    class Clip:
        vocabulary = {"<|s|>": 0, "a</w>": 1, "mush": 2, "room</w>": 3, "dog</w>": 4}
        all_special_ids, mask_token_id = [0], None

        def convert_ids_to_tokens(self, ids):
            return [list(self.vocabulary)[i] for i in ids]

        def get_vocab(self):
            return self.vocabulary

        def decode(self, ids):
            return "".join(self.convert_ids_to_tokens(ids)).replace("</w>", " ")

    assert group_words(Clip(), [0, 1, 2, 3, 4, 0]) == [("a", [1]), ("mushroom", [2, 3]), ("dog", [4])]


def test_saved_and_loaded_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "mine")
    again = load_tokenizer(tmp_path / "mine")
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert group_words(again, again("two bees")["input_ids"]) == [("two", [1]), ("bees", [2])]


def test_a_folder_without_tokenizer_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        load_tokenizer(tmp_path / "nowhere")


def test_the_bundled_tokenizer_is_what_training_gives(tokenizer):
    made = train_tokenizer(*sample_texts())
    assert json.dumps(made.get_vocab(), sort_keys=True) == json.dumps(tokenizer.get_vocab(), sort_keys=True)


# What recipes never mask: the special tokens, then
# a an are is of photo picture the there to in on and with at this image
CONTENT_FREE = (*range(7), 45, 376, 379, 443, 458, 465, 466, 497, 498, 500, 843, 848, 873, 876, 891, 1115, 1148)


def test_content_free_ids_of_our_tokenizer(tokenizer):
    assert content_free_ids(tokenizer) == CONTENT_FREE
    assert content_free_ids(tokenizer, ()) == tuple(range(7))
    words = {tokenizer.convert_ids_to_tokens(i) for i in CONTENT_FREE[7:]}
    assert FUNCTION_WORDS - words == {"it", "that"}  # which our tokenizer splits


def test_content_free_ids_of_any_tokenizer(gpt2, slow):
    tokens = set(gpt2.convert_ids_to_tokens(list(content_free_ids(gpt2))))
    assert {"<|endoftext|>", "a", "Ġa"} <= tokens and not {"Ġdog", "Ġleft", "o"} & tokens
    assert content_free_ids(slow) == (0, 1, 2, 3, 4, 5)
    made = pieces_tokenizer()
    vocabulary = made.get_vocab()
    assert set(content_free_ids(made)) == {*range(7), *(vocabulary[w] for w in FUNCTION_WORDS if w in vocabulary)}


def test_special_tokens_of_any_tokenizer(tokenizer, gpt2, slow):
    assert SpecialTokens.of(tokenizer) == SpecialTokens() and special_ids(tokenizer) == set(range(7))
    assert SpecialTokens.of(gpt2) == SpecialTokens(*[None] * 7)
    assert SpecialTokens.of(slow) == SpecialTokens(dec=None, enc=None)


def test_names_are_split_and_no_other_word_is():
    made = pieces_tokenizer()
    names = {noun: made.tokenize(noun) for noun in OBJECTS}
    assert sum(len(pieces) > 1 for pieces in names.values()) > 30 and len(names["butterfly"]) > 1
    whole = {*COLORS, *SHAPES, *SIZES, *"a an the two three left right above below there is are picture of".split()}
    assert all(made.tokenize(word) == [word] for word in whole)
    # else a recipe that never masks "a" would show the first piece of a name
    assert not FUNCTION_WORDS & {pieces[0] for pieces in names.values()}


def test_training_on_other_texts():
    made = train_tokenizer(["the quick brown fox"] * 5, whole=["zebra crossing"], size=450)
    assert made.tokenize("zebra crossing fox") == ["zebra", "crossing", "fox"]
    assert len(made) <= 450
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer(["a"], size=100)
