"""Checks of lesson 07's larger exercise, a box head with its loss and a training step, and a short run with them.

Axes: B images, R regions, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.data.batch import Batch, Regions, Text
from minivlp.data.loading import Loader
from minivlp.layers.heads import BoxHead
from minivlp.lessons.check import attempt, demand, demand_gradients, same
from minivlp.models.xvlm import XVLM, XVLMConfig
from minivlp.objectives.boxes import box_losses, giou

WIDTH = 8
IS_IMAGE = torch.tensor([False, True, False, True, False])
TARGETS = torch.tensor(
    [[0.4, 0.5, 0.4, 0.2], [0.5, 0.5, 1.0, 1.0], [0.6, 0.4, 0.3, 0.3], [0.5, 0.5, 1.0, 1.0], [0.9, 0.9, 0.1, 0.2]]
)


def check_boxes(student: Callable[[int], nn.Module]) -> None:
    """`student(width)` -> a module with the layers `mlp`; called with fused tokens (R, L, D) it returns boxes (R, 4),
    and `loss(fused, boxes, is_image)` is the sum of L1 and 1 - GIoU. Compared with `BoxHead` and `box_losses`."""
    library, mine = BoxHead(WIDTH), attempt(student, WIDTH)
    demand(isinstance(mine, nn.Module) and hasattr(mine, "loss"), "Your class is an nn.Module with a method `loss`.")
    same = {name: p.shape for name, p in mine.state_dict().items()} == {
        name: p.shape for name, p in library.state_dict().items()
    }
    demand(same, "Keep the layers of the given __init__: two linear layers with LayerNorm and GELU between them.")
    mine.load_state_dict(library.state_dict())
    fused = torch.randn(5, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    _check_forward(mine, library, fused)
    _check_loss(mine, library, fused)
    print("ok: four numbers in 0..1 from the first token; L1 and 1 - GIoU, summed, per box, without whole images.")


def _check_forward(mine: nn.Module, library: BoxHead, fused: Tensor) -> None:
    got, wanted = attempt(mine, fused), library(fused)
    demand(got.shape == (5, 4), f"One box per text: (5, 4), yours is {tuple(got.shape)}. Use the first token alone.")
    demand(not same(got, library.mlp(fused[:, 0])), "A box lies in 0..1: end with a sigmoid.")
    demand(
        not same(got, library(fused.mean(dim=1, keepdim=True))),
        "You use the mean of all tokens, padding included; use the first, [CLS].",
    )
    demand(not same(got, library(fused[:, -1:])), "You use the last token, which may be padding; use the first.")
    demand(same(got, wanted), "The boxes differ from the library's: mlp of the first token, then a sigmoid.")
    for what, tokens in {"one row": fused[:1], "a transposed view": fused.mT.contiguous().mT}.items():
        demand(same(attempt(mine, tokens), library(tokens)), f"Right so far, but wrong for {what}.")


def _check_loss(mine: nn.Module, library: BoxHead, fused: Tensor) -> None:
    def right(tokens: Tensor, rows: slice = slice(None)) -> Tensor:
        return sum(box_losses(library(tokens), TARGETS[rows], IS_IMAGE[rows]))

    got = attempt(mine.loss, fused, TARGETS, IS_IMAGE)
    demand(isinstance(got, Tensor) and got.ndim == 0, "The loss is one number: average over the boxes.")
    predicted, boxes = library(fused)[~IS_IMAGE], TARGETS[~IS_IMAGE]
    l1, g = (predicted - boxes).abs(), 1 - giou(predicted, boxes)
    wrong = {
        "That is L1 alone; add 1 - GIoU.": l1.sum() / 3,
        "That is 1 - GIoU alone; add L1.": g.mean(),
        "L1 is summed over the four numbers; you average them.": l1.mean() + g.mean(),
        "GIoU is 1 for equal boxes: the loss has 1 - GIoU.": l1.sum() / 3 + (1 - g).mean(),
        "The loss must fall when GIoU rises: 1 - GIoU.": l1.sum() / 3 - (1 - g).mean(),
        "Divide by the number of boxes, or the loss would grow with the batch.": l1.sum() + g.sum(),
        "You divide by all five rows; divide by the three that have a box.": (l1.sum() + g.sum()) / 5,
        "Whole images count in yours. Leave them out: their captions name no place.": sum(
            box_losses(library(fused), TARGETS)
        ),
    }
    for message, value in wrong.items():
        demand(not torch.isclose(got, value, atol=1e-5), message)
    demand(torch.isclose(got, right(fused), atol=1e-5), f"The loss should be {right(fused):.3f}, yours is {got:.3f}.")
    none = attempt(mine.loss, fused, TARGETS, torch.ones(5, dtype=torch.bool))
    value = float(torch.as_tensor(none).detach())
    demand(
        value == 0,
        f"For a batch of whole images the loss is 0, yours is {value:.3f}: divide by at least 1.",
    )
    demand(
        none.requires_grad,
        "A batch of whole images gives a loss without gradient, and backward() would stop: let 0 come from a sum over "
        "no boxes.",
    )
    one = attempt(mine.loss, fused[:1], TARGETS[:1], IS_IMAGE[:1])
    demand(torch.isclose(one, right(fused[:1], slice(1)), atol=1e-5), "Right so far, but wrong for one row.")
    fused = fused.clone().requires_grad_()
    weight = {f"the weight of {name}": p for name, p in mine.named_parameters() if name == "mlp.3.weight"}
    demand_gradients(mine.loss(fused, TARGETS, IS_IMAGE), right(fused), fused=fused)
    demand_trains(mine.loss(fused, TARGETS, IS_IMAGE), **weight)


def demand_trains(loss: Tensor, **weights: Tensor) -> None:
    """Demand that the loss has a gradient for each of these parameters."""
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    for name, gradient in zip(weights, found, strict=True):
        demand(gradient is not None and gradient.any(), f"loss.backward() gives {name} no gradient.")


# ------------------------------------------------------------------------------------------------------ a training step

RATE = 0.5  # learning rate of the check


def check_box_step(student: Callable) -> None:
    """`student(model, head, batch, optimizer)` -> the loss of one training step of model and head, from phrases that
    attend to the whole image. Compared with the library's losses and gradients on a small X-VLM."""
    model, batch = _small_model(), _small_batch()
    head = _LibraryHead(model.config.text.block.width)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    head.load_state_dict(model.box_head.state_dict())
    encoded = model.encode(batch)
    wanted = sum(encoded.box_losses)
    parameters = {n: p for n, p in model.named_parameters() if n.startswith(("image.", "text.", "fusion."))}
    found = torch.autograd.grad(wanted, list(parameters.values()), allow_unused=True)
    gradients = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
    inside = _through_the_mask(model, batch)
    trained = [*model.parameters(), *head.parameters()]
    for parameter in trained:
        parameter.grad = torch.full_like(parameter, 0.1)  # left over from an earlier step
    encoded_images: list[int] = []
    model.image.register_forward_hook(lambda _, inputs, __: encoded_images.append(len(inputs[0])))
    got = torch.as_tensor(attempt(student, model, head, batch, torch.optim.SGD(trained, lr=RATE)))
    demand(got.numel() == 1, "Return one number, the loss.")
    demand(
        sum(encoded_images) == len(batch.images),
        f"The image tower encoded {sum(encoded_images)} images; the batch has {len(batch.images)}. Encode each once, "
        "then take the tokens of `regions.image_rows`.",
    )
    demand(
        not torch.isclose(got, inside, atol=1e-4),
        "Your phrases attend to the patches of their own box. For the box they attend to the whole image.",
    )
    demand(
        torch.isclose(got.detach().float(), wanted.detach(), atol=1e-4),
        f"The loss should be {wanted:.3f}, yours is {got:.3f}. Does phrase r attend to the image `image_rows[r]`, and "
        "do the fusion layers know `text.mask`?",
    )
    now = dict(model.named_parameters())

    def moved_by(direction: Callable[[str], Tensor | float]) -> bool:
        return all(torch.allclose(now[n], start[n] - RATE * direction(n), atol=1e-4) for n in gradients)

    demand(not moved_by(lambda n: 0.0), "The loss is right, but the model did not change: optimizer.step().")
    demand(not moved_by(lambda n: 0.1), "The optimizer used old gradients: call backward() on the loss.")
    demand(
        not moved_by(lambda n: gradients[n] + 0.1),
        "Gradients of an earlier step were added: call optimizer.zero_grad() before backward().",
    )
    demand(moved_by(lambda n: gradients[n]), "The loss is right, but the update is another one: is a part detached?")
    print("ok: each image once, each phrase on its whole image, and one update.")


