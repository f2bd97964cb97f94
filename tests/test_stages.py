"""Training in stages: what each stage asks, what it trains, and what it must leave alone."""

import dataclasses

import pytest
import torch

from minivlp.data.batch import Batch
from minivlp.models.vlmo import VLMo, VLMoConfig
from minivlp.objectives.masking import IGNORE, Masked
from minivlp.training.loop import Settings, fit
from minivlp.training.stages import (
    ImageStage,
    TextStage,
    expert_map,
    freeze_for_images,
    freeze_for_text,
    hide_squares,
    patch_pixels,
    trainable,
    unfreeze,
)

WORDS, LENGTH = 40, 7


def tiny(relative: bool = True, **changes) -> VLMo:
    nano = VLMoConfig.nano(WORDS)
    same = {"layers": 3, "block": dataclasses.replace(nano.image.block, width=32, heads=2, hidden=64)}
    image = dataclasses.replace(nano.image, image_size=32, sincos_positions=not relative, **same)
    text = dataclasses.replace(nano.text, context_length=LENGTH, **same)
    return VLMo(
        dataclasses.replace(nano, image=image, text=text, vl_from=2, embed_width=16, layer_scale=0.1, **changes)
    )


def batch_at(step: int, count: int = 6) -> Batch:
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(7, WORDS, (count, LENGTH), generator=draw)
    images = torch.randn(count, 3, 4, 4, generator=draw).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return Batch(images, ids, torch.ones(count, LENGTH, dtype=torch.bool), torch.arange(count))


def train(stage: torch.nn.Module, steps: int = 4, batches=batch_at, **settings) -> list[float]:
    history = fit(stage, batches, Settings(steps=steps, warmup=1, **settings), bar=False, device="cpu")
    return [row["loss"] for row in history.steps]


def moved(model: VLMo, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}


def copy(model: VLMo) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------------ stages


@pytest.mark.parametrize("relative", [True, False])
def test_training_on_texts_moves_all_that_may_learn_and_nothing_else(relative):
    model = tiny(relative)
    freeze_for_text(model)
    before = copy(model)
    train(TextStage(model), weight_decay=0.5)  # decay alone would move what is frozen
    assert moved(model, before) == {name for name in before if model.learns_from_text(name)}
    unfreeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_on_images_moves_nothing_of_texts_and_pairs():
    model = tiny()
    before = copy(model)
    train(ImageStage(model), weight_decay=0.5)
    left = {name for name in before if name not in moved(model, before)}
    for name in left:
        assert name.startswith(("words.", "word_head.", "pooler.", "match_head.", "project_", "log_scale")) or (
            ".experts." in name and ".experts.image." not in name
        ), name
    assert {name for name in before if ".experts.text." in name or ".experts.vl." in name} <= left


def test_all_three_stages_in_a_row():
    model = tiny(False)
    train(ImageStage(model), 2)
    freeze_for_text(model)
    train(TextStage(model), 2)
    unfreeze(model)
    before = copy(model)
    train(model, 2)
    assert moved(model, before) == set(before)


def test_the_text_stage_needs_no_images_and_forgets_those_of_the_batch():
    stage, batch = TextStage(tiny()), batch_at(0)
    masked = Masked(batch.ids, torch.where(torch.arange(LENGTH) == 2, batch.ids, IGNORE))
    alone = stage.losses(dataclasses.replace(batch, images=None), masked)["mlm"]
    assert torch.equal(stage.losses(batch, masked)["mlm"], alone)
    logits = stage.model.word_logits(stage.model.encode_text(batch.ids, batch.mask)[:, 2])
    assert torch.allclose(alone, torch.nn.functional.cross_entropy(logits, batch.ids[:, 2]))
    texts = lambda step: dataclasses.replace(batch_at(step), images=None)  # noqa: E731
    assert len(train(stage, 2, texts)) == 2


def test_a_stage_can_be_broken_off_and_goes_on_where_it_was(tmp_path):
    def stop(row):
        if row["step"] == 2:
            raise RuntimeError("killed")

    settings, runs = Settings(steps=4, warmup=1, save_every=1), []
    for folder in (None, tmp_path):
        torch.manual_seed(5)
        stage = ImageStage(tiny())
        if folder:
            with pytest.raises(RuntimeError):
                fit(stage, batch_at, settings, run_dir=folder, on_step=[stop], bar=False, device="cpu")
            stage = ImageStage(tiny())  # a new process begins with anything
        fit(stage, batch_at, settings, run_dir=folder, bar=False, device="cpu")
        runs.append(stage.state_dict())
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


# ----------------------------------------------------------------------------------------------------------- pixels


