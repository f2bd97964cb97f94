"""What a file says is read, counted in a printed line, or an error: columns, units, containers, names, published flaws.

Tests write the files. `tests/test_damaged_inputs.py` has the files that are broken.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
import warnings
from pathlib import Path

import pytest
from PIL import Image

from minivlp.__main__ import main
from minivlp.data.batch import Region
from minivlp.data.folders import open_folder
from minivlp.data.layouts.columns import HARMLESS
from minivlp.data.loading import Loader
from minivlp.data.lost_text import check_texts, lost_text
from minivlp.data.text import load_tokenizer, tokenize
from minivlp.data.validation import DataError
from minivlp.errors import Notice


def picture(path: Path, color: tuple[int, int, int] = (200, 0, 0), size: tuple[int, int] = (40, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def table(root: Path, *rows: dict, name: str = "metadata.jsonl") -> Path:
    """A JSONL file, and a picture of 40 x 20 pixels for each row that names one."""
    for row in rows:
        if (file := row.get("file") or row.get("file_name")) and not (root / file).exists():
            picture(root / file)
    (root / name).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return root


# ------------------------------------------------------------------------------------------------------------ columns


def test_objects_of_hugging_face_are_read(tmp_path):
    objects = {"bbox": [[10, 6, 20, 8], [0, 0, 20, 20]], "categories": ["cat", "sofa"], "area": [160, 400]}
    root = table(tmp_path, {"file_name": "a.jpg", "text": "a cat", "objects": objects})
    cat, sofa = open_folder(root).regions(0)
    assert cat.box == pytest.approx((0.5, 0.5, 0.5, 0.4)) and (cat.phrase, cat.kind) == ("cat", "object")
    assert sofa == Region((0.25, 0.5, 0.5, 1.0), "sofa", "object")


@pytest.mark.parametrize(
    "objects",
    [
        [{"bbox": [10, 6, 20, 8], "category": "cat"}],  # a list of dictionaries
        {"bbox": [10, 6, 20, 8], "category": "cat"},  # a single one
        {"bbox": [[10, 6, 20, 8], [0, 0, 40, 20]], "label": ["cat", "cats"], "iscrowd": [0, 1]},  # and a crowd
        {"xyxy": [[10, 6, 30, 14]], "category": ["cat"], "id": [7]},
        {"xywh_fraction": [[0.25, 0.3, 0.5, 0.4]], "category": ["cat"]},
    ],
)
def test_other_forms_of_objects(tmp_path, objects, capsys):
    [region] = open_folder(table(tmp_path, {"file_name": "a.jpg", "text": "a", "objects": objects})).regions(0)
    assert region.box == pytest.approx((0.5, 0.5, 0.5, 0.4)) and (region.phrase, region.kind) == ("cat", "object")
    assert capsys.readouterr().out == ""


def test_objects_in_a_csv(tmp_path):
    picture(tmp_path / "a.jpg")
    cell = json.dumps({"bbox": [[0, 0, 20, 20]], "categories": ["cat"]}).replace('"', '""')
    (tmp_path / "metadata.csv").write_text(f'file_name,text,objects\na.jpg,a cat,"{cell}"\n')
    assert open_folder(tmp_path).regions(0) == [Region((0.25, 0.5, 0.5, 1.0), "cat", "object")]


@pytest.mark.parametrize(
    "objects, said",
    [
        ({"bbox": [[1, 2, 3, 4]], "categories": [3]}, "object 1: category is a number.*write the name, such as 'dog'"),
        ({"bbox": [[1, 2, 3, 4]], "categories": ["0"]}, "object 1: category is a number"),
        ({"bbox": [[1, 2, 3, 4]], "categories": ["a", "b"]}, "different lengths.*1 in 'bbox' and 2 in 'categories'"),
        ({"bbox": [[1, 2, 3, 4]]}, "object 1: no category"),
        ({"categories": ["cat"]}, "objects without boxes"),
        ({"bbox": [[0.1, 0.2, 0.3, 0.4]], "categories": ["a"]}, "object 1: box in fractions.*xywh_fraction"),
        ({"bbox": [[30, 2, 30, 4]], "categories": ["a"]}, "object 1: box outside its image"),
    ],
)
def test_objects_that_cannot_be_read(tmp_path, objects, said, capsys):
    root = table(tmp_path, {"file_name": "a.jpg", "text": "a cat", "objects": objects})
    with pytest.raises(DataError, match=f"metadata.jsonl row 1.*{said}"):
        open_folder(root)
    if "object 1" in said:  # costs that box alone
        folder = open_folder(root, on_error="skip")
        assert folder.captions(0) == ["a cat"] and folder.regions(0) == []


@pytest.mark.parametrize(
    "column, said",
    [
        ({"bboxes": [[1, 2, 10, 12]]}, "'bboxes' is not known: did you mean 'boxes'"),
        ({"region": [{"box": [1, 2, 10, 12], "phrase": "cup"}]}, "'region' is not known: did you mean 'regions'"),
        ({"Regions": [{"box": [1, 2, 10, 12], "phrase": "cup"}]}, "'Regions' is not known: did you mean 'regions'"),
        ({"annotations": [{"bbox": [1, 2, 10, 12]}]}, "'annotations' is not known, and it seems to hold boxes"),
        ({"rois": [[1, 2, 10, 12]]}, "'rois' is not known, and it seems to hold boxes"),
        ({"xmin": 3}, "'xmin' is not known"),
        ({"captoin": "a second one"}, "'captoin' is not known: did you mean 'caption'"),
        ({"caption_1": "a second one"}, "'caption_1' is not known: did you mean 'caption'.*list in `captions`"),
        ({"splits": "train"}, "'splits' is not known: did you mean 'split'"),
    ],
)
def test_a_column_that_means_boxes_or_captions_is_an_error(tmp_path, column, said):
    root = table(tmp_path, {"file": "a.jpg", "caption": "a cup", **column})
    with pytest.raises(DataError, match=f"metadata.jsonl row 1: .*Column {said}"):
        open_folder(root)
    folder = open_folder(root, on_error="skip")  # the caption stays
    assert folder.captions(0) == ["a cup"] and len(folder.rows_skipped) == 1


def test_other_columns_are_counted_in_one_line(tmp_path, capsys):
    picture(tmp_path / "a.jpg"), picture(tmp_path / "b.jpg")
    (tmp_path / "captions.csv").write_text("file,caption,mood,label\na.jpg,a cat,calm,3\nb.jpg,a dog,,4\n")
    assert open_folder(tmp_path).captions(1) == ["a dog"]
    assert capsys.readouterr().out.splitlines() == [
        "captions.csv: column 'mood' is not read (captions.csv row 2)",
        "captions.csv: column 'label' is not read (2 rows, first: captions.csv row 2)",
    ]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"text": "a", "caption": "b"}, "column 'text' is not read where there is 'caption'"),
        ({"caption": "a", "regions": [], "xyxy": [1, 2, 3, 4]}, "column 'xyxy' is not read where there is 'regions'"),
        ({"caption": "a", "phrase": "b"}, "column 'phrase' is not read"),
        ({"caption": "a", "regions": [{"box": [1, 2, 3, 4], "phrase": "b", "score": 1}]}, "'regions.score' is not"),
        ({"caption": "a", "image": "b.jpg"}, "column 'image' is not read where there is 'file'"),
    ],
)
def test_what_another_column_hides_is_told(tmp_path, row, said, capsys):
    open_folder(table(tmp_path, {"file": "a.jpg", **row}))
    assert said in capsys.readouterr().out


def test_harmless_columns_and_other_languages_are_silent(tmp_path, capsys):
    row = {"file": "a.jpg", "caption": "a cat", "caption_zh": "猫", "width": 40, "height": 20, "mood": None}
    root = table(tmp_path, {**row, **{name: "x" for name in HARMLESS}})
    assert open_folder(root).captions(0) == ["a cat"] and open_folder(root, language="zh").captions(0) == ["猫"]
    assert capsys.readouterr().out == ""


def test_unknown_keys_of_coco_and_karpathy_are_counted(tmp_path, capsys):
    picture(tmp_path / "coco/images/a.jpg")
    images = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 20, "license": 3, "weather": "dry"}]
    captions = [{"id": 1, "image_id": 1, "caption": "a cat"}]
    (tmp_path / "coco/annotations").mkdir()
    data = json.dumps({"info": {}, "images": images, "annotations": captions})
    (tmp_path / "coco/annotations/captions_x.json").write_text(data)
    (tmp_path / "coco/annotations/mine.json").write_text("{}")
    (tmp_path / "coco/annotations/person_keypoints_x.json").write_text("{}")
    open_folder(tmp_path / "coco")
    out = capsys.readouterr().out
    assert "annotations/captions_x.json: column 'weather' is not read (annotations/captions_x.json images[0])" in out
    assert "annotations/mine.json is not read" in out and "keypoints" not in out
    picture(tmp_path / "flickr/a.jpg")
    sentences = [{"raw": "a cat", "tokens": ["a", "cat"], "imgid": 0, "sentid": 0}]
    image = {"filename": "a.jpg", "sentences": sentences, "split": "train", "imgid": 0, "sentids": [0], "bboxes": [1]}
    (tmp_path / "flickr/dataset_x.json").write_text(json.dumps({"images": [image]}))
    with pytest.raises(DataError, match="'bboxes' is not known: did you mean 'boxes'"):
        open_folder(tmp_path / "flickr")


def test_width_and_height_say_which_size_the_boxes_are_for(tmp_path, capsys):
    region = {"box": [0, 0, 200, 200], "phrase": "half"}
    row = {"file": "a.jpg", "caption": "a", "width": 400, "height": 200, "regions": [region]}
    assert open_folder(table(tmp_path, row)).regions(0)[0].box == (0.25, 0.5, 0.5, 1.0)
    for size, said in (((200, 400), "another shape"), ((0, 200), "image of no size"), (("wide", 200), "no size")):
        root = table(
            tmp_path, row | {"width": size[0], "height": size[1], "regions": [{**region, "box": [0, 0, 9, 9]}]}
        )
        with pytest.raises(DataError, match=said):
            open_folder(root)[0]


# -------------------------------------------------------------------------------------------------------------- units


@pytest.mark.parametrize(
    "box, key",
    [
        ({"box": [0.1, 0.2, 0.5, 0.6]}, "xyxy_fraction"),
        ({"xyxy": [0, 0, 1, 1]}, "xyxy_fraction"),
        ({"xywh": [0.5, 0.5, 0.2, 0.2]}, "xywh_fraction"),
        ({"xyxy": [0.5, 0.5, 0.2, 0.2]}, "xyxy_fraction"),  # the question comes before the order of its corners
    ],
)
def test_boxes_that_may_be_fractions_are_refused_with_the_question(tmp_path, box, key):
    root = table(tmp_path, {"file": "a.jpg", "caption": "c", "regions": [{**box, "phrase": "cat"}]})
    with pytest.raises(DataError, match=rf"row 1 region 1: box in fractions\? Found \[.*call it {key}"):
        open_folder(root)
    assert open_folder(root, on_error="skip").regions(0) == []
    with pytest.raises(DataError, match="row 1: box in fractions"):
        open_folder(table(tmp_path, {"file": "a.jpg", **box, "phrase": "cat"}))


@pytest.mark.parametrize(
    "box",
    [
        {"xyxy_fraction": [0.25, 0.3, 0.75, 0.7]},
        {"xywh_fraction": [0.25, 0.3, 0.5, 0.4]},
        {"cxcywh_fraction": [0.5, 0.5, 0.5, 0.4]},
        {"xyxy": [10, 6, 30, 14]},
    ],
)
def test_fractions_under_their_own_names(tmp_path, box):
    row = {"file": "a.jpg", "caption": "c", "regions": [{**box, "phrase": "cat"}]}
    assert open_folder(table(tmp_path, row)).regions(0)[0].box == pytest.approx((0.5, 0.5, 0.5, 0.4))
    row = {"file": "a.jpg", **box, "phrase": "cat"}
    assert open_folder(table(tmp_path, row)).regions(0)[0].box == pytest.approx((0.5, 0.5, 0.5, 0.4))


@pytest.mark.parametrize(
    "box, said",
    [
        ({"xyxy_fraction": [10, 6, 30, 14]}, "box not in fractions.*in pixels, call it xyxy or xywh"),
        ({"xywh_fraction": [0.9, 0.3, 0.5, 0.4]}, "box outside its image"),
        ({"xyxy_fraction": [0.7, 0.3, 0.5, 0.4]}, "swapped corners"),
        ({"cxcywh_fraction": [0.5, 0.5, 0, 0.4]}, "no size"),
        ({"cxcywh_fraction": [0.5, 0.5, "x", 0.4]}, "not four numbers.*as fractions"),
    ],
)
def test_fractions_that_cannot_be_read(tmp_path, box, said):
    with pytest.raises(DataError, match=f"region 1: .*{said}"):
        open_folder(table(tmp_path, {"file": "a.jpg", "caption": "c", "regions": [{**box, "phrase": "cat"}]}))


@pytest.mark.parametrize("others", [0, 2])
def test_coco_boxes_in_fractions(tmp_path, others, capsys):
    picture(tmp_path / "images/a.jpg")
    (tmp_path / "annotations").mkdir()
    images = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 20}]
    boxes = [[0.1, 0.2, 0.3, 0.4]] + [[5, 5, 9, 9]] * others
    marks = [{"id": n, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0} for n, box in enumerate(boxes)]
    said = [{"id": 1, "image_id": 1, "caption": "a cat"}]
    for what, rows in (("captions", said), ("instances", marks)):
        data = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "cat"}]}
        (tmp_path / f"annotations/{what}_x.json").write_text(json.dumps(data))
    if others:  # a single box of less than a pixel is a flaw
        assert len(open_folder(tmp_path).regions(0)) == 2
        assert (
            "1 box of less than a pixel (first: annotations/instances_x.json annotations[0])" in capsys.readouterr().out
        )
    else:
        with pytest.raises(DataError, match=r"annotations\[0\]: box in fractions\?"):
            open_folder(tmp_path)


# --------------------------------------------------------------------------------------------------------------- text

THAI = "ภาพถ่ายของแมวสีดำตัวหนึ่งนั่งอยู่บนเก้าอี้ไม้สีน้ำตาล "
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


@pytest.fixture
def thai(tmp_path):
    """Eight captions that differ at their end, far behind the 56 tokens that are kept."""
    return table(tmp_path, *[{"file": f"{n}.jpg", "caption": f"{THAI}{n} dogs"} for n in NUMBERS])


def test_captions_that_are_cut_to_the_same_ids_are_counted(thai):
    with pytest.warns(Notice) as said:
        loader = Loader(open_folder(thai), load_tokenizer(), 8, 16)
    assert len(said) == 1
    assert str(said[0].message) == (
        "captions: 8 of 8 are longer than 56 tokens and cut there; "
        "8 different ones become one row of token ids: the model cannot tell them apart"
    )
    assert len(loader.batch(0).text.ids.unique(dim=0)) == 1


def test_data_and_evaluate_count_them_once(thai, capsys):
    assert main(["data", f"folder:{thai}"]) == 0
    printed = capsys.readouterr()
    assert "captions: 169 to 172 tokens each" in printed.out
    assert (
        printed.err.startswith("minivlp: captions: 8 of 8 are longer than 56 tokens") and printed.err.count("\n") == 1
    )
    assert main(["evaluate", "clip", "--data", f"folder:{thai}", "--split", "all"]) == 0
    assert capsys.readouterr().err.count("8 of 8 are longer than 56 tokens") == 1


@pytest.mark.parametrize(
    "texts, length, counts",
    [
        (["a dog", "a cat"], 56, (2, 0, 0, 0)),
        (["a dog", "A  dog", "a dog"], 56, (2, 0, 0, 0)),  # letter case and spaces make no difference
        (["a red cup left of a dog", "a red cup left of a cat", "a cat"], 6, (3, 2, 2, 1)),
        (["a red dog", "a red cat", "a red cup", "a big dog", "a big cat"], 4, (5, 5, 5, 2)),
        (["a dog"], 4, (1, 0, 0, 0)),  # exactly as long as the context
    ],
)
def test_counts_of_lost_text(texts, length, counts):
    tokenizer = load_tokenizer()
    lost = lost_text(tokenizer, texts, tokenize(tokenizer, texts, length), length)
    assert (lost.texts, lost.cut, lost.merged, lost.kept) == counts and not lost.empty


@pytest.fixture
def english_only(tmp_path):
    """A BERT tokenizer that knows a few English words."""
    from transformers import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "english")
    return tmp_path / "english"


@pytest.mark.parametrize("caption", ["一只猫", "chat noir", "[SEP] [PAD]", "🐈"])
def test_captions_of_which_nothing_is_left_are_refused(tmp_path, english_only, caption, capsys):
    root = tmp_path / "data"
    root.mkdir()
    table(root, {"file": "a.jpg", "caption": "a cat"}, {"file": "b.jpg", "caption": caption})
    said = "1 of 2 captions are nothing but unknown or special tokens"
    with pytest.raises(DataError, match=f"{said}.*metadata.jsonl row 2.*another language.*another tokenizer"):
        Loader(open_folder(root), load_tokenizer(english_only), 2, 16)
    assert main(["data", f"folder:{root}", "--tokenizer", str(english_only)]) == 1
    assert "Or use another --tokenizer." in capsys.readouterr().err


def test_unknown_words_and_merged_texts_are_counted(english_only):
    tokenizer = load_tokenizer(english_only)
    with pytest.warns(Notice, match="phrases: 2 different ones become one row.*; 2 of 3 have words that the tokenizer"):
        check_texts(tokenizer, ["a red house", "a red bridge", "a dog"], 56, "phrases")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_texts(tokenizer, ["a [MASK] dog", "a dog", "a cat", "[MASK]"], 56)  # a mask is no lost word


@pytest.mark.parametrize(
    "caption",
    ["['a dog', 'a cat']", '["a dog"]', "('a dog', 'a cat')", "['a dog' 'a cat']", "[]", '{"raw": "a dog"}',
     "array(['a dog', 'a cat'], dtype=object)", "[\n'a dog',\n 'a cat']"],
)  # fmt: skip
def test_a_list_in_disguise_is_refused(tmp_path, caption):
    root = table(tmp_path, {"file": "a.jpg", "caption": "a cat"}, {"file": "b.jpg", "caption": caption})
    with pytest.raises(DataError, match="row 2: a list written as one caption.*one caption per row"):
        open_folder(root)
    assert len(open_folder(root, on_error="skip")) == 1


@pytest.mark.parametrize("caption", ["[a dog]", "(blurred)", "a dog [sic]", "[2, 3]", "{a} dog", "(a dog) and (a cat)"])
def test_brackets_alone_make_no_list(tmp_path, caption):
    assert open_folder(table(tmp_path, {"file": "a.jpg", "caption": caption})).captions(0) == [caption]


def test_captions_such_as_nan_are_counted(tmp_path, capsys):
    said = ["nan", "a cat", "None", "nan", "NULL", "nan bread"]
    root = table(tmp_path, *[{"file": f"{n}.jpg", "caption": text} for n, text in enumerate(said)])
    assert len(open_folder(root)) == 6
    out = capsys.readouterr().out
    assert "caption 'nan' is kept as text: is a caption missing there? (2 rows, first: metadata.jsonl row 1)" in out
    assert "caption 'None'" in out and "caption 'NULL'" in out and "bread" not in out


# ----------------------------------------------------------------------------------------------- published data sets


def flickr8k(root: Path) -> Path:
    """Flickr8k as its two archives unpack on a Mac."""
    names = [f"{n}_{n}.jpg" for n in range(6)]
    pictures = root / "Flickr8k_Dataset/Flicker8k_Dataset"
    for n, name in enumerate(names):
        picture(pictures / name, (40 * n, 0, 0))
    text = root / "Flickr8k_text"
    text.mkdir()
    lines = [f"{name}#{k}\tpicture {name[0]} said {k} ." for name in names for k in range(5)]
    lines[10:10] = [f"2258277193_586949ec62.jpg.1#{k}\tpeople on the street {k}" for k in range(5)]
    (text / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    (text / "Flickr8k.lemma.token.txt").write_text("\n".join(lines).replace("said", "say"))
    for split, some in (("train", names[:4]), ("dev", names[4:5]), ("test", names[5:])):
        (text / f"Flickr_8k.{split}Images.txt").write_text("\n".join(some) + "\n")
    (text / "ExpertAnnotations.txt").write_text("0_0.jpg\t1_1.jpg#2\t1\t1\t1\n")
    (text / "readme.txt").write_text("If you publish work based on the data set, please cite\n")
    for path in [*pictures.iterdir(), *text.iterdir(), root / "Flickr8k_text"]:
        leftover = root / "__MACOSX" / path.parent.name / f"._{path.name}"
        leftover.parent.mkdir(parents=True, exist_ok=True)
        leftover.write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X")
        shutil.copy(leftover, path.parent / f"._{path.name}")
    (text / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    return root


def test_flickr8k_as_published(tmp_path, capsys):
    root = flickr8k(tmp_path)
    assert main(["data", f"flickr:{root}"]) == 0
    out = capsys.readouterr().out
    assert "Folder(6 images, 30 captions, 0 regions)" in out
    assert out.count("2258277193") == 0 and out.count("1 picture that Flickr8k names and no archive of it holds") == 1
    assert [len(open_folder(root, split)) for split in ("train", "validation", "test")] == [4, 1, 1]


@pytest.mark.parametrize("name", ["2258277193_586949ec62.jpg", "1234567_586949ec62.jpg.1", "0_0.jpg.1"])
def test_other_missing_pictures_stay_errors(tmp_path, name):
    root = flickr8k(tmp_path)
    file = root / "Flickr8k_text/Flickr8k.token.txt"
    file.write_text(file.read_text() + f"{name}#0\ta dog\n")
    with pytest.raises(DataError, match=f"Flickr8k.token.txt row 36: missing image. '{name}'"):
        open_folder(f"flickr:{root}")


def kaggle30k(root: Path) -> Path:
    """Flickr30k as Kaggle's archive unpacks: the list twice, the pictures twice, a row without its second bar."""
    outer = root / "flickr30k_images"
    rows = ["image_name| comment_number| comment"]
    rows += [f"{n}.jpg| {k}| Picture {n} , said {k} ." for n in (1, 2) for k in range(5)]
    rows += ["2199200615.jpg| 3| A dog .", "2199200615.jpg| 4   A dog runs across the grass ."]
    for folder in (outer / "flickr30k_images", outer / "flickr30k_images/flickr30k_images"):
        for n, name in enumerate(("1.jpg", "2.jpg", "2199200615.jpg")):
            picture(folder / name, (0, 100 * n, len(folder.parts)))
    for folder in (outer, outer / "flickr30k_images"):
        (folder / "results.csv").write_text("\n".join(rows))
    return root


