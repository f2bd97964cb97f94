"""ALBEF: the released model's numbers to 1e-9, its layers against transformers', and what must hold."""

import math
from dataclasses import replace

import pytest
import torch
from released import (
    Comparison,
    four_heads,
    golden_masked,
    golden_negatives,
    golden_text,
    load_by_table,
    released_model,
)
from small_models import (
    LENGTH,
    assert_exact_without_shortcuts,
    jittered,
    longer,
    mask_some,
    recorded_maps,
    small_model,
    some_batch,
    values_of,
)
from torch import nn

from minivlp.data.batch import Batch, Text
from minivlp.layers.attention import attention_mask
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.towers import ImageEncoder, TextEncoder
from minivlp.layers.transformer import BlockConfig, fusion_layers
from minivlp.models import aligned
from minivlp.models.albef import ALBEF, ALBEFConfig
from minivlp.models.xvlm import XVLM, XVLMConfig
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits, find_positives, soft_cross_entropy
from minivlp.objectives.masking import IGNORE, MaskedTokens, masked_loss
from minivlp.objectives.matching import Negatives, hard_negatives, matching_loss, sampling_weights
from minivlp.objectives.momentum import MomentumConfig, soft_targets
from minivlp.pretrained import albef as release
from minivlp.pretrained import blip
from minivlp.pretrained.keys import with_prefix
from minivlp.pretrained.parts import BERT_EMBED, BERT_LAYER
from minivlp.training.checkpoint import weights
from minivlp.training.loop import Settings, fit

pytestmark = pytest.mark.usefixtures("float64")


# ---------------------------------------------------------------------------------------------- the released weights


def released(golden, alpha: float) -> ALBEF:
    """The released model with its momentum model and its filled queue, before its training step."""
    g = golden("albef_pretrain")
    n = g.config
    momentum = MomentumConfig(n["momentum"], alpha, alpha_steps=0, queue_size=n["queue_size"])
    config = replace(four_heads(release.config(g.state, {})), momentum=momentum)
    assert (config.text.layers, config.fusion_layers, config.image.image_size) == (n["fusion_layer"], 2, 32)
    return released_model("albef", g.state, config)


def golden_batch(g) -> Batch:
    text = golden_text(g.inputs)
    return Batch(g.inputs["pixel_values"], text, torch.arange(len(text)))


def test_every_number_of_the_released_model(golden):
    g = golden("albef_pretrain")
    same = Comparison(g)
    for alpha in (0.0, 0.4):
        compare_step(same, released(golden, alpha), g, f".alpha{alpha:g}")
        compare_parts(same, released(golden, alpha), g, alpha)
    assert same.done == set(g.outputs)


def compare_step(same: Comparison, model: ALBEF, g, end: str) -> None:
    """One training step through `losses`: the losses, the gradients, and the momentum model and queue after it."""
    losses = model.train().losses(golden_batch(g), negatives=golden_negatives(g.inputs), masked=golden_masked(g.inputs))
    for name, value in losses.items():
        same(f"loss_{name}{end}", value)
    same(f"loss_total{end}", sum(losses.values()))
    sum(losses.values()).backward()
    same.gradients("albef", model, after=end)
    same.momentum_weights("albef", model)
    same("image_queue_after", model.queue.images.T)
    same("text_queue_after", model.queue.texts.T)
    same("queue_ptr_after", model.queue.count[None] % model.config.momentum.queue_size)
    model.after_step()
    same("temp_after_clamp", model.itc_head.scale.temperature)


