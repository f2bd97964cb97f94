"""Folders of images: every layout and image format, splits and subsets, crops and flips. Tests write the folders."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlp.data import threads
from minivlp.data.augment import Augmented, crop, hflip, mirror_words
from minivlp.data.batch import Region, Sample
from minivlp.data.folders import Folder, Photos, open_folder
from minivlp.data.loading import Loader
from minivlp.data.text import load_tokenizer
from minivlp.data.validation import DataError


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Left half red, right half blue, so that a turned or cropped picture shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 250
    pixels[:, width // 2 :, 2] = 250
    return Image.fromarray(pixels)


def picture(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or halves()).save(path, **options)
    return path


def jsonl(path: Path, *rows: dict) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path.parent


def coco(root: Path, name: str = "open", first: int = 0, where: str = "images") -> Path:
    """Two images; the first has two captions, a box, a crowd and a box of no size (the published COCO has a few)."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    images = [{"id": first + i, "file_name": f"{first + i:06}.jpg", "width": 80, "height": 40} for i in (1, 2)]
    for image in images:
        picture(root / where / image["file_name"])  # half the size that the annotations were written for
    said = [(1, "a dog  left of a cup\n"), (1, "two things"), (2, "a bee")]
    captions = [{"id": first + n, "image_id": first + i, "caption": text} for n, (i, text) in enumerate(said)]
    boxes = [([0, 0, 40, 40], 0), ([0, 0, 80, 40], 1), ([5, 5, 9, 0], 0)]
    marks = [
        {"id": first + n, "image_id": first + 1, "category_id": 18, "bbox": box, "iscrowd": crowd, "segmentation": []}
        for n, (box, crowd) in enumerate(boxes)
    ]
    (root / f"annotations/captions_{name}.json").write_text(json.dumps({"images": images, "annotations": captions}))
    instances = {"images": images, "annotations": marks, "categories": [{"id": 18, "name": "dog"}]}
    (root / f"annotations/instances_{name}.json").write_text(json.dumps(instances))
    return root


def test_coco(tmp_path, capsys):
    folder = open_folder(f"coco:{coco(tmp_path)}")
    assert len(folder) == 2 and folder.image_id(0) == 1
    assert folder.captions(0) == ["a dog left of a cup", "two things"]
    assert folder.regions(0) == [Region((0.25, 0.5, 0.5, 1.0), "dog", "object")] and folder.regions(1) == []
    assert folder.rows_skipped == [("annotations/instances_open.json annotations[2]", "box of no size")]
    assert capsys.readouterr().out.count("skipped 1 of") == 1
    sample = folder[0]
    assert sample.image.shape == (20, 40, 3) and sample.source.startswith("annotations/captions_open.json images[0]")


def test_coco_splits_by_file_and_by_hash(tmp_path):
    both = coco(coco(tmp_path / "both", "train2017", where="train2017"), "val2017", first=10, where="val2017")
    assert len(open_folder(both)) == 4
    assert [open_folder(both, "validation").image_id(row) for row in range(2)] == [11, 12]
    with pytest.raises(DataError, match=r"no image in split 'test'"):
        open_folder(both, "test")
    alone = coco(tmp_path / "alone", "val2017")  # a single file is divided by hash, so that one can train on it
    assert sum(entry for entry in [_count(alone, split) for split in ("train", "validation", "test")]) == 2


def _count(root: Path, split: str) -> int:
    try:
        return len(open_folder(root, split))
    except DataError:
        return 0


