"""X-VLM: the released model's numbers to 1e-9, what a box does, and what the losses may and may not depend on."""

import math
from dataclasses import replace

import pytest
import torch
from released import Comparison, four_heads, golden_masked, golden_negatives, golden_text, release_for, released_model
from small_models import (
    LENGTH,
    VOCABULARY,
    assert_exact_without_shortcuts,
    assert_masks_whole_words,
    longer,
    mask_some,
    recorded_maps,
    small_model,
    some_texts,
)
from torch.nn.functional import pad

from minivlp.data.batch import Batch, Regions, Text
from minivlp.data.text import load_tokenizer
from minivlp.layers.attention import record_attention
from minivlp.layers.embeddings import ImageConfig
from minivlp.models import aligned
from minivlp.models.xvlm import XVLM, XVLMConfig, same_place
from minivlp.objectives.boxes import box_losses, box_to_patches, giou
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits
from minivlp.objectives.masking import IGNORE, MaskedTokens
from minivlp.objectives.matching import Negatives, hard_negatives, sampling_weights
from minivlp.papers import PAPERS
from minivlp.training.checkpoint import bundled, load_model

pytestmark = pytest.mark.usefixtures("float64")
WHOLE = torch.tensor([0.5, 0.5, 1.0, 1.0])


# ---------------------------------------------------------------------------------------------- the released weights


class Released:
    """One golden run: the released model in ours, its inputs, and its batches."""

    def __init__(self, g) -> None:
        config = four_heads(release_for("xvlm", g.state).config(g.state, {}))
        config = replace(config, region_blocks=g.config.get("local_attn_depth", 0), temperature=g.config["temp"])
        assert list(config.image.size) == g.config["image_size"]
        self.model, inputs = released_model("xvlm", g.state, config), g.inputs
        self.images, self.rows, self.boxes = (
            inputs[name] for name in ("pixel_values", "idx_to_group_img", "target_bbox")
        )
        self.text, self.masked = golden_text(inputs), golden_masked(inputs)
        self.negatives = golden_negatives(inputs)
        regions = Regions(self.boxes, self.text, self.rows, inputs["is_image"].bool())
        first = self.text[: len(self.images)]
        self.region_batch = Batch(self.images, first, torch.arange(len(self.images)), regions=regions)
        # in the released code an image-text batch takes every row for a pair of its own
        self.pair_batch = Batch(self.images[self.rows], self.text, torch.arange(len(self.text)))


@pytest.mark.parametrize("kind", ["swin", "deit", "clipvit"])
def test_every_number_of_the_released_model(golden, kind):
    g = golden(f"xvlm_{kind}")
    same, r = Comparison(g), Released(g)
    model, text, padding, own = r.model, r.text, r.text.mask[..., None], torch.arange(len(r.text))
    whole = model.encode_image(r.images)
    regions, inside = model.encode_regions(r.images, r.boxes, r.rows)
    text_tokens = model.encode_text(text)
    assert torch.equal(inside.long(), g.inputs["image_atts"])
    same("image_tokens", whole)
    same("region_tokens", regions)
    same("text_tokens", text_tokens * padding)
    same("fused_tokens_region", model.fuse(text_tokens, text.mask, regions, inside) * padding)
    same("fused_tokens_full_image", model.cross_encode_many(r.images, r.rows, text) * padding)

    boxes = model.ground(r.images[r.rows], text)
    same("region.box_pred", boxes)
    same("region.box_pred", model.ground_many(r.images, r.rows, text))
    same("region.giou", giou(boxes, r.boxes))
    l1, generalized = box_losses(boxes, r.boxes)
    same("region.loss_bbox_l1_all_rows", l1)
    same("region.loss_bbox_giou_all_rows", generalized)

    for prefix, batch, image_tokens, mask in (
        ("region", r.region_batch, regions, inside),
        ("pair", r.pair_batch, whole[r.rows], torch.ones_like(inside)),
    ):
        vectors = model.itc_head.embed_image(image_tokens), model.embed_texts(text)
        logits = cosine_logits(*vectors, model.itc_head.scale())
        same(f"{prefix}.image_feat", vectors[0])
        same(f"{prefix}.text_feat", vectors[1])
        same(f"{prefix}.sim", logits)
        positives = torch.eye(len(text), dtype=torch.bool)
        same(f"{prefix}.itm_sampling_weights_i2t", sampling_weights(logits, positives, model.negative_floor))
        same(f"{prefix}.itm_sampling_weights_t2i", sampling_weights(logits.T, positives, model.negative_floor))
        i, j = (torch.cat([own, drawn]) for drawn in r.negatives.pairs())
        same(
            f"{prefix}.itm_logits", model.match_head(model.fuse(text_tokens[j], text.mask[j], image_tokens[i], mask[i]))
        )
        masked_tokens = model.fuse(model.encode_text(r.masked.text), text.mask, image_tokens, mask)
        same(f"{prefix}.mlm_logits", model.mlm_head(masked_tokens[r.masked.labels != IGNORE]))

        model.zero_grad()
        losses = model.losses(batch, negatives=r.negatives, masked=r.masked)
        names = {"itc": "itc", "itm": "itm", "mlm": "mlm", "box_l1": "bbox_l1", "box_giou": "bbox_giou"}
        for ours, value in losses.items():
            same(f"{prefix}.loss_{names[ours]}", value)
        same(f"{prefix}.loss_total", sum(losses.values()))
        sum(losses.values()).backward()
        same.gradients("xvlm", model, before=f"{prefix}.grad.")

    grouped = replace(r.pair_batch, image_ids=r.rows)
    ours = model.losses(grouped, negatives=r.negatives, masked=r.masked)["itc"]
    share = (r.rows[:, None] == r.rows[None, :]).float()  # the reference rounds its shares of 1/3 to float32 ..
    share = (share / share.sum(dim=1, keepdim=True)).double()
    same("pair.loss_itc_with_ids", contrastive_loss(logits, soft=(share, share)))
    assert ours.item() == pytest.approx(g.outputs["pair.loss_itc_with_ids"].item(), abs=1e-7)  # .. which costs 3e-8
    assert same.done == set(g.outputs)


