"""What a released model's files say is followed, or refused by name: settings, pictures, wrappers, shards, damage."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minivlp.data.batch import Text
from minivlp.data.text import load_tokenizer
from minivlp.layers.timm_tower import timm_tower
from minivlp.models.clip import CLIP, CLIPConfig
from minivlp.pretrained import load, save_pretrained
from minivlp.pretrained.preprocess import pixel_statistics
from minivlp.pretrained.settings import HARMLESS
from minivlp.training.checkpoint import CheckpointError, init_from, load_model, save_model
from minivlp.weight_files import UnsupportedModel, near_names, read_weights, without_prefixes

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 1200, "width": 24, "heads": 2, "layers": 2}
MODEL = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT}


@pytest.fixture
def double(float64):
    """Values in float64: a wrong epsilon would not be seen in float32."""


def jittered(model):
    """Every weight changed: initial zeros and ones hide what is not read."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def contiguous(state):
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def open_clip_folder(folder, model=MODEL, preprocess=None, **further):
    """A folder as open_clip pushes it to the hub, and open_clip's own model."""
    reference = jittered(open_clip.CLIP(**copy.deepcopy(model)))
    save_file(contiguous(reference.state_dict()), folder / "open_clip_model.safetensors")
    settings = {"model_cfg": model, **({} if preprocess is None else {"preprocess_cfg": preprocess}), **further}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return reference


def with_settings(part, **changes):
    """`MODEL` with other settings in "vision_cfg", "text_cfg", or at the top (part "")."""
    model = copy.deepcopy(MODEL)
    (model[part] if part else model).update(changes)
    return model


def some_inputs(size=(32, 32)):
    ids = torch.randint(3, 1100, (4, 12))
    ids[:, -1] = 1199  # the largest id ends a text
    return torch.randn(3, 3, *size), Text(ids, torch.ones_like(ids, dtype=torch.bool))


def same_vectors(model, reference, size=(32, 32)):
    images, text = some_inputs(size)
    with torch.no_grad():
        theirs = reference.encode_image(images, normalize=True), reference.encode_text(text.ids, normalize=True)
        ours = model.embed_images(images), model.embed_texts(text)
    return all((a - b).abs().max() < 1e-10 for a, b in zip(ours, theirs, strict=True))


def small_clip(**changes):
    """transformers' CLIP of tiny sizes."""
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 1200, "max_position_embeddings": 12, "eos_token_id": 2, "bos_token_id": 1}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config={**vision, **changes}, projection_dim=20)
    return jittered(transformers.CLIPModel(config))


@pytest.fixture
def clip_folder(tmp_path):
    """A folder that transformers wrote."""
    small_clip().save_pretrained(tmp_path)
    return tmp_path


def edited(file, change):
    """Change the object of a JSON file in place."""
    settings = json.loads(file.read_text())
    change(settings)
    file.write_text(json.dumps(settings))


def pictures():
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 256, (*shape, 3), dtype=np.uint8))
        for shape in [(64, 32), (20, 50), (33, 31), (7, 90), (32, 32)]
    ]


# ------------------------------------------------------------------------------------------ open_clip: what it computes


@pytest.mark.parametrize(
    "part, changes",
    [
        ("", {"quick_gelu": True}),
        ("vision_cfg", {"image_size": [32, 32]}),
        ("vision_cfg", {"image_size": [32, 48]}),
        ("vision_cfg", {"patch_size": [8, 8]}),
        ("vision_cfg", {"no_ln_pre": True}),
        ("vision_cfg", {"ls_init_value": 0.3}),
        ("text_cfg", {"ls_init_value": 0.3}),
        ("vision_cfg", {"norm_kwargs": {"eps": 0.01}}),
        ("text_cfg", {"norm_kwargs": {"eps": 0.01}, "act_kwargs": {"approximate": "tanh"}}),
        ("vision_cfg", {"act_kwargs": {"approximate": "tanh"}, "mlp_ratio": 2.5}),
        ("vision_cfg", {"final_ln_after_pool": True, "patch_dropout": 0.5, "pos_embed_type": "sin_cos_2d"}),
        ("text_cfg", {"pool_type": "eos", "eos_id": 1199}),
        ("", {"nonscalar_logit_scale": True}),
    ],
)
def test_switches_of_open_clip_that_we_can_express(double, tmp_path, part, changes):
    """The vectors are open_clip's own to 1e-10; without the switch they would not be."""
    reference = open_clip_folder(tmp_path, with_settings(part, **changes))
    model = load("clip", tmp_path).model
    assert same_vectors(model, reference, model.config.image.size)
    assert torch.allclose(model.itc_head.scale(), reference.logit_scale.exp().reshape(()))


