"""More than 200 damaged folders: each gives a DataError that names the file and the row, or a counted skip.

No other exception may occur, and no dataset may be silently wrong: what remains after a skip is what would have been
read without the damaged entry.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from minivlp.data.folders import open_folder
from minivlp.data.validation import DataError

COUNT = 5  # images in every folder, each with one caption "picture N"


def encoded(kind: str, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


JPEG, PNG = encoded("JPEG"), encoded("PNG")


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ---- damage to an image: (layout-free) bytes that take its place, or None to remove it, or "folder" -------------

image_damage = st.one_of(
    st.none(),
    st.just("folder"),
    st.just(b""),
    st.just(b"<html>404 not found</html>"),
    st.just(bomb()),
    st.integers(1, len(JPEG) - 60).map(lambda end: JPEG[:end]),
    st.integers(1, len(PNG) - 60).map(lambda end: PNG[:end]),
    st.binary(min_size=1, max_size=300),
)

# ---- damage to a caption, a box, a line --------------------------------------------------------------------------

bad_caption = st.sampled_from(
    ["", "   ", "word " * 20_000, None, 7, ["nested"], {"a": 1}, "half \ud800 a pair", "a\0b", "['a dog', 'a cat']"]
)
number = st.one_of(st.integers(-50, 80), st.floats(-50, 80, allow_nan=False))
bad_corners = st.one_of(  # of an image of 32 x 24 pixels
    st.tuples(number, number, number, number)
    .map(list)
    .filter(lambda b: b[0] >= b[2] or b[1] >= b[3] or b[0] < -1 or b[1] < -1 or b[2] > 33 or b[3] > 25),
    st.sampled_from([None, "1,2,3,4", [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, float("nan"), 4], [0, 0, float("inf"), 9],
                     [0, 0, True, True], ["0", "0", "9", "9"], [0, 0, 10**400, 9], {}, [20, 5, 4, 9], [5, 5, 5, 9]]),
)  # fmt: skip
bad_name = st.sampled_from(["", None, 3, "nowhere.jpg", "images", "a\0b.jpg", "\ud800.jpg", "x" * 400 + ".jpg"])
bad_line = st.sampled_from([
    b'{"file": "0.jpg", "caption": "cut', b"not json", b"[1, 2]", b"17", b"null", b"[" * 5000, b'{"file": "0.jpg"}',
    '{"file": "0.jpg", "caption": "caf\u00e9"}'.encode("latin-1"), b"{}", b"\xff\xfe\x00", b'{"caption": "no file"}',
])  # fmt: skip
bad_csv = st.sampled_from([
    b"0.jpg", b"0.jpg,one,two", b'0.jpg,"open quote', b'0.jpg,"a" b', b"0.jpg,", b",a caption", b"0.jpg,   ",
    "0.jpg,caf\u00e9".encode("latin-1"), b"nowhere.jpg,lost", b"0.jpg,a\0b", b"0.jpg," + b"x" * 100_000,
])  # fmt: skip
bad_comma = st.sampled_from([
    b"0.jpg", b'0.jpg,"open quote', b"0.jpg,", b",a caption", b"nowhere.jpg,lost", b"0.jpg," + b"x" * 100_000,
    "0.jpg,caf\u00e9".encode("latin-1"), b"0.jpg,a\0b",
])  # fmt: skip
bad_token = st.sampled_from([
    b"0.jpg a caption", b"0.jpg\ta caption", b"0.jpg#x\ta caption", b"0.jpg#1\t", b"#1\ta caption", b"0.jpg#1",
    b"0.jpg#0\tanother caption of the same number", "0.jpg#1\tcaf\u00e9".encode("latin-1"), b"nowhere.jpg#0\tlost",
    b"0.jpg#1\t" + b"x" * 100_000,
])  # fmt: skip


def write(root: Path, layout: str) -> Path:
    """A sound folder of COUNT images in the given layout; returns its captions' file."""
    (root / "images").mkdir(parents=True)
    for i in range(COUNT):
        (root / f"images/{i}.jpg").write_bytes(JPEG)
    names = [f"{i}.jpg" for i in range(COUNT)]
    texts = {
        "csv": ("captions.csv", "file,caption\n" + "".join(f"{n},picture {i}\n" for i, n in enumerate(names))),
        "comma": ("captions.txt", "image,caption\n" + "".join(f"{n},picture {i}\n" for i, n in enumerate(names))),
        "token": ("x.token.txt", "".join(f"{n}#0\tpicture {i}\n" for i, n in enumerate(names))),
        "jsonl": ("captions.jsonl", "".join(json.dumps(jsonl_row(i)) + "\n" for i in range(COUNT))),
        "karpathy": ("dataset.json", json.dumps(karpathy())),
        "coco": ("annotations/captions_x.json", json.dumps(coco_captions())),
    }
    name, text = texts[layout]
    (root / "annotations").mkdir()
    if layout == "coco":
        (root / "annotations/instances_x.json").write_text(json.dumps(coco_instances()))
    (root / name).write_text(text)
    return root / name


