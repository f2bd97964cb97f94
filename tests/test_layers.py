"""Attention's two paths, masks, both orders of LayerNorm, computed rows, positions, and what the towers promise."""

import pytest
import torch
from torch import nn

from minivlp.data.batch import Text
from minivlp.layers import buckets
from minivlp.layers.attention import Attention, attention_mask, record_attention, select
from minivlp.layers.buckets import in_length_buckets
from minivlp.layers.embeddings import (
    ImageConfig,
    ImageEmbedding,
    PixelNormalization,
    TextConfig,
    TwoStepPatchEmbed,
    resize_positions,
    sincos_positions,
)
from minivlp.layers.experts import ExpertBlock, own_experts, vl_expert_from
from minivlp.layers.relative import RelativePositions
from minivlp.layers.towers import ImageEncoder, TextEncoder
from minivlp.layers.transformer import Block, BlockConfig, Transformer, fusion_layers

BLOCK = BlockConfig(width=32, heads=4, hidden=64)


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


REAL = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()
FULL = torch.ones(3, 6, dtype=torch.bool)
MASKS = {
    "none": None,
    "causal": attention_mask(FULL, causal=True),
    "padding": attention_mask(REAL),
    "causal with padding": attention_mask(REAL, causal=True),
    "prefix": attention_mask(FULL, causal=True, prefix=3),
}


@pytest.mark.parametrize("prefix", [0, 2, torch.tensor([0, 3, 1])])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_against_a_loop(causal, prefix):
    mask = attention_mask(REAL, causal, prefix).expand(3, 1, 6, 6)
    for row in range(3):
        given = int(torch.as_tensor(prefix).expand(3)[row])
        for query in range(6):
            for key in range(6):
                may = bool(REAL[row, key]) and (not causal or key <= query or key < given)
                assert mask[row, 0, query, key] == may


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
    model = nn.ModuleDict({"fusion": fusion_layers(2, BLOCK, 24)})
    x, context = torch.randn(2, 5, 32), torch.randn(2, 7, 24)
    with record_attention(model) as maps:
        model["fusion"](x, context=context, rows=slice(0, 1)).sum().backward()
        assert set(maps) == {"fusion.0.self", "fusion.0.cross", "fusion.1.self", "fusion.1.cross"}
        assert maps["fusion.1.cross"].shape == (2, 4, 5, 7), "of all queries, though only the first was asked for"
        assert maps["fusion.1.self"].shape == (2, 4, 5, 5) and maps["fusion.1.cross"].requires_grad
    assert all(m.recorder is None for m in model.modules() if isinstance(m, Attention))


def test_a_query_that_may_attend_to_nothing_has_a_finite_gradient():
    attention = Attention(32, 4)
    x = torch.randn(2, 3, 32, requires_grad=True)
    attention(x, mask=attention_mask(torch.zeros(2, 3, dtype=torch.bool))).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_keys_and_values_computed_once_serve_every_text():
    fusion = fusion_layers(2, BLOCK, 24)
    x, context = torch.randn(2, 5, 32), torch.randn(2, 7, 24)
    once = fusion(x, context=fusion.keys_values(context))
    assert torch.allclose(fusion(x, context=context), once, atol=1e-12)


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
        short = text(Text(ids, mask))
        padded = torch.cat([ids, torch.randint(5, 50, (3, 4))], 1)
        long = text(Text(padded, torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1)))
        assert torch.allclose(short, long[:, :6], atol=1e-12)


def test_a_causal_text_does_not_see_its_future_and_the_other_does():
    ids = torch.randint(5, 50, (1, 6))
    changed = ids.clone()
    changed[0, 4] = (ids[0, 4] + 1) % 50
    mask = torch.ones(1, 6, dtype=torch.bool)
    for causal in (True, False):
        text = TextEncoder(TextConfig(50, 10, 2, BLOCK, causal=causal, word_std=1.0))
        same = torch.allclose(text(Text(ids, mask))[:, :4], text(Text(changed, mask))[:, :4], atol=1e-12)
        assert same == causal


