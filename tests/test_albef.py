"""ALBEF: the released model's numbers to 1e-9, transformers' layers as a second witness, and what must hold."""

import dataclasses
import math

import pytest
import torch
from released import BERT_LAYER, VIT_LAYER
from torch import nn

from minivlp.data.batch import Batch
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import FusionEncoder, ImageConfig, ImageEncoder, TextConfig, TextEncoder
from minivlp.models.albef import ALBEF, ALBEFConfig
from minivlp.models.fused import with_wrong
from minivlp.models.xvlm import XVLM, XVLMConfig
from minivlp.objectives.contrastive import contrastive_loss, same_group, soft_cross_entropy
from minivlp.objectives.masking import IGNORE, Masked, masked_loss
from minivlp.objectives.matching import Negatives, hard_negatives, matching_loss, negative_weights
from minivlp.objectives.momentum import soft_targets
from minivlp.training.checkpoint import weights
from minivlp.training.loop import Settings, fit

pytestmark = pytest.mark.usefixtures("float64")


# ---------------------------------------------------------------------------------------------- the released weights

MODULES = {
    "visual_encoder.patch_embed.proj": "image.patches.project",
    "visual_encoder.norm": "image.norm",
    "vision_proj": "project_image",
    "text_proj": "project_text",
    "itm_head": "match_head",
    "text_encoder.bert.embeddings.LayerNorm": "text.embed.norm",
    "text_encoder.cls.predictions.transform.dense": "word_head.dense",
    "text_encoder.cls.predictions.transform.LayerNorm": "word_head.norm",
}
GRADIENTS = {
    "temp": "temperature",
    "vision_proj.weight": "project_image.weight",
    "text_proj.weight": "project_text.weight",
    "itm_head.weight": "match_head.weight",
    "visual_encoder.norm.weight": "image.norm.weight",
    "text_encoder.bert.embeddings.LayerNorm.weight": "text.embed.norm.weight",
    "text_encoder.bert.embeddings.word_embeddings.weight": "text.embed.words.weight",
}
AVERAGES = {
    "visual_encoder_m.patch_embed.proj.bias": "image.patches.project.bias",
    "visual_encoder_m.blocks.0.attn.qkv.bias": "image.blocks.0.self_attention.qkv.bias",
    "visual_encoder_m.cls_token": "image.class_token",
    "vision_proj_m.weight": "project_image.weight",
    "text_encoder_m.bert.embeddings.LayerNorm.weight": "text.embed.norm.weight",
    "text_encoder_m.cls.predictions.bias": "word_head.decoder.bias",
    "text_proj_m.bias": "project_text.bias",
}


def renamed(state: dict, theirs: str, ours: str, names: dict[str, str]) -> dict:
    """The modules of `names` that are there, under our names; `theirs` and `ours` stand before them."""
    both = [(t, o, end) for t, o in names.items() for end in ("weight", "bias") if f"{theirs}{t}.{end}" in state]
    return {f"{ours}{o}.{end}": state[f"{theirs}{t}.{end}"] for t, o, end in both}


def bert_layer(state: dict, theirs: str, ours: str) -> dict:
    """One of BERT's layers, with or without cross-attention: separate query, key and value become one matrix."""
    new = renamed(state, theirs, ours, BERT_LAYER)
    for end in ("weight", "bias"):
        own = [state[f"{theirs}attention.self.{part}.{end}"] for part in ("query", "key", "value")]
        new[f"{ours}self_attention.qkv.{end}"] = torch.cat(own)
        if f"{theirs}crossattention.self.key.{end}" in state:
            other = [state[f"{theirs}crossattention.self.{part}.{end}"] for part in ("key", "value")]
            new[f"{ours}cross_attention.kv.{end}"] = torch.cat(other)
    return new


