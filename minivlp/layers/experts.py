"""Blocks that treat a token by its modality, and the routes through them: a feed-forward expert per modality (VLMo), or
all projections and LayerNorms per modality (BEiT-3, as released).

A route is a list with one entry per block; an entry says which expert gets which run of tokens. No router is learned:
the modality decides (Bao et al., NeurIPS 2022, section 3.1). Axes: B batch, n tokens of a run, N all tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivlp.layers.attention import KVCache, Rows, select, select_queries
from minivlp.layers.transformer import Block, BlockConfig, FeedForward, Parts


class Expert(nn.Module):
    """LayerNorm and feed-forward layer of one modality: (B, n, D) -> (B, n, D)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config.width, config.hidden, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.norm(x))


class ExpertBlock(Block):
    """Self-attention for all tokens together, then each token's own expert; LayerNorm first.

    With the single expert `shared` every modality uses that one.
    """

    def __init__(self, config: BlockConfig, experts: tuple[str, ...]) -> None:
        self.expert_names = experts
        super().__init__(config)

    def add_feed_forward(self, config: BlockConfig) -> None:
        self.experts = nn.ModuleDict({name: Expert(config) for name in self.expert_names})

    def expert(self, name: str) -> Expert:
        """The expert of this name, or the one that all share."""
        return self.experts[name if name in self.experts else "shared"]

    def feed(self, x: Tensor, parts: Parts | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D). A single part takes all tokens, however many of them are read."""
        if len(parts) == 1:
            return x + self.feed_scale(self.expert(parts[0][0])(x))
        runs = x.split([count for _, count in parts], dim=1)  # (B, n, D) each
        done = [self.expert(name)(run) for (name, _), run in zip(parts, runs, strict=True)]
        return x + self.feed_scale(torch.cat(done, dim=1))


class MultiwayBlock(nn.Module):
    """A block per modality, whose queries attend to the keys of all modalities: only the softmax is shared.

    So is BEiT-3's released code (Wang et al., CVPR 2023); its paper shares the attention's projections, too, which is
    `ExpertBlock`.
    """

    def __init__(self, config: BlockConfig, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.ways = nn.ModuleDict({name: Block(config) for name in modalities})

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: None = None,
        context_mask: None = None,
        cache: KVCache | None = None,
        rows: Rows | None = None,
        parts: Parts | None = None,
    ) -> Tensor:
        """x (B, N, D) -> (B, N, D), or the tokens `rows`; arguments as in `Block`, without cross-attention.

        Of one modality alone this is its own block, which then takes a cache.
        """
        if len(parts) == 1:
            return self.ways[parts[0][0]](x, mask, cache=cache, rows=rows)
        counts = [count for _, count in parts]
        ways, runs = [self.ways[name] for name, _ in parts], x.split(counts, dim=1)  # (B, n, D) each
        projected = [
            way.self_attention.project(way.self_norm(run), None) for way, run in zip(ways, runs, strict=True)
        ]  # queries, keys, values (B, H, n, D/H)
        keys, values = (torch.cat([p[i] for p in projected], dim=2) for i in (1, 2))
        done, start = [], 0
        for way, run, (queries, _, _) in zip(ways, runs, projected, strict=True):
            own = select_queries(mask, slice(start, start + run.shape[1]))
            run = run + way.attention_scale(way.self_attention.mix(queries, keys, values, own))
            done.append(way.feed(run))
            start += run.shape[1]
        x = torch.cat(done, dim=1)
        return x if rows is None else select(x, rows)


def own_experts(layers: int, text: int, image: int) -> list[Parts]:
    """Every token to the expert of its modality in all layers: `text` tokens first, then `image` tokens; 0 is none."""
    return [tuple((name, count) for name, count in (("text", text), ("image", image)) if count)] * layers


def vl_expert_from(layer: int, route: list[Parts]) -> list[Parts]:
    """The same route, but from this layer on the vision-language expert gets all tokens."""
    everything = sum(count for _, count in route[0])
    return route[:layer] + [(("vl", everything),)] * (len(route) - layer)