# --------------------------------------------------------------------------------------------------- what must hold


def tiny(**changes) -> XVLM:
    return small_model(XVLM, **changes)


def some_batch(images: int = 3, regions: int = 7) -> Batch:
    """Images with captions, and regions with phrases, the first of which is a whole image."""
    boxes = torch.cat([torch.rand(regions, 2) * 0.4 + 0.3, torch.rand(regions, 2) * 0.3 + 0.2], dim=1)
    boxes[0] = WHOLE
    rows = torch.arange(regions)
    return Batch(
        torch.randn(images, 3, 32, 32),
        some_texts(images),
        torch.arange(images) + 100,
        regions=Regions(boxes, some_texts(regions), rows % images, rows == 0),
    )


def without_regions(batch: Batch) -> Batch:
    return replace(batch, regions=None)


def next_rows(count: int) -> Negatives:
    rows = torch.arange(count)
    return Negatives((rows + 1) % count, (rows + 2) % count)


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_box_around_the_whole_image_reproduces_the_plain_forward_exactly(blocks):
    model, batch = tiny(region_blocks=blocks), some_batch()
    boxes, own = WHOLE.expand(3, 4), torch.arange(3)
    whole = model.encode_image(batch.images)
    regions, inside = model.encode_regions(batch.images, boxes, own)
    assert torch.equal(regions, whole) and inside.all()
    shuffled, _ = model.encode_regions(batch.images, boxes, torch.tensor([2, 0, 1]))
    assert torch.allclose(shuffled, whole[[2, 0, 1]], atol=1e-14)  # rows of a matmul differ in the last bit by place
    assert torch.allclose(model.embed_regions(batch.images, boxes, own), model.embed_images(batch.images), atol=1e-14)


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_regions_tokens_depend_only_on_its_box(blocks):
    model, batch = tiny(region_blocks=blocks), some_batch()
    boxes, rows, text = batch.regions.boxes, batch.regions.image_rows, batch.regions.text
    whole = model.encode_image(batch.images)
    regions, inside = model.encode_regions(batch.images, boxes, rows)
    assert torch.equal(inside[:, 1:], box_to_patches(boxes, (4, 4)))
    with record_attention(model) as maps:
        model.fuse(model.encode_text(text), text.mask, regions, inside)
        outside = ~inside[:, None, None, :].expand_as(maps["fusion.1.cross"])
        assert outside.any() and (maps["fusion.1.cross"][outside] == 0).all()
        if blocks:
            model.encode_regions(batch.images, boxes, rows)
            outside = ~inside[:, None, None, :].expand_as(maps["image.2.self"])
            assert (maps["image.2.self"][outside] == 0).all()
    if not blocks:
        for region, row, patches in zip(regions, rows, inside[:, 1:], strict=True):
            assert torch.equal(region[1:], whole[row, 1:])
            assert torch.allclose(region[0], whole[row, 1:][patches].mean(dim=0))