def released_weights(state: dict, config: ALBEFConfig) -> dict:
    """The released model's weights under our names."""
    bert = "text_encoder.bert."
    positions = state["visual_encoder.pos_embed"][0]
    new = renamed(state, "", "", MODULES) | {
        "image.class_token": state["visual_encoder.cls_token"][0, 0],
        "image.class_position": positions[0],
        "image.positions": positions[1:],
        "text.embed.words.weight": state[f"{bert}embeddings.word_embeddings.weight"],
        "text.embed.positions": state[f"{bert}embeddings.position_embeddings.weight"]
        + state[f"{bert}embeddings.token_type_embeddings.weight"][0],
        "word_head.decoder.weight": state["text_encoder.cls.predictions.decoder.weight"],
        "word_head.decoder.bias": state["text_encoder.cls.predictions.bias"],
    }
    for index in range(config.image.layers):
        new |= renamed(state, f"visual_encoder.blocks.{index}.", f"image.blocks.{index}.", VIT_LAYER)
    for index in range(config.text.layers):
        new |= bert_layer(state, f"{bert}encoder.layer.{index}.", f"text.blocks.{index}.")
    for index in range(config.fusion_layers):
        new |= bert_layer(state, f"{bert}encoder.layer.{config.text.layers + index}.", f"fusion.blocks.{index}.")
    return new


def released_config(numbers: dict, **changes) -> ALBEFConfig:
    width = numbers["vision_width"]
    text = BlockConfig(numbers["text_width"], numbers["text_heads"], numbers["text_ffn"], "gelu", 1e-12, False)
    image = BlockConfig(width, numbers["vision_heads"], numbers["vision_mlp_ratio"] * width, norm_eps=1e-6)
    config = ALBEFConfig(
        image=ImageConfig(numbers["image_size"][0], numbers["patch_size"], numbers["vision_layers"], image),
        text=TextConfig(numbers["vocab"], numbers["max_position"], numbers["fusion_layer"], text, embed_norm=True),
        fusion_layers=numbers["text_layers_total"] - numbers["fusion_layer"],
        embed_width=numbers["embed_dim"],
        temperature=numbers["temp"],
        momentum=numbers["momentum"],
        queue_size=numbers["queue_size"],
        alpha_steps=0,
    )
    return dataclasses.replace(config, **changes)


class Released:
    """The released model's weights in ours, its queue, its inputs, its outputs."""

    def __init__(self, run, **changes) -> None:
        state, given = run.state, run.inputs
        self.tolerance, self.out, self.checked = run.tolerance, run.outputs, set()
        config = released_config(run.config, **changes)
        self.model = model = ALBEF(config)
        own = released_weights(state, config) | {"temperature": state["temp"]}
        slow = {name.replace("_m.", ".", 1): value for name, value in state.items() if "_m." in name}
        slow = {f"teacher.model.{name}": value for name, value in released_weights(slow, config).items()}
        size, pointer = config.queue_size, int(state["queue_ptr"])
        queue = {
            "images": state["image_queue"].T,
            "texts": state["text_queue"].T,
            "ids": -1 - torch.arange(2 * size).view(size, 2),  # there nothing in the queue ever belongs to a new pair
            "count": torch.tensor(size + pointer),
        }
        rest = {f"queue.{name}": value for name, value in queue.items()} | {"teacher.updates": torch.tensor(7)}
        model.load_state_dict(own | slow | rest, strict=True)
        mask = given["attention_mask"].bool()
        self.batch = Batch(given["pixel_values"], given["input_ids"], mask, torch.arange(len(mask)))
        self.negatives = Negatives(given["itm_neg_image_for_text"], given["itm_neg_text_for_image"])
        self.masked = Masked(given["mlm_input_ids"], given["mlm_labels"])

    def same(self, name: str, value: torch.Tensor) -> None:
        expected = self.out[name]
        assert value.shape == expected.shape, name
        assert (value.detach() - expected).abs().max() <= self.tolerance, name
        self.checked.add(name)


def test_every_number_of_the_released_model(golden):
    checked = set()
    for alpha in (0.0, 0.4):
        r = Released(golden("albef_pretrain"), alpha=alpha)
        checked |= step_of(r, alpha) | parts_of(Released(golden("albef_pretrain"), alpha=alpha), alpha)
    assert checked == set(r.out)


