"""ViLT: the released model's numbers and transformers' to 1e-9, and what the losses may and may not depend on."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from released import VIT_LAYER

from minivlp.data.batch import Batch
from minivlp.layers.attention import record_attention
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.models.vilt import AnswersConfig, HiddenPatches, ViLT, ViLTAnswers, ViLTConfig, joint_map
from minivlp.models.xvlm import XVLM, XVLMConfig
from minivlp.objectives.alignment import cosine_cost, inner_words
from minivlp.objectives.masking import IGNORE, Masked, masked_loss
from minivlp.objectives.matching import matching_loss

pytestmark = pytest.mark.usefixtures("float64")


# ---------------------------------------------------------------------------------------------- the released weights

HF_LAYER = {
    "attention.output.dense": "self_attention.out",
    "layernorm_before": "self_norm",
    "layernorm_after": "feed_norm",
    "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down",
}
HEADS = {"transform.dense": "dense", "transform.LayerNorm": "norm", "decoder": "decoder"}
ENDS = ("weight", "bias")


def words_and_modality(state: dict, words: str, modality: str) -> dict:
    return {
        "words.words.weight": state[f"{words}.word_embeddings.weight"],
        "words.positions": state[f"{words}.position_embeddings.weight"]
        + state[f"{words}.token_type_embeddings.weight"][0],
        **{f"words.norm.{end}": state[f"{words}.LayerNorm.{end}"] for end in ENDS},
        "modality": state[modality],
    }


def image_tokens(class_token: torch.Tensor, positions: torch.Tensor) -> dict:
    return {
        "joint.class_token": class_token[0, 0],
        "joint.class_position": positions[0, 0],
        "joint.positions": positions[0, 1:],
    }


def renamed(state: dict, names: dict[str, str]) -> dict:
    """Weight and bias of their modules under our names; what they lack is left out."""
    pairs = [(f"{ours}.{end}", f"{theirs}.{end}") for theirs, ours in names.items() for end in ENDS]
    return {ours: state[theirs] for ours, theirs in pairs if theirs in state}


def from_official(state: dict, layers: int) -> dict:
    names = {"pooler.dense": "pool", "itm_score.fc": "match_head", "transformer.norm": "joint.norm"}
    names |= {"transformer.patch_embed.proj": "joint.patches.project"}
    names |= {f"mlm_score.{t}": f"word_head.{o}" for t, o in HEADS.items()}
    names |= {f"mpp_score.{t}": f"patch_head.{o}" for t, o in HEADS.items()}
    names |= {
        f"transformer.blocks.{n}.{t}": f"joint.blocks.{n}.{o}" for n in range(layers) for t, o in VIT_LAYER.items()
    }
    return {
        **words_and_modality(state, "text_embeddings", "token_type_embeddings.weight"),
        **image_tokens(state["transformer.cls_token"], state["transformer.pos_embed"]),
        **renamed(state, names),
        "word_head.decoder.bias": state["mlm_score.bias"],
        "mask_token": state["transformer.mask_token"][0, 0],
    }


def from_transformers(state: dict, layers: int) -> dict:
    """The part that all of transformers' ViLT classes share."""
    e = "embeddings"
    names = {"pooler.dense": "pool", "layernorm": "joint.norm"}
    names |= {f"{e}.patch_embeddings.projection": "joint.patches.project"}
    names |= {f"encoder.layer.{n}.{t}": f"joint.blocks.{n}.{o}" for n in range(layers) for t, o in HF_LAYER.items()}
    fused = {
        f"joint.blocks.{n}.self_attention.qkv.{end}": torch.cat(
            [state[f"encoder.layer.{n}.attention.attention.{part}.{end}"] for part in ("query", "key", "value")]
        )
        for n in range(layers)
        for end in ENDS
    }
    return {
        **words_and_modality(state, f"{e}.text_embeddings", f"{e}.token_type_embeddings.weight"),
        **image_tokens(state[f"{e}.cls_token"], state[f"{e}.position_embeddings"]),
        **renamed(state, names),
        **fused,
    }


