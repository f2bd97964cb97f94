"""Checkpoints: files that are never half written, errors that say what is wrong, configs that survive JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minivlp.layers.swin import SwinConfig
from minivlp.objectives.momentum import MomentumConfig
from minivlp.papers import PAPERS
from minivlp.training import checkpoint
from minivlp.training.checkpoint import (
    CheckpointError,
    build_config,
    bundled,
    config_to_dict,
    init_from,
    load_model,
    load_tensors,
    save_model,
    set_weights,
    weights,
    without_random_init,
)


@dataclass(frozen=True)
class Masking:
    rate: float = 0.15
    never: tuple[int, ...] = (0, 1)


@dataclass(frozen=True)
class WordMasking(Masking):
    """The same fields, another class."""


@dataclass(frozen=True)
class SpanMasking(Masking):
    at_most: int = 3


@dataclass(frozen=True)
class Momentum:
    momentum: float = 0.995


@dataclass(frozen=True)
class Config:
    width: int = 8
    size: int | tuple[int, int] = 16
    masking: Masking = Masking()
    momentum: Momentum | None = None
    other: Momentum | Masking | None = None
    stages: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))


class Model(nn.Module):
    """Everything that matters here: random weights of every kind, tied weights, computed and stored buffers."""

    Config = Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.image = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.LayerNorm(width))
        self.text = nn.Embedding(20, width)
        self.token = nn.Parameter(torch.randn(width) * width**-0.5)
        self.itc_head = nn.Linear(width, 4)
        self.decoder = nn.Linear(width, 20)
        self.decoder.weight = self.text.weight
        nn.init.trunc_normal_(self.itc_head.weight, mean=1.0, std=0.1, a=0.8, b=1.2)
        self.register_buffer("positions", torch.arange(width).float().sin(), persistent=False)
        self.register_buffer("count", torch.ones(2))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.image[1](self.image[0](images).flatten(2).mT) + self.positions + self.token
        return self.decoder(tokens)


def model(seed: int = 0, **config) -> Model:
    torch.manual_seed(seed)
    return Model(Config(**config)).eval()


# ------------------------------------------------------------------------------------------------------------- files


def test_a_model_comes_back_from_its_file(tmp_path):
    one = model(masking=WordMasking(0.4), size=(16, 32))
    save_model(one, tmp_path / "m.safetensors", trained_on="nothing")
    again = load_model(Model, tmp_path / "m.safetensors")
    images = torch.randn(2, 3, 16, 16)
    assert again.config == one.config and not again.training
    assert torch.equal(again(images), one(images))
    assert load_tensors(tmp_path / "m.safetensors")[1]["trained_on"] == "nothing"


def test_half_precision_is_half_the_size(tmp_path):
    for name, float16 in (("whole", False), ("half", True)):
        save_model(model(width=256), tmp_path / name, float16=float16)
    assert (tmp_path / "half").stat().st_size < 0.51 * (tmp_path / "whole").stat().st_size
    again = load_model(Model, tmp_path / "half")
    assert again.text.weight.dtype == torch.float32
    assert torch.allclose(again.text.weight, model(width=256).text.weight, atol=2e-3)


def test_names_that_do_not_fit_are_listed_in_groups():
    one, source = model(), dict(weights(model()))
    del source["log_scale"]
    source["surprise"] = torch.zeros(1)
    source["itc_head.weight"] = torch.zeros(3, 3)
    before = one.token.clone()
    source["token"] = torch.ones_like(before)
    with pytest.raises(CheckpointError) as error:
        set_weights(one, source, "some.safetensors")
    for part in (
        "some.safetensors does not fit Model",
        "missing: log_scale",
        "not in this model: surprise",
        "itc_head.weight is (3, 3) there and (4, 8) here",
    ):
        assert part in str(error.value)
    assert torch.equal(one.token, before), "nothing is copied when something does not fit"


@pytest.mark.parametrize("damage", ["absent", "cut", "text", "empty", "other model", "other config", "other class"])
def test_damaged_checkpoints_are_named(tmp_path, damage):
    path = tmp_path / "m.safetensors"
    save_model(model(), path)
    whole = path.read_bytes()
    config = config_to_dict(Config()) | {"masking": {"rate": 0.1, "class": "Surprise"}}
    if damage == "absent":
        path.unlink()
    elif damage.startswith("other"):
        kind = "ViLT" if damage == "other model" else "Model"
        notes = {"model": kind, "config": {"depth": 3} if damage == "other config" else config}
        checkpoint.save_tensors(path, {}, notes)
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"hello, world", "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=str(path)):
        load_model(Model, path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_model(model(), path)
    old = path.read_bytes()

    def full_disk(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError):
        save_model(model(seed=1), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_an_unknown_bundled_checkpoint_is_named():
    with pytest.raises(CheckpointError, match="no bundled checkpoint 'no_such'"):
        bundled("no_such")


# ------------------------------------------------------------------------------------------------ no initialization


def test_loading_draws_no_random_numbers(tmp_path):
    save_model(model(), tmp_path / "m.safetensors")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_model(Model, tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_without_random_init_buffers_are_real_and_tied_weights_tied():
    with without_random_init():
        empty = Model(Config())
    assert torch.equal(empty.positions, model().positions) and torch.equal(empty.count, torch.ones(2))
    assert empty.decoder.weight is empty.text.weight
    assert torch.equal(empty.log_scale, model().log_scale)
    assert empty.text.weight.abs().max() == 0 and empty.token.abs().max() == 0
    assert Model(Config()).text.weight.std() > 0.5, "only within the block"


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.randn(3, 4, dtype=torch.float64),
        lambda: torch.rand((3, 4)),
        lambda: torch.randn_like(torch.ones(3, 4)),
        lambda: torch.randint(0, 5, (3, 4)),
        lambda: torch.randperm(12).view(3, 4),
        lambda: torch.normal(0.0, 1.0, (3, 4)),
        lambda: torch.empty(3, 4).uniform_(1, 2),
        lambda: torch.empty(3, 4).bernoulli_(),
        lambda: nn.init.orthogonal_(torch.empty(3, 4)),
        lambda: nn.init.kaiming_normal_(torch.empty(3, 4)),
        lambda: nn.init.trunc_normal_(torch.full((3, 4), torch.nan), 2.0, 0.5, 1.5, 2.5),
    ],
)
def test_every_way_to_draw_leaves_the_generator_alone(draw):
    before, plain = torch.get_rng_state(), draw()
    torch.set_rng_state(before)
    with without_random_init():
        result = draw()
    assert torch.equal(torch.get_rng_state(), before)
    assert result.shape == plain.shape == (3, 4) and result.dtype == plain.dtype


# ----------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(masking=WordMasking()),
        Config(masking=SpanMasking(at_most=5)),
        Config(momentum=Momentum(0.9)),
        Config(other=Momentum()),
        Config(other=Masking()),
        Config(other=WordMasking(never=())),
        Config(size=(32, 16), stages=()),
    ],
)
def test_a_config_comes_back_from_json(config):
    again = build_config(Config, json.loads(json.dumps(config_to_dict(config))))
    assert again == config and type(again.masking) is type(config.masking) and type(again.other) is type(config.other)


def test_the_class_is_stored_only_where_it_is_not_the_annotated_one():
    stored = config_to_dict(Config(masking=WordMasking(), momentum=Momentum()))
    assert stored["masking"]["class"] == "WordMasking" and "class" not in stored["momentum"] and "class" not in stored
    assert "class" not in config_to_dict(Config())["masking"]
    assert config_to_dict(Config(other=Momentum()))["other"]["class"] == "Momentum"


@pytest.mark.parametrize("preset", ["nano", "small", "paper"])
@pytest.mark.parametrize("name", PAPERS)
def test_every_models_config_comes_back_from_json(name, preset):
    kind = PAPERS[name].model_class().Config
    config = getattr(kind, preset)()  # X-VLM's paper() has a subclass as its image tower
    stored = json.loads(json.dumps(config_to_dict(config)))
    assert build_config(kind, stored) == config


def changed(name: str) -> Any:
    """A nano config of this paper; where it can be, not what its preset says."""
    config = PAPERS[name].model_class().Config.nano(50)
    if name == "xvlm":
        block = dataclasses.replace(config.image.block, width=16)
        swin = SwinConfig(64, 16, 3, block, first_patch=8, depths=(1, 1), heads=(1, 2), window=4)
        return dataclasses.replace(config, image=swin)
    if name == "albef":
        return dataclasses.replace(config, momentum=MomentumConfig(queue_size=64))
    return config


@pytest.mark.parametrize("name", PAPERS)
def test_every_model_comes_back_from_its_file_without_drawing(name, tmp_path):
    kind = PAPERS[name].model_class()
    one = kind(changed(name)).eval()
    save_model(one, tmp_path / "m.safetensors")
    before = torch.get_rng_state()
    again = load_model(kind, tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), before) and again.config == one.config
    of_one, of_again = dict(one.named_buffers()), dict(again.named_buffers())
    assert of_one.keys() == of_again.keys(), "those that are computed and not stored, too"
    assert all(torch.equal(tensor, of_again[key]) for key, tensor in of_one.items())
    assert weights(one).keys() == weights(again).keys(), "what is tied is tied"
    assert all(torch.equal(tensor, weights(again)[key]) for key, tensor in weights(one).items())


# -------------------------------------------------------------------------------------------------- parts of a model


class Follower(nn.Module):
    """A momentum model, as far as `init_from` knows it."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.copy = nn.Parameter(torch.zeros_like(student.token))

    def copy_from(self, student: nn.Module) -> None:
        self.copy.data.copy_(student.text.weight[0])


