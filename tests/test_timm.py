"""timm's models as towers: the same tokens as timm's own, to 1e-9, from images as our batches hold them."""

import dataclasses

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import RmsNorm

from minivlp.data.batch import Text
from minivlp.layers.timm_tower import (
    FeatureTower,
    TimmConfig,
    feature_tower,
    from_timm,
    open_timm,
    timm_tower,
)
from minivlp.layers.timm_weights import UnsupportedModel, encoder_from_timm
from minivlp.layers.towers import ImageEncoder
from minivlp.layers.transformer import BlockConfig
from minivlp.models.clip import CLIP, CLIPConfig
from minivlp.models.xvlm import XVLM, XVLMConfig
from minivlp.training.checkpoint import load_model, save_model

pytestmark = pytest.mark.usefixtures("float64")


def jittered(name, **changes):
    """timm's model with every weight and running mean changed: initial zeros and ones hide mistakes."""
    model = timm.create_model(name, num_classes=0, **changes).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
        for running in filter(torch.is_floating_point, model.buffers()):
            running.add_(0.05 * torch.rand_like(running))
    return model


def timm_tokens(model, images):
    """timm's tokens of our images, normalized as its own pipeline does: from 0..1, by mean and standard deviation."""
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        return model.forward_features(((images + 1) / 2 - mean) / std)


def some_images(height, width=None):
    return torch.rand(2, 3, height, width or height) * 2 - 1


@pytest.mark.parametrize(
    "name, changes",
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_patch16_224", {}),  # ImageNet's mean and standard deviation
        ("deit3_small_patch16_224", {}),  # LayerScale, and no position for the class token
        ("vit_base_patch32_clip_quickgelu_224", {"embed_dim": 64, "num_heads": 2}),  # a norm before, no patch bias
    ],
)
def test_a_vision_transformer_in_our_encoder_gives_timms_tokens(name, changes):
    model = jittered(name, depth=2, **changes)
    encoder = encoder_from_timm(model)
    images = some_images(224)
    with torch.no_grad():
        assert (encoder(images) - timm_tokens(model, images)).abs().max() < 1e-9
    assert encoder.config.image_size == 224 and type(encoder) is ImageEncoder


@pytest.mark.parametrize(
    "name, changes, why",
    [
        ("vit_small_patch14_reg4_dinov2", {}, "register tokens"),
        ("deit_tiny_distilled_patch16_224", {}, "dist_token"),
        ("vit_base_patch16_siglip_224", {}, "no class token"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "only the mean"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "attn.k_norm"),
        ("vit_tiny_patch16_224", {"norm_layer": RmsNorm}, "something else"),  # the same names, another formula
        ("vit_tiny_patch16_224", {"act_layer": torch.nn.SiLU}, "activation"),
    ],
)
def test_the_message_names_what_our_encoder_cannot_express(name, changes, why):
    model = timm.create_model(name, num_classes=0, depth=1, img_size=112, embed_dim=48, num_heads=2, **changes)
    with pytest.raises(UnsupportedModel, match=why):
        encoder_from_timm(model)


def test_an_encoder_of_images_that_are_not_square():
    model = jittered("vit_tiny_patch16_224", depth=2, embed_dim=48, num_heads=2, img_size=(64, 96))
    encoder, images = encoder_from_timm(model), some_images(64, 96)
    assert encoder.config.image_size == (64, 96) and encoder.config.grid == (4, 6)
    with torch.no_grad():
        assert (encoder(images) - timm_tokens(model, images)).abs().max() < 1e-9


def test_patches_that_are_not_square_are_not_supported():
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=1, img_size=64, patch_size=(16, 8), embed_dim=48, num_heads=2
    )
    with pytest.raises(UnsupportedModel, match=r"patches of \(16, 8\) pixels"):
        encoder_from_timm(model)


def test_from_timm_names_the_alternative():
    with pytest.raises(ValueError, match="test_convnext is no plain vision transformer.*timm_tower"):
        from_timm("test_convnext")


