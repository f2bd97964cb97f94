"""Checks of lesson 03's two larger exercises, and a short run with them.

The check of a whole training step is here, that of the cross-attention in `albef_attention`.

Axes: B batch, Q queue, L text tokens, D width, E joint-embedding width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Batch, Text
from minivlp.data.loading import Loader
from minivlp.lessons.albef_attention import check_cross_attention
from minivlp.lessons.check import attempt, demand, same
from minivlp.models.albef import ALBEF, ALBEFConfig
from minivlp.objectives.contrastive import cosine_logits, equal_shares
from minivlp.objectives.matching import Negatives, sampling_weights
from minivlp.objectives.momentum import MomentumConfig, Queue, pair_ids

__all__ = ["CONSTANT_ANSWER", "check_cross_attention", "check_step", "short_run"]

CONSTANT_ANSWER = math.log(3) - 2 / 3 * math.log(2)  # ITM loss of always answering 1/3: one pair in three matches


@dataclass
class Drawn:
    """Stands in for drawing at random: returns the most likely column of each row, and keeps what it was given."""

    weights: list[Tensor] = field(default_factory=list)

    def __call__(self, weights: Tensor) -> Tensor:
        self.weights.append(weights.detach().clone())
        return weights.argmax(dim=1) % len(weights)


M, RATE = 0.9, 0.5  # momentum and learning rate of the check


def check_step(student: Callable) -> None:
    """`student(model, momentum, queue, batch, optimizer, draw, m)` -> the losses (itc, itm) of one training step.

    Compared with the library's losses, gradients, momentum model and queue on a small ALBEF.
    """
    for seed, image_ids in ((0, [7, 3, 7, 8, 9]), (1, [1, 2, 3])):
        model, momentum, queue = _small_model(seed)
        batch = _small_batch(image_ids, seed)
        wanted = LibraryStep(model, momentum, queue, batch)
        before = {name: p.detach().clone() for name, p in momentum.named_parameters()}
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1)  # left over from an earlier step
        draw, counted = Drawn(), _count_pairs(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        answer = attempt(student, model, momentum, queue, batch, optimizer, draw, M)
        demand(
            isinstance(answer, (tuple, list)) and len(answer) == 2 and all(map(_is_number, answer)),
            "Return two numbers: the loss of ITC and the loss of ITM.",
        )
        itc, itm = (torch.as_tensor(value).detach().float() for value in answer)
        _check_momentum(momentum, before, start, wanted, model)
        _check_draws(draw.weights, wanted)
        _explain_loss("ITC", itc, wanted.itc, wanted.other_itc())
        rows = len(batch.text)
        demand(
            sum(counted) == 3 * rows,
            f"ITM sees 3B pairs, {3 * rows} for this batch; your matching head saw {sum(counted)}: the {rows} pairs, "
            "each caption with its drawn image, each image with its drawn caption.",
        )
        _explain_loss("ITM", itm, wanted.itm, wanted.other_itm())
        _check_update(model, start, wanted)
        _check_queue(queue, wanted)
    print("ok: momentum model first, 3B pairs, one update of the model, and the slow copy's vectors in the queue.")


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, Tensor) and value.numel() == 1)


def _small_config() -> ALBEFConfig:
    nano = ALBEFConfig.nano(40)
    block = replace(nano.image.block, width=16, heads=2, hidden=32)
    return replace(
        nano,
        image=replace(nano.image, image_size=16, block=block),
        text=replace(nano.text, block=block),
        embed_width=8,
        losses=("itc", "itm"),
    )


def _small_model(seed: int) -> tuple[ALBEF, ALBEF, Queue]:
    """A model, its momentum model with other weights, and a queue with three pairs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, momentum = ALBEF(_small_config()), ALBEF(_small_config()).requires_grad_(False)
        queue = Queue(7, 8)
        queue.put(*F.normalize(torch.randn(2, 3, 8), dim=-1), torch.tensor([[90, 1], [91, 2], [92, 3]]))
    return model, momentum, queue