def compare_parts(same: Comparison, model: ALBEF, g, alpha: float) -> None:
    """What the step is made of, from the verbs."""
    batch, masked, end = golden_batch(g), golden_masked(g.inputs), f".alpha{alpha:g}"
    text, pad, rows = batch.text, batch.text.mask[..., None], len(batch)
    model.momentum_model.update(model)
    momentum, scale = model.momentum_model.model, model.itc_head.scale()
    image_tokens, text_tokens = model.encode_image(batch.images), model.encode_text(text)
    same("image_tokens", image_tokens)
    same("text_tokens", text_tokens * pad)
    same("fused_tokens", model.fuse(text_tokens, text.mask, image_tokens) * pad)
    own = model.embed_images(batch.images), model.embed_texts(text)
    theirs = momentum.embed_images(batch.images), momentum.embed_texts(text)
    for name, value in zip(("image_feat", "text_feat", "image_feat_m", "text_feat_m"), (*own, *theirs), strict=True):
        same(name, value)
    positives = torch.eye(rows, rows + len(model.queue), dtype=torch.bool)
    for way, name in enumerate(("i2t", "t2i")):
        candidates = torch.cat([theirs[1 - way], model.queue.features()[1 - way]])
        logits = cosine_logits(own[way], candidates, scale)
        same(f"sim_{name}", logits)
        targets = soft_targets(cosine_logits(theirs[way], candidates, scale), positives, alpha)
        same(f"itc_targets_{name}{end}", targets)
        same(f"loss_itc_{name}{end}", soft_cross_entropy(logits, targets))
        same(f"itm_sampling_weights_{name}", sampling_weights(logits[:, :rows], positives[:, :rows]))
    own_rows, negatives = torch.arange(rows), golden_negatives(g.inputs)
    image_rows, text_rows = (torch.cat([own_rows, drawn]) for drawn in negatives.pairs())
    fused = model.cross_encode_many(batch.images, image_rows, text[text_rows])
    same("itm_logits", model.match_head(fused))
    masked_tokens = model.cross_encode(batch.images, masked.text)
    same("mlm_fused_tokens", masked_tokens * pad)
    predicted = masked.labels != IGNORE
    same("mlm_logits", model.mlm_head(masked_tokens[predicted]))
    same("mlm_logits_m", momentum.mlm_logits(batch.images, masked.text)[predicted])


# ------------------------------------------------------------------------------------------------- against transformers


def layers_of(layers: nn.ModuleList, run) -> list[torch.Tensor]:
    """The output of each layer, and the run's own."""
    outputs: list[torch.Tensor] = []

    def keep(module, inputs, output) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    outputs.append(run())
    for hook in hooks:
        hook.remove()
    return outputs


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor], real: torch.Tensor | None = None) -> None:
    assert len(ours) == len(theirs) > 2
    for one, other in zip(ours, theirs, strict=True):
        difference = (one - other).abs() if real is None else (one - other)[real].abs()
        assert difference.max() < 1e-10


def test_every_layer_equals_transformers():
    from transformers import BertConfig, BertModel, BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    text = dict(vocab_size=60, max_position_embeddings=20, layer_norm_eps=1e-12, bos_token_id=1, sep_token_id=2)
    vision = BlipVisionModel(BlipVisionConfig(**sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6)).eval()
    bert = BertModel(BertConfig(**sizes, **text), add_pooling_layer=False).eval()
    fusing = BlipTextModel(BlipTextConfig(**sizes, **text, encoder_hidden_size=32), add_pooling_layer=False).eval()
    for reference in (vision, bert, fusing):
        jittered(reference)

    block = BlockConfig(32, 4, 64, norm_eps=1e-12, norm_first=False)
    image = ImageEncoder(ImageConfig(32, 8, 2, BlockConfig(32, 4, 64, norm_eps=1e-6)))
    encoder = TextEncoder(TextConfig(60, 20, 2, block, embed_norm=True))
    fusion = fusion_layers(2, block, context_width=32)
    layer = with_prefix("encoder.layer.{n}.", "blocks.{n}.", BERT_LAYER)
    load_by_table(image, blip.IMAGE, vision.state_dict())
    load_by_table(encoder, (*with_prefix("embeddings.", "embed.", BERT_EMBED), *layer), bert.state_dict())
    load_by_table(fusion, layer, fusing.state_dict())

    images, ids = torch.randn(3, 3, 32, 32), torch.randint(5, 60, (3, 9))
    captions = Text(ids, torch.arange(9) < torch.tensor([[9], [4], [6]]))
    mask = captions.mask
    with torch.no_grad():
        ours = layers_of(image.blocks, lambda: image(images))
        assert_equal(ours, layers_of(vision.encoder.layers, lambda: vision(images).last_hidden_state))
        tokens = ours[-1]
        ours = layers_of(encoder.blocks, lambda: encoder(captions))
        run = lambda: bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # noqa: E731
        assert_equal(ours, layers_of(bert.encoder.layer, run), mask)
        start = ours[-1]
        ours = layers_of(fusion.blocks, lambda: fusion(start, attention_mask(mask), tokens))
        run = lambda: fusing(encoder_embeds=start, attention_mask=mask.long(), encoder_hidden_states=tokens)  # noqa: E731
        assert_equal(ours, layers_of(fusing.encoder.layer, lambda: run().last_hidden_state), mask)


