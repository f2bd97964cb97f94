"""Recipes: the ids of the tokenizer in use, masked words, batches from a frozen tower, models with another tower."""

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import SpecialTokens, content_free_ids, load_tokenizer
from minivlp.data.tokenizer_training import pieces_tokenizer
from minivlp.models.albef import ALBEF
from minivlp.models.blip import BLIP
from minivlp.models.clip import CLIP
from minivlp.models.git import GIT
from minivlp.models.vilt import ViLT
from minivlp.models.vlmo import VLMo
from minivlp.models.xvlm import XVLM
from minivlp.objectives.masking import IGNORE, SpanMasking, TokenMasking, WordMasking
from minivlp.objectives.momentum import MomentumConfig
from minivlp.papers import PAPERS
from minivlp.training import recipes
from minivlp.training.build import build_model
from minivlp.training.recipes import Recipe, quick, with_ids_of

SCRATCH = quick(batch_size=4, steps=2)
# The ids of our tokenizer that masked language modeling leaves out in the scene world, as recipes once listed them.
EMPTY = (0, 1, 2, 3, 4, 5, 6, 45, 376, 379, 443, 458, 465, 466, 497, 498, 500, 843, 848, 873, 876, 891, 1115, 1148)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tokenizer with BERT's special tokens at BERT's ids, and words that it splits into pieces."""
    words = ["[PAD]", *(f"[unused{n}]" for n in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["a", "of", "there", "is", "red", "star", "but", "##ter", "##fly", *"bcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    file = tmp_path_factory.mktemp("bert") / "vocab.txt"
    file.write_text("\n".join(words), encoding="utf-8")
    found = BertTokenizerFast(str(file))
    found.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    return found


def without_special_tokens():
    """A tokenizer that knows words and nothing else."""
    inner = Tokenizer(models.WordLevel({"a": 0, "star": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


# ------------------------------------------------------------------------------------------- the ids of the tokenizer


def test_with_our_tokenizer_the_presets_stay_as_they_are(tokenizer):
    for paper in PAPERS.values():
        preset = paper.model_class().Config.nano(len(tokenizer))
        assert with_ids_of(tokenizer, preset) == preset, paper.name


@pytest.mark.parametrize("preset", ["nano", "small"])
def test_albef_may_mask_sep_with_every_tokenizer(bert, tokenizer, preset):
    """The paper's code leaves out [PAD] and [CLS] alone. The command line used to put all special tokens in."""
    recipe = replace(SCRATCH, preset=preset)
    assert recipe.build(ALBEF, tokenizer).config.masking == TokenMasking(mask_id=3, never_mask=(0, 1))
    assert recipe.build(ALBEF, bert).config.masking == TokenMasking(mask_id=103, never_mask=(0, 101))


def test_other_models_never_mask_a_special_token_of_the_tokenizer_in_use(bert):
    special = {0, 100, 101, 102, 103, len(bert) - 2, len(bert) - 1}
    for kind, masking in ((ViLT, WordMasking), (VLMo, WordMasking), (XVLM, SpanMasking)):
        config = SCRATCH.build(kind, bert).config
        assert config.text.vocabulary == len(bert)
        assert type(config.masking) is masking and config.masking.mask_id == 103
        assert set(config.masking.never_mask) == special, kind.__name__


def test_blip_writes_with_the_special_tokens_of_the_tokenizer_in_use(bert):
    expected = SpecialTokens(pad=0, cls=101, sep=102, mask=103, unk=100, dec=len(bert) - 2, enc=len(bert) - 1)
    assert SCRATCH.build(BLIP, bert).config.tokens == expected


def test_a_tokenizer_without_a_token_that_is_needed_is_refused_and_named():
    bare = without_special_tokens()
    for kind, missing in ((ALBEF, r"no \[MASK\]"), (BLIP, r"no \[PAD\], \[SEP\], \[DEC\], \[ENC\]")):
        with pytest.raises(ValueError, match=f"{kind.__name__} needs a tokenizer like BERT's.*{missing}"):
            SCRATCH.build(kind, bare)
    assert SCRATCH.build(CLIP, bare).config.text.vocabulary == 3  # needs none


@pytest.fixture(scope="module")
def plain(bert):
    """The same without [DEC] and [ENC]."""
    return BertTokenizerFast(vocab=dict(sorted(bert.vocab.items(), key=lambda item: item[1])[:-2]))