@pytest.mark.parametrize(
    "part, changes",
    [
        ("vision_cfg", {"timm_model_name": "vit_base_patch16_224"}),
        ("vision_cfg", {"pool_type": "avg"}),
        ("vision_cfg", {"attentional_pool": True}),
        ("vision_cfg", {"block_type": "custom"}),
        ("vision_cfg", {"qk_norm": True}),
        ("vision_cfg", {"patch_size": [8, 16]}),
        ("vision_cfg", {"image_size": 36}),
        ("vision_cfg", {"act_kwargs": {"approximate": "erf"}}),
        ("text_cfg", {"hf_model_name": "roberta-base"}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"embed_cls": True}),
        ("text_cfg", {"pool_type": "last"}),
        ("text_cfg", {"proj_bias": True}),
        ("text_cfg", {"proj_type": "none"}),
        ("text_cfg", {"tokenizer_kwargs": {"clean": "canonicalize"}}),
        ("", {"custom_text": True}),
        ("", {"init_logit_bias": -10}),
        ("", {"multimodal_cfg": {"layers": 2}}),
    ],
)
def test_switches_of_open_clip_that_we_cannot_express_are_named(tmp_path, part, changes):
    open_clip_folder(tmp_path)
    settings = {"model_cfg": with_settings(part, **changes)}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModel) as raised:
        load("clip", tmp_path)
    key, value = next(iter(changes.items()))
    name = next(iter(value)) if key == "act_kwargs" else key
    for said in (str(tmp_path), f"open_clip_config.json, model_cfg{'.' if part else ''}{part}", repr(name)):
        assert said in str(raised.value)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s["model_cfg"]["text_cfg"].update(swiglu=True), "model_cfg.text_cfg.*'swiglu' .true.*remove it"),
        (lambda s: s["model_cfg"]["vision_cfg"].update(rope=1, zoom="x"), "settings 'rope' .1., 'zoom' ..x"),
        (lambda s: s["model_cfg"].update(moe={"experts": 8}), "'moe' .*experts.*config="),
        (lambda s: s.update(postprocess_cfg={}), "postprocess_cfg"),
        (lambda s: s["model_cfg"]["text_cfg"].update(norm_kwargs={"bias": False}), "norm_kwargs.*'bias' .false"),
        (lambda s: s["model_cfg"]["vision_cfg"].update(layers="12"), "'layers' is \"12\".*whole number"),
        (lambda s: s["model_cfg"]["vision_cfg"].update(layers=[3, 4, 6, 3]), "'layers' is .3, 4, 6, 3"),
        (lambda s: s["model_cfg"]["vision_cfg"].update(width=33), "'width' is 33.*multiple of its 4 heads"),
        (lambda s: s["model_cfg"]["vision_cfg"].update(image_size=[32, 32, 3]), "'image_size' is .*height and width"),
        (lambda s: s["model_cfg"]["text_cfg"].update(mlp_ratio=-1), "'mlp_ratio' is -1.*above 0"),
        (lambda s: s["model_cfg"].pop("text_cfg"), "text_cfg is null, not an object"),
        (lambda s: s["model_cfg"].pop("embed_dim"), "'embed_dim' is missing"),
        (lambda s: s.update(model_cfg=None), "model_cfg is null"),
    ],
)
def test_settings_of_open_clip_that_nobody_knows_are_refused(tmp_path, change, says):
    open_clip_folder(tmp_path)
    edited(tmp_path / "open_clip_config.json", change)
    with pytest.raises(CheckpointError, match=says):
        load("clip", tmp_path)


def test_every_published_architecture_of_open_clip_is_read_or_refused_by_name():
    """No key of its own configs is unknown to us, and its ViTs with its own text transformer are read."""
    from minivlp.pretrained.clip import openai_config

    read = []
    for name in open_clip.list_models():
        try:
            openai_config({}, {"model_cfg": open_clip.get_model_config(name)})
            read.append(name)
        except UnsupportedModel:
            pass
        except CheckpointError as error:
            assert "'layers' is [" in str(error), name  # ResNets
    assert {"ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14-336", "ViT-H-14-378-quickgelu", "ViT-bigG-14"} <= set(read)