# --------------------------------------------------------------------------------------------------- what must hold

NEXT = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2]))
MOMENTUM = MomentumConfig(momentum=0.9, queue_size=10, alpha_steps=0)

VARIANTS = {  # the rows of the paper's ablation, as flags
    "itm and mlm": dict(losses=("itm", "mlm")),
    "+ itc": dict(hard_negatives=False),
    "+ hard negatives": {},
    "+ momentum distillation of itc": dict(momentum=replace(MOMENTUM, distill=("itc",))),
    "+ momentum distillation of mlm": dict(momentum=MOMENTUM),
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_trains_all_it_has(changes):
    model, batch = small_model(ALBEF, **changes), some_batch()
    losses = model.losses(batch, masked=mask_some(batch.text))
    assert tuple(losses) == model.config.losses
    sum(losses.values()).backward()
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    idle = {n.split(".")[0] for n, p in own.items() if p.grad is None or not p.grad.any()}
    assert idle == ({"itc_head"} if "itc" not in losses else set())
    assert not any(p.requires_grad or p.grad is not None for n, p in model.named_parameters() if "momentum" in n)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_losses_and_gradients_are_those_of_all_tokens_of_all_texts(changes):
    model, batch = small_model(ALBEF, **changes), some_batch(4, negatives=True)
    assert_exact_without_shortcuts(model, batch, negatives=NEXT, masked=mask_some(batch.text))


@pytest.mark.parametrize("name", ["itc", "itm", "mlm"])
def test_each_loss_can_be_the_only_one(name):
    for momentum in (None, MOMENTUM):
        assert list(small_model(ALBEF, losses=(name,), momentum=momentum).losses(some_batch())) == [name]


def test_losses_at_initialization_are_those_of_chance():
    torch.set_default_dtype(torch.float32)
    for momentum in (None, MomentumConfig(0.995, alpha_steps=0)):
        model = ALBEF(replace(ALBEFConfig.nano(300), momentum=momentum))
        with torch.no_grad():
            losses = model.losses(some_batch(16, side=64))
        assert losses["itm"].item() == pytest.approx(math.log(2), abs=0.35)  # the head's initial weights are not 0
        assert losses["mlm"].item() == pytest.approx(math.log(300), abs=0.8)
        assert losses["itc"].item() == pytest.approx(math.log(16), abs=2.0)


def test_without_a_momentum_model_contrast_is_in_batch_and_both_sides_learn():
    model, batch = small_model(ALBEF, losses=("itc",)), some_batch()
    batch.image_ids[1] = batch.image_ids[0]
    logits = cosine_logits(model.embed_images(batch.images), model.embed_texts(batch.text), model.itc_head.scale())
    loss = model.losses(batch)["itc"]
    plain = contrastive_loss(logits, find_positives(batch.image_ids, batch.text))
    assert torch.allclose(loss, plain)
    weight = model.itc_head.project_text.weight
    assert torch.allclose(*(torch.autograd.grad(value, weight)[0] for value in (loss, plain)))
    assert model.momentum_model is None and model.queue is None


def test_the_model_is_the_same_without_its_momentum_model():
    model, batch = small_model(ALBEF, momentum=MOMENTUM).eval(), some_batch()
    plain = ALBEF(replace(model.config, momentum=None)).eval()
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(("momentum_model.", "queue."))}
    plain.load_state_dict(own)
    for verb in ("similarity", "match", "mlm_logits"):
        assert torch.equal(
            getattr(model, verb)(batch.images, batch.text), getattr(plain, verb)(batch.images, batch.text)
        )


