"""CoCa: open_clip's numbers to 1e-9, open_clip's model live, masks, one pass for both losses, and what must hold."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from released import Comparison, golden_text, released_model
from small_models import (
    assert_exact_without_shortcuts,
    jittered,
    longer,
    recorded_maps,
    small_config,
    small_model,
    some_batch,
    values_of,
)
from torch import Tensor

from minivlp.data.batch import Batch, Text
from minivlp.layers.attention import attention_mask, record_attention
from minivlp.layers.generation import DecodingConfig
from minivlp.layers.poolers import AttentionalPooler, ParallelPooling, Pooling, SinglePooling
from minivlp.models.coca import CoCa, CoCaConfig
from minivlp.models.xvlm import XVLM, XVLMConfig
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits
from minivlp.pretrained import coca as release
from minivlp.training.checkpoint import load_model, save_model
from minivlp.training.loop import overfit_one_batch

pytestmark = pytest.mark.usefixtures("float64")


def tiny(**changes) -> CoCa:
    return small_model(CoCa, **{"pooling": Pooling(6, 2), **changes}).eval()


# --------------------------------------------------------------------------------------------- open_clip's golden runs


def golden_config(numbers: dict, pooled: bool | str) -> CoCaConfig:
    """The config of a golden run, by way of the settings that open_clip would have written."""
    n = numbers
    vision = {
        "image_size": n["image_size"], "patch_size": n["patch_size"], "width": n["vision_width"],
        "layers": n["vision_layers"], "head_width": n["vision_width"] // n["vision_heads"],
        "attentional_pool": pooled, "attn_pooler_queries": n["pool_queries"], "attn_pooler_heads": n["pool_heads"],
        "output_tokens": True,
    }  # fmt: skip
    text = {
        "context_length": n["text_len"], "vocab_size": n["vocab"], "width": n["text_width"], "heads": n["text_heads"],
        "layers": n["text_layers"], "embed_cls": True, "output_tokens": True,
    }  # fmt: skip
    multimodal = {
        "context_length": n["text_len"], "width": n["mm_width"], "heads": n["mm_heads"], "layers": n["mm_layers"],
    }  # fmt: skip
    model = {"embed_dim": n["embed_dim"], "vision_cfg": vision, "text_cfg": text, "multimodal_cfg": multimodal}
    return release.open_clip_config({}, {"model_cfg": {**model, "custom_text": True}})


@pytest.mark.parametrize("name, pooled", [("coca_openclip", True), ("coca_cascade", "cascade")])
def test_every_number_of_open_clips_model(golden, name, pooled):
    g = golden(name)
    same, config = Comparison(g), golden_config(g.config, pooled)
    assert config.legacy_mask and config.two_feeds, "as open_clip's weights were trained"
    text = golden_text(g.inputs)
    start = int(text.ids[0, 0])  # all texts begin with it
    config = replace(config, tokens=replace(config.tokens, dec=start))
    batch = Batch(g.inputs["pixel_values"], text, torch.arange(len(text)))
    real = text.mask[..., None]
    for legacy, suffix in ((False, ""), (True, ".legacy_mask")):
        model = released_model("coca", g.state, replace(config, legacy_mask=legacy))
        tower = model.image
        tokens = tower.run(tower.embed(batch.images), range(len(tower.blocks)))
        unimodal = model.encode_text(text)[:, 1:]
        context = model.image_context(batch.images)
        logits = model.caption_head(model.decode(text, context))
        same(f"text_tokens{suffix}", unimodal * real)
        same(f"text_feat{suffix}", model.embed_texts(text))
        same(f"logits{suffix}", (logits * real)[:, :-1])
        same(f"logits_per_image{suffix}", model.similarity(batch.images, text))
        losses = model.losses(batch)
        same(f"loss_contrastive{suffix}", losses["itc"])
        same(f"loss_caption{suffix}", losses["lm"])
        same(f"loss_total{suffix}", sum(losses.values()))
        if not legacy:
            same("encoder_tokens", tokens)
            same("image_tokens", model.poolers(model.encode_image(batch.images))[1])
            same("image_feat", model.embed_images(batch.images))
            same("scale", model.itc_head.scale())
            sum(losses.values()).backward()
            same.gradients("coca", model)
    assert same.done == set(g.outputs)


# ---------------------------------------------------------------------------------------------------- masks and [CLS]


def test_cls_sees_the_whole_text_and_no_padding():
    model, batch = tiny(), some_batch()
    with record_attention(model) as maps:
        model.encode_text(batch.text)
    weights = maps["text.1.self"][:, :, -1]  # (B, H, L+1) of [CLS], the last query
    seen = F.pad(batch.text.mask, (0, 1), value=True)[:, None].expand_as(weights)
    assert (weights[seen] > 0).all() and (weights[~seen] == 0).all()
    text = batch.text
    for place in range(1, text.length):  # its vector depends on every real token and on no other
        ids = text.ids.clone()
        ids[:, place] = 7 + (ids[:, place] + 1) % 30
        moved = (model.embed_texts(text.with_ids(ids)) - model.embed_texts(text)).abs().amax(dim=1) > 1e-9
        assert torch.equal(moved, text.mask[:, place])


def test_cls_in_front_of_a_causal_text_would_see_nothing():
    """Why it stands behind: as the first token it attends to itself alone, and all texts get one vector."""
    model, text = tiny(), some_batch().text
    tower = model.text
    x = torch.cat([tower.class_token.expand(len(text), 1, -1), tower.embed(text.ids)], dim=1)
    mask = attention_mask(F.pad(text.mask, (1, 0), value=True), causal=True)
    first = tower.run(x, range(len(tower.blocks)), mask)[:, 0]
    assert torch.allclose(first, first[:1].expand_as(first), atol=1e-12)
    vectors = model.embed_texts(text)
    assert ((vectors[:, None] - vectors).norm(dim=-1) + torch.eye(len(text)) > 1e-3).all()


@pytest.mark.parametrize("legacy", [False, True])
def test_padding_does_not_matter(legacy):
    """Neither how much of it there is nor its ids; one padding that open_clip's mask shows always looks alike."""
    model, batch = tiny(legacy_mask=legacy), some_batch()
    padded = replace(batch, text=longer(batch.text, 3, filler=30))
    assert values_of(model.losses(padded)) == pytest.approx(values_of(model.losses(batch)), abs=1e-12)
    alone = torch.cat([model.embed_texts(batch.text[i : i + 1].trimmed()) for i in range(len(batch))])
    assert torch.allclose(alone, model.embed_texts(batch.text), atol=1e-12)