def step_of(r: Released, alpha: float) -> set[str]:
    """One training step through `losses`: the losses, the gradients, and what it leaves behind."""
    model, end = r.model.train(), f".alpha{alpha:g}"
    losses = model.losses(r.batch, r.negatives, r.masked)
    for name, value in losses.items():
        r.same(f"loss_{name}{end}", value)
    r.same(f"loss_total{end}", sum(losses.values()))
    sum(losses.values()).backward()
    for theirs, ours in GRADIENTS.items():
        r.same(f"grad.{theirs}{end}", model.get_parameter(ours).grad)
    for theirs, ours in AVERAGES.items():
        r.same(f"ema.{theirs}", model.teacher.model.get_parameter(ours).view_as(r.out[f"ema.{theirs}"]))
    r.same("image_queue_after", model.queue.images.T)
    r.same("text_queue_after", model.queue.texts.T)
    r.same("queue_ptr_after", model.queue.count[None] % model.config.queue_size)
    model.after_step()
    r.same("temp_after_clamp", model.temperature)
    return r.checked


def parts_of(r: Released, alpha: float) -> set[str]:
    """What the step is made of, from the verbs."""
    model, batch, end = r.model, r.batch, f".alpha{alpha:g}"
    ids, mask, pad = batch.ids, batch.mask, batch.mask[..., None]
    model.teacher.update(model)
    slow = model.teacher.model
    visual, words = model.encode_image(batch.images), model.encode_text(ids, mask)
    r.same("image_tokens", visual)
    r.same("text_tokens", words * pad)
    r.same("fused_tokens", model.fuse(words, mask, visual) * pad)
    own = model.embed_visual(visual), model.embed_words(words)
    theirs = slow.embed_images(batch.images), slow.embed_texts(ids, mask)
    for name, value in zip(("image_feat", "text_feat", "image_feat_m", "text_feat_m"), (*own, *theirs), strict=True):
        r.same(name, value)
    known, rows = torch.eye(len(ids), len(ids) + len(model.queue), dtype=torch.bool), len(ids)
    for way, name in enumerate(("i2t", "t2i")):
        candidates = torch.cat([theirs[1 - way], model.queue.past()[1 - way]])
        similarity = own[way] @ candidates.T / model.temperature
        r.same(f"sim_{name}", similarity)
        targets = soft_targets(theirs[way] @ candidates.T / model.temperature, known, alpha)
        r.same(f"itc_targets_{name}{end}", targets)
        r.same(f"loss_itc_{name}{end}", soft_cross_entropy(similarity, targets))
    with torch.no_grad():
        likeness = model.eval().contrast(batch, visual, words, slow.encode_image(batch.images), alpha)[1]
    for way, name in enumerate(("i2t", "t2i")):
        r.same(f"itm_sampling_weights_{name}", negative_weights(likeness[way], known[:, :rows], floor=0))
    pairs = [(torch.arange(rows),) * 2, r.negatives.image_pairs(), r.negatives.text_pairs()]
    fused = [model.fuse(words[j], mask[j], visual[i]) for i, j in pairs]
    r.same("itm_logits", torch.cat([model.match_logits(f) for f in fused]))
    hidden = model.fuse(model.encode_text(r.masked.ids, mask), mask, visual)
    r.same("mlm_fused_tokens", hidden * pad)
    r.same("mlm_logits", model.word_head(hidden[r.masked.labels != IGNORE]))
    r.same("mlm_logits_m", slow.guess(r.masked, mask, slow.encode_image(batch.images)))
    return r.checked


# ------------------------------------------------------------------------------------------- transformers as a witness


def jitter(*models: nn.Module) -> None:
    """Move every parameter, so that nothing hides behind a zero."""
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)


