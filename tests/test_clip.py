"""Our CLIP is the published one: the golden numbers and those of transformers, in float64, all weights changed."""

import pytest
import torch
from released import Comparison, released_model
from small_models import (
    assert_exact_without_shortcuts,
    jittered,
    longer,
    recorded_maps,
    small_model,
    some_batch,
    some_texts,
)
from torch.nn.functional import cross_entropy

from minivlp.data.batch import Batch, Text
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.transformer import BlockConfig
from minivlp.models.clip import CLIP, CLIPConfig

pytestmark = pytest.mark.usefixtures("float64")


def config_of(size: int, patch: int, layers: int, heads: tuple[int, int], vocabulary: int, context: int, width: int):
    """A small CLIP with the choices of the paper."""
    image = BlockConfig(32, heads[0], 64, activation="quick_gelu")
    text = BlockConfig(24, heads[1], 48, activation="quick_gelu")
    return CLIPConfig(
        ImageConfig(size, patch, layers, image, ln_pre=True, patch_bias=False),
        TextConfig(vocabulary, context, layers, text, causal=True),
        width,
        diagonal_only=True,
    )


GOLDEN = config_of(32, 8, 2, (4, 4), 60, 10, 16)


@pytest.fixture
def golden_run(golden):
    g = golden("clip_hf")
    ids = g.inputs["input_ids"]
    mask = torch.arange(ids.shape[1])[None] <= g.inputs["eot_index"][:, None]
    return released_model("clip", g.state, GOLDEN), g, Text(ids, mask)


def test_every_golden_number(golden_run):
    model, g, text = golden_run
    same, images, own = Comparison(g), g.inputs["pixel_values"], torch.arange(4)
    outputs = []
    hook = model.image.blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    tokens, hidden = model.encode_image(images), model.encode_text(text)
    hook.remove()
    same("image_encoder_out", outputs[0])
    same("image_pooled", tokens[:, 0])
    same("text_hidden", hidden)
    same("text_pooled", hidden[own, g.inputs["eot_index"]])
    same("image_feat", model.embed_images(images))
    same("text_feat", model.embed_texts(text))
    logits = model.similarity(images, text)
    same("logits_per_image", logits)
    same("scale", model.itc_head.scale())
    same("loss_i2t", cross_entropy(logits, own))
    same("loss_t2i", cross_entropy(logits.T, own))
    losses = model.losses(Batch(images, text, own))
    same("loss", losses["itc"])
    losses["itc"].backward()
    same.gradients("clip", model)
    assert same.done == set(g.outputs) and set(losses) == {"itc"}


def test_what_follows_the_end_of_text_does_not_matter(golden_run):
    model, _, text = golden_run
    noise = text.with_ids(torch.where(text.mask, text.ids, torch.randint(0, 50, text.ids.shape)))
    assert torch.equal(model.embed_texts(text), model.embed_texts(noise))
    assert torch.allclose(model.embed_texts(text), model.embed_texts(longer(text, 0)))


def test_equals_transformers_with_other_sizes_and_a_larger_patch_grid():
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        text_config=dict(
            vocab_size=99, hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=12, eos_token_id=98, bos_token_id=97, pad_token_id=98,
        ),
        vision_config=dict(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=48,
            patch_size=16,
        ),
        projection_dim=20,
    )  # fmt: skip
    reference = jittered(transformers.CLIPModel(config).eval())
    ours = released_model("clip", reference.state_dict(), config_of(48, 16, 3, (4, 2), 99, 12, 20))
    ids = torch.randint(1, 90, (5, 12))
    lengths = torch.tensor([12, 4, 7, 9, 2])
    mask = torch.arange(12)[None] < lengths[:, None]
    ids[torch.arange(5), lengths - 1] = 98
    ids[~mask] = 98  # pad equals end-of-text, as in the released tokenizer
    images = torch.randn(3, 3, 48, 48)
    theirs = reference(input_ids=ids, attention_mask=mask.long(), pixel_values=images)
    assert torch.allclose(ours.similarity(images, Text(ids, mask)), theirs.logits_per_image, atol=1e-10)