@pytest.mark.parametrize("below", ["", "flickr30k_images", "flickr30k_images/results.csv",
                                   "flickr30k_images/flickr30k_images"])  # fmt: skip
def test_flickr30k_as_kaggle_unzips_it(tmp_path, below, capsys):
    root = kaggle30k(tmp_path)
    folder = open_folder(f"flickr:{root / below}")
    assert len(folder) == 3 and folder.captions(2) == ["A dog .", "A dog runs across the grass ."]
    assert {row.file.parent for row in folder.rows} == {root / "flickr30k_images/flickr30k_images"}  # the upper ones
    out = capsys.readouterr().out
    assert out.count("second bar") == 1
    if below in ("", "flickr30k_images"):
        assert out.count("the upper ones are read (3 rows, first: 1.jpg)") == 1
    assert (below == "flickr30k_images") <= ("it is a copy of results.csv" in out)


def test_what_is_not_kaggles_flaw_stays_an_error(tmp_path):
    root = kaggle30k(tmp_path)
    inner = root / "flickr30k_images/flickr30k_images/results.csv"
    inner.write_text(inner.read_text().replace("Picture 1", "Image 1"))
    with pytest.raises(DataError, match="both .* have captions. Name one"):  # two different lists
        open_folder(f"flickr:{root / 'flickr30k_images'}")
    inner.unlink()
    outer = root / "flickr30k_images/results.csv"
    for row in ("1.jpg| 7 dogs run .", "1.jpg 7| a dog", "1.jpg| a dog"):
        outer.write_text(f"image_name| comment_number| comment\n1.jpg| 0| a dog\n{row}\n")
        with pytest.raises(DataError, match="results.csv row 3: wrong number of columns"):
            open_folder(f"flickr:{root}")
    outer.write_text("image_name| comment_number| comment\n1.jpg| 0| a dog\n")
    picture(root / "thumbs/1.jpg")
    with pytest.raises(DataError, match="image in two places"):
        open_folder(f"flickr:{root}")