def test_hidden_patches_are_not_seen():
    stage, batch = ImageStage(tiny()), batch_at(0)
    hidden = hide_squares(6, 4, 4, 0.5)
    pixels = hidden.unflatten(1, (4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]  # (B, 1, H, W)
    other = torch.where(pixels, torch.randn_like(batch.images), batch.images)
    look = lambda images: stage.model.image_input(images, hidden, stage.hidden_patch)  # noqa: E731
    assert hidden.any() and torch.equal(look(batch.images), look(other))
    assert not torch.equal(stage.model.image_input(batch.images), stage.model.image_input(other))


def test_the_pixel_loss_by_hand():
    stage, batch = ImageStage(tiny()), batch_at(1)
    hidden = torch.zeros(6, 16, dtype=torch.bool)
    hidden[2, 6] = hidden[4, 3] = True
    loss = stage.losses(batch, hidden)["pixels"]
    tokens = stage.model.joint(stage.model.image_input(batch.images, hidden, stage.hidden_patch), words=0)
    mean, spread = batch.images.mean((0, 2, 3))[:, None, None], batch.images.std((0, 2, 3), correction=0)[:, None, None]
    wanted = 0.0
    for row, patch in ((2, 6), (4, 3)):
        y, x = 8 * (patch // 4), 8 * (patch % 4)
        pixels = (batch.images[row, :, y : y + 8, x : x + 8] - mean) / spread
        wanted += (stage.head(tokens[row, 1 + patch]) - pixels.flatten()).square().mean().item() / 2
    assert loss.item() == pytest.approx(wanted, rel=1e-4)


def test_who_knows_only_the_usual_colour_has_a_loss_of_one():
    images = batch_at(0, 50).images * 0.3 + 0.5
    targets = patch_pixels(images, 8)
    assert targets.shape == (50, 16, 192) and targets.square().mean().item() == pytest.approx(1, abs=1e-3)
    assert patch_pixels(torch.full((2, 3, 32, 32), 0.25), 8).abs().max() < 1e-3, "a batch of one colour is no NaN"


def test_hidden_patches_can_be_learnt_by_heart():
    stage, batch = ImageStage(tiny(False)), batch_at(0)
    hidden = hide_squares(6, 4, 4, 0.4)
    losses = stage.losses
    stage.losses = lambda batch: losses(batch, hidden)
    values = train(stage, 60, lambda step: batch, lr=5e-3)
    assert values[0] > 0.8 and values[-1] < 0.75 * values[0]


def test_a_batch_in_which_nothing_is_hidden_costs_nothing():
    stage = ImageStage(tiny(), rate=0.0)
    loss = stage.losses(batch_at(0))["pixels"]
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in stage.parameters())


def test_squares_of_two_by_two_at_the_rate():
    hidden = hide_squares(400, 8, 8, 0.4).unflatten(1, (8, 8))
    blocks = hidden.unflatten(1, (4, 2)).unflatten(3, (4, 2)).float().mean((2, 4))
    assert ((blocks == 0) | (blocks == 1)).all() and 0.37 < hidden.float().mean() < 0.43
    assert hide_squares(2, 3, 5, 1.0).shape == (2, 15) and hide_squares(2, 3, 5, 1.0).all()
    assert not hide_squares(2, 3, 5, 0.0).any()


# ----------------------------------------------------------------------------------------------------------- tables


def test_the_table_of_what_learns_counts_every_number_once():
    model = tiny()
    everything = trainable(model)
    assert sum(have for _, have in everything.values()) == sum(p.numel() for p in model.parameters())
    assert all(learn == have for learn, have in everything.values())
    freeze_for_text(model)
    table = trainable(model)
    learn = {"text expert", "words", "modality vectors", "relative positions", "final LayerNorm", "head for words"}
    assert {name for name, (some, _) in table.items() if some} == learn
    assert all(some in (0, have) for some, have in table.values()), "a component learns as a whole"
    assert set(table) - learn == {"patches", "attention", "image expert", "vl expert", "heads for pairs"}
    size = sum(p.numel() for p in model.joint.blocks[0].experts["text"].parameters())
    assert table["text expert"] == (3 * size, 3 * size) and table["image expert"] == (0, 3 * size)


def test_with_one_expert_for_all_it_learns_from_text_too():
    model = tiny(shared_expert=True)
    freeze_for_text(model)
    assert trainable(model)["shared expert"][0] == trainable(model)["shared expert"][1] > 0


def test_expert_map_tells_the_routes():
    model, batch = tiny(), batch_at(0)
    image = expert_map(model, lambda: model.encode_image(batch.images))
    assert image == [["image"] * 17] * 3
    assert expert_map(model, lambda: model.encode_text(batch.ids, batch.mask)) == [["text"] * LENGTH] * 3
    both = expert_map(model, lambda: model.match(batch.images, batch.ids, batch.mask))
    assert both == [["text"] * LENGTH + ["image"] * 17] * 2 + [["vl"] * (LENGTH + 17)]
    contrast = expert_map(model, lambda: model.joint.both(model.image_input(batch.images), 0))
    assert contrast == [["image"] * 17] * 2 + [["vl"] * 17], "the last of the two branches"
    shared = tiny(shared_expert=True)
    assert expert_map(shared, lambda: shared.encode_image(batch.images)) == [["shared"] * 17] * 3
    assert not any(block._forward_pre_hooks for block in model.joint.blocks), "no hook is left behind"


@pytest.mark.parametrize("relative", [True, False])
def test_the_other_way_round_images_leave_alone_what_texts_have_made(relative):
    model = tiny(relative)
    freeze_for_images(model)
    stage = ImageStage(model)
    before = copy(model)
    train(stage)
    changed = moved(model, before)
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed == learns
    assert any(".experts.image." in name for name in changed) and any(name.startswith("patches") for name in changed)
    for name in changed:
        assert "attention" not in name and "self_norm" not in name and "words" not in name
        assert ".experts.text." not in name and ".experts.vl." not in name
