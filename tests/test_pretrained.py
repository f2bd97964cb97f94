"""Released weights in our classes: the outputs of the released models, and messages about what does not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from released import four_heads, golden_masked, golden_text, golden_vlmo_config, release_for
from safetensors.torch import load_file, save_file

from minivlp.data.batch import Batch, Text
from minivlp.data.text import load_tokenizer, tokenize
from minivlp.layers.generation import DecodingConfig
from minivlp.layers.poolers import ParallelPooling
from minivlp.models.albef import ALBEF, ALBEFConfig
from minivlp.models.blip import BLIPConfig
from minivlp.models.clip import CLIP, CLIPConfig
from minivlp.models.coca import CoCa
from minivlp.models.git import GITConfig
from minivlp.models.vilt import ViLTConfig
from minivlp.models.vlmo import VLMo, VLMoConfig
from minivlp.models.xvlm import XVLM, XVLMConfig
from minivlp.objectives.masking import IGNORE
from minivlp.papers import PAPERS
from minivlp.pretrained import albef, blip, git, load, save_pretrained, vilt, vlmo, xvlm
from minivlp.training.checkpoint import CheckpointError

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*means nothing before it is trained"),
]


def jittered(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with every parameter changed: initial zeros and ones hide a part that is not read."""
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-10) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance)


def some_texts(rows: int = 4, length: int = 10, low: int = 3, high: int = 50) -> Text:
    """Random texts of several lengths."""
    lengths = torch.randint(length // 2, length + 1, (rows,))
    mask = torch.arange(length) < lengths[:, None]
    return Text(torch.randint(low, high, (rows, length)) * mask, mask)


def theirs_of(text: Text) -> dict[str, torch.Tensor]:
    """A text as transformers' models take it."""
    return {"input_ids": text.ids, "attention_mask": text.mask.long()}


def rewrite(folder, change) -> None:
    """Change the tensors of a folder's weights by their names, in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pairs_of_one_shape(tensors: dict) -> list[tuple[str, str]]:
    """Names of two tensors of equal shape; every tensor that has such a partner is in a pair."""
    shapes: dict = {}
    for name in sorted(tensors):
        shapes.setdefault(tensors[name].shape, []).append(name)
    return [pair for names in shapes.values() for pair in zip(names, names[1:], strict=False)]


def every_name_counts(family, folder, output, **options) -> None:
    """Swap two tensors of one shape: the output changes. Rename one: the message names it."""
    before = output(load(family, folder, **options))
    tensors = load_file(folder / "model.safetensors")
    other_layers = (".1.", ".2.")
    pairs = pairs_of_one_shape({n: t for n, t in tensors.items() if not any(layer in n for layer in other_layers)})
    assert len(pairs) > 15
    for a, b in pairs[:: len(pairs) // 5]:
        save_file({**tensors, a: tensors[b].clone(), b: tensors[a].clone()}, folder / "model.safetensors")
        assert not same(output(load(family, folder, **options)), before, 1e-12), (a, b)
    name = sorted(n for n in tensors if ".0." in n)[0]
    renamed = {n: t for n, t in tensors.items() if n != name} | {"head.old": tensors[name], "head.older": tensors[name]}
    save_file({n: t.clone() for n, t in renamed.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        load(family, folder, **options)
    for part in (str(folder), f"missing: {name}", r"unknown: head.* (2)", "config="):
        assert part in str(raised.value)
    save_file(tensors, folder / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------- CLIP


@pytest.fixture
def clip_folder(tmp_path, request):
    """transformers' CLIP of tiny sizes, jittered, as its own `save_pretrained` writes it."""
    config = transformers.CLIPConfig(
        text_config=dict(
            vocab_size=1200, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=12, eos_token_id=2, bos_token_id=1, pad_token_id=0, hidden_act="quick_gelu",
        ),
        vision_config=dict(
            hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=32,
            patch_size=8, hidden_act="gelu", layer_norm_eps=1e-6,
        ),
        projection_dim=20,
    )  # fmt: skip
    reference = jittered(transformers.CLIPModel(config))
    reference.save_pretrained(tmp_path)
    return tmp_path, reference


def clip_inputs(rows: int = 3, height: int = 32, width: int | None = None) -> tuple[torch.Tensor, Text]:
    text = some_texts(5, 12)
    text.ids[torch.arange(5), text.mask.sum(1) - 1] = 1199  # the largest id ends a text
    return torch.randn(rows, 3, height, width or height), text


def test_clip_of_transformers(clip_folder):
    folder, reference = clip_folder
    images, text = clip_inputs()
    loaded = load("clip", folder)
    theirs = reference(**theirs_of(text), pixel_values=images)
    assert isinstance(loaded.model, CLIP) and not loaded.model.training and loaded.missing == ()
    assert same(loaded.model.embed_images(images), theirs.image_embeds)
    assert same(loaded.model.embed_texts(text), theirs.text_embeds)
    assert same(loaded.model.similarity(images, text), theirs.logits_per_image)


def test_every_name_of_clip_counts(clip_folder):
    inputs = clip_inputs()
    every_name_counts("clip", clip_folder[0], lambda loaded: loaded.model.similarity(*inputs))


def test_an_old_pickled_folder_of_clip(clip_folder):
    """`pytorch_model.bin`, and with it the position ids that old files carry."""
    folder, reference = clip_folder
    old = reference.state_dict() | {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    torch.save(old, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    images, text = clip_inputs()
    ours = load("clip", folder).model.similarity(images, text)
    assert same(ours, reference(**theirs_of(text), pixel_values=images).logits_per_image)


@pytest.mark.parametrize("wrapped", [False, True], ids=["safetensors", "training checkpoint"])
@pytest.mark.parametrize("quick, size", [(False, 32), (True, 32), (False, [32, 48])])
def test_clip_of_open_clip(tmp_path, quick, size, wrapped):
    open_clip = pytest.importorskip("open_clip")
    settings = {
        "embed_dim": 20,
        "quick_gelu": quick,
        "vision_cfg": {"image_size": size, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 1200, "width": 24, "heads": 2, "layers": 3},
    }
    reference = jittered(open_clip.CLIP(**settings))
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "something of timm"}))
    state = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
    if wrapped:
        state = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / "open_clip_pytorch_model.bin")
    else:
        save_file(state, tmp_path / "open_clip_model.safetensors")
    images, text = clip_inputs(3, *([size] if isinstance(size, int) else size))
    ours = load("clip", tmp_path).model
    assert ours.config.image.size == tuple(images.shape[2:])
    theirs = reference.encode_image(images, normalize=True), reference.encode_text(text.ids, normalize=True)
    assert same(ours.embed_images(images), theirs[0])
    assert same(ours.embed_texts(text), theirs[1])
    assert same(ours.itc_head.scale(), reference.logit_scale.exp())
    if not wrapped:

        def output(loaded):
            return loaded.model.similarity(images, text)

        (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "model.safetensors")
        settings = {"config": ours.config}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
        every_name_counts("clip", tmp_path, output, **settings)


def test_another_image_size_interpolates_the_positions(clip_folder):
    """As transformers interpolates them on the fly."""
    folder, reference = clip_folder
    images, text = clip_inputs(height=48)
    model = load("clip", folder, image_size=48).model
    assert model.config.image.image_size == 48 and model.image.embed.positions.shape == (36, 32)
    theirs = reference(**theirs_of(text), pixel_values=images, interpolate_pos_encoding=True).logits_per_image
    assert same(model.similarity(images, text), theirs)
    assert same(load("clip", folder).model.similarity(images, text), theirs)


