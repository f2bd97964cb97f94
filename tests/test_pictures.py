"""One reading of pictures: whatever a picture is given as, folders, widgets, figures and loaded models see the same."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from minivlp.data.folders import open_folder
from minivlp.data.pictures import PictureError, to_rgb, to_rgbs
from minivlp.data.validation import DataError, read_image
from minivlp.pretrained import load
from minivlp.visualize.drawing.ink import show_image
from minivlp.visualize.widgets import rgb

COLORS = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
RAMP = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
GRAY = (RAMP >> 8).astype(np.uint8)


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(kind: str = "PNG") -> bytes:
    """A picture that its EXIF tag turns by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(COLORS), kind, exif=exif)


def over_white(values: np.ndarray) -> np.ndarray:
    colors, alpha = values[..., :3].astype(float), values[..., 3:].astype(float) / 255
    return np.rint(colors * alpha + 255 * (1 - alpha)).astype(int)


def in_mode(mode: str, image: Image.Image) -> Image.Image:
    return image.convert(mode)


RGBA = np.dstack([COLORS, np.random.default_rng(1).integers(0, 256, (40, 64), dtype=np.uint8)])
ALIKE = {  # what is given, the pixels that are meant
    "uint8": (COLORS, COLORS),
    "uint8 of gray": (GRAY, gray(GRAY)),
    "uint8 of one channel": (GRAY[..., None], gray(GRAY)),
    "uint8, not contiguous": (COLORS[::-1, ::2], COLORS[::-1, ::2]),
    "uint8 with alpha": (RGBA, over_white(RGBA)),
    "channels first": (np.moveaxis(COLORS, 2, 0), COLORS),
    "one channel first": (GRAY[None], gray(GRAY)),
    "a tensor": (torch.from_numpy(COLORS).permute(2, 0, 1), COLORS),
    "a tensor with alpha": (torch.from_numpy(RGBA).permute(2, 0, 1), over_white(RGBA)),
    "uint16": (RAMP, gray(GRAY)),
    "uint16 of the other byte order": (RAMP.astype(">u2"), gray(GRAY)),
    "a uint16 tensor": (torch.from_numpy(RAMP), gray(GRAY)),
    "floats": (COLORS / 255, COLORS),
    "small floats": ((COLORS / 255).astype(np.float16), COLORS),
    "a tensor with gradients": ((torch.from_numpy(COLORS) / 255).requires_grad_(), COLORS),
    "floats, rounded up a little": (np.full((9, 9), 1 + 1e-6), np.full((9, 9, 3), 255)),
    "half": (np.full((40, 50, 3), 0.5, np.float32), np.full((40, 50, 3), 127)),
    "bfloat16": (torch.full((3, 40, 50), 1.0, dtype=torch.bfloat16), np.full((40, 50, 3), 255)),
    "PIL": (Image.fromarray(COLORS), COLORS),
    "PIL of 16 bits": (Image.fromarray(RAMP), gray(GRAY)),
    "PIL of 32 bits": (Image.fromarray(RAMP.astype(np.int32)), gray(GRAY)),
    "PIL of floats": (Image.fromarray((GRAY / 255).astype(np.float32)), gray(GRAY)),
    "PIL with alpha": (Image.fromarray(RGBA), over_white(RGBA)),
    "premultiplied": (Image.new("La", (5, 5), (0, 0)), np.full((5, 5, 3), 255)),
    "a file's bytes": (encoded(Image.fromarray(COLORS)), COLORS),
    "a file of 16 bits": (encoded(Image.fromarray(RAMP)), gray(GRAY)),
    "EXIF in a file": (turned(), np.rot90(COLORS, -1)),
    "EXIF in PIL": (Image.open(io.BytesIO(turned())), np.rot90(COLORS, -1)),
    "a palette": (Image.fromarray(GRAY).convert("P"), gray(GRAY)),
    "a transparent palette": (encoded(Image.new("P", (8, 8), 0), transparency=0), np.full((8, 8, 3), 255)),
    "black and white": (Image.fromarray(GRAY > 99), gray((GRAY > 99) * 255)),
    "CMYK": (Image.merge("CMYK", [*Image.fromarray(255 - COLORS).split(), Image.new("L", (64, 40))]), COLORS),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_any_picture_has_the_pixels_that_are_meant(kind):
    given, meant = ALIKE[kind]
    found = to_rgb(given)
    assert found.mode == "RGB" and np.abs(np.asarray(found).astype(int) - meant).max() <= 1
    assert np.array_equal(rgb(given), found)  # widgets
    assert np.array_equal(to_rgb(found), found)  # read again, it is not turned again


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "I;16"])
def test_a_picture_given_by_hand_is_not_changed(mode):
    image = Image.new("RGBA", (30, 20), (200, 0, 0, 0))
    image = Image.fromarray(RAMP) if mode == "I;16" else in_mode(mode, image.convert("L") if mode == "PA" else image)
    image.info["note"] = "mine"
    before = image.mode, image.size, image.tobytes(), dict(image.info)
    assert to_rgb(image).mode == "RGB"
    assert (image.mode, image.size, image.tobytes(), dict(image.info)) == before


