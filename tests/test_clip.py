"""Our CLIP is the published one: equal to the golden numbers and to transformers' class, in float64, jittered."""

import json

import pytest
import torch
from safetensors.torch import load_file

from minivlp.data.batch import Batch
from minivlp.layers.attention import record_attention
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.models.clip import CLIP, CLIPConfig

pytestmark = pytest.mark.usefixtures("float64")


def from_transformers(state: dict, layers: int) -> dict:
    """transformers' names of CLIP's weights -> ours."""
    ours = {
        "log_scale": state["logit_scale"],
        "project_image.weight": state["visual_projection.weight"],
        "project_text.weight": state["text_projection.weight"],
        "image.patches.project.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "image.class_token": state["vision_model.embeddings.class_embedding"],
        "image.class_position": state["vision_model.embeddings.position_embedding.weight"][0],
        "image.positions": state["vision_model.embeddings.position_embedding.weight"][1:],
        "text.embed.words.weight": state["text_model.embeddings.token_embedding.weight"],
        "text.embed.positions": state["text_model.embeddings.position_embedding.weight"],
    }
    norms = {"image.norm_before": "vision_model.pre_layrnorm", "image.norm": "vision_model.post_layernorm"}
    norms["text.norm"] = "text_model.final_layer_norm"
    for tower, theirs in (("image", "vision_model"), ("text", "text_model")):
        for n in range(layers):
            a, b = f"{tower}.blocks.{n}", f"{theirs}.encoder.layers.{n}"
            norms |= {
                f"{a}.self_attention.out": f"{b}.self_attn.out_proj",
                f"{a}.self_norm": f"{b}.layer_norm1",
                f"{a}.feed_norm": f"{b}.layer_norm2",
                f"{a}.feed_forward.up": f"{b}.mlp.fc1",
                f"{a}.feed_forward.down": f"{b}.mlp.fc2",
            }
            for kind in ("weight", "bias"):
                parts = [state[f"{b}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
                ours[f"{a}.self_attention.qkv.{kind}"] = torch.cat(parts)
    for a, b in norms.items():
        for kind in ("weight", "bias"):
            ours[f"{a}.{kind}"] = state[f"{b}.{kind}"]
    return {name: value.double() for name, value in ours.items()}


def tiny(vocabulary=60, context=10) -> CLIP:
    image = BlockConfig(32, 4, 64, activation="quick_gelu")
    text = BlockConfig(24, 4, 48, activation="quick_gelu")
    return CLIP(
        CLIPConfig(
            ImageConfig(32, 8, 2, image, norm_before=True, patch_bias=False),
            TextConfig(vocabulary, context, 2, text, causal=True),
            16,
            diagonal_only=True,
        )
    )


@pytest.fixture
def golden_run(request):
    folder = request.path.parent / "golden"
    data = {k: v.double() if v.is_floating_point() else v for k, v in load_file(folder / "clip_hf.safetensors").items()}
    note = json.loads((folder / "clip_hf.json").read_text())
    model = tiny()
    state = {k.removeprefix("state."): v for k, v in data.items() if k.startswith("state.")}
    model.load_state_dict(from_transformers(state, 2))
    ids = data["in.input_ids"]
    mask = torch.arange(ids.shape[1])[None] <= data["in.eot_index"][:, None]
    return model, data, note["tolerance"]["default"], ids, mask


def test_every_golden_number(golden_run):
    model, data, tolerance, ids, mask = golden_run
    images = data["in.pixel_values"]
    seen = {}
    hook = model.image.blocks[-1].register_forward_hook(lambda m, i, out: seen.update(image_encoder_out=out))
    losses = model.losses(Batch(images, ids, mask, torch.arange(4)))
    hook.remove()
    losses["contrastive"].backward()
    logits = model.similarity(images, ids, mask)
    hidden = model.encode_text(ids, mask)
    truth = torch.arange(4)
    ours = seen | {
        "image_pooled": model.encode_image(images)[:, 0],
        "text_hidden": hidden,
        "text_pooled": hidden[torch.arange(4), data["in.eot_index"]],
        "image_feat": model.embed_images(images),
        "text_feat": model.embed_texts(ids, mask),
        "logits_per_image": logits,
        "scale": model.log_scale.exp(),
        "loss": losses["contrastive"],
        "loss_i2t": torch.nn.functional.cross_entropy(logits, truth),
        "loss_t2i": torch.nn.functional.cross_entropy(logits.T, truth),
        "grad.logit_scale": model.log_scale.grad,
        "grad.text_projection.weight": model.project_text.weight.grad,
        "grad.visual_projection.weight": model.project_image.weight.grad,
        "grad.vision_model.embeddings.class_embedding": model.image.class_token.grad,
        "grad.text_model.final_layer_norm.weight": model.text.norm.weight.grad,
    }
    assert {f"out.{name}" for name in ours} == {name for name in data if name.startswith("out.")}
    for name, value in ours.items():
        assert (value - data[f"out.{name}"]).abs().max() <= tolerance, name


def test_what_follows_the_end_of_text_does_not_matter(golden_run):
    model, _, _, ids, mask = golden_run
    noise = torch.where(mask, ids, torch.randint(0, 50, ids.shape))
    assert torch.equal(model.embed_texts(ids, mask), model.embed_texts(noise, mask))


def test_equals_transformers_with_other_sizes_and_a_longer_patch_grid():
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
    reference = transformers.CLIPModel(config).eval()
    for p in reference.parameters():
        p.data += 0.05 * torch.randn_like(p)
    ours = CLIP(
        CLIPConfig(
            ImageConfig(48, 16, 3, BlockConfig(32, 4, 64, "quick_gelu"), norm_before=True, patch_bias=False),
            TextConfig(99, 12, 3, BlockConfig(24, 2, 48, "quick_gelu"), causal=True),
            20,
        )
    )
    ours.load_state_dict(from_transformers(reference.state_dict(), 3))
    ids = torch.randint(1, 90, (5, 12))
    lengths = torch.tensor([12, 4, 7, 9, 2])
    mask = torch.arange(12)[None] < lengths[:, None]
    ids[torch.arange(5), lengths - 1] = 98
    ids[~mask] = 98  # pad equals end-of-text, as in the released tokenizer
    images = torch.randn(3, 3, 48, 48)
    theirs = reference(input_ids=ids, attention_mask=mask.long(), pixel_values=images)
    assert torch.allclose(ours.similarity(images, ids, mask), theirs.logits_per_image, atol=1e-10)


@pytest.mark.parametrize("preset", ["nano", "small", "paper"])
def test_presets_build_and_the_paper_has_its_published_size(preset):
    with torch.device("meta"):
        model = CLIP(getattr(CLIPConfig, preset)())
    count = sum(p.numel() for p in model.parameters())
    assert preset != "paper" or count == 151_277_313
    assert preset != "nano" or count < 2_000_000


def test_the_scale_is_clamped_after_a_step_and_can_be_fixed():
    model = tiny()
    model.log_scale.data.fill_(9.0)
    model.after_step()
    assert model.log_scale.exp().item() == pytest.approx(100)
    fixed = CLIP(CLIPConfig(model.config.image, model.config.text, 16, learn_temperature=False))
    assert not fixed.log_scale.requires_grad and fixed.log_scale.exp().item() == pytest.approx(1 / 0.07)


def test_attention_is_recorded_by_short_names():
    model = tiny()
    with record_attention(model) as maps:
        model.similarity(torch.randn(2, 3, 32, 32), torch.ones(2, 5, dtype=torch.long), torch.ones(2, 5).bool())
    assert set(maps) == {"image.0.self", "image.1.self", "text.0.self", "text.1.self"}
    assert maps["image.1.self"].shape == (2, 4, 17, 17)


def test_two_captions_of_one_image_are_both_right_unless_the_paper_is_followed():
    model = tiny()
    images = torch.randn(3, 3, 32, 32)  # two crops of one picture, and another picture
    batch = Batch(images, torch.randint(1, 60, (3, 5)), torch.ones(3, 5).bool(), torch.tensor([4, 4, 7]))
    paper = model.losses(batch)["contrastive"]
    ours = CLIP(CLIPConfig(model.config.image, model.config.text, 16))
    ours.load_state_dict(model.state_dict())
    assert not torch.isclose(paper, ours.losses(batch)["contrastive"])
