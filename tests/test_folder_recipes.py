"""What a model is trained with on a folder of real pictures, and that the command line does it by default."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from test_real_folder import flickr8k
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minivlp.__main__ import main
from minivlp.data.batch import Text, to_tensor
from minivlp.data.folders import Folder, open_folder
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer, tokenize
from minivlp.data.tokenizer_training import folder_tokenizer
from minivlp.evaluation import suite
from minivlp.evaluation.suite import measure, untrained_verbs
from minivlp.models.blip import BLIP
from minivlp.models.clip import CLIP
from minivlp.models.xvlm import XVLM
from minivlp.objectives.masking import WordDropout
from minivlp.papers import PAPERS
from minivlp.training import recipes
from minivlp.training.build import build_model
from minivlp.training.cached import token_cache
from minivlp.training.optim import Muon, make_optimizers
from minivlp.training.recipes import FEWEST_STEPS, LAYERS_FROM
from minivlp.training.tokenizer_of_run import kept_tokenizer, open_tokenizer, tokenizer_fingerprint

FLICKR8K = 6000  # pictures of its training split


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def dual(tokenizer, pictures: int = FLICKR8K, frozen: bool = True) -> CLIP:
    recipe = PAPERS["clip"].folder_recipe("laptop", pictures, frozen)
    return build_model(CLIP, recipe, tokenizer, tower="test_resnet", frozen=frozen)


def trained_parts(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---------------------------------------------------------------------------------------------------------- the recipe


def test_thousands_of_pictures_get_a_mean_of_words_and_nothing_else(tokenizer):
    model = dual(tokenizer)
    parts = {"text.embed.token.weight", "itc_head.project_image.weight", "itc_head.project_text.weight"}
    assert trained_parts(model) == parts | {"itc_head.scale.log_scale"}
    words = model.text.embed.token.weight
    assert words.shape == (len(tokenizer), 512) and 0.019 < words.std() < 0.021
    assert model.itc_head.project_text.weight.shape == (512, 512) and model.config.embed_width == 512
    assert model.itc_head.scale().item() == pytest.approx(1 / 0.07)
    text = tokenize(tokenizer, ["a red heart left of a dog", "a dog"], 56)
    by_hand = [words[ids[real]].mean(dim=0) for ids, real in zip(text.ids, text.mask, strict=True)]
    expected = F.normalize(torch.stack(by_hand) @ model.itc_head.project_text.weight.T, dim=-1)
    assert torch.allclose(model.eval().embed_texts(text), expected, atol=1e-6)


def test_it_is_trained_for_twenty_epochs_of_batches_of_128_without_decay(tokenizer):
    recipe = PAPERS["clip"].folder_recipe("laptop", FLICKR8K, True).sized(FLICKR8K)
    settings = recipe.settings()
    assert (recipe.batch_size, settings.steps, settings.lr, settings.warmup) == (128, 20 * 46, 2e-3, 50)
    assert recipe.vocabulary == 8000
    (optimizer,) = make_optimizers(dual(tokenizer), settings.lr, settings.weight_decay, {})
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)


def test_tens_of_thousands_of_pictures_get_transformer_layers(tokenizer):
    model = dual(tokenizer, LAYERS_FROM)
    assert len(model.text.blocks) == 2 and model.config.text.causal and not model.config.mean_text
    assert 0.018 < model.text.embed.token.weight.std() < 0.022 and 0.018 < model.text.embed.position.std() < 0.022
    assert any(isinstance(optimizer, Muon) for optimizer in make_optimizers(model, 2e-3, 0.05, {}))
    recipe = PAPERS["clip"].folder_recipe("laptop", LAYERS_FROM, True).sized(LAYERS_FROM)
    assert recipe.steps == 12 * (LAYERS_FROM // 128)


def test_a_tower_that_is_trained_keeps_all_of_its_features(tokenizer):
    recipe = PAPERS["clip"].folder_recipe("laptop", FLICKR8K, False)
    assert dual(tokenizer, frozen=False).config.image_dropout == 0
    assert dual(tokenizer).config.image_dropout == 0.5
    assert recipe.batch_size == recipes.CLIP["laptop"].batch_size, "a batch of 128 through a large tower needs a GPU"


@pytest.mark.parametrize("profile", ["quick", "laptop", "gpu"])
@pytest.mark.parametrize("name", sorted(PAPERS))
def test_nothing_that_is_made_for_scenes_is_left(name, profile, tokenizer):
    paper = PAPERS[name]
    recipe = paper.folder_recipe(profile, FLICKR8K, False)
    with torch.device("meta"):
        config = recipe.build(paper.model_class(), tokenizer).config
    assert config.text.word_std == (0.1 if name == "blip" else 0.02)
    assert config.text.position_std in (None, 0.02, 0.05)
    assert (recipe.init_from, recipe.frozen, recipe.negative_captions) == (None, (), False)
    of_paper = getattr(paper.model_class().Config.nano(), "masking", None)
    if of_paper is not None:
        assert config.masking.rate == of_paper.rate and len(config.masking.never_mask) <= 7


def test_blip_becomes_a_captioner(tokenizer):
    recipe = PAPERS["blip"].folder_recipe("laptop", FLICKR8K, True)
    config = recipe.build(BLIP, tokenizer).config
    assert config.losses == ("lm",) and config.momentum is None
    assert (config.text.word_std, config.text.position_std) == (0.1, 0.05)
    assert (recipe.vocabulary, recipe.batch_size, recipe.lr) == (4000, 64, 2e-3)
    assert recipe.sized(FLICKR8K).steps == 10 * (FLICKR8K // 64)


def test_epochs_steps_and_batches_of_ones_own():
    recipe = PAPERS["clip"].folder_recipe("laptop", FLICKR8K, True)
    assert recipe.sized(1000, epochs=3).steps == 3 * 7
    assert recipe.sized(1000, batch_size=10, epochs=3).steps == 300
    assert recipe.sized(1000, epochs=3, steps=5).steps == 5
    assert recipe.sized(40).batch_size == 40 and recipe.sized(40).steps == FEWEST_STEPS
    scenes = recipes.CLIP["laptop"]
    assert scenes.sized(12_000).steps == scenes.steps and scenes.sized(12_000, epochs=2).steps == 2 * 187


# ------------------------------------------------------------------------------------------------------------- dropout


def test_a_fifth_of_the_words_is_replaced_and_no_special_token():
    ids = torch.randint(0, 100, (400, 50))
    text = Text(ids, torch.ones_like(ids, dtype=torch.bool))
    dropped = WordDropout(0.2, mask_id=3, never_mask=(0, 1, 2, 3)).drop(text)
    replaced, may = dropped.ids != ids, ids > 3
    assert (dropped.ids[replaced] == 3).all() and not replaced[~may].any()
    assert replaced[may].float().mean() == pytest.approx(0.2, abs=0.01)
    assert torch.equal(dropped.mask, text.mask) and torch.equal(dropped.word, text.word)


def test_dropout_acts_in_training_only(tokenizer):
    scenes, model = Scenes(8), dual(tokenizer)
    batch = Loader(scenes, tokenizer, 8, 160, image_tokens=token_cache(model, scenes)).batch(0)
    losses = {mode: [model.train(mode).losses(batch)["itc"].item() for _ in range(3)] for mode in (False, True)}
    assert len(set(losses[False])) == 1 and len(set(losses[True])) == 3


def test_cached_features_give_the_loss_of_the_pictures_themselves(tokenizer):
    scenes, model = Scenes(8), dual(tokenizer).eval()
    cached = Loader(scenes, tokenizer, 8, 160, image_tokens=token_cache(model, scenes)).batch(0)
    plain = Loader(scenes, tokenizer, 8, 160).batch(0)
    assert cached.images is None and cached.image_tokens.shape[1] == 1, "only the pooled vector is kept"
    assert float(model.losses(cached)["itc"]) == pytest.approx(float(model.losses(plain)["itc"]), abs=1e-3)


def test_equal_captions_stay_positives_when_words_are_dropped(tokenizer):
    """The dropped words differ, so the texts that the tower reads differ; what belongs together does not."""
    model = dual(tokenizer).train()
    batch = Loader(Scenes(8), tokenizer, 8, 160).batch(0)
    batch.text = tokenize(tokenizer, ["a red heart left of a blue star"] * 8, 56)
    assert model.encode(batch).positives.all()


@pytest.mark.parametrize(
    "special, id", [({"unk_token": "?", "mask_token": "#"}, 3), ({"unk_token": "?"}, 2), ({}, None)]
)
def test_word_dropout_with_any_tokenizer(special, id):
    inner = Tokenizer(models.WordLevel({"a": 0, "star": 1, "?": 2, "#": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    masking = dual(PreTrainedTokenizerFast(tokenizer_object=inner, **special)).config.masking
    assert masking is None if id is None else (masking.mask_id == id and id in masking.never_mask)


# -------------------------------------------------------------------------------------------------------- the tokenizer


def folder_of(tmp_path, captions: list[str]) -> Folder:
    rows = []
    for n, caption in enumerate(captions):
        Image.new("RGB", (8, 8), (n, n, n)).save(tmp_path / f"{n}.png")
        rows.append(json.dumps({"file": f"{n}.png", "caption": caption}, ensure_ascii=False))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return open_folder(f"folder:{tmp_path}")


def test_words_of_the_captions_become_tokens(tmp_path):
    made = folder_tokenizer(folder_of(tmp_path, ["a snowboarder jumps", "two snowboarders wait"] * 20), 8000)
    assert made.tokenize("Two snowboarders jumps") == ["two", "snowboarders", "jumps"]
    assert len(made) < 700, "few captions have few pieces"


@pytest.mark.parametrize(
    "captions, text, tokens",
    [
        (["一只湿漉漉的狗", "两只猫在红色的椅子上", "孩子骑自行车"], "红色的自行车", 6),
        (["一张photo里有狗", "一张photo里有猫"], "一张photo", 3),
        (["犬が走る", "犬が座る"], "犬が走る", 4),
    ],
)
def test_chinese_and_japanese_characters_are_tokens(captions, text, tokens, tmp_path):
    made = folder_tokenizer(folder_of(tmp_path, captions * 10), 8000)
    assert len(made.tokenize(text)) == tokens and made.unk_token_id not in made(text)["input_ids"]


# ---------------------------------------------------------------------------------------------------- what is measured


class Captions:
    """`measure` with the decoding that captions are written with."""

    def __init__(self, monkeypatch):
        self.decoding = []
        plain = suite.captions
        monkeypatch.setattr(suite, "captions", lambda *a, **k: self.decoding.append(k["decoding"]) or plain(*a, **k))


@pytest.mark.parametrize(
    "kind, losses, left",
    [
        (BLIP, ("lm",), ["embed_images", "similarity", "match"]),
        (BLIP, ("itc", "itm"), ["generate"]),
        (XVLM, ("itc", "box_giou"), ["match", "mlm_logits"]),
        (XVLM, ("box_l1",), ["embed_images", "similarity", "match", "mlm_logits", "embed_regions"]),
        (BLIP, ("itc", "itm", "lm"), []),
        (CLIP, ("itc",), []),
    ],
)
def test_verbs_whose_head_was_not_trained_are_known(kind, losses, left):
    with torch.device("meta"):
        assert untrained_verbs(kind(replace(kind.Config.nano(), losses=losses))) == left


def test_an_untrained_head_is_not_measured(tokenizer):
    scenes = Scenes(12, split="test")
    boxes = XVLM(replace(XVLM.Config.nano(), losses=("itc", "box_l1", "box_giou"))).eval()
    names = " ".join(measure(boxes, scenes, tokenizer))
    assert "R@1" in names and "Acc@0.5" in names and "counterfactual" not in names and "masked" not in names


def test_photographs_are_described_with_three_beams_and_scenes_greedily(tokenizer, tmp_path, monkeypatch):
    writer, asked = BLIP(replace(BLIP.Config.nano(), losses=("lm",))).eval(), Captions(monkeypatch)
    scores = measure(writer, folder_of(tmp_path, ["a dog", "two cats", "a cup"]), tokenizer)
    assert scores and all(name.startswith("caption: ") for name in scores)
    measure(writer, Scenes(3, split="test"), tokenizer)
    assert asked.decoding[0].beams == 3 and asked.decoding[1] is None


# -------------------------------------------------------------------------------------------------- by the command line


@pytest.fixture(scope="module")
def flickr(tmp_path_factory):
    """400 scenes in Flickr8k's layout, and a ResNet of timm with random weights whose features tell them apart."""
    root = tmp_path_factory.mktemp("flickr")
    folder = flickr8k(root / "flickr8k", 400)
    torch.manual_seed(0)
    tower = timm.create_model("test_resnet").train()
    for layer in tower.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None  # running statistics become plain means
            layer.reset_running_stats()
    train = open_folder(f"flickr:{folder}", split="train")
    with torch.no_grad():
        for _ in range(4):
            tower.forward_features(to_tensor(train.pixels(range(64), 160)))
    save_file({name: tensor.contiguous() for name, tensor in tower.state_dict().items()}, root / "tower.safetensors")
    data = ["--data", f"flickr:{folder}"]
    return data, [*data, "--tower", "test_resnet", "--tower-weights", str(root / "tower.safetensors"), "--frozen"]