def test_karpathys_three_files_side_by_side(tmp_path):
    for kind, name in (("coco", "COCO_val2014_000000391895.jpg"), ("flickr8k", "a.jpg"), ("flickr30k", "b.jpg")):
        image = {"filename": name, "split": "train", "sentences": [{"raw": f"of {kind}"}]}
        (tmp_path / f"dataset_{kind}.json").write_text(json.dumps({"images": [image], "dataset": kind}))
    picture(tmp_path / "Images/b.jpg")
    assert open_folder(f"flickr:{tmp_path}").captions(0) == ["of flickr30k"]
    picture(tmp_path / "Images/a.jpg")
    with pytest.raises(DataError, match="both .* have captions"):
        open_folder(f"flickr:{tmp_path}")


def coco2017(root: Path) -> Path:
    """COCO as unzipped: other annotations beside, test pictures, an empty box, an image without a caption."""
    (root / "annotations").mkdir(parents=True)
    for split, first in (("train2017", 1), ("val2017", 10)):
        images = [{"id": n, "file_name": f"{n:012}.jpg", "width": 40, "height": 20} for n in range(first, first + 3)]
        for image in images:
            picture(root / split / image["file_name"], (image["id"], 0, 0))
        said = [{"id": i["id"], "image_id": i["id"], "caption": f"picture {i['id']}"} for i in images[:2]]
        boxes = [[0, 0, 20, 20], [3, 4, 5, 0]]
        mark = {"image_id": first, "category_id": 1, "iscrowd": 0, "area": 0, "segmentation": []}
        marks = [{**mark, "id": n, "bbox": box} for n, box in enumerate(boxes)]
        for what, rows in (("captions", said), ("instances", marks), ("person_keypoints", marks), ("panoptic", [])):
            data = {"info": {}, "images": images, "annotations": rows, "categories": [{"id": 1, "name": "cat"}]}
            (root / f"annotations/{what}_{split}.json").write_text(json.dumps(data))
    (root / "annotations/image_info_test2017.json").write_text(json.dumps({"images": []}))
    (root / "annotations/._captions_train2017.json").write_bytes(b"\0\5\26\7")
    picture(root / "test2017/000000000099.jpg")
    return root