def test_a_box_is_predicted_from_the_full_image():
    model, batch = tiny(losses=("box_l1", "box_giou")), some_batch()
    for part in (batch.regions.text.mask,):
        part[:] = True  # one length: all texts in one pass, whose maps are those of all rows
    with record_attention(model) as maps:
        assert set(model.losses(batch)) == {"box_l1", "box_giou"}
    assert maps["fusion.1.cross"].shape == (7, 2, LENGTH, 17) and (maps["fusion.1.cross"] > 0).all()
    regions = batch.regions
    expected = model.ground(batch.images[regions.image_rows], regions.text)
    losses = model.losses(batch)
    assert torch.allclose(losses["box_l1"], box_losses(expected, regions.boxes, regions.is_image).l1)
    assert torch.allclose(losses["box_giou"], box_losses(expected, regions.boxes, regions.is_image).giou)


@pytest.mark.parametrize("blocks", [0, 2])
def test_each_image_is_embedded_once_however_many_phrases_it_has(blocks):
    model, batch = tiny(region_blocks=blocks), some_batch(images=2, regions=9)
    sizes = []
    model.image.embed.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    model.losses(batch)
    assert sizes == [2]


@pytest.mark.parametrize("blocks", [0, 2])
def test_many_texts_of_one_image_get_what_each_gets_alone_and_encode_it_once(blocks):
    model, images, rows = tiny(region_blocks=blocks), torch.randn(2, 3, 32, 32), torch.tensor([1, 0, 1, 1, 0])
    text = some_texts(5)
    alone = model.match(images[rows], text), model.ground(images[rows], text)
    sizes = []
    model.image.embed.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    many = model.match_many(images, rows, text), model.ground_many(images, rows, text)
    assert sizes == [2, 2]
    for one, other in zip(alone, many, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_text_is_matched_with_what_is_in_its_box(blocks):
    model, batch = tiny(region_blocks=blocks), some_batch()
    boxes, rows, text = batch.regions.boxes, batch.regions.image_rows, batch.regions.text
    found = model.match_regions(batch.images, boxes, rows, text)
    tokens, inside = model.encode_regions(batch.images, boxes, rows)
    logits = model.match_head(model.fuse(model.encode_text(text), text.mask, tokens, inside))
    assert torch.allclose(found, logits.softmax(1)[:, 1])
    whole = model.match_many(batch.images, rows, text)
    assert torch.allclose(found[:1], whole[:1]) and not torch.isclose(found[1:], whole[1:]).any()  # box 0 is the image


def test_losses_are_those_of_the_config_and_boxes_need_regions():
    batch = some_batch()
    empty = Regions(torch.zeros(0, 4), batch.regions.text[:0], torch.zeros(0).long(), torch.zeros(0).bool())
    every = ["itc", "itm", "mlm", "box_l1", "box_giou"]
    assert list(tiny().losses(batch)) == every
    assert list(tiny().losses(without_regions(batch))) == every[:3]
    assert list(tiny().losses(replace(batch, regions=empty))) == every[:3]
    for name in every:
        assert list(tiny(losses=(name,)).losses(batch)) == [name]


def test_every_parameter_learns():
    for model in (tiny(), tiny(region_blocks=2)):
        sum(model.losses(some_batch()).values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("regions", [True, False])
def test_losses_and_gradients_are_those_of_all_tokens_of_all_texts(blocks, regions):
    model, batch = tiny(region_blocks=blocks), some_batch()
    if not regions:
        batch = replace(without_regions(batch), negatives=some_texts(3, LENGTH + 2))
    text = batch.regions.text if regions else batch.text
    assert_exact_without_shortcuts(model, batch, negatives=next_rows(len(text)), masked=mask_some(text))


@pytest.mark.parametrize("regions", [True, False])
def test_tokens_of_a_frozen_tower_take_the_place_of_images(regions):
    model, batch = tiny(), some_batch()
    batch = batch if regions else without_regions(batch)
    text = batch.regions.text if regions else batch.text
    given = {"negatives": next_rows(len(text)), "masked": mask_some(text)}
    cached = replace(batch, images=None, image_tokens=model.encode_image(batch.images))
    one, two = model.losses(batch, **given), model.losses(cached, **given)
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name]) for name in one)


