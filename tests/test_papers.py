"""Adding a paper takes one file and one row; evaluation and command line know a model by its verbs."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import toy_paper
from torch import nn

from minivlp.__main__ import main
from minivlp.data.folders import Photos
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.device import PROFILES
from minivlp.evaluation.suite import measure
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.papers import PAPERS, paper
from minivlp.pretrained import load, save_pretrained
from minivlp.training.checkpoint import load_model
from minivlp.training.recipes import Recipe
from minivlp.zoo import zoo

NOTEBOOKS = Path(__file__).parents[1] / "notebooks" / "src"
TOY = PAPERS.pop("toy")  # only the tests that ask for it see it


@pytest.fixture
def toy(monkeypatch):
    """The paper of tests/toy_paper.py, as README shows it, on few scenes."""
    monkeypatch.setitem(PAPERS, "toy", TOY)
    monkeypatch.setitem(toy_paper.RECIPES, "quick", replace(toy_paper.RECIPES["quick"], scenes=48))
    monkeypatch.setattr("minivlp.commands.EVALUATION_SCENES", 40)


# -------------------------------------------------------------------------------------------------------- add a paper


def test_info_lists_an_added_paper(toy, capsys):
    assert main(["info"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("toy ")]
    assert "encode_image encode_text embed_images similarity " in line


def test_an_added_paper_trains_resumes_is_evaluated_and_loads(toy, tmp_path, capsys):
    out, tokenizer = tmp_path / "run", load_tokenizer()
    assert main(["train", "toy", "--out", str(out)]) == 0
    assert "text to image R@1" in capsys.readouterr().out
    assert main(["evaluate", "toy", "--weights", str(out / "model.safetensors")]) == 0
    assert "counterfactual: mean" in capsys.readouterr().out
    model = load_model(toy_paper.Toy, out / "model.safetensors")
    save_pretrained(model, tmp_path / "saved", tokenizer)
    again = load("toy", tmp_path / "saved").model
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again.embed_images(images), model.embed_images(images))


def test_an_added_paper_takes_a_frozen_tower_of_timm(toy, tmp_path):
    how = ["--data", "photos", "--batch", "4", "--steps", "2", "--out", str(tmp_path / "run")]
    assert main(["train", "toy", "--tower", "test_convnext", "--frozen", *how]) == 0
    model = load_model(toy_paper.Toy, tmp_path / "run" / "model.safetensors")
    assert model.config.image.name == "test_convnext"
    (tokens,) = (tmp_path / "features").glob("*.f16")  # the first token of each photo alone: the loss reads no other
    assert tokens.stat().st_size == 2 * len(Photos()) * model.config.image.block.width


def test_the_loss_of_the_added_paper_falls_on_one_batch(toy):
    """At first nearly every pair counts as no match: the loss is about 10 per row; its least is 0."""
    from minivlp.training.loop import overfit_one_batch

    torch.manual_seed(0)
    tokenizer, recipe = load_tokenizer(), TOY.recipe("quick")
    model = recipe.build(TOY.model_class(), tokenizer)
    batch = recipe.batches(Scenes(16), tokenizer, model=model)(0)
    losses = overfit_one_batch(model, batch, steps=30)
    assert 5 < losses[0] < 30 and losses[-1] < losses[0] / 3


def test_evaluate_without_weights_says_that_none_are_bundled(toy, capsys):
    assert main(["evaluate", "toy"]) == 1
    assert "no bundled checkpoint 'toy_nano'" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("name", PAPERS)
def test_everything_that_a_row_names_is_there(name):
    row = paper(name)
    kind = row.model_class()
    assert row.name == name and issubclass(kind, nn.Module) and row.related_classes()[0] is kind
    assert [isinstance(row.recipe(profile), Recipe) for profile in PROFILES] == [True] * 3
    assert row.release_list() and row.weights
    assert not row.lesson or list(NOTEBOOKS.glob(f"{row.lesson}_*.py")), "a paper may be without a lesson"
    assert all(getattr(kind.Config, preset)() for preset in ("nano", "small", "paper"))


def test_an_unknown_paper_is_refused_with_a_list():
    with pytest.raises(ValueError, match="'clipp'; there are: albef, blip"):
        paper("clipp")


def test_the_table_has_no_verb_that_a_model_does_not_have():
    verbs = {row["model"]: set(row["verbs"].split()) for row in zoo()}
    assert "generate" in verbs["blip"] and "caption_logprob" in verbs["blip"] and "mlm_logits" not in verbs["blip"]
    assert verbs["vilt"] == {"cross_encode", "match", "mlm_logits"} and "ground" in verbs["xvlm"]
    assert verbs["clip"] == {"encode_image", "encode_text", "embed_images", "similarity"}


# ---------------------------------------------------------------------------------- models without most of the verbs


@dataclass(frozen=True)
class NoConfig:
    image: ImageConfig = ImageConfig.nano()
    text: TextConfig = TextConfig.nano()


class Captioner(nn.Module):
    """It writes the same caption for every image, and can do nothing else."""

    config = NoConfig()

    def generate(self, images, *args, **kwargs):
        text = load_tokenizer()("a red heart", add_special_tokens=False, return_tensors="pt")["input_ids"]
        return text.expand(len(images), -1)


class Nothing(nn.Module):
    config = NoConfig()


def test_a_model_that_only_writes_is_measured_by_its_captions(scenes_of_eight):
    """Without `match` and `embed_images` there is no retrieval and nothing to tell counterfactuals by."""
    scores = measure(Captioner(), scenes_of_eight, load_tokenizer())
    assert {name.split(":")[0] for name in scores} == {"caption"}
    assert "caption: BLEU-4" in scores and all(math.isfinite(float(score)) for score in scores.values())
    assert not measure(Captioner(), Scenes(1), load_tokenizer()), "one image has no other image's caption beside it"


def test_a_model_without_verbs_has_no_scores(scenes_of_eight):
    assert measure(Nothing(), scenes_of_eight, load_tokenizer()) == {}


@pytest.fixture(scope="module")
def scenes_of_eight():
    return Scenes(8)