def test_an_image_size_that_is_not_square(clip_folder):
    folder, reference = clip_folder
    images, text = clip_inputs(height=24, width=48)
    loaded = load("clip", folder, image_size=(24, 48))
    theirs = reference(**theirs_of(text), pixel_values=images, interpolate_pos_encoding=True).logits_per_image
    assert loaded.model.image.embed.positions.shape == (18, 32)
    assert same(loaded.model.similarity(images, text), theirs)
    assert loaded(pictures())["images"].shape == (2, 3, 24, 48)
    transformers.CLIPImageProcessor(crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    again = load("clip", folder, image_size=(24, 48))
    assert torch.equal(again(pictures())["images"], loaded(pictures())["images"])


def pictures(count: int = 2) -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [
        Image.fromarray(noise.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in [(40, 90), (80, 60)][:count]
    ]


def test_pictures_and_strings_go_in(clip_folder):
    """With the folder's own image processor and tokenizer, to what transformers' model says of them."""
    folder, reference = clip_folder
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    loaded, captions = load("clip", folder), ["a heart", "a red heart left of a dog"]
    given = loaded(pictures(), captions)
    text = tokenize(load_tokenizer(), captions, 12)
    assert all(torch.equal(getattr(given["text"], part), getattr(text, part)) for part in ("ids", "mask", "word"))
    assert torch.equal(given["images"], processor(pictures(), return_tensors="pt")["pixel_values"].double())
    theirs = reference.get_image_features(given["images"])
    theirs = getattr(theirs, "pooler_output", theirs)
    assert same(loaded.model.embed_images(loaded(pictures())["images"]), theirs / theirs.norm(dim=-1, keepdim=True))
    assert loaded.model.similarity(**given).shape == (2, 2)
    one = loaded(pictures(1)[0], captions[0])
    assert one["images"].shape == (1, 3, 32, 32) and one["text"].ids.shape == (1, int(text.mask[0].sum()))
    assert load("clip", folder, image_size=48)(pictures())["images"].shape == (2, 3, 48, 48)


def test_without_settings_pictures_are_prepared_as_the_paper_does(clip_folder):
    given = load("clip", clip_folder[0])(pictures())["images"]
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    expected = transformers.CLIPImageProcessor(**sizes)(pictures(), return_tensors="pt")["pixel_values"]
    assert torch.equal(given, expected.double())


FAMILIES = {"clip": None, "vilt": "vilt_official", "albef": "albef_pretrain", "vlmo": "vlmo_pretrain"}
FAMILIES |= {"git": "git_official"}
FAMILIES |= {"blip": "blip_pretrain", "xvlm": "xvlm_swin", "xvlm, ViT": "xvlm_deit", "xvlm, CLIP": "xvlm_clipvit"}


@pytest.fixture
def loaded_family(request, golden, tmp_path):
    """A small released model of any family, and a function that turns images into tokens that depend on all pixels."""
    family, name = request.param.split(",")[0], FAMILIES[request.param]
    if name is None:
        folder, _ = request.getfixturevalue("clip_folder")
        return load(family, folder), lambda model, images: model.encode_image(images)
    g = golden(name)
    state = {n: t for n, t in g.state.items() if not n.startswith("vqa_")}
    if family == "vlmo":
        config = golden_vlmo_config(g.config)
    else:
        config = four_heads(release_for(family, state).config(state, {}))
    torch.save({"model": state}, tmp_path / "model.pth")
    loaded = load(family, tmp_path / "model.pth", config=config)
    if family == "vilt":
        return loaded, lambda model, images: model.cross_encode(images, golden_text(g.inputs)[:2])
    return loaded, lambda model, images: model.encode_image(images)


@pytest.mark.parametrize("loaded_family", FAMILIES, indirect=True)
def test_every_family_takes_our_pixels(loaded_family):
    """Pixels in [-1, 1], normalized inside the model as its own processor would have done it."""
    loaded, encode = loaded_family
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]))
    loaded.__dict__["processor"] = SimpleNamespace(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    images = 2 * torch.rand(2, 3, *loaded.model.config.image.size) - 1
    expected, names = encode(loaded.model, ((images + 1) / 2 - mean) / std), loaded.model.state_dict().keys()
    plain = encode(loaded.model, images)
    with loaded.on_our_pixels():
        assert same(encode(loaded.model, images), expected, 1e-6) and not same(plain, expected, 1e-3)
        assert loaded.model.state_dict().keys() == names
    assert torch.equal(encode(loaded.model, images), plain)
    change = loaded.on_our_pixels()
    assert same(encode(loaded.model, images), expected, 1e-6)
    change.remove()
    assert torch.equal(encode(loaded.model, images), plain)


def test_a_timm_tower_of_our_own_model_keeps_its_normalization(tmp_path):
    """Our models take pixels in [-1, 1]: for them nothing changes."""
    pytest.importorskip("timm")
    from minivlp.layers.timm_tower import timm_tower

    tower = timm_tower("test_resnet")
    tower.normalize.shift += 0.3
    model = CLIP(replace(CLIPConfig.nano(), image=tower.config)).eval()
    save_pretrained(model, tmp_path, load_tokenizer())
    loaded, images = load("clip", tmp_path), torch.rand(2, 3, 160, 160) * 2 - 1
    plain = loaded.model.encode_image(images)
    with loaded.on_our_pixels():
        assert same(loaded.model.encode_image(images), plain)


def test_nothing_is_drawn_at_random_while_a_model_is_loaded(clip_folder, tmp_path):
    folder, _ = clip_folder
    save_pretrained(CLIP(CLIPConfig.nano()).eval(), tmp_path / "ours")
    state = torch.get_rng_state()
    load("clip", tmp_path / "ours")
    load("clip", folder)
    load("clip", folder, image_size=48)
    assert torch.equal(torch.get_rng_state(), state)


def test_parts_that_a_checkpoint_lacks_are_initialized_at_random(tmp_path):
    """They will be trained, and zeros would not learn."""
    vilt_reference("ViltForMaskedLM").save_pretrained(tmp_path)
    torch.manual_seed(1)
    one = load("vilt", tmp_path).model
    torch.manual_seed(2)
    two = load("vilt", tmp_path).model
    for name, tensor in one.state_dict().items():
        random = name.startswith("match_head.classifier.")
        assert torch.equal(tensor, two.state_dict()[name]) != random, name
    assert one.match_head.classifier.weight.std() > 0.05


def test_what_was_saved_loads_as_it_was(clip_folder, tmp_path):
    folder, _ = clip_folder
    load_tokenizer().save_pretrained(folder)
    first = load("clip", folder, image_size=40)
    first.save(tmp_path / "mine")
    again = load("clip", tmp_path / "mine")
    given = first(pictures(), ["a heart"])
    repeated = again(pictures(), ["a heart"])
    assert torch.equal(repeated["images"], given["images"]) and torch.equal(repeated["text"].ids, given["text"].ids)
    assert again.model.config == first.model.config
    assert torch.equal(again.model.similarity(**given), first.model.similarity(**given))
    larger = load("clip", tmp_path / "mine", image_size=(48, 64))
    assert larger(pictures())["images"].shape == (2, 3, 48, 64)
    with pytest.raises(CheckpointError, match="holds CLIP, not XVLM"):
        load("xvlm", tmp_path / "mine")
    rewrite(tmp_path / "mine", lambda tensors: tensors.pop("itc_head.scale.log_scale"))
    with pytest.raises(CheckpointError, match="missing: itc_head.scale.log_scale"):
        load("clip", tmp_path / "mine")


@pytest.mark.parametrize("kind", [ALBEF, XVLM, VLMo])
def test_a_saved_config_keeps_its_kind_of_masking(kind, tmp_path):
    """Token, word and span masking have fields of the same names."""
    model = kind(kind.Config.nano()).eval()
    save_pretrained(model, tmp_path)
    config = load(kind.__name__.lower(), tmp_path).model.config
    assert config == model.config and type(config.masking) is type(model.config.masking)


def test_our_own_small_models_are_saved_and_loaded_the_same_way(tmp_path):
    model = CLIP(CLIPConfig.nano()).eval()
    save_pretrained(model, tmp_path, load_tokenizer())
    loaded = load("clip", tmp_path)
    given = loaded(pictures(), ["a heart", "a dog"])
    assert -1 <= given["images"].min() < -0.9 and 0.9 < given["images"].max() <= 1
    assert torch.equal(loaded.model.similarity(**given), model.similarity(**given))
    bigger = load("clip", tmp_path, image_size=96)  # fixed positions: nothing to interpolate
    assert bigger.model.similarity(**bigger(pictures(), ["a heart"])).shape == (2, 1)
    save_pretrained(model, tmp_path / "bare")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load("clip", tmp_path / "bare").tokenizer  # noqa: B018


# ------------------------------------------------------------------------------------------------------------- ViLT


def vilt_reference(kind: str, **options) -> torch.nn.Module:
    config = transformers.ViltConfig(
        vocab_size=1200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56,
        image_size=32, patch_size=8, max_position_embeddings=12, **options,
    )  # fmt: skip
    return jittered(getattr(transformers, kind)(config))


def vilt_inputs(rows: int = 3) -> dict:
    """Texts of several lengths, images of several shapes."""
    pixel_mask = torch.zeros(rows, 40, 32, dtype=torch.bool)
    for row, (height, width) in enumerate([(40, 32), (16, 32), (24, 8)][:rows]):
        pixel_mask[row, :height, :width] = True
    return {
        "images": torch.randn(rows, 3, 40, 32) * pixel_mask[:, None],
        "text": some_texts(rows, 12),
        "pixel_mask": pixel_mask,
    }


def to_vilt(given: dict) -> dict[str, torch.Tensor]:
    """The same inputs as transformers calls them."""
    return {
        "pixel_values": given["images"],
        "pixel_mask": given["pixel_mask"].long(),
        **theirs_of(given["text"]),
    }


def test_vilt_predicts_masked_tokens_as_transformers_does(tmp_path):
    reference = vilt_reference("ViltForMaskedLM")
    reference.save_pretrained(tmp_path)
    given = vilt_inputs()
    with pytest.warns(UserWarning, match="has no match_head.classifier: what needs them means nothing"):
        loaded = load("vilt", tmp_path)
    real = given["text"].mask
    assert loaded.missing == ("match_head.classifier",)
    assert same(loaded.model.mlm_logits(**given)[real], reference(**to_vilt(given)).logits[real])


def test_every_name_of_vilt_counts(tmp_path):
    vilt_reference("ViltForMaskedLM").save_pretrained(tmp_path)
    given = vilt_inputs()
    every_name_counts("vilt", tmp_path, lambda loaded: loaded.model.mlm_logits(**given)[given["text"].mask])


@pytest.mark.parametrize("bias", ["mlm_score.bias", "mlm_score.decoder.bias", "both"])
def test_vilt_with_a_decoder_of_its_own(tmp_path, bias):
    """As the authors trained it and as older files hold it: not tied to the token embedding."""
    reference = vilt_reference("ViltForMaskedLM")
    reference.save_pretrained(tmp_path)
    given, decoder = vilt_inputs(), torch.randn(1200, 32)

    def change(tensors):
        value = tensors.pop("mlm_score.decoder.bias")
        tensors |= {
            name: value.clone() for name in ("mlm_score.bias", "mlm_score.decoder.bias") if bias in (name, "both")
        }
        tensors["mlm_score.decoder.weight"] = decoder

    rewrite(tmp_path, change)
    reference.mlm_score.decoder.weight = torch.nn.Parameter(decoder)
    theirs, real = reference(**to_vilt(given)).logits, given["text"].mask
    assert same(load("vilt", tmp_path).model.mlm_logits(**given)[real], theirs[real])


def test_vilt_retrieval_as_transformers_does_it(tmp_path):
    """The sigmoid of their one logit is our probability."""
    reference = vilt_reference("ViltForImageAndTextRetrieval")
    reference.save_pretrained(tmp_path)
    given = vilt_inputs()
    loaded = load("vilt", tmp_path)
    assert loaded.missing == ("mlm_head",)
    assert same(loaded.model.match(**given), reference(**to_vilt(given)).logits[:, 0].sigmoid())


def test_vilt_answers_as_transformers_does(tmp_path):
    given, pair = vilt_inputs(), torch.randn(3, 2, 3, 32, 32)
    reference = vilt_reference("ViltForQuestionAnswering", num_labels=7)
    reference.save_pretrained(tmp_path / "vqa")
    loaded = load("vilt", tmp_path / "vqa")
    assert loaded.missing == () and same(loaded.model.answer(**given), reference(**to_vilt(given)).logits)

    options = {"num_labels": 2, "num_images": 2, "modality_type_vocab_size": 3}
    reference = vilt_reference("ViltForImagesAndTextClassification", **options)
    reference.save_pretrained(tmp_path / "nlvr2")
    ours = load("vilt", tmp_path / "nlvr2").model.answer(pair, given["text"])
    assert same(ours, reference(**theirs_of(given["text"]), pixel_values=pair).logits)


def test_vilt_keeps_the_shapes_of_pictures_and_its_positions_follow_a_new_size(tmp_path):
    reference = vilt_reference("ViltForImageAndTextRetrieval")
    reference.save_pretrained(tmp_path)
    load_tokenizer().save_pretrained(tmp_path)
    transformers.ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=8).save_pretrained(tmp_path)
    loaded = load("vilt", tmp_path)
    given = loaded(pictures(), ["a heart", "a dog"])
    assert given["pixel_mask"].shape == (2, *given["images"].shape[2:]) and not given["pixel_mask"].all()
    assert same(loaded.model.match(**given), reference(**to_vilt(given)).logits[:, 0].sigmoid())
    bigger = load("vilt", tmp_path, image_size=64)
    square = {**given, "images": torch.randn(2, 3, 64, 64), "pixel_mask": torch.ones(2, 64, 64, dtype=torch.bool)}
    assert same(bigger.model.match(**square), loaded.model.match(**square))
    assert min(bigger(pictures())["images"].shape[2:]) >= 64
    loaded.save(tmp_path / "mine")
    again = load("vilt", tmp_path / "mine")
    assert torch.equal(again.model.match(**again(pictures(), ["a heart", "a dog"])), loaded.model.match(**given))


