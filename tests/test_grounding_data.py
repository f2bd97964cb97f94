"""Grounding on folders of images: the regions of every layout reach the metric and a training batch."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minivlp.data.folders import open_folder
from minivlp.data.loading import Loader
from minivlp.data.text import load_tokenizer

WIDTH, HEIGHT = 80, 40
DOG, CUP, CAT = [0, 0, 40, 40], [50, 10, 70, 30], [8, 4, 24, 36]  # corners in pixels
PHRASES = {"a.png": [("dog", DOG), ("cup", CUP)], "b.png": [("dog", CUP), ("cat", CAT), ("dog", DOG)]}


def sized(corners):
    x0, y0, x1, y1 = corners
    return [x0, y0, x1 - x0, y1 - y0]


def write_coco(root):
    (root / "annotations").mkdir()
    images = [{"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(PHRASES)]
    captions = [{"id": i, "image_id": i, "caption": "two animals"} for i in range(len(PHRASES))]
    names = ["dog", "cup", "cat"]
    boxes = [
        {"id": 10 * i + n, "image_id": i, "category_id": names.index(phrase), "bbox": sized(box), "iscrowd": 0}
        for i, phrases in enumerate(PHRASES.values())
        for n, (phrase, box) in enumerate(phrases)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    for kind, items in (("captions", captions), ("instances", boxes)):
        data = {"images": images, "annotations": items, "categories": categories}
        (root / "annotations" / f"{kind}_open.json").write_text(json.dumps(data))


def write_entities(root):
    """A caption per image, and phrases with the corners of their boxes."""
    rows = [
        {
            "file": name,
            "caption": "two animals",
            "regions": [{"xyxy": box, "phrase": phrase} for phrase, box in phrases],
        }
        for name, phrases in PHRASES.items()
    ]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_expressions(root):
    """One expression per row with the corner and size of its box, and no caption."""
    rows = [
        {"image": name, "xywh": sized(box), "phrases": [phrase]}
        for name, phrases in PHRASES.items()
        for phrase, box in phrases
    ]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(params=[write_coco, write_entities, write_expressions], ids=["coco", "entities", "expressions"])
def folder(request, tmp_path):
    for number, name in enumerate(PHRASES):
        gray = np.full((HEIGHT, WIDTH, 3), number, np.uint8)  # the gray level identifies the image
        Image.fromarray(gray).save(tmp_path / name)
    request.param(tmp_path)
    return open_folder(tmp_path)


class Points(nn.Module):
    """Knows the boxes of both images, which it distinguishes by their gray level."""

    config = SimpleNamespace(image=SimpleNamespace(image_size=8, size=(8, 8)), text=SimpleNamespace(context_length=16))

    def __init__(self, tokenizer, shift=0.0):
        super().__init__()
        self.tokenizer, self.shift = tokenizer, shift

    def ground(self, images, text):
        names = [list(PHRASES)[row] for row in ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()]
        pairs = zip(text.ids, text.mask, strict=True)
        texts = [self.tokenizer.decode(ids[mask], skip_special_tokens=True).strip() for ids, mask in pairs]
        corners = [dict(PHRASES[name])[phrase] for name, phrase in zip(names, texts, strict=True)]
        x0, y0, x1, y1 = torch.tensor(corners, dtype=torch.float32).T
        return torch.stack(
            [(x0 + x1) / 2 / WIDTH + self.shift, (y0 + y1) / 2 / HEIGHT, (x1 - x0) / WIDTH, (y1 - y0) / HEIGHT], 1
        )


def test_boxes_of_every_layout_are_those_of_the_metric(folder):
    from minivlp.evaluation.grounding import grounding

    tokenizer = load_tokenizer()
    scores = grounding(Points(tokenizer), folder, tokenizer)
    assert scores["mean IoU"].value == pytest.approx(1) and scores["Acc@0.5"].n == 4  # "dog" has two boxes
    assert grounding(Points(tokenizer, shift=0.4), folder, tokenizer)["Acc@0.7"].value == 0


def test_every_layout_makes_batches(folder):
    regions = Loader(folder, load_tokenizer(), 2, 64, regions_per_image=3).batch(0).regions
    assert len(regions) == len(regions.text) == 5 and regions.image_rows.bincount().tolist() in ([2, 3], [3, 2])
    assert not regions.is_image.any()


def test_every_layout_trains(folder):
    from minivlp.models.xvlm import XVLM, XVLMConfig

    tokenizer = load_tokenizer()
    batch = Loader(folder, tokenizer, 2, 64, regions_per_image=3).batch(0)
    losses = XVLM(XVLMConfig.nano(len(tokenizer))).losses(batch)
    assert all(loss.isfinite() for loss in losses.values()) and {"box_l1", "box_giou"} <= set(losses)