def layers_of(model: nn.Module, layers: nn.ModuleList, run) -> list[torch.Tensor]:
    """Output of each layer, and the run's own."""
    outputs: list[torch.Tensor] = []
    take = lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
    hooks = [layer.register_forward_hook(take) for layer in layers]
    outputs.append(run())
    for hook in hooks:
        hook.remove()
    return outputs


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor], real: torch.Tensor | None = None) -> None:
    assert len(ours) == len(theirs)
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
    jitter(vision, bert, fusing)

    block = BlockConfig(32, 4, 64, norm_eps=1e-12, norm_first=False)
    image = ImageEncoder(ImageConfig(32, 8, 2, BlockConfig(32, 4, 64, norm_eps=1e-6)))
    words = TextEncoder(TextConfig(60, 20, 2, block, embed_norm=True))
    fusion = FusionEncoder(2, block, context_width=32)

    state = vision.state_dict()
    names = {
        "self_attn.qkv": "self_attention.qkv",
        "self_attn.projection": "self_attention.out",
        "layer_norm1": "self_norm",
        "layer_norm2": "feed_norm",
        "mlp.fc1": "feed_forward.up",
        "mlp.fc2": "feed_forward.down",
    }
    positions = state["embeddings.position_embedding"][0]
    new = {"class_token": state["embeddings.class_embedding"][0, 0]}
    new |= {"class_position": positions[0], "positions": positions[1:]}
    new |= renamed(state, "", "", {"embeddings.patch_embedding": "patches.project", "post_layernorm": "norm"})
    for index in range(2):
        new |= renamed(state, f"encoder.layers.{index}.", f"blocks.{index}.", names)
    image.load_state_dict(new)
    state = bert.state_dict()
    new = renamed(state, "embeddings.", "embed.", {"LayerNorm": "norm", "word_embeddings": "words"})
    table, kind = state["embeddings.position_embeddings.weight"], state["embeddings.token_type_embeddings.weight"]
    new["embed.positions"] = table + kind[0]
    for index in range(2):
        new |= bert_layer(state, f"encoder.layer.{index}.", f"blocks.{index}.")
    words.load_state_dict(new)
    new = {}
    for index in range(2):
        new |= bert_layer(fusing.state_dict(), f"encoder.layer.{index}.", f"blocks.{index}.")
    fusion.load_state_dict(new)

    images, ids = torch.randn(3, 3, 32, 32), torch.randint(5, 60, (3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [6]])
    with torch.no_grad():
        ours = layers_of(image, image.blocks, lambda: image(images))
        equal(ours, layers_of(vision, vision.encoder.layers, lambda: vision(images).last_hidden_state))
        visual = ours[-1]
        ours = layers_of(words, words.blocks, lambda: words(ids, mask))
        run = lambda: bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state  # noqa: E731
        equal(ours, layers_of(bert, bert.encoder.layer, run), mask)
        ours, start = layers_of(fusion, fusion.blocks, lambda: fusion(ours[-1], mask, visual)), ours[-1]
        run = lambda: fusing(encoder_embeds=start, attention_mask=mask.long(), encoder_hidden_states=visual)  # noqa: E731
        equal(ours, layers_of(fusing, fusing.encoder.layer, lambda: run().last_hidden_state), mask)


# --------------------------------------------------------------------------------------------------- what must hold

WORDS, LENGTH = 40, 9
NEXT = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, 1, 2]))
MOMENTUM = dict(momentum=0.9, queue_size=10, alpha_steps=0)


def tiny(kind=ALBEF, **changes):
    """A nano model, narrow, with every parameter moved."""
    nano = kind.Config.nano(WORDS)
    block = dataclasses.replace(nano.image.block, width=32, heads=2, hidden=64)
    small = {
        "image": dataclasses.replace(nano.image, image_size=32, block=block),
        "text": dataclasses.replace(nano.text, block=block),
    }
    model = kind(dataclasses.replace(nano, **{**small, **changes}))
    jitter(model)  # a teacher is moved apart from its student
    return model


def some_texts(count: int, generator=None) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (count, 1), generator=generator)
    return torch.randint(7, WORDS, (count, LENGTH), generator=generator) * mask, mask


def some_batch(rows: int = 4, wrong: bool = False, seed: int | None = None) -> Batch:
    draw = None if seed is None else torch.Generator().manual_seed(seed)
    ids, mask = some_texts(rows, draw)
    images = torch.randn(rows, 3, 32, 32, generator=draw)
    batch = Batch(images, ids, mask, torch.arange(rows) + 100)
    if wrong:
        ids, mask = some_texts(rows, draw)
        batch.wrong_ids, batch.wrong_mask = ids[:, :7], mask[:, :7]  # of another length than the true ones
    return batch