def test_the_image_is_encoded_once_and_each_text_once_plus_once_with_masked_tokens():
    def count(*models: nn.Module) -> list[list[int]]:
        passes = []
        for tower in (tower for model in models for tower in (model.image.embed, model.text.embed)):
            rows: list[int] = []
            tower.register_forward_hook(lambda _, inputs, __, rows=rows: rows.append(len(inputs[0])))
            passes.append(rows)
        return passes

    def full(rows: int, negatives: bool = False) -> Batch:
        """All texts of one length, so that none is split off."""
        batch = some_batch(rows, negatives)
        for text in filter(None, (batch.text, batch.negatives)):
            text.mask[:] = True
        return batch

    model = small_model(ALBEF)
    passes = count(model)
    model.losses(full(4))
    assert passes == [[4], [4, 4]]
    model = small_model(ALBEF, momentum=MOMENTUM)
    passes = count(model, model.momentum_model.model)
    model.losses(full(4))
    assert passes == [[4], [4, 4], [4], [4, 4]]
    passes = count(model)
    batch = full(4, negatives=True)
    batch.negatives = batch.negatives.first(LENGTH)
    model.losses(batch)
    assert passes == [[4], [8, 4]], "negative captions go along with the captions"


def test_a_frozen_image_tower_serves_the_model_and_its_momentum_model():
    model, batch = small_model(ALBEF, momentum=MOMENTUM), some_batch()
    model.image.load_state_dict(model.momentum_model.model.image.state_dict())
    given = {"negatives": NEXT, "masked": mask_some(batch.text)}
    expected = model.eval().losses(batch, **given)
    runs = []
    model.momentum_model.model.image.register_forward_hook(lambda *_: runs.append(1))
    model.image.requires_grad_(False)
    losses = model.losses(batch, **given)
    assert not runs and all(torch.equal(losses[name], expected[name]) for name in losses)
    cached = Batch(None, batch.text, batch.image_ids, image_tokens=model.encode_image(batch.images))
    losses = model.losses(cached, **given)
    assert all(torch.allclose(losses[name], expected[name]) for name in losses)


def test_the_momentum_model_steps_first_and_only_in_training():
    model, batch = small_model(ALBEF, momentum=MOMENTUM), some_batch()
    before = {n: p.clone() for n, p in model.momentum_model.model.named_parameters()}
    own = dict(model.named_parameters())
    vectors = {}
    head = model.momentum_model.model.itc_head.project_text
    head.register_forward_hook(lambda *a: vectors.update(text=a[2]))
    model.eval().losses(batch)
    assert all(torch.equal(p, before[n]) for n, p in model.momentum_model.model.named_parameters())
    assert len(model.queue) == 0
    still = vectors["text"]
    model.train().losses(batch)
    for name, parameter in model.momentum_model.model.named_parameters():
        assert torch.allclose(parameter, 0.9 * before[name] + 0.1 * own[name]), name
    assert not torch.allclose(still, vectors["text"]), "it is used after its step"
    texts = nn.functional.normalize(vectors["text"], dim=-1)
    assert len(model.queue) == 4 and torch.allclose(model.queue.features()[1], texts), "its vectors are kept"
    model.losses(batch)
    assert len(model.queue) == 8 and model.momentum_model.updates == 2


