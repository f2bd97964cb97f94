"""ViLT: the released model's numbers and transformers' to 1e-9, and what the losses may and may not depend on."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from released import Comparison, four_heads, golden_masked, golden_text, release_for, released_model
from small_models import (
    LENGTH,
    VOCABULARY,
    assert_exact_without_shortcuts,
    assert_masks_whole_words,
    jittered,
    longer,
    mask_some,
    recorded_maps,
    small_config,
    some_batch,
    some_texts,
)

from minivlp.data.batch import Batch, Text
from minivlp.data.text import load_tokenizer
from minivlp.layers.attention import record_attention
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.transformer import BlockConfig
from minivlp.models.vilt import MaskedPatches, ViLT, ViLTConfig
from minivlp.models.vilt_answers import AnswersConfig, ViLTAnswers
from minivlp.models.xvlm import XVLM, XVLMConfig
from minivlp.objectives.alignment import cosine_cost, inner_words
from minivlp.objectives.contrastive import find_positives
from minivlp.objectives.masking import IGNORE, TokenMasking, WordMasking, masked_loss
from minivlp.objectives.matching import matching_loss
from minivlp.papers import PAPERS
from minivlp.training.checkpoint import bundled, load_model, save_model
from minivlp.visualize.attention import grad_cam

pytestmark = pytest.mark.usefixtures("float64")


# ---------------------------------------------------------------------------------------------- the released weights


def sizes(norm_eps: float, hidden: int, vocabulary: int = 60, length: int = 10) -> dict:
    """The sizes of the golden models and of transformers' tiny ones."""
    block = BlockConfig(32, 4, hidden, norm_eps=norm_eps)
    text = TextConfig(vocabulary, length, 0, block, embed_norm=True, position_std=0.02)
    return {"image": ImageConfig(32, 8, 2, block), "text": text}


