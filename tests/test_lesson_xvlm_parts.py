"""Lesson 07's larger exercise: a right box head and step pass, typical wrong ones are told what failed."""

import pytest
import torch
from torch import nn

from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.lessons.check import NotYet
from minivlp.lessons.xvlm_parts import check_box_step, check_boxes, short_run
from minivlp.models.xvlm import XVLM
from minivlp.objectives.boxes import giou
from minivlp.training.checkpoint import bundled, load_model


def boxes(**mistakes):
    """The class of the exercise, with mistakes: name -> True."""
    wrong = mistakes.get

    class Mine(nn.Module):
        def __init__(self, width):
            super().__init__()
            layers = [nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, 4)]
            self.mlp = nn.Sequential(*(layers[:1] if wrong("one_layer") else layers))

        def forward(self, fused):
            if wrong("all_tokens"):
                return self.mlp(fused).sigmoid()
            token = fused.mean(1) if wrong("mean") else fused[:, -1] if wrong("last") else fused[:, 0]
            return self.mlp(token) if wrong("no_sigmoid") else self.mlp(token).sigmoid()

        def loss(self, fused, target, is_image):
            keep = torch.ones_like(is_image) if wrong("whole_images") else ~is_image
            if wrong("zero") and not keep.any():
                return torch.tensor(0.0)
            predicted, target = self(fused.detach() if wrong("detached") else fused)[keep], target[keep]
            l1, overlap = (predicted - target).abs(), giou(predicted, target)
            l1 = 4 * l1 * 0.25**2 if wrong("mean_of_four") else l1
            if wrong("l1_alone"):
                return l1.sum() / len(l1)
            count = (
                len(fused)
                if wrong("all_rows")
                else 1
                if wrong("summed")
                else len(l1)
                if wrong("nan")
                else max(1, len(l1))
            )
            if wrong("in_place"):
                target -= predicted.detach()
            return (l1.sum() + (overlap if wrong("giou") else 1 - overlap).sum()) / count

    return Mine


@pytest.mark.parametrize("mistakes", [{}, {"in_place": True}])
def test_a_right_box_head_passes(mistakes, capsys):
    check_boxes(boxes(**mistakes))
    assert capsys.readouterr().out.startswith("ok")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("one_layer", "Keep the layers"),
        ("all_tokens", "One box per text"),
        ("mean", "mean of all tokens"),
        ("last", "last token"),
        ("no_sigmoid", "sigmoid"),
        ("whole_images", "Whole images count"),
        ("zero", "without gradient"),
        ("detached", "gives `fused` no gradient"),
        ("mean_of_four", "summed over the four"),
        ("l1_alone", "L1 alone"),
        ("all_rows", "all five rows"),
        ("summed", "number of boxes"),
        ("nan", "divide by at least 1"),
        ("giou", "1 - GIoU"),
    ],
)
def test_a_wrong_box_head_is_told_what_failed(mistake, message):
    with pytest.raises(NotYet, match=message):
        check_boxes(boxes(**{mistake: True}))


def step(**mistakes):
    """The training step of the exercise, with mistakes: name -> True."""
    wrong = mistakes.get

    def mine(model, head, batch, optimizer):
        regions, mask = batch.regions, batch.regions.text.mask
        inside, image_rows = None, regions.image_rows.roll(1) if wrong("rows") else regions.image_rows
        if wrong("own_box"):
            tokens, inside = model.encode_regions(batch.images, regions.boxes, regions.image_rows)
        elif wrong("each"):
            tokens = model.encode_image(batch.images[image_rows])
        else:
            tokens = model.encode_image(batch.images)[image_rows]
        words = model.encode_text(regions.text)
        words = words.detach() if wrong("cut") else words
        fused = model.fuse(words, torch.ones_like(mask) if wrong("padding") else mask, tokens, inside)
        loss = head.loss(fused, regions.boxes, regions.is_image)
        if not wrong("no_zero"):
            optimizer.zero_grad()
        loss.backward()
        if not wrong("no_step"):
            optimizer.step()
        return loss.item()

    return mine


def test_a_right_step_passes(capsys):
    check_box_step(step())
    assert capsys.readouterr().out.startswith("ok")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("each", "Encode each once"),
        ("rows", "image_rows"),
        ("own_box", "whole image"),
        ("cut", "is a part detached"),
        ("padding", "text.mask"),
        ("no_zero", "zero_grad"),
        ("no_step", r"optimizer.step\(\)"),
    ],
)
def test_a_wrong_step_is_told_what_failed(mistake, message):
    with pytest.raises(NotYet, match=message):
        check_box_step(step(**{mistake: True}))


def test_the_short_run_learns():
    tokenizer, scenes = load_tokenizer(), Scenes(200, "train", 0)
    model = load_model(XVLM, bundled("towers_nano"))
    torch.manual_seed(0)
    losses = short_run(step(), model, boxes()(128), scenes, tokenizer, steps=20)
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])
