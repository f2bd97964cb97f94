"""The optimizer: Muon for the matrices inside transformer blocks, AdamW for everything else, one schedule for both.

Which matrices those are is declared by the modules that own them: `block_matrices()` yields `(parameter, stacked)`,
where `stacked` is how many projections lie one below the other in the parameter's rows (a fused query-key-value matrix
has 3, a fused key-value matrix 2, all others 1).
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (Jordan et al. 2024), scaled to AdamW's step size (Liu et al. 2025).

    In our experiments it needed about half of AdamW's steps (docs/recipe.md). `torch.optim.Muon` does the same
    arithmetic, but one matrix at a time and always in bfloat16, which costs several whole training steps per step on a
    CPU without bfloat16 units; here all matrices of one shape go through one batched product in float32.

    A parameter group's `stacked` (default 1) says how many projections are stacked in the rows of each of its
    parameters; each projection is made orthogonal by itself.
    """

    def __init__(self, params: list, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "stacked": 1})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        by_shape: dict[torch.Size, list[tuple[nn.Parameter, dict, Tensor]]] = defaultdict(list)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(param)
                state["momentum"].lerp_(param.grad, 1 - group["momentum"])
                nesterov = param.grad.lerp(state["momentum"], group["momentum"])
                matrices = nesterov.unflatten(0, (group["stacked"], -1))  # (n, rows, columns)
                wide = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices  # (n, short, long)
                by_shape[wide.shape[1:]].append((param, group, wide))
        for shape, items in by_shape.items():
            counts = [len(wide) for *_, wide in items]
            updates = orthogonalize(torch.cat([wide for *_, wide in items])).split(counts)
            for (param, group, _), update in zip(items, updates, strict=True):
                if len(param) // group["stacked"] > param.shape[1]:
                    update = update.mT  # (n, rows, columns)
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update.reshape(param.shape), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Push all singular values of each matrix (n, rows, columns) towards one, by Newton-Schulz iteration."""
    x = matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT  # (n, rows, rows)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def declared_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """All parameters that the model's modules declare by `block_matrices`, with their number of stacked projections.

    Raises ValueError for a declaration that cannot be: not a matrix, rows that the number does not divide, or two
    different numbers for one parameter.
    """
    found: dict[nn.Parameter, int] = {}
    for module_name, module in model.named_modules():
        if not hasattr(module, "block_matrices"):
            continue
        for param, stacked in module.block_matrices():
            where = f"a block matrix of {module_name or type(module).__name__}, shape {tuple(param.shape)}"
            if param.ndim != 2 or stacked < 1 or len(param) % stacked:
                raise ValueError(f"{where}, cannot hold {stacked} stacked projections")
            if found.setdefault(param, stacked) != stacked:
                raise ValueError(f"{where}, is declared with {found[param]} and with {stacked} stacked projections")
    return found


def make_optimizers(
    model: nn.Module, lr: float, weight_decay: float, lr_multipliers: dict[str, float]
) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over the trainable parameters.

    Muon updates the declared matrices of transformer blocks, with weight decay; AdamW updates everything else
    (embeddings, tables, norms, biases, heads) without. `lr_multipliers` maps a prefix of parameter names to a multiple
    of the learning rate (X-VLM trains its new modules at twice the rate); the first prefix that fits counts.
    Raises ValueError for a prefix that no parameter's name has.
    """
    named = dict(model.named_parameters())
    if unused := [prefix for prefix in lr_multipliers if not any(name.startswith(prefix) for name in named)]:
        raise ValueError(f"lr_multipliers: no parameter's name begins with {', '.join(unused)}")
    matrices = declared_matrices(model)
    groups: dict[tuple[int, float], list[nn.Parameter]] = defaultdict(list)  # 0 stacked projections: not a matrix
    for name, param in named.items():
        if param.requires_grad:
            multiplier = next((value for prefix, value in lr_multipliers.items() if name.startswith(prefix)), 1.0)
            groups[matrices.get(param, 0), multiplier].append(param)
    muon, adam = [], []
    for (stacked, multiplier), params in groups.items():
        group = {"params": params, "lr": lr * multiplier, "lr_multiplier": multiplier}
        if stacked:
            muon.append({**group, "stacked": stacked})
        else:
            adam.append(group)
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        optimizers.append(Muon(muon, lr, weight_decay))
    if adam:
        optimizers.append(torch.optim.AdamW(adam, lr, betas=(0.9, 0.98), weight_decay=0.0))
    return optimizers


def cosine(step: int, steps: int, warmup: int, floor: float = 0.02) -> float:
    """Fraction of the learning rate at this step: linear rise over `warmup` steps, then a cosine down to `floor`."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return rise * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0))))