@pytest.mark.parametrize(
    "name, changes",
    [
        ("test_resnet", {}),
        ("test_convnext", {}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "embed_dim": 24}),  # channels last
    ],
)
def test_a_feature_map_is_read_row_by_row_with_its_mean_in_front(name, changes):
    model = jittered(name, **changes)
    tower = feature_tower(name, model)
    images = some_images(tower.config.image_size)
    with torch.no_grad():
        tokens, expected = tower(images), timm_tokens(model, images)
    if "swin" not in name:
        expected = expected.permute(0, 2, 3, 1)
    rows, columns, width = expected.shape[1:]
    assert tokens.shape == (2, 1 + rows * columns, width)
    assert (tokens[:, 1 + columns + 2] - expected[:, 1, 2]).abs().max() < 1e-9  # second row, third column
    assert (tokens[:, 0] - expected.mean(dim=(1, 2))).abs().max() < 1e-9
    config = tower.config
    assert config.block.width == width and config.grid == (rows, columns)
    assert config.patch_size == config.image_size // rows


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_a_feature_map_of_images_that_are_not_square(name):
    model = jittered(name)
    model.pretrained_cfg["input_size"] = (3, 96, 160)
    tower, images = feature_tower(name, model), some_images(96, 160)
    assert tower.config.image_size == (96, 160) and tower.config.grid == (3, 5) and tower.config.patch_size == 32
    with torch.no_grad():
        assert (tower(images)[:, 1:] - timm_tokens(model, images).flatten(2).transpose(1, 2)).abs().max() < 1e-9


def test_a_map_that_does_not_divide_the_image_is_refused():
    model = jittered("test_convnext")
    model.pretrained_cfg["input_size"] = (3, 96, 120)
    with pytest.raises(ValueError, match="test_convnext makes a map of 3 x 3 from 96 x 120 pixels"):
        feature_tower("test_convnext", model)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_only_the_tokens_that_are_read_are_returned(name):
    tower, images = timm_tower(name), some_images(160)
    with torch.no_grad():
        everything = tower(images)
        assert torch.allclose(tower(images, rows=slice(0, 1)), everything[:, :1], atol=1e-12)
        places = torch.tensor([[3, 0], [7, 7]])
        expected = torch.stack([everything[0, [3, 0]], everything[1, [7, 7]]])
        assert torch.allclose(tower(images, rows=places), expected, atol=1e-12)


def test_the_matrices_of_timms_blocks_are_declared_for_the_optimizer():
    model = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, depth=2, img_size=28, embed_dim=48)
    tower = FeatureTower(TimmConfig(28, 14, 0, BlockConfig(48, 1, 48), name="vit"), model)
    names = {parameter: name for name, parameter in tower.named_parameters()}
    declared = {
        names[parameter].removeprefix("model.blocks."): stacked for parameter, stacked in tower.block_matrices()
    }
    layers = {"attn.qkv": 3, "attn.proj": 1, "mlp.fc1": 1, "mlp.fc2": 1}
    assert declared == {f"{n}.{layer}.weight": count for n in range(2) for layer, count in layers.items()}


def test_pixels_are_normalized_by_a_module_that_can_be_replaced():
    """As in `ImageEmbedding` and `SwinEncoder`."""
    model = jittered("test_resnet")
    tower, images = feature_tower("test_resnet", model), some_images(160)
    tower.normalize = torch.nn.Identity()
    with torch.no_grad():
        patches = model.forward_features(images).flatten(2).transpose(1, 2)
        assert torch.equal(tower(images)[:, 1:], patches)
    assert not any(name.startswith("normalize") for name in tower.state_dict())


