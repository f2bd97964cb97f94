"""Training in stages: what each stage computes, what it trains, and what it must leave unchanged."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from minivlp.data.batch import Batch, Text
from minivlp.models.vlmo import VLMo, VLMoConfig
from minivlp.objectives.masking import IGNORE, MaskedTokens
from minivlp.training.loop import Settings, fit
from minivlp.training.stages import (
    ImageStage,
    TextStage,
    freeze_for_images,
    freeze_for_text,
    mask_blocks,
    patch_pixels,
    trainable,
    unfreeze,
)

VOCABULARY, LENGTH = 40, 7


def tiny(relative: bool = True, **changes) -> VLMo:
    nano = VLMoConfig.nano(VOCABULARY)
    block = dataclasses.replace(nano.image.block, width=32, heads=2, hidden=64, layer_scale=0.1)
    positions = {"sincos_positions": not relative, "relative_positions": relative}
    image = dataclasses.replace(nano.image, image_size=32, layers=3, block=block, **positions)
    text = dataclasses.replace(nano.text, context_length=LENGTH, layers=3, block=block)
    text = dataclasses.replace(text, position_std=None if relative else 0.2)
    return VLMo(dataclasses.replace(nano, image=image, text=text, vl_from=2, embed_width=16, **changes))


def batch_at(step: int, count: int = 6) -> Batch:
    draw = torch.Generator().manual_seed(step)
    ids = torch.randint(7, VOCABULARY, (count, LENGTH), generator=draw)
    images = torch.randn(count, 3, 4, 4, generator=draw).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return Batch(images, Text(ids, torch.ones(count, LENGTH, dtype=torch.bool)), torch.arange(count))


def train(stage: torch.nn.Module, steps: int = 4, batches=batch_at, **settings) -> list[float]:
    history = fit(stage, batches, Settings(steps=steps, warmup=1, **settings), bar=False, device="cpu")
    return [row["loss"] for row in history.steps]


def changed(model: VLMo, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}


def copy(model: VLMo) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------------ stages


@pytest.mark.parametrize("relative", [True, False])
def test_training_on_text_changes_what_stage_2_trains_and_nothing_else(relative):
    model = tiny(relative)
    freeze_for_text(model)
    before = copy(model)
    train(TextStage(model), weight_decay=0.5)  # decay alone would change what is frozen
    assert changed(model, before) == {name for name in before if model.learns_from_text(name)}
    unfreeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_training_on_images_changes_nothing_of_texts_and_pairs():
    model = tiny()
    before = copy(model)
    train(ImageStage(model), weight_decay=0.5)
    unchanged = before.keys() - changed(model, before)
    for name in unchanged:
        assert name.startswith(("joint.text_embed.", "mlm_head.", "match_head.", "itc_head")) or (
            ".experts." in name and ".experts.image." not in name
        ), name
    assert {name for name in before if ".experts.text." in name or ".experts.vl." in name} <= unchanged


@pytest.mark.parametrize("relative", [True, False])
def test_the_reverse_order_leaves_attention_unchanged_when_images_come_second(relative):
    model = tiny(relative)
    freeze_for_images(model)
    before = copy(model)
    train(ImageStage(model))
    names = changed(model, before)
    assert names == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".experts.image." in name for name in names)
    assert any(name.startswith("joint.image_embed.") for name in names)
    for name in names:
        assert "attention" not in name and "self_norm" not in name and "text_embed" not in name
        assert ".experts.text." not in name and ".experts.vl." not in name


def test_all_three_stages_in_a_row():
    model = tiny(False)
    train(ImageStage(model), 2)
    freeze_for_text(model)
    train(TextStage(model), 2)
    unfreeze(model)
    before = copy(model)
    train(model, 2)
    assert changed(model, before) == set(before)


def test_the_text_stage_reads_no_images():
    stage, batch = TextStage(tiny()), batch_at(0)
    ids = batch.text.ids
    masked = MaskedTokens(batch.text, torch.where(torch.arange(LENGTH) == 2, ids, IGNORE))
    alone = stage.losses(dataclasses.replace(batch, images=None), masked)["mlm"]
    assert torch.equal(stage.losses(batch, masked)["mlm"], alone)
    logits = stage.model.mlm_head(stage.model.encode_text(batch.text)[:, 2])
    assert torch.allclose(alone, F.cross_entropy(logits, ids[:, 2]))
    assert len(train(stage, 2, lambda step: dataclasses.replace(batch_at(step), images=None))) == 2


def test_padding_and_short_texts_do_not_change_the_text_loss():
    """Texts of different length are computed in groups; the result is that of each text alone."""
    stage = TextStage(tiny())
    lengths = torch.tensor([3, 7, 4, 7, 3, 5])
    text = Text(batch_at(0).text.ids, torch.arange(LENGTH) < lengths[:, None])
    labels = torch.full_like(text.ids, IGNORE)
    labels[torch.arange(6), lengths - 2] = torch.arange(6) + 7
    labels[1, 2] = 20
    labels[4] = IGNORE
    together = stage.losses(Batch(None, text, torch.arange(6)), MaskedTokens(text, labels))["mlm"]
    losses = []
    for row in range(6):
        one = text[row : row + 1].trimmed()
        logits = stage.model.mlm_head(stage.model.encode_text(one))[0]
        asked = labels[row, : one.length] != IGNORE
        losses += F.cross_entropy(logits[asked], labels[row, : one.length][asked], reduction="none").tolist()
    assert len(losses) == 6 and together.item() == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_an_interrupted_stage_resumes_where_it_was(tmp_path):
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
            stage = ImageStage(tiny())  # a new process starts from other random weights
        fit(stage, batch_at, settings, run_dir=folder, bar=False, device="cpu")
        runs.append(stage.state_dict())
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


# ------------------------------------------------------------------------------------------------------------ pixels


def test_the_model_does_not_see_masked_patches():
    stage, batch = ImageStage(tiny()), batch_at(0)
    masked = mask_blocks(6, 4, 4, 0.5)
    pixels = masked.unflatten(1, (4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]  # (B, 1, H, W)
    other = torch.where(pixels, torch.randn_like(batch.images), batch.images)
    assert masked.any() and torch.equal(stage.predict(batch.images, masked), stage.predict(other, masked))
    joint = stage.model.joint
    assert not torch.equal(joint.embed_image(batch.images), joint.embed_image(other))


def test_the_pixel_loss_by_hand():
    stage, batch = ImageStage(tiny()), batch_at(1)
    masked = torch.zeros(6, 16, dtype=torch.bool)
    masked[2, 6] = masked[4, 3] = True
    loss = stage.losses(batch, masked)["mim"]
    joint = stage.model.joint
    tokens = joint(joint.embed_image(batch.images, masked, stage.mask_token), text=0)
    mean, std = batch.images.mean((0, 2, 3))[:, None, None], batch.images.std((0, 2, 3), correction=0)[:, None, None]
    expected = 0.0
    for row, patch in ((2, 6), (4, 3)):
        y, x = 8 * (patch // 4), 8 * (patch % 4)
        pixels = (batch.images[row, :, y : y + 8, x : x + 8] - mean) / std
        expected += (stage.pixel_head(tokens[row, 1 + patch]) - pixels.flatten()).square().mean().item() / 2
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_predicting_the_mean_color_has_a_loss_of_one():
    images = batch_at(0, 50).images * 0.3 + 0.5
    targets = patch_pixels(images, 8)
    assert targets.shape == (50, 16, 192) and targets.square().mean().item() == pytest.approx(1, abs=1e-3)
    assert patch_pixels(torch.full((2, 3, 32, 32), 0.25), 8).abs().max() < 1e-3, "a batch of one color is no NaN"


def test_masked_patches_of_one_batch_can_be_overfitted():
    stage, batch = ImageStage(tiny(False)), batch_at(0)
    masked = mask_blocks(6, 4, 4, 0.4)
    losses = stage.losses
    stage.losses = lambda batch: losses(batch, masked)
    values = train(stage, 60, lambda step: batch, lr=5e-3)
    assert values[0] > 0.8 and values[-1] < 0.75 * values[0]


def test_a_batch_without_masked_patches_has_a_loss_of_zero():
    stage = ImageStage(tiny(), rate=0.0)
    loss = stage.losses(batch_at(0))["mim"]
    loss.backward()
    assert loss.item() == 0 and all(p.grad is None or p.grad.isfinite().all() for p in stage.parameters())


def test_blocks_of_two_by_two_at_the_rate():
    masked = mask_blocks(400, 8, 8, 0.4).unflatten(1, (8, 8))
    blocks = masked.unflatten(1, (4, 2)).unflatten(3, (4, 2)).float().mean((2, 4))
    assert ((blocks == 0) | (blocks == 1)).all() and 0.37 < masked.float().mean() < 0.43
    assert mask_blocks(2, 3, 5, 1.0).shape == (2, 15) and mask_blocks(2, 3, 5, 1.0).all()
    assert not mask_blocks(2, 3, 5, 0.0).any()


def test_images_need_not_be_square():
    nano = VLMoConfig.nano(VOCABULARY)
    stage = ImageStage(VLMo(dataclasses.replace(nano, image=dataclasses.replace(nano.image, image_size=(32, 64)))))
    loss = stage.losses(dataclasses.replace(batch_at(0), images=torch.randn(6, 3, 32, 64)))["mim"]
    assert 0.5 < loss.item() < 2


# ------------------------------------------------------------------------------------------------------------ counts


def test_the_table_counts_every_parameter_once():
    model = tiny()
    everything = trainable(model)
    assert sum(count for _, count in everything.values()) == sum(p.numel() for p in model.parameters())
    assert all(trained == count for trained, count in everything.values())
    freeze_for_text(model)
    table = trainable(model)
    expected = {"text expert", "token embedding", "token types", "relative positions", "final LayerNorm", "MLM head"}
    assert {name for name, (trained, _) in table.items() if trained} == expected
    assert all(trained in (0, count) for trained, count in table.values()), "a component is trained as a whole"
    rest = {"patch embedding", "attention", "image expert", "vl expert", "ITM head", "ITC heads"}
    assert set(table) - expected == rest
    size = sum(p.numel() for p in model.joint.blocks[0].experts["text"].parameters())
    assert table["text expert"] == (3 * size, 3 * size) and table["image expert"] == (0, 3 * size)


def test_a_shared_expert_is_trained_on_text_too():
    model = tiny(shared_expert=True)
    freeze_for_text(model)
    assert trainable(model)["shared expert"][0] == trainable(model)["shared expert"][1] > 0
