"""X-VLM: the released model's numbers to 1e-9, what a box does, and what the losses may and may not depend on."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from released import BERT_LAYER, VIT_LAYER
from safetensors.torch import load_file

from minivlp.data.batch import Batch
from minivlp.layers.attention import record_attention
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.models.xvlm import XVLM, SwinConfig, XVLMConfig, same_place, take
from minivlp.objectives.boxes import box_losses, box_to_patches, giou
from minivlp.objectives.contrastive import contrastive_loss
from minivlp.objectives.masking import IGNORE, Masked
from minivlp.objectives.matching import Negatives, negative_weights

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("swin", "deit", "clipvit")


@pytest.fixture(autouse=True)
def float64():
    """A wrong LayerNorm epsilon drowns in float32."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------------------------- the released weights


def golden_config(kind: str, numbers: dict) -> XVLMConfig:
    size, patch, width = numbers["image_size"][0], numbers["patch_size"], numbers["vision_width"]
    text_block = BlockConfig(
        numbers["text_width"], numbers["text_heads"], numbers["text_ffn"], norm_eps=1e-12, norm_first=False
    )
    if kind == "swin":
        image = SwinConfig(
            size,
            patch,
            sum(numbers["swin_depths"]),
            BlockConfig(width, numbers["swin_heads"][-1], 4 * width),
            first_patch=numbers["swin_patch"],
            depths=tuple(numbers["swin_depths"]),
            heads=tuple(numbers["swin_heads"]),
            window=numbers["swin_window"],
        )
    else:
        clip = kind == "clipvit"
        block = BlockConfig(
            width,
            numbers["vision_heads"],
            numbers["vision_mlp_ratio"] * width,
            activation="quick_gelu" if clip else "gelu",
            norm_eps=1e-5 if clip else 1e-6,
        )
        image = ImageConfig(size, patch, numbers["vision_layers"], block, norm_before=clip, patch_bias=not clip)
    return XVLMConfig(
        image=image,
        text=TextConfig(
            numbers["vocab"], numbers["max_position"], numbers["fusion_layer"], text_block, embed_norm=True
        ),
        fusion_layers=numbers["text_layers_total"] - numbers["fusion_layer"],
        embed_width=numbers["embed_dim"],
        rerun_blocks=numbers.get("local_attn_depth", 0),
        temperature=numbers["temp"],
    )


CLIP_LAYER = {
    "self_attn.out_proj": "self_attention.out",
    "layer_norm1": "self_norm",
    "layer_norm2": "feed_norm",
    "mlp.fc1": "feed_forward.up",
    "mlp.fc2": "feed_forward.down",
}


def layer(ours: str, theirs: str, names: dict[str, str], state: dict) -> dict:
    """One transformer layer under our names."""
    both = [(o, t, end) for t, o in names.items() for end in ("weight", "bias") if f"{theirs}.{t}.{end}" in state]
    return {f"{ours}.{o}.{end}": state[f"{theirs}.{t}.{end}"] for o, t, end in both}


def stacked(parts: list[str], state: dict, end: str) -> torch.Tensor:
    return torch.cat([state[f"{part}.{end}"] for part in parts])