def test_the_authors_vilt(golden, tmp_path):
    g = golden("vilt_official")
    given = {
        "images": g.inputs["pixel_values"],
        "pixel_mask": g.inputs["pixel_mask"],
        "text": golden_text(g.inputs),
    }
    torch.save({"state_dict": g.state}, tmp_path / "vqa.ckpt")
    pretrained = {name: tensor for name, tensor in g.state.items() if "vqa" not in name}
    torch.save({"state_dict": pretrained}, tmp_path / "mlm_itm.ckpt")
    answers = load("vilt", tmp_path / "vqa.ckpt", config=four_heads(vilt.authors_config(g.state, {})))
    assert same(answers.model.answer(**given), g.outputs["vqa_logits"], g.tolerance)
    loaded = load("vilt", tmp_path / "mlm_itm.ckpt", config=four_heads(vilt.authors_config(pretrained, {})))
    masked = golden_masked(g.inputs)
    logits = loaded.model.mlm_logits(**{**given, "text": masked.text})[masked.labels != IGNORE]
    assert loaded.missing == () and same(logits, g.outputs["mlm_logits"], g.tolerance)


# ------------------------------------------------------------------------------------------------------------- BLIP


def blip_reference(kind: str, width: int = 24) -> torch.nn.Module:
    config = transformers.BlipConfig(
        text_config=dict(
            vocab_size=1202, hidden_size=width, encoder_hidden_size=32, intermediate_size=40, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=20, bos_token_id=1200, sep_token_id=2, pad_token_id=0,
            eos_token_id=2,
        ),
        vision_config=dict(
            hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=32,
            patch_size=8,
        ),
        image_text_hidden_size=20,
    )  # fmt: skip
    return jittered(getattr(transformers, kind)(config))


def sharpened(reference: torch.nn.Module) -> torch.nn.Module:
    """Larger logits, above all of the closing token, or all captions would be equal and of full length."""
    with torch.no_grad():
        reference.text_decoder.cls.predictions.decoder.weight.mul_(6)
        reference.text_decoder.cls.predictions.bias[2] += 3
    return reference


def next_token_logits(model, image_tokens: torch.Tensor, text: Text) -> torch.Tensor:
    """BLIP's decoder: (B, L, V) logits of the token after each."""
    return model.caption_head(model.decode(text, image_tokens))


def up_to_end(ids: torch.Tensor) -> list[list[int]]:
    return [row[: row.index(2) + 1] if 2 in row else row for row in ids.tolist()]


def test_blip_captions_as_transformers_does(tmp_path):
    reference = sharpened(blip_reference("BlipForConditionalGeneration"))
    reference.save_pretrained(tmp_path)
    loaded = load("blip", tmp_path)
    assert set(loaded.missing) == {"text", "itc_head", "match_head"}
    images, text = 2 * torch.randn(6, 3, 32, 32), some_texts(6, 12)
    text.ids[:, 0] = 1200
    theirs = reference(pixel_values=images, **theirs_of(text))
    image_tokens = loaded.model.encode_image(images)
    assert same(image_tokens, theirs.last_hidden_state)
    assert same(next_token_logits(loaded.model, image_tokens, text)[text.mask], theirs.logits[text.mask])
    captions = []
    for beams in (1, 3):
        generated = loaded.model.generate(images, decoding=DecodingConfig(beams=beams, max_length=14))
        assert up_to_end(generated) == up_to_end(reference.generate(images, num_beams=beams, max_length=14)[:, 1:])
        captions += up_to_end(generated)
    assert len({tuple(row) for row in captions}) > 2 and len({len(row) for row in captions}) > 1