def _small_batch(image_ids: list[int], seed: int) -> Batch:
    """Random images (of equal ids: views of one picture), and captions of different lengths; of five the last two are
    equal."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(image_ids)
    mask = torch.arange(6) < torch.randint(3, 7, (rows, 1), generator=generator)
    mask[0] = True
    ids = torch.randint(7, 40, (rows, 6), generator=generator) * mask
    if rows == 5:
        ids[-1], mask[-1] = ids[-2], mask[-2]
    return Batch(torch.randn(rows, 3, 16, 16, generator=generator), Text(ids, mask), torch.tensor(image_ids))


class LibraryStep:
    """The same step by the library, on copies: the losses, their gradients, and what usual mistakes would lead to."""

    def __init__(self, model: ALBEF, momentum: ALBEF, queue: Queue, batch: Batch) -> None:
        with torch.random.fork_rng():  # building the model draws weights
            settings = MomentumConfig(momentum=M, alpha=0.0, queue_size=len(queue.ids), distill=())
            self.model = ALBEF(replace(model.config, momentum=settings))
        self.model.load_state_dict(model.state_dict(), strict=False)
        self.model.momentum_model.model.load_state_dict(momentum.state_dict(), strict=False)
        self.model.queue.load_state_dict(queue.state_dict())
        self.rows, self.ids = len(batch.text), pair_ids(batch.image_ids, batch.text)
        self.past = tuple(part.clone() for part in queue.features())  # (q, E) each; the student changes the queue
        self.with_past = queue.positives(self.ids)  # (B, B+q)
        self.encoded = encoded = self.model.encode(batch)
        self.positives = encoded.positives  # (B, B)
        self.itc = self.model.itc(encoded)  # moves the momentum model and fills the queue
        self.scale, self.own, self.other = self.model.itc_head.scale(), encoded.vectors, encoded.compared
        logits = (
            cosine_logits(self.own[0], self.other[1], self.scale),
            cosine_logits(self.own[1], self.other[0], self.scale),
        )
        self.weights = [
            sampling_weights(one, self.positives) for one in logits
        ]  # of texts for images; of images for texts
        encoded.given_negatives = Negatives(*(weights.argmax(dim=1) for weights in reversed(self.weights)))
        self.itm = self.model.itm(encoded)
        self.momentum = dict(self.model.momentum_model.model.named_parameters())
        self.queue = self.model.queue.features()
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Of the trained parameters, by name; zeros where the loss does not depend on one."""
        found = torch.autograd.grad(loss, list(self.trained.values()), retain_graph=True, allow_unused=True)
        named = zip(self.trained.items(), found, strict=True)
        return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in named}

    def contrast(self, theirs: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor], positives: Tensor) -> Tensor:
        """ITC with these vectors of the batch, those of the queue, and these positives (B, B+q)."""
        logits = [self.scale * self.own[i] @ torch.cat([theirs[1 - i], past[1 - i]]).T for i in (0, 1)]
        return sum(F.cross_entropy(one, equal_shares(positives, one.dtype)) for one in logits) / 2

    def other_itc(self) -> dict[str, Tensor]:
        """What ITC is with usual mistakes, by message."""
        none, diagonal = tuple(part[:0] for part in self.past), torch.eye(*self.with_past.shape).bool()
        return {
            "Your candidates are those of the batch alone; those of the queue come behind them.": self.contrast(
                self.other, none, self.positives
            ),
            "You compare the model with itself; compare its vectors with those of the momentum model.": self.contrast(
                self.own, self.past, self.with_past
            ),
            "Two rows show one image, and two captions are equal: a row of `positives` may have several True, which "
            "share the target; yours takes the own pair alone.": self.contrast(self.other, self.past, diagonal),
            "You add both directions; take their mean.": 2 * self.itc,
            "The vectors of this batch are in the queue already when you compute the loss: put them there last.": (
                self.contrast(self.other, self.queue, self.model.queue.positives(self.ids))
            ),
        }

    def other_itm(self) -> dict[str, Tensor]:
        """What ITM is with usual mistakes, by message."""
        pairs = self.encoded.pairs
        text = pairs.text[pairs.text_rows]
        logits = self.model.match_head(self.model.fused_first(self.encoded, text, pairs.text_rows, pairs.image_rows))
        labels = (torch.arange(len(logits)) < self.rows).long()
        return {
            "Your labels are inverted: matching pairs have the label 1.": F.cross_entropy(logits, 1 - labels),
            "You add up the losses of the pairs; take their mean.": F.cross_entropy(logits, labels, reduction="sum"),
        }


def _count_pairs(model: ALBEF) -> list[int]:
    """How many pairs the matching head sees; the list fills up."""
    counted: list[int] = []
    model.match_head.register_forward_hook(lambda _, inputs, __: counted.append(len(inputs[0])))
    return counted


def _check_momentum(momentum: nn.Module, before: dict, start: dict, wanted: LibraryStep, model: nn.Module) -> None:
    now = {name: p.detach() for name, p in momentum.named_parameters()}

    def are(share: float, online: dict) -> bool:
        return all(same(now[n], share * before[n] + (1 - share) * online[n]) for n in wanted.momentum)

    demand(not are(1, start), "The momentum model did not change: update it before you use it.")
    demand(not are(1 - M, start), "The shares are swapped: the momentum model keeps the share m of itself.")
    after = {name: p.detach() for name, p in model.named_parameters()}
    demand(
        are(M, start) or not are(M, after),
        "You update the momentum model after the optimizer's step; ALBEF updates it first, and then uses it.",
    )
    demand(are(M, start), "Each weight of the momentum model becomes m times itself plus 1 - m times the model's.")
    no_gradient = all(p.grad is None for p in momentum.parameters())
    demand(no_gradient, "The momentum model got gradients: run it in torch.no_grad().")