def test_a_repeated_image_is_a_positive_in_the_queue_too():
    model, batch = small_model(ALBEF, losses=("itc",), momentum=replace(MOMENTUM, alpha=0.0)), some_batch()
    model.losses(batch)
    model.eval()
    vectors = model.embed_images(batch.images), model.embed_texts(batch.text)
    momentum = model.momentum_model.model
    theirs = momentum.embed_images(batch.images), momentum.embed_texts(batch.text)
    total, share = 0, torch.cat([torch.eye(4), torch.eye(4)], dim=1) / 2
    for way in (0, 1):
        candidates = torch.cat([theirs[1 - way], model.queue.features()[1 - way]])
        total += soft_cross_entropy(vectors[way] @ candidates.T * model.itc_head.scale(), share) / 2
    assert torch.allclose(model.losses(batch)["itc"], total)


def test_alpha_rises_with_the_momentum_models_steps_and_applies_to_the_distilled_losses():
    batch = some_batch()
    model = small_model(ALBEF, momentum=replace(MOMENTUM, alpha_steps=4, alpha=0.8))
    shares = [model.encode(batch).momentum[1] for _ in range(6)]
    assert shares == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    values = {}
    for distill in ((), ("itc",), ("mlm",), ("itc", "mlm")):
        torch.manual_seed(3)
        model = small_model(ALBEF, momentum=replace(MOMENTUM, distill=distill)).eval()
        values[distill] = values_of(model.losses(batch, negatives=NEXT, masked=mask_some(batch.text)))
    plain, both = values[()], values["itc", "mlm"]
    assert plain["itm"] == both["itm"] and plain["itc"] != both["itc"] and plain["mlm"] != both["mlm"]
    assert values["itc",] == {**plain, "itc": both["itc"]} and values["mlm",] == {**plain, "mlm": both["mlm"]}


def test_no_row_of_the_same_image_or_caption_is_ever_a_negative():
    batch = some_batch(6)
    batch.image_ids[3] = batch.image_ids[0]
    for part in (batch.text.ids, batch.text.mask):
        part[4] = part[1]
    positives = find_positives(batch.image_ids, batch.text)
    assert positives.sum() == 6 + 4
    for changes in ({}, dict(hard_negatives=False), dict(losses=("itm",)), dict(momentum=MOMENTUM)):
        model = small_model(ALBEF, temperature=0.5, **changes)
        for _ in range(10):
            negatives = model.encode(batch).negatives
            for column in (negatives.image, negatives.text):
                assert (column >= 0).all() and not positives[torch.arange(6), column].any()


def spy_on_hard_negatives(monkeypatch, module=aligned) -> list[dict]:
    """What `hard_negatives` was called with."""
    calls: list[dict] = []

    def spy(logits, positives, floor=0.0, back=None, generator=None):
        calls.append({"logits": logits, "positives": positives, "floor": floor, "back": back})
        return hard_negatives(logits, positives, floor, back, generator)

    monkeypatch.setattr(module, "hard_negatives", spy)
    return calls


def test_hard_negatives_are_what_the_model_confuses_with_the_momentum_models_vectors(monkeypatch):
    model, batch = small_model(ALBEF, momentum=MOMENTUM, losses=("itc", "itm")), some_batch()
    calls = spy_on_hard_negatives(monkeypatch)
    model.losses(batch)
    momentum, scale = model.momentum_model.model, model.itc_head.scale()
    images, texts = model.embed_images(batch.images), model.embed_texts(batch.text)
    (call,) = calls
    assert torch.allclose(call["logits"], scale * images @ momentum.embed_texts(batch.text).T)
    assert torch.allclose(call["back"], scale * texts @ momentum.embed_images(batch.images).T)
    assert call["floor"] == 0
    calls.clear()
    small_model(ALBEF, hard_negatives=False).losses(batch)
    assert not calls, "at random if so configured"
    one_way, other_way = torch.full((3, 3), -30.0), torch.full((3, 3), -30.0)
    one_way[0, 1] = one_way[1, 0] = other_way[0, 2] = 30.0  # image 0 is like text 1, 1 like 0; text 0 like image 2
    drawn = hard_negatives(one_way, torch.eye(3, dtype=torch.bool), floor=0, back=other_way)
    assert drawn.text[0] == 1 and drawn.image[0] == 2


