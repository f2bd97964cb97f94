"""Released weights in our classes: the outputs of the released models, and a word on everything that does not fit."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minivlp.data.text import encode, load_tokenizer
from minivlp.models.clip import CLIP, CLIPConfig
from minivlp.pretrained import load, save_pretrained
from minivlp.training.checkpoint import CheckpointError

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:.*means nothing before it is trained"),
]


def jittered(model: torch.nn.Module) -> torch.nn.Module:
    """Zeros and ones of a fresh model would hide a part that is not read."""
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def same(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-10) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance)


def texts(rows: int = 4, length: int = 10, low: int = 3, high: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids of several lengths, and which are real."""
    lengths = torch.randint(length // 2, length + 1, (rows,))
    mask = torch.arange(length) < lengths[:, None]
    return torch.randint(low, high, (rows, length)) * mask, mask


def rewrite(folder, change) -> None:
    """Change the tensors of a folder's weights by their names, in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def neighbours(tensors: dict) -> list[tuple[str, str]]:
    """Pairs of tensors of one shape, so that each that has a likeness is in one."""
    shapes: dict = {}
    for name in sorted(tensors):
        shapes.setdefault(tensors[name].shape, []).append(name)
    return [pair for names in shapes.values() for pair in zip(names, names[1:], strict=False)]


def every_name_counts(family, folder, output, **more) -> None:
    """Swap any two tensors of one shape: the output changes. Rename or drop one: the message names it."""
    before = output(load(family, folder, **more))
    tensors = load_file(folder / "model.safetensors")
    pairs = neighbours(tensors)
    assert len(pairs) > len(tensors) // 2
    for a, b in pairs:
        save_file({**tensors, a: tensors[b].clone(), b: tensors[a].clone()}, folder / "model.safetensors")
        assert not same(output(load(family, folder, **more)), before, 1e-12), (a, b)
    name = sorted(n for n in tensors if ".0." in n)[0]
    renamed = {n: t for n, t in tensors.items() if n != name} | {"head.old": tensors[name], "head.older": tensors[name]}
    save_file({n: t.clone() for n, t in renamed.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        load(family, folder, **more)
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


def clip_inputs(rows: int = 3, size: int = 32) -> tuple[torch.Tensor, ...]:
    ids, mask = texts(5, 12)
    ids[torch.arange(5), mask.sum(1) - 1] = 1199  # the largest id ends a text
    return torch.randn(rows, 3, size, size), ids, mask


def test_clip_of_transformers(clip_folder):
    folder, reference = clip_folder
    images, ids, mask = clip_inputs()
    loaded = load("clip", folder)
    theirs = reference(input_ids=ids, attention_mask=mask.long(), pixel_values=images)
    assert isinstance(loaded.model, CLIP) and not loaded.model.training and loaded.missing == ()
    assert same(loaded.model.embed_images(images), theirs.image_embeds)
    assert same(loaded.model.embed_texts(ids, mask), theirs.text_embeds)
    assert same(loaded.model.similarity(images, ids, mask), theirs.logits_per_image)


def test_every_name_of_clip_counts(clip_folder):
    inputs = clip_inputs()
    every_name_counts("clip", clip_folder[0], lambda loaded: loaded.model.similarity(*inputs))


def test_an_old_pickled_folder_of_clip(clip_folder):
    """`pytorch_model.bin`, and with it the position ids that old files carry."""
    folder, reference = clip_folder
    old = reference.state_dict() | {"text_model.embeddings.position_ids": torch.arange(12)[None]}
    torch.save(old, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    images, ids, mask = clip_inputs()
    ours = load("clip", folder).model.similarity(images, ids, mask)
    assert same(ours, reference(input_ids=ids, attention_mask=mask.long(), pixel_values=images).logits_per_image)


@pytest.mark.parametrize("wrapped", [False, True], ids=["safetensors", "training checkpoint"])
@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
def test_clip_of_open_clip(tmp_path, quick, wrapped):
    open_clip = pytest.importorskip("open_clip")
    settings = {
        "embed_dim": 20,
        "quick_gelu": quick,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 8},
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
    images, ids, mask = clip_inputs()
    ours = load("clip", tmp_path).model
    theirs = reference.encode_image(images, normalize=True), reference.encode_text(ids, normalize=True)
    assert same(ours.embed_images(images), theirs[0])
    assert same(ours.embed_texts(ids, mask), theirs[1])
    assert same(ours.log_scale.exp(), reference.logit_scale.exp())
    if not wrapped:

        def output(loaded):
            return loaded.model.similarity(images, ids, mask)

        (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "model.safetensors")
        settings = {"config": ours.config}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
        every_name_counts("clip", tmp_path, output, **settings)


def test_another_image_size_interpolates_the_positions(clip_folder):
    """As transformers interpolates them on the fly."""
    folder, reference = clip_folder
    images, ids, mask = clip_inputs(size=48)
    model = load("clip", folder, image_size=48).model
    assert model.config.image.image_size == 48 and model.image.positions.shape == (36, 32)
    theirs = reference(
        input_ids=ids, attention_mask=mask.long(), pixel_values=images, interpolate_pos_encoding=True
    ).logits_per_image
    assert same(model.similarity(images, ids, mask), theirs)
    assert same(load("clip", folder).model.similarity(images, ids, mask), theirs)


def pictures(count: int = 2) -> list[Image.Image]:
    shapes = np.random.default_rng(0).integers(40, 90, (count, 2))
    return [Image.fromarray(np.random.default_rng(1).integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in shapes]


def test_pictures_and_strings_go_in(clip_folder):
    """With the folder's own image processor and tokenizer, to what transformers' model says of them."""
    folder, reference = clip_folder
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    loaded, says = load("clip", folder), ["a heart", "a red heart left of a dog"]
    given = loaded(pictures(), says)
    ids, mask = encode(load_tokenizer(), says, 12)
    assert torch.equal(given["ids"], ids) and torch.equal(given["mask"], mask)
    assert torch.equal(given["images"], processor(pictures(), return_tensors="pt")["pixel_values"].double())
    theirs = reference.get_image_features(given["images"])
    theirs = getattr(theirs, "pooler_output", theirs)
    assert same(loaded.model.embed_images(loaded(pictures())["images"]), theirs / theirs.norm(dim=-1, keepdim=True))
    assert loaded.model.similarity(**given).shape == (2, 2)
    one = loaded(pictures(1)[0], says[0])
    assert one["images"].shape == (1, 3, 32, 32) and one["ids"].shape == (1, len(ids[0][mask[0]]))
    assert load("clip", folder, image_size=48)(pictures())["images"].shape == (2, 3, 48, 48)


def test_without_settings_pictures_are_prepared_as_the_paper_does(clip_folder):
    given = load("clip", clip_folder[0])(pictures())["images"]
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    expected = transformers.CLIPImageProcessor(**sizes)(pictures(), return_tensors="pt")["pixel_values"]
    assert torch.equal(given, expected.double())


def test_what_was_saved_loads_as_it_was(clip_folder, tmp_path):
    folder, _ = clip_folder
    load_tokenizer().save_pretrained(folder)
    first = load("clip", folder, image_size=40)
    first.save(tmp_path / "mine")
    again = load("clip", tmp_path / "mine")
    given = first(pictures(), ["a heart"])
    assert all(torch.equal(value, given[name]) for name, value in again(pictures(), ["a heart"]).items())
    assert again.model.config == first.model.config
    assert torch.equal(again.model.similarity(**given), first.model.similarity(**given))
    with pytest.raises(CheckpointError, match="holds CLIP, not XVLM"):
        load("xvlm", tmp_path / "mine")
    rewrite(tmp_path / "mine", lambda tensors: tensors.pop("log_scale"))
    with pytest.raises(CheckpointError, match="missing: log_scale"):
        load("clip", tmp_path / "mine")


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
    with pytest.raises(CheckpointError, match="sizes cannot be told.*CLIPConfig.paper"):
        load("clip", save_open_clip(tmp_path / "alone.pt"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="no config.json"):
        load("clip", empty)
    shutil.copy(folder / "config.json", empty)
    with pytest.raises(CheckpointError, match="none of model.safetensors, pytorch_model.bin"):
        load("clip", empty)
    (empty / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors.*cut off"):
        load("clip", empty)
    save_file({"x": torch.zeros(1)}, empty / "model.safetensors")
    with pytest.raises(CheckpointError, match="no CLIP that we know.*vision_model"):
        load("clip", empty)


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
    with pytest.raises(CheckpointError, match=r"project_text.weight is \(21, 24\) there and \(20, 24\) here"):
        load("clip", folder)