class _LibraryHead(BoxHead):
    """A right box head with its loss."""

    def loss(self, fused: Tensor, boxes: Tensor, is_image: Tensor) -> Tensor:
        return sum(box_losses(self(fused), boxes, is_image))


def _small_model() -> XVLM:
    nano = XVLMConfig.nano(40)
    block = replace(nano.image.block, width=16, heads=2, hidden=32)
    image, text = replace(nano.image, image_size=32, block=block), replace(nano.text, block=block)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return XVLM(replace(nano, image=image, text=text, embed_width=8))


def _small_batch() -> Batch:
    """Three images with five phrases of different lengths."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(6) < torch.tensor([[6], [3], [4], [5], [3]])
    text = Text(torch.randint(7, 40, (5, 6), generator=generator) * mask, mask)
    regions = Regions(TARGETS, text, torch.tensor([0, 0, 1, 2, 2]), IS_IMAGE)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    return Batch(images, text[:3], torch.tensor([4, 5, 6]), regions=regions)


@torch.no_grad()
def _through_the_mask(model: XVLM, batch: Batch) -> Tensor:
    """The loss where phrases attend to the patches of their own box alone."""
    regions = batch.regions
    tokens, inside = model.encode_regions(batch.images, regions.boxes, regions.image_rows)
    fused = model.fuse(model.encode_text(regions.text), regions.text.mask, tokens, inside)
    return sum(box_losses(model.box_head(fused), regions.boxes, regions.is_image))


# --------------------------------------------------------------------------------------------------------- a short run


def short_run(
    step: Callable, model: nn.Module, head: nn.Module, scenes: Any, tokenizer: Any, steps: int = 60
) -> list[float]:
    """Train a box head on a model that stays as it is, with a student's step (see `check_box_step`): the losses."""
    model.requires_grad_(False)
    loader = Loader(scenes, tokenizer, 16, scenes.size, seed=1, regions_per_image=3, kinds=("object", "phrase"))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    return [float(step(model, head, loader.batch(n), optimizer)) for n in range(steps)]