def _check_draws(given: list[Tensor], wanted: LibraryStep) -> None:
    rows = len(wanted.positives)
    demand(given, "Nothing was drawn: call `draw` with the weights of the negatives.")
    demand(
        len(given) == 2,
        f"`draw` was called {len(given)} times. Call it twice: once to draw a caption for each image, once to draw an "
        "image for each caption.",
    )
    for weights in given:
        demand(
            weights.shape == (rows, rows),
            f"The weights are those of the batch, {(rows, rows)}, yours are {tuple(weights.shape)}. The queue cannot "
            "give negatives for ITM: it holds vectors, and the fusion layers need tokens.",
        )
        demand(not weights.isnan().any() and (weights >= 0).all(), "Weights must not be negative: apply the softmax.")
        demand(
            not weights[wanted.positives].any(),
            "A positive can be drawn as a negative: set the weights to 0 where `positives` is True. It also marks "
            "equal captions of different images.",
        )
    shares = [weights / weights.sum(dim=1, keepdim=True) for weights in given]
    right = [weights / weights.sum(dim=1, keepdim=True) for weights in wanted.weights]
    both = [[torch.allclose(mine, theirs, atol=1e-3) for mine in shares] for theirs in right]
    demand(
        not torch.allclose(*shares, atol=1e-3) or torch.allclose(*right, atol=1e-3),
        "You draw with the same weights twice. Captions for images: the model's images against the momentum model's "
        "texts. Images for captions: the model's texts against the momentum model's images.",
    )
    demand(
        any(both[0]) and any(both[1]),
        "The weights are the softmax of the scaled similarities between the model's vectors and the momentum model's, "
        "over the batch; yours are others.",
    )


def _explain_loss(name: str, got: Tensor, wanted: Tensor, others: dict[str, Tensor]) -> None:
    if torch.allclose(got, wanted, atol=1e-4):
        return
    for message, value in others.items():
        demand(not torch.allclose(got, value, atol=1e-4), f"{name}: {message}")
    hint = " Pair caption b with the image drawn for b, and image a with the caption drawn for a."
    demand(False, f"{name} should be {wanted:.3f}, yours is {got:.3f}.{hint if name == 'ITM' else ''}")


def _check_update(model: nn.Module, start: dict, wanted: LibraryStep) -> None:
    now = {name: p.detach() for name, p in model.named_parameters()}

    def moved_by(direction: Callable[[str], Tensor | float]) -> bool:
        return all(torch.allclose(now[n], start[n] - RATE * direction(n), atol=1e-4) for n in wanted.trained)

    itc, itm = wanted.gradients(wanted.itc), wanted.gradients(wanted.itm)
    demand(not moved_by(lambda n: 0.0), "The losses are right, but the model did not change: call optimizer.step().")
    demand(not moved_by(lambda n: 0.1), "The optimizer used old gradients: call backward() on the sum of the losses.")
    demand(
        not moved_by(lambda n: itc[n] + itm[n] + 0.1),
        "Gradients of an earlier step were added: call optimizer.zero_grad() before backward().",
    )
    demand(not moved_by(lambda n: itc[n]), "Only ITC trains the model: is the loss of ITM detached?")
    demand(not moved_by(lambda n: itm[n]), "Only ITM trains the model: is the loss of ITC detached?")
    demand(
        moved_by(lambda n: itc[n] + itm[n]),
        "The losses are right, but the update of the model is another one: part of the loss is detached, or more than "
        "one step was taken.",
    )


def _check_queue(queue: Queue, wanted: LibraryStep) -> None:
    images, texts = queue.features()
    demand(len(images) == len(wanted.queue[0]), "Put the vectors of this batch into the queue, once: queue.put(...).")
    new = (len(wanted.past[0]) + torch.arange(len(wanted.positives))) % len(queue.ids)  # slots of this batch
    own, slow = wanted.own, [part[new] for part in wanted.queue]
    demand(
        not (same(images[new], own[0]) or same(texts[new], own[1])),
        "The queue holds the momentum model's vectors; you put the model's own there.",
    )
    swapped = same(images[new], slow[1]) or same(texts[new], slow[0])
    demand(not swapped, "Images and texts are swapped in the queue.")
    demand(
        same(images, wanted.queue[0]) and same(texts, wanted.queue[1]),
        "The queue holds other vectors than the momentum model's of this batch.",
    )


# --------------------------------------------------------------------------------------------------------- a short run


def short_run(step: Callable, model: nn.Module, scenes: Any, tokenizer: Any, steps: int = 40) -> list[float]:
    """Train `model` with a student's step (see `check_step`), 16 pairs each; returns the ITM losses, one per step.

    A model that learns nothing stays near `CONSTANT_ANSWER`.
    """
    loader = Loader(scenes, tokenizer, 16, scenes.size, seed=1)
    momentum = copy.deepcopy(model).requires_grad_(False)
    queue = Queue(96, model.itc_head.project_text.out_features)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    generator = torch.Generator().manual_seed(0)

    def draw(weights: Tensor) -> Tensor:
        return torch.multinomial(weights + 1e-9, 1, generator=generator)[:, 0]

    return [float(step(model, momentum, queue, loader.batch(n), optimizer, draw, 0.95)[1]) for n in range(steps)]
