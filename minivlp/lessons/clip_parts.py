"""Checks of lesson 01's exercises that build CLIP: from tokens to vectors, and one training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.lessons.check import attempt, demand, demand_gradients
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits

Vectors = tuple[Tensor, Tensor]


def check_vectors(student: Callable[..., Vectors]) -> None:
    """Exercise 2: `student(image_tokens, text_tokens, mask, project_image, project_text)` -> unit vectors (B, E) twice.

    image_tokens (B, 1+P, D), text_tokens (B, L, D), mask (B, L) True on real tokens, and two linear layers.
    """
    draw = torch.Generator().manual_seed(0)
    images, texts = torch.randn(3, 5, 8, generator=draw), torch.randn(3, 6, 8, generator=draw)
    mask = torch.arange(6) < torch.tensor([[6], [3], [1]])
    layers = _projection(seed=1), _projection(seed=2)
    wanted = _vectors(images, texts, mask, *layers)
    got = _two(student, images, texts, mask, *layers)
    for name, vectors, right, tokens, layer in zip(
        ("images", "texts"), got, wanted, (images, texts), layers, strict=True
    ):
        read = tokens[:, 0] if name == "images" else _last(tokens, mask)
        demand(
            vectors.shape == right.shape,
            f"`{name}`: one vector of length E = 4 for each of 3 pairs, shape (3, 4), not {tuple(vectors.shape)}.",
        )
        for wrong, message in (
            (layer(read), "bring the projected vectors to length one."),
            (F.normalize(layer(read), dim=0), "each row is one vector: normalize along the last axis."),
            (layer(F.normalize(read, dim=-1)), "first project, then bring to length one."),
            (F.normalize(layer(tokens.mean(dim=1)), dim=-1), "that is the mean of all tokens; read one token."),
        ):
            demand(not torch.allclose(vectors, wrong, atol=1e-5), f"`{name}`: {message}")
        if name == "texts":
            for place, message in (
                (
                    -1,
                    "the last place is padding in the shorter texts. The last real token is at `mask.sum(dim=1) - 1`.",
                ),
                (0, "the text tower is causal: its first token has read nothing but itself. Read the last real one."),
            ):
                wrong = F.normalize(layer(tokens[:, place]), dim=-1)
                demand(not torch.allclose(vectors, wrong, atol=1e-5), f"`texts`: {message}")
        demand(
            torch.allclose(vectors, right, atol=1e-5),
            f"`{name}`: other vectors than the library's. Choose one token, project it, bring it to length one.",
        )
    inputs = {"image_tokens": images.clone().requires_grad_(), "text_tokens": texts.clone().requires_grad_()}
    right = _sum_of_products(_vectors(*inputs.values(), mask, *layers))
    demand_gradients(_sum_of_products(_two(student, *inputs.values(), mask, *layers)), right, **inputs)
    single = images[:1], texts[:1], mask[:1], *layers
    demand(
        all(torch.equal(torch.tensor(a.shape), torch.tensor(b.shape)) and torch.allclose(a, b, atol=1e-5)
            for a, b in zip(_two(student, *single), _vectors(*single), strict=True)),
        "A batch of one pair gives another result: does a `squeeze` take its batch axis away?",
    )  # fmt: skip
    print("ok: one unit vector per picture, from the class token, and one per caption, from its last real token.")


def _projection(seed: int) -> nn.Linear:
    """A projection from 8 to 4 with random weights that are not trained."""
    layer = nn.Linear(8, 4, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)))
    return layer


def _last(tokens: Tensor, mask: Tensor) -> Tensor:
    """The last real token of each text: (B, L, D) -> (B, D)."""
    return tokens[torch.arange(len(tokens)), mask.sum(dim=1) - 1]


def _vectors(images: Tensor, texts: Tensor, mask: Tensor, for_images: nn.Linear, for_texts: nn.Linear) -> Vectors:
    """The right answer of exercise 2."""
    return F.normalize(for_images(images[:, 0]), dim=-1), F.normalize(for_texts(_last(texts, mask)), dim=-1)


def _two(student: Callable[..., Vectors], *arguments: Any) -> Vectors:
    """The student's answer, which must be two tensors."""
    got = attempt(student, *arguments)
    demand(
        isinstance(got, (tuple, list)) and len(got) == 2 and all(isinstance(x, Tensor) for x in got),
        "Return two tensors: the vectors of the pictures, and those of the captions.",
    )
    return tuple(got)


def _sum_of_products(vectors: Vectors) -> Tensor:
    """A scalar whose gradient is not zero, unlike that of the vectors' lengths."""
    return (vectors[0] * vectors[1]).sum()