def test_a_model_is_initialized_from_anothers_towers_and_keeps_the_rest(tmp_path):
    towers, one = model(0), model(1)
    one.momentum_model = Follower(one)
    kept = {name: one.get_parameter(name).clone() for name in ("token", "decoder.bias", "log_scale")}
    save_model(towers, tmp_path / "towers.safetensors")
    copied = init_from(one, tmp_path / "towers.safetensors")
    assert {name.split(".")[0] for name in copied} == {"image", "text", "itc_head"}
    assert all(torch.equal(weights(one)[name], weights(towers)[name]) for name in copied)
    assert all(torch.equal(one.get_parameter(name), tensor) for name, tensor in kept.items())
    assert torch.equal(one.momentum_model.copy, towers.text.weight[0]), "the momentum model is a copy again"


def test_only_the_named_parts_are_taken(tmp_path):
    one = model(1)
    save_model(model(0), tmp_path / "towers.safetensors")
    assert init_from(one, tmp_path / "towers.safetensors", ("image.1.", "token")) == [
        "image.1.bias",
        "image.1.weight",
        "token",
    ]


def test_towers_that_do_not_fit_change_nothing_and_are_named(tmp_path):
    save_model(model(0, width=32), tmp_path / "wide.safetensors")
    one = model(1)
    before = {name: tensor.clone() for name, tensor in weights(one).items()}
    with pytest.raises(CheckpointError, match=r"wide.safetensors does not fit Model in image\.\* \(4\)"):
        init_from(one, tmp_path / "wide.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(one).items())
    checkpoint.save_tensors(tmp_path / "other.safetensors", {"something": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="holds no parameter whose name begins with image."):
        init_from(one, tmp_path / "other.safetensors")
    half = {name: tensor for name, tensor in weights(model(0)).items() if name != "image.0.bias"}
    checkpoint.save_tensors(tmp_path / "half.safetensors", half, {})
    with pytest.raises(CheckpointError, match="image.0.bias"):
        init_from(one, tmp_path / "half.safetensors")


def test_a_frozen_config_is_not_changed_by_storing_it():
    config = Config(masking=WordMasking())
    config_to_dict(config)["masking"]["rate"] = 9.0
    assert config == Config(masking=WordMasking()) and dataclasses.is_dataclass(config)