def below(state: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def sizes(image_eps: float, hidden: int, vocabulary=60, length=10) -> dict:
    block, words = BlockConfig(32, 4, hidden, norm_eps=image_eps), BlockConfig(32, 4, hidden, norm_eps=1e-12)
    return {
        "image": ImageConfig(32, 8, 2, block),
        "text": TextConfig(vocabulary, length, 0, words, embed_norm=True),
    }


def valid_first(tokens: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Rows (B, K, ...) in the order of the golden files: what is seen first, then zeros."""
    kept = [row[keep] for row, keep in zip(tokens, seen, strict=True)]
    return torch.stack([F.pad(row, (0, 0) * (row.dim() - 1) + (0, tokens.shape[1] - len(row))) for row in kept])


class Against:
    """Compares by name and remembers what was compared."""

    def __init__(self, golden) -> None:
        self.golden, self.checked = golden, set()

    def same(self, name: str, value: torch.Tensor) -> None:
        expected = self.golden.outputs[name]
        assert value.shape == expected.shape, name
        assert (value.detach().double() - expected.double()).abs().max() <= self.golden.tolerance, name
        self.checked.add(name)


def test_every_number_of_the_released_model(golden):
    g = golden("vilt_official")
    check, given = Against(g), g.inputs
    model = ViLT(ViLTConfig(**sizes(1e-6, 128), losses=("itm", "mlm", "wpa", "mpp")))
    model.load_state_dict(from_official(g.state, 2), strict=False)
    assert len(model.state_dict()) == len(from_official(g.state, 2))
    images, pixel_mask = given["pixel_values"], given["pixel_mask"]
    ids, mask, pad = given["input_ids"], given["attention_mask"].bool(), given["attention_mask"][..., None]

    picture = model.embed_image(images, pixel_mask)
    fused = model.look(picture, ids, mask)
    check.same("text_tokens", fused[:, :10] * pad)
    check.same("image_tokens", valid_first(fused[:, 10:], picture.seen))
    check.same("image_mask", valid_first(picture.seen.long(), picture.seen))
    check.same("pooled", model.pooled(fused))

    masked = Masked(given["mlm_input_ids"], given["mlm_labels"])
    logits = model.guess(picture, masked, mask)
    mlm = masked_loss(logits, masked.labels[masked.labels != IGNORE])
    check.same("mlm_logits", logits)
    check.same("loss_mlm", mlm)
    # `fill` gives the same at the hidden positions
    filled = model.fill(images, masked.ids, mask, pixel_mask)[masked.labels != IGNORE]
    assert torch.allclose(filled, logits, atol=1e-12)

    matched = given["itm_perm"] < 2
    check.same("itm_labels", matched.long())
    shown = torch.where(matched[:, None, None, None], images, given["false_pixel_values"])
    pairs = model.embed_image(shown, pixel_mask)
    fused = model.look(pairs, ids, mask)
    logits = model.match_logits(fused)
    itm = matching_loss(logits[matched], logits[~matched])
    check.same("itm_logits", logits)
    check.same("loss_itm", itm)
    check.same("itm_logits", torch.stack([1 - (p := model.match(shown, ids, mask, pixel_mask)), p], 1).log()
               + logits.logsumexp(dim=1, keepdim=True))  # fmt: skip

    alignment = model.alignment(fused, mask, pairs.seen, matched)
    counted = inner_words(mask)[..., None] & F.pad(pairs.seen[:, None, 1:], (1, 0))  # (B, L, 1+P)
    cost = F.pad(cosine_cost(fused[:, :10], fused[:, 11:]), (1, 0)) * counted
    check.same("wpa_cost", valid_first(cost.mT, pairs.seen).mT)
    check.same("wpa_plan", valid_first(F.pad(alignment.plan, (1, 0)).mT, pairs.seen))
    check.same("wpa_distance", alignment.distance)
    check.same("loss_wpa", alignment.loss)

    (mlm + itm + alignment.loss).backward()
    gradients = {
        "token_type_embeddings.weight": model.modality.grad,
        "transformer.pos_embed": torch.cat([model.joint.class_position.grad[None], model.joint.positions.grad])[None],
        "transformer.norm.weight": model.joint.norm.weight.grad,
        "pooler.dense.weight": model.pool.weight.grad,
        "itm_score.fc.weight": model.match_head.weight.grad,
        "transformer.blocks.0.attn.qkv.bias": model.joint.blocks[0].self_attention.qkv.bias.grad,
        "text_embeddings.word_embeddings.weight": model.words.words.weight.grad,
    }
    for name, value in gradients.items():
        check.same(f"grad.{name}", value)

    hidden = HiddenPatches(given["mpp_masked"], given["mpp_replaced"])
    logits, labels = model.guess_patches(images, ids, mask, hidden, pixel_mask)
    check.same("loss_mpp", masked_loss(logits, labels))
    asked = F.pad(hidden.asked, (1, 0)) & picture.seen
    table = torch.full((4, 17, 3), -100)
    table[asked] = labels
    moved = valid_first(table + 100, picture.seen) - 100  # padding is -100 there, too
    check.same("mpp_labels", moved)
    check.same("mpp_logits", logits[..., ::8])

    answers = ViLTAnswers(AnswersConfig(**sizes(1e-6, 128), answers=7))
    own = {f"answer_head.{n}": v for n, v in below(g.state, "vqa_classifier.").items()}
    shared = {n: v for n, v in from_official(g.state, 2).items() if n in answers.state_dict()}
    answers.load_state_dict(shared | own)
    logits = answers.answer(images, ids, mask, pixel_mask)
    check.same("vqa_logits", logits)
    check.same("loss_vqa", F.binary_cross_entropy_with_logits(logits, given["vqa_targets"]) * 7)
    assert check.checked == set(g.outputs)


def test_every_number_of_transformers_heads(golden):
    g = golden("vilt_hf_heads")
    check, given = Against(g), g.inputs
    images, pixel_mask = given["pixel_values"], given["pixel_mask"]
    ids, mask = given["input_ids"], given["attention_mask"].bool()
    shared = from_transformers(below(g.state, "mlm.vilt."), 2)

    answers = ViLTAnswers(AnswersConfig(**sizes(1e-12, 64), answers=2, images_per_text=2))
    answers.load_state_dict(shared | {f"answer_head.{n}": v for n, v in below(g.state, "nlvr2.classifier.").items()})
    logits = answers.answer(given["pixel_values_pair"], ids, mask)
    check.same("nlvr2_logits", logits)
    check.same("loss_nlvr2", F.cross_entropy(logits, given["nlvr2_labels"]))

    shared["modality"] = shared["modality"][:2]  # the third is NLVR2's second image
    answers = ViLTAnswers(AnswersConfig(**sizes(1e-12, 64), answers=7))
    answers.load_state_dict(shared | {f"answer_head.{n}": v for n, v in below(g.state, "vqa.classifier.").items()})
    logits = answers.answer(images, ids, mask, pixel_mask)
    check.same("vqa_logits", logits)
    check.same("loss_vqa", F.binary_cross_entropy_with_logits(logits, given["vqa_targets"]) * 7)

    model = ViLT(ViLTConfig(**sizes(1e-12, 64)))
    head = {f"mlm.mlm_score.{t}": f"word_head.{o}" for t, o in HEADS.items()}
    model.load_state_dict(shared | renamed(g.state, head) | one_logit(g.state, "retrieval.rank_output"))
    picture = model.embed_image(images, pixel_mask)
    fused = model.look(picture, ids, mask)
    check.same("text_tokens", fused[:, :10] * mask[..., None])
    check.same("image_tokens", valid_first(fused[:, 10:], picture.seen))
    check.same("pooled", model.pooled(fused))
    check.same("retrieval_logits", model.match_logits(fused)[:, 1:])
    masked = Masked(given["mlm_input_ids"], given["mlm_labels"])
    logits = model.guess(picture, masked, mask)
    check.same("mlm_logits", logits)
    check.same("loss_mlm", masked_loss(logits, masked.labels[masked.labels != IGNORE]))
    assert check.checked == set(g.outputs)


def one_logit(state: dict, name: str) -> dict:
    """A head of one logit as our head of two: no match has the logit 0."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return {
        "match_head.weight": torch.cat([torch.zeros_like(weight), weight]),
        "match_head.bias": torch.cat([torch.zeros_like(bias), bias]),
    }


@pytest.fixture
def reference():
    """transformers' ViLT classes of a tiny size, every parameter moved, and inputs with padding of both kinds."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViltConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=32, patch_size=8, max_position_embeddings=12, hidden_dropout_prob=0.0,
    )  # fmt: skip

    def build(kind: str):
        model = getattr(transformers, kind)(config).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        return model

    mask = torch.arange(9) < torch.tensor([[9], [4], [7]])
    pixel_mask = torch.zeros(3, 40, 32, dtype=torch.long)
    for row, (height, width) in enumerate([(40, 32), (16, 32), (24, 8)]):
        pixel_mask[row, :height, :width] = 1
    images = torch.randn(3, 3, 40, 32) * pixel_mask[:, None]
    return SimpleNamespace(build=build, ids=torch.randint(5, 50, (3, 9)), mask=mask, images=images, seen=pixel_mask)


def test_equal_to_transformers_masked_words_on_images_of_three_shapes(reference):
    r, theirs = reference, reference.build("ViltForMaskedLM")
    state = {n: v.detach() for n, v in theirs.state_dict().items()}
    model = ViLT(ViLTConfig(**sizes(1e-12, 64, vocabulary=50, length=12)))
    head = renamed(state, {f"mlm_score.{t}": f"word_head.{o}" for t, o in HEADS.items()})
    head["word_head.decoder.bias"] = state.get("mlm_score.bias", state.get("mlm_score.decoder.bias"))
    model.load_state_dict(from_transformers(below(state, "vilt."), 2) | head, strict=False)
    labels = torch.where((torch.rand(3, 9) < 0.4) & r.mask, r.ids, IGNORE)
    out = theirs(input_ids=r.ids, attention_mask=r.mask.long(), pixel_values=r.images, pixel_mask=r.seen, labels=labels)
    ours = model.fill(r.images, r.ids, r.mask, r.seen)
    assert (ours - out.logits)[r.mask].abs().max() < 1e-10
    assert (masked_loss(ours, labels) - out.loss).abs() < 1e-10


def test_equal_to_transformers_retrieval(reference):
    r, theirs = reference, reference.build("ViltForImageAndTextRetrieval")
    state = {n: v.detach() for n, v in theirs.state_dict().items()}
    model = ViLT(ViLTConfig(**sizes(1e-12, 64, vocabulary=50, length=12)))
    model.load_state_dict(from_transformers(below(state, "vilt."), 2) | one_logit(state, "rank_output"), strict=False)
    out = theirs(input_ids=r.ids, attention_mask=r.mask.long(), pixel_values=r.images, pixel_mask=r.seen)
    assert (model.match(r.images, r.ids, r.mask, r.seen) - out.logits[:, 0].sigmoid()).abs().max() < 1e-10


def test_parameter_counts():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.ViltModel(transformers.ViltConfig())  # its defaults are ViLT-B/32
        models = {name: ViLT(getattr(ViLTConfig, name)()) for name in ("nano", "small", "paper")}
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    paper = models["paper"]
    heads = sum(p.numel() for head in (paper.match_head, paper.word_head) for p in head.parameters())
    # BERT's two token-type rows are not there: the one that is ever read is added to the positions
    assert count["paper"] - heads == theirs.num_parameters() - 2 * 768 == 111_593_472
    assert sum(p.numel() for p in paper.joint.parameters()) == 87_528_192  # the ViT-B/32 alone
    assert count["nano"] == 1_179_250 and round(count["small"] / 1e6) == 45


# --------------------------------------------------------------------------------------------------- what must hold

WORDS, LENGTH, GRID = 40, 9, 4


def moved(model):
    """Every parameter moved, so that nothing hides behind a zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def tiny(learned=False, continues=None, **changes) -> ViLT:
    nano = ViLTConfig.nano(WORDS)
    block = dataclasses.replace(nano.image.block, width=32, heads=2, hidden=64)
    words = dataclasses.replace(block, norm_eps=1e-12)
    published = {"two_step_patches": False, "sincos_positions": False} if learned else {}
    sizes = {
        "image": dataclasses.replace(nano.image, image_size=32, layers=3, block=block, **published),
        "text": dataclasses.replace(nano.text, block=words),
    }
    return moved(ViLT(dataclasses.replace(nano, **{**sizes, **changes}), continues))


def some_batch(count=6) -> Batch:
    mask = torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (count, 1))
    ids = torch.randint(7, WORDS, (count, LENGTH)) * mask
    return Batch(torch.randn(count, 3, 32, 32), ids, mask, torch.arange(count) + 100)


