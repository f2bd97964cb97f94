"""Real folders to ground on: whatever the layout, regions reach the measure and a training batch."""

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
from minivlp.evaluation.grounding import grounding
from minivlp.models.xvlm import XVLM, XVLMConfig

WIDTH, HEIGHT = 80, 40
DOG, CUP, CAT = [0, 0, 40, 40], [50, 10, 70, 30], [8, 4, 24, 36]  # corners in pixels
SAID = {"a.png": [("dog", DOG), ("cup", CUP)], "b.png": [("dog", CUP), ("cat", CAT), ("dog", DOG)]}


def sized(corners):
    x0, y0, x1, y1 = corners
    return [x0, y0, x1 - x0, y1 - y0]


def write_coco(root):
    (root / "annotations").mkdir()
    images = [{"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT} for i, name in enumerate(SAID)]
    captions = [{"id": i, "image_id": i, "caption": "two animals"} for i in range(len(SAID))]
    names = ["dog", "cup", "cat"]
    marks = [
        {"id": 10 * i + n, "image_id": i, "category_id": names.index(phrase), "bbox": sized(box), "iscrowd": 0}
        for i, said in enumerate(SAID.values())
        for n, (phrase, box) in enumerate(said)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    for kind, items in (("captions", captions), ("instances", marks)):
        data = {"images": images, "annotations": items, "categories": categories}
        (root / "annotations" / f"{kind}_open.json").write_text(json.dumps(data))


def write_entities(root):
    """A caption of the picture, and phrases of it with corners."""
    rows = [
        {"file": name, "caption": "two animals", "regions": [{"xyxy": box, "phrase": phrase} for phrase, box in said]}
        for name, said in SAID.items()
    ]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_expressions(root):
    """One expression to a row, no caption, corner and size."""
    rows = [
        {"image": name, "xywh": sized(box), "phrases": [phrase]} for name, said in SAID.items() for phrase, box in said
    ]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(params=[write_coco, write_entities, write_expressions], ids=["coco", "entities", "expressions"])
def folder(request, tmp_path):
    for number, name in enumerate(SAID):
        Image.fromarray(np.full((HEIGHT, WIDTH, 3), number, np.uint8)).save(tmp_path / name)  # its grey is its number
    request.param(tmp_path)
    return open_folder(tmp_path)


class Points(nn.Module):
    """Knows the boxes of both pictures, which it tells apart by their grey."""

    config = SimpleNamespace(image=SimpleNamespace(image_size=8), text=SimpleNamespace(context_length=16))

    def __init__(self, tokenizer, shift=0.0):
        super().__init__()
        self.tokenizer, self.shift = tokenizer, shift

    def ground(self, images, ids, mask):
        names = [list(SAID)[row] for row in ((images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()]
        texts = [self.tokenizer.decode(i[m], skip_special_tokens=True).strip() for i, m in zip(ids, mask, strict=True)]
        corners = [dict(SAID[name])[text] for name, text in zip(names, texts, strict=True)]
        x0, y0, x1, y1 = torch.tensor(corners, dtype=torch.float32).T
        return torch.stack(
            [(x0 + x1) / 2 / WIDTH + self.shift, (y0 + y1) / 2 / HEIGHT, (x1 - x0) / WIDTH, (y1 - y0) / HEIGHT], 1
        )


def test_boxes_of_every_layout_are_what_the_measure_asks_for(folder):
    tokenizer = load_tokenizer()
    scores = grounding(Points(tokenizer), folder, tokenizer)
    assert scores["mean IoU"].value == pytest.approx(1) and scores["Acc@0.5"].n == 4  # "dog" of two dogs: asked once
    assert grounding(Points(tokenizer, shift=0.4), folder, tokenizer)["Acc@0.7"].value == 0


def test_every_layout_trains(folder):
    tokenizer = load_tokenizer()
    batch = Loader(folder, tokenizer, 2, 64, regions_per_image=3).batch(0)
    assert len(batch.region_boxes) == 5 and batch.region_image.bincount().tolist() in ([2, 3], [3, 2])
    losses = XVLM(XVLMConfig.nano(len(tokenizer))).losses(batch)
    assert all(loss.isfinite() for loss in losses.values()) and {"box_l1", "box_giou"} <= set(losses)
