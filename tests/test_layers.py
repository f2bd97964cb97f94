"""Attention's two paths, masks, both orders of LayerNorm, positions, and what the towers promise."""

import pytest
import torch
from torch import nn

from minivlp.layers.attention import Attention, causal_mask, padding_mask, record_attention
from minivlp.layers.block import Block, BlockConfig
from minivlp.layers.embed import TwoStepPatchEmbed, resize_positions, sincos_positions
from minivlp.layers.encoders import FusionEncoder, ImageConfig, ImageEncoder, TextConfig, TextEncoder

BLOCK = BlockConfig(width=32, heads=4, hidden=64)


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


MASKS = {
    "none": None,
    "causal": causal_mask(6),
    "padding": padding_mask(torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()),
    "prefix": causal_mask(6) | (torch.arange(6) < 3),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_kept_and_fast_paths_agree_with_torch(mask, cross):
    attention = Attention(32, 4, context_width=24 if cross else None)
    x, context = torch.randn(3, 6, 32), torch.randn(3, 6, 24) if cross else None
    fast = attention(x, context, mask)
    with record_attention(nn.ModuleDict({"only": attention})) as maps:
        kept = attention(x, context, mask)
    assert torch.allclose(fast, kept, atol=1e-12)
    weights = maps["only"]
    assert weights.shape == (3, 4, 6, 6) and torch.allclose(weights.sum(-1), torch.ones(3, 4, 6))
    if mask is not None:
        assert (weights[~mask.expand_as(weights)] == 0).all()
    # the same arithmetic through torch's own kernel, which the fast path uses on a GPU
    if cross:
        q, (k, v) = attention.split(attention.q(x)), attention.keys_values(context)
    else:
        q, k, v = map(attention.split, attention.qkv(x).chunk(3, -1))
    fused = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(fast, attention.out(fused.transpose(1, 2).flatten(2)), atol=1e-12)


def test_a_mask_may_be_a_bias_and_forbids_where_it_is_lowest():
    attention, x, bias = Attention(32, 4), torch.randn(3, 6, 32), torch.randn(1, 4, 6, 6)
    for allowed in (torch.ones(3, 1, 1, 6, dtype=torch.bool), MASKS["padding"]):
        mask = bias.masked_fill(~allowed, torch.finfo(torch.bfloat16).min)  # (3, 4, 6, 6)
        fast = attention(x, mask=mask)
        with record_attention(nn.ModuleDict({"only": attention})) as maps:
            kept = attention(x, mask=mask)
        q, k, v = map(attention.split, attention.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-2, -1) / 8**0.5 + bias
        weights = scores.exp() * allowed / (scores.exp() * allowed).sum(-1, keepdim=True)
        assert torch.allclose(maps["only"], weights, atol=1e-12)
        assert torch.allclose(fast, kept, atol=1e-12)
        fused = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        assert torch.allclose(fast, attention.out(fused.transpose(1, 2).flatten(2)), atol=1e-12)
    zero = torch.zeros(1, 1, 6, 6).masked_fill(~MASKS["causal"], torch.finfo(torch.float32).min)
    assert torch.allclose(attention(x, mask=zero), attention(x, mask=MASKS["causal"]), atol=1e-12)


@pytest.mark.parametrize("two_step", [False, True])
def test_images_that_do_not_divide_into_patches_are_refused(two_step):
    encoder = ImageEncoder(ImageConfig(32, 8, 1, BLOCK, two_step_patches=two_step))
    with pytest.raises(ValueError, match="36 x 32 pixels cannot be cut into patches of 8"):
        encoder(torch.randn(1, 3, 36, 32))


def test_recorded_weights_keep_their_gradient_and_the_model_its_state():
    model = nn.ModuleDict({"fusion": FusionEncoder(2, BLOCK, 24)})
    x, context, mask = torch.randn(2, 5, 32), torch.randn(2, 7, 24), torch.ones(2, 5, dtype=torch.bool)
    with record_attention(model) as maps:
        model["fusion"](x, mask, context).sum().backward()
        assert set(maps) == {"fusion.0.self", "fusion.0.cross", "fusion.1.self", "fusion.1.cross"}
        assert maps["fusion.1.cross"].shape == (2, 4, 5, 7) and maps["fusion.1.cross"].requires_grad
    assert all(m.recorder is None for m in model.modules() if isinstance(m, Attention))


def test_a_query_that_may_look_nowhere_does_not_poison_the_gradient():
    attention = Attention(32, 4)
    x = torch.randn(2, 3, 32, requires_grad=True)
    attention(x, mask=padding_mask(torch.zeros(2, 3, dtype=torch.bool))).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_keys_and_values_computed_once_serve_every_text():
    fusion = FusionEncoder(2, BLOCK, 24)
    x, context, mask = torch.randn(2, 5, 32), torch.randn(2, 7, 24), torch.ones(2, 5, dtype=torch.bool)
    assert torch.allclose(fusion(x, mask, context), fusion(x, mask, fusion.keys_values(context)), atol=1e-12)


def test_pre_and_post_norm_blocks_follow_their_formulas():
    x = torch.randn(2, 5, 32)
    for first in (True, False):
        block = Block(BlockConfig(32, 4, 64, norm_first=first))
        for p in block.parameters():
            nn.init.normal_(p, std=0.3)
        a, n1, f, n2 = block.self_attention, block.self_norm, block.feed_forward, block.feed_norm
        if first:
            middle = x + a(n1(x))
            wanted = middle + f(n2(middle))
        else:
            middle = n1(x + a(x))
            wanted = n2(middle + f(middle))
        assert torch.allclose(block(x), wanted, atol=1e-12)


def test_padding_changes_nothing_that_is_read():
    for causal in (True, False):
        text = TextEncoder(TextConfig(50, 10, 2, BLOCK, causal=causal, word_std=1.0, position_std=1.0))
        ids = torch.randint(5, 50, (3, 6))
        mask = torch.ones(3, 6, dtype=torch.bool)
        short = text(ids, mask)
        padded = torch.cat([ids, torch.randint(5, 50, (3, 4))], 1)
        long = text(padded, torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1))
        assert torch.allclose(short, long[:, :6], atol=1e-12)