def some_masked(batch: Batch) -> Masked:
    chosen = (torch.arange(LENGTH) == 2).expand_as(batch.mask)
    return Masked(batch.ids.masked_fill(chosen, 3), batch.ids.masked_fill(~chosen, IGNORE))


def test_text_first_then_class_token_then_patches_each_with_its_modality():
    model, batch = tiny(), some_batch(2)
    seen = {}
    model.joint.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0], allowed=inputs[1]))
    picture = model.embed_image(batch.images)
    model.look(picture, batch.ids, batch.mask)
    words = F.layer_norm(
        model.words.words(batch.ids) + model.words.positions[:LENGTH], (32,), model.words.norm.weight,
        model.words.norm.bias, 1e-12,
    )  # fmt: skip
    assert torch.equal(seen["x"][:, :LENGTH], words + model.modality[0])  # the modality comes after the LayerNorm
    assert torch.allclose(seen["x"][:, LENGTH:], model.joint.embed(batch.images) + model.modality[1])
    allowed = seen["allowed"][:, 0, 0]
    assert torch.equal(allowed[:, :LENGTH], batch.mask) and allowed[:, LENGTH:].all()
    assert torch.equal(picture.tokens[:, 0], (model.joint.class_token + model.modality[1]).expand(2, -1))


def test_every_token_looks_at_every_other_and_none_at_padding():
    model, batch = tiny(), some_batch(3)
    pixel_mask = torch.ones(3, 32, 32)
    pixel_mask[1, 16:] = 0
    with record_attention(model) as maps:
        model.match(batch.images, batch.ids, batch.mask, pixel_mask)
    assert list(maps) == ["joint.0.self", "joint.1.self", "joint.2.self"]
    seen = torch.ones(3, 1 + GRID**2, dtype=torch.bool)
    seen[1, 1 + 8 :] = False
    keys = torch.cat([batch.mask, seen], dim=1)
    for weights in maps.values():
        assert weights.shape == (3, 2, LENGTH + 17, LENGTH + 17)
        looked_at = weights.transpose(2, 3)[keys[:, None].expand(-1, 2, -1)]
        assert (looked_at > 0).all()
        assert (weights.transpose(2, 3)[~keys[:, None].expand(-1, 2, -1)] == 0).all()