def text_weights(state: dict, text_layers: int) -> dict:
    bert, head = "text_encoder.bert.", "text_encoder.cls.predictions."
    new = {
        "text.embed.words.weight": state[f"{bert}embeddings.word_embeddings.weight"],
        "text.embed.positions": state[f"{bert}embeddings.position_embeddings.weight"]
        + state[f"{bert}embeddings.token_type_embeddings.weight"][0],
        "word_head.decoder.weight": state[f"{bert}embeddings.word_embeddings.weight"],
        "word_head.decoder.bias": state[f"{head}bias"],
        "temperature": state["temp"],
    }
    for end in ("weight", "bias"):
        new[f"text.embed.norm.{end}"] = state[f"{bert}embeddings.LayerNorm.{end}"]
        new[f"word_head.dense.{end}"] = state[f"{head}transform.dense.{end}"]
        new[f"word_head.norm.{end}"] = state[f"{head}transform.LayerNorm.{end}"]
        new[f"project_image.{end}"] = state[f"vision_proj.{end}"]
        new[f"project_text.{end}"] = state[f"text_proj.{end}"]
        for ours, theirs in (("match_head", "itm_head"), ("box_head", "bbox_head")):
            new |= {f"{ours}.{i}.{end}": state[f"{theirs}.{i}.{end}"] for i in (0, 1, 3)}
    for index in range(sum(name.endswith("intermediate.dense.bias") for name in state)):
        theirs = f"{bert}encoder.layer.{index}"
        ours = f"text.blocks.{index}" if index < text_layers else f"fusion.blocks.{index - text_layers}"
        new |= layer(ours, theirs, BERT_LAYER, state)
        for end in ("weight", "bias"):
            own = [f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")]
            new[f"{ours}.self_attention.qkv.{end}"] = stacked(own, state, end)
            if index >= text_layers:
                other = [f"{theirs}.crossattention.self.{part}" for part in ("key", "value")]
                new[f"{ours}.cross_attention.kv.{end}"] = stacked(other, state, end)
    return new


def image_weights(kind: str, state: dict, layers: int) -> dict:
    state = {name.removeprefix("vision_encoder."): value for name, value in state.items()}
    new = {}
    if kind == "swin":  # the merging of patches stands at the end of a stage there, at the start of the next in timm
        for name, value in state.items():
            if not name.startswith(("patch_embed", "layers", "norm")) or name.endswith(("_index", "attn_mask")):
                continue
            if ".downsample." in name:
                stage = int(name.split(".")[1])
                name = name.replace(f"layers.{stage}", f"layers.{stage + 1}")
            new[f"image.swin.{name}"] = value
        return new
    deit = kind == "deit"
    positions = state["pos_embed"][0] if deit else state["pos_embed.weight"]
    new["image.class_token"] = state["cls_token"][0, 0] if deit else state["class_embedding"]
    new["image.class_position"], new["image.positions"] = positions[0], positions[1:]
    for end in ("weight", "bias"):
        new[f"image.norm.{end}"] = state[f"norm.{end}" if deit else f"post_layernorm.{end}"]
        if deit:
            new[f"image.patches.project.{end}"] = state[f"patch_embed.proj.{end}"]
        else:
            new[f"image.norm_before.{end}"] = state[f"pre_layrnorm.{end}"]
    if not deit:
        new["image.patches.project.weight"] = state["patch_embed.weight"]
    for index in range(layers):
        theirs = f"blocks.{index}" if deit else f"encoder.layers.{index}"
        new |= layer(f"image.blocks.{index}", theirs, VIT_LAYER if deit else CLIP_LAYER, state)
        if not deit:
            own = [f"{theirs}.self_attn.{part}_proj" for part in "qkv"]
            for end in ("weight", "bias"):
                new[f"image.blocks.{index}.self_attention.qkv.{end}"] = stacked(own, state, end)
    return new


GRADIENTS = {
    "temp": "temperature",
    "vision_proj.weight": "project_image.weight",
    "text_proj.weight": "project_text.weight",
    "itm_head.0.weight": "match_head.0.weight",
    "bbox_head.3.weight": "box_head.3.weight",
    "bbox_head.0.bias": "box_head.0.bias",
    "text_encoder.bert.embeddings.LayerNorm.weight": "text.embed.norm.weight",
    "text_encoder.bert.embeddings.word_embeddings.weight": "text.embed.words.weight",
    "vision_encoder.norm.weight": "image.norm.weight",
    "vision_encoder.post_layernorm.weight": "image.norm.weight",
}


class Released:
    """One fixture: the released model's weights in ours, its inputs, its outputs."""

    def __init__(self, kind: str) -> None:
        self.about = json.loads((GOLDEN / f"xvlm_{kind}.json").read_text())
        tensors = load_file(GOLDEN / f"xvlm_{kind}.safetensors")
        group = {
            prefix: {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            for prefix in ("state.", "in.", "out.")
        }
        state = {n: t.double() if t.is_floating_point() else t for n, t in group["state."].items()}
        self.given, self.out, self.checked = group["in."], group["out."], set()
        config = golden_config(kind, self.about["config"])
        self.model = XVLM(config)
        weights = text_weights(state, config.text.layers) | image_weights(kind, state, config.image.layers)
        self.model.load_state_dict(weights, strict=True)
        given = self.given
        self.images, self.rows = given["pixel_values"].double(), given["idx_to_group_img"]
        self.ids, self.mask = given["input_ids"], given["attention_mask"].bool()
        self.boxes, self.is_image = given["target_bbox"].double(), given["is_image"].bool()
        labels = torch.full_like(self.ids, IGNORE)
        asked = (given["mlm_labels"] != IGNORE).nonzero()
        labels[asked[:, 0], given["mlm_pos"][asked[:, 0], asked[:, 1]]] = given["mlm_labels"][asked[:, 0], asked[:, 1]]
        self.masked = Masked(given["mlm_input_ids"], labels)
        self.negatives = Negatives(given["itm_neg_image_for_text"], given["itm_neg_text_for_image"])
        self.region_batch = Batch(
            self.images, self.ids[: len(self.images)], self.mask[: len(self.images)], torch.arange(len(self.images)),
            self.boxes, self.ids, self.mask, self.rows, self.is_image,
        )  # fmt: skip
        # in the released code an image-text batch takes every row for a pair of its own
        self.pair_batch = Batch(self.images[self.rows], self.ids, self.mask, torch.arange(len(self.ids)))

    def same(self, name: str, value: torch.Tensor) -> None:
        expected = self.out[name]
        assert value.shape == expected.shape, name
        assert (value.detach() - expected).abs().max() <= self.about["tolerance"]["default"], name
        self.checked.add(name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_the_released_model(kind):
    r = Released(kind)
    model, pad = r.model, r.mask[..., None]
    whole, regions, seen = model.encode_regions(r.images, r.boxes, r.rows)
    words = model.encode_text(r.ids, r.mask)
    assert torch.equal(seen.long(), r.given["image_atts"])
    r.same("image_tokens", whole)
    r.same("image_tokens", model.encode_image(r.images))
    r.same("region_tokens", regions)
    r.same("text_tokens", words * pad)
    r.same("fused_tokens_region", model.fuse(words, r.mask, regions, seen) * pad)
    full = model.fuse(words, r.mask, take(model.fusion.keys_values(whole), r.rows))
    r.same("fused_tokens_full_image", full * pad)

    r.same("region.box_pred", model.boxes_from(full))
    r.same("region.box_pred", model.ground(r.images[r.rows], r.ids, r.mask))
    r.same("region.giou", giou(model.boxes_from(full), r.boxes))
    l1, generalised = box_losses(model.boxes_from(full), r.boxes)
    r.same("region.loss_bbox_l1_all_rows", l1)
    r.same("region.loss_bbox_giou_all_rows", generalised)

    for prefix, batch, visual, look in (
        ("region", r.region_batch, regions, seen),
        ("pair", r.pair_batch, whole[r.rows], torch.ones_like(seen)),
    ):
        v, t = model.embed_visual(visual), model.embed_words(words)
        similarity = v @ t.T / model.temperature
        r.same(f"{prefix}.image_feat", v)
        r.same(f"{prefix}.text_feat", t)
        r.same(f"{prefix}.sim", similarity)
        own = torch.eye(len(r.ids), dtype=torch.bool)
        r.same(f"{prefix}.itm_sampling_weights_i2t", negative_weights(similarity, own))
        r.same(f"{prefix}.itm_sampling_weights_t2i", negative_weights(similarity.T, own))
        pairs = [(torch.arange(len(r.ids)),) * 2, r.negatives.image_pairs(), r.negatives.text_pairs()]
        fused = [model.fuse(words[j], r.mask[j], visual[i], look[i]) for i, j in pairs]
        r.same(f"{prefix}.itm_logits", torch.cat([model.match_logits(f) for f in fused]))
        hidden = model.fuse(model.encode_text(r.masked.ids, r.mask), r.mask, visual, look)
        r.same(f"{prefix}.mlm_logits", model.word_head(hidden[r.masked.labels != IGNORE]))

        model.zero_grad()
        losses = model.losses(batch, r.negatives, r.masked)
        names = {"itc": "itc", "itm": "itm", "mlm": "mlm", "box_l1": "bbox_l1", "box_giou": "bbox_giou"}
        for ours, value in losses.items():
            r.same(f"{prefix}.loss_{names[ours]}", value)
        r.same(f"{prefix}.loss_total", sum(losses.values()))
        sum(losses.values()).backward()
        for name in [n for n in r.out if n.startswith(f"{prefix}.grad.")]:
            theirs = name.removeprefix(f"{prefix}.grad.")
            swin_norm = kind == "swin" and theirs == "vision_encoder.norm.weight"
            parameter = model.get_parameter("image.swin.norm.weight" if swin_norm else GRADIENTS[theirs])
            # no box loss in an image-text batch
            r.same(name, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)

    grouped = dataclasses.replace(r.pair_batch, image_ids=r.rows)
    ours = model.losses(grouped, r.negatives, r.masked)["itc"]
    share = (r.rows[:, None] == r.rows[None, :]).float()  # the reference rounds its shares of 1/3 to float32 ..
    share = (share / share.sum(dim=1, keepdim=True)).double()
    r.same("pair.loss_itc_with_ids", contrastive_loss(v, t, 1 / model.temperature, soft=(share, share)))
    assert ours.item() == pytest.approx(r.out["pair.loss_itc_with_ids"].item(), abs=1e-7)  # .. which costs 3e-8
    assert r.checked == set(r.out)


# --------------------------------------------------------------------------------------------------- what must hold

WORDS, LENGTH = 40, 9


def tiny(**changes) -> XVLM:
    """A nano model with every parameter moved, so that nothing hides behind a zero."""
    nano = XVLMConfig.nano(WORDS)
    block = dataclasses.replace(nano.image.block, width=32, heads=2, hidden=64)
    small = {
        "image": dataclasses.replace(nano.image, image_size=32, block=block),
        "text": dataclasses.replace(nano.text, block=block),
    }
    model = XVLM(dataclasses.replace(nano, **{**small, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def some_texts(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (count, 1))
    return torch.randint(7, WORDS, (count, LENGTH)) * mask, mask


def some_batch(images: int = 3, regions: int = 7) -> Batch:
    ids, mask = some_texts(images)
    region_ids, region_mask = some_texts(regions)
    boxes = torch.cat([torch.rand(regions, 2) * 0.4 + 0.3, torch.rand(regions, 2) * 0.3 + 0.2], dim=1)
    boxes[0] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    return Batch(
        torch.randn(images, 3, 32, 32), ids, mask, torch.arange(images) + 100,
        boxes, region_ids, region_mask, torch.arange(regions) % images, torch.arange(regions) == 0,
    )  # fmt: skip


@pytest.mark.parametrize("rerun", [0, 2])
def test_a_whole_image_box_reproduces_the_plain_forward_exactly(rerun):
    model, batch = tiny(rerun_blocks=rerun), some_batch()
    boxes = torch.tensor([[0.5, 0.5, 1.0, 1.0]]).expand(3, 4)
    whole, regions, seen = model.encode_regions(batch.images, boxes, torch.arange(3))
    assert torch.equal(whole, model.encode_image(batch.images))
    assert torch.equal(regions, whole) and seen.all()
    _, shuffled, _ = model.encode_regions(batch.images, boxes, torch.tensor([2, 0, 1]))
    assert torch.allclose(shuffled, whole[[2, 0, 1]], atol=1e-14)  # rows of a matmul differ in the last bit by place
    assert torch.equal(model.embed_regions(batch.images, boxes, torch.arange(3)), model.embed_images(batch.images))


@pytest.mark.parametrize("rerun", [0, 2])
def test_a_region_shows_only_what_its_box_holds(rerun):
    model, batch = tiny(rerun_blocks=rerun), some_batch()
    whole, regions, seen = model.encode_regions(batch.images, batch.region_boxes, batch.region_image)
    assert torch.equal(seen[:, 1:], box_to_patches(batch.region_boxes, (4, 4)))
    with record_attention(model) as maps:
        model.fuse(model.encode_text(batch.region_ids, batch.region_mask), batch.region_mask, regions, seen)
        outside = ~seen[:, None, None, :].expand_as(maps["fusion.1.cross"])
        assert outside.any() and (maps["fusion.1.cross"][outside] == 0).all()
        if rerun:
            model.encode_regions(batch.images, batch.region_boxes, batch.region_image)
            outside = ~seen[:, None, None, :].expand_as(maps["image.2.self"])
            assert (maps["image.2.self"][outside] == 0).all()
    if not rerun:
        for region, row, inside in zip(regions, batch.region_image, seen[:, 1:], strict=True):
            assert torch.equal(region[1:], whole[row, 1:])
            assert torch.allclose(region[0], whole[row, 1:][inside].mean(dim=0))


def test_a_box_is_predicted_from_the_full_image():
    model, batch = tiny(losses=("box_l1", "box_giou")), some_batch()
    with record_attention(model) as maps:
        assert set(model.losses(batch)) == {"box_l1", "box_giou"}
    assert (maps["fusion.1.cross"] > 0).all()
    expected = model.ground(batch.images[batch.region_image], batch.region_ids, batch.region_mask)
    losses = model.losses(batch)
    assert torch.allclose(losses["box_l1"], box_losses(expected, batch.region_boxes, batch.region_is_image).l1)


@pytest.mark.parametrize("rerun", [0, 2])
def test_each_image_is_embedded_once_whatever_its_phrases(rerun):
    model, batch = tiny(rerun_blocks=rerun), some_batch(images=2, regions=9)
    sizes = []
    model.image.patches.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    model.losses(batch)
    assert sizes == [2]


@pytest.mark.parametrize("rerun", [0, 2])
def test_many_texts_of_one_image_get_what_each_gets_alone_and_encode_it_once(rerun):
    model, images, rows = tiny(rerun_blocks=rerun), torch.randn(2, 3, 32, 32), torch.tensor([1, 0, 1, 1, 0])
    ids, mask = some_texts(5)
    alone = model.match(images[rows], ids, mask), model.ground(images[rows], ids, mask)
    sizes = []
    model.image.patches.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    together = model.match_many(images, rows, ids, mask), model.ground_many(images, rows, ids, mask)
    assert sizes == [2, 2]
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("rerun", [0, 2])
def test_a_text_is_matched_with_what_its_box_holds(rerun):
    model, batch = tiny(rerun_blocks=rerun), some_batch()
    rows, texts = batch.region_image, (batch.region_ids, batch.region_mask)
    found = model.match_regions(batch.images, batch.region_boxes, rows, *texts)
    _, visual, seen = model.encode_regions(batch.images, batch.region_boxes, rows)
    expected = model.match_logits(model.fuse(model.encode_text(*texts), batch.region_mask, visual, seen)).softmax(1)
    assert torch.allclose(found, expected[:, 1])
    whole = model.match_many(batch.images, rows, *texts)
    assert torch.allclose(found[:1], whole[:1]) and not torch.isclose(found[1:], whole[1:]).any()  # box 0 is the image


def test_losses_are_those_of_the_config_and_boxes_need_regions():
    batch = some_batch()
    pairs = Batch(batch.images, batch.ids, batch.mask, batch.image_ids)
    no_phrases = dataclasses.replace(
        batch, **{name: getattr(batch, name)[:0] for name in vars(batch) if name.startswith("region_")}
    )
    every = ["itc", "itm", "mlm", "box_l1", "box_giou"]
    assert list(tiny().losses(batch)) == every
    assert list(tiny().losses(pairs)) == list(tiny().losses(no_phrases)) == every[:3]
    for name in every:
        assert list(tiny(losses=(name,)).losses(batch)) == [name]


def test_every_parameter_learns():
    for model in (tiny(), tiny(rerun_blocks=2)):
        sum(model.losses(some_batch()).values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_losses_at_initialisation_are_a_blind_guess():
    torch.set_default_dtype(torch.float32)
    model = XVLM(XVLMConfig.nano(300))
    batch = some_batch(images=8, regions=48)
    batch.images = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        losses = model.losses(batch)
    assert losses["itm"].item() == pytest.approx(math.log(2), abs=0.1)
    assert losses["mlm"].item() == pytest.approx(math.log(300), abs=0.8)
    assert losses["itc"].item() == pytest.approx(math.log(48), abs=2.5)
    assert losses["box_l1"].item() < 1.5 and losses["box_giou"].item() < 2


def test_padding_changes_nothing():
    model, batch = tiny(), some_batch()
    longer = torch.nn.functional.pad(batch.ids, (0, 4), value=9), torch.nn.functional.pad(batch.mask, (0, 4))
    for verb in (model.match, model.ground, model.similarity):
        assert torch.allclose(verb(batch.images, batch.ids, batch.mask), verb(batch.images, *longer))
    filled, longer_filled = model.fill(batch.images, batch.ids, batch.mask), model.fill(batch.images, *longer)
    assert torch.allclose(filled[batch.mask], longer_filled[:, :LENGTH][batch.mask])
    plain = Batch(batch.images, batch.ids, batch.mask, batch.image_ids)
    negatives = Negatives(torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    labels = torch.where(torch.arange(LENGTH) == 1, batch.ids, IGNORE)
    padded = torch.nn.functional.pad(labels, (0, 4), value=IGNORE)
    one = model.losses(plain, negatives, Masked(batch.ids, labels))
    two = model.losses(dataclasses.replace(plain, ids=longer[0], mask=longer[1]), negatives, Masked(longer[0], padded))
    assert all(torch.allclose(one[name], two[name]) for name in one)


def test_shapes_and_ranges_of_the_verbs():
    model, batch = tiny(), some_batch()
    ids, mask = some_texts(5)
    assert model.encode_image(batch.images).shape == (3, 17, 32)
    assert model.similarity(batch.images, ids, mask).shape == (3, 5)
    for vectors in (model.embed_images(batch.images), model.embed_texts(ids, mask)):
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)))
    for value in (model.match(batch.images, batch.ids, batch.mask), model.ground(batch.images, batch.ids, batch.mask)):
        assert ((value > 0) & (value < 1)).all()
    assert model.fill(batch.images, batch.ids, batch.mask).shape == (3, LENGTH, WORDS)


def test_phrases_of_one_box_are_never_each_others_negatives():
    batch = some_batch(images=1, regions=4)
    batch.region_boxes[:] = batch.region_boxes[1]
    model = tiny(losses=("itc", "itm"))
    losses = model.losses(batch)  # no wrong pair in the whole batch
    _, visual, seen = model.encode_regions(batch.images, batch.region_boxes, batch.region_image)
    words = model.encode_text(batch.region_ids, batch.region_mask)
    logits = model.embed_visual(visual) @ model.embed_words(words).T / model.temperature
    equal_shares = -(logits.log_softmax(dim=0).mean() + logits.log_softmax(dim=1).mean()) / 2
    assert torch.allclose(losses["itc"], equal_shares)
    right = model.match_logits(model.fuse(words, batch.region_mask, visual, seen))
    assert torch.allclose(losses["itm"], -right.log_softmax(dim=-1)[:, 1].mean())
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2]]).repeat(3, 1)
    boxes[2, 0] = 0.6
    assert same_place(torch.tensor([1, 1, 1]), boxes).tolist() == [0, 0, 1]
    assert len(set(same_place(torch.tensor([1, 2, 3]), boxes).tolist())) == 3


def test_match_is_the_probability_that_the_loss_pushes_up():
    model, batch = tiny(losses=("itm",)), some_batch(images=1)
    pair = Batch(batch.images, batch.ids, batch.mask, batch.image_ids)  # alone: nothing to draw a wrong pair from
    assert torch.allclose(model.losses(pair)["itm"], -model.match(batch.images, batch.ids, batch.mask).log().mean())


def test_contrast_shares_among_all_that_belong_together():
    # places p, p, q with the words a, b, a: to the first row all three belong, to the others two
    batch = some_batch(images=1, regions=3)
    batch.region_boxes[0], batch.region_boxes[1] = batch.region_boxes[2], batch.region_boxes[2]
    batch.region_boxes[2] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    batch.region_ids[2], batch.region_mask[2] = batch.region_ids[0], batch.region_mask[0]
    model = tiny(losses=("itc",))
    v = model.embed_regions(batch.images, batch.region_boxes, batch.region_image)
    logits = v @ model.embed_texts(batch.region_ids, batch.region_mask).T / model.temperature
    share = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1]]) / torch.tensor([[3], [2], [2]])
    rows, columns = (-(share * table.log_softmax(dim=1)).sum(dim=1).mean() for table in (logits, logits.T))
    assert torch.allclose(model.losses(batch)["itc"], (rows + columns) / 2)