def test_flickr_layouts_agree(tmp_path):
    said = {"a.jpg": ['He says "hi, you", and leaves', "two, three"], "b.jpg": ['"quoted"']}
    texts = {
        "dataset_flickr8k.json": json.dumps({
            "images": [{"filename": n, "split": "train", "sentences": [{"raw": c} for c in s]} for n, s in said.items()]
        }),
        "captions.txt": "image,caption\n"
        + "".join(f"{n},{_quoted(c)}\n" for n, captions in said.items() for c in captions),
        "Flickr8k.token.txt": "".join(f"{n}#{k}\t{c}\n" for n, s in said.items() for k, c in enumerate(s)),
        "results.csv": "image_name| comment_number| comment\n"
        + "".join(f"{n}| {k}| {c}\n" for n, s in said.items() for k, c in enumerate(s)),
    }  # fmt: skip
    for number, (file, text) in enumerate(texts.items()):
        root = tmp_path / str(number)
        for name in said:
            picture(root / "Images" / name)
        (root / file).write_text(text, encoding="utf-8")
        for spec in (root, f"flickr:{root}", f"flickr:{root / file}"):
            folder = open_folder(spec)
            assert {row.file.name: list(row.captions) for row in folder.rows} == said, file


def _quoted(caption: str) -> str:
    """Half of people's files quote what holds a comma or a quote, half do not: both are read."""
    return '"' + caption.replace('"', '""') + '"' if "quoted" in caption else caption