@pytest.mark.parametrize("learned", [True, False])
def test_padding_of_text_and_image_changes_nothing(learned):
    model, batch = tiny(learned), some_batch(3)
    longer = F.pad(batch.ids, (0, 4), value=9), F.pad(batch.mask, (0, 4))
    larger = F.pad(batch.images, (0, 16, 0, 8), value=5.0)  # one row and two columns of patches more
    pixel_mask = F.pad(torch.ones(3, 32, 32), (0, 16, 0, 8))
    plain, padded = (batch.images, batch.ids, batch.mask), (larger, *longer, pixel_mask)
    assert torch.allclose(model.match(*plain), model.match(*padded), atol=1e-12)
    filled, other = model.fill(*plain), model.fill(*padded)
    assert torch.allclose(filled[batch.mask], other[:, :LENGTH][batch.mask], atol=1e-12)
    plans = [
        model.alignment(model.look(p, i, m), m, p.seen).plan
        for p, i, m in ((model.embed_image(plain[0]), *plain[1:]), (model.embed_image(larger, pixel_mask), *longer))
    ]
    grid = plans[1].unflatten(2, (5, 6))
    assert torch.allclose(plans[0].unflatten(2, (4, 4)), grid[:, :LENGTH, :4, :4], atol=1e-12)
    assert grid[:, :, 4:].sum() == grid[:, :, :, 4:].sum() == grid[:, LENGTH:].sum() == 0


