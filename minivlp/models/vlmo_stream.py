"""The layers of VLMo, and the three routes through them: an image, a text, or both.

Axes: B batch, N tokens, text first, D width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivlp.layers.attention import Rows, attention_mask
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.experts import ExpertBlock, own_experts, vl_expert_from
from minivlp.layers.relative import RelativePositions
from minivlp.layers.single_stream import SingleStream, joint_real
from minivlp.models.verbs import FIRST


class VLMoStream(SingleStream):
    """All layers, and the routes through them: x (B, N, D), whose first `text` tokens are text and the rest image."""

    def __init__(self, image: ImageConfig, text: TextConfig, vl_from: int, shared_expert: bool) -> None:
        self.vl_from = vl_from
        below, above = (("shared",),) * 2 if shared_expert else (("text", "image"), ("text", "image", "vl"))
        experts = [below if layer < vl_from else above for layer in range(image.layers)]
        super().__init__(image, text, (ExpertBlock(image.block, names) for names in experts))
        nn.init.normal_(self.image_embed.class_token, std=0.02)
        self.relative = None
        if image.relative_positions:
            self.relative = RelativePositions(text.context_length, image.grid, image.layers, image.block.heads)

    def forward(self, x: Tensor, text: int, mask: Tensor | None = None, rows: Rows | None = None) -> Tensor:
        """Tokens after the last LayerNorm, (B, N, D) or the `rows` asked for. mask (B, text): True on real tokens.

        One modality goes through its own experts; of both together, all tokens go to the VL expert in the top layers.
        """
        route = own_experts(len(self.blocks), text, x.shape[1] - text)
        if len(route[0]) > 1:
            route = vl_expert_from(self.vl_from, route)
        return super().forward(x, self.masks(text, x.shape[1] - text, mask), rows=rows, parts=route)

    def branches(self, x: Tensor, text: int, mask: Tensor | None = None) -> Tensor:
        """The first token of one modality (B, 1, 2, D): with its own experts in all layers, and with the VL expert in
        the top layers. The layers below, and the attention of the layer where they part, are computed once."""
        layers, image = len(self.blocks), x.shape[1] - text
        masks, own = self.masks(text, image, mask), own_experts(layers, text, image)
        at = self.vl_from
        if at == layers:  # no layer has a VL expert
            first = self.norm(self.run(x, range(layers), masks, rows=FIRST, parts=own))
            return torch.stack([first, first], dim=2)
        x = self.run(x, range(at), masks, parts=own)
        rows = FIRST if at == layers - 1 else None
        x = self.blocks[at].attend(x, masks[at] if isinstance(masks, list) else masks, rows=rows)
        ends = []
        for route in (own, vl_expert_from(at, own)):
            top = self.blocks[at].feed(x, route[at])
            ends.append(self.norm(self.run(top, range(at + 1, layers), masks, rows=FIRST, parts=route)))
        return torch.stack(ends, dim=2)

    def masks(self, text: int, image: int, mask: Tensor | None) -> Tensor | list[Tensor] | None:
        """Which tokens may be attended to; with relative positions, a list with the bias of each layer."""
        allowed = None if mask is None else attention_mask(joint_real(mask, image))  # (B, 1, 1, N)
        if self.relative is None:
            return allowed
        bias = self.relative(text, image)[:, None]  # (layers, 1, H, N, N)
        lowest = torch.finfo(torch.float16).min  # fits all dtypes, and its softmax weight is exactly 0 in each
        return [layer if allowed is None else layer.masked_fill(~allowed, lowest) for layer in bias]