def test_the_tokenizer_that_open_clip_names_is_used_and_checked(tmp_path):
    load_tokenizer().save_pretrained(tmp_path / "words")
    words = str(tmp_path / "words")
    text = {"hf_tokenizer_name": words, "pool_type": "eos", "eos_id": load_tokenizer()("a")["input_ids"][-1]}
    open_clip_folder(tmp_path, with_settings("text_cfg", **text))
    assert load("clip", tmp_path).tokenizer("a heart") == load_tokenizer()("a heart")
    edited(tmp_path / "open_clip_config.json", lambda s: s["model_cfg"]["text_cfg"].update(eos_id=7))
    with pytest.raises(CheckpointError, match="words does not end texts by the id 7"):
        load("clip", tmp_path).tokenizer  # noqa: B018
    small = with_settings("text_cfg", vocab_size=300, hf_tokenizer_name=words)
    open_clip_folder(tmp_path, small)
    with pytest.raises(CheckpointError, match="entries, the model 300: it is another model's"):
        load("clip", tmp_path).tokenizer  # noqa: B018


# ------------------------------------------------------------------------------------------ open_clip: pictures


@pytest.mark.parametrize("size", [32, [32, 48]])
@pytest.mark.parametrize(
    "preprocess",
    [
        {},
        {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash", "interpolation": "bicubic"},
        {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"},
        {"resize_mode": "longest", "fill_color": 0},
        {"resize_mode": "longest", "fill_color": 128, "mean": 0.5, "std": 0.25},
        {"resize_mode": "squash", "interpolation": "random", "mode": "RGB", "fill_color": 0},
    ],
)
def test_pictures_are_prepared_as_open_clip_does(tmp_path, preprocess, size):
    pair = (size, size) if isinstance(size, int) else tuple(size)
    open_clip_folder(tmp_path, with_settings("vision_cfg", image_size=size), {**preprocess, "size": size})
    theirs = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**{**preprocess, "size": pair}), is_train=False
    )
    expected = torch.stack([theirs(picture) for picture in pictures()])
    loaded = load("clip", tmp_path)
    assert torch.equal(loaded(pictures())["images"], expected)
    load_tokenizer().save_pretrained(tmp_path)
    load("clip", tmp_path).save(tmp_path / "mine")
    assert torch.equal(load("clip", tmp_path / "mine")(pictures())["images"], expected)


def test_another_image_size_keeps_open_clips_way(tmp_path):
    told = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "longest", "fill_color": 9}
    open_clip_folder(tmp_path, preprocess=told)
    cfg = open_clip.transform.PreprocessCfg(**{**told, "size": (48, 48)})
    theirs = open_clip.transform.image_transform_v2(cfg, is_train=False)
    given = load("clip", tmp_path, image_size=48)(pictures())["images"]
    assert torch.equal(given, torch.stack([theirs(picture) for picture in pictures()]))


def test_our_pixels_take_the_mean_that_the_file_says(tmp_path):
    """Measures give pixels in [-1, 1]: with mean and std of .5 they need no change; with CLIP's they do."""
    images = 2 * torch.rand(2, 3, 32, 32) - 1
    for mean, std, unchanged in ([0.5] * 3, [0.5] * 3, True), (None, None, False):
        open_clip_folder(tmp_path, preprocess={"mean": mean, "std": std})
        loaded = load("clip", tmp_path)
        plain = loaded.model.embed_images(images)
        with loaded.on_our_pixels():
            assert torch.allclose(loaded.model.embed_images(images), plain, atol=1e-6) is unchanged


@pytest.mark.parametrize(
    "preprocess, says",
    [
        ({"resize_mode": "pad"}, "'resize_mode' is \"pad\".*shortest or longest or squash"),
        ({"interpolation": "nearest"}, "'interpolation' is \"nearest\""),
        ({"mean": [0.5, 0.5]}, "'mean' is .0.5, 0.5.*three numbers"),
        ({"std": [0.5, 0, 0.5]}, "'std' is .*above 0"),
        ({"mode": "L"}, "'mode' is \"L\""),
        ({"size": 64}, "'size' is 64.*32, 32"),
        ({"fill_color": 300}, "'fill_color' is 300"),
        ({"gamma": 2.2}, "preprocess_cfg.*'gamma' .2.2"),
        ([1, 2], "preprocess_cfg is .1, 2., not an object"),
    ],
)
def test_preprocess_settings_that_we_do_not_know_are_refused(tmp_path, preprocess, says):
    open_clip_folder(tmp_path, preprocess=preprocess)
    with pytest.raises(CheckpointError, match=says):
        load("clip", tmp_path)


# ------------------------------------------------------------------------------------------ transformers' settings