def test_losses_at_initialization_are_those_of_chance():
    torch.set_default_dtype(torch.float32)
    model = XVLM(XVLMConfig.nano(300))
    batch = replace(some_batch(images=8, regions=48), images=torch.randn(8, 3, 64, 64))
    with torch.no_grad():
        losses = model.losses(batch)
    assert losses["itm"].item() == pytest.approx(math.log(2), abs=0.35)  # the head's initial weights are not 0
    assert losses["mlm"].item() == pytest.approx(math.log(300), abs=0.8)
    assert losses["itc"].item() == pytest.approx(math.log(48), abs=2.5)
    assert losses["box_l1"].item() < 1.5 and losses["box_giou"].item() < 2


def test_padding_changes_nothing():
    model, batch = tiny(), without_regions(some_batch())
    text, padded = batch.text, longer(batch.text)
    for verb in (model.match, model.ground, model.similarity):
        assert torch.allclose(verb(batch.images, text), verb(batch.images, padded))
    logits, padded_logits = model.mlm_logits(batch.images, text), model.mlm_logits(batch.images, padded)
    assert torch.allclose(logits[text.mask], padded_logits[:, :LENGTH][text.mask])
    labels = torch.where(torch.arange(LENGTH) == 1, text.ids, IGNORE)
    one = model.losses(batch, negatives=next_rows(3), masked=MaskedTokens(text, labels))
    masked = MaskedTokens(padded, pad(labels, (0, 4), value=IGNORE))
    two = model.losses(replace(batch, text=padded), negatives=next_rows(3), masked=masked)
    assert all(torch.allclose(one[name], two[name]) for name in one)


def test_shapes_and_ranges_of_the_verbs():
    model, batch, text = tiny(), some_batch(), some_texts(5)
    assert model.encode_image(batch.images).shape == (3, 17, 32)
    assert model.similarity(batch.images, text).shape == (3, 5)
    for vectors in (model.embed_images(batch.images), model.embed_texts(text)):
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)))
    for value in (model.match(batch.images, batch.text), model.ground(batch.images, batch.text)):
        assert ((value > 0) & (value < 1)).all()
    assert model.mlm_logits(batch.images, batch.text).shape == (3, LENGTH, VOCABULARY)


def test_all_queries_are_recorded_where_one_token_is_read():
    model, batch = tiny(), some_batch()
    maps = recorded_maps(model, lambda: model.ground(batch.images, batch.text))
    assert maps["fusion.1.self"].shape == (3, 2, LENGTH, LENGTH) and maps["fusion.1.cross"].shape == (3, 2, LENGTH, 17)
    assert maps["image.2.self"].shape == (3, 2, 17, 17)


def test_phrases_of_one_box_are_never_each_others_negatives():
    batch = some_batch(images=1, regions=4)
    batch.regions.boxes[:] = batch.regions.boxes[1]
    model = tiny(losses=("itc", "itm"))
    losses = model.losses(batch)  # there is no negative in the whole batch
    boxes, rows, text = batch.regions.boxes, batch.regions.image_rows, batch.regions.text
    tokens, inside = model.encode_regions(batch.images, boxes, rows)
    logits = cosine_logits(model.itc_head.embed_image(tokens), model.embed_texts(text), model.itc_head.scale())
    equal_shares = -(logits.log_softmax(dim=0).mean() + logits.log_softmax(dim=1).mean()) / 2
    assert torch.allclose(losses["itc"], equal_shares)
    matched = model.match_head(model.fuse(model.encode_text(text), text.mask, tokens, inside))
    assert torch.allclose(losses["itm"], -matched.log_softmax(dim=-1)[:, 1].mean())
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]]).repeat(3, 1)
    boxes[2, 0] = 0.6
    assert same_place(torch.tensor([1, 1, 1]), boxes).tolist() == [0, 0, 1]
    assert len(set(same_place(torch.tensor([1, 2, 3]), boxes).tolist())) == 3


def test_match_is_the_probability_that_the_loss_increases():
    model, batch = tiny(losses=("itm",)), without_regions(some_batch(images=1))  # alone: no negative can be drawn
    assert torch.allclose(model.losses(batch)["itm"], -model.match(batch.images, batch.text).log().mean())