def real_first(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rows (B, K, ...) in the order of the golden files: real tokens first, then zeros."""
    kept = [row[keep] for row, keep in zip(tokens, mask, strict=True)]
    return torch.stack([F.pad(row, (0, 0) * (row.dim() - 1) + (0, tokens.shape[1] - len(row))) for row in kept])


def test_every_number_of_the_released_model(golden):
    g = golden("vilt_official")
    same, inputs = Comparison(g), g.inputs
    pretrained = {name: tensor for name, tensor in g.state.items() if not name.startswith("vqa_")}
    config = four_heads(release_for("vilt", pretrained).config(pretrained, {}))
    model = released_model("vilt", pretrained, replace(config, losses=("itm", "mlm", "wpa", "mpp")))
    images, pixel_mask = inputs["pixel_values"], inputs["pixel_mask"]
    text, pad = golden_text(inputs), inputs["attention_mask"][..., None]

    image = model.joint.embed_images(images, pixel_mask)
    fused = model.cross_encode(images, text, pixel_mask=pixel_mask)
    same("text_tokens", fused[:, :10] * pad)
    same("image_tokens", real_first(fused[:, 10:], image.mask))
    same("image_mask", real_first(image.mask.long(), image.mask))
    same("pooled", model.match_head.pooler(fused))

    masked = golden_masked(inputs)
    predicted = masked.labels != IGNORE
    logits = model.mlm_logits(images, masked.text, pixel_mask)[predicted]
    mlm = masked_loss(logits, masked.labels[predicted])
    same("mlm_logits", logits)
    same("loss_mlm", mlm)

    matched = inputs["itm_perm"] < 2
    same("itm_labels", matched.long())
    shown = torch.where(matched[:, None, None, None], images, inputs["false_pixel_values"])
    fused = model.cross_encode(shown, text, pixel_mask=pixel_mask)
    logits = model.match_head(fused)
    itm = matching_loss(logits[matched], logits[~matched])
    same("itm_logits", logits)
    same("loss_itm", itm)
    assert torch.allclose(model.match(shown, text, pixel_mask), logits.softmax(1)[:, 1], atol=1e-12)

    alignment = model.alignment(fused, text.mask, image.mask, matched)
    counted = inner_words(text.mask)[..., None] & F.pad(image.mask[:, None, 1:], (1, 0))  # (B, L, 1+P)
    cost = F.pad(cosine_cost(fused[:, :10], fused[:, 11:]), (1, 0)) * counted
    same("wpa_cost", real_first(cost.mT, image.mask).mT)
    same("wpa_plan", real_first(F.pad(alignment.plan, (1, 0)).mT, image.mask))
    same("wpa_distance", alignment.distance)
    same("loss_wpa", alignment.loss)

    (mlm + itm + alignment.loss).backward()
    same.gradients("vilt", model, state=pretrained)

    patches = MaskedPatches(inputs["mpp_masked"], inputs["mpp_replaced"])
    logits, labels = model.predict_patches(images, text, patches, pixel_mask)
    same("loss_mpp", masked_loss(logits, labels))
    table = torch.full((4, 17, 3), -100)
    table[F.pad(patches.predicted, (1, 0)) & image.mask] = labels
    same("mpp_labels", real_first(table + 100, image.mask) - 100)  # padding has the label -100 there, too
    same("mpp_logits", logits[..., ::8])

    answers = released_model("vilt", g.state, four_heads(release_for("vilt", g.state).config(g.state, {})))
    logits = answers.answer(images, text, pixel_mask)
    same("vqa_logits", logits)
    same("loss_vqa", F.binary_cross_entropy_with_logits(logits, inputs["vqa_targets"]) * 7)
    assert same.done == set(g.outputs)


def test_every_number_of_transformers_heads(golden):
    g = golden("vilt_hf_heads")
    same, inputs = Comparison(g), g.inputs
    images, pixel_mask, text = inputs["pixel_values"], inputs["pixel_mask"], golden_text(inputs)

    def ours(prefix: str, config, images_per_text: int = 1):
        state = {n.removeprefix(prefix): t for n, t in g.state.items() if n.startswith(prefix)}
        kinds = "vilt.embeddings.token_type_embeddings.weight"  # the third is NLVR2's second image
        return released_model("vilt", state | {kinds: state[kinds][: 1 + images_per_text]}, config)

    answers = ours("nlvr2.", AnswersConfig(**sizes(1e-12, 64), answers=2, images_per_text=2), 2)
    logits = answers.answer(inputs["pixel_values_pair"], text)
    same("nlvr2_logits", logits)
    same("loss_nlvr2", F.cross_entropy(logits, inputs["nlvr2_labels"]))
    batch = Batch(inputs["pixel_values_pair"], text, torch.arange(4), answers=inputs["nlvr2_labels"])
    same("loss_nlvr2", answers.losses(batch)["answering"])

    answers = ours("vqa.", AnswersConfig(**sizes(1e-12, 64), answers=7))
    logits = answers.answer(images, text, pixel_mask)
    same("vqa_logits", logits)
    same("loss_vqa", F.binary_cross_entropy_with_logits(logits, inputs["vqa_targets"]) * 7)

    model = ours("retrieval.", ViLTConfig(**sizes(1e-12, 64)))
    image, fused = model.joint.embed_images(images, pixel_mask), model.cross_encode(images, text, pixel_mask=pixel_mask)
    same("text_tokens", fused[:, :10] * text.mask[..., None])
    same("image_tokens", real_first(fused[:, 10:], image.mask))
    same("pooled", model.match_head.pooler(fused))
    same("retrieval_logits", model.match_head(fused)[:, 1:])

    model, masked = ours("mlm.", ViLTConfig(**sizes(1e-12, 64))), golden_masked(inputs)
    predicted = masked.labels != IGNORE
    logits = model.mlm_logits(images, masked.text, pixel_mask)[predicted]
    same("mlm_logits", logits)
    same("loss_mlm", masked_loss(logits, masked.labels[predicted]))
    assert same.done == set(g.outputs)


@pytest.fixture
def reference():
    """transformers' ViLT classes of a tiny size, every parameter changed, and inputs with padding of both kinds."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViltConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=32, patch_size=8, max_position_embeddings=12, hidden_dropout_prob=0.0,
    )  # fmt: skip

    def both(kind: str) -> tuple[torch.nn.Module, ViLT]:
        theirs = jittered(getattr(transformers, kind)(config).double().eval())
        state = {name: tensor.detach() for name, tensor in theirs.state_dict().items()}
        ours = release_for("vilt", state).config(state, config.to_dict())
        assert (ours.image, ours.text) == tuple(sizes(1e-12, 64, vocabulary=50, length=12).values())
        return theirs, released_model("vilt", state, ours)

    text = Text(torch.randint(5, 50, (3, 9)), torch.arange(9) < torch.tensor([[9], [4], [7]]))
    pixel_mask = torch.zeros(3, 40, 32, dtype=torch.long)
    for row, (height, width) in enumerate([(40, 32), (16, 32), (24, 8)]):
        pixel_mask[row, :height, :width] = 1
    images = torch.randn(3, 3, 40, 32) * pixel_mask[:, None]
    theirs = {"input_ids": text.ids, "attention_mask": text.mask.long()}
    theirs |= {"pixel_values": images, "pixel_mask": pixel_mask}
    return SimpleNamespace(both=both, text=text, ours=(images, text, pixel_mask), theirs=theirs)