@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu_new", "gelu", "relu"])
def test_activations_and_pairs_of_transformers(double, tmp_path, activation):
    reference = small_clip(hidden_act=activation)
    reference.save_pretrained(tmp_path)
    edited(tmp_path / "config.json", lambda s: s["vision_config"].update(patch_size=[8, 8], image_size=[32, 32]))
    images, text = some_inputs()
    theirs = reference(input_ids=text.ids, attention_mask=text.mask.long(), pixel_values=images).logits_per_image
    assert (load("clip", tmp_path).model.similarity(images, text) - theirs).abs().max() < 1e-10


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s["vision_config"].update(rotary=True), "config.json, vision_config: .*'rotary' .true.*remove it"),
        (lambda s: s["text_config"].update(window=3), "config.json, text_config: .*'window' .3"),
        (lambda s: s.update(quantization_config={"bits": 4}), "config.json: .*'quantization_config'"),
        (lambda s: s.update(text_config_dict={"sparse": 1}), "text_config: .*'sparse'"),
        (lambda s: s["vision_config"].update(hidden_act="silu"), "'hidden_act' is \"silu\".*gelu"),
        (lambda s: s["vision_config"].update(num_channels=4), "'num_channels' is 4"),
        (lambda s: s["vision_config"].update(num_attention_heads=5), "32.*not a multiple of.*attention heads .5"),
        (lambda s: s["vision_config"].update(hidden_size="32"), "CLIPConfig refuses it"),
        (lambda s: s.update(model_type="blip"), "'model_type' is \"blip\".*another family"),
    ],
)
def test_settings_of_transformers_that_nobody_knows_are_refused(clip_folder, change, says):
    edited(clip_folder / "config.json", change)
    with pytest.raises(CheckpointError, match=says) as raised:
        load("clip", clip_folder)
    assert str(clip_folder) in str(raised.value)


# what transformers 4 wrote into every object of a config.json
OLD_KEYS = """_commit_hash
_name_or_path add_cross_attention architectures bad_words_ids begin_suppress_tokens bos_token_id
chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
forced_eos_token_id id2label initializer_factor is_decoder is_encoder_decoder label2id length_penalty max_length
min_length model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values
repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
transformers_version typical_p use_bfloat16 use_cache"""


def test_the_keys_of_old_transformers_files_are_harmless():
    """Also those of the published CLIP, BLIP and ViLT; a released file would otherwise be refused."""
    assert not set(OLD_KEYS.split()) - HARMLESS["transformers"]


def test_of_two_objects_for_one_tower_that_counts_which_transformers_takes(double, tmp_path):
    """OpenAI's larger models have both, and the second one may leave keys out."""
    reference = small_clip()
    reference.save_pretrained(tmp_path)

    def move(settings):
        vision = settings.pop("vision_config")
        kept = {k: vision[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")}
        settings["vision_config_dict"] = {**kept, "patch_size": 8, "image_size": 32}
        settings["vision_config"] = {"hidden_act": "gelu", "patch_size": 4}

    edited(tmp_path / "config.json", move)
    expected = transformers.CLIPConfig.from_pretrained(tmp_path).vision_config
    image = load("clip", tmp_path).model.config.image
    assert (image.patch_size, image.block.activation) == (expected.patch_size, expected.hidden_act) == (8, "quick_gelu")


@pytest.mark.parametrize(
    ("kind", "family", "part", "key", "value"),
    [
        ("ViltForMaskedLM", "vilt", None, "qkv_bias", False),
        ("ViltForMaskedLM", "vilt", None, "max_image_length", 200),
        ("ViltForMaskedLM", "vilt", None, "relative_positions", True),
        ("BlipForImageTextRetrieval", "blip", "text_config", "position_embedding_type", "relative_key"),
        ("BlipForImageTextRetrieval", "blip", "vision_config", "layer_scale", 0.1),
    ],
)
@pytest.mark.filterwarnings("ignore:.*means nothing before it is trained")
def test_the_other_families_refuse_by_the_same_rule(tmp_path, kind, family, part, key, value):
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 4}
    if family == "vilt":
        config = transformers.ViltConfig(**sizes, image_size=32, patch_size=8, vocab_size=99)
    else:
        image, text = (
            {**sizes, "image_size": 32, "patch_size": 8},
            {**sizes, "encoder_hidden_size": 32, "vocab_size": 99},
        )
        config = transformers.BlipConfig(vision_config=image, text_config=text)
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    load(family, tmp_path)
    edited(tmp_path / "config.json", lambda s: (s[part] if part else s).update({key: value}))
    with pytest.raises(CheckpointError, match=f"config.json.*{key!r}"):
        load(family, tmp_path)


def test_what_is_called_harmless_is_not_read():
    """A key cannot be both: a list that also holds sizes would hide a family that forgets to read them."""
    sizes = {
        "hidden_size",
        "num_hidden_layers",
        "hidden_act",
        "layer_norm_eps",
        "image_size",
        "patch_size",
        "vocab_size",
    }
    assert not sizes & HARMLESS["transformers"]
    assert not {"width", "layers", "heads", "pool_type", "quick_gelu", "ls_init_value"} & HARMLESS["open_clip"]


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s.update(sharpen=2), "preprocessor_config.json.*'sharpen' .2"),
        (
            lambda s: s.update(image_processor_type="SiglipImageProcessor"),
            "SiglipImageProcessor.*by CLIPImageProcessor",
        ),
        (lambda s: s.update(crop_size={"height": 48, "width": 48}), "48 x 48 pixels, and the model takes 32 x 32.*=48"),
    ],
)
def test_image_processor_settings_that_do_not_fit_are_refused(clip_folder, change, says):
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(clip_folder)
    assert load("clip", clip_folder)(pictures())["images"].shape == (5, 3, 32, 32)
    edited(clip_folder / "preprocessor_config.json", change)
    with pytest.raises(CheckpointError, match=says):
        load("clip", clip_folder)(pictures())


