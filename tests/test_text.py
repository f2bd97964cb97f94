"""The tokenizer: scene words whole, nothing lost, and one way to call ours and anybody's."""

import json
import random
import unicodedata

import pytest
import torch

from minivlp.data.grammar import COLORS, OBJECTS, SHAPES, SIZES
from minivlp.data.noise import JUNK
from minivlp.data.scenes import Scenes
from minivlp.data.text import SPECIAL, encode, load_tokenizer, pieces_tokenizer, sample_texts, train_tokenizer, words
from minivlp.evaluation.matching import FUNCTION_WORDS


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A tokenizer as GPT-2's: byte-level BPE, an end token, no padding token, nothing wrapped around."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(["a dog left of a cat"] * 3, vocab_size=280, special_tokens=["<|endoftext|>"])
    return PreTrainedTokenizerFast(tokenizer_object=learned._tokenizer, eos_token="<|endoftext|>")


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
    told = tokenizer.decode(ids, skip_special_tokens=True)
    want = unicodedata.normalize("NFKC", text).lower()
    assert told.replace(" ", "") == want.replace(" ", "")


def test_decoding_gives_the_caption_back(tokenizer):
    for text in ("a red heart left of two bees", "一个红色爱心在一只狗的左边", "what colour is the ring?"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer("A Red  HEART")["input_ids"] == tokenizer("a red heart")["input_ids"]


def test_encode_pads_to_the_longest_and_cuts_before_sep(tokenizer):
    ids, mask = encode(tokenizer, ["a dog", "a red heart left of a dog", ""], 6)
    assert ids.shape == mask.shape == (3, 6) and ids.dtype == torch.long and mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [4, 6, 2]
    assert (ids[~mask] == tokenizer.pad_token_id).all()
    assert [ids[row, mask[row]][-1].item() for row in range(3)] == [2, 2, 2]
    assert encode(tokenizer, ["a dog"], 40)[0].shape == (1, 4)
    assert encode(tokenizer, [], 40)[0].shape == (0, 0)


def test_encode_explains_what_is_not_a_list_of_texts(tokenizer):
    with pytest.raises(TypeError, match="put it in a list"):
        encode(tokenizer, "a dog", 8)
    with pytest.raises(TypeError, match="text 1 is NoneType"):
        encode(tokenizer, ["a dog", None], 8)


def test_a_tokenizer_without_padding_works_and_is_not_changed(gpt2):
    ids, mask = encode(gpt2, ["a dog left", "a"], 16)
    assert mask[1].sum() == 1 and mask[0].all()
    assert (ids[~mask] == gpt2.eos_token_id).all()
    assert gpt2.pad_token is None


def test_words_group_pieces(tokenizer, gpt2):
    ids, _ = encode(tokenizer, ["a rhinoceros left of [MASK], süß"], 40)
    found = words(tokenizer, ids[0])
    assert [word for word, _ in found] == ["a", "rhinoceros", "left", "of", "[MASK]", ",", "süß"]
    assert [place for _, places in found for place in places] == list(range(1, ids.shape[1] - 1))
    padded = encode(tokenizer, ["a dog", "a red heart left of a dog"], 40)[0][0]
    assert words(tokenizer, padded) == [("a", [1]), ("dog", [2])]
    assert words(tokenizer, tokenizer("[DEC] two bees")["input_ids"]) == [("two", [2]), ("bees", [3])]
    assert [w for w, _ in words(tokenizer, tokenizer("两只蜜蜂")["input_ids"])] == list("两只蜜蜂")
    assert [word for word, _ in words(gpt2, gpt2(" a dogs")["input_ids"])] == ["a", "dogs"]


def test_words_know_clip_style_marks():
    class Clip:
        vocabulary = {"<|s|>": 0, "a</w>": 1, "mush": 2, "room</w>": 3, "dog</w>": 4}
        all_special_ids, mask_token_id = [0], None

        def convert_ids_to_tokens(self, ids):
            return [list(self.vocabulary)[i] for i in ids]

        def get_vocab(self):
            return self.vocabulary

        def decode(self, ids):
            return "".join(self.convert_ids_to_tokens(ids)).replace("</w>", " ")

    assert words(Clip(), [0, 1, 2, 3, 4, 0]) == [("a", [1]), ("mushroom", [2, 3]), ("dog", [4])]


def test_saved_and_loaded_again(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "mine")
    again = load_tokenizer(tmp_path / "mine")
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert words(again, again("two bees")["input_ids"]) == [("two", [1]), ("bees", [2])]


def test_a_folder_without_tokenizer_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        load_tokenizer(tmp_path / "nowhere")


def test_the_shipped_tokenizer_is_what_training_gives(tokenizer):
    made = train_tokenizer(*sample_texts())
    assert json.dumps(made.get_vocab(), sort_keys=True) == json.dumps(tokenizer.get_vocab(), sort_keys=True)


def test_names_fall_to_pieces_and_nothing_else_does():
    made = pieces_tokenizer()
    names = {noun: made.tokenize(noun) for noun in OBJECTS}
    assert sum(len(pieces) > 1 for pieces in names.values()) > 30 and len(names["butterfly"]) > 1
    whole = {*COLORS, *SHAPES, *SIZES, *"a an the two three left right above below there is are picture of".split()}
    assert all(made.tokenize(word) == [word] for word in whole)
    # or a recipe that never hides "a" would leave the first piece of a name standing
    assert not FUNCTION_WORDS & {pieces[0] for pieces in names.values()}


def test_training_on_other_texts():
    made = train_tokenizer(["the quick brown fox"] * 5, whole=["zebra crossing"], size=450)
    assert made.tokenize("zebra crossing fox") == ["zebra", "crossing", "fox"]
    assert len(made) <= 450
    with pytest.raises(ValueError, match="too small"):
        train_tokenizer(["a"], size=100)