def test_flickr_split_files(tmp_path):
    names = [f"{n}.jpg" for n in range(4)]
    for name in names:
        picture(tmp_path / "Flicker8k_Dataset" / name)
    (tmp_path / "Flickr8k.token.txt").write_text("".join(f"{name}#0\ta dog\n" for name in names))
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("0.jpg\n1.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("2\n")
    assert [row.file.name for row in open_folder(tmp_path, "train").rows] == ["0.jpg", "1.jpg"]
    assert [row.file.name for row in open_folder(tmp_path, "validation").rows] == ["2.jpg"]
    assert len(open_folder(tmp_path)) == 4  # 3.jpg is in no split


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv(tmp_path, delimiter):
    picture(tmp_path / "pics/a b.jpg")
    rows = [
        ["File_Name", "caption", "regions"],
        ["pics\\a b.jpg", '"a dog; a cup, two"', '"[{""box"": [0, 0, 20, 20], ""phrase"": ""a dog""}]"'],
        ["./pics/a b.jpg", "一只狗", ""],
    ]
    text = "\r\n".join(delimiter.join(row) for row in rows)
    (tmp_path / "captions.csv").write_text(text, encoding="utf-8-sig")
    folder = open_folder(tmp_path)
    assert len(folder) == 1 and folder.captions(0) == ["a dog; a cup, two", "一只狗"]
    assert folder.regions(0) == [Region((0.25, 0.5, 0.5, 1.0), "a dog", "phrase")]


def test_jsonl_in_two_languages(tmp_path):
    picture(tmp_path / "a.jpg")
    region = {"box": [20, 0, 40.4, 20], "text": "a cup", "text_zh": "一个杯子"}
    root = jsonl(
        tmp_path / "captions.jsonl",
        {"file": "a.jpg", "captions": ["a cup", "one"], "captions_zh": ["杯子"], "regions": [region]},
    )
    assert open_folder(root)[0].captions == ["a cup", "one"]
    chinese = open_folder(root, language="zh")[0]
    assert chinese.captions == ["杯子"] and chinese.regions == [Region((0.75, 0.5, 0.5, 1.0), "一个杯子", "phrase")]
    with pytest.raises(DataError, match=r"captions.jsonl row 1 region 1: no phrase.*phrase_fr"):
        open_folder(root, language="fr")


def test_phrases_stand_in_for_captions(tmp_path):
    picture(tmp_path / "a.jpg")
    region = {"box": [0, 0, 9, 9], "phrase": "the left cup"}
    assert open_folder(jsonl(tmp_path / "metadata.jsonl", {"image": "a.jpg", "regions": [region]})).captions(0) == [
        "the left cup"
    ]


BOX = Region((0.5, 0.5, 0.5, 0.4), "a cup", "phrase")  # of a picture of 40 x 20 pixels


@pytest.mark.parametrize(
    "row",
    [
        {"regions": [{"box": [10, 6, 30, 14], "phrase": "a cup"}]},
        {"regions": [{"xyxy": [10, 6, 30, 14], "text": "a cup"}]},
        {"regions": [{"xywh": [10, 6, 20, 8], "phrase": "a cup"}]},  # as COCO, RefCOCO and Visual Genome count
        {"xywh": [10, 6, 20, 8], "phrase": "a cup"},  # one expression to a row
        {"xyxy": [10, 6, 30, 14], "text": "a cup"},
    ],
)
def test_boxes_in_both_usual_forms(tmp_path, row):
    picture(tmp_path / "a.jpg")
    root = jsonl(tmp_path / "captions.jsonl", {"file": "a.jpg", **row})
    folder = open_folder(root)
    assert folder.captions(0) == ["a cup"] and folder.regions(0)[0].phrase == "a cup"
    assert folder.regions(0)[0].box == pytest.approx(BOX.box) and folder.regions(0)[0].kind == "phrase"


def test_several_expressions_of_one_box_and_rows_of_one_image_are_put_together(tmp_path):
    picture(tmp_path / "a.jpg")
    root = jsonl(
        tmp_path / "captions.jsonl",
        {"file": "a.jpg", "xywh": [10, 6, 20, 8], "phrases": ["a cup", "the cup in the middle"]},
        {"file": "a.jpg", "xywh": [0, 0, 20, 8], "phrase": "a cup"},  # the same words of another thing
    )
    regions = open_folder(root).regions(0)
    assert [region.phrase for region in regions] == ["a cup", "the cup in the middle", "a cup"]
    assert regions[0].box == regions[1].box != regions[2].box


def test_boxes_in_a_csv(tmp_path):
    picture(tmp_path / "a.jpg")
    (tmp_path / "captions.csv").write_text('file,caption,xywh\na.jpg,a cup,"[10, 6, 20, 8]"\n')
    assert open_folder(tmp_path).regions(0)[0].box == pytest.approx(BOX.box)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ({"bbox": [1, 2, 3, 4], "phrase": "x"}, "row 1 region 1: box of an unknown form.*xyxy or xywh"),
        ({"xywh": [1, 2, 0, 4], "phrase": "x"}, "row 1 region 1: box of no size.*width, height"),
        ({"xywh": [1, 2, 3], "phrase": "x"}, "row 1 region 1: box is not four numbers"),
        ({"xywh": [30, 2, 20, 4], "phrase": "x"}, "row 1 region 1: box outside its image"),
        ({"xywh": [1, 2, 3, 4], "phrases": ["x", ""]}, "row 1 region 1: empty caption"),
        ({"phrase": "x"}, "row 1 region 1: no box.*box, xyxy, xywh"),
    ],
)
def test_boxes_that_cannot_be_read_are_told(tmp_path, region, message):
    picture(tmp_path / "a.jpg")
    root = jsonl(tmp_path / "captions.jsonl", {"file": "a.jpg", "caption": "a cup", "regions": [region]})
    with pytest.raises(DataError, match=message):
        open_folder(root)
    assert open_folder(root, on_error="skip").regions(0) == []  # a bad box costs the box alone
    alone = jsonl(tmp_path / "captions.jsonl", {"file": "a.jpg", **region}, {"file": "a.jpg", "caption": "a cup"})
    if "no box" not in message:
        with pytest.raises(DataError, match=message.replace(" region 1", "")):
            open_folder(alone)
        assert open_folder(alone, on_error="skip").captions(0)[-1] == "a cup"


def test_rows_may_say_their_split(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / name)
    rows = [{"file": "a.jpg", "caption": "x", "split": "train"}, {"file": "b.jpg", "caption": "y", "split": "val"}]
    root = jsonl(tmp_path / "captions.jsonl", *rows)
    assert [open_folder(root, split)[0].captions for split in ("train", "validation")] == [["x"], ["y"]]
    for other, message in (("testA", "row 3: unknown split.*validation, test"), ("test", "row 3: image in two splits")):
        jsonl(tmp_path / "captions.jsonl", *rows, {"file": "b.jpg", "caption": "z", "split": other})
        with pytest.raises(DataError, match=message):
            open_folder(root)


