"""The loop and the checkpoints: learning, exact resume after a kill, and files that cannot be half written."""

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from minivlp.data.batch import Batch
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.evaluation.matching import FUNCTION_WORDS
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.models import MODELS
from minivlp.models.clip import CLIP, CLIPConfig
from minivlp.models.xvlm import XVLM, SwinConfig, XVLMConfig
from minivlp.training import checkpoint
from minivlp.training.checkpoint import (
    CheckpointError,
    load_model,
    load_tensors,
    save_model,
    set_weights,
    start_from,
    weights,
)
from minivlp.training.loop import Settings, fit, overfit_one_batch
from minivlp.training.optim import Muon, cosine, make_optimisers, orthogonalise
from minivlp.training.recipes import EMPTY, RECIPES


def tiny(seed=0) -> CLIP:
    torch.manual_seed(seed)
    block = BlockConfig(16, 2, 32)
    return CLIP(CLIPConfig(ImageConfig(16, 8, 1, block), TextConfig(20, 6, 1, block, causal=True), 8))


def batch_at(step: int) -> Batch:
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 20, (6, 5), generator=draw)
    images = torch.randn(6, 3, 16, 16, generator=draw)
    return Batch(images, ids, torch.ones(6, 5, dtype=torch.bool), torch.arange(6))


class Killed(BaseException):
    """Like a kill: nothing in the loop catches it."""


@pytest.mark.parametrize("kill_at", [1, 4, 5, 6, 11])
def test_a_killed_run_resumed_equals_the_unbroken_one_bit_for_bit(tmp_path, kill_at):
    settings = Settings(steps=12, warmup=2, save_every=5, validate_every=4)
    measures = lambda: {"weight": model.project_text.weight.sum().item()}  # noqa: E731
    model = tiny()
    torch.manual_seed(3)
    unbroken = fit(noisy(model), batch_at, settings, validate=measures, bar=False, device="cpu")
    wanted = {name: tensor.clone() for name, tensor in weights(model).items()}

    def kill(row):
        if row["step"] == kill_at:
            raise Killed

    model = tiny()
    torch.manual_seed(3)
    with pytest.raises(Killed):
        fit(
            noisy(model),
            batch_at,
            settings,
            validate=measures,
            on_step=[kill],
            run_dir=tmp_path,
            bar=False,
            device="cpu",
        )
    model = tiny(seed=9)  # a new process starts from anything
    torch.manual_seed(3 if kill_at < 5 else 77)
    if kill_at < 5:  # nothing saved yet: the run starts over
        model = tiny()
        torch.manual_seed(3)
    history = fit(noisy(model), batch_at, settings, validate=measures, run_dir=tmp_path, bar=False, device="cpu")
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, wanted[name]), name
    assert [row["loss"] for row in history.steps] == [row["loss"] for row in unbroken.steps]
    assert history.validation == unbroken.validation


def noisy(model):
    """Draw random numbers in every step, as masking does: their state must survive the resume."""
    plain = type(model).losses

    def losses(batch):
        batch.images = batch.images + 0.1 * torch.randn_like(batch.images)
        return plain(model, batch)

    model.losses = losses
    return model


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(tmp_path):
    settings = Settings(steps=3, save_every=2)
    fit(tiny(), batch_at, settings, run_dir=tmp_path, bar=False)
    again = fit(tiny(), lambda step: pytest.fail("trained again"), settings, run_dir=tmp_path, bar=False)
    assert len(again.steps) == 3
    with pytest.raises(CheckpointError, match="other settings"):
        fit(tiny(), batch_at, Settings(steps=4, save_every=2), run_dir=tmp_path, bar=False)


def test_the_stop_button_keeps_the_history_and_leaves_the_model_usable():
    def stop(row):
        if row["step"] == 2:
            raise KeyboardInterrupt

    model = tiny()
    history = fit(model, batch_at, Settings(steps=50), on_step=[stop], bar=False)
    assert history.interrupted and len(history.steps) == 3 and not model.training


def test_one_batch_can_be_learnt_by_heart():
    losses = overfit_one_batch(tiny(), batch_at(0), steps=60)
    assert losses[0] > 1.0 and losses[-1] < 0.1