def test_coco_as_unzipped(tmp_path, capsys):
    root = coco2017(tmp_path)
    assert main(["data", f"coco:{root}"]) == 0
    out = capsys.readouterr().out
    assert "Folder(4 images, 4 captions, 2 regions)" in out and "keypoints" not in out and "panoptic" not in out
    assert "2 image without caption, 2 box of no size" in out
    with pytest.raises(DataError, match="no image in split 'test'.*captions_train2017.json, captions_val2017.json"):
        open_folder(f"coco:{root}", "test")
    assert main(["data", f"coco:{root}", "--split", "test"]) == 1
    error = capsys.readouterr().err
    assert "Or take all: --split all" in error and "split=None" not in error


def test_messages_speak_of_options_on_the_command_line(tmp_path, capsys):
    root = table(tmp_path, {"file": "a.jpg", "caption": ""})
    assert main(["data", f"folder:{root}"]) == 1
    error = capsys.readouterr().err
    assert "--skip-errors" in error and "on_error" not in error


# --------------------------------------------------------------------------------------------------------- containers


@pytest.mark.parametrize(
    "name, ways",
    [
        ("00000.tar", ["a tar archive", "wds:"]),
        ("shard.TAR", ["wds:"]),
        ("train.parquet", ["a parquet table", "parquet:"]),
        ("data-00000-of-00001.arrow", ["hf:"]),
        ("flickr8k.zip", ["Unpack it"]),
        ("captions.xlsx", ["a spreadsheet", "CSV (UTF-8)"]),
        ("captions.csv.gz", ["Decompress it"]),
        ("captions.pkl", ["captions.csv"]),
        ("a.jpg", ["a picture", "Give the folder"]),
    ],
)
@pytest.mark.parametrize("prefix", ["", "flickr:", "folder:"])
def test_other_containers_are_recognized(tmp_path, name, ways, prefix):
    (tmp_path / name).write_bytes(b"\x01\x02\x03")
    if prefix == "" and name.endswith((".tar", ".TAR", ".parquet", ".arrow")):
        try:
            open_folder(str(tmp_path / name))
        except DataError as error:
            assert str(tmp_path / name) in str(error)
        return  # readers of their own may take the plain path
    with pytest.raises(DataError) as caught:
        open_folder(f"{prefix}{tmp_path / name}")
    assert all(way in str(caught.value) for way in ways) and str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    "start, said",
    [
        (
            b"PK\x03\x04\x14\0\6\0\x08\0\0\0!\0b\xee\x9dh^\1\0\0\x90\4\0\0\x13\0\x08\2[Content_Types].xml",
            "a spreadsheet",
        ),
        (b"PK\x03\x04" + bytes(30), "a packed archive"),
        (b"PAR1" + bytes(30), "a parquet table"),
        (b"\x1f\x8b\x08" + bytes(30), "a compressed file"),
    ],
)
def test_a_csv_that_is_something_else(tmp_path, start, said):
    (tmp_path / "captions.csv").write_bytes(start)
    for spec in (tmp_path, f"folder:{tmp_path}", tmp_path / "captions.csv"):
        with pytest.raises(DataError, match=f"captions.csv: {said}"):
            open_folder(spec)


