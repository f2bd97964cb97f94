"""The optimizer: which parameters go where, and what Muon does with them."""

import pytest
import torch
from torch import nn

from minivlp.training.optim import Muon, cosine, declared_matrices, make_optimizers, orthogonalize


class Attention(nn.Module):
    """Fused projections as in the library: three in `qkv`, two in `kv`."""

    def __init__(self, width: int, context_width: int | None = None) -> None:
        super().__init__()
        if context_width is None:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.kv = nn.Linear(width, width), nn.Linear(context_width, 2 * width)
        self.out = nn.Linear(width, width)

    def block_matrices(self):
        stacked = {"qkv": 3, "kv": 2}
        return ((layer.weight, stacked.get(name, 1)) for name, layer in self.named_children())


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.cross_attention = Attention(width), Attention(width, 3 * width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.positions = nn.Parameter(torch.zeros(3 * width, width))  # a matrix in a block, but a table

    def block_matrices(self):
        yield self.up.weight, 1
        yield self.down.weight, 1


class Model(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight


def grouped(optimizer) -> dict[int, tuple[int, float]]:
    """Parameter (by its id) -> stacked projections and multiplier."""
    return {id(p): (g.get("stacked", 0), g["lr_multiplier"]) for g in optimizer.param_groups for p in g["params"]}


def test_muon_gets_the_declared_matrices_and_adamw_the_rest():
    model = Model()
    muon, adam = make_optimizers(model, 1e-3, 0.05, {})
    assert isinstance(muon, Muon) and isinstance(adam, torch.optim.AdamW)
    block, of_muon, of_adam = model.blocks[1], grouped(muon), grouped(adam)
    stacked = {id(block.attention.qkv.weight): 3, id(block.cross_attention.kv.weight): 2, id(block.up.weight): 1}
    assert {key: of_muon[key][0] for key in stacked} == stacked
    assert len(of_muon) == 2 * (2 + 3 + 2)
    for table in (block.positions, model.embed.weight, block.norm.weight, block.up.bias):
        assert id(table) in of_adam
    assert all(group["weight_decay"] == 0 for group in adam.param_groups)
    assert len(of_muon) + len(of_adam) == len(list(model.parameters())), "each parameter once, tied ones too"
    assert not of_muon.keys() & of_adam.keys()


def test_frozen_parameters_are_left_out():
    model = Model()
    model.blocks.requires_grad_(False)
    (adam,) = make_optimizers(model, 1e-3, 0.05, {})
    assert grouped(adam).keys() == {id(model.embed.weight)}


def test_learning_rates_are_multiplied_by_prefix():
    model = Model()
    muon, adam = make_optimizers(model, 1e-3, 0.05, {"blocks.1.": 0.5, "embed": 2.0})
    assert grouped(muon)[id(model.blocks[1].up.weight)] == (1, 0.5)
    assert grouped(muon)[id(model.blocks[0].up.weight)] == (1, 1.0)
    assert grouped(adam)[id(model.embed.weight)][1] == 2.0
    assert {group["lr"] for group in adam.param_groups} == {1e-3, 0.5e-3, 2e-3}
    with pytest.raises(ValueError, match="begins with towers"):
        make_optimizers(model, 1e-3, 0.05, {"towers.": 2.0})


@pytest.mark.parametrize("shape, stacked", [((8,), 1), ((8, 8), 3)])
def test_a_wrong_declaration_is_named(shape, stacked):
    model = Model()
    model.blocks[0].extra = nn.Parameter(torch.zeros(shape))
    model.blocks[0].block_matrices = lambda: [(model.blocks[0].extra, stacked)]
    with pytest.raises(ValueError, match=r"blocks.0, shape \(8.*cannot hold"):
        make_optimizers(model, 1e-3, 0.05, {})


def test_two_declarations_must_agree():
    model = Model()
    model.block_matrices = lambda: [(model.blocks[0].attention.qkv.weight, 3)]  # again, and the same
    assert declared_matrices(model)[model.blocks[0].attention.qkv.weight] == 3
    model.block_matrices = lambda: [(model.blocks[0].attention.qkv.weight, 1)]
    with pytest.raises(ValueError, match="declared with"):
        declared_matrices(model)


def step(param: nn.Parameter, gradient: torch.Tensor, stacked: int = 1, **options) -> torch.Tensor:
    """The parameter after one step of Muon."""
    param = nn.Parameter(param.detach().clone())
    param.grad = gradient.clone()
    Muon([{"params": [param], "stacked": stacked}], 0.1, 0.0, **options).step()
    return param.detach()


@pytest.mark.parametrize("stacked, columns", [(3, 8), (2, 8), (2, 24), (3, 5)])
def test_each_stacked_projection_is_made_orthogonal_by_itself(stacked, columns):
    fused, gradient = torch.randn(stacked * 8, columns), torch.randn(stacked * 8, columns)
    parts = [step(p, g) for p, g in zip(fused.split(8), gradient.split(8), strict=True)]
    assert torch.allclose(step(fused, gradient, stacked), torch.cat(parts), atol=1e-6)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_feed_forward_of_two_or_three_widths_is_one_matrix(factor):
    model = Model(width=8, hidden=8 * factor)
    weight = model.blocks[0].up.weight
    muon, _ = make_optimizers(model, 0.1, 0.0, {})
    weight.grad, before = torch.randn_like(weight), weight.detach().clone()
    muon.step()
    change = (before - weight.detach()) / (0.1 * 0.2 * (8 * factor) ** 0.5)
    spread = torch.linalg.svdvals(change)
    assert len(spread) == 8 and 0.5 < spread.min() and spread.max() < 1.4  # as a whole, not by squares


def test_matrices_of_one_shape_share_a_product(monkeypatch):
    from minivlp.training import optim

    shapes = []
    plain = optim.orthogonalize
    monkeypatch.setattr(optim, "orthogonalize", lambda m: shapes.append(tuple(m.shape)) or plain(m))
    model = Model(width=8, hidden=32)
    muon, _ = make_optimizers(model, 1e-3, 0.05, {"blocks.1.": 2.0})
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    muon.step()
    # q, k, v, out and q, out of both blocks; kv; up and down
    assert sorted(shapes) == [(4, 8, 24), (4, 8, 32), (12, 8, 8)]


def test_orthogonal_means_singular_values_near_one():
    spread = torch.linalg.svdvals(orthogonalize(torch.randn(3, 16, 48)))
    assert spread.min() > 0.5 and spread.max() < 1.4


def test_the_schedule_rises_then_falls():
    values = [cosine(step, 100, 10) for step in range(100)]
    assert values[0] == pytest.approx(0.1, rel=0.02) and max(values) in values[9:11]
    assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False)) and 0.02 <= values[-1] < 0.03