def test_image_settings_inside_a_processors_file_are_read(clip_folder):
    """As transformers 5 writes them, also under the old names of the class."""
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    images = transformers.CLIPImageProcessor(**size, image_mean=[0.1, 0.2, 0.3], resample=2)
    transformers.CLIPProcessor(images, load_tokenizer()).save_pretrained(clip_folder)
    (clip_folder / "preprocessor_config.json").unlink(missing_ok=True)
    given = load("clip", clip_folder)(pictures())["images"]
    assert torch.equal(given, images(pictures(), return_tensors="pt")["pixel_values"])
    (clip_folder / "processor_config.json").unlink()
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "image_std": [0.2, 0.2, 0.2]}
    (clip_folder / "preprocessor_config.json").write_text(json.dumps(old))
    assert load("clip", clip_folder).processor.image_std == (0.2, 0.2, 0.2)


@pytest.mark.parametrize("settings", [{"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 127.5}])
def test_the_statistics_of_a_processor_are_those_of_what_it_computes(settings):
    """Also where it does not normalize, or scales pixels otherwise."""
    processor = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False, **settings)
    (picture,) = pictures()[-1:]
    made = processor(picture, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(values)[:, None, None] for values in pixel_statistics(processor))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    assert torch.allclose((pixels - mean) / std, made, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ weights without settings


def test_weights_alone_need_a_config(clip_folder, tmp_path):
    """transformers' defaults would give another activation in silence."""
    alone = tmp_path / "elsewhere" / "model.safetensors"
    alone.parent.mkdir()
    shutil.copy(clip_folder / "model.safetensors", alone)
    for path, says in (
        (alone, "activation of a CLIP; name a folder that also holds its config.json.*`config=`, such as CLIPConfig"),
        (clip_folder / "model.safetensors", f"config.json lies beside it: name the folder {clip_folder}"),
        (alone.parent, "name a folder that also holds its config.json"),
    ):
        with pytest.raises(CheckpointError, match=says):
            load("clip", path)
    config = load("clip", clip_folder).model.config
    images, text = some_inputs()
    expected = load("clip", clip_folder).model.similarity(images, text)
    assert torch.equal(load("clip", alone, config=config).model.similarity(images, text), expected)
    block = replace(config.image.block, activation="gelu")
    other = replace(config, image=replace(config.image, block=block))
    assert not torch.allclose(load("clip", alone, config=other).model.similarity(images, text), expected)


def test_settings_of_another_library_are_not_taken_for_a_files_own(clip_folder):
    """OpenAI's names beside transformers' config.json: its activation may be another."""
    (clip_folder / "model.safetensors").unlink()
    reference = open_clip.CLIP(**copy.deepcopy(MODEL))
    torch.save(reference.state_dict(), clip_folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="belong to a open_clip_config.json, and there is only config.json"):
        load("clip", clip_folder)


# ------------------------------------------------------------------------------------------ wrappers

WRAPPED = (
    "module.",
    "_orig_mod.",
    "model.",
    "_forward_module.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.module._orig_mod.",
    "module.module.",
    "_forward_module.model._orig_mod.",
    "model_ema.module.",
)


@pytest.mark.parametrize("before", WRAPPED)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_prefixes_of_wrappers_are_taken_off(clip_folder, before, file):
    images, text = some_inputs()
    expected = load("clip", clip_folder).model.similarity(images, text)
    state = {before + name: tensor for name, tensor in load_file(clip_folder / "model.safetensors").items()}
    (clip_folder / "model.safetensors").unlink()
    (save_file if file.endswith("safetensors") else torch.save)(state, clip_folder / file)
    assert torch.equal(load("clip", clip_folder).model.similarity(images, text), expected)


@pytest.mark.parametrize("before", WRAPPED)
def test_prefixes_are_taken_off_for_timm_and_our_own_checkpoints_too(tmp_path, before):
    state = timm.create_model("test_vit").state_dict()
    torch.save({"state_dict": {before + name: tensor for name, tensor in state.items()}}, tmp_path / "w.pth")
    tower = timm_tower("test_vit", tmp_path / "w.pth")
    assert torch.equal(tower.embed.class_token, state["cls_token"][0, 0])

    model = CLIP(CLIPConfig.nano()).eval()
    save_model(model, tmp_path / "ours.safetensors")
    from safetensors import safe_open

    with safe_open(str(tmp_path / "ours.safetensors"), "pt") as file:
        notes = file.metadata()
    state = {before + name: tensor for name, tensor in load_file(tmp_path / "ours.safetensors").items()}
    save_file(state, tmp_path / "ours.safetensors", metadata=notes)
    again = load_model(CLIP, tmp_path / "ours.safetensors")
    assert torch.equal(again.text.embed.token.weight, model.text.embed.token.weight)
    other = CLIP(CLIPConfig.nano())
    assert "text.embed.token.weight" in init_from(other, tmp_path / "ours.safetensors")
    assert torch.equal(other.text.embed.token.weight, model.text.embed.token.weight)


def test_names_of_wrappers_inside_a_name():
    """torch.compile or DDP around a part of a model; a layer that is itself called `model` is left alone."""
    one = torch.zeros(1)
    names = {
        "visual._orig_mod.proj": "visual.proj",
        "visual.module.conv1.weight": "visual.conv1.weight",
        "blocks.0._checkpoint_wrapped_module.norm.bias": "blocks.0.norm.bias",
        "text.model.norm": "text.model.norm",
        "logit_scale": "logit_scale",
    }
    assert list(without_prefixes(dict.fromkeys(names, one), "file")) == list(names.values())
    assert list(without_prefixes({"n_averaged": one, "module.a.b": one}, "file")) == ["a.b"]
    assert list(without_prefixes({"model.a": one, "loss.b": one}, "file")) == ["model.a", "loss.b"]
    with pytest.raises(CheckpointError, match="file: several of its tensors have one name"):
        without_prefixes({"a._orig_mod.b": one, "a.b": one}, "file")


@pytest.mark.parametrize("keys", [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("net", "ema")])
def test_moving_averages_are_named_and_can_be_chosen(tmp_path, keys):
    trained, average = (jittered(timm.create_model("test_vit")).state_dict() for _ in range(2))
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({keys[0]: trained, keys[1]: average, "optimizer": optimizer, "epoch": 3}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=rf"w.pth holds several.*{keys[0]}, {keys[1]}. Taken: {keys[0]}.*weight_set"):
        tower = timm_tower("test_vit", tmp_path / "w.pth")
    assert torch.equal(tower.embed.class_token, trained["cls_token"][0, 0])
    tower = timm_tower("test_vit", tmp_path / "w.pth", weight_set=keys[1])
    assert torch.equal(tower.embed.class_token, average["cls_token"][0, 0])
    with pytest.raises(CheckpointError, match="no single set of weights 'best'"):
        timm_tower("test_vit", tmp_path / "w.pth", weight_set="best")
    torch.save({keys[1]: average}, tmp_path / "w.pth")
    assert torch.equal(timm_tower("test_vit", tmp_path / "w.pth").embed.class_token, average["cls_token"][0, 0])


@pytest.mark.parametrize(
    "pack",
    [
        lambda a, b: {"student": a, "teacher": b},
        lambda a, b: {"checkpoint": {"student": {"model": a}, "teacher": {"model": b}}},
        lambda a, b: {f"{kind}.{n}": t for kind, state in (("student", a), ("teacher", b)) for n, t in state.items()},
    ],
)
def test_of_student_and_teacher_one_has_to_be_chosen(tmp_path, pack):
    student, teacher = {"a.b": torch.zeros(1)}, {"a.b": torch.ones(1)}
    torch.save(pack(student, teacher), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="student.*teacher.*Choose|student.*teacher.*choose"):
        read_weights(tmp_path / "w.pth")


def test_the_set_of_a_flat_file_is_chosen_by_its_prefix(tmp_path):
    both = {"student.module.a.b": torch.zeros(1), "teacher.module.a.b": torch.ones(1)}
    save_file(both, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors", "teacher") == {"a.b": torch.ones(1)}


def test_a_whole_training_state_gives_its_weights(clip_folder, tmp_path):
    """Lightning's and DeepSpeed's files keep much beside the weights."""
    state = load_file(clip_folder / "model.safetensors")
    (clip_folder / "model.safetensors").unlink()
    whole = {
        "epoch": 3,
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.3)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "lr_schedulers": [],
        "rng_state": torch.zeros(5),
        "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
    }
    torch.save(whole, clip_folder / "pytorch_model.bin")
    assert load("clip", clip_folder).missing == ()
    torch.save({"optimizer": {"state": {}, "param_groups": []}, "epoch": 3}, clip_folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds no tensors by name.*optimizer, epoch"):
        load("clip", clip_folder)


def test_timm_lists_what_does_not_fit_in_groups(tmp_path):
    state = {f"backbone.{name}": tensor for name, tensor in timm.create_model("test_vit").state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w.pth does not fit timm's test_vit: missing: .*blocks") as raised:
        timm_tower("test_vit", tmp_path / "w.pth")
    assert len(str(raised.value)) < 500 and "unexpected: backbone.* (" in str(raised.value)


# ------------------------------------------------------------------------------------------ shards


def sharded(folder, name, kind):
    """Replace the weights of a folder by two shards and their index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for number, part in enumerate(shards, 1):
        file = f"{name}-{number:05}-of-00002.{kind}"
        tensors = {n: state[n] for n in part}
        (save_file if kind == "safetensors" else torch.save)(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / f"{name}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("name, kind", [("model", "safetensors"), ("pytorch_model", "bin")])
def test_shards_are_read_by_their_index(clip_folder, name, kind):
    images, text = some_inputs()
    model = load("clip", clip_folder).model
    expected, config = model.similarity(images, text), model.config
    index = sharded(clip_folder, name, kind)
    assert torch.equal(load("clip", clip_folder).model.similarity(images, text), expected)
    assert torch.equal(load("clip", index, config=config).model.similarity(images, text), expected)
    (clip_folder / f"{name}-00002-of-00002.{kind}").unlink()
    with pytest.raises(CheckpointError, match=rf"2 shards, of which {name}-00002-of-00002.{kind} is missing"):
        load("clip", clip_folder)


def test_transformers_own_shards_are_read(tmp_path):
    reference = small_clip()
    reference.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    images, text = some_inputs()
    theirs = reference(input_ids=text.ids, pixel_values=images).logits_per_image
    assert torch.allclose(load("clip", tmp_path).model.similarity(images, text), theirs, atol=1e-4)


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "half {"])
def test_an_index_that_lists_nothing(clip_folder, content):
    (clip_folder / "model.safetensors").unlink()
    (clip_folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json"):
        load("clip", clip_folder)


def test_a_shard_without_a_tensor_of_the_index(clip_folder):
    index = sharded(clip_folder, "model", "safetensors")
    edited(index, lambda s: s["weight_map"].update(extra="model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors does not hold extra"):
        load("clip", clip_folder)


def test_authors_weights_in_a_folder_need_no_settings(golden, tmp_path):
    """ALBEF's sizes come from its tensors, also from shards."""
    from released import four_heads

    from minivlp.pretrained import albef

    g = golden("albef_pretrain")
    save_file(contiguous(g.state), tmp_path / "model.safetensors")
    sharded(tmp_path, "model", "safetensors")
    loaded = load("albef", tmp_path, config=four_heads(albef.config(g.state, {})))
    assert loaded.missing == () and loaded.release is not None


# ------------------------------------------------------------------------------------------ names and damage


@pytest.mark.parametrize(
    "there, says",
    [
        ("Model.safetensors", "Is Model.safetensors one of them"),
        ("model.safetensor", "Is model.safetensor one of them"),
        ("pytorch_model.pth", "Is pytorch_model.pth one of them"),
        ("clip_best.ckpt", "Name a file of weights itself: .*clip_best.ckpt"),
        (None, "Copy all files"),
    ],
)
def test_a_near_name_in_a_folder_is_suggested(clip_folder, there, says):
    weights = clip_folder / "model.safetensors"
    weights.rename(clip_folder / there) if there else weights.unlink()
    with pytest.raises(CheckpointError, match=f"there is config.json, but none of model.safetensors.*{says}"):
        load("clip", clip_folder)


@pytest.mark.parametrize("asked, there", [
    ("model.safetensor", "model.safetensors"), ("MODEL.safetensors", "model.safetensors"),
    ("model.pth", "model.safetensors"), ("cafe\u0301.pth", "caf\u00e9.pth"), ("modle.safetensors", "model.safetensors"),
])  # fmt: skip
def test_a_near_name_of_a_file_is_suggested(tmp_path, asked, there):
    (tmp_path / there).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="there is no such file.*did you mean .*" + there):
        load("clip", tmp_path / asked)
    assert near_names(asked, [there, "readme.md"]) == [there]


def test_a_file_with_one_slash_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such file or folder"):
        load("clip", "weights/clip.pth")


@pytest.mark.parametrize(
    "name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors", "pytorch_model.bin", "model.safetensors"]
)
def test_weights_of_open_clip_under_each_of_their_names(tmp_path, name):
    reference = open_clip_folder(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    state = contiguous(reference.state_dict())
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    assert load("clip", tmp_path).missing == ()


@pytest.mark.parametrize("written, name", [(save_file, "w.bin"), (torch.save, "w.safetensors"), (torch.save, "w.dat")])
def test_the_content_tells_the_format_not_the_extension(tmp_path, written, name):
    written({"a.b": torch.ones(2)}, tmp_path / name)
    assert torch.equal(read_weights(tmp_path / name)["a.b"], torch.ones(2))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605247071\n"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(
    "content, says",
    [
        (LFS, "pointer of git-lfs.*git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"\n  <html>404</html>", "web page"),
        (b'{"error": "Repository not found"}', "JSON file, not weights"),
        (b"", "empty file"),
        (b"PAR1\x00\x00PAR1", "parquet table"),
        (b"PK\x03\x04xx", "truncated or damaged"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
        (b"\x1f\x8b\x08" + bytes(99), "gzip"),
        (b"\xff\xd8\xff\xe0" + bytes(99), "picture"),
        (bytes(range(1, 200)) * 9, "damaged|copy it again"),
        (b"\x80\x02}q\x00.", "copy it again|damaged|no tensors"),
    ],
)
def test_what_is_no_file_of_weights_gets_a_sentence(clip_folder, tmp_path, name, content, says):
    (clip_folder / "model.safetensors").unlink()
    (clip_folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}.*({says})"):
        load("clip", clip_folder)
    with pytest.raises(CheckpointError, match=f"{name}.*({says})"):
        timm_tower("test_vit", clip_folder / name)
    if content:
        with pytest.raises(CheckpointError, match=name):
            load_model(CLIP, clip_folder / name)


def test_a_torchscript_archive_and_a_plain_zip_are_told_apart(tmp_path):
    import zipfile

    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match="script.pt is a TorchScript model.*state_dict"):
        load("clip", tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(CheckpointError, match="photos.zip is a zip archive without weights"):
        load("clip", tmp_path / "photos.zip")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kept", [9, 500, 0.5, 0.9])
def test_a_truncated_file_of_weights(clip_folder, name, kept):
    state = load_file(clip_folder / "model.safetensors")
    (clip_folder / "model.safetensors").unlink()
    (save_file if name.endswith("safetensors") else torch.save)(state, clip_folder / name)
    whole = (clip_folder / name).read_bytes()
    (clip_folder / name).write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=f"{name}.*copy it again"):
        load("clip", clip_folder)


@pytest.mark.parametrize("file, content", [
    ("config.json", b"[1, 2]"), ("config.json", b"{half"), ("config.json", b"\xff\xfe\x00"),
    ("config.json", b"[" * 9000),
    ("config.json", b'{"model_type": "clip", "vision_config": 7}'), ("config.json", b'{"model_type": 3}'),
    ("config.json", b'{"model_type": "clip", "vision_config": {"image_size": -4}}'),
    ("config.json", b'{"model_type": "clip", "vision_config": {"image_size": null}}'),
    ("config.json", b'{"minivlp": "CLIP"}'), ("config.json", b'{"minivlp": "CLIP", "config": {"width": 8}}'),
])  # fmt: skip
def test_a_damaged_settings_file_gets_a_sentence(clip_folder, file, content):
    (clip_folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=str(clip_folder)):
        load("clip", clip_folder)


def test_our_own_folders_still_load(tmp_path):
    model = CLIP(CLIPConfig.nano()).eval()
    save_pretrained(model, tmp_path)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(load("clip", tmp_path).model.embed_images(images), model.embed_images(images))
    edited(tmp_path / "config.json", lambda s: s.update(adapter="lora"))
    with pytest.raises(CheckpointError, match="settings that we do not know: adapter"):
        load("clip", tmp_path)