def test_too_long_a_text_says_what_to_do():
    text = TextEncoder(TextConfig(50, 10, 1, BLOCK))
    with pytest.raises(ValueError, match="max_tokens=10"):
        text(Text(torch.zeros(1, 11, dtype=torch.long), torch.ones(1, 11, dtype=torch.bool)))


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


# ---------------------------------------------------------------------------------- only the outputs that will be read

ROWS = {"slice": slice(1, 3), "first": slice(0, 1), "indices": torch.tensor([[0, 2, 2], [5, 1, 0], [3, 4, 5]])}
STACKS = {
    "pre-norm": lambda: Transformer(BLOCK, (Block(BLOCK, 24) for _ in range(2))),
    "post-norm": lambda: Transformer(POST, (Block(POST, 24) for _ in range(2))),
    "scaled, sub-norm": lambda: Transformer(SCALED, (Block(SCALED, 24) for _ in range(2))),
    "no blocks": lambda: Transformer(BLOCK, ()),
}
POST = BlockConfig(width=32, heads=4, hidden=64, norm_first=False)
SCALED = BlockConfig(width=32, heads=4, hidden=64, layer_scale=0.5, sub_norm=True)
PER_LAYER = [torch.randn(3, 4, 6, 6), torch.randn(1, 4, 6, 6)]