VARIANTS = {  # the rows of the paper's ablation, as flags
    "matching and words": dict(losses=("itm", "mlm")),
    "+ contrast": dict(hard_negatives=False),
    "+ hard negatives": {},
    "+ teacher on contrast": dict(MOMENTUM, distil=("itc",)),
    "+ teacher on words": dict(MOMENTUM),
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_trains_all_it_has(changes):
    model, batch = tiny(**changes, mask_rate=0.5), some_batch()
    losses = model.losses(batch)
    assert tuple(losses) == model.config.losses
    sum(losses.values()).backward()
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    idle = {n.split(".")[0] for n, p in own.items() if p.grad is None or not p.grad.any()}
    assert idle == ({"temperature", "project_image", "project_text"} if "itc" not in losses else set())
    assert not any(p.requires_grad or p.grad is not None for n, p in model.named_parameters() if "teacher" in n)


@pytest.mark.parametrize("name", ["itc", "itm", "mlm"])
def test_each_loss_stands_alone(name):
    for changes in ({}, MOMENTUM):
        assert list(tiny(losses=(name,), **changes).losses(some_batch())) == [name]


def test_losses_at_initialisation_are_a_blind_guess():
    torch.set_default_dtype(torch.float32)
    for changes in ({}, dict(momentum=0.995, alpha_steps=0)):
        model = ALBEF(dataclasses.replace(ALBEFConfig.nano(300), **changes))
        batch = some_batch(16)
        batch.images = torch.randn(16, 3, 64, 64)
        with torch.no_grad():
            losses = model.losses(batch)
        assert losses["itm"].item() == pytest.approx(math.log(2), abs=0.15)
        assert losses["mlm"].item() == pytest.approx(math.log(300), abs=0.8)
        assert losses["itc"].item() == pytest.approx(math.log(16), abs=2.0)


def test_without_a_teacher_contrast_is_in_batch_and_both_sides_learn():
    model, batch = tiny(losses=("itc",)), some_batch()
    batch.image_ids[1] = batch.image_ids[0]
    together = same_group(batch.image_ids, batch.ids, batch.mask)
    vectors = model.embed_images(batch.images), model.embed_texts(batch.ids, batch.mask)
    loss, plain = model.losses(batch)["itc"], contrastive_loss(*vectors, 1 / model.temperature, together)
    assert torch.allclose(loss, plain)
    slopes = (torch.autograd.grad(value, model.project_text.weight)[0] for value in (loss, plain))
    assert torch.allclose(*slopes)
    assert model.teacher is None and model.queue is None


def test_the_model_is_the_same_without_its_teacher():
    model, batch = tiny(**MOMENTUM).eval(), some_batch()
    shipped = ALBEF(dataclasses.replace(model.config, momentum=None)).eval()
    own = {n: t for n, t in model.state_dict().items() if not n.startswith(("teacher.", "queue."))}
    shipped.load_state_dict(own)
    inputs = batch.images, batch.ids, batch.mask
    for verb in ("similarity", "match", "fill"):
        assert torch.equal(getattr(model, verb)(*inputs), getattr(shipped, verb)(*inputs))


def test_the_image_is_encoded_once_and_each_text_once_plus_once_with_words_hidden():
    def count(*models: nn.Module) -> list[list[int]]:
        passes = []
        for tower in (tower for model in models for tower in (model.image.patches, model.text.embed)):
            rows: list[int] = []
            tower.register_forward_hook(lambda _, inputs, __, rows=rows: rows.append(len(inputs[0])))
            passes.append(rows)
        return passes

    model = tiny()
    passes = count(model)
    model.losses(some_batch())
    assert passes == [[4], [4, 4]]
    model = tiny(**MOMENTUM)
    passes = count(model, model.teacher.model)
    model.losses(some_batch())
    assert passes == [[4], [4, 4], [4], [4, 4]]
    passes = count(model)
    model.losses(some_batch(wrong=True))
    assert passes == [[4], [8, 4]], "false captions go along with the true ones"


def test_a_frozen_image_tower_serves_student_and_teacher():
    model, batch = tiny(**MOMENTUM), some_batch()
    model.image.load_state_dict(model.teacher.model.image.state_dict())
    masked = model.hide_words(batch.ids, batch.mask)
    expected = model.eval().losses(batch, NEXT, masked)
    runs = []
    model.teacher.model.image.register_forward_hook(lambda *_: runs.append(1))
    model.image.requires_grad_(False)
    losses = model.losses(batch, NEXT, masked)
    assert not runs and all(torch.equal(losses[name], expected[name]) for name in losses)


def test_the_teacher_steps_first_and_only_in_training():
    model, batch = tiny(**MOMENTUM), some_batch()
    before = {n: p.clone() for n, p in model.teacher.model.named_parameters()}
    own = dict(model.named_parameters())
    vectors = {}
    model.teacher.model.project_text.register_forward_hook(lambda *a: vectors.update(text=a[2]))
    model.eval().losses(batch)
    assert all(torch.equal(p, before[n]) for n, p in model.teacher.model.named_parameters()) and len(model.queue) == 0
    still = vectors["text"]
    model.train().losses(batch)
    for name, parameter in model.teacher.model.named_parameters():
        assert torch.allclose(parameter, 0.9 * before[name] + 0.1 * own[name]), name
    assert not torch.allclose(still, vectors["text"]), "it was asked after its step"
    texts = nn.functional.normalize(vectors["text"], dim=-1)
    assert len(model.queue) == 4 and torch.allclose(model.queue.past()[1], texts), "the teacher's vectors are kept"
    model.losses(batch)
    assert len(model.queue) == 8 and model.teacher.updates == 2


def test_an_image_that_comes_back_is_right_in_the_queue_too():
    model, batch = tiny(losses=("itc",), **MOMENTUM, alpha=0.0), some_batch()
    model.losses(batch)
    model.eval()
    vectors = model.embed_images(batch.images), model.embed_texts(batch.ids, batch.mask)
    slow = model.teacher.model
    theirs = slow.embed_images(batch.images), slow.embed_texts(batch.ids, batch.mask)
    total, share = 0, torch.cat([torch.eye(4), torch.eye(4)], dim=1) / 2
    for way in (0, 1):
        candidates = torch.cat([theirs[1 - way], model.queue.past()[1 - way]])
        total += soft_cross_entropy(vectors[way] @ candidates.T / model.temperature, share) / 2
    assert torch.allclose(model.losses(batch)["itc"], total)


def test_alpha_rises_with_the_teachers_steps_and_goes_where_it_is_asked():
    batch = some_batch()
    model = tiny(**{**MOMENTUM, "alpha_steps": 4}, alpha=0.8)
    shares = []
    for _ in range(6):
        shares.append(model.ask_teacher(batch.images, None)[1])
    assert shares == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    values, masked = {}, None
    for distil in ((), ("itc",), ("mlm",), ("itc", "mlm")):
        torch.manual_seed(3)
        model = tiny(**MOMENTUM, distil=distil).eval()
        masked = masked or model.hide_words(batch.ids, batch.mask)
        values[distil] = {name: v.item() for name, v in model.losses(batch, NEXT, masked).items()}
    plain, both = values[()], values["itc", "mlm"]
    assert plain["itm"] == both["itm"] and plain["itc"] != both["itc"] and plain["mlm"] != both["mlm"]
    assert values["itc",] == {**plain, "itc": both["itc"]} and values["mlm",] == {**plain, "mlm": both["mlm"]}


def test_no_row_of_the_same_image_or_caption_is_ever_a_negative(monkeypatch):
    batch = some_batch(6)
    batch.image_ids[3] = batch.image_ids[0]
    batch.ids[4], batch.mask[4] = batch.ids[1], batch.mask[1]
    together = same_group(batch.image_ids, batch.ids, batch.mask)
    assert together.sum() == 6 + 4
    drawn, plain = [], ALBEF.matching
    monkeypatch.setattr(
        ALBEF, "matching", lambda self, w, m, v, negatives: drawn.append(negatives) or plain(self, w, m, v, negatives)
    )
    for changes in ({}, dict(hard_negatives=False), dict(losses=("itm",)), MOMENTUM):
        model = tiny(**{**changes, "temperature": 0.5})
        for _ in range(10):
            model.losses(batch)
    for negatives in drawn:
        for column in (negatives.image, negatives.text):
            assert (column >= 0).all() and not together[torch.arange(6), column].any()


def test_hard_negatives_are_what_the_student_confuses_with_the_teachers_vectors(monkeypatch):
    model, batch = tiny(**MOMENTUM, losses=("itc", "itm")), some_batch()
    asked = {}

    def spy(similarity, together, back=None):
        asked.update(similarity=similarity, back=back)
        return hard_negatives(similarity, together, back=back)

    monkeypatch.setattr("minivlp.models.albef.hard_negatives", spy)
    model.losses(batch)
    slow, inputs = model.teacher.model, (batch.ids, batch.mask)
    images, texts = model.embed_images(batch.images), model.embed_texts(*inputs)
    assert torch.allclose(asked["similarity"], images @ slow.embed_texts(*inputs).T / model.temperature)
    assert torch.allclose(asked["back"], texts @ slow.embed_images(batch.images).T / model.temperature)
    asked.clear()
    tiny(hard_negatives=False).losses(batch)
    assert not asked, "at random if so asked"
    one_way, other_way = torch.full((3, 3), -30.0), torch.full((3, 3), -30.0)
    one_way[0, 1] = one_way[1, 0] = other_way[0, 2] = 30.0  # image 0 is like text 1, 1 like 0; text 0 like image 2
    drawn = hard_negatives(one_way, torch.eye(3, dtype=torch.bool), floor=0, back=other_way)
    assert drawn.text[0] == 1 and drawn.image[0] == 2


@pytest.mark.parametrize("kind", [ALBEF, XVLM])
def test_false_captions_are_wrong_pairs_for_matching_and_for_nothing_else(kind):
    batch = some_batch(wrong=True)
    plain = dataclasses.replace(batch, wrong_ids=None, wrong_mask=None)
    model = tiny(kind, losses=("itc", "itm", "mlm"))
    negatives = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([3, 0, -1, 2]))
    masked = model.hide_words(batch.ids, batch.mask)
    with_false, without = model.losses(batch, negatives, masked), model.losses(plain, negatives, masked)
    assert torch.allclose(with_false["itc"], without["itc"]) and torch.allclose(with_false["mlm"], without["mlm"])
    pairs = [(torch.arange(4),) * 2, negatives.image_pairs(), negatives.text_pairs()]
    images, ids, mask = batch.images, batch.ids, batch.mask
    logits = [model.match_logits(model.look(images[i], ids[j], mask[j])) for i, j in pairs]
    false = model.match_logits(model.look(images, batch.wrong_ids, batch.wrong_mask))
    assert torch.allclose(without["itm"], matching_loss(logits[0], torch.cat(logits[1:])))
    assert torch.allclose(with_false["itm"], matching_loss(logits[0], torch.cat([*logits[1:], false])))
    assert with_wrong(plain) == (plain.ids, plain.mask)