def test_positions_are_those_of_each_images_own_grid():
    model = tiny(learned=True)
    alone = model.embed_image(torch.ones(1, 3, 16, 24)).tokens[0, 1:]
    pixel_mask = torch.zeros(1, 40, 40)
    pixel_mask[0, :16, :24] = 1
    among = model.embed_image(torch.ones(1, 3, 40, 40), pixel_mask)
    assert torch.allclose(among.tokens[0, among.seen[0]][1:], alone) and among.seen.sum() == 7
    table = model.joint.positions.unflatten(0, (4, 4))
    for place, corner in ((0, table[0, 0]), (2, table[0, 3]), (3, table[3, 0]), (5, table[3, 3])):
        assert torch.allclose(model.positions_on(2, 3)[place], corner)  # corners stay corners
    assert torch.equal(model.positions_on(4, 4), model.joint.positions)


def test_losses_are_those_of_the_config():
    batch = some_batch()
    every = ("itm", "wpa", "mlm", "mpp")
    assert tuple(tiny(losses=every).losses(batch)) == every
    for name in every:
        assert list(tiny(losses=(name,)).losses(batch)) == [name]
    assert ViLTConfig.nano().losses == ViLTConfig.paper().losses == ("itm", "mlm", "wpa")


def test_matching_and_words_are_two_forward_passes_and_no_more():
    batch, passes = some_batch(), []
    for losses, expected in (("itm", "mlm", "wpa"), [6, 6]), (("itm",), [6]), (("wpa",), [6]), (("mlm",), [6]):
        model = tiny(losses=losses)
        model.joint.norm.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
        passes.clear()
        model.losses(batch)
        assert passes == expected