def test_equal_to_transformers_masked_tokens_on_images_of_three_shapes(reference):
    r, (theirs, model) = reference, reference.both("ViltForMaskedLM")
    labels = torch.where((torch.rand(3, 9) < 0.4) & r.text.mask, r.text.ids, IGNORE)
    out = theirs(**r.theirs, labels=labels)
    ours = model.mlm_logits(*r.ours)
    assert (ours - out.logits)[r.text.mask].abs().max() < 1e-10
    assert (masked_loss(ours, labels) - out.loss).abs() < 1e-10


def test_equal_to_transformers_retrieval(reference):
    r, (theirs, model) = reference, reference.both("ViltForImageAndTextRetrieval")
    out = theirs(**r.theirs)
    assert (model.match(*r.ours) - out.logits[:, 0].sigmoid()).abs().max() < 1e-10


def test_parameter_counts():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.ViltModel(transformers.ViltConfig())  # its defaults are ViLT-B/32
        models = {name: ViLT(getattr(ViLTConfig, name)()) for name in ("nano", "small", "paper")}
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    paper = models["paper"]
    heads = sum(p.numel() for head in (paper.match_head.classifier, paper.mlm_head) for p in head.parameters())
    # BERT's two token-type rows are not there: the one that is ever read is added to the positions
    assert count["paper"] - heads == theirs.num_parameters() - 2 * 768 == 111_593_472
    other = ("joint.text_embed.", "joint.token_type")
    vit = [p.numel() for n, p in paper.named_parameters() if n.startswith("joint.") and not n.startswith(other)]
    assert sum(vit) == 87_528_192  # the ViT-B/32 alone
    assert count["nano"] == 1_179_250 and round(count["small"] / 1e6) == 45


# --------------------------------------------------------------------------------------------------- what must hold

GRID = 4


def tiny_config(learned: bool = False, **changes) -> ViLTConfig:
    config = small_config(ViLT)
    published = {"two_step_patches": False, "sincos_positions": False} if learned else {}
    return replace(config, **{"image": replace(config.image, layers=3, **published), **changes})


def tiny(learned: bool = False, **changes) -> ViLT:
    """Three layers; learned: the published patches and positions."""
    return jittered(ViLT(tiny_config(learned, **changes)))