def test_all_positives_of_a_row_have_equal_shares_of_the_contrastive_target():
    # places p, p, q with the texts a, b, a: the first row has three positives, the others two
    batch = some_batch(images=1, regions=3)
    regions = batch.regions
    regions.boxes[0], regions.boxes[1], regions.boxes[2] = regions.boxes[2], regions.boxes[2], WHOLE
    for part in (regions.text.ids, regions.text.mask):
        part[2] = part[0]
    model = tiny(losses=("itc",))
    vectors = model.embed_regions(batch.images, regions.boxes, regions.image_rows), model.embed_texts(regions.text)
    logits = cosine_logits(*vectors, model.itc_head.scale())
    share = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1]]) / torch.tensor([[3], [2], [2]])
    rows, columns = (-(share * table.log_softmax(dim=1)).sum(dim=1).mean() for table in (logits, logits.T))
    assert torch.allclose(model.losses(batch)["itc"], (rows + columns) / 2)


@pytest.mark.parametrize("regions", [True, False])
def test_hard_negatives_are_drawn_from_float32_logits_under_autocast(monkeypatch, regions):
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return hard_negatives(*arguments)

    monkeypatch.setattr(aligned, "hard_negatives", spy)
    torch.set_default_dtype(torch.float32)
    model, batch = tiny(), some_batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(batch if regions else without_regions(batch))
    ((logits, _, floor, back, _),) = calls
    assert floor == 1e-5 and len(logits) == (7 if regions else 3)
    for values in (logits, back):
        assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())


def test_special_tokens_are_not_masked_and_pieces_of_a_word_together():
    masking = replace(XVLMConfig.nano().masking, rate=0.5)
    ids = torch.tensor([[1, 7, 21, 8, 22, 2, 0]]).repeat(200, 1)
    word = torch.tensor([[-1, 0, 0, 1, 1, -1, -1]]).repeat(200, 1)
    text, labels = masking.apply(Text(ids, ids > 0, word), VOCABULARY)
    predicted = labels != IGNORE
    assert not predicted[:, [0, 5, 6]].any() and predicted.any(dim=1).all()
    assert torch.equal(predicted[:, 1], predicted[:, 2]) and torch.equal(predicted[:, 3], predicted[:, 4])
    assert (text.ids == masking.mask_id).any() and (text.ids > 22).any()  # random tokens of the whole vocabulary


@pytest.mark.parametrize("source", ["checkpoint", "recipe"])
def test_whole_words_are_masked(source):
    if source == "checkpoint":
        model = load_model(XVLM, bundled("xvlm_nano"))
    else:
        model = PAPERS["xvlm"].recipe("quick").build(XVLM, load_tokenizer())
    assert_masks_whole_words(model)


@pytest.mark.parametrize("blocks", [0, 2])
def test_other_image_sizes_and_shapes(blocks):
    wide, boxes = torch.randn(2, 3, 32, 48), torch.tensor([[0.25, 0.5, 0.5, 1.0]])
    fixed = tiny(region_blocks=blocks)
    learned = replace(fixed.config.image, image_size=(32, 48), sincos_positions=False)
    for model in (fixed, tiny(region_blocks=blocks, image=learned)):
        tokens, inside = model.encode_regions(wide, boxes, torch.tensor([1]))
        assert model.encode_image(wide).shape == (2, 25, 32) and tokens.shape == (1, 25, 32)
        assert inside[0, 1:].view(4, 6).tolist() == [[True] * 3 + [False] * 3] * 4


def test_images_of_another_shape_in_the_config_train():
    image: ImageConfig = replace(tiny().config.image, image_size=(32, 48))
    model, batch = tiny(image=image), replace(some_batch(), images=torch.randn(3, 3, 32, 48))
    losses = model.losses(batch)
    assert len(losses) == 5 and all(value.isfinite() for value in losses.values())
    cached = replace(batch, images=None, image_tokens=model.encode_image(batch.images))
    assert len(model.losses(cached)) == 5  # which patches are in a box then follows from the config


def test_temperature_stays_in_range():
    model = tiny()
    for value, kept in ((-1.0, 0.001), (3.0, 0.5), (0.1, 0.1)):
        model.itc_head.scale.temperature.data.fill_(value)
        model.after_step()
        assert model.itc_head.scale.temperature.item() == pytest.approx(kept)


def test_parameter_counts():
    with torch.device("meta"):
        count = {
            name: sum(p.numel() for p in XVLM(getattr(XVLMConfig, name)()).parameters()) for name in ("nano", "paper")
        }
    # published: 216 M. Swin-B 86.7, text half of BERT-base 66.4, fusing half 59.1, heads and projections the rest;
    # BERT's second token-type row, which nothing reads, is not there
    assert count["paper"] == 215_635_705 and round(count["paper"] / 1e6) == 216
    assert count["nano"] < 2.1e6