def test_masked_words_are_what_is_asked_and_sep_may_be_but_cls_and_padding_not():
    model = tiny(mask_rate=0.5)
    ids = torch.tensor([[1, 7, 8, 9, 2, 0]]).repeat(400, 1)
    hidden, labels = model.hide_words(ids, ids > 0)
    asked = (labels != IGNORE).double().mean(dim=0)
    assert asked[0] == asked[5] == 0 and (asked[1:5] - 0.5).abs().max() < 0.1
    assert (hidden == model.config.mask_id).any() and not torch.equal(hidden[asked.bool().expand_as(hidden)], ids)


def test_the_teacher_softens_masked_words():
    model, batch = tiny(losses=("mlm",), **MOMENTUM).eval(), some_batch()
    masked = model.hide_words(batch.ids, batch.mask)
    asked, slow = masked.labels != IGNORE, model.teacher.model
    logits = model.fill(batch.images, masked.ids, batch.mask)
    believed = slow.fill(batch.images, masked.ids, batch.mask)
    expected = masked_loss(logits[asked], masked.labels[asked], believed[asked], 0.4)
    assert torch.allclose(model.losses(batch, masked=masked)["mlm"], expected)


def test_padding_changes_nothing():
    batch = some_batch(wrong=True)
    pad = lambda x, value=0: nn.functional.pad(x, (0, 4), value=value)  # noqa: E731
    longer = dataclasses.replace(
        batch,
        **{f"{kind}ids": pad(getattr(batch, f"{kind}ids"), 9) for kind in ("", "wrong_")},
        **{f"{kind}mask": pad(getattr(batch, f"{kind}mask")) for kind in ("", "wrong_")},
    )
    model = tiny(**MOMENTUM).eval()
    hidden, labels = model.hide_words(batch.ids, batch.mask)
    one = model.losses(batch, NEXT, Masked(hidden, labels))
    two = model.losses(longer, NEXT, Masked(pad(hidden, 9), pad(labels, IGNORE)))
    assert all(torch.allclose(one[name], two[name]) for name in one)