@pytest.mark.parametrize(
    "files, said",
    [
        (["00000.tar", "00001.tar"], "00000.tar, a tar archive.*wds:"),
        (["train-00000.parquet"], "parquet:"),
        (["dataset_info.json", "data-0.arrow"], "hf:"),
        (["flickr8k.zip"], "Unpack it"),
        (["train.csv", "a.jpg"], "name it: folder:.*train.csv"),
        (["flickr30k_train.json"], "name it: folder:.*flickr30k_train.json"),
    ],
)
def test_folders_of_other_containers(tmp_path, files, said):
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(DataError, match=said):
        open_folder(f"folder:{tmp_path}")


def test_a_folder_of_another_layout_is_told(tmp_path):
    coco2017(tmp_path / "coco")
    with pytest.raises(DataError, match="files of another layout: write coco:"):
        open_folder(f"folder:{tmp_path / 'coco'}")
    kaggle30k(tmp_path / "flickr")
    with pytest.raises(DataError, match="files of another layout: write flickr:"):
        open_folder(f"coco:{tmp_path / 'flickr'}")


LISTS = {
    "albef": [{"image": "a.jpg", "caption": "a cat", "image_id": "1"}, {"image": "b.jpg", "caption": "a dog"}],
    "blip test": [{"image": "pics/a.jpg", "caption": ["a cat"]}, {"image": "b.jpg", "caption": ["a dog"]}],
    "refcoco": [{"image": "a.jpg", "text": "a cat", "ref_id": 3}, {"image": "b.jpg", "text": "a dog", "ref_id": 4}],
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("prefix", ["", "folder:", "flickr:"])
def test_json_lists_of_captions(tmp_path, kind, prefix, capsys):
    picture(tmp_path / "pics/a.jpg"), picture(tmp_path / "b.jpg")
    file = tmp_path / "flickr30k_train.json"
    file.write_text(json.dumps(LISTS[kind], indent=1))
    folder = open_folder(f"{prefix}{file}")
    assert [folder.captions(row) for row in range(2)] == [["a cat"], ["a dog"]] and capsys.readouterr().out == ""


def test_a_json_file_of_lines(tmp_path):
    picture(tmp_path / "a.jpg")
    rows = [{"image": "a.jpg", "caption": "a cat"}, {"image": "a.jpg", "caption": "a black cat"}]
    (tmp_path / "train.json").write_text("\n".join(map(json.dumps, rows)))
    assert open_folder(tmp_path / "train.json").captions(0) == ["a cat", "a black cat"]


@pytest.mark.parametrize(
    "data, said",
    [
        ([{"id": "1", "image": "a.jpg", "conversations": [{"from": "gpt", "value": "a"}]}], r"\[0\]: a conversation"),
        ([{"image": "a.jpg", "caption": "a cat"}, {"image": "b.jpg"}], r"x.json \[1\]: no caption"),
        (["a.jpg", "a cat"], r"x.json \[0\]: not an object"),
        ({"images": [{"id": 1}], "annotations": []}, "annotations of COCO: write coco:"),
        ({"a.jpg": ["a cat"]}, "not a list of rows"),
        ([], "no valid row is left"),
    ],
)
def test_json_files_that_are_no_list_of_captions(tmp_path, data, said):
    picture(tmp_path / "a.jpg")
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=said):
        open_folder(tmp_path / "x.json")