def test_every_parameter_learns():
    for learned in (False, True):
        model = tiny(learned, losses=("itm", "mlm", "wpa", "mpp"), mask_rate=0.5)
        sum(model.losses(some_batch()).values()).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_losses_at_initialisation_are_a_blind_guess():
    torch.set_default_dtype(torch.float32)
    model = ViLT(dataclasses.replace(ViLTConfig.nano(300), losses=("itm", "mlm", "wpa", "mpp")))
    batch = some_batch(16)
    batch.images = torch.randn(16, 3, 64, 64)
    with torch.no_grad():
        losses = model.losses(batch)
    assert losses["itm"].item() == pytest.approx(math.log(2), abs=0.25)  # the head starts with some opinion
    assert losses["mlm"].item() == pytest.approx(math.log(300), abs=0.8)
    assert losses["mpp"].item() == pytest.approx(math.log(256), abs=0.8)
    assert abs(losses["wpa"].item()) < 0.05


def test_given_choices_decide_the_losses():
    model, batch = tiny(), some_batch(4)
    paired, masked = torch.tensor([0, 3, 2, 1]), some_masked(batch)
    losses = model.losses(batch, paired, masked)
    again = model.losses(batch, paired, masked)
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    right = model.match(batch.images[paired], batch.ids, batch.mask)
    expected = -torch.cat([right[[0, 2]].log(), (1 - right[[1, 3]]).log()]).mean()
    assert torch.allclose(losses["itm"], expected)
    # words are asked beside the true image
    filled = model.fill(batch.images, masked.ids, batch.mask)
    assert torch.allclose(losses["mlm"], masked_loss(filled, masked.labels))
    picture = model.embed_image(batch.images[paired])
    fused = model.look(picture, batch.ids, batch.mask)
    matched = torch.tensor([True, False, True, False])
    assert torch.allclose(losses["wpa"], model.alignment(fused, batch.mask, picture.seen, matched).loss)


def test_half_the_rows_keep_their_image_the_others_never_get_one_that_fits():
    model, batch = tiny(), some_batch(7)
    batch.image_ids = torch.tensor([1, 1, 2, 3, 4, 5, 5])  # two captions of one image, twice
    batch.ids[3], batch.mask[3] = batch.ids[2], batch.mask[2]  # two images with one caption
    seen = torch.stack([model.draw_images(batch) for _ in range(300)])
    own = torch.arange(7)
    assert ((seen == own).sum(1) == 3).all()  # of 7, the released code's 7 // 2
    assert ((seen == own).sum(0) > 60).all()  # any row may be among them
    pairs = {(row, image) for draw in seen.tolist() for row, image in enumerate(draw) if row != image}
    together = {frozenset((0, 1)), frozenset((5, 6)), frozenset((2, 3))}
    assert pairs == {(i, j) for i in range(7) for j in range(7) if i != j and frozenset((i, j)) not in together}


def test_without_any_wrong_partner_all_rows_match():
    model, batch = tiny(), some_batch(3)
    batch.image_ids[:] = 7
    assert model.draw_images(batch).tolist() == [0, 1, 2]
    losses = model.losses(batch)
    right = model.match(batch.images, batch.ids, batch.mask)
    assert torch.allclose(losses["itm"], -right.log().mean()) and losses["wpa"] > 0


def test_false_captions_are_wrong_pairs_of_their_own_image():
    model, batch = tiny(losses=("itm", "wpa")), some_batch(3)
    paired = torch.tensor([1, 1, 2])
    plain = model.losses(batch, paired)
    batch.wrong_mask = torch.arange(LENGTH + 2) < torch.tensor([[11], [5], [6]])
    batch.wrong_ids = torch.randint(7, WORDS, (3, LENGTH + 2)) * batch.wrong_mask
    more = model.losses(batch, paired)
    first = model.match(batch.images[paired], batch.ids, batch.mask)
    false = model.match(batch.images, batch.wrong_ids, batch.wrong_mask)
    terms = torch.cat([first[1:].log(), (1 - first[:1]).log(), (1 - false).log()])
    assert torch.allclose(more["itm"], -terms.mean())
    assert torch.allclose(more["wpa"], plain["wpa"])  # most of a false caption's words have their patch
    only = tiny(losses=("wpa",))
    assert only.losses(batch)["wpa"].isfinite()