@pytest.mark.parametrize("preset", ["nano", "small", "paper"])
def test_presets_build_and_the_paper_has_its_published_size(preset):
    with torch.device("meta"):
        model = CLIP(getattr(CLIPConfig, preset)())
    count = sum(p.numel() for p in model.parameters())
    assert preset != "paper" or count == 151_277_313
    assert preset != "nano" or count < 2_000_000


def test_the_scale_is_clamped_after_a_step_and_can_be_fixed():
    model = CLIP(GOLDEN)
    model.itc_head.scale.log_scale.data.fill_(9.0)
    model.after_step()
    assert model.itc_head.scale().item() == pytest.approx(100)
    fixed = CLIP(CLIPConfig(GOLDEN.image, GOLDEN.text, 16, learn_temperature=False))
    assert not fixed.itc_head.scale.log_scale.requires_grad
    assert fixed.itc_head.scale().item() == pytest.approx(1 / 0.07)


def test_attention_is_recorded_by_short_names_and_for_all_queries():
    """Also where only the last token is read."""
    model, batch = small_model(CLIP), some_batch(2)
    maps = recorded_maps(model, lambda: model.similarity(batch.images, batch.text))
    layers = {"image": 3, "text": 2}
    assert set(maps) == {f"{tower}.{n}.self" for tower, count in layers.items() for n in range(count)}
    assert all(maps[f"image.{n}.self"].shape == (2, 2, 17, 17) for n in range(3))
    assert all(maps[f"text.{n}.self"].shape == (2, 2, 9, 9) for n in range(2))


def test_two_captions_of_one_image_are_both_positives_unless_the_paper_is_followed():
    paper = CLIP(GOLDEN)
    images = torch.randn(3, 3, 32, 32)  # two crops of one picture, and another picture
    text = Text(torch.randint(1, 60, (3, 5)), torch.ones(3, 5).bool())
    batch = Batch(images, text, torch.tensor([4, 4, 7]))
    ours = CLIP(CLIPConfig(GOLDEN.image, GOLDEN.text, 16))
    ours.load_state_dict(paper.state_dict())
    assert not torch.isclose(paper.losses(batch)["itc"], ours.losses(batch)["itc"])


def test_losses_and_gradients_are_those_of_all_tokens_of_all_texts():
    assert_exact_without_shortcuts(small_model(CLIP), some_batch(6))


def test_tokens_of_a_frozen_tower_take_the_place_of_images():
    model, batch = small_model(CLIP), some_batch()
    tokens = Batch(None, batch.text, batch.image_ids, image_tokens=model.encode_image(batch.images))
    assert torch.allclose(model.losses(tokens)["itc"], model.losses(batch)["itc"], atol=1e-12)


def test_vectors_and_loss_are_float32_under_autocast():
    """A cosine in bfloat16 has three digits."""
    torch.set_default_dtype(torch.float32)
    model, batch, text = small_model(CLIP), some_batch(), some_texts(3)
    exact = model.losses(batch)["itc"]
    with torch.autocast("cpu", torch.bfloat16):
        images, texts = model.embed_images(batch.images), model.embed_texts(text)
        logits, loss = model.similarity(batch.images, text), model.losses(batch)["itc"]
    assert all(value.dtype == torch.float32 for value in (images, texts, logits, loss))
    for vectors in (images, texts):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-6)
    assert torch.allclose(logits, model.itc_head.scale() * images @ texts.T, atol=1e-5)  # not rounded on the way
    assert not torch.equal(logits, logits.bfloat16().float())
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_in_another_dtype(dtype):
    torch.set_default_dtype(torch.float32)
    model, batch = small_model(CLIP), some_batch()
    expected = model.embed_images(batch.images) @ model.embed_texts(batch.text).T
    model.to(dtype)
    cosines = model.embed_images(batch.images.to(dtype)).float() @ model.embed_texts(batch.text).float().T
    assert torch.allclose(cosines, expected, atol=0.1)