def test_text_first_then_class_token_then_patches_each_with_its_token_type():
    model, batch = tiny(), some_batch(2)
    received = {}
    model.joint.blocks[0].register_forward_pre_hook(lambda _, inputs: received.update(x=inputs[0], mask=inputs[1]))
    model.cross_encode(batch.images, batch.text)
    embed, kinds = model.joint.text_embed, model.joint.token_type
    words = embed.token(batch.text.ids) + embed.position[:LENGTH]
    words = F.layer_norm(words, (32,), embed.norm.weight, embed.norm.bias, 1e-12)
    assert torch.equal(received["x"][:, :LENGTH], words + kinds[0])  # the token type comes after the LayerNorm
    assert torch.allclose(received["x"][:, LENGTH:], model.joint.image_embed(batch.images) + kinds[1])
    mask = received["mask"][:, 0, 0]
    assert torch.equal(mask[:, :LENGTH], batch.text.mask) and mask[:, LENGTH:].all()
    first = model.joint.embed_images(batch.images).tokens[:, 0]
    assert torch.equal(first, (model.joint.image_embed.class_token + kinds[1]).expand(2, -1))


def test_every_token_attends_to_every_other_and_none_to_padding():
    model, batch = tiny(), some_batch(3)
    pixel_mask = torch.ones(3, 32, 32)
    pixel_mask[1, 16:] = 0
    maps = recorded_maps(model, lambda: model.match(batch.images, batch.text, pixel_mask))
    assert list(maps) == ["joint.0.self", "joint.1.self", "joint.2.self"]
    real = torch.ones(3, 1 + GRID**2, dtype=torch.bool)
    real[1, 1 + 8 :] = False
    keys = torch.cat([batch.text.mask, real], dim=1)
    for weights in maps.values():  # of all queries, although the last block computes the first alone
        assert weights.shape == (3, 2, LENGTH + 17, LENGTH + 17)
        by_key = weights.transpose(2, 3)
        assert (by_key[keys[:, None].expand(-1, 2, -1)] > 0).all()
        assert (by_key[~keys[:, None].expand(-1, 2, -1)] == 0).all()


def test_grad_cam_reaches_every_layer():
    model, batch = tiny(), some_batch(2)
    names = [f"joint.{n}.self" for n in range(3)]
    cams = grad_cam(model, lambda: model.match(batch.images, batch.text), names)
    assert all(cams[name].shape == (2, LENGTH + 17, LENGTH + 17) and cams[name].any() for name in names)
    assert not cams["joint.2.self"][:, 1:].any()  # the last layer's other queries are not read


@pytest.mark.parametrize("learned", [True, False])
def test_padding_of_text_and_image_changes_nothing(learned):
    model, batch = tiny(learned), some_batch(3)
    text = batch.text
    larger = F.pad(batch.images, (0, 16, 0, 8), value=5.0)  # one row and two columns of patches more
    pixel_mask = F.pad(torch.ones(3, 32, 32), (0, 16, 0, 8))
    plain, padded = (batch.images, text), (larger, longer(text), pixel_mask)
    assert torch.allclose(model.match(*plain), model.match(*padded), atol=1e-12)
    logits, other = model.mlm_logits(*plain), model.mlm_logits(*padded)
    assert torch.allclose(logits[text.mask], other[:, :LENGTH][text.mask], atol=1e-12)
    plans = []
    for images, some, pixels in ((*plain, None), padded):
        image = model.joint.embed_images(images, pixels)
        plans.append(model.alignment(model.joint(image, some), some.mask, image.mask).plan)
    assert torch.allclose(plans[0], model.transport(*plain))
    grid = plans[1].unflatten(2, (5, 6))
    assert torch.allclose(plans[0].unflatten(2, (4, 4)), grid[:, :LENGTH, :4, :4], atol=1e-12)
    assert grid[:, :, 4:].sum() == grid[:, :, :, 4:].sum() == grid[:, LENGTH:].sum() == 0