def test_special_tokens_are_not_hidden_and_pieces_of_a_word_together():
    continues = torch.zeros(WORDS, dtype=torch.bool)
    continues[20:] = True
    model = XVLM(dataclasses.replace(tiny().config, mask_rate=0.5), continues)
    ids = torch.tensor([[1, 7, 21, 8, 22, 2, 0]]).repeat(200, 1)
    hidden, labels = model.hide_words(ids, ids > 0)
    asked = labels != IGNORE
    assert not asked[:, [0, 5, 6]].any() and asked.any(dim=1).all()
    assert torch.equal(asked[:, 1], asked[:, 2]) and torch.equal(asked[:, 3], asked[:, 4])
    assert (hidden == model.config.mask_id).any() and (hidden > 22).any()  # random words from the whole vocabulary


def test_other_image_sizes_and_shapes():
    model = tiny()
    wide = torch.randn(2, 3, 32, 48)
    whole, regions, seen = model.encode_regions(wide, torch.tensor([[0.25, 0.5, 0.5, 1.0]]), torch.tensor([1]))
    assert whole.shape == (2, 25, 32) and seen[0, 1:].view(4, 6).tolist() == [[True] * 3 + [False] * 3] * 4


def test_temperature_stays_in_range():
    model = tiny()
    for value, kept in ((-1.0, 0.001), (3.0, 0.5), (0.1, 0.1)):
        model.temperature.data.fill_(value)
        model.after_step()
        assert model.temperature.item() == pytest.approx(kept)


def test_parameter_counts():
    with torch.device("meta"):
        count = {
            name: sum(p.numel() for p in XVLM(getattr(XVLMConfig, name)()).parameters()) for name in ("nano", "paper")
        }
    # published: 216 M. Swin-B 86.7, text half of BERT-base 66.4, fusing half 59.1, heads and projections the rest;
    # BERT's second token-type row, which nothing reads, is not there
    assert count["paper"] == 215_635_705 and round(count["paper"] / 1e6) == 216
    assert count["nano"] < 2.1e6