def jsonl_row(i: int) -> dict:
    return {"file": f"{i}.jpg", "caption": f"picture {i}", "regions": [{"box": [0, 0, 16, 24], "phrase": "a half"}]}


def karpathy() -> dict:
    return {"images": [{"filename": f"{i}.jpg", "sentences": [{"raw": f"picture {i}"}]} for i in range(COUNT)]}


def coco_images() -> list[dict]:
    return [{"id": i, "file_name": f"{i}.jpg", "width": 32, "height": 24} for i in range(COUNT)]


def coco_captions() -> dict:
    marks = [{"id": 10 + i, "image_id": i, "caption": f"picture {i}"} for i in range(COUNT)]
    return {"images": coco_images(), "annotations": marks}


def coco_instances() -> dict:
    marks = [{"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 16, 24], "iscrowd": 0} for i in range(COUNT)]
    return {"images": coco_images(), "annotations": marks, "categories": [{"id": 1, "name": "half"}]}


def judge(root: Path, file: str, lost: frozenset = frozenset(), bare: frozenset = frozenset(), at_use=False) -> None:
    """Raises by default, naming `file` and a row; skipping loses just the images `lost` and the boxes of `bare`."""
    with pytest.raises(DataError) as caught:
        folder = open_folder(root)
        if at_use:
            for row in range(len(folder)):
                folder.pixels([row], 8)
                folder[row]
    message = str(caught.value)
    assert file in message and ("row " in message or "[" in message), message
    assert len(message) < 800 and message.count(". ") >= 1, message  # what is wrong, and then a remedy
    folder = open_folder(root, on_error="skip")
    kept = set(range(COUNT)) - lost
    assert {row.file.name: row.captions for row in folder.rows} == {f"{i}.jpg": (f"picture {i}",) for i in kept}
    assert folder.rows_skipped and all(where and why for where, why in folder.rows_skipped)
    if any(row.regions for row in folder.rows):
        for row in folder.rows:
            expected = [] if int(row.file.stem) in bare else [(0.25, 0.5, 0.5, 1.0)]
            assert [region.box for region in row.regions] == expected
    assert folder.pixels(range(len(folder)), 8).shape == (len(kept), 8, 8, 3)


def damaged(examples: int):
    """Run the test on so many damaged folders, the same ones every time."""
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


class fresh:
    """A folder of its own for each example."""

    def __enter__(self) -> Path:
        self.path = Path(tempfile.mkdtemp(prefix="damaged"))
        return self.path / "data"

    def __exit__(self, *_) -> None:
        shutil.rmtree(self.path)


layouts = st.sampled_from(["csv", "comma", "token", "jsonl", "karpathy", "coco"])
which = st.integers(0, COUNT - 1)


@given(layouts, which, image_damage)
@damaged(90)
def test_damaged_images(layout, i, damage):
    with fresh() as root:
        write(root, layout)
        image = root / f"images/{i}.jpg"
        image.unlink()
        if damage == "folder":
            image.mkdir()
        elif damage is not None:
            image.write_bytes(damage)
        judge(root, f"{i}.jpg", lost=frozenset({i}), at_use=True)


@given(st.data(), st.sampled_from(["csv", "comma", "token", "jsonl"]), st.integers(1, COUNT))
@damaged(90)
def test_damaged_lines(data, layout, place):
    with fresh() as root:
        file = write(root, layout)
        bad = data.draw({"csv": bad_csv, "comma": bad_comma, "token": bad_token, "jsonl": bad_line}[layout])
        lines = file.read_bytes().splitlines()
        lines.insert(place, bad)
        file.write_bytes(b"\n".join(lines))
        judge(root, f"{file.name} row {place + 1}")


@given(which, bad_caption, st.sampled_from(["jsonl", "karpathy", "coco"]))
@damaged(50)
def test_damaged_captions(i, caption, layout):
    with fresh() as root:
        file = write(root, layout)
        if layout == "jsonl":
            if isinstance(caption, list):
                caption = [caption]
            rows = [jsonl_row(k) | ({"caption": caption} if k == i else {}) for k in range(COUNT)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif layout == "karpathy":
            data = karpathy()
            data["images"][i]["sentences"][0]["raw"] = caption
            file.write_text(json.dumps(data))
        else:
            data = coco_captions()
            data["annotations"][i]["caption"] = caption
            file.write_text(json.dumps(data))
        judge(root, file.name, lost=frozenset({i}))


@given(which, bad_corners, st.sampled_from(["jsonl", "coco"]))
@damaged(90)
def test_damaged_boxes(i, corners, layout):
    with fresh() as root:
        file = write(root, layout)
        if layout == "jsonl":
            rows = [jsonl_row(k) for k in range(COUNT)]
            rows[i]["regions"][0]["box"] = corners
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
            judge(root, f"captions.jsonl row {i + 1} region 1", bare=frozenset({i}))
        else:
            box = corners
            if isinstance(corners, list) and len(corners) == 4 and all(isinstance(v, int | float) for v in corners):
                x0, y0, x1, y1 = corners
                box = corners if True in corners else [x0, y0, x1 - x0, y1 - y0]
                if x1 == x0 or y1 == y0:
                    return  # COCO's own boxes of no size are counted, never an error: tested with the layouts
            data = coco_instances()
            data["annotations"][i]["bbox"] = box
            (root / "annotations/instances_x.json").write_text(json.dumps(data))
            judge(root, f"instances_x.json annotations[{i}]", bare=frozenset({i}))


bad_objects = st.sampled_from([  # in place of one object with a box and a name
    {"bbox": [[0, 0, 16]], "categories": ["a half"]}, {"bbox": [[0, 0, 16, 0]], "categories": ["a half"]},
    {"bbox": [[0, 0, 40, 24]], "categories": ["a half"]}, {"bbox": [[0, 0, 0.5, 1]], "categories": ["a half"]},
    {"bbox": [[0, 0, 16, 24]], "categories": [1]}, {"bbox": [[0, 0, 16, 24]], "categories": [""]},
    {"bbox": [[0, 0, 16, 24]], "categories": [None]}, {"bbox": [[0, 0, 16, 24]]}, {"bbox": [None], "categories": ["x"]},
    [{"bbox": [0, 0, 16, 24]}], [{"category": "a half"}], ["a half"], [{"xyxy": [16, 0, 0, 24], "category": "a half"}],
])  # fmt: skip


@given(which, bad_objects)
@damaged(30)
def test_damaged_objects(i, objects):
    with fresh() as root:
        file = write(root, "jsonl")
        sound = {"bbox": [[0, 0, 16, 24]], "categories": ["a half"]}
        rows = [{"file": f"{k}.jpg", "caption": f"picture {k}", "objects": sound} for k in range(COUNT)]
        rows[i]["objects"] = objects
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        judge(root, f"captions.jsonl row {i + 1} object 1", bare=frozenset({i}))


SIDES = [[-5, 0, 9, 9], [0, -5, 9, 9], [0, 0, 40, 20], [0, 0, 20, 30], [90, 0, 95, 9], [20, 5, 4, 9], [5, 20, 9, 4]]


@pytest.mark.parametrize("corners", SIDES)
def test_boxes_beyond_each_side_and_turned_round(corners, tmp_path):
    x0, y0, x1, y1 = corners
    for layout, bad in (("jsonl", corners), ("coco", [x0, y0, x1 - x0, y1 - y0])):
        file = write(tmp_path / layout, layout)
        if layout == "jsonl":
            row = jsonl_row(0) | {"regions": [{"box": bad, "phrase": "a half"}]}
            file.write_text("".join(json.dumps(r) + "\n" for r in [row, *map(jsonl_row, range(1, COUNT))]))
        else:
            data = coco_instances()
            data["annotations"][0]["bbox"] = bad
            (file.parent / "instances_x.json").write_text(json.dumps(data))
        judge(tmp_path / layout, "row 1 region 1" if layout == "jsonl" else "annotations[0]", bare=frozenset({0}))


@given(which, bad_name, st.sampled_from(["jsonl", "karpathy", "coco"]))
@damaged(40)
def test_damaged_names(i, name, layout):
    with fresh() as root:
        file = write(root, layout)
        if layout == "jsonl":
            rows = [jsonl_row(k) | ({"file": name} if k == i else {}) for k in range(COUNT)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            data, key = (karpathy(), "filename") if layout == "karpathy" else (coco_captions(), "file_name")
            data["images"][i][key] = name
            file.write_text(json.dumps(data))
        judge(root, file.name, lost=frozenset({i}))


coco_damage = st.sampled_from([  # (file, list, what is changed in one item)
    *[("captions_x.json", "annotations", c) for c in ({"image_id": 99}, {"image_id": "1"}, {"id": 11}, {"id": [1]})],
    *[("captions_x.json", "images", change) for change in ({"id": None}, {"id": 1.5}, {"id": 4}, {"width": 0})],
    *[("captions_x.json", "images", change) for change in ({"height": "24"}, {"file_name": "4.jpg"})],
    *[("instances_x.json", "annotations", change) for change in ({"image_id": 99}, {"image_id": []})],
    *[("instances_x.json", "annotations", change) for change in ({"category_id": 5}, {"bbox": None})],
])  # fmt: skip


@given(st.sampled_from([0, 2]), coco_damage)
@damaged(30)
def test_damaged_coco_records(i, damage):
    file, key, change = damage
    with fresh() as root:
        write(root, "coco")
        path = root / "annotations" / file
        data = json.loads(path.read_text())
        data[key][i].update(change)
        path.write_text(json.dumps(data))
        with pytest.raises(DataError, match=r"annotations/(captions|instances)_x.json (images|annotations)\[\d\]"):
            open_folder(root)
        folder = open_folder(root, on_error="skip")
        assert folder.rows_skipped
        for row in folder.rows:  # whatever stays is true: an image keeps its own caption and its own box
            assert row.captions == (f"picture {row.image_id}",)
        loses = file == "captions_x.json"
        assert loses == (len(folder) < COUNT) and sum(len(row.regions) for row in folder.rows) >= COUNT - 2


@given(layouts, st.sampled_from(["empty", "blank", "folder", "cut", "junk", "utf-16", "list", "deep", "header"]))
@damaged(54)
def test_a_captions_file_that_cannot_be_read_at_all(layout, damage):
    """Nothing can be skipped to: both settings give the error."""
    with fresh() as root:
        file = write(root, layout)
        whole = file.read_bytes()
        file.unlink()
        if damage == "folder":
            file.mkdir()
        else:
            file.write_bytes({
                "empty": b"", "blank": b"\n \n", "cut": whole[: len(whole) // 2] if b"annot" in whole else b"{",
                "junk": bytes(range(256)), "utf-16": whole.decode().encode("utf-16"), "list": b"[]",
                "deep": b"[" * 100_000, "header": whole.splitlines()[0] if layout in ("csv", "comma") else b"{}",
            }[damage])  # fmt: skip
        for on_error in ("raise", "skip"):
            with pytest.raises(DataError, match="captions|dataset|token") as caught:
                open_folder(root, on_error=on_error)
            assert str(root) in str(caught.value)


@given(st.sampled_from(["csv", "comma", "token", "jsonl", "karpathy", "coco"]), which)
@damaged(20)
def test_duplicates_are_counted_and_no_reason_to_stop(layout, i):
    with fresh() as root:
        file = write(root, layout)
        if layout in ("karpathy", "coco"):
            data = json.loads(file.read_text())
            key = "images" if layout == "karpathy" else "annotations"
            data[key].append(data[key][i])
            file.write_text(json.dumps(data))
        else:
            lines = file.read_text().splitlines()
            file.write_text("\n".join([*lines, lines[i + (layout in ("csv", "comma"))]]))
        folder = open_folder(root)
        assert [row.captions for row in folder.rows] == [(f"picture {k}",) for k in range(COUNT)]
        assert len(folder.rows_skipped) == 1 and "duplicate" in folder.rows_skipped[0][1]


def test_the_summary_is_one_line_that_counts(tmp_path, capsys):
    file = write(tmp_path / "data", "csv")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], "0.jpg,", "gone.jpg,lost", *lines[2:], "9.jpg,lost"]))
    open_folder(file.parent, on_error="skip")
    assert capsys.readouterr().out == (
        "skipped 3 of 8 rows: 2 missing image, 1 empty caption (first: captions.csv row 3)\n"
    )


def test_one_image_with_two_names_is_reported(tmp_path):
    file = write(tmp_path / "data", "jsonl")
    with file.open("a") as out:
        out.write(json.dumps({"file": "images/0.jpg", "caption": "the same file again"}) + "\n")
    with pytest.raises(DataError, match=r"captions.jsonl row 6: image listed twice.*row 1 names '0.jpg'"):
        open_folder(file.parent)
    shutil.copytree(file.parent / "images", file.parent / "thumbs")
    with pytest.raises(DataError, match=r"row 1: image in two places"):
        open_folder(file.parent)


def test_split_files_are_checked(tmp_path):
    file = write(tmp_path / "data", "token")
    (file.parent / "x.trainImages.txt").write_text("0.jpg\nghost.jpg\n")
    with pytest.raises(DataError, match=r"x.trainImages.txt row 2: no caption"):
        open_folder(file.parent)
    (file.parent / "x.trainImages.txt").write_text("0.jpg\n1.jpg\n")
    (file.parent / "x.testImages.txt").write_text("2.jpg\n1.jpg\n")
    with pytest.raises(DataError, match=r"row 2: image in two splits.*unseen"):
        open_folder(file.parent)


@pytest.mark.parametrize("spec", ["coco:{}", "flickr:{}", "folder:{}", "{}", "{}/nothing", "cocoo:{}"])
def test_a_folder_of_no_known_layout(tmp_path, spec):
    with pytest.raises(DataError, match=r"captions|no such folder. Write coco:DIR"):
        open_folder(spec.format(tmp_path))