def test_positions_are_those_of_each_images_own_grid():
    model = tiny(learned=True)
    embed = model.joint.image_embed
    alone = model.joint.embed_images(torch.ones(1, 3, 16, 24)).tokens[0, 1:]
    pixel_mask = torch.zeros(1, 40, 40)
    pixel_mask[0, :16, :24] = 1
    among = model.joint.embed_images(torch.ones(1, 3, 40, 40), pixel_mask)
    assert torch.allclose(among.tokens[0, among.mask[0]][1:], alone) and among.mask.sum() == 7
    table = embed.positions.unflatten(0, (4, 4))
    for place, corner in ((0, table[0, 0]), (2, table[0, 3]), (3, table[3, 0]), (5, table[3, 3])):
        assert torch.allclose(embed.positions_on(2, 3)[place], corner)  # corners stay corners
    assert torch.equal(embed.positions_on(4, 4), embed.positions)


def test_losses_are_those_of_the_config():
    batch = some_batch(6)
    every = ("itm", "wpa", "mlm", "mpp")
    assert tuple(tiny(losses=every).losses(batch)) == every
    for name in every:
        assert list(tiny(losses=(name,)).losses(batch)) == [name]
    assert ViLTConfig.nano().losses == ViLTConfig.paper().losses == ("itm", "mlm", "wpa")


def test_matching_and_masked_tokens_are_two_forward_passes_and_no_more():
    batch, passes = some_batch(6), []
    batch.text.mask[:] = True  # one length: no text is split off
    for losses, expected in (("itm", "mlm", "wpa"), [6, 6]), (("itm",), [6]), (("wpa",), [6]), (("mlm",), [6]):
        model = tiny(losses=losses)
        model.joint.norm.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
        passes.clear()
        model.losses(batch)
        assert passes == expected


