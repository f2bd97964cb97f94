"""The multiway block against the released code of BEiT-3 (torchscale): stored numbers in float64, jittered weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minivlp.layers.attention import attention_mask
from minivlp.layers.experts import MultiwayBlock
from minivlp.layers.transformer import BlockConfig, Transformer

pytestmark = pytest.mark.usefixtures("float64")
WAYS = {"image": "A", "text": "B"}
LAYER = {
    "self_norm": "self_attn_layer_norm.{}",
    "self_attention.out": "self_attn.out_proj.{}",
    "self_attention.sub_norm": "self_attn.inner_attn_ln.{}",
    "feed_norm": "final_layer_norm.{}",
    "feed_forward.up": "ffn.{}.fc1",
    "feed_forward.sub_norm": "ffn.{}.ffn_layernorm",
    "feed_forward.down": "ffn.{}.fc2",
}


def stack_of(golden) -> tuple[Transformer, nn.ModuleDict]:
    """Our stack with the released weights, and the two last LayerNorms."""
    sizes, layer = golden.config, "retrieval.beit3.encoder.layers.{}."
    config = BlockConfig(sizes["width"], sizes["heads"], sizes["ffn"], sub_norm=True)
    stack = Transformer(config, (MultiwayBlock(config, tuple(WAYS)) for _ in range(sizes["layers"])))
    stack.norm = nn.Identity()  # doubled, too: applied below
    state = {}
    for n in range(sizes["layers"]):
        for way, letter in WAYS.items():
            for end in ("weight", "bias"):
                theirs, ours = layer.format(n), f"blocks.{n}.ways.{way}."
                parts = [golden.state[f"{theirs}self_attn.{x}_proj.{letter}.{end}"] for x in "qkv"]
                state[f"{ours}self_attention.qkv.{end}"] = torch.cat(parts)
                state |= {
                    f"{ours}{o}.{end}": golden.state[f"{theirs}{t.format(letter)}.{end}"] for o, t in LAYER.items()
                }
    stack.load_state_dict(state)
    norms = nn.ModuleDict({way: nn.LayerNorm(sizes["width"]) for way in WAYS})
    for way, letter in WAYS.items():
        for end in ("weight", "bias"):
            norms[way].get_parameter(end).data = golden.state[f"retrieval.beit3.encoder.layer_norm.{letter}.{end}"]
    return stack, norms


def embedded(golden) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image tokens, text tokens and which of the text's are real; positions begin at row 2 of either table."""
    s, prefix = golden.state, "retrieval.beit3."
    patches = F.conv2d(
        golden.inputs["pixel_values"],
        s[f"{prefix}vision_embed.proj.weight"],
        s[f"{prefix}vision_embed.proj.bias"],
        stride=golden.config["patch_size"],
    )
    image = torch.cat([s[f"{prefix}vision_embed.cls_token"].expand(len(patches), 1, -1), patches.flatten(2).mT], dim=1)
    image = image + s[f"{prefix}encoder.embed_positions.A.weight"][2 : 2 + image.shape[1]]
    real = golden.inputs["attention_mask"].bool()
    text = s[f"{prefix}text_embed.weight"][golden.inputs["input_ids"]]
    text = text + s[f"{prefix}encoder.embed_positions.B.weight"][2 : 2 + text.shape[1]]
    return image, text * real[..., None], real


def test_one_modality_and_both(golden):
    g = golden("beit3")
    (stack, norms), (image, text, real) = stack_of(g), embedded(g)
    layers, count = len(stack.blocks), image.shape[1]
    alone = norms["image"](stack(image, parts=[(("image", count),)] * layers))
    assert (alone - g.outputs["image_tokens"]).abs().max() < g.tolerance
    alone = norms["text"](stack(text, attention_mask(real), parts=[(("text", text.shape[1]),)] * layers))
    assert (alone - g.outputs["text_tokens"])[real].abs().max() < g.tolerance
    both = [(("image", count), ("text", text.shape[1]))] * layers
    allowed = attention_mask(F.pad(real, (count, 0), value=True))
    x = torch.cat([image, text], dim=1)
    fused = stack(x, allowed, parts=both)
    assert (norms["image"](fused[:, :count]) - g.outputs["fused_image_tokens"]).abs().max() < g.tolerance
    assert (norms["text"](fused[:, count:]) - g.outputs["fused_text_tokens"])[real].abs().max() < g.tolerance
    assert torch.equal(stack(x, allowed, parts=both, rows=slice(0, 1)), fused[:, :1])
    only = stack(image, parts=[(("image", count),)] * layers, rows=slice(0, 1))
    assert (norms["image"](only) - g.outputs["image_tokens"][:, :1]).abs().max() < g.tolerance