def test_git_begins_with_cls_and_needs_no_token_of_blip(plain):
    tokens = SCRATCH.build(GIT, plain).config.tokens
    assert (tokens.pad, tokens.cls, tokens.sep, tokens.dec) == (0, 101, 102, None)
    with pytest.raises(
        ValueError, match=r"GIT needs a tokenizer like BERT's: this one has no \[PAD\], \[CLS\], \[SEP\]"
    ):
        SCRATCH.build(GIT, without_special_tokens())


def test_a_special_token_that_a_tokenizer_lacks_need_not_be_excluded(plain):
    assert SpecialTokens.of(plain).dec is None
    assert set(SCRATCH.build(ViLT, plain).config.masking.never_mask) == {0, 100, 101, 102, 103}


# ------------------------------------------------------------------------------------------------------- masked words


@pytest.mark.parametrize("name", ["vilt", "albef", "vlmo"])
def test_scenes_mask_four_tenths_of_the_words_that_name_something(name, tokenizer):
    paper = PAPERS[name]
    for profile in ("quick", "laptop"):
        masking = paper.recipe(profile).build(paper.model_class(), tokenizer).config.masking
        assert type(masking) is (TokenMasking if name == "albef" else WordMasking)
        assert (masking.rate, masking.never_mask) == (0.4, EMPTY)
    of_paper = paper.model_class().Config.nano().masking
    assert paper.recipe("gpu").mask_rate is None and not paper.recipe("gpu").mask_content_only
    assert paper.recipe("laptop").for_folder().build(paper.model_class(), tokenizer).config.masking == of_paper


def test_words_that_say_nothing_are_found_in_another_tokenizer(bert):
    masking = replace(SCRATCH, mask_content_only=True).build(ALBEF, bert).config.masking
    never = set(bert.convert_ids_to_tokens(masking.never_mask))
    assert {"a", "of", "there", "is", "[PAD]", "[CLS]", "[SEP]", "[MASK]"} <= never
    assert not never & {"red", "star", "but", "##ter"}
    assert set(masking.never_mask) == set(content_free_ids(bert)) and masking.rate == 0.15


@pytest.mark.parametrize("kind", [ViLT, VLMo])
def test_a_recipe_masks_whole_words(kind):
    """All pieces of a word or none: with single pieces masked, "##fly" could be predicted from "butter"."""
    pieces, scenes = pieces_tokenizer(), Scenes(64)
    recipe = replace(SCRATCH, batch_size=64, mask_rate=0.4)
    model = recipe.build(kind, pieces)
    torch.manual_seed(0)
    encoded = model.encode(recipe.batches(scenes, pieces, model=model)(0))
    word, masked = encoded.batch.text.word, encoded.masked.labels != IGNORE
    split = 0
    for row in range(64):
        for number in range(int(word[row].max()) + 1):
            of_word = masked[row, word[row] == number]
            assert of_word.all() or not of_word.any()
            split += len(of_word) > 1 and bool(of_word.all())
    assert split > 10, "words of several pieces were among the masked ones"


# ------------------------------------------------------------------------------------------------------------ batches


def test_a_recipe_mixes_batches_of_regions_and_of_pairs(tokenizer):
    recipe = replace(recipes.XVLM["quick"], batch_size=4, pairs_between=True, negative_captions=True, frozen=("image",))
    batch_at = recipe.batches(Scenes(20), tokenizer, seed=1)
    assert [batch_at(step).regions is None for step in range(4)] == [False, True, False, True]
    assert torch.equal(batch_at(3).text.ids, recipe.batches(Scenes(20), tokenizer, seed=1)(3).text.ids)
    assert batch_at(0).negatives is not None
    model = recipe.build(XVLM, tokenizer)
    still = {name.split(".")[0] for name, param in model.named_parameters() if not param.requires_grad}
    assert still == {"image"}


def test_images_and_texts_have_the_size_that_the_model_takes(tokenizer):
    config = {"image": replace(CLIP.Config.nano().image, image_size=(32, 48))}
    recipe = replace(SCRATCH, config=config)
    model = recipe.build(CLIP, tokenizer)
    model.config = replace(model.config, text=replace(model.config.text, context_length=6))
    batch = recipe.batches(Scenes(8), tokenizer, model=model)(0)
    assert batch.images.shape == (4, 3, 32, 48) and batch.text.length == 6
    assert model.losses(batch)["itc"].isfinite()
    assert recipe.batches(Scenes(8), tokenizer)(0).images.shape == (4, 3, 64, 64)


FROZEN = replace(SCRATCH, frozen=("image",))
MOMENTUM = {"momentum": MomentumConfig(momentum=0.9, alpha=0.4, alpha_steps=1, queue_size=8)}