@pytest.mark.parametrize(
    "name, prefix, has_class", [("vit_small_patch14_reg4_dinov2", 5, True), ("vit_base_patch16_siglip_224", 0, False)]
)
def test_registers_are_left_out_and_the_class_token_stays(name, prefix, has_class):
    model = jittered(name, depth=1, img_size=112, embed_dim=48, num_heads=2)
    model.pretrained_cfg["input_size"] = (3, 112, 112)
    images = some_images(112)
    with torch.no_grad():
        tokens, expected = feature_tower(name, model)(images), timm_tokens(model, images)
    assert (tokens[:, 1:] - expected[:, prefix:]).abs().max() < 1e-9
    first = expected[:, 0] if has_class else expected.mean(dim=1)
    assert (tokens[:, 0] - first).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("form", ["safetensors", "pth", "pth without classifier"])
def test_weights_come_from_a_local_file(name, form, tmp_path):
    classes = 0 if "without" in form else 1000
    model = timm.create_model(name, num_classes=classes).eval()
    file = tmp_path / f"weights.{form[:3]}"
    if form == "safetensors":
        file = tmp_path / "weights.safetensors"
        save_file(model.state_dict(), file)
    else:
        torch.save({"model": model.state_dict()}, file)  # as DeiT's files wrap them
    tower = timm_tower(name, file)
    images = some_images(160)
    with torch.no_grad():
        expected = timm_tokens(model, images)
        expected = expected.flatten(2).transpose(1, 2) if expected.ndim == 4 else expected[:, 1:]
        assert (tower(images)[:, 1:] - expected).abs().max() < 1e-9


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="other.safetensors does not fit timm's test_vit"):
        timm_tower("test_vit", tmp_path / "other.safetensors")
    cut = {k: v for k, v in timm.create_model("test_vit").state_dict().items() if k != "norm.weight"}
    save_file(cut, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="norm.weight"):
        timm_tower("test_vit", tmp_path / "cut.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        timm_tower("test_vit", tmp_path / "nowhere.pth")


class Evil:
    def __reduce__(self):
        return print, ("code from a weights file ran",)


def test_no_code_in_a_weights_file_is_run(tmp_path, capsys):
    torch.save({"norm.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        timm_tower("test_vit", tmp_path / "evil.pth")
    assert "ran" not in capsys.readouterr().out


def test_without_a_network_the_message_says_what_to_do():
    with pytest.raises(FileNotFoundError, match="give it as weights"):
        timm_tower("test_vit", pretrained=True)


def test_an_unknown_name_gets_suggestions():
    with pytest.raises(ValueError, match="no model 'vit_tiny_patch16_244'.*vit_tiny_patch16_224"):
        open_timm("vit_tiny_patch16_244")


@pytest.mark.parametrize("kind, preset", [(CLIP, CLIPConfig.nano()), (XVLM, XVLMConfig.nano())])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_model_keeps_its_timm_tower_through_a_checkpoint(kind, preset, name, tmp_path):
    torch.set_default_dtype(torch.float32)
    tower = timm_tower(name)
    model = kind(dataclasses.replace(preset, image=tower.config)).eval()
    model.image.load_state_dict(tower.state_dict())
    save_model(model, tmp_path / "model.safetensors")
    again = load_model(kind, tmp_path / "model.safetensors")
    assert isinstance(again.config.image, TimmConfig) == isinstance(again.image, FeatureTower) == (name != "test_vit")
    images, ids = some_images(160), torch.full((2, 5), 9)
    with torch.no_grad():
        vectors = [m.embed_images(images) for m in (model, again)]
        assert torch.equal(*vectors)
        if kind is XVLM:
            boxes = torch.tensor([[0.5, 0.5, 1, 1], [0.2, 0.3, 0.4, 0.4]])  # the whole image, and a part
            whole, part = again.embed_regions(images[:1], boxes, torch.tensor([0, 0]))
            assert torch.allclose(whole, vectors[0][0], atol=1e-5) and not torch.allclose(whole, part, atol=1e-3)
            assert again.ground(images, Text(ids, ids > 0)).shape == (2, 4)