def many(root: Path, count: int = 60) -> Path:
    for number in range(count):
        picture(root / f"{number:03}.png", halves(4, 4))
    return jsonl(root / "captions.jsonl", *[{"file": f"{n:03}.png", "caption": f"number {n}"} for n in range(count)])


def test_splits_are_disjoint_and_subsets_repeat(tmp_path):
    root = many(tmp_path)
    whole = open_folder(root)
    parts = [{row.image_id for row in open_folder(root, split).rows} for split in ("train", "validation", "test")]
    assert sorted(set.union(*parts)) == [row.image_id for row in whole.rows] and sum(map(len, parts)) == 60
    assert 40 <= len(parts[0]) <= 56
    subset = [row.file.name for row in open_folder(root, subset=20).rows]
    assert subset == [row.file.name for row in open_folder(root, subset=20).rows] == sorted(subset)
    assert len(subset) == 20
    assert subset != [row.file.name for row in open_folder(root, subset=20, seed=1).rows]
    for name in subset[:3]:  # broken ones are replaced, so that the subset is full
        (root / name).write_bytes(b"no picture")
    again = open_folder(root, subset=20, on_error="skip")
    assert len(again) == 20 and len(again.rows_skipped) == 3
    (root / "001.png").rename(root / "xyz.png")  # a new name moves one image, never the others
    jsonl(root / "captions.jsonl", *[{"file": f"{n:03}.png", "caption": "c"} for n in range(2, 60)])
    names = {row.file.name for row in open_folder(root, "train").rows}
    assert names == {whole.rows[i].file.name for i in parts[0]} - {"000.png", "001.png"}


def test_pixels_squash_and_never_crop(tmp_path):
    picture(tmp_path / "wide.jpg", halves(400, 20), quality=95)
    picture(tmp_path / "tall.png", halves(8, 300))
    root = jsonl(tmp_path / "captions.jsonl", {"file": "wide.jpg", "text": "w"}, {"file": "tall.png", "text": "t"})
    folder = open_folder(root)
    pixels = folder.pixels([1, 0, 1], 16)
    assert pixels.shape == (3, 16, 16, 3) and pixels.dtype == np.uint8
    assert (pixels[:, :, :6, 0] > 200).all() and (pixels[:, :, 10:, 2] > 200).all()
    assert (pixels[0] == pixels[2]).all() and folder.pixels([], 16).shape == (0, 16, 16, 3)
    assert (pickle.loads(pickle.dumps(folder)).pixels([0], 8) == folder.pixels([0], 8)).all()
    assert folder.pixels([0, 1], (12, 30)).shape == (2, 12, 30, 3) and folder.pixels([], (4, 6)).shape == (0, 4, 6, 3)
    assert (folder.pixels([0], (16, 16)) == folder.pixels([0], 16)).all()
    folder[0].image[0, 0] = 7  # a change of the sample must not change the dataset
    with pytest.raises(IndexError):
        folder[2]


def test_images_are_decoded_by_one_pool_of_threads_per_dataset(monkeypatch):
    photos, started = Photos(), []
    original = threads.ThreadPoolExecutor
    monkeypatch.setattr(threads, "ThreadPoolExecutor", lambda *args: started.append(args) or original(*args))
    for _ in range(3):
        expected = photos.pixels([0, 1], 16)
    assert len(started) == 1, "a pool is started once, not for every batch"
    copy = pickle.loads(pickle.dumps(photos))  # threads cannot be pickled
    assert (copy.pixels([0, 1], 16) == expected).all() and len(started) == 2
    Photos()
    assert len(started) == 2, "no threads before the first image"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_starts_threads_of_its_own():
    photos = Photos()
    expected = photos.pixels([0, 1], 16)
    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()
    child = context.Process(target=lambda: found.put(photos.pixels([0, 1], 16).tobytes()))
    child.start()
    child.join(30)
    assert child.exitcode == 0 and found.get() == expected.tobytes()