# -------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "there, named, difference",
    [
        ("Cat.JPG", "cat.jpg", "upper and lower case"),
        (unicodedata.normalize("NFD", "Café.jpg"), unicodedata.normalize("NFC", "Café.jpg"), "another Unicode form"),
        ("cat.jpeg", "cat.jpg", "another extension"),
        ("cat.webp", "cat.png", "another extension"),
        ("cat.jpg", "cat", "another extension"),
        ("a cat.jpg", "a%20cat.jpg", "%-escapes"),
        ("cat.jpg", "C:\\pictures\\cat.jpg", "another folder"),
        ("images\\cat.jpg", "images\\cat.jpg", "a backslash in the file's name"),
        ("COCO_val2014_000000391895.jpg", "000000391895.jpg", "a similar name"),
    ],
)
def test_near_names_are_suggested_for_missing_pictures(tmp_path, there, named, difference):
    picture(tmp_path / "pics" / "other.jpg").rename(tmp_path / "pics" / there)
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": named, "caption": "a cat"}), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path)
    message = str(caught.value)
    assert "row 1: missing image" in message and difference in message and repr(f"pics/{there}") in message


def test_a_captions_file_beside_its_pictures(tmp_path):
    root = flickr8k(tmp_path)
    (root / "Flickr8k_Dataset/Flicker8k_Dataset").rename(root / "Flicker8k_Dataset")
    with pytest.raises(DataError, match="missing image.*It lies beside, in .*Flicker8k_Dataset: name the folder above"):
        open_folder(f"flickr:{root / 'Flickr8k_text/Flickr8k.token.txt'}")
    assert len(open_folder(f"flickr:{root}")) == 6


def test_nothing_is_suggested_for_another_name(tmp_path):
    picture(tmp_path / "dog.jpg")
    with pytest.raises(DataError, match="missing image.*Put it there, fix the name or delete the row"):
        (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "cat.jpg", "caption": "a cat"}))
        open_folder(tmp_path)


def test_texts_for_a_loaded_model_are_checked(english_only):
    from minivlp.models.clip import CLIP, CLIPConfig
    from minivlp.pretrained.loading import Pretrained

    loaded = Pretrained(CLIP(CLIPConfig.nano(9)), "here", ())
    loaded.__dict__["tokenizer"] = load_tokenizer(english_only)
    long = "a red cat " * 30
    with pytest.warns(
        Notice, match="texts: 2 of 3 are longer than 56 tokens and cut there; 2 different ones become one"
    ):
        assert len(loaded(texts=[long, f"{long} a dog", "a dog"])["text"]) == 3
    with pytest.raises(ValueError, match="1 of 1 texts are nothing but unknown.*'chat noir'"):
        loaded(texts="chat noir")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(texts=["a red dog", "a cat"])