def test_every_name_of_a_blip_captioner_counts(tmp_path):
    blip_reference("BlipForConditionalGeneration").save_pretrained(tmp_path)
    images, text = torch.randn(4, 3, 32, 32), some_texts(4, 12)

    def output(loaded):
        return next_token_logits(loaded.model, loaded.model.encode_image(images), text)[text.mask]

    every_name_counts("blip", tmp_path, output)


@pytest.fixture
def blip_filter(tmp_path):
    reference = blip_reference("BlipForImageTextRetrieval")
    reference.save_pretrained(tmp_path)
    return tmp_path, reference, torch.randn(4, 3, 32, 32), some_texts(4, 12)


def test_blip_matches_as_transformers_does(blip_filter):
    folder, reference, images, text = blip_filter
    loaded = load("blip", folder)
    assert set(loaded.missing) == {"decoder", "caption_head", "itc_head.scale"}
    # our verbs put [ENC] first; transformers leaves that to its users
    logits = reference(**theirs_of(text.with_first(1201)), pixel_values=images, use_itm_head=True).itm_score
    assert same(loaded.model.match(images, text), logits.softmax(dim=1)[:, 1])
    cosines = reference(**theirs_of(text), pixel_values=images, use_itm_head=False).itm_score
    assert same(loaded.model.embed_images(images) @ loaded.model.embed_texts(text).T, cosines)


def test_every_name_of_a_blip_filter_counts(blip_filter):
    folder, _, images, text = blip_filter

    def output(loaded):
        return torch.cat([loaded.model.match(images, text)[None], loaded.model.similarity(images, text)])

    every_name_counts("blip", folder, output)


def test_blip_answers_questions_as_transformers_does(tmp_path):
    """Encoder and decoder share nothing there, and the decoder attends to the question, not to the image."""
    reference = blip_reference("BlipForQuestionAnswering", width=32)
    reference.save_pretrained(tmp_path)
    loaded = load("blip", tmp_path)
    assert set(loaded.missing) == {"itc_head", "match_head"}
    images, answers = torch.randn(4, 3, 32, 32), some_texts(4, 6)
    ids = torch.randint(3, 1000, (4, 12))
    ids[:, 0] = 1201
    questions = Text(ids, torch.ones_like(ids, dtype=torch.bool))  # without padding: transformers loses their mask
    their_images = reference.vision_model(images)[0]
    encoded = reference.text_encoder(ids, questions.mask.long(), encoder_hidden_states=their_images)[0]
    theirs = reference.text_decoder(**theirs_of(answers), encoder_hidden_states=encoded).logits
    ours = loaded.model.cross_encode(images, questions)
    assert same(ours, encoded)
    assert same(next_token_logits(loaded.model, ours, answers)[answers.mask], theirs[answers.mask])


def test_a_blip_of_which_a_shared_tensor_is_two_is_refused(golden, tmp_path):
    g = golden("blip_pretrain")
    state = g.state | {"text_decoder.bert.embeddings.LayerNorm.weight": torch.randn(32)}
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="decoder.embed.norm.weight and text.embed.norm.weight are one tensor"):
        load("blip", tmp_path / "model.pth", config=four_heads(blip.authors_config(g.state, {})))


def test_the_authors_blip(golden, tmp_path):
    """Its momentum model and its queue are not read."""
    g = golden("blip_pretrain")
    torch.save({"model": g.state, "epoch": 19}, tmp_path / "model_base.pth")
    config = four_heads(blip.authors_config(g.state, {}))
    assert (config.tokens.dec, config.tokens.enc) == (g.config["dec_token_id"], g.config["enc_token_id"])
    loaded = load("blip", tmp_path / "model_base.pth", config=config)
    images, text = g.inputs["pixel_values"], golden_text(g.inputs)
    model = loaded.model
    assert loaded.missing == ()
    assert same(model.encode_image(images), g.outputs["image_tokens"], g.tolerance)
    assert same(model.embed_images(images), g.outputs["image_feat"], g.tolerance)
    assert same(model.embed_texts(text), g.outputs["text_feat"], g.tolerance)
    assert same(model.cross_encode(images, text) * text.mask[..., None], g.outputs["fused_tokens"], g.tolerance)
    assert same(model.caption_logprob(images, text), g.outputs["caption_logprob"], g.tolerance)


# --------------------------------------------------------------------------------------------------------------- GIT


def git_reference(**settings) -> torch.nn.Module:
    """transformers' GIT of tiny sizes, jittered, with large logits."""
    config = transformers.GitConfig(
        vision_config=dict(
            hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=32,
            patch_size=8, hidden_act="gelu",
        ),
        vocab_size=1202, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=20, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings,
    )  # fmt: skip
    reference = jittered(transformers.GitForCausalLM(config))
    for module in reference.git.image_encoder.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "sdpa"  # the eager one rounds attention weights to float32
    with torch.no_grad():
        reference.output.weight.mul_(6)
        reference.output.bias[2] += 4
        for layer in reference.git.encoder.layer:  # texts depend on the image
            layer.attention.output.dense.weight.mul_(8)
    return reference


def git_logits(model, images: torch.Tensor, text: Text) -> torch.Tensor:
    """(B, L, V) logits of the token after each."""
    return next_token_logits(model, model.encode_image(images), text)


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}, {"num_image_with_embedding": 3}])
def test_git_captions_as_transformers_does(tmp_path, settings):
    reference = git_reference(**settings)
    reference.save_pretrained(tmp_path)
    loaded = load("git", tmp_path)
    assert loaded.missing == () and loaded.model.config.tie_words == bool(settings.get("tie_word_embeddings"))
    frames = settings.get("num_image_with_embedding", 0)
    shape = (6, frames, 3, 32, 32) if frames else (6, 3, 32, 32)
    images, text = 2 * torch.randn(shape), some_texts(6, 12)
    text.ids[:, 0] = 1
    theirs = reference(pixel_values=images, **theirs_of(text)).logits[:, -12:]
    assert same(git_logits(loaded.model, images, text)[text.mask], theirs[text.mask])
    captions = []
    for options in ({}, {"beams": 4, "length_penalty": 0.6}):
        generated = loaded.model.generate(images, decoding=DecodingConfig(max_length=14, **options))
        own = {"num_beams" if name == "beams" else name: value for name, value in options.items()}
        ids = torch.ones(6, 1, dtype=torch.long)
        expected = reference.generate(pixel_values=images, input_ids=ids, max_length=14, **own)
        assert up_to_end(generated) == up_to_end(expected[:, 1:])
        captions += up_to_end(generated)
    assert len({tuple(row) for row in captions}) > 2 and len({len(row) for row in captions}) > 1


def test_every_name_of_git_counts(tmp_path):
    git_reference().save_pretrained(tmp_path)
    images, text = torch.randn(4, 3, 32, 32), some_texts(4, 12)
    every_name_counts("git", tmp_path, lambda loaded: git_logits(loaded.model, images, text)[text.mask])


def test_settings_of_git_that_we_cannot_express(tmp_path):
    git_reference().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for key, value, says in [
        ("eos_token_id", [2, 3], "'eos_token_id' is .*one token id"),
        ("position_embedding_type", "relative_key", "'position_embedding_type' is \"relative_key\""),
        ("surprise", 1, "we do not know the setting 'surprise'"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**settings, key: value}))
        with pytest.raises(CheckpointError, match=says):
            load("git", tmp_path)


def test_the_authors_git(golden, tmp_path):
    g = golden("git_official")
    torch.save({"model": {f"module.{name}": tensor for name, tensor in g.state.items()}}, tmp_path / "model.pt")
    loaded = load("git", tmp_path / "model.pt", config=four_heads(git.authors_config(g.state, {})))
    images, text = g.inputs["pixel_values"], golden_text(g.inputs)
    assert loaded.missing == ()
    assert same(loaded.model.encode_image(images), g.outputs["vision_tokens"], g.tolerance)
    video = loaded.model.encode_image(g.inputs["frames"].transpose(0, 1))
    assert same(video, g.outputs["video_tokens"], g.tolerance)
    assert same(git_logits(loaded.model, images, text) * text.mask[..., None], g.outputs["logits"], g.tolerance)


# --------------------------------------------------------------------------------------------- ALBEF, X-VLM and VLMo


def authors_file(path, state: dict, family: str, **options):
    """Write the golden model's weights as the authors would, and load them."""
    torch.save({"model": state, "epoch": 3}, path)
    return load(family, path, **options)