class Killed(BaseException):
    """Like a kill: nothing in the loop catches it."""


@pytest.mark.parametrize("kill_at", [4, 7])
def test_a_killed_run_resumed_equals_the_unbroken_one_teacher_and_queue_included(tmp_path, kill_at):
    torch.set_default_dtype(torch.float32)

    def fresh(seed):
        torch.manual_seed(seed)
        return tiny(momentum=0.8, queue_size=7, alpha_steps=6)

    def kill(row):
        if row["step"] == kill_at:
            raise Killed

    settings = Settings(steps=9, warmup=2, save_every=3)
    quiet = dict(bar=False, device="cpu")
    model = fresh(0)
    unbroken = fit(model, lambda step: some_batch(seed=step), settings, **quiet)
    wanted = {name: tensor.clone() for name, tensor in weights(model).items()}
    with pytest.raises(Killed):
        fit(fresh(0), lambda step: some_batch(seed=step), settings, on_step=[kill], run_dir=tmp_path, **quiet)
    model = fresh(9)  # a new process starts from anything
    history = fit(model, lambda step: some_batch(seed=step), settings, run_dir=tmp_path, **quiet)
    assert {"teacher.updates", "queue.count", "queue.ids", "teacher.model.project_text.weight"} <= wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(model).items())
    assert [row["loss"] for row in history.steps] == [row["loss"] for row in unbroken.steps]
    assert model.teacher.updates == 9 and model.queue.count == 36