def gradients(module: nn.Module, x: torch.Tensor, output: torch.Tensor) -> list[torch.Tensor]:
    """Of a sum with fixed weights, so that no two outputs cancel."""
    weights = torch.arange(output.numel(), dtype=output.dtype).reshape(output.shape).sin()
    wanted = [x, *module.parameters()]
    found = torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, found, strict=True)]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("mask", [*MASKS.values(), PER_LAYER], ids=[*MASKS.keys(), "a bias per layer"])
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
def test_rows_are_the_same_outputs_with_the_same_gradients(stack, mask, rows):
    model = stack()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    x, context = torch.randn(3, 6, 32, requires_grad=True), torch.randn(3, 7, 24)
    every = select(model(x, mask, context), rows)
    some = model(x, mask, context, rows=rows)
    assert torch.allclose(some, every, atol=1e-12)
    for a, b in zip(gradients(model, x, some), gradients(model, x, every), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("stack", ["pre-norm", "post-norm"])
def test_rows_with_a_context_that_is_partly_hidden_and_shared(stack, rows):
    """As in fusion layers: keys and values computed once, padding in the text, a box in the image."""
    model = STACKS[stack]()
    x, context = torch.randn(3, 6, 32, requires_grad=True), torch.randn(3, 7, 24)
    inside = attention_mask(torch.rand(3, 7) < 0.6)
    every = select(model(x, MASKS["padding"], context, inside), rows)
    some = model(x, MASKS["padding"], model.keys_values(context), inside, rows=rows)
    assert torch.allclose(some, every, atol=1e-12)
    for a, b in zip(gradients(model, x, some), gradients(model, x, every), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_indices_may_differ_from_row_to_row_and_name_no_token_at_all():
    model, x = STACKS["pre-norm"](), torch.randn(3, 6, 32)
    nothing = torch.zeros(3, 0, dtype=torch.long)
    assert model(x, MASKS["causal"], rows=nothing).shape == (3, 0, 32)
    for row, place in enumerate((5, 0, 2)):
        places = torch.tensor([[5], [0], [2]])
        some = model(x, MASKS["causal with padding"], rows=places)
        alone = model(x[[row]], MASKS["causal with padding"][[row]])
        assert torch.allclose(some[row, 0], alone[0, place], atol=1e-12)


def test_some_blocks_run_without_the_last_layer_norm():
    """As X-VLM's regions: the lower blocks once, the upper blocks again."""
    model, x = STACKS["pre-norm"](), torch.randn(3, 6, 32)
    halves = model.run(model.run(x, range(1)), range(1, 2), rows=slice(0, 1))
    assert torch.allclose(model.norm(halves), model(x)[:, :1], atol=1e-12)
    assert torch.equal(model.run(x, range(0), rows=slice(2, 4)), x[:, 2:4])


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_rows_of_one_modality_go_to_its_expert(rows):
    """A route of one part in every layer, with padding in the text."""
    model = Transformer(BLOCK, (ExpertBlock(BLOCK, ("text", "image")) for _ in range(2)))
    x, route = torch.randn(3, 6, 32, requires_grad=True), own_experts(2, 6, 0)
    every = select(model(x, MASKS["padding"], parts=route), rows)
    some = model(x, MASKS["padding"], parts=route, rows=rows)
    assert torch.allclose(some, every, atol=1e-12)
    found = gradients(model, x, some)
    for a, b in zip(found, gradients(model, x, every), strict=True):
        assert torch.allclose(a, b, atol=1e-9)
    unused = [g for (name, _), g in zip(model.named_parameters(), found[1:], strict=True) if ".image." in name]
    assert unused and not any(g.any() for g in unused)


def test_each_token_goes_to_the_expert_of_its_run():
    """Attention for all together, then every run by itself."""
    block = ExpertBlock(BLOCK, ("text", "image"))
    x = torch.randn(3, 6, 32)
    attended = block.attend(x)
    text, image = (block.experts[name](attended) for name in ("text", "image"))
    wanted = attended + torch.cat([text[:, :2], image[:, 2:]], dim=1)
    assert torch.allclose(block(x, parts=(("text", 2), ("image", 4))), wanted, atol=1e-12)
    shared = ExpertBlock(BLOCK, ("shared",))
    one = shared(x, parts=(("text", 6),))
    assert torch.allclose(shared(x, parts=(("text", 2), ("image", 4))), one, atol=1e-12)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("vl_from", [1, 2], ids=["VL expert on top", "two experts on top"])
def test_rows_of_blocks_with_experts(vl_from, rows):
    model = Transformer(BLOCK, (ExpertBlock(BLOCK, ("text", "image", "vl")) for _ in range(2)))
    route = vl_expert_from(vl_from, own_experts(2, 2, 4))
    x = torch.randn(3, 6, 32, requires_grad=True)
    every, some = select(model(x, parts=route), rows), model(x, parts=route, rows=rows)
    assert torch.allclose(some, every, atol=1e-12)
    for a, b in zip(gradients(model, x, some), gradients(model, x, every), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_routes_name_the_expert_of_each_run():
    own = own_experts(3, 2, 4)
    assert own == [(("text", 2), ("image", 4))] * 3
    assert vl_expert_from(2, own) == own[:2] + [(("vl", 6),)]
    assert own_experts(1, 0, 4) == [(("image", 4),)]


def test_the_last_block_leaves_out_what_is_not_read():
    """Its feed-forward layer sees the rows alone, those below see all."""
    model, seen = Transformer(BLOCK, (Block(BLOCK) for _ in range(2))), []
    for block in model.blocks:
        block.feed_forward.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model(torch.randn(3, 6, 32), rows=slice(0, 1))
    assert seen == [6, 1]


# ------------------------------------------------------------------------------------------------------ length buckets


def some_texts() -> Text:
    lengths = torch.tensor([3, 9, 4, 3, 10, 5])
    mask = torch.arange(12) < lengths[:, None]
    return Text(torch.randint(5, 50, (6, 12)) * mask, mask)


def test_length_buckets_give_the_same_tokens_and_gradients(monkeypatch):
    encoder, text = TextEncoder(TextConfig(50, 12, 2, BLOCK, word_std=1.0)), some_texts()
    real, runs = text.mask[:, :10, None], []
    monkeypatch.setattr(buckets, "LEAST_SAVED", 0)

    def run(rows, group):
        runs.append(group.length)
        return encoder(group)

    split = in_length_buckets(text, run)
    assert len(runs) == 2 and sum(runs) < 2 * 12 and split.shape == (6, 10, 32)
    loss = (split * real).square().sum()
    whole = encoder(text)[:, :10]
    assert torch.allclose(split * real, whole * real, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(loss, list(encoder.parameters()), retain_graph=True),
        torch.autograd.grad((whole * real).square().sum(), list(encoder.parameters())),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-9)


def test_length_buckets_hand_out_rows_that_fit_their_texts(monkeypatch):
    text = some_texts()
    monkeypatch.setattr(buckets, "LEAST_SAVED", 0)

    def run(rows, group):
        assert torch.equal(text.ids[rows][:, : group.length], group.ids)
        return text.ids[rows, :1]

    assert torch.equal(in_length_buckets(text, run), text.ids[:, :1])


def test_length_buckets_of_results_of_any_shape(monkeypatch):
    """Labels, places and image rows of a group are taken with its rows; shorter results are padded with zeros."""
    monkeypatch.setattr(buckets, "LEAST_SAVED", 0)
    text, image = some_texts(), torch.randn(6, 3)

    def run(rows, group):
        counts = torch.arange(group.length)[None] < group.mask.sum(1, keepdim=True)
        return counts[..., None, None] * image[rows][:, None, None, :].expand(-1, group.length, 2, -1)

    found = in_length_buckets(text, run)
    assert found.shape == (6, 10, 2, 3)
    for row in range(6):
        length = int(text.mask[row].sum())
        assert torch.equal(found[row, :length], image[row].expand(length, 2, 3)) and not found[row, length:].any()


def test_one_text_and_none_are_run_at_once():
    for text in (some_texts()[:1], some_texts()[:0]):
        calls = []
        found = in_length_buckets(text, lambda rows, group, calls=calls: calls.append(rows) or group.ids)
        assert calls == [slice(None)] and torch.equal(found, text.ids)


def test_texts_of_one_length_are_not_split(monkeypatch):
    text = Text(torch.ones(4, 6, dtype=torch.long), torch.ones(4, 6, dtype=torch.bool))
    calls = []
    in_length_buckets(text, lambda rows, group: calls.append(rows) or group.ids)
    assert calls == [slice(None)]


def test_a_split_that_saves_little_is_not_made(monkeypatch):
    """32 of 72 tokens are saved: neither a share nor a number of them that is worth a second pass."""
    for name, limit, split in (("LEAST_SAVED", 32, True), ("LEAST_SAVED", 33, False), ("WORTH_IT", 0.5, False)):
        monkeypatch.setattr(buckets, "WORTH_IT", 0.9)
        monkeypatch.setattr(buckets, "LEAST_SAVED", 0)
        monkeypatch.setattr(buckets, name, limit)
        calls = []
        in_length_buckets(some_texts(), lambda rows, group, calls=calls: calls.append(rows) or group.ids)
        assert (len(calls) == 2) == split


# ------------------------------------------------------------------------------------------------- images of any shape


def test_images_may_be_wider_than_high():
    config = ImageConfig((24, 48), 8, 1, BLOCK)
    assert config.size == (24, 48) and config.grid == (3, 6)
    encoder = ImageEncoder(config)
    assert encoder(torch.randn(2, 3, 24, 48)).shape == (2, 1 + 18, 32)
    assert encoder(torch.randn(2, 3, 48, 48)).shape == (2, 1 + 36, 32), "positions are resized"
    with pytest.raises(ValueError, match="image size 20 is not a multiple of the patch size 8"):
        ImageEmbedding(ImageConfig((24, 20), 8, 1, BLOCK))


@pytest.mark.parametrize("sincos", [True, False])
@pytest.mark.parametrize("two_step", [True, False])
def test_tokens_of_an_image_that_is_not_square_are_its_patches_row_by_row(sincos, two_step):
    """Each token is its own patch, embedded alone, plus the position of its row and column."""
    config = ImageConfig((16, 24), 8, 1, BLOCK, two_step_patches=two_step, sincos_positions=sincos)
    embed, images = ImageEmbedding(config), torch.randn(2, 3, 16, 24)
    tokens = embed(images)
    table = sincos_positions(2, 3, 32) if sincos else embed.positions
    for row in range(2):
        for column in range(3):
            patch = images[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            wanted = embed.patches(patch)[:, :, 0, 0] + table[3 * row + column]
            assert torch.allclose(tokens[:, 1 + 3 * row + column], wanted, atol=1e-6 if sincos else 1e-12)
    first = embed.class_token if sincos else embed.class_token + embed.class_position
    assert torch.allclose(tokens[:, 0], first.expand(2, -1))


@pytest.mark.parametrize("sincos", [True, False])
def test_positions_on_another_grid_that_is_not_square(sincos):
    """The same place has the same code, whatever the grid; a transposed grid would not."""
    embed = ImageEmbedding(ImageConfig((16, 32), 8, 1, BLOCK, sincos_positions=sincos))
    own = embed.positions_on(2, 4).unflatten(0, (2, 4))
    finer = embed.positions_on(4, 8).unflatten(0, (4, 8))
    assert torch.equal(own.flatten(0, 1), embed.positions) and finer.shape == (4, 8, 32)
    if sincos:
        assert torch.allclose(finer[::2, ::2], own, atol=1e-6)
    else:
        wanted = resize_positions(embed.positions, (2, 4), (4, 8)).unflatten(0, (4, 8))
        assert torch.equal(finer, wanted)
        constant = torch.ones(8, 3)
        assert torch.allclose(resize_positions(constant, (2, 4), (4, 2)), torch.ones(8, 3))


def test_relative_positions_belong_to_one_grid():
    embed = ImageEmbedding(ImageConfig((16, 32), 8, 1, BLOCK, relative_positions=True))
    assert embed(torch.randn(1, 3, 16, 32)).shape == (1, 9, 32) and not hasattr(embed, "positions")
    with pytest.raises(ValueError, match="16 x 32 pixels, not 32 x 16"):
        embed(torch.randn(1, 3, 32, 16))


def test_masked_patches_are_replaced_before_positions_are_added():
    embed, token = ImageEmbedding(ImageConfig(16, 8, 1, BLOCK)), torch.randn(32)
    masked = torch.tensor([[True, False, False, True]])
    tokens = embed(torch.randn(1, 3, 16, 16), masked, token)
    assert torch.allclose(tokens[0, 1:][masked[0]], token + embed.positions[masked[0]])


def test_relative_positions_on_a_grid_that_is_not_square():
    """Two pairs of patches have the same number where, and only where, their offsets are equal."""
    relative, (rows, columns) = RelativePositions(4, (2, 3), 1, 1), (2, 3)
    relative.table.data = torch.arange(len(relative.table), dtype=torch.float64)[:, None]
    bias = relative(0, 1 + rows * columns)[0, 0, 1:, 1:].detach()
    offsets = {}
    for i in range(rows * columns):
        for j in range(rows * columns):
            offset = (i // columns - j // columns, i % columns - j % columns)
            assert offsets.setdefault(offset, bias[i, j]) == bias[i, j]
    assert len({float(value) for value in offsets.values()}) == len(offsets) == 3 * 5


def test_pixel_normalization_is_what_the_released_processors_do():
    mean, std, pixels = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27), torch.rand(2, 3, 4, 4)
    ours = PixelNormalization(mean, std)(2 * pixels - 1)
    assert torch.allclose(ours, (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])


def test_pixel_normalization_is_a_part_of_the_embedding_and_not_of_the_weights():
    mean, std = (0.48, 0.45, 0.4), (0.26, 0.25, 0.27)
    embed, images = ImageEmbedding(ImageConfig(16, 8, 1, BLOCK)), torch.randn(2, 3, 16, 16)
    names = set(embed.state_dict())
    normalize = PixelNormalization(mean, std)
    expected = embed(normalize(images))
    embed.normalize = normalize
    assert torch.equal(embed(images), expected) and set(embed.state_dict()) == names
    assert normalize(images.bfloat16()).dtype == torch.bfloat16 and normalize(images.float()).dtype == torch.float32
    half = PixelNormalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # what our pixels are already
    assert torch.allclose(half(images), images)