def test_the_authors_albef(golden, tmp_path):
    g = golden("albef_pretrain")
    images, text, masked = g.inputs["pixel_values"], golden_text(g.inputs), golden_masked(g.inputs)
    config = four_heads(albef.config(g.state, {}))
    loaded = authors_file(tmp_path / "ALBEF.pth", g.state, "albef", config=config)
    model, predicted = loaded.model, masked.labels != IGNORE
    assert loaded.missing == () and model.momentum_model is None
    assert same(model.encode_image(images), g.outputs["image_tokens"], g.tolerance)
    assert same(model.embed_images(images), g.outputs["image_feat"], g.tolerance)
    assert same(model.embed_texts(text), g.outputs["text_feat"], g.tolerance)
    assert same(model.cross_encode(images, text) * text.mask[..., None], g.outputs["fused_tokens"], g.tolerance)
    assert same(model.match(images, text), g.outputs["itm_logits"][: len(text)].softmax(1)[:, 1], g.tolerance)
    assert same(model.mlm_logits(images, masked.text)[predicted], g.outputs["mlm_logits"], g.tolerance)
    assert same(model.itc_head.scale.temperature, g.state["temp"], 0)

    tuned = {name.replace(".bert.", "."): value for name, value in g.state.items() if ".cls." not in name}
    loaded = authors_file(tmp_path / "retrieval.pth", tuned, "albef", config=four_heads(albef.config(tuned, {})))
    assert loaded.missing == ("mlm_head",)
    assert same(loaded.model.match(images, text), model.match(images, text), 0)

    bigger = authors_file(tmp_path / "ALBEF.pth", g.state, "albef", config=config, image_size=48).model
    images = torch.randn(2, 3, 48, 48)
    assert bigger.config.image.grid == (6, 6) and same(bigger.encode_image(images), model.encode_image(images))


@pytest.mark.parametrize("kind", ["swin", "deit", "clipvit"])
def test_the_authors_xvlm(golden, tmp_path, kind):
    g = golden(f"xvlm_{kind}")
    given = g.inputs
    images, rows, boxes = given["pixel_values"], given["idx_to_group_img"], given["target_bbox"]
    text, masked = golden_text(given), golden_masked(given)
    derive = {"swin": xvlm.swin_config, "deit": xvlm.vit_tower_config, "clipvit": xvlm.clip_tower_config}[kind]
    config = replace(four_heads(derive(g.state, {})), region_blocks=g.config.get("local_attn_depth", 0))
    assert config.image.image_size == g.config["image_size"][0]
    loaded = authors_file(tmp_path / "x_vlm.th", g.state, "xvlm", config=config)
    model, out = loaded.model, g.outputs
    assert loaded.missing == ()
    assert same(model.encode_image(images), out["image_tokens"], g.tolerance)
    assert same(model.embed_images(images)[rows], out["pair.image_feat"], g.tolerance)
    assert same(model.embed_texts(text), out["pair.text_feat"], g.tolerance)
    assert same(model.embed_regions(images, boxes, rows), out["region.image_feat"], g.tolerance)
    probability = model.match(images[rows], text)
    assert same(probability, out["pair.itm_logits"][: len(text)].softmax(dim=1)[:, 1], g.tolerance)
    assert same(model.ground(images[rows], text), out["region.box_pred"], g.tolerance)
    logits = model.mlm_logits(images[rows], masked.text)[masked.labels != IGNORE]
    assert same(logits, out["pair.mlm_logits"], g.tolerance)
    if kind == "swin":
        with pytest.raises(ValueError, match="they are relative.*this model keeps its 64 x 64 pixels"):
            load("xvlm", tmp_path / "x_vlm.th", config=config, image_size=128)


def test_an_xvlm_for_images_that_are_not_square(golden, tmp_path):
    """The sizes come from the checkpoint; a stage of one window in one direction shifts in neither, as released."""
    pytest.importorskip("timm")
    g = golden("xvlm_swin")
    sizes = dict(image_size=(64, 128), patch_size=4, embed_dim=12, depths=[2, 1, 2], num_heads=[1, 2, 4], window_size=4)
    swin = jittered(transformers.SwinModel(transformers.SwinConfig(**sizes), add_pooling_layer=False))
    mask = swin.encoder.layers[0].blocks[1].get_attn_mask(16, 32, torch.float64, "cpu")
    state = {name: tensor for name, tensor in g.state.items() if not name.startswith("vision_encoder.")}
    state |= {
        f"vision_encoder.{name}": tensor for name, tensor in as_the_authors_name_a_swin(swin.state_dict()).items()
    }
    state["vision_encoder.layers.0.blocks.1.attn_mask"] = mask
    config = four_heads(xvlm.swin_config(state, {}))
    assert config.image.image_size == (64, 128) and config.image.grid == (4, 8)
    model = authors_file(tmp_path / "x_vlm.th", state, "xvlm", config=config).model
    images = torch.randn(2, 3, 64, 128)
    theirs = swin(images).last_hidden_state
    assert same(model.encode_image(images)[:, 1:], theirs)
    boxes = torch.tensor([[0.25, 0.5, 0.5, 1.0]])  # the left half
    assert model.patches_inside(boxes, images)[0].view(4, 8).tolist() == [[True] * 4 + [False] * 4] * 4