def test_clip_on_a_folder_learns_to_search_and_evaluate_finds_its_tokenizer(flickr, tmp_path, capsys):
    data, how = flickr
    out = tmp_path / "run"
    assert main(["train", "clip", *how, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    scores = {line.split("  ")[0]: line.split() for line in printed.splitlines() if " R@" in line}
    for direction in ("image to text", "text to image"):
        value, chance = (float(scores[f"{direction} R@10"][place].rstrip(",")) for place in (4, 9))
        assert 0.2 < chance < 0.3 and value > 2 * chance, printed
    assert len((out / "log.jsonl").read_text().splitlines()) == FEWEST_STEPS
    made = kept_tokenizer(out)
    train = open_folder(data[1], split="train")
    assert tokenizer_fingerprint(made) == tokenizer_fingerprint(folder_tokenizer(train, 8000))
    assert tokenizer_fingerprint(made) != tokenizer_fingerprint(open_tokenizer())
    assert main(["evaluate", "clip", *data, "--weights", str(out / "model.safetensors")]) == 0
    again = capsys.readouterr().out
    assert all(line in again for line in printed.splitlines() if " R@" in line)


def test_epochs_are_honored_pictures_are_decoded_once_and_a_resumed_run_is_the_same(flickr, tmp_path, monkeypatch):
    _, how = flickr
    decoded, plain = [], Folder.pixels
    monkeypatch.setattr(Folder, "pixels", lambda self, rows, size: decoded.extend(rows) or plain(self, rows, size))
    monkeypatch.setattr("minivlp.commands.held_out_for", lambda *_: None)
    command = ["train", "clip", *how, "--epochs", "9", "--batch", "32"]
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    assert len((tmp_path / "whole" / "log.jsonl").read_text().splitlines()) == 9 * 10
    assert np.bincount(decoded).tolist() == [3, *[1] * 319]  # the first one also names the cache and its shape
    decoded.clear()

    from minivlp.training import loop

    step, calls = loop.train_step, []

    def killed(*given, **more):
        calls.append(1)
        if len(calls) == 61:  # after the save at step 50
            raise KeyboardInterrupt
        return step(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", killed)
        assert main([*command, "--out", str(tmp_path / "cut")]) == 130
    assert main([*command, "--out", str(tmp_path / "cut")]) == 0
    assert set(decoded) == {0}, "with features on disk no batch needs a picture"
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_epochs_and_steps_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        main(["train", "clip", "--epochs", "2", "--steps", "3"])
    assert "--steps" in capsys.readouterr().err


def test_blip_on_a_folder_says_what_it_was_not_trained_for(flickr, tmp_path, capsys):
    data, _ = flickr
    out = tmp_path / "run"
    how = [*data, "--subset", "20", "--steps", "2", "--batch", "8"]
    assert main(["train", "blip", *how, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "caption: CIDEr-D" in printed and "R@1" not in printed and not (out / "retrieval.html").exists()
    assert "trained with lm alone, so not measured: embed_images, similarity, match" in printed


def test_the_tokenizer_of_the_folder_can_be_replaced(flickr, tmp_path):
    data, _ = flickr
    load_tokenizer().save_pretrained(tmp_path / "ours")
    how = [*data, "--subset", "20", "--steps", "2", "--batch", "8", "--tokenizer", str(tmp_path / "ours")]
    assert main(["train", "clip", *how, "--out", str(tmp_path / "run")]) == 0
    assert tokenizer_fingerprint(kept_tokenizer(tmp_path / "run")) == tokenizer_fingerprint(open_tokenizer())