def test_a_loss_that_is_no_number_stops_with_its_terms():
    model = tiny()
    model.losses = lambda batch: {"good": torch.tensor(1.0), "bad": model.log_scale * float("nan")}
    with pytest.raises(FloatingPointError, match="bad nan"):
        fit(model, batch_at, Settings(steps=2), bar=False)


def test_validation_is_not_training():
    model = tiny()
    seen = []
    fit(
        model,
        batch_at,
        Settings(steps=4, validate_every=2),
        validate=lambda: seen.append(model.training) or {},
        bar=False,
    )
    assert seen == [False, False]


def test_the_schedule_rises_then_falls():
    values = [cosine(step, 100, 10) for step in range(100)]
    assert values[0] == pytest.approx(0.1, rel=0.02) and max(values) == values[10 - 1] or values[10]
    assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False)) and 0.02 <= values[-1] < 0.03


def test_muon_steps_are_orthogonal_and_blocks_only():
    matrix = orthogonalise(torch.randn(3, 16, 48))
    spread = torch.linalg.svdvals(matrix)
    assert spread.min() > 0.5 and spread.max() < 1.4
    model = tiny()
    muon, adam = make_optimisers(model, 1e-3, 0.05, {"project_": 2.0})
    assert isinstance(muon, Muon)
    inner = {id(p) for group in muon.param_groups for p in group["params"]}
    assert inner == {id(p) for n, p in model.named_parameters() if "blocks." in n and p.ndim == 2}
    everything = [p for o in (muon, adam) for group in o.param_groups for p in group["params"]]
    assert len(everything) == len(list(model.parameters())) == len({id(p) for p in everything})
    double = [p for group in adam.param_groups if group["multiple"] == 2.0 for p in group["params"]]
    assert {id(p) for p in double} == {id(model.project_image.weight), id(model.project_text.weight)}


def test_muon_treats_fused_projections_as_the_squares_they_are():
    torch.manual_seed(0)
    fused = nn.Parameter(torch.randn(24, 8))
    parts = [nn.Parameter(p.clone()) for p in fused.detach().split(8)]
    gradient = torch.randn(24, 8)
    fused.grad = gradient.clone()
    for part, piece in zip(parts, gradient.split(8), strict=True):
        part.grad = piece.clone()
    Muon([fused], 0.1, 0.0).step()
    Muon(parts, 0.1, 0.0).step()
    assert torch.allclose(fused, torch.cat(list(parts)), atol=1e-6)


def test_a_model_comes_back_from_its_file(tmp_path):
    model = tiny().eval()
    save_model(model, tmp_path / "m.safetensors", trained_on="nothing")
    again = load_model(CLIP, tmp_path / "m.safetensors")
    assert again.config == model.config
    batch = batch_at(0)
    assert torch.equal(model.similarity(batch.images, batch.ids, batch.mask),
                       again.similarity(batch.images, batch.ids, batch.mask))  # fmt: skip
    assert load_tensors(tmp_path / "m.safetensors")[1]["trained_on"] == "nothing"


@pytest.mark.parametrize("preset", ["nano", "small", "paper"])
@pytest.mark.parametrize("model", MODELS)
def test_every_config_comes_back_from_json(model, preset):
    config = getattr(MODELS[model].Config, preset)()  # X-VLM's paper() has a subclass as its image tower
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert checkpoint.build_config(MODELS[model].Config, stored) == config


def test_a_model_with_another_kind_of_tower_comes_back_from_its_file(tmp_path):
    config = XVLMConfig.nano(50)
    block = dataclasses.replace(config.image.block, width=16)
    swin = SwinConfig(64, 16, 3, block, first_patch=8, depths=(1, 1), heads=(1, 2), window=4)
    model = XVLM(dataclasses.replace(config, image=swin)).eval()
    save_model(model, tmp_path / "m.safetensors")
    again = load_model(XVLM, tmp_path / "m.safetensors")
    images = torch.randn(2, 3, 64, 64)
    assert again.config == model.config
    assert torch.equal(again.encode_image(images), model.encode_image(images))