def test_open_clips_mask_is_one_place_off():
    model, text = tiny(legacy_mask=True), some_batch().text
    longest = model.config.text.context_length
    for shown in (text, Text(torch.full((1, longest), 9), torch.ones(1, longest, dtype=torch.bool))):
        with record_attention(model) as maps:
            model.encode_text(shown)
        weights = maps["text.0.self"][:, 0, -1]  # (B, L+1) of [CLS]
        seen = F.pad(shown.mask, (1, max(0, weights.shape[1] - shown.length - 1)), value=True)
        seen[:, shown.length + 1 :] = False
        assert torch.equal(weights > 0, seen)


def test_no_token_sees_later_ones_or_the_appended_cls():
    model, batch = tiny(), some_batch()
    text = Text(batch.text.ids, torch.ones_like(batch.text.mask))
    ids = text.ids.clone()
    ids[:, 6] = 7 + (ids[:, 6] + 1) % 30
    context = model.image_context(batch.images)
    one, two = (model.decode(t, context) for t in (text, text.with_ids(ids)))
    assert torch.equal(one[:, :6], two[:, :6]) and not torch.isclose(one[:, 6:], two[:, 6:]).all()
    before = model.decode(text, context)
    with torch.no_grad():
        model.text.class_token += 1
    assert torch.equal(model.decode(text, context), before)
    assert not torch.isclose(model.encode_text(text)[:, 0], one[:, 0]).any()