def test_presets_and_parameter_counts():
    with torch.device("meta"):
        models = {name: ALBEF(getattr(ALBEFConfig, name)()) for name in ("nano", "small", "paper")}
    paper = models["paper"]
    # the paper names ViT-B/16 with 85.8 M and BERT-base, fusing half and head for words included, with 123.7 M; BERT's
    # two token-type rows are not there: one is part of the positions, nothing reads the other
    image = sum(p.numel() for p in paper.image.parameters())
    text = sum(p.numel() for p in nn.ModuleList([paper.text, paper.fusion, paper.word_head]).parameters())
    assert (image, text) == (85_844_736, 123_697_722 - 2 * 768)
    own = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    assert own["paper"] == image + text + 2 * (768 * 256 + 256) + 2 * 768 + 2 + 1 == 209_936_189
    assert round(own["nano"] / 1e5) == 19 and round(own["small"] / 1e6) == 55
    towers = {n for n in models["nano"].state_dict() if n.startswith(("image.", "text.", "project_", "fusion."))}
    nano = ALBEFConfig.nano()
    with torch.device("meta"):
        theirs = XVLM(XVLMConfig.nano()).state_dict()
    assert all(theirs[n].shape == models["nano"].state_dict()[n].shape for n in towers), "the shared towers fit"
    assert nano.image.image_size == 64 and nano.text.context_length == 56