def test_whole_words_or_tokens_are_hidden_never_special_ones():
    continues = torch.zeros(WORDS, dtype=torch.bool)
    continues[20:] = True
    ids = torch.tensor([[1, 7, 21, 8, 22, 2, 0]]).repeat(3000, 1)
    for whole in (True, False):
        hidden, labels = tiny(continues=continues, whole_words=whole).hide_words(ids, ids > 0)
        asked = labels != IGNORE
        assert not asked[:, [0, 5, 6]].any()
        assert asked[:, 1:5].float().mean().item() == pytest.approx(0.15, abs=0.02)
        together = (asked[:, 1] == asked[:, 2]).all() and (asked[:, 3] == asked[:, 4]).all()
        assert bool(together) is whole
        assert (hidden[asked] == 3).float().mean().item() == pytest.approx(0.8, abs=0.05)


def test_a_patch_is_hidden_before_it_gets_its_place():
    model, batch = tiny(losses=("mpp",)), some_batch(2)
    asked = torch.zeros(2, 16, dtype=torch.bool)
    asked[0, 3] = asked[1, 5] = True
    hidden = HiddenPatches(asked, asked)
    logits, labels = model.guess_patches(batch.images, batch.ids, batch.mask, hidden)
    assert torch.allclose(model.losses(batch, hidden=hidden)["mpp"], masked_loss(logits, labels))
    assert logits.shape == (2, 3, 256) and labels.shape == (2, 3)
    other = batch.images.clone()
    other[0, :, :8, 24:] = torch.randn(3, 8, 8)  # patch 3 of the first image
    same, new_labels = model.guess_patches(other, batch.ids, batch.mask, HiddenPatches(asked, asked))
    assert torch.allclose(same, logits) and torch.equal(new_labels[1], labels[1])
    seen, _ = model.guess_patches(other, batch.ids, batch.mask, HiddenPatches(asked, torch.zeros_like(asked)))
    assert not torch.allclose(seen[0], logits[0])
    grey = torch.full((1, 3, 32, 32), -1.0)
    grey[:, 1], grey[:, 2] = 0.0, 1.0
    _, labels = model.guess_patches(grey, batch.ids[:1], batch.mask[:1], HiddenPatches(asked[:1], asked[:1]))
    assert labels.tolist() == [[0, 127, 255]]


def test_hidden_patches_are_rated_and_seen():
    seen = torch.ones(400, 16, dtype=torch.bool)
    seen[:, 8:] = False
    asked, replaced = tiny(losses=("mpp",)).hide_patches(seen)
    assert not asked[:, 8:].any() and not (replaced & ~asked).any()
    assert asked[:, :8].float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert (replaced.sum() / asked.sum()).item() == pytest.approx(0.8, abs=0.06)


def test_the_plan_moves_words_to_patches():
    model, batch = tiny(), some_batch(3)
    plan = model.transport(batch.images, batch.ids, batch.mask)
    inner = inner_words(batch.mask)
    assert plan.shape == (3, LENGTH, 16) and torch.allclose(plan.sum((1, 2)), torch.ones(3))
    assert torch.allclose(plan.sum(2), inner / inner.sum(1, keepdim=True))
    assert torch.allclose(plan.sum(1), torch.full((3, 16), 1 / 16), atol=1e-3)


def test_a_map_over_the_sequence_is_cut_to_words_and_patches():
    from minivlp.visualize.attention import grad_cam, rollout

    model, batch = tiny(), some_batch(2)
    with record_attention(model) as maps, torch.no_grad():
        model.match(batch.images, batch.ids, batch.mask)
    layer, rolled = maps["joint.1.self"], rollout(list(maps.values()))
    for weights in (layer, rolled):
        cut = joint_map(weights, LENGTH)
        assert cut.shape == (2, LENGTH, 16) and (cut.sum(2) < 1).all()
    one = joint_map(layer, LENGTH)
    assert one[1, 2, 5].item() == pytest.approx(layer[1, :, 2, LENGTH + 1 + 5].mean().item(), abs=1e-6)
    assert joint_map(rolled, LENGTH)[0, 0, 15].item() == pytest.approx(rolled[0, 0, -1].item())
    cams = grad_cam(model, lambda: model.match(batch.images, batch.ids, batch.mask), ["joint.1.self"])
    assert joint_map(cams["joint.1.self"], LENGTH).any()