# -------------------------------------------------------------------------------------------------------- the losses


def test_losses_before_training():
    torch.set_default_dtype(torch.float32)
    model = CoCa(replace(CoCaConfig.nano(), caption_weight=1.0))
    batch = some_batch(16, side=64)
    losses = values_of(model.losses(batch))
    assert set(losses) == {"itc", "lm"}
    assert 2.2 < losses["itc"] < 4.5  # ln 16 = 2.8, and the untrained towers prefer some pairs
    assert abs(losses["lm"] - math.log(1200)) < 0.4
    twice = model.config = replace(model.config, caption_weight=2.0)
    assert twice.caption_weight == CoCaConfig.nano().caption_weight, "the paper's weight"
    assert model.losses(batch)["lm"].item() == pytest.approx(2 * losses["lm"])


def test_captioning_predicts_each_token_from_those_before_it():
    """Against a loop that shows the model one longer beginning at a time."""
    model, batch = tiny(caption_weight=1.0), some_batch()
    text, total, count = batch.text.with_first(5), 0.0, 0
    for row in range(len(batch)):
        context = model.image_context(batch.images[row : row + 1])
        for length in range(1, int(text.mask[row].sum())):
            logits = model.caption_head(model.decode(text[row : row + 1].first(length), context))[0, -1]
            total = total + F.cross_entropy(logits, text.ids[row, length])
            count += 1
    assert model.losses(batch)["lm"].item() == pytest.approx((total / count).item(), abs=1e-12)
    per_text = [model.caption_logprob(batch.images[i : i + 1], batch.text[i : i + 1]) for i in range(len(batch))]
    assert torch.cat(per_text).sum().item() == pytest.approx(-total.item(), abs=1e-9)


def test_contrast_is_clips_with_shared_positives():
    """Two rows show one image: each is a positive of the other."""
    model, batch = tiny(losses=("itc",)), some_batch()
    batch.image_ids[1] = batch.image_ids[0]
    logits = cosine_logits(model.embed_images(batch.images), model.embed_texts(batch.text), model.itc_head.scale())
    positives = batch.image_ids[:, None] == batch.image_ids
    found = model.losses(batch)["itc"].item()
    assert found == pytest.approx(contrastive_loss(logits, positives).item(), abs=1e-12)
    assert found != pytest.approx(contrastive_loss(logits, torch.eye(4, dtype=torch.bool)).item(), abs=1e-3)


def count_calls(model: CoCa) -> dict[str, int]:
    """How often a block of each half, of the image tower, and the pooler of captions run, filled as they do."""
    calls = dict.fromkeys(("text", "decoder", "image", "pooler"), 0)
    parts = model.text.blocks[0], model.decoder.blocks[0], model.image.blocks[0], model.poolers.caption
    for name, part in zip(calls, parts, strict=True):
        part.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    return calls


def test_one_pass_gives_both_losses():
    model = tiny()
    calls = count_calls(model)
    assert set(model.losses(some_batch())) == {"itc", "lm"}
    assert set(calls.values()) == {1}, calls


def test_only_the_losses_of_the_config_are_computed_and_each_reaches_its_part():
    batch, reached = some_batch(), {}
    for on in ("itc", "lm"):
        model = tiny(losses=(on,))
        losses = model.losses(batch)
        assert set(losses) == {on}
        losses[on].backward()
        moved = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
        reached[on] = {".".join(name.split(".")[:2]) for name in moved}
    both = {"image.embed", "image.blocks", "image.norm", "poolers.caption", "text.embed", "text.blocks"}
    joint_space = {"itc_head.project_image", "itc_head.project_text", "itc_head.scale"}
    assert reached["itc"] == both | joint_space | {"poolers.contrast", "text.class_token", "text.norm"}
    assert reached["lm"] == both | {"decoder.blocks", "decoder.norm", "caption_head.decoder"}