@pytest.mark.parametrize(
    "kind, recipe",
    [
        (CLIP, FROZEN),
        (ALBEF, replace(FROZEN, negative_captions=True)),
        (ALBEF, replace(FROZEN, config=MOMENTUM)),
        (BLIP, FROZEN),
        (GIT, FROZEN),
        (XVLM, replace(FROZEN, regions_per_image=2, pairs_between=True)),
        (XVLM, replace(FROZEN, regions_per_image=2, config={"region_blocks": 1})),
    ],
    ids=["clip", "albef", "momentum", "blip", "git", "xvlm", "reencoded regions"],
)
def test_a_frozen_tower_sees_each_image_once_and_the_losses_stay_the_same(kind, recipe, tokenizer, monkeypatch):
    torch.manual_seed(0)
    scenes, model, seen = Scenes(12), recipe.build(kind, tokenizer), []
    batch_at, plain_at = recipe.batches(scenes, tokenizer, model=model), recipe.batches(scenes, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(scenes, "pixels", lambda rows, size: seen.extend(rows) or Scenes.pixels(scenes, rows, size))
        for step in range(9):
            batch_at(step)
    if "region_blocks" not in recipe.config:  # else the tower's last blocks run once more for each region
        assert sorted(seen) == list(range(12))
        assert batch_at(0).images is None
    for step in range(2):
        losses = []
        for batch in (batch_at(step), plain_at(step)):
            torch.manual_seed(step)
            losses.append(torch.stack(list(model.eval().losses(batch).values())))
        assert torch.allclose(*losses, rtol=2e-3, atol=2e-3)


def test_a_tower_that_is_trained_sees_every_image(tokenizer):
    model = SCRATCH.build(CLIP, tokenizer)
    batch = SCRATCH.batches(Scenes(8), tokenizer, model=model)(0)
    assert batch.image_tokens is None and batch.images is not None


def test_the_losses_of_a_recipe_are_those_of_the_loader(tokenizer):
    """`batches` adds nothing of its own: same rows, same captions, same images."""
    scenes = Scenes(16)
    batch = SCRATCH.batches(scenes, tokenizer, seed=3)(2)
    expected = Loader(scenes, tokenizer, 4, 64, seed=3).batch(2)
    assert torch.equal(batch.images, expected.images) and torch.equal(batch.text.ids, expected.text.ids)


# ------------------------------------------------------------------------------------------------------------- models


def test_every_paper_has_three_recipes_that_build(tokenizer):
    for paper in PAPERS.values():
        for profile in ("quick", "laptop", "gpu"):
            recipe = paper.recipe(profile)
            assert isinstance(recipe, Recipe)
            with torch.device("meta"):
                preset = getattr(paper.model_class().Config, recipe.preset)(len(tokenizer))
                paper.model_class()(recipes.changed(preset, recipe.config))


def test_a_recipe_begins_with_the_bundled_towers(tokenizer):
    recipe = recipes.ALBEF["quick"]
    begun, fresh = recipe.build(ALBEF, tokenizer), replace(recipe, init_from=None).build(ALBEF, tokenizer)
    towers = recipes.load_model(XVLM, recipes.bundled("towers_nano"))
    assert torch.equal(begun.image.norm.weight, towers.image.norm.weight)
    assert not torch.equal(begun.image.norm.weight, fresh.image.norm.weight)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"frozen": True}, "no image tower of its own"),
        ({"tower": "test_vit"}, "no image tower of its own"),
    ],
)
def test_a_single_stream_has_no_tower_to_exchange(options, said, tokenizer):
    for kind in (ViLT, VLMo):
        with pytest.raises(ValueError, match=said):
            build_model(kind, SCRATCH, tokenizer, **options)


def test_a_tower_of_timm_takes_the_place_of_ours_also_in_the_momentum_model(tokenizer):
    recipe = replace(recipes.ALBEF["quick"], config=MOMENTUM)
    model = build_model(ALBEF, recipe, tokenizer, tower="test_vit", frozen=True)
    assert model.config.image.size == (160, 160) and model.config.momentum == MOMENTUM["momentum"]
    assert not any(parameter.requires_grad for parameter in model.image.parameters())
    own, momentum = model.image.state_dict(), model.momentum_model.model.image.state_dict()
    assert all(torch.equal(tensor, momentum[name]) for name, tensor in own.items())
    assert model.text.blocks[0].feed_forward.up.weight.requires_grad