@pytest.mark.parametrize("momentum", [None, MOMENTUM], ids=["plain", "momentum"])
def test_hard_negatives_are_drawn_from_float32_logits_under_autocast(monkeypatch, momentum):
    torch.set_default_dtype(torch.float32)
    model, batch = small_model(ALBEF, momentum=momentum), some_batch()
    calls = spy_on_hard_negatives(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        model.losses(batch)
    for logits in (calls[0]["logits"], calls[0]["back"]):
        assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("kind", [ALBEF, XVLM])
def test_negative_captions_are_negatives_for_matching_and_for_nothing_else(kind):
    batch = some_batch(negatives=True)
    plain = replace(batch, negatives=None)
    model = small_model(kind, losses=("itc", "itm", "mlm"))
    drawn = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, -1, 2]))
    given = {"negatives": drawn, "masked": mask_some(batch.text)}
    more, without = model.losses(batch, **given), model.losses(plain, **given)
    assert torch.allclose(more["itc"], without["itc"]) and torch.allclose(more["mlm"], without["mlm"])
    matched = model.match_head(model.cross_encode(batch.images, batch.text))
    image_rows, text_rows = drawn.pairs()
    assert len(image_rows) == 7
    wrong = model.match_head(model.cross_encode(batch.images[image_rows], batch.text[text_rows]))
    false = model.match_head(model.cross_encode(batch.images, batch.negatives))
    assert torch.allclose(without["itm"], matching_loss(matched, wrong))
    assert torch.allclose(more["itm"], matching_loss(matched, torch.cat([wrong, false])))


def test_sep_may_be_masked_but_cls_and_padding_not():
    masking = replace(ALBEFConfig.nano().masking, rate=0.5)
    ids = torch.tensor([[1, 7, 8, 9, 2, 0]]).repeat(400, 1)
    masked = masking.apply(Text(ids, ids > 0), 40)
    predicted = (masked.labels != IGNORE).double().mean(dim=0)
    assert predicted[0] == predicted[5] == 0 and (predicted[1:5] - 0.5).abs().max() < 0.1
    assert (masked.text.ids == masking.mask_id).any() and not torch.equal(masked.text.ids, ids)


def test_the_momentum_model_softens_masked_tokens():
    model, batch = small_model(ALBEF, losses=("mlm",), momentum=MOMENTUM).eval(), some_batch()
    masked, momentum = mask_some(batch.text), model.momentum_model.model
    predicted = masked.labels != IGNORE
    logits, soft = (m.mlm_logits(batch.images, masked.text)[predicted] for m in (model, momentum))
    expected = masked_loss(logits, masked.labels[predicted], soft, 0.4)
    assert torch.allclose(model.losses(batch, masked=masked)["mlm"], expected)


def test_padding_changes_nothing():
    batch = some_batch(negatives=True)
    padded = replace(batch, text=longer(batch.text), negatives=longer(batch.negatives))
    model = small_model(ALBEF, momentum=MOMENTUM).eval()
    text, labels = mask_some(batch.text)
    one = model.losses(batch, negatives=NEXT, masked=MaskedTokens(text, labels))
    masked = MaskedTokens(longer(text), nn.functional.pad(labels, (0, 4), value=IGNORE))
    two = model.losses(padded, negatives=NEXT, masked=masked)
    assert all(torch.allclose(one[name], two[name]) for name in one)