def towers(**changes) -> XVLM:
    own = tiny().config
    image = dataclasses.replace(own.image, layers=2, **changes)
    text = dataclasses.replace(own.text, layers=2, block=image.block, embed_norm=False)
    return moved(XVLM(dataclasses.replace(XVLMConfig.nano(WORDS), image=image, text=text)))


def test_starts_from_the_towers_of_another_model():
    model, other, batch = tiny(), towers(), some_batch(2)
    fresh = model.joint.blocks[2].feed_forward.up.weight.clone()
    norm = model.joint.norm.weight.clone()
    model.start_from(other)
    assert torch.equal(model.joint.embed(batch.images), other.image.embed(batch.images))
    x = torch.randn(2, 5, 32)
    for mine, theirs in zip(model.joint.blocks, other.image.blocks, strict=False):
        assert torch.equal(mine(x), theirs(x))
    assert torch.equal(model.joint.blocks[2].feed_forward.up.weight, fresh)  # the towers have two layers only
    assert torch.equal(model.joint.norm.weight, norm)
    assert torch.equal(model.words.words.weight, other.text.embed.words.weight)
    assert torch.equal(model.words.positions, other.text.embed.positions)
    with torch.no_grad():
        other.text.embed.words.weight.zero_()
    assert model.words.words.weight.any()  # copied, not shared
    shallow = tiny(image=dataclasses.replace(model.config.image, layers=1))
    shallow.start_from(other)
    assert torch.equal(shallow.joint.blocks[0](x), other.image.blocks[0](x))
    for learned in (tiny(learned=True), ViLTAnswers(AnswersConfig(**sizes(1e-6, 64)))):
        with pytest.raises(ValueError, match="joint.positions"):
            learned.start_from(other)
    published = towers(two_step_patches=False, sincos_positions=False)
    learned = tiny(learned=True)
    learned.start_from(published)
    assert torch.equal(learned.joint.embed(batch.images), published.image.embed(batch.images))
    untouched = tiny()
    before = {name: value.clone() for name, value in untouched.state_dict().items()}
    with pytest.raises(ValueError, match="joint.patches"):
        untouched.start_from(published)
    assert all(torch.equal(value, before[name]) for name, value in untouched.state_dict().items())


def test_nano_starts_from_the_nano_towers():
    torch.set_default_dtype(torch.float32)
    model, other = ViLT(ViLTConfig.nano()), XVLM(XVLMConfig.nano())
    model.start_from(other)
    assert torch.equal(model.joint.class_token, other.image.class_token)


def test_what_cannot_be_is_said():
    nano = ViLTConfig.nano(WORDS)
    with pytest.raises(ValueError, match="no layers of its own"):
        ViLT(dataclasses.replace(nano, text=dataclasses.replace(nano.text, layers=2)))
    with pytest.raises(ValueError, match="cannot be cut"):
        tiny().match(torch.randn(1, 3, 32, 36), torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool))
    assert not any(hasattr(ViLT, verb) for verb in ("encode_image", "similarity", "embed_images", "ground", "answer"))
    assert not hasattr(ViLTAnswers, "match") and not hasattr(ViLTAnswers, "fill")


def test_bfloat16_autocast_keeps_losses_in_float32():
    torch.set_default_dtype(torch.float32)
    model = tiny(losses=("itm", "mlm", "wpa", "mpp"), mask_rate=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(some_batch())
        batch = some_batch()  # the loss itself would not show it: cross-entropy casts its input up
        fused = model.look(picture := model.embed_image(batch.images), batch.ids, batch.mask)
        kept = model.match_logits(fused), model.guess(picture, some_masked(batch), batch.mask)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in (*losses.values(), *(x.sum() for x in kept)))
    sum(losses.values()).backward()


def test_saved_and_loaded_again(tmp_path):
    from minivlp.training.checkpoint import load_model, save_model

    torch.set_default_dtype(torch.float32)
    batch = some_batch(2)
    batch.images = batch.images.float()
    for model in (tiny(), moved(ViLTAnswers(AnswersConfig(**sizes(1e-6, 64), answers=7, images_per_text=2)))):
        save_model(model, tmp_path / "model.safetensors")
        other = load_model(type(model), tmp_path / "model.safetensors")
        assert other.config == model.config
        with torch.no_grad():
            fused = [m.look(m.embed_image(batch.images), batch.ids, batch.mask) for m in (model, other)]
        assert torch.equal(*fused)