class Toy(nn.Module):
    """The smallest model with the parts that a training step uses: two towers of one layer, and a logit scale."""

    def __init__(self, log_scale: float) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        draw = torch.Generator().manual_seed(3)
        for layer in (self.image, self.text):
            layer.weight.data.copy_(torch.randn(4, 6, generator=draw))

    def forward(self, images: Tensor, text: Tensor) -> Vectors:
        """(B, 6) twice -> unit vectors (B, 4) twice."""
        return F.normalize(self.image(images), dim=-1), F.normalize(self.text(text), dim=-1)


def check_step(student: Callable[..., float]) -> None:
    """Exercise 3: `student(model, images, text, loss, optimizer)` takes one training step and returns the loss.

    The model returns unit vectors of images and texts, and has `log_scale`; `loss(pictures, captions, temperature)` is
    a scalar. Three steps are compared with the same steps made here, by gradient descent and by AdamW.
    """
    draw = torch.Generator().manual_seed(0)
    batches = torch.randn(3, 2, 5, 6, generator=draw)
    for optimizer_of in (partial(torch.optim.SGD, lr=0.1), partial(torch.optim.AdamW, lr=0.05)):
        ours, theirs = Toy(math.log(10)), Toy(math.log(10))
        ours_by, theirs_by = optimizer_of(ours.parameters()), optimizer_of(theirs.parameters())
        for number, (images, texts) in enumerate(batches, 1):
            before = [value.detach().clone() for value in theirs.parameters()]
            wanted = _step(ours, images, texts, ours_by)
            got = attempt(student, theirs, images, texts, _symmetric, theirs_by)
            if number == 1:
                _check_first(got, wanted, theirs, before)
            same = [
                torch.allclose(a, b, atol=1e-5) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
            ]
            demand(number > 1 or all(same), "After one step the parameters are not those of the same step in PyTorch.")
            demand(
                all(same),
                f"The first step is right, step {number} is not. PyTorch adds new gradients to the old ones: call "
                "`optimizer.zero_grad()` in every step.",
            )
    _check_clamp(student)
    print("ok: three steps, by gradient descent and by AdamW, give PyTorch's weights, and the scale stays at most 100.")


def _check_first(got: Any, wanted: float, model: Toy, before: list[Tensor]) -> None:
    """The value returned by the first step, and which parameters it moved."""
    demand(
        not (isinstance(got, Tensor) and got.requires_grad),
        "Return a number, `loss.item()`: a tensor would keep the whole graph of this step in memory.",
    )
    moved = {name: not torch.equal(p, old) for (name, p), old in zip(model.named_parameters(), before, strict=True)}
    demand(
        any(moved.values()),
        "No parameter has changed: `loss.backward()` computes gradients, and then `optimizer.step()` uses them.",
    )
    demand(
        abs(float(got) - wanted) < 1e-4,
        f"The first loss is {wanted:.3f}, yours is {float(got):.3f}. The temperature is 1 / model.log_scale.exp(); the "
        "loss to return is that before the step.",
    )
    demand(
        moved["log_scale"],
        "`log_scale` has not changed: compute the temperature from it with tensors, without `.item()` or `no_grad`.",
    )
    demand(all(moved.values()), "One tower has not changed: are its vectors detached?")


def _check_clamp(student: Callable[..., float]) -> None:
    """After a step that makes the scale larger than 100 it must be 100."""
    model = Toy(math.log(99.9))
    model.text.load_state_dict(model.image.state_dict())  # every pair matches: a larger scale lowers the loss
    same = 1 + 0.2 * torch.randn(5, 6, generator=torch.Generator().manual_seed(1))  # near each other: the loss is large
    slow = [{"params": [*model.image.parameters(), *model.text.parameters()], "lr": 0.0}]
    optimizer = torch.optim.SGD([*slow, {"params": [model.log_scale], "lr": 100.0}], lr=0.0)
    attempt(student, model, same, same, _symmetric, optimizer)
    demand(
        model.log_scale.item() <= math.log(100) + 1e-4,
        "CLIP's scale is 100 at most, and after this step it is larger: clamp `model.log_scale` to ln 100 after the "
        "step, inside `torch.no_grad()`.",
    )


def _symmetric(pictures: Tensor, captions: Tensor, temperature: Tensor | float) -> Tensor:
    """The loss that the check hands to the student's step."""
    return contrastive_loss(cosine_logits(pictures, captions, 1 / temperature))


def _step(model: Toy, images: Tensor, texts: Tensor, optimizer: torch.optim.Optimizer) -> float:
    """The right training step."""
    optimizer.zero_grad()
    loss = _symmetric(*model(images, texts), 1 / model.log_scale.exp())
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.log_scale.clamp_(max=math.log(100))
    return loss.item()