@pytest.mark.parametrize("verb", ["match", "mlm_logits"])
def test_all_queries_are_recorded_where_few_tokens_are_read(verb):
    model, batch = small_model(ALBEF), some_batch()
    maps = recorded_maps(model, lambda: getattr(model, verb)(batch.images, batch.text))
    assert {name.split(".")[0] for name in maps} == {"image", "text", "fusion"}
    assert maps["fusion.1.cross"].shape == (4, 2, LENGTH, 17)
    assert maps["fusion.1.self"].shape == maps["text.1.self"].shape == (4, 2, LENGTH, LENGTH)


class Killed(BaseException):
    """Like a kill: nothing in the loop catches it."""


@pytest.mark.parametrize("kill_at", [4, 7])
def test_a_killed_run_resumed_equals_the_uninterrupted_one_momentum_model_and_queue_included(tmp_path, kill_at):
    torch.set_default_dtype(torch.float32)

    def fresh(seed):
        torch.manual_seed(seed)
        return small_model(ALBEF, momentum=MomentumConfig(momentum=0.8, queue_size=7, alpha_steps=6))

    def kill(row):
        if row["step"] == kill_at:
            raise Killed

    def batch_at(step):
        return some_batch(seed=step)

    settings = Settings(steps=9, warmup=2, save_every=3)
    quiet = dict(bar=False, device="cpu")
    model = fresh(0)
    unbroken = fit(model, batch_at, settings, **quiet)
    wanted = {name: tensor.clone() for name, tensor in weights(model).items()}
    with pytest.raises(Killed):
        fit(fresh(0), batch_at, settings, on_step=[kill], run_dir=tmp_path, **quiet)
    model = fresh(9)  # a new process starts from any weights
    history = fit(model, batch_at, settings, run_dir=tmp_path, **quiet)
    kept = {"momentum_model.updates", "queue.count", "queue.ids", "momentum_model.model.itc_head.project_text.weight"}
    assert kept <= wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(model).items())
    assert [row["loss"] for row in history.steps] == [row["loss"] for row in unbroken.steps]
    assert model.momentum_model.updates == 9 and model.queue.count == 36


def test_an_encoded_batch_computes_only_what_is_asked_for():
    model, batch = small_model(ALBEF), some_batch()
    runs = []
    model.image.embed.register_forward_hook(lambda *_: runs.append("image"))
    model.text.embed.register_forward_hook(lambda *_: runs.append("text"))
    encoded = model.encode(batch)
    assert not runs
    tokens = encoded.image_tokens
    assert runs == ["image"] and encoded.image_tokens is tokens


def test_presets_and_parameter_counts():
    with torch.device("meta"):
        models = {name: ALBEF(getattr(ALBEFConfig, name)()) for name in ("nano", "small", "paper")}
    paper = models["paper"]
    # the paper names ViT-B/16 with 85.8 M and BERT-base, fusing half and MLM head included, with 123.7 M; BERT's two
    # token-type rows are not there: one is part of the positions, nothing reads the other
    image = sum(p.numel() for p in paper.image.parameters())
    text = sum(p.numel() for p in nn.ModuleList([paper.text, paper.fusion, paper.mlm_head]).parameters())
    assert (image, text) == (85_844_736, 123_697_722 - 2 * 768)
    own = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    assert own["paper"] == image + text + 2 * (768 * 256 + 256) + 2 * 768 + 2 + 1 == 209_936_189
    assert round(own["nano"] / 1e5) == 19 and round(own["small"] / 1e6) == 55
    towers = {n for n in models["nano"].state_dict() if n.startswith(("image.", "text.", "itc_head.", "fusion."))}
    nano = ALBEFConfig.nano()
    with torch.device("meta"):
        theirs = XVLM(XVLMConfig.nano()).state_dict()
    assert all(theirs[n].shape == models["nano"].state_dict()[n].shape for n in towers), "the shared towers fit"
    assert nano.image.image_size == 64 and nano.text.context_length == 56