def test_quick_decoding_does_not_blur(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    path = picture(tmp_path / "a.jpg", Image.fromarray(noise), quality=95)
    folder = open_folder(jsonl(tmp_path / "captions.jsonl", {"file": "a.jpg", "caption": "noise"}))
    exact = np.asarray(Image.open(path).resize((100, 100), Image.Resampling.BICUBIC), int)
    assert np.abs(folder.pixels([0], 100)[0].astype(int) - exact).mean() < 6


RED_BLUE = {  # kind of file → (suffix, picture, options)
    "gray": ("png", halves().convert("L"), {}),
    "cmyk": ("jpg", halves().convert("CMYK"), {"quality": 95}),
    "palette": ("png", halves().quantize(4), {}),
    "one bit": ("png", halves().convert("L").convert("1"), {}),
    "webp": ("webp", halves(), {"lossless": True}),
    "tiff": ("tif", halves(), {}),
    "gif": ("gif", halves(), {}),
    "one pixel": ("png", halves(1, 1), {}),
}


@pytest.mark.parametrize("kind", RED_BLUE)
def test_any_kind_of_picture(tmp_path, kind):
    suffix, image, options = RED_BLUE[kind]
    path = picture(tmp_path / f"a.{suffix}", image, **options)
    folder = open_folder(jsonl(tmp_path / "captions.jsonl", {"file": path.name, "caption": "x"}), on_error="skip")
    expected = np.asarray(image.convert("RGB"), int)
    assert np.abs(folder[0].image.astype(int) - expected).max() < 30 and folder.pixels([0], 8).shape == (1, 8, 8, 3)


def test_sixteen_bits_and_transparency(tmp_path):
    gray = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    picture(tmp_path / "deep.png", Image.fromarray(gray))
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    picture(tmp_path / "clear.png", clear)
    picture(tmp_path / "palette.png", Image.new("P", (8, 8), 0), transparency=0)
    rows = [{"file": name, "caption": "x"} for name in ("deep.png", "clear.png", "palette.png")]
    folder = open_folder(jsonl(tmp_path / "captions.jsonl", *rows))
    assert (folder[0].image[..., 0] == gray >> 8).all()
    assert (folder[1].image == 255).all() and (folder[2].image == 255).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_and_boxes_are_of_the_upright_one(tmp_path, orientation, suffix):
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that undoes what the tag asks for
    stored = halves() if orientation == 1 else halves().transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(tmp_path / f"a.{suffix}", stored, exif=exif)
    row = {"file": f"a.{suffix}", "caption": "x", "regions": [{"box": [0, 0, 20, 20], "phrase": "red"}]}
    folder = open_folder(jsonl(tmp_path / "captions.jsonl", row))
    sample = folder[0]
    assert sample.image.shape == (20, 40, 3) and sample.regions[0].box == (0.25, 0.5, 0.5, 1.0)
    assert (sample.image[:, :16, 0] > 180).all() and (folder.pixels([0], 8)[0, :, :3, 0] > 180).all()


def test_boxes_of_another_shape_are_told(tmp_path):
    root = coco(tmp_path)
    picture(root / "images/000001.jpg", halves(20, 40))  # turned, where the annotations say 80 x 40
    with pytest.raises(DataError, match=r"000001.jpg .*another shape.*upright"):
        open_folder(root)[0]
    assert [row.file.name for row in open_folder(root, on_error="skip").rows] == ["000002.jpg"]


# ---- crops and flips ---------------------------------------------------------------------------------------------

MIRRORED = {
    "a red heart left of a dog": "a red heart right of a dog",
    "the cat on the right is sleeping": "the cat on the left is sleeping",
    "Left of the dog, a cat to its right.": "Right of the dog, a cat to its left.",
    "the leftmost of three, upper-right corner": "the rightmost of three, upper-left corner",
    "what is left of the dog?": "what is right of the dog?",
    "left": "right",
    "a bright red cup": "a bright red cup",
    "一只狗在一个红色爱心的左边": "一只狗在一个红色爱心的右边",
    "桌子右上角有一只向左看的猫": "桌子左上角有一只向右看的猫",
}
UNSURE = ["a man left the room", "right behind a tree", "the right answer", "what is left of the cake", "leftovers",
          "turning clockwise", "on the left, what remains is right", "左右各一只狗", "座右铭", "逆时针"]  # fmt: skip


@pytest.mark.parametrize("text", MIRRORED)
def test_mirror_words(text):
    assert mirror_words(text) == MIRRORED[text] and mirror_words(MIRRORED[text]) == text


@pytest.mark.parametrize("text", UNSURE)
def test_a_flip_that_might_lie_is_refused(text):
    assert mirror_words(text) is None
    for spoken in ({"captions": [text]}, {"regions": [Region((0.5, 0.5, 1, 1), text)]}, {"questions": [("?", text)]}):
        sample = Sample(**{"image": np.asarray(halves()), "image_id": 0, "captions": ["a cup"], **spoken})
        assert hflip(sample) is sample


@st.composite
def boxes(draw):
    x = sorted([draw(st.integers(0, 30)), draw(st.integers(31, 39))])
    y = sorted([draw(st.integers(0, 10)), draw(st.integers(11, 19))])
    return (x[0] + x[1]) / 80, (y[0] + y[1]) / 40, (x[1] - x[0]) / 40, (y[1] - y[0]) / 20


def marked(box) -> Sample:
    """A picture that is white exactly where its one region is."""
    image = np.zeros((20, 40, 3), np.uint8)
    x0, x1 = round((box[0] - box[2] / 2) * 40), round((box[0] + box[2] / 2) * 40)
    y0, y1 = round((box[1] - box[3] / 2) * 20), round((box[1] + box[3] / 2) * 20)
    image[y0:y1, x0:x1] = 255
    return Sample(image, 3, ["a cup left of a dog"], [Region(box, "a cup")], [("where is the cup?", "left")])


def painted(sample: Sample, box) -> np.ndarray:
    height, width = sample.image.shape[:2]
    mask = np.zeros((height, width), bool)
    x0, x1 = round((box[0] - box[2] / 2) * width), round((box[0] + box[2] / 2) * width)
    y0, y1 = round((box[1] - box[3] / 2) * height), round((box[1] + box[3] / 2) * height)
    mask[y0:y1, x0:x1] = True
    return mask


@given(boxes())
@settings(max_examples=50, deadline=None)
def test_a_flip_keeps_boxes_on_their_pixels(box):
    sample = marked(box)
    flipped = hflip(sample)
    assert (painted(flipped, flipped.regions[0].box) == (flipped.image[..., 0] == 255)).all()
    assert flipped.captions == ["a cup right of a dog"] and flipped.questions[0][1] == "right"
    again = hflip(flipped)
    assert (again.image == sample.image).all() and again.captions == sample.captions
    assert np.allclose(again.regions[0].box, box)


@given(boxes(), boxes(), st.sampled_from([0.2003, 0.5003, 0.9003]))
@settings(max_examples=100, deadline=None)
def test_a_crop_keeps_boxes_on_their_pixels(box, window, keep):
    sample = marked(box)
    cropped = crop(sample, window, keep)
    white = cropped.image[..., 0] == 255
    assert cropped.image.shape[:2] == (round(window[3] * 20), round(window[2] * 40))
    stays = white.sum() / (sample.image[..., 0] == 255).sum()
    assert bool(cropped.regions) == (stays > keep)
    if cropped.regions:
        assert (painted(cropped, cropped.regions[0].box) == white).all()
    assert bool(cropped.captions) == bool(cropped.questions) == (stays > keep and window[2] * window[3] > keep)


def test_a_crop_drops_words_about_what_was_cut_off():
    cup, dog = Region((0.2, 0.5, 0.2, 0.2), "a cup"), Region((0.9, 0.5, 0.1, 0.1), "a dog")
    placed = [Region(cup.box, "a cup for a dog", "relation"), Region(cup.box, "the cup on the left", "phrase")]
    sample = Sample(np.asarray(halves()), 0, ["a cup and a dog"], [cup, dog, *placed], truth="a scene")
    whole, part = crop(sample, (0.5, 0.5, 1, 1)), crop(sample, (0.4, 0.5, 0.8, 1))
    assert len(whole.regions) == 4 and whole.captions == sample.captions
    assert [region.phrase for region in part.regions] == ["a cup"] and part.captions == []
    assert whole.truth is None and hflip(sample).truth is None
    for bad in [(0.5, 0.5, 0, 1), (0.9, 0.5, 0.4, 1), (float("nan"), 0.5, 1, 1)]:
        with pytest.raises(ValueError, match="box of a crop"):
            crop(sample, bad)


class Cups:
    """Pictures of 64 pixels: a white cup and a gray dog on black, on whole pixels, the cup left of the dog."""

    def __init__(self, count: int = 12, boxes: bool = True):
        rng = np.random.default_rng(0)
        starts = np.stack([rng.integers(0, 12, count), rng.integers(0, 40, count), rng.integers(36, 48, count)], 1)
        self.cups = [(x, y, x + 16, y + 12) for x, y, _ in starts.tolist()]
        self.dogs = [(x, 50 - y, x + 12, 62 - y) for _, y, x in starts.tolist()]
        self.boxes = boxes

    def __len__(self):
        return len(self.cups)

    def __getitem__(self, row):
        image = self.pixels([row], 64)[0]
        return Sample(image, row, self.captions(row), self.regions(row), source=f"cup {row}")

    def captions(self, row):
        return ["one cup left of a dog"]

    def regions(self, row):
        corners = [np.array(c[row]) / 64 for c in (self.cups, self.dogs)]
        cup, dog = (tuple(map(float, (*(c[:2] + c[2:]) / 2, *(c[2:] - c[:2])))) for c in corners)
        whole = Region((0.5, 0.5, 1.0, 1.0), "a cup left of a dog", "image")
        found = [Region(cup, "a cup"), Region(dog, "a dog"), Region(cup, "a cup left of a dog", "relation"), whole]
        return found if self.boxes else []

    def image_id(self, row):
        return 100 + row

    def pixels(self, rows, size):
        height, width = (size, size) if isinstance(size, int) else size
        out = np.zeros((len(rows), height, width, 3), np.uint8)
        for picture, row in zip(out, rows, strict=True):
            for (x0, y0, x1, y1), gray in ((self.cups[row], 255), (self.dogs[row], 120)):
                picture[y0 * height // 64 : y1 * height // 64, x0 * width // 64 : x1 * width // 64] = gray
        return out


def test_augmented_boxes_stay_on_their_pixels():
    augmented = Augmented(Cups(), copies=8)
    seen = 0
    for row, picture in enumerate(augmented.pixels(range(len(augmented)), 64)):
        for region in augmented.regions(row):
            if region.kind == "object" and region.phrase == "a cup":
                ys, xs = np.nonzero(picture[..., 0] > 185)  # halfway from the dog's gray to the cup's white
                found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 64
                cx, cy, w, h = region.box
                assert np.abs(found - [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]).max() < 1.6 / 64
                seen += 1
    assert seen > 50


def test_augmented_words_stay_true():
    augmented = Augmented(Cups(), copies=8, seed=3)
    kinds = set()
    for row in range(len(augmented)):
        of = {region.phrase: region.box for region in augmented.regions(row) if region.kind == "object"}
        spoken = [region.phrase for region in augmented.regions(row)] + augmented.captions(row)
        assert spoken and augmented.captions(row), "no version is without words"
        for text in spoken:
            if "of" in text:  # both are still there, and they stand as the words say
                assert (of["a cup"][0] < of["a dog"][0]) == ("left" in text)
            assert text[:5] in of or text.startswith("one cup")
        related = any(region.kind == "relation" for region in augmented.regions(row))
        assert augmented.captions(row)[0].startswith("one cup") == related  # words about the whole, or of what is left
        kinds.add((len(of), any("right" in text for text in spoken)))
    assert kinds == {(2, False), (2, True), (1, False)}  # as it is or cropped, turned, one thing cut off


def test_augmented_is_a_pure_function_of_seed_and_row_and_begins_with_the_picture_itself():
    cups = Cups()
    one, two, other = Augmented(cups, 4), Augmented(cups, 4), Augmented(cups, 4, seed=1)
    rows = range(len(one))
    assert len(one) == 48 and [one.image_id(row) for row in (0, 3, 4)] == [100, 100, 101]
    assert (one.pixels(rows, 32) == two.pixels(rows, 32)).all() and (
        one.pixels(rows, 32) != other.pixels(rows, 32)
    ).any()
    assert [one.regions(row) for row in rows] == [two.regions(row) for row in rows]
    assert one.pixels([0, 1], (32, 48)).shape == (2, 32, 48, 3)
    assert (one.pixels(rows, (32, 32)) == one.pixels(rows, 32)).all()
    assert (one.pixels(rows[::4], 32) == cups.pixels(range(12), 32)).all() and one.regions(4) == cups.regions(1)
    assert one.pixels([], 32).shape == (0, 32, 32, 3)
    sample = one[5]
    assert (sample.captions, sample.regions, sample.source) == (one.captions(5), one.regions(5), "cup 1")
    cut = next(row for row in rows if one[row].image.shape != (64, 64, 3))
    assert max(one[cut].image.shape[:2]) <= 64
    with pytest.raises(ValueError, match="copies"):
        Augmented(cups, 0)


def test_augmented_pictures_without_boxes_keep_their_captions():
    plain = Augmented(Cups(boxes=False), copies=6)
    said = {text for row in range(len(plain)) for text in plain.captions(row)}
    assert said == {"one cup left of a dog", "one cup right of a dog"}


def test_training_batches_of_augmented_pictures():
    tokenizer = load_tokenizer()
    loader = Loader(Augmented(Cups()), tokenizer, 16, 64, seed=0, regions_per_image=2)
    again = Loader(Augmented(Cups()), tokenizer, 16, 64, seed=0, regions_per_image=2)
    assert loader.steps_per_epoch == 3  # 12 pictures in 4 versions
    one, two = loader.batch(4), again.batch(4)
    assert (one.images == two.images).all() and (one.regions.boxes == two.regions.boxes).all()
    assert one.regions.boxes.min() >= 0 and one.regions.boxes.max() <= 1 and len(one.image_ids.unique()) < 16


def test_the_photos_that_come_with_minivlp():
    english, chinese = Photos(), Photos("zh")
    assert len(english) == len(chinese) >= 10 and not english.rows_skipped
    assert english.pixels(range(len(english)), 32).std() > 20
    for row in range(len(english)):
        assert all(caption.isascii() for caption in english.captions(row))
        assert not any(caption.isascii() for caption in chinese.captions(row))
        assert [region.box for region in english.regions(row)] == [region.box for region in chinese.regions(row)]
    assert any(english.regions(row) for row in range(len(english)))


def test_wrong_arguments_are_told(tmp_path):
    root = many(tmp_path, 2)
    for wrong in ({"split": "val"}, {"subset": 0}, {"on_error": "ignore"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            open_folder(root, **wrong)
    folder = open_folder(str(root))
    assert isinstance(folder, Folder) and repr(folder) == "Folder(2 images, 2 captions, 0 regions)"