def test_a_causal_text_does_not_see_its_future_and_the_other_does():
    ids = torch.randint(5, 50, (1, 6))
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % 50
    mask = torch.ones(1, 6, dtype=torch.bool)
    for causal in (True, False):
        text = TextEncoder(TextConfig(50, 10, 2, BLOCK, causal=causal, word_std=1.0))
        same = torch.allclose(text(ids, mask)[:, :4], text(changed, mask)[:, :4], atol=1e-12)
        assert same == causal


def test_too_long_a_text_says_what_to_do():
    text = TextEncoder(TextConfig(50, 10, 1, BLOCK))
    with pytest.raises(ValueError, match="max_tokens=10"):
        text(torch.zeros(1, 11, dtype=torch.long), torch.ones(1, 11, dtype=torch.bool))


def test_sincos_positions_tell_places_apart_at_unit_scale_on_any_grid():
    p = sincos_positions(8, 8, 128)
    assert p.shape == (64, 128) and p.abs().max() <= 1
    closeness = p @ p.T
    assert (closeness.argmax(1) == torch.arange(64)).all(), "each place is closest to itself"
    assert torch.allclose(sincos_positions(4, 4, 128)[5], p.unflatten(0, (8, 8))[2, 2]), "same place, same code"


def test_resized_positions_keep_a_smooth_table_and_the_own_grid_exactly():
    x = torch.linspace(0, 1, 8)
    table = torch.stack([x.repeat(8, 1), x.repeat(8, 1).T], -1).flatten(0, 1)  # (64, 2): x and y themselves
    assert resize_positions(table, (8, 8), (8, 8)) is table
    wide = resize_positions(table, (8, 8), (4, 16)).unflatten(0, (4, 16))
    assert (wide[..., 0].diff(dim=1) > 0).all() and (wide[..., 1].diff(dim=0) > 0).all()


@pytest.mark.parametrize("ours", [True, False])
def test_an_image_encoder_takes_other_sizes(ours):
    config = ImageConfig(32, 8, 1, BLOCK, two_step_patches=ours, sincos_positions=ours)
    assert ImageEncoder(config)(torch.randn(2, 3, 32, 48)).shape == (2, 1 + 4 * 6, 32)


def test_two_step_patches_see_only_their_own_pixels():
    embed = TwoStepPatchEmbed(8, 32)
    images = torch.randn(1, 3, 32, 32)
    other = images.clone()
    other[:, :, 8:16, 16:24] += 1  # the patch in row 1, column 2
    moved = (embed(images) - embed(other)).abs().amax(dim=1)[0] > 1e-9
    assert moved.nonzero().tolist() == [[1, 2]]


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of the number of heads"):
        Attention(30, 4)
    with pytest.raises(ValueError, match="multiple of the patch size"):
        ImageEncoder(ImageConfig(30, 8, 1, BLOCK))
    with pytest.raises(ValueError, match="unknown activation"):
        Block(BlockConfig(32, 4, 64, activation="swish"))
