"""The optimiser: Muon for the matrices inside the blocks, AdamW for everything else, and one schedule for both."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal (Jordan et al. 2024), scaled to AdamW's step size (Liu et al. 2025).

    In our prototype it took about half of AdamW's steps (docs/recipe.md). `torch.optim.Muon` does the same arithmetic,
    but one matrix at a time and always in bfloat16, which costs several whole training steps per step on a CPU without
    bfloat16 units; here equal shapes go through one batched product in float32. Fused q-k-v matrices are treated as the
    square matrices they are made of.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                ahead = param.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's look-ahead
                wide = _squares(ahead)  # (n, short, long)
                by_shape[wide.shape[1:]].append((param, wide))
            for shape, items in by_shape.items():
                steps = orthogonalise(torch.cat([wide for _, wide in items])).split([len(wide) for _, wide in items])
                for (param, _), step in zip(items, steps, strict=True):
                    step = step.flatten(0, 1) if len(step) > 1 else step[0]
                    step = step if step.shape == param.shape else step.T
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(step, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def _squares(matrix: Tensor) -> Tensor:
    """A matrix as a stack (n, short, long): fused projections (k*D, D) with k = 2 or 3 become k squares.

    They are known by their shape alone, so a feed-forward of hidden = 2 or 3 widths is cut up likewise.
    """
    rows, columns = matrix.shape
    if rows in (2 * columns, 3 * columns):
        return matrix.unflatten(0, (-1, columns))  # (k, D, D)
    return (matrix.T if rows > columns else matrix)[None]


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Push all singular values of each matrix (n, rows, columns) towards one, by Newton-Schulz iteration."""
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT  # (n, rows, rows)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def make_optimisers(
    model: nn.Module, lr: float, weight_decay: float, faster: dict[str, float]
) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over the trainable parameters.

    Muon gets the matrices of the transformer blocks and decays them; the embeddings, positions, norms, biases and heads
    go to AdamW undecayed. `faster` maps a prefix of parameter names to a multiple of the learning rate (X-VLM trains
    its new modules at twice the rate).
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, param in model.named_parameters():
        if param.requires_grad:
            multiple = next((value for prefix, value in faster.items() if name.startswith(prefix)), 1.0)
            groups[param.ndim == 2 and "blocks." in name, multiple].append(param)
    muon = [{"params": params, "lr": lr * m, "multiple": m} for (inner, m), params in groups.items() if inner]
    adam = [{"params": params, "lr": lr * m, "multiple": m} for (inner, m), params in groups.items() if not inner]
    optimisers: list[torch.optim.Optimizer] = []
    if muon:
        optimisers.append(Muon(muon, lr, weight_decay))
    if adam:
        optimisers.append(torch.optim.AdamW(adam, lr, betas=(0.9, 0.98), weight_decay=0.0))
    return optimisers


def cosine(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Share of the learning rate at this step: up in a line over `warmup` steps, then down along a cosine."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0))))