def test_every_parameter_learns():
    for learned in (False, True):
        model = tiny(learned, losses=("itm", "mlm", "wpa", "mpp"), masking=WordMasking(rate=0.5))
        sum(model.losses(some_batch(6)).values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def some_patches(count: int) -> MaskedPatches:
    """Some patches that are predicted, of which some are replaced."""
    predicted = torch.rand(count, GRID**2) < 0.3
    return MaskedPatches(predicted, predicted & (torch.rand(count, GRID**2) < 0.8))


@pytest.mark.parametrize("losses", [("itm", "mlm", "wpa"), ("itm", "mlm"), ("itm",), ("wpa",), ("mlm", "mpp")])
@pytest.mark.parametrize("negatives", [True, False])
def test_losses_and_gradients_are_those_of_all_tokens_of_all_texts(losses, negatives):
    model, batch = tiny(losses=losses), some_batch(4, negatives=negatives)
    given = {"paired": torch.tensor([0, 3, 2, 1]), "masked": mask_some(batch.text), "patches": some_patches(4)}
    assert_exact_without_shortcuts(model, batch, **given)


def test_answers_are_those_of_all_tokens():
    config = AnswersConfig(**sizes(1e-6, 64), answers=5, images_per_text=2)
    batch = Batch(torch.randn(4, 2, 3, 32, 32), some_texts(4), torch.arange(4), answers=torch.tensor([0, 4, 2, 2]))
    assert_exact_without_shortcuts(jittered(ViLTAnswers(config)), batch)


def test_losses_at_initialization_are_those_of_chance():
    torch.set_default_dtype(torch.float32)
    model = ViLT(replace(ViLTConfig.nano(300), losses=("itm", "mlm", "wpa", "mpp")))
    with torch.no_grad():
        losses = model.losses(some_batch(16, side=64))
    assert losses["itm"].item() == pytest.approx(math.log(2), abs=0.25)  # the head's initial weights are not 0
    assert losses["mlm"].item() == pytest.approx(math.log(300), abs=0.8)
    assert losses["mpp"].item() == pytest.approx(math.log(256), abs=0.8)
    assert abs(losses["wpa"].item()) < 0.05


def test_given_choices_decide_the_losses():
    model, batch = tiny(), some_batch(4)
    paired, masked = torch.tensor([0, 3, 2, 1]), mask_some(batch.text)
    losses = model.losses(batch, paired=paired, masked=masked)
    again = model.losses(batch, paired=paired, masked=masked)
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    matched = model.match(batch.images[paired], batch.text)
    expected = -torch.cat([matched[[0, 2]].log(), (1 - matched[[1, 3]]).log()]).mean()
    assert torch.allclose(losses["itm"], expected)
    # masked tokens are predicted with the matching image
    logits = model.mlm_logits(batch.images, masked.text)
    assert torch.allclose(losses["mlm"], masked_loss(logits, masked.labels))
    fused = model.cross_encode(batch.images[paired], batch.text)
    image_mask, own = torch.ones(4, 17, dtype=torch.bool), torch.tensor([True, False, True, False])
    assert torch.allclose(losses["wpa"], model.alignment(fused, batch.text.mask, image_mask, own).loss)


def test_half_the_rows_keep_their_image_and_the_others_never_get_a_matching_one():
    model, batch = tiny(), some_batch(7)
    batch.image_ids = torch.tensor([1, 1, 2, 3, 4, 5, 5])  # two captions of one image, twice
    for part in (batch.text.ids, batch.text.mask):
        part[3] = part[2]  # two images with one caption
    positives = find_positives(batch.image_ids, batch.text)
    drawn = torch.stack([model.draw_images(positives) for _ in range(300)])
    own = torch.arange(7)
    assert ((drawn == own).sum(1) == 3).all()  # of 7, the released code's 7 // 2
    assert ((drawn == own).sum(0) > 60).all()  # any row may be among them
    pairs = {(row, image) for draw in drawn.tolist() for row, image in enumerate(draw) if row != image}
    same = {frozenset((0, 1)), frozenset((5, 6)), frozenset((2, 3))}
    assert pairs == {(i, j) for i in range(7) for j in range(7) if i != j and frozenset((i, j)) not in same}


def test_without_any_negative_all_rows_match():
    model, batch = tiny(), some_batch(3)
    batch.image_ids[:] = 7
    assert model.encode(batch).paired.tolist() == [0, 1, 2]
    losses = model.losses(batch)
    matched = model.match(batch.images, batch.text)
    assert torch.allclose(losses["itm"], -matched.log().mean()) and losses["wpa"] > 0


@pytest.mark.parametrize("wpa", [True, False])
def test_negative_captions_are_negatives_of_their_own_image(wpa):
    model, batch = tiny(losses=("itm", "wpa") if wpa else ("itm",)), some_batch(3)
    paired = torch.tensor([1, 1, 2])
    plain = model.losses(batch, paired=paired)
    batch.negatives = some_texts(3, LENGTH + 2)
    more = model.losses(batch, paired=paired)
    first = model.match(batch.images[paired], batch.text)
    false = model.match(batch.images, batch.negatives)
    terms = torch.cat([first[1:].log(), (1 - first[:1]).log(), (1 - false).log()])
    assert torch.allclose(more["itm"], -terms.mean())
    if wpa:
        assert torch.allclose(more["wpa"], plain["wpa"])  # most words of a negative caption do have their patch
        assert tiny(losses=("wpa",)).losses(batch)["wpa"].isfinite()


def test_whole_words_or_tokens_are_masked_never_special_ones():
    ids = torch.tensor([[1, 7, 21, 8, 22, 2, 0]]).repeat(3000, 1)
    word = torch.tensor([[-1, 0, 0, 1, 1, -1, -1]]).repeat(3000, 1)
    text = Text(ids, ids > 0, word)
    for masking, whole in ((WordMasking(), True), (TokenMasking(), False)):
        masked, labels = masking.apply(text, VOCABULARY)
        predicted = labels != IGNORE
        assert not predicted[:, [0, 5, 6]].any()
        assert predicted[:, 1:5].float().mean().item() == pytest.approx(0.15, abs=0.02)
        together = (predicted[:, 1] == predicted[:, 2]).all() and (predicted[:, 3] == predicted[:, 4]).all()
        assert bool(together) is whole
        assert (masked.ids[predicted] == 3).float().mean().item() == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize("source", ["checkpoint", "recipe"])
def test_whole_words_are_masked(source):
    if source == "checkpoint":
        model = load_model(ViLT, bundled("vilt_nano"))
    else:
        model = PAPERS["vilt"].recipe("quick").build(ViLT, load_tokenizer())
    assert_masks_whole_words(model)


def test_a_patch_is_replaced_before_it_gets_its_position():
    model, batch = tiny(losses=("mpp",)), some_batch(2)
    chosen = torch.zeros(2, 16, dtype=torch.bool)
    chosen[0, 3] = chosen[1, 5] = True
    masked = MaskedPatches(chosen, chosen)
    logits, labels = model.predict_patches(batch.images, batch.text, masked)
    assert torch.allclose(model.losses(batch, patches=masked)["mpp"], masked_loss(logits, labels))
    assert logits.shape == (2, 3, 256) and labels.shape == (2, 3)
    other = batch.images.clone()
    other[0, :, :8, 24:] = torch.randn(3, 8, 8)  # patch 3 of the first image
    same, new_labels = model.predict_patches(other, batch.text, masked)
    assert torch.allclose(same, logits) and torch.equal(new_labels[1], labels[1])
    visible, _ = model.predict_patches(other, batch.text, MaskedPatches(chosen, torch.zeros_like(chosen)))
    assert not torch.allclose(visible[0], logits[0])
    plain = torch.full((1, 3, 32, 32), -1.0)
    plain[:, 1], plain[:, 2] = 0.0, 1.0
    _, labels = model.predict_patches(plain, batch.text[:1], MaskedPatches(chosen[:1], chosen[:1]))
    assert labels.tolist() == [[0, 127, 255]]


def test_patches_are_masked_at_the_configured_rate():
    real = torch.ones(400, 16, dtype=torch.bool)
    real[:, 8:] = False
    predicted, replaced = tiny(losses=("mpp",)).mask_patches(real)
    assert not predicted[:, 8:].any() and not (replaced & ~predicted).any()
    assert predicted[:, :8].float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert (replaced.sum() / predicted.sum()).item() == pytest.approx(0.8, abs=0.06)


def test_the_plan_transports_words_to_patches():
    model, batch = tiny(), some_batch(3)
    plan = model.transport(batch.images, batch.text)
    inner = inner_words(batch.text.mask)
    assert plan.shape == (3, LENGTH, 16) and torch.allclose(plan.sum((1, 2)), torch.ones(3))
    assert torch.allclose(plan.sum(2), inner / inner.sum(1, keepdim=True))
    assert torch.allclose(plan.sum(1), torch.full((3, 16), 1 / 16), atol=1e-3)


def towers(**changes) -> XVLM:
    """X-VLM with towers of two layers that fit `tiny`."""
    own = tiny_config()
    image = replace(own.image, layers=2, **changes)
    text = replace(own.text, layers=2, block=image.block, embed_norm=False)
    return jittered(XVLM(replace(XVLMConfig.nano(VOCABULARY), image=image, text=text)))


def test_it_starts_from_the_towers_of_another_model():
    model, other, batch = tiny(), towers(), some_batch(2)
    fresh = copy.deepcopy(model.joint)
    model.init_from(other)
    assert torch.equal(model.joint.image_embed(batch.images), other.image.embed(batch.images))
    x = torch.randn(2, 5, 32)
    for mine, theirs in zip(model.joint.blocks, other.image.blocks, strict=False):
        assert torch.equal(mine(x), theirs(x))
    assert torch.equal(model.joint.blocks[2](x), fresh.blocks[2](x))  # the towers have two layers only
    assert torch.equal(model.joint.norm.weight, fresh.norm.weight)
    assert torch.equal(model.joint.text_embed.token.weight, other.text.embed.token.weight)
    assert torch.equal(model.joint.text_embed.position, other.text.embed.position)
    with torch.no_grad():
        other.text.embed.token.weight.zero_()
    assert model.joint.text_embed.token.weight.any()  # copied, not shared
    shallow = tiny(image=replace(model.config.image, layers=1))
    shallow.init_from(other)
    assert torch.equal(shallow.joint.blocks[0](x), other.image.blocks[0](x))
    answers = ViLTAnswers(AnswersConfig(**sizes(1e-6, 64)))
    for joint in (tiny(learned=True).joint, answers.joint):
        with pytest.raises(ValueError, match="embed images in another way"):
            joint.init_from(other)
    published = towers(two_step_patches=False, sincos_positions=False)
    learned = tiny(learned=True)
    learned.init_from(published)
    assert torch.equal(learned.joint.image_embed(batch.images), published.image.embed(batch.images))
    untouched = tiny()
    before = {name: value.clone() for name, value in untouched.state_dict().items()}
    with pytest.raises(ValueError, match="embed images in another way"):
        untouched.init_from(published)
    wider = jittered(XVLM(XVLMConfig.nano(VOCABULARY)))
    with pytest.raises(ValueError, match="other sizes .*image_embed.class_token"):
        untouched.init_from(wider)
    assert all(torch.equal(value, before[name]) for name, value in untouched.state_dict().items())


def test_nano_starts_from_the_nano_towers():
    torch.set_default_dtype(torch.float32)
    model, other = ViLT(ViLTConfig.nano()), XVLM(XVLMConfig.nano())
    model.init_from(other)
    assert torch.equal(model.joint.image_embed.class_token, other.image.embed.class_token)


def test_what_does_not_fit_is_refused_and_there_are_no_verbs_for_one_modality():
    nano = ViLTConfig.nano(VOCABULARY)
    with pytest.raises(ValueError, match="no layers of its own"):
        ViLT(replace(nano, text=replace(nano.text, layers=2)))
    with pytest.raises(ValueError, match="cannot be cut"):
        tiny().match(torch.randn(1, 3, 32, 36), some_texts(1))
    assert not any(hasattr(ViLT, verb) for verb in ("encode_image", "similarity", "embed_images", "ground", "answer"))
    assert not hasattr(ViLTAnswers, "match") and not hasattr(ViLTAnswers, "mlm_logits")


def test_losses_and_logits_are_float32_under_autocast():
    torch.set_default_dtype(torch.float32)
    model, batch = tiny(losses=("itm", "mlm", "wpa", "mpp"), masking=WordMasking(rate=0.5)), some_batch(6)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(batch)
        # the loss itself would not show it: cross-entropy casts its input to float32
        match_logits = model.match_head(model.cross_encode(batch.images, batch.text))
        logits = match_logits, model.mlm_logits(batch.images, batch.text)
    assert all(value.dtype == torch.float32 for value in (*losses.values(), *logits))
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


def test_saved_and_loaded_again(tmp_path):
    torch.set_default_dtype(torch.float32)
    batch = some_batch(2)
    for model in (tiny(), jittered(ViLTAnswers(AnswersConfig(**sizes(1e-6, 64), answers=7, images_per_text=2)))):
        save_model(model, tmp_path / "model.safetensors")
        other = load_model(type(model), tmp_path / "model.safetensors")
        assert other.config == model.config
        with record_attention(model) as one, torch.no_grad():
            tokens = model.joint(model.joint.embed_images(batch.images), batch.text)
        with record_attention(other) as two, torch.no_grad():
            assert torch.equal(other.joint(other.joint.embed_images(batch.images), batch.text), tokens)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