def as_the_authors_name_a_swin(state: dict) -> dict:
    """transformers' names of a Swin transformer's weights, as X-VLM's authors have them."""
    renames = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.norm": "patch_embed.norm",
        "encoder.layers": "layers",
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.o_proj": "attn.proj",
        "attention.relative_position_bias": "attn",
        "layernorm": "norm",
    }
    renamed = {}
    for name, tensor in state.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    for name in [n for n in renamed if ".attention.q_proj." in n]:
        parts = [renamed.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        renamed[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return renamed


def test_a_swin_whose_image_size_is_unknown_is_refused(golden, tmp_path):
    """Not read as square: another shape would have other windows."""
    g = golden("xvlm_swin")
    state = {name: tensor for name, tensor in g.state.items() if not name.endswith("attn_mask")}
    with pytest.raises(CheckpointError, match=r"x_vlm.th: .*height and width.*give `config=`.*image_size"):
        authors_file(tmp_path / "x_vlm.th", state, "xvlm")
    config = four_heads(xvlm.swin_config(g.state, {}))
    loaded = authors_file(tmp_path / "x_vlm.th", state, "xvlm", config=config)
    images = g.inputs["pixel_values"]
    assert same(loaded.model.encode_image(images), g.outputs["image_tokens"], g.tolerance)


@pytest.mark.parametrize("rows, columns, window", [(2, 3, 4), (1, 3, 7), (3, 1, 4), (8, 8, 7), (4, 16, 4), (1, 2, 3)])
def test_the_windows_of_a_swin_are_known_by_its_mask(rows, columns, window):
    timm = pytest.importorskip("timm.models.swin_transformer")
    sizes = dict(window_size=window, shift_size=window // 2, always_partition=True)
    mask = timm.SwinTransformerBlock(8, (rows * window, columns * window), 1, **sizes).attn_mask
    assert len(mask) == rows * columns and xvlm.windows_of(mask, window) == (rows, columns)
    with pytest.raises(CheckpointError, match="give `config=`"):
        xvlm.windows_of(mask.flip(0).flip(1), window)


def test_positions_that_are_no_square_are_refused(golden, tmp_path):
    g = golden("albef_pretrain")
    state = g.state | {"visual_encoder.pos_embed": torch.randn(1, 1 + 24, 32)}
    with pytest.raises(CheckpointError, match=r"ALBEF.pth: 24 patch positions are no square.*`config=`"):
        authors_file(tmp_path / "ALBEF.pth", state, "albef")
    config = four_heads(albef.config(g.state, {}))
    config = replace(config, image=replace(config.image, image_size=(32, 48)))
    model = authors_file(tmp_path / "ALBEF.pth", state, "albef", config=config).model
    assert model.encode_image(torch.randn(1, 3, 32, 48)).shape == (1, 25, 32)


def test_a_config_with_a_momentum_model_loads_without_it(golden, tmp_path):
    """The papers' presets have one, which only training needs."""
    g = golden("albef_pretrain")
    config = replace(four_heads(albef.config(g.state, {})), momentum=ALBEFConfig.paper().momentum)
    loaded = authors_file(tmp_path / "ALBEF.pth", g.state, "albef", config=config)
    assert loaded.model.config.momentum is None and loaded.model.momentum_model is None
    with pytest.raises(ValueError, match="`config=` is a CLIPConfig; albef takes ALBEFConfig"):
        load("albef", tmp_path / "ALBEF.pth", config=CLIPConfig.nano())


@pytest.mark.parametrize("name", ["vlmo_pretrain", "vlmo_stage2_text"])
def test_the_authors_vlmo(golden, tmp_path, name):
    g = golden(name)
    numbers, given, out = g.config, g.inputs, g.outputs
    text, masked = golden_text(given), golden_masked(given)
    with pytest.raises(
        CheckpointError, match="vlmo.pt: 82 relative positions.*give `config="
    ):  # texts are shorter here
        authors_file(tmp_path / "vlmo.pt", g.state, "vlmo")
    config = golden_vlmo_config(numbers)
    loaded = load("vlmo", tmp_path / "vlmo.pt", config=config)
    model, predicted = loaded.model, masked.labels != IGNORE
    assert same(model.encode_text(text) * text.mask[..., None], out["text_tokens"], g.tolerance)
    if numbers["stage2_textmlm"]:
        assert set(loaded.missing) == {"match_head.classifier", "itc_head", "itc_head_vl"}
        logits = model.mlm_head(model.encode_text(masked.text)[predicted])
        assert same(logits, out["mlm_logits"], g.tolerance)
        return
    images = given["pixel_values"]
    assert loaded.missing == ()
    assert same(model.similarity(images, text), out["logits_per_image"], g.tolerance)
    assert same(model.match(images, text), out["itm_logits"][: len(text)].softmax(dim=1)[:, 1], g.tolerance)
    assert same(model.mlm_logits(images, masked.text)[predicted], out["mlm_logits"], g.tolerance)
    assert same(model.itc_head_vl.scale(), out["scale_vl"], g.tolerance)
    with pytest.raises(ValueError, match="relative"):
        load("vlmo", tmp_path / "vlmo.pt", config=config, image_size=64)
    before = model.match(images, text)
    for a, b in (("norm2_text.weight", "norm2_imag.weight"), ("gamma_1", "gamma_2"), ("attn.q_bias", "attn.v_bias")):
        a, b = (f"transformer.blocks.0.{part}" for part in (a, b))
        swapped = authors_file(tmp_path / "a.pt", g.state | {a: g.state[b], b: g.state[a]}, "vlmo", config=config)
        assert not same(swapped.model.match(images, text), before), a
    other = {n: t for n, t in g.state.items() if n != a} | {"head.wrong": g.state[a]}
    with pytest.raises(CheckpointError, match=r"missing: transformer.blocks.0.*; unknown: head.wrong"):
        authors_file(tmp_path / "a.pt", other, "vlmo", config=config)


@pytest.mark.parametrize(
    ("family", "name", "swap", "renamed"),
    [
        ("albef", "albef_pretrain", "text_encoder.bert.encoder.layer.{}.output.dense.bias", "itm_head.bias"),
        ("xvlm", "xvlm_deit", "text_encoder.bert.encoder.layer.{}.output.LayerNorm.weight", "bbox_head.3.bias"),
        ("xvlm", "xvlm_swin", "vision_encoder.layers.{}.blocks.0.attn.proj.weight", "vision_encoder.norm.bias"),
        ("xvlm", "xvlm_clipvit", "vision_encoder.encoder.layers.{}.self_attn.v_proj.bias", "bbox_head.0.bias"),
        ("blip", "blip_pretrain", "text_encoder.encoder.layer.{}.attention.self.value.bias", "itm_head.bias"),
        ("vilt", "vilt_official", "transformer.blocks.{}.attn.qkv.weight", "itm_score.fc.bias"),
    ],
)
def test_every_name_of_the_authors_counts(golden, tmp_path, family, name, swap, renamed):
    """Swapped tensors of two layers change the output; a wrong name is reported, as missing and as unknown."""
    g = golden(name)
    state = {n: t for n, t in g.state.items() if not n.startswith("vqa_")}
    config = four_heads(release_for(family, state).config(state, {}))
    images, text = g.inputs["pixel_values"][:2], golden_text(g.inputs)[:2]
    before = authors_file(tmp_path / "a.pth", state, family, config=config).model.match(images, text)
    a, b = (swap.format(n) for n in ((0, 1) if "swin" not in name else (0, 0)))
    b = b if a != b else a.replace("blocks.0", "blocks.1")
    swapped = state | {a: state[b], b: state[a]}
    assert not same(authors_file(tmp_path / "a.pth", swapped, family, config=config).model.match(images, text), before)
    other = {n: t for n, t in state.items() if n != renamed} | {"head.wrong": state[renamed]}
    with pytest.raises(CheckpointError, match=f"missing: {renamed}; unknown: head.wrong"):
        authors_file(tmp_path / "a.pth", other, family, config=config)


def of_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def bert_shapes(before: str, vocabulary: int, layers: int) -> dict[str, tuple[int, ...]]:
    names = {
        f"{before}embeddings.word_embeddings.weight": (vocabulary, 768),
        f"{before}embeddings.LayerNorm.bias": (768,),
    }
    names |= {f"{before}embeddings.position_embeddings.weight": (512, 768)}
    return names | {f"{before}encoder.layer.{n}.intermediate.dense.weight": (3072, 768) for n in range(layers)}


def vit_shapes(before: str, patch: int, positions: int) -> dict[str, tuple[int, ...]]:
    names = {f"{before}patch_embed.proj.weight": (768, 3, patch, patch), f"{before}pos_embed": (1, positions, 768)}
    return names | {f"{before}blocks.{n}.mlp.fc1.weight": (3072, 768) for n in range(12)}


def test_sizes_of_the_released_checkpoints_are_the_papers():
    """Derived from the shapes that the authors' files have."""
    cross = {f"text_encoder.bert.encoder.layer.{n}.crossattention.self.query.weight": (768, 768) for n in range(6, 12)}
    texts_of = {**bert_shapes("text_encoder.bert.", 30522, 12), **cross, "text_proj.weight": (256, 768)}
    state = of_shapes({**vit_shapes("visual_encoder.", 16, 257), **texts_of})
    assert albef.config(state, {}) == replace(ALBEFConfig.paper(), momentum=None)

    swin = {"vision_encoder.patch_embed.proj.weight": (128, 3, 4, 4)}
    for stage, (depth, count) in enumerate(zip((2, 2, 18, 2), (4, 8, 16, 32), strict=True)):
        swin |= {
            f"vision_encoder.layers.{stage}.blocks.{n}.attn.relative_position_bias_table": (169, count)
            for n in range(depth)
        }
    timm = pytest.importorskip("timm.models.swin_transformer")
    mask = timm.SwinTransformerBlock(8, (56, 56), 1, window_size=7, shift_size=3).attn_mask
    tensors = of_shapes({**swin, **texts_of}) | {"vision_encoder.layers.0.blocks.1.attn_mask": mask}
    assert xvlm.swin_config(tensors, {}) == XVLMConfig.paper()

    state = of_shapes(
        {
            **vit_shapes("visual_encoder.", 16, 197),
            **bert_shapes("text_encoder.", 30524, 12),
            **bert_shapes("text_decoder.bert.", 30524, 12),
            "vision_proj.weight": (256, 768),
        }
    )
    assert blip.authors_config(state, {}) == replace(BLIPConfig.paper(), momentum=None)
    shapes = {
        "image_encoder.conv1.weight": (768, 3, 16, 16),
        "image_encoder.positional_embedding": (197, 768),
        **{f"image_encoder.transformer.resblocks.{n}.mlp.c_fc.weight": (3072, 768) for n in range(12)},
        "textual.embedding.words.weight": (30522, 768),
        "textual.embedding.positions.weight": (1024, 768),
        **{f"textual.transformer.encoder.layer.{n}.intermediate.dense.weight": (3072, 768) for n in range(6)},
    }
    assert git.authors_config(of_shapes(shapes), {}) == GITConfig.paper()

    state = of_shapes(
        {
            **vit_shapes("transformer.", 32, 145),
            "text_embeddings.word_embeddings.weight": (30522, 768),
            "text_embeddings.position_embeddings.weight": (40, 768),
        }
    )
    assert vilt.authors_config(state, {}) == ViLTConfig.paper()

    shapes = {
        "transformer.patch_embed.proj.weight": (768, 3, 16, 16),
        "relative_position_bias_table": (27**2 + 3 + 2 + 2 * 196, 12 * 12),
        "text_embeddings.word_embeddings.weight": (30522, 768),
        **{f"transformer.blocks.{n}.mlp_text.fc1.weight": (3072, 768) for n in range(12)},
        **{f"transformer.blocks.{n}.mlp_vl.fc1.weight": (3072, 768) for n in (10, 11)},
    }
    assert vlmo.config(of_shapes(shapes), {}) == VLMoConfig.paper()


@pytest.mark.parametrize(("family", "kind"), [("clip", "CLIP"), ("vilt", "Vilt"), ("blip", "Blip"), ("git", "Git")])
def test_sizes_of_transformers_defaults_are_the_papers(family, kind):
    """transformers' defaults are the base models; what differs is named here."""
    settings = getattr(transformers, f"{kind}Config")().to_dict()
    ours = PAPERS[family].release_list()[0].config({}, settings)
    paper = PAPERS[family].model_class().Config.paper()
    if family == "clip":
        paper = replace(paper, text=replace(paper.text, word_std=0.02, position_std=0.01))
    if family == "vilt":  # its LayerNorms all have BERT's epsilon there
        block = replace(paper.image.block, norm_eps=1e-12)
        paper = replace(paper, image=replace(paper.image, block=block), text=replace(paper.text, block=block))
    if family == "blip":  # the captioner's 384 pixels, and another epsilon
        block = replace(paper.image.block, norm_eps=1e-5)
        paper = replace(paper, image=replace(paper.image, image_size=384, block=block), momentum=None)
        paper = replace(paper, text=replace(paper.text, block=replace(paper.text.block, heads=8)))
    if family == "git":  # an output layer of its own, and one epsilon for all of the decoder
        paper = replace(paper, tie_words=False, embed_eps=1e-12)
    assert ours == paper


# -------------------------------------------------------------------------------------------------------------- CoCa


def coca_folder(folder, pooled: bool | str, width: int = 24, **text) -> torch.nn.Module:
    """open_clip's CoCa of tiny sizes, jittered, in the folder that open_clip would write; the model itself."""
    open_clip = pytest.importorskip("open_clip")
    settings = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": width, "patch_size": 8, "head_width": 8,
            "attentional_pool": pooled, "attn_pooler_heads": 4, "attn_pooler_queries": 5, "output_tokens": True,
        },
        "text_cfg": {
            "context_length": 12, "vocab_size": 60, "width": 24, "heads": 2, "layers": 2, "embed_cls": True,
            "output_tokens": True, **text,
        },
        "multimodal_cfg": {"context_length": 12, "vocab_size": 60, "width": 24, "heads": 2, "layers": 3},
    }  # fmt: skip
    reference = open_clip.CoCa(**settings)
    torch.nn.init.normal_(reference.text_decoder.text_projection, std=0.2)  # open_clip leaves it as the memory was
    reference = jittered(reference)
    settings["custom_text"] = True
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    state = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    return reference


def coca_texts(rows: int = 4, length: int = 12) -> Text:
    """As open_clip's tokenizer makes them: start 58, end 59, filled up with zeros to the whole length."""
    lengths = torch.tensor([length, 5, 9, 7])[:rows, None]
    places = torch.arange(length)
    ids = torch.randint(3, 58, (rows, length)).masked_fill(places == lengths - 1, 59) * (places < lengths)
    ids[:, 0] = 58
    return Text(ids, places < lengths)


@pytest.mark.parametrize("pooled, width", [(True, 32), (True, 24), ("cascade", 24), ("parallel", 24)])
def test_coca_of_open_clip(tmp_path, pooled, width):
    """Vectors, logits of next tokens and both losses; texts without the padding that open_clip adds give the same."""
    reference = coca_folder(tmp_path, pooled, width)
    images, text = torch.randn(4, 3, 32, 32), coca_texts()
    loaded = load("coca", tmp_path)
    model = loaded.model
    assert isinstance(model, CoCa) and loaded.missing == () and model.config.legacy_mask
    with torch.no_grad():
        theirs = reference(images, text.ids)
        decoded = model.decode(text, model.image_context(images))
        predicted = text.mask[:, 1:]
        assert same(model.embed_images(images), theirs["image_features"].reshape(4, -1))
        for given in (text, text[1:].trimmed()):
            assert same(model.embed_texts(given), theirs["text_features"][-len(given) :])
        assert same(model.caption_head(decoded[:, :-1])[predicted], theirs["logits"][predicted])
        assert same(model.itc_head.scale(), theirs["logit_scale"])
        losses = model.losses(Batch(images, text, torch.arange(4)))
        own = reference_loss(theirs, text)
        assert abs(losses["itc"] - own[0]) < 1e-10 and abs(losses["lm"] - own[1]) < 1e-10


def reference_loss(outputs: dict, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
    """open_clip's own loss of its outputs."""
    from open_clip.loss import CoCaLoss

    outputs = {name: value.reshape(4, -1) if "features" in name else value for name, value in outputs.items()}
    return CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(**outputs)


def test_every_name_of_coca_counts(tmp_path):
    coca_folder(tmp_path, "cascade")
    images, text = torch.randn(4, 3, 32, 32), coca_texts()
    config = load("coca", tmp_path).model.config
    (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "model.safetensors")

    def output(loaded):
        return torch.cat([loaded.model.similarity(images, text), loaded.model.caption_logprob(images, text)[None]])

    every_name_counts("coca", tmp_path, output, config=config)


@pytest.fixture
def open_clip_writes(monkeypatch):
    """Lets open_clip's `generate` run: it switches itself off where transformers has no BeamSearchScorer (from 5.0 on).
    Its greedy loop needs only classes that are still there."""
    module = pytest.importorskip("open_clip.coca_model")
    wanted = "LogitsProcessorList MinLengthLogitsProcessor RepetitionPenaltyLogitsProcessor MaxLengthCriteria"
    for name in (*wanted.split(), "StoppingCriteriaList", "TopKLogitsWarper"):
        monkeypatch.setattr(module, name, getattr(transformers, name), raising=False)
    monkeypatch.setattr(module, "_has_transformers", True)
    monkeypatch.setitem(module.GENERATION_TYPES, "top_k", transformers.TopKLogitsWarper)


@pytest.mark.parametrize("pooled", [True, "cascade"])
def test_coca_writes_what_open_clip_writes(tmp_path, open_clip_writes, pooled):
    """Token by token, with the start and the end of CLIP's vocabulary, and both shortest lengths."""
    reference = coca_folder(tmp_path, pooled)
    with torch.no_grad():  # larger logits that depend on image and place; the end is likely, padding is not
        for block in reference.text_decoder.cross_attn:
            block.attn.out_proj.weight.mul_(12)
        reference.visual.attn_pool.attn.in_proj_weight[:24].mul_(6)
        reference.text_decoder.text_projection.mul_(6)
        reference.text.positional_embedding.mul_(10)
        reference.text_decoder.text_projection[:, 59] = reference.text_decoder.text_projection[:, 10:30].sum(1) / 2
        reference.text_decoder.text_projection[:, 0] = 0
    save_file({n: t.contiguous() for n, t in reference.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    model, images, seen = load("coca", tmp_path).model, 2 * torch.randn(24, 3, 32, 32), set()
    for shortest in (1, 5):
        theirs = reference.generate(
            images, seq_len=11, max_seq_len=12, generation_type="top_k", top_k=1, min_seq_len=shortest,
            sot_token_id=58, eos_token_id=59,
        )[:, 1:]  # fmt: skip
        ours = model.generate(images, decoding=DecodingConfig(max_length=11, min_length=shortest))
        for own, other in zip(ours.tolist(), theirs.tolist(), strict=True):
            end = other.index(59)  # open_clip ends a text of full length with it, whatever came next
            assert own[:end] == other[:end] and (own[end] == 59 or end == 9)
            seen.add(tuple(other[: end + 1]))
    assert len(seen) > 4 and len({len(text) for text in seen}) > 2  # captions of several lengths were compared


def test_settings_of_open_clips_coca_that_we_cannot_express(tmp_path):
    coca_folder(tmp_path, True)
    file = tmp_path / "open_clip_config.json"
    settings = json.loads(file.read_text())
    for part, key, value, says in [
        ("vision_cfg", "attentional_pool", None, "'attentional_pool' is missing; our model can express"),
        ("vision_cfg", "attentional_pool", "avg", "'attentional_pool' is \"avg\""),
        ("text_cfg", "embed_cls", False, "'embed_cls' is false"),
        ("text_cfg", "hf_tokenizer_name", "gpt2", "'hf_tokenizer_name' is \"gpt2\""),
        ("multimodal_cfg", "heads", 4, "its layers are .*heads=4.* ours are of one kind"),
        ("multimodal_cfg", "context_length", 10, "at least that of 'text_cfg'"),
        ("multimodal_cfg", "surprise", 1, "we do not know the setting 'surprise'"),
    ]:
        changed = {**settings["model_cfg"], part: {**settings["model_cfg"][part], key: value}}
        file.write_text(json.dumps({"model_cfg": changed}))
        with pytest.raises(CheckpointError, match=says):
            load("coca", tmp_path)
    changed = {**settings["model_cfg"], "text_cfg": {**settings["model_cfg"]["text_cfg"], "correct_cls_mask": True}}
    file.write_text(json.dumps({"model_cfg": changed}))
    assert not load("coca", tmp_path).model.config.legacy_mask


def test_a_coca_that_was_saved_loads_as_it_was(tmp_path):
    coca_folder(tmp_path, "parallel")
    loaded = load("coca", tmp_path)
    save_pretrained(loaded.model, tmp_path / "ours")
    again = load("coca", tmp_path / "ours").model
    images, text = torch.randn(4, 3, 32, 32), coca_texts()
    assert again.config == loaded.model.config
    assert same(again.similarity(images, text), loaded.model.similarity(images, text), 1e-6)  # files are float32
    assert again.config.pooling == ParallelPooling(5, 4)


# ------------------------------------------------------------------------------------------------- the table of parity

PARITY = {  # test -> family, what was compared, with what
    "test_clip_of_transformers": ("CLIP", "image and text vectors, similarity", "transformers 5.24 `CLIPModel`"),
    "test_clip_of_open_clip": ("CLIP", "image and text vectors, scale", "open_clip 3.3 `CLIP`"),
    "test_coca_of_open_clip": (
        "CoCa", "image and text vectors, logits of next tokens, both losses (three poolings)", "open_clip 3.3 `CoCa`",
    ),
    "test_coca_writes_what_open_clip_writes": (
        "CoCa", "captions token by token, greedily", "open_clip 3.3 `CoCa.generate`",
    ),
    "test_vilt_predicts_masked_tokens_as_transformers_does": (
        "ViLT", "logits of masked tokens, images of three shapes", "transformers 5.24 `ViltForMaskedLM`",
    ),
    "test_vilt_retrieval_as_transformers_does_it": (
        "ViLT", "probability of a match", "transformers 5.24 `ViltForImageAndTextRetrieval`",
    ),
    "test_vilt_answers_as_transformers_does": (
        "ViLT", "logits of answers (VQA, NLVR2)",
        "transformers 5.24 `ViltForQuestionAnswering`, `ViltForImagesAndTextClassification`",
    ),
    "test_the_authors_vilt": ("ViLT", "logits of masked tokens and of answers", "the authors' code, 762fd39"),
    "test_blip_captions_as_transformers_does": (
        "BLIP", "image tokens, logits of next tokens; captions token by token, greedily and with 3 beams",
        "transformers 5.24 `BlipForConditionalGeneration`",
    ),
    "test_blip_matches_as_transformers_does": (
        "BLIP", "probability of a match, cosines", "transformers 5.24 `BlipForImageTextRetrieval`",
    ),
    "test_blip_answers_questions_as_transformers_does": (
        "BLIP", "question tokens, logits of the answer", "transformers 5.24 `BlipForQuestionAnswering`",
    ),
    "test_the_authors_blip": (
        "BLIP", "image and fused tokens, vectors, log-probability of captions", "the authors' code, {blip_pretrain}",
    ),
    "test_git_captions_as_transformers_does": (
        "GIT", "logits of next tokens, of images and of videos; captions token by token, greedily and with 4 beams",
        "transformers 5.24 `GitForCausalLM`",
    ),
    "test_the_authors_git": (
        "GIT", "image and video tokens, logits of next tokens", "the authors' code, {git_official}",
    ),
    "test_the_authors_albef": (
        "ALBEF", "tokens, vectors, probability of a match, logits of masked tokens",
        "the authors' code, {albef_pretrain}",
    ),
    "test_the_authors_vlmo": (
        "VLMo", "text tokens, similarity, probability of a match, logits of masked tokens",
        "the authors' code, {vlmo_pretrain}",
    ),
    "test_the_authors_xvlm": (
        "X-VLM",
        "image tokens, vectors of images and regions, matches, boxes, logits of masked tokens (three image towers)",
        "the authors' code, {xvlm_swin}",
    ),
}  # fmt: skip


def test_the_table_in_the_docs_is_what_is_tested(golden):
    page = (Path(__file__).parents[1] / "docs" / "pretrained.md").read_text(encoding="utf-8")
    written = [line for line in page.splitlines() if line.endswith("` |") and "`test_" in line]
    expected = []
    for test, (family, compared, reference) in PARITY.items():
        assert test in globals()
        if "{" in reference:
            name = reference[reference.index("{") + 1 : -1]
            reference = reference.replace("{" + name + "}", golden(name).info["reference"]["commit"])
        within = "1e-9" if "authors" in reference else "1e-10"
        expected.append(f"| {family} | {compared} | {reference} | {within} | `{test}` |")
    assert written == expected, "\n".join(expected)
    authors = ("albef_pretrain", "blip_pretrain", "git_official", "vlmo_pretrain", "xvlm_swin")
    assert all(golden(name).tolerance == 1e-9 for name in authors)


# ---------------------------------------------------------------------------------------------- what cannot be read


def test_messages_say_what_to_do(clip_folder, tmp_path):
    folder, _ = clip_folder
    for source, says in [
        ("openai/clip-vit-base-patch32", "hub cannot be reached.*folder"),  # the tests have no network
        (tmp_path / "nowhere", "no such file or folder"),
        ("nowhere", "no such file or folder"),
    ]:
        with pytest.raises(CheckpointError, match=says):
            load("clip", source)
    with pytest.raises(ValueError, match="no family 'clap'; there are clip, "):
        load("clap", folder)
    with pytest.raises(CheckpointError, match="sizes cannot be derived.*CLIPConfig.paper"):
        load("clip", save_open_clip(tmp_path / "alone.pt"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="no config.json"):
        load("clip", empty)
    shutil.copy(folder / "config.json", empty)
    with pytest.raises(CheckpointError, match="none of model.safetensors, pytorch_model.bin"):
        load("clip", empty)
    (empty / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors.*truncated"):
        load("clip", empty)
    save_file({"x": torch.zeros(1)}, empty / "model.safetensors")
    with pytest.raises(CheckpointError, match="no CLIP that we know.*vision_model"):
        load("clip", empty)


def in_the_hubs_cache(folder, cache, monkeypatch, name: str) -> str:
    """Put a folder's files where the hub's own library keeps what it has downloaded."""
    snapshot = cache / f"models--{name.replace('/', '--')}" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return name


def test_a_hub_id_is_read_from_the_cache_without_a_connection(clip_folder, tmp_path_factory, monkeypatch):
    """Also one that has only the old pickled weights, as `openai/clip-vit-base-patch32` does."""
    folder, reference = clip_folder
    torch.save(reference.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    name = in_the_hubs_cache(folder, tmp_path_factory.mktemp("cache"), monkeypatch, "someone/tiny-clip")
    images, text = clip_inputs()
    ours = load("clip", name).model.similarity(images, text)
    assert same(ours, reference(**theirs_of(text), pixel_values=images).logits_per_image)
    with pytest.raises(CheckpointError, match="hub cannot be reached"):
        load("clip", "someone/else")


def save_open_clip(path):
    torch.save({"visual.proj": torch.zeros(3, 2)}, path)
    return path


class Foreign:
    """Something that runs code when it is unpickled."""

    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickled_file_runs_nothing(tmp_path, capsys):
    torch.save({"model": {"visual.proj": torch.zeros(2, 2)}, "config": Foreign()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="evil.pth.*more than tensors"):
        load("clip", tmp_path / "evil.pth")
    assert "must not run" not in capsys.readouterr().out


def test_tensors_of_other_sizes_are_named(clip_folder):
    folder, _ = clip_folder
    rewrite(folder, lambda t: t.update({"text_projection.weight": torch.zeros(21, 24)}))
    with pytest.raises(CheckpointError, match=r"itc_head.project_text.weight is \(21, 24\) there and \(20, 24\) here"):
        load("clip", folder)