def test_one_gray_value_may_be_transparent_in_16_bits():
    image = Image.fromarray(RAMP)
    found = np.asarray(to_rgb(encoded(image, transparency=int(RAMP[5, 5]))))
    assert (found[5, 5] == 255).all() and np.array_equal(found[5, 6:, 0], GRAY[5, 6:])


REFUSED = {  # what is given, what the message says
    "3 x 3 x 3": (np.zeros((3, 3, 3), np.uint8), r"\(3, 3, 3\).*first or the last axis"),
    "4 rows of RGB": (np.zeros((4, 9, 3), np.uint8), r"\(4, 9, 3\).*first or the last axis"),
    "a tensor of 1 x 5 x 1": (torch.zeros(1, 5, 1), r"\(1, 5, 1\).*first or the last axis"),
    "five channels": (np.zeros((9, 9, 5), np.uint8), r"No axis has 1, 3 or 4 channels"),
    "two channels": (np.zeros((2, 9, 9), np.uint8), r"No axis has 1, 3 or 4 channels"),
    "a row": (np.zeros(9, np.uint8), r"\(9,\).*\(H, W\)"),
    "a number": (np.zeros(()), r"\(H, W\)"),
    "no pixels": (np.zeros((0, 9, 3), np.uint8), r"at least one pixel"),
    "several": (np.zeros((2, 9, 9, 3), np.uint8), r"several pictures"),
    "floats up to 255": (np.full((9, 9, 3), 255.0), r"from 255 to 255 \(0\.\.255\?.*uint8"),
    "normalized floats": (np.linspace(-1, 1, 81).reshape(9, 9), r"from -1 to 1 \(normalized"),
    "NaN": (np.full((9, 9), np.nan), "NaN"),
    "infinite": (torch.full((3, 9, 9), float("inf")), "infinite"),
    "booleans": (np.ones((9, 9), bool), "booleans.*255"),
    "a mask of torch": (torch.ones(9, 9, dtype=torch.bool), "booleans.*255"),
    "int64": (COLORS.astype(np.int64), "int64.*uint8"),
    "an int32 tensor": (torch.from_numpy(COLORS).int(), "int32.*uint8"),
    "complex": (np.ones((9, 9), complex), "complex128"),
    "8 bits in 16": (COLORS.astype(np.uint16), "8 or 16 bits.*25[45]"),
    "8 bits in PIL's I": (Image.fromarray(GRAY).convert("I"), "8 or 16 bits.*mode L"),
    "floats in PIL": (Image.fromarray(np.full((9, 9), 200, np.float32)), "200.*8 bits"),
    "32 bits": (Image.fromarray(np.full((9, 9), 70_000, np.int32)), "32 bits"),
    "a text file": (b"<html>404</html>", "not an image"),
    "half a file": (turned("JPEG")[:900], "broken image"),
    "no file": ("no/such/file.png", "missing image.*no/such/file.png"),
    "an address": ("https://example.org/a.png", "Download"),
    "a folder": (".", "cannot be read"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_could_mean_two_things_or_is_no_picture_is_refused_with_what_is_wanted(kind):
    given, message = REFUSED[kind]
    with pytest.raises(PictureError, match=f"(?s){message}"):
        to_rgb(given)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        rgb(given)


@pytest.mark.parametrize("thing", [None, 7, {"a": 1}, object(), [[0, 1], [1, 0]], ("a", "b")])
def test_other_objects_are_named(thing):
    with pytest.raises(TypeError, match=rf"not {type(thing).__name__}"):
        to_rgb(thing)


def test_several_are_a_list_or_an_array_and_errors_say_which_one():
    for several in ([COLORS, COLORS], (COLORS, Image.fromarray(COLORS)), np.stack([COLORS, COLORS])):
        assert [image.size for image in to_rgbs(several)] == [(64, 40)] * 2
    assert len(to_rgbs(torch.zeros(5, 3, 8, 9))) == 5 and len(to_rgbs(COLORS)) == 1
    with pytest.raises(PictureError, match=r"picture 1: .*\(3, 3, 3\)"):
        to_rgbs([COLORS, np.zeros((3, 3, 3), np.uint8)])
    with pytest.raises(TypeError, match="picture 1: .*not NoneType"):
        to_rgbs([COLORS, None])
    with pytest.raises(PictureError, match="at least one"):
        to_rgbs([])


# ------------------------------------------------------------------------------------------------- who reads pictures


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A tiny CLIP as transformers saves it, with its image processor."""
    part = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**part, "vocab_size": 300, "max_position_embeddings": 20, "eos_token_id": 299, "bos_token_id": 298}
    config = CLIPConfig(text_config=text, vision_config={**part, "image_size": 32, "patch_size": 8}, projection_dim=16)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    return load("clip", folder)


@pytest.mark.parametrize("kind", ["PIL of 16 bits", "EXIF in PIL", "half", "a tensor", "floats", "a file's bytes"])
def test_a_loaded_model_a_folder_a_widget_and_a_figure_see_the_same(tmp_path, loaded, kind):
    given, _ = ALIKE[kind]
    file = tmp_path / "a.png"
    file.write_bytes(given) if isinstance(given, bytes) else to_rgb(given).save(file)
    meant = np.asarray(to_rgb(given))
    for path in (given, file, str(file)):
        assert torch.equal(loaded(path)["images"], loaded(Image.fromarray(meant))["images"])
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "caption": "x"}\n')
    assert np.array_equal(open_folder(tmp_path)[0].image, meant)
    assert np.array_equal(rgb(given), meant)
    _, ax = plt.subplots()
    show_image(ax, given)
    assert np.array_equal(ax.images[0].get_array(), meant)


def test_a_file_of_16_bits_or_turned_by_exif_is_the_same_in_a_folder_and_by_hand(tmp_path, loaded):
    for name, content in (("deep.png", encoded(Image.fromarray(RAMP))), ("turned.jpg", turned("JPEG"))):
        (tmp_path / name).write_bytes(content)
        by_hand = loaded(Image.open(tmp_path / name))["images"]
        assert torch.equal(by_hand, loaded(read_image(tmp_path / name))["images"])
        assert torch.equal(by_hand, loaded(tmp_path / name)["images"])
        assert np.array_equal(rgb(Image.open(tmp_path / name)), read_image(tmp_path / name))


def test_a_loaded_model_refuses_what_could_mean_two_things(loaded):
    for pictures, message in (
        (COLORS.astype(np.float32), "0..255"),
        ([COLORS, np.zeros((3, 3, 3), np.uint8)], "picture 1"),
        ((COLORS / 127.5 - 1)[None], "normalized"),
        (COLORS > 5, "booleans"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(pictures)


def test_a_folder_names_the_file_that_cannot_be_read(tmp_path):
    Image.fromarray(np.full((9, 9), 70_000, np.int32)).save(tmp_path / "deep.tif")
    (tmp_path / "captions.jsonl").write_text('{"file": "deep.tif", "caption": "x"}\n')
    with pytest.raises(DataError, match=r"deep\.tif.*row 1.*32 bits"):
        open_folder(tmp_path)[0]