VARIANTS = {
    "as published": {},
    "poolers beside each other": {"pooling": ParallelPooling(6, 2)},
    "one pooler": {"pooling": SinglePooling(6, 2)},
    "open_clip's layers and mask": {"two_feeds": True, "legacy_mask": True},
    "contrast alone": {"losses": ("itc",)},
    "captions alone": {"losses": ("lm",)},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_losses_and_gradients_are_those_of_all_tokens_of_all_texts(changes):
    model, batch = tiny(**changes), some_batch()
    assert_exact_without_shortcuts(model, batch)
    batch.prefix_length = torch.tensor([2, 1, 3, 2])
    assert_exact_without_shortcuts(model, batch)


def test_a_question_is_given_and_not_predicted():
    model, batch = tiny(losses=("lm",)), some_batch()
    batch.prefix_length = torch.full((4,), 3)
    ids = batch.text.ids.clone()
    ids[:, 1] += 1  # it is read
    changed = replace(batch, text=batch.text.with_ids(ids))
    assert model.losses(changed)["lm"] != model.losses(batch)["lm"]
    model.config = replace(model.config, prefix_length=3)
    given = model.losses(batch)["lm"].item()
    batch.prefix_length = None
    assert model.losses(batch)["lm"].item() == given


# --------------------------------------------------------------------------------------------------------- the verbs


DECODINGS = [{}, {"beams": 3}, {"beams": 2, "length_penalty": 2.0}, {"min_length": 8}, {"max_length": 5}]


def without_cache(model: CoCa, images: Tensor, decoding: DecodingConfig) -> Tensor:
    """Greedy captions of a model that reads the whole text again for each token."""
    tokens, ids = model.config.tokens, torch.full((len(images), 1), model.start_token)
    context, ended = model.image_context(images), torch.zeros(len(images), dtype=torch.bool)
    while ids.shape[1] < (decoding.max_length or model.config.text.context_length) and not ended.all():
        logits = model.caption_head(model.decode(Text(ids, torch.ones_like(ids, dtype=torch.bool)), context)[:, -1])
        new = decoding.adjust(logits, ids, tokens.sep).argmax(dim=-1).masked_fill(ended, tokens.pad)
        ids, ended = torch.cat([ids, new[:, None]], dim=1), ended | (new == tokens.sep)
    return ids[:, 1:]


def sharp(model: CoCa) -> CoCa:
    """The same with larger logits, which depend more on the image, and a [SEP] that is likely now and then."""
    with torch.no_grad():
        for block in model.decoder.blocks:
            block.cross_attention.out.weight.mul_(10)
        model.poolers.caption.cross_attention.q.weight.mul_(4)
        weight = model.caption_head.decoder.weight
        weight.mul_(6)
        weight[2] = weight[27]
    return model


@pytest.mark.parametrize("options", [options for options in DECODINGS if "beams" not in options])
def test_the_cache_changes_no_caption(options):
    model, images = sharp(tiny()), 2 * torch.randn(6, 3, 32, 32)
    decoding = DecodingConfig(**{"max_length": 16, **options})
    written = model.generate(images, decoding=decoding)
    assert torch.equal(written, without_cache(model, images, decoding))
    assert len({tuple(row) for row in written.tolist()}) > 1, "captions depend on the image"


@pytest.mark.parametrize("options", DECODINGS)
def test_every_image_gets_its_own_caption_however_many_there_are(options):
    model, images = sharp(tiny()), 2 * torch.randn(5, 3, 32, 32)
    decoding = DecodingConfig(**{"max_length": 12, **options})
    together = model.generate(images, decoding=decoding)
    for row in range(5):
        alone = model.generate(images[row : row + 1], decoding=decoding)[0]
        assert torch.equal(alone, together[row, : len(alone)]) and (together[row, len(alone) :] == 0).all()


def test_every_verb_reads_its_own_image():
    model, batch = tiny(), some_batch()
    images, text = batch.images, batch.text
    rolled = images.roll(1, 0)
    there, elsewhere = model.caption_logprob(images, text), model.caption_logprob(rolled, text)
    assert there.shape == (4,) and (there < 0).all() and not torch.isclose(there, elsewhere, atol=1e-9).any()
    rows = torch.tensor([3, 0, 0, 1])
    many = model.caption_logprob_many(images, rows, text)
    assert torch.allclose(many, model.caption_logprob(images[rows], text), atol=1e-12)
    table = model.similarity(images, text)
    assert table.shape == (4, 4) and torch.allclose(model.similarity(rolled, text), table.roll(1, 0))
    assert torch.allclose(model.embed_images(rolled).norm(dim=1), torch.ones(4))


def test_the_first_token_gives_way_to_the_start_token():
    model, batch = tiny(), some_batch()
    other = batch.text.with_first(30)
    assert torch.equal(model.embed_texts(other), model.embed_texts(batch.text))
    assert values_of(model.losses(replace(batch, text=other))) == values_of(model.losses(batch))
    assert torch.equal(model.caption_logprob(batch.images, other), model.caption_logprob(batch.images, batch.text))


# ------------------------------------------------------------------------------------------------------- the poolers


def test_a_pooler_is_attention_of_learned_queries():
    """Against torch's own multi-head attention."""
    pooler = jittered(AttentionalPooler(3, 8, 2, 12, 1e-5))
    theirs = torch.nn.MultiheadAttention(8, 2, kdim=12, vdim=12, batch_first=True)
    attention = pooler.cross_attention
    keys, values = attention.kv.weight.chunk(2)
    copies = {"q_proj_weight": attention.q.weight, "k_proj_weight": keys, "v_proj_weight": values}
    copies |= {"in_proj_bias": torch.cat([attention.q.bias, attention.kv.bias])}
    copies |= {"out_proj.weight": attention.out.weight, "out_proj.bias": attention.out.bias}
    theirs.load_state_dict(copies)
    tokens = torch.randn(5, 7, 12)
    x = pooler.context_norm(tokens)
    expected, _ = theirs(pooler.query_norm(pooler.query).expand(5, -1, -1), x, x)
    assert torch.allclose(pooler(tokens), expected, atol=1e-12)
    assert torch.allclose(pooler(tokens[:, torch.randperm(7)]), expected, atol=1e-12), "no order of its own"


def test_what_each_pooler_reads():
    tokens = torch.randn(2, 9, 32)
    for pooling in (Pooling(6, 2), ParallelPooling(6, 2)):
        poolers = jittered(pooling.build(32, 32, 1e-5))
        whole, parts = poolers(tokens)
        assert whole.shape == (2, 1, 32) and parts.shape == (2, 6, 32)
        read = parts if type(pooling) is Pooling else tokens
        assert torch.equal(whole, poolers.contrast(read))
    whole, parts = SinglePooling(6, 2).build(32, 32, 1e-5)(tokens)
    assert whole.shape == (2, 1, 32) and parts.shape == (2, 5, 32)


def test_attention_can_be_recorded():
    model, batch = tiny(), some_batch()
    maps = recorded_maps(model, lambda: model.similarity(batch.images, batch.text))
    assert maps["text.1.self"].shape == (4, 2, 10, 10) and maps["image.2.self"].shape == (4, 2, 16, 16)
    assert maps["poolers.caption.cross"].shape == (4, 2, 6, 16) and maps["poolers.contrast.cross"].shape == (4, 2, 1, 6)
    maps = recorded_maps(model, lambda: model.caption_logprob(batch.images, batch.text))
    assert maps["decoder.1.cross"].shape == (4, 2, 9, 6) and (maps["decoder.0.self"].triu(1) == 0).all()


# ------------------------------------------------------------------------------------------------------ as a whole


def test_the_base_model_is_as_large_as_the_papers_table_says():
    """Table 1 of the paper: image encoder 86 M, text decoder 297 M; of CoCa-Large 303 M and 484 M."""

    def sizes(config: CoCaConfig) -> tuple[int, int]:
        with torch.device("meta"):
            model = CoCa(config)
        parts = (model.image,), (model.text, model.decoder, model.caption_head)
        return tuple(round(sum(p.numel() for m in part for p in m.parameters()) / 1e6) for part in parts)

    base = CoCaConfig.paper()
    assert sizes(base) == (86, 297)
    block = replace(base.text.block, width=1024, heads=16, hidden=4096)
    towers = {"image": replace(base.image, layers=24, block=block), "text": replace(base.text, block=block)}
    image, text = sizes(replace(base, **towers, pooling=Pooling(256, 16)))
    assert abs(image - 303) <= 1 and text == 484


def test_it_learns_to_write_its_captions_and_to_find_them():
    """Four images, four captions: after a few seconds each image has its caption."""
    torch.set_default_dtype(torch.float32)
    model, batch = tiny(), some_batch()
    losses = overfit_one_batch(model, batch, steps=80, lr=4e-3)
    assert losses[-1] < 0.3 * losses[0]
    written = model.generate(batch.images, decoding=DecodingConfig(max_length=9))
    for row, text in enumerate(batch.text.ids[:, 1:]):
        end = int(batch.text.mask[row].sum()) - 1
        assert torch.equal(written[row, :end], text[:end])
    assert (model.similarity(batch.images, batch.text).argmax(dim=1) == torch.arange(4)).all()
    likely = torch.stack([model.caption_logprob(batch.images, batch.text[[i] * 4]) for i in range(4)], dim=1)
    assert (likely.argmax(dim=0) == torch.arange(4)).all()


@pytest.mark.parametrize("changes", [{}, {"pooling": SinglePooling(6, 2), "two_feeds": True, "legacy_mask": True}])
def test_a_checkpoint_restores_the_model(tmp_path, changes):
    torch.set_default_dtype(torch.float32)
    model, batch = tiny(**changes), some_batch()
    save_model(model, tmp_path / "coca.safetensors")
    back = load_model(CoCa, tmp_path / "coca.safetensors")
    assert back.config == model.config and values_of(back.losses(batch)) == values_of(model.losses(batch))


def test_it_begins_as_the_towers_of_xvlm():
    torch.set_default_dtype(torch.float32)
    towers, config = jittered(XVLM(XVLMConfig.nano(50)).eval()), CoCaConfig.nano(50)
    for class_token in (False, True):
        model = CoCa(replace(config, image=replace(config.image, class_token=class_token)))
        model.init_from(towers)
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(model.encode_image(images), towers.image(images)) is class_token
        assert torch.equal(model.image.norm.weight, towers.image.norm.weight)
        assert torch.equal(model.text.embed.token.weight, towers.text.embed.token.weight)
        ours, theirs = model.decoder.blocks[1].cross_attention, towers.fusion.blocks[1].cross_attention
        assert torch.equal(ours.kv.weight, theirs.kv.weight)
    with pytest.raises(ValueError, match="other sizes than CoCa: .*cross_attention"):
        tiny().init_from(towers)


def test_losses_are_float32_under_autocast():
    torch.set_default_dtype(torch.float32)
    model, batch = tiny().train(), some_batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(batch)
        assert model.generate(batch.images, decoding=DecodingConfig(beams=2, max_length=6)).shape[0] == 4
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()


def test_images_that_are_not_square_and_of_another_size():
    model, text = small_config(CoCa), some_batch().text
    model = jittered(CoCa(replace(model, image=replace(model.image, image_size=(16, 32)))).eval())
    for height, width in ((16, 32), (24, 24)):
        images = torch.randn(4, 3, height, width)
        assert model.encode_image(images).shape == (4, height * width // 64, 32)
        assert model.similarity(images, text).isfinite().all()