def test_wrong_keys_are_listed_in_groups(tmp_path):
    model, source = tiny(), dict(weights(tiny()))
    del source["log_scale"]
    source["surprise"] = torch.zeros(1)
    source["project_text.weight"] = torch.zeros(3, 3)
    before = model.project_image.weight.clone()
    source["project_image.weight"] = torch.ones_like(before)
    with pytest.raises(CheckpointError) as error:
        set_weights(model, source, "some.safetensors")
    for part in (
        "some.safetensors",
        "missing: log_scale",
        "not in this model: surprise",
        "(3, 3) there and (8, 16) here",
    ):
        assert part in str(error.value)
    assert torch.equal(model.project_image.weight, before), "nothing is copied when something does not fit"


@pytest.mark.parametrize("damage", ["absent", "cut", "text", "empty", "other model", "other config"])
def test_damaged_checkpoints_are_named(tmp_path, damage):
    path = tmp_path / "m.safetensors"
    save_model(tiny(), path)
    whole = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "other model":
        checkpoint.save_tensors(path, {}, {"model": "ViLT", "config": {}})
    elif damage == "other config":
        checkpoint.save_tensors(path, {}, {"model": "CLIP", "config": {"depth": 3}})
    else:
        path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"hello, world", "empty": b""}[damage])
    with pytest.raises(CheckpointError, match=str(path)):
        load_model(CLIP, path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_model(tiny(), path)
    old = path.read_bytes()

    def full_disk(tensors, target, metadata):
        target.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError):
        save_model(tiny(seed=1), path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def small_xvlm(seed=0, width=16) -> XVLM:
    torch.manual_seed(seed)
    block = BlockConfig(width, 2, 32)
    return XVLM(XVLMConfig(ImageConfig(16, 8, 1, block), TextConfig(20, 6, 1, block), 1, 8))


def test_a_model_starts_from_anothers_towers_and_keeps_its_own_heads(tmp_path):
    towers, model = small_xvlm(0), small_xvlm(1)
    heads = {name: tensor.clone() for name, tensor in weights(model).items() if "head" in name}
    save_model(towers, tmp_path / "towers.safetensors")
    copied = start_from(model, tmp_path / "towers.safetensors")
    own, theirs = weights(model), weights(towers)
    assert {name.split(".")[0] for name in copied} == {
        "image", "text", "fusion", "project_image", "project_text", "temperature",
    }  # fmt: skip
    assert all(torch.equal(own[name], theirs[name]) for name in copied)
    assert heads and all(torch.equal(own[name], heads[name]) for name in heads)


def test_towers_that_do_not_fit_change_nothing_and_are_named(tmp_path):
    save_model(small_xvlm(0, width=32), tmp_path / "wide.safetensors")
    model = small_xvlm(1)
    before = {name: tensor.clone() for name, tensor in weights(model).items()}
    with pytest.raises(CheckpointError, match=r"wide.safetensors do not fit XVLM: .*image"):
        start_from(model, tmp_path / "wide.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(model).items())
    checkpoint.save_tensors(tmp_path / "other.safetensors", {"something": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match="holds no towers"):
        start_from(model, tmp_path / "other.safetensors")


def test_a_recipe_mixes_batches_of_regions_and_of_pairs():
    recipe = replace(RECIPES["xvlm"]["quick"], batch_size=4, pairs_between=True, wrong_captions=True, frozen=("image",))
    tokenizer, scenes = load_tokenizer(), Scenes(20)
    batch_at = recipe.batches(scenes, tokenizer, seed=1)
    assert [batch_at(step).region_boxes is None for step in range(4)] == [False, True, False, True]
    assert torch.equal(batch_at(3).ids, recipe.batches(scenes, tokenizer, seed=1)(3).ids)
    assert batch_at(0).wrong_ids is not None
    model = recipe.build(XVLM, len(tokenizer))
    still = {name.split(".")[0] for name, param in model.named_parameters() if not param.requires_grad}
    assert still == {"image"}


def test_words_that_name_nothing_are_known_by_their_ids():
    vocabulary = load_tokenizer().get_vocab()
    assert sorted(EMPTY[7:]) == sorted(vocabulary[word] for word in FUNCTION_WORDS if word in vocabulary)
    assert EMPTY[:7] == tuple(range(7))
