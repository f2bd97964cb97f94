"""BLIP: the released model's numbers to 1e-9, transformers' model live, what is shared, and what must hold."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from released import BERT_LAYER
from safetensors.torch import load_file

from minivlp.data.batch import Batch
from minivlp.layers.attention import record_attention
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.models.blip import BLIP, CROSS_ATTENTION, SELF_ATTENTION, THE_REST, BLIPConfig, begin
from minivlp.objectives.captioning import caption_loss, next_words
from minivlp.objectives.contrastive import soft_cross_entropy
from minivlp.objectives.matching import Negatives, hard_negatives, negative_weights
from minivlp.objectives.momentum import soft_targets

GOLDEN = Path(__file__).parent / "golden"


pytestmark = pytest.mark.usefixtures("float64")


# ---------------------------------------------------------------------------------------------- the released weights

STACKED = {**BERT_LAYER, "attention.self.{qkv}": "self_attention.qkv", "crossattention.self.{kv}": "cross_attention.kv"}
PARTS = {"{qkv}": ("query", "key", "value"), "{kv}": ("key", "value")}  # what one matrix of ours stacks
IMAGE_LAYER = {  # ours: (the released code's, transformers')
    "self_attention.qkv": ("attn.qkv", "self_attn.qkv"),
    "self_attention.out": ("attn.proj", "self_attn.projection"),
    "self_norm": ("norm1", "layer_norm1"),
    "feed_norm": ("norm2", "layer_norm2"),
    "feed_forward.up": ("mlp.fc1", "mlp.fc1"),
    "feed_forward.down": ("mlp.fc2", "mlp.fc2"),
}


def sources(bert: str, layers: int) -> dict[str, list[str]]:
    """Our name of each tensor of a text stack -> the reference's names, several where ours stacks them."""
    names = {
        "embed.words.weight": [f"{bert}embeddings.word_embeddings.weight"],
        "embed.positions": [f"{bert}embeddings.position_embeddings.weight"],
    }
    for end in ("weight", "bias"):
        names[f"embed.norm.{end}"] = [f"{bert}embeddings.LayerNorm.{end}"]
        for index in range(layers):
            for theirs, ours in STACKED.items():
                slot = next((slot for slot in PARTS if slot in theirs), None)
                full = f"{bert}encoder.layer.{index}.{theirs}.{end}"
                names[f"blocks.{index}.{ours}.{end}"] = [full.replace(slot, p) for p in PARTS[slot]] if slot else [full]
    return names


def text_weights(stack: str, bert: str, layers: int, state: dict) -> dict:
    """One text stack; cross-attention is left out where the reference has none."""
    named = sources(bert, layers).items()
    return {f"{stack}.{ours}": torch.cat([state[n] for n in theirs]) for ours, theirs in named if theirs[0] in state}


def image_weights(tower: str, state: dict, layers: int, released: bool) -> dict:
    which = 0 if released else 1
    first, positions = ("cls_token", "pos_embed") if released else (
        "embeddings.class_embedding", "embeddings.position_embedding")  # fmt: skip
    table = state[tower + positions][0]
    new = {
        "image.class_token": state[tower + first][0, 0],
        "image.class_position": table[0],
        "image.positions": table[1:],
    }
    for end in ("weight", "bias"):
        patches = "patch_embed.proj" if released else "embeddings.patch_embedding"
        new[f"image.patches.project.{end}"] = state[f"{tower}{patches}.{end}"]
        new[f"image.norm.{end}"] = state[f"{tower}{'norm' if released else 'post_layernorm'}.{end}"]
        for index in range(layers):
            block = f"{tower}{'blocks' if released else 'encoder.layers'}.{index}"
            for ours, theirs in IMAGE_LAYER.items():
                new[f"image.blocks.{index}.{ours}.{end}"] = state[f"{block}.{theirs[which]}.{end}"]
    return new


def head_weights(head: str, state: dict, bert: str) -> dict:
    new = {
        "word_head.decoder.weight": state[f"{bert}embeddings.word_embeddings.weight"],
        "word_head.decoder.bias": state[f"{head}bias"],
    }
    for end in ("weight", "bias"):
        new[f"word_head.dense.{end}"] = state[f"{head}transform.dense.{end}"]
        new[f"word_head.norm.{end}"] = state[f"{head}transform.LayerNorm.{end}"]
    return new


def load(model: BLIP, weights: dict, leave: tuple[str, ...] = ()) -> None:
    """All of `weights`, and nothing of the model left out but what begins with `leave`."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith(leave) for name in missing), (missing, unexpected)


def config_of(numbers: dict, **more) -> BLIPConfig:
    width, heads = numbers["vision_width"], numbers["vision_heads"]
    hidden = numbers.get("vision_ffn") or numbers["vision_mlp_ratio"] * width
    block = BlockConfig(width, heads, hidden, norm_eps=1e-6)
    text_block = BlockConfig(
        numbers["text_width"], numbers["text_heads"], numbers["text_ffn"], norm_eps=1e-12, norm_first=False
    )
    return BLIPConfig(
        image=ImageConfig(numbers["image_size"][0], numbers["patch_size"], numbers["vision_layers"], block),
        text=TextConfig(
            numbers["vocab"], numbers.get("max_position", 16), numbers["text_layers"], text_block, embed_norm=True
        ),
        embed_width=numbers["embed_dim"],
        **more,
    )


class Golden:
    """One fixture: the reference's weights, inputs and outputs."""

    def __init__(self, name: str) -> None:
        self.about = json.loads((GOLDEN / f"{name}.json").read_text())
        tensors = load_file(GOLDEN / f"{name}.safetensors")
        self.state, self.given, self.out = (
            {
                n.removeprefix(p): t.double() if t.is_floating_point() else t
                for n, t in tensors.items()
                if n.startswith(p)
            }
            for p in ("state.", "in.", "out.")
        )
        self.tied = self.about["state"]["tied"]
        self.state |= {alias: self.state[stored] for alias, stored in self.tied.items()}
        self.numbers, self.checked = self.about["config"], set()
        self.images = self.given["pixel_values"]
        self.ids, self.mask = self.given["input_ids"], self.given["attention_mask"].bool()

    def same(self, name: str, value: torch.Tensor) -> None:
        expected = self.out[name]
        assert value.shape == expected.shape, name
        assert (value.detach() - expected).abs().max() <= self.about["tolerance"]["default"], name
        self.checked.add(name)


GRADIENTS = {
    "temp": "temperature",
    "vision_proj.weight": "project_image.weight",
    "itm_head.weight": "match_head.weight",
    "visual_encoder.norm.weight": "image.norm.weight",
    "text_encoder.embeddings.LayerNorm.weight": "text.embed.norm.weight",
    "text_encoder.encoder.layer.0.crossattention.self.query.bias": "text.blocks.0.cross_attention.q.bias",
    "text_encoder.embeddings.word_embeddings.weight": "text.embed.words.weight",
    "text_encoder.encoder.layer.0.attention.self.query.bias": "text.blocks.0.self_attention.qkv.bias",
    "text_decoder.bert.encoder.layer.0.attention.self.query.bias": "decoder.blocks.0.self_attention.qkv.bias",
}


def released(golden: Golden, **more) -> BLIP:
    """The pre-training model with the released weights, its teacher and the filled queue, before its step."""
    n = golden.numbers
    config = config_of(
        n,
        temperature=n["temp"],
        decode_id=n["dec_token_id"],
        match_id=n["enc_token_id"],
        momentum=n["momentum"],
        queue_size=n["queue_size"],
        alpha_steps=0,
        **more,
    )
    model, state, layers = BLIP(config), golden.state, n["vision_layers"]
    weights = image_weights("visual_encoder.", state, layers, True)
    weights |= text_weights("text", "text_encoder.", n["text_layers"], state)
    weights |= text_weights("decoder", "text_decoder.bert.", n["text_layers"], state)
    weights |= head_weights("text_decoder.cls.predictions.", state, "text_decoder.bert.")
    slow = image_weights("visual_encoder_m.", state, layers, True)
    slow |= text_weights("text", "text_encoder_m.", n["text_layers"], state)
    for end in ("weight", "bias"):
        weights[f"project_image.{end}"], weights[f"project_text.{end}"] = (
            state[f"{t}_proj.{end}"] for t in ("vision", "text")
        )
        slow[f"project_image.{end}"], slow[f"project_text.{end}"] = (
            state[f"{t}_proj_m.{end}"] for t in ("vision", "text")
        )
        weights[f"match_head.{end}"] = state[f"itm_head.{end}"]
    weights["temperature"] = state["temp"]
    weights |= {f"teacher.model.{name}": value for name, value in slow.items()}
    weights |= {"queue.images": state["image_queue"].T, "queue.texts": state["text_queue"].T}
    weights["queue.ids"] = torch.full((n["queue_size"], 2), -1)  # of no image and no caption of the batch
    weights["queue.count"] = torch.tensor(n["queue_size"] + n["queue_ptr"])  # full, and then a little
    load(model, weights, leave=("teacher.updates",))
    return model


@pytest.mark.parametrize("alpha", ["0", "0.4"])
def test_every_number_of_the_released_model(alpha):
    g = Golden("blip_pretrain")
    model, pad = released(g, alpha=float(alpha)), g.mask[..., None]
    n, ids, mask = g.numbers, g.ids, g.mask
    visual = model.encode_image(g.images)
    g.same("image_tokens", visual)
    words = model.encode_text(ids, mask)
    g.same("text_tokens", words * pad)
    g.same("fused_tokens", model.look(g.images, ids, mask) * pad)
    told = model.tell(begin(ids, n["dec_token_id"]), visual)
    g.same("decoder_tokens", told * pad)
    g.same("lm_logits", model.word_head(told) * pad)
    g.same("image_feat", model.embed_images(g.images))
    g.same("text_feat", model.embed_texts(ids, mask))
    g.same("caption_logprob", model.caption_logprob(g.images, ids, mask))
    given = n["prompt_length"]
    greedy = model.generate(g.images, ids[:, 1:given], max_length=given + n["greedy_steps"])
    g.same("greedy_ids", torch.cat([torch.full_like(ids[:, :1], n["dec_token_id"]), greedy], dim=1))

    # one training step: the teacher moves, is asked, and what it said joins the queue
    model.train()
    batch = Batch(g.images, ids, mask, torch.arange(len(ids)))
    old_images, old_texts = (x.clone() for x in model.queue.past())
    negatives = Negatives(g.given["itm_neg_image_for_text"], g.given["itm_neg_text_for_image"])
    losses = model.losses(batch, negatives)
    g.same(f"loss_itc.alpha{alpha}", losses["itc"])
    g.same("loss_itm", losses["itm"])
    g.same("loss_lm", losses["lm"])
    g.same(f"loss_total.alpha{alpha}", sum(losses.values()))
    g.same("image_queue_after", model.queue.images.T)
    g.same("text_queue_after", model.queue.texts.T)
    g.same("queue_ptr_after", (model.queue.count % n["queue_size"])[None])
    sum(losses.values()).backward()
    for theirs, ours in GRADIENTS.items():
        gradient = model.get_parameter(ours).grad
        g.same(f"grad.{theirs}.alpha{alpha}", gradient[: n["text_width"]] if ours.endswith("qkv.bias") else gradient)

    teacher = model.teacher.model
    patches = teacher.image
    g.same("ema.visual_encoder_m.patch_embed.proj.bias", patches.patches.project.bias)
    g.same("ema.visual_encoder_m.cls_token", patches.class_token[None, None])
    g.same("ema.vision_proj_m.weight", teacher.project_image.weight)
    g.same("ema.text_encoder_m.embeddings.LayerNorm.weight", teacher.text.embed.norm.weight)
    query = teacher.text.blocks[0].cross_attention.q.bias
    g.same("ema.text_encoder_m.encoder.layer.0.crossattention.self.query.bias", query)
    g.same("ema.text_proj_m.bias", teacher.project_text.bias)

    # what the losses are made of
    v, t = model.embed_visual(visual), model.embed_words(words)
    slow_v, slow_t = teacher.embed_images(g.images), teacher.embed_texts(ids, mask)
    g.same("image_feat_m", slow_v)
    g.same("text_feat_m", slow_t)
    positive = torch.eye(len(ids), len(ids) + n["queue_size"], dtype=torch.bool)
    likeness = []
    for way, own, slow, others in (
        ("i2t", v, slow_v, torch.cat([slow_t, old_texts])),
        ("t2i", t, slow_t, torch.cat([slow_v, old_images])),
    ):
        logits = own @ others.T / model.temperature
        targets = soft_targets(slow @ others.T / model.temperature, positive, float(alpha))
        g.same(f"sim_{way}", logits)
        g.same(f"itc_targets_{way}.alpha{alpha}", targets)
        g.same(f"loss_itc_{way}.alpha{alpha}", soft_cross_entropy(logits, targets))
        weights = negative_weights(logits[:, : len(ids)], torch.eye(len(ids), dtype=torch.bool), floor=1e-4)
        g.same(f"itm_sampling_weights_{way}", weights)
        likeness.append(logits)
    right = torch.arange(len(ids))
    pairs = [(right, right), negatives.image_pairs(), negatives.text_pairs()]
    g.same("itm_logits", torch.cat([model.match_logits(model.fuse(ids[j], mask[j], visual[i])) for i, j in pairs]))
    for name, smoothing, prompt in (("", 0.1, 1), ("_no_smoothing", 0.0, 1), ("_prompt", 0.1, given)):
        labels = next_words(ids, mask, prompt)
        g.same(f"loss_lm{name}", caption_loss(model.word_head(told)[:, :-1], labels, smoothing))
    model.config = dataclasses.replace(model.config, losses=("lm",), prompt=given)
    g.same("loss_lm_prompt", model.losses(batch)["lm"])
    other_alpha = {name for name in g.out if name.endswith(".alpha0.4" if alpha == "0" else ".alpha0")}
    assert g.checked | other_alpha == set(g.out)


def captioner(numbers: dict, state: dict, **more) -> BLIP:
    """Ours with the weights of transformers' captioning model."""
    model = BLIP(config_of(numbers, losses=("lm",), momentum=None, **more))
    weights = image_weights("vision_model.", state, numbers["vision_layers"], False)
    weights |= text_weights("decoder", "text_decoder.bert.", numbers["text_layers"], state)
    weights |= head_weights("text_decoder.cls.predictions.", state, "text_decoder.bert.")
    load(model, weights, leave=("text.", "project_", "temperature", "match_head."))
    return model


def test_every_number_of_the_captioner():
    g = Golden("blip_caption_hf")
    n, ids, mask = g.numbers, g.ids, g.mask
    model = captioner(n, g.state, decode_id=n["vocab"] - 2, smoothing=n["label_smoothing"])
    visual = model.encode_image(g.images)
    g.same("image_tokens", visual)
    g.same("logits", model.word_head(model.tell(ids, visual)) * mask[..., None])
    batch = Batch(g.images, ids, mask, torch.arange(len(ids)))
    g.same("loss", model.losses(batch)["lm"])
    greedy = model.generate(g.images, max_length=1 + n["greedy_steps"])
    g.same("greedy_ids", torch.cat([ids[:, :1], greedy], dim=1))
    model.config = dataclasses.replace(model.config, prompt=n["prompt_length"])
    g.same("loss_prompt", model.losses(batch)["lm"])
    assert g.checked == set(g.out)


# ------------------------------------------------------------------------------------------------- transformers, live

TINY = {"image_size": [32, 32], "patch_size": 8, "vision_width": 32, "vision_layers": 2, "vision_heads": 4}
TINY |= {"vision_ffn": 48, "text_width": 24, "text_layers": 2, "text_heads": 3, "text_ffn": 40, "vocab": 50}
TINY |= {"embed_dim": 12}


def reference(kind: str):
    """A tiny random BLIP of transformers, every parameter moved."""
    from transformers import BlipConfig
    from transformers.models.blip import modeling_blip

    config = BlipConfig(
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32,
            patch_size=8, layer_norm_eps=1e-6,
        ),
        text_config=dict(
            vocab_size=50, hidden_size=24, encoder_hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=3, max_position_embeddings=16, bos_token_id=48, eos_token_id=2, sep_token_id=2,
            pad_token_id=0, label_smoothing=0.1,
        ),
        image_text_hidden_size=12,
    )  # fmt: skip
    model = getattr(modeling_blip, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def some_pairs(count: int = 4, length: int = 9, vocabulary: int = 48) -> Batch:
    """Images with texts of random length, [CLS] first and [SEP] last."""
    lengths = torch.randint(4, length + 1, (count, 1))
    lengths[0] = length
    places = torch.arange(length)
    ids = torch.randint(7, vocabulary, (count, length)).masked_fill(places == lengths - 1, 2) * (places < lengths)
    ids[:, 0] = 1
    return Batch(torch.randn(count, 3, 32, 32), ids, places < lengths, torch.arange(count))


def test_logits_and_loss_of_transformers_captioner():
    theirs = reference("BlipForConditionalGeneration")
    ours = captioner(TINY, theirs.state_dict(), decode_id=48)
    batch = some_pairs()
    ids = begin(batch.ids, 48)
    with torch.no_grad():
        labels = ids.masked_fill(~batch.mask, -100)
        expected = theirs(pixel_values=batch.images, input_ids=ids, attention_mask=batch.mask.long(), labels=labels)
        visual = ours.encode_image(batch.images)
        logits = ours.word_head(ours.tell(ids, visual))
        assert (visual - expected.last_hidden_state).abs().max() < 1e-10
        assert ((logits - expected.logits) * batch.mask[..., None]).abs().max() < 1e-10
        assert abs(ours.losses(batch)["lm"] - expected.loss) < 1e-10


def test_matching_and_similarity_of_transformers_retrieval():
    theirs = reference("BlipForImageTextRetrieval")
    state = theirs.state_dict()
    ours = BLIP(config_of(TINY, match_id=49, momentum=None))
    weights = image_weights("vision_model.", state, 2, False) | text_weights("text", "text_encoder.", 2, state)
    for end in ("weight", "bias"):
        weights[f"project_image.{end}"] = state[f"vision_proj.{end}"]
        weights[f"project_text.{end}"] = state[f"text_proj.{end}"]
        weights[f"match_head.{end}"] = state[f"itm_head.{end}"]
    load(ours, weights, leave=("decoder.", "word_head.", "temperature"))
    batch = some_pairs()
    ids, mask = begin(batch.ids, 49), batch.mask.long()
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=batch.images, attention_mask=mask, use_itm_head=True).itm_score
        assert (ours.match_logits(ours.look(batch.images, batch.ids, batch.mask)) - expected).abs().max() < 1e-10
        assert (ours.match(batch.images, batch.ids, batch.mask) - expected.softmax(1)[:, 1]).abs().max() < 1e-10
        cosines = theirs(
            input_ids=batch.ids, pixel_values=batch.images, attention_mask=mask, use_itm_head=False
        ).itm_score
        similarity = ours.similarity(batch.images, batch.ids, batch.mask) * ours.temperature
        assert (similarity - cosines).abs().max() < 1e-10


GENERATION = [
    {},
    {"min_length": 9},
    {"repetition_penalty": 1.7},
    {"beams": 3},
    {"beams": 4, "length_penalty": 0.0},
    {"beams": 3, "length_penalty": 2.0, "min_length": 6},
    {"beams": 2, "length_penalty": -1.0},
    {"beams": 3, "repetition_penalty": 1.5},
    {"beams": 3, "max_length": 5},
]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_and_beam_search_write_what_transformers_writes(seed):
    torch.manual_seed(seed)
    theirs = reference("BlipForConditionalGeneration")
    with torch.no_grad():  # sharp opinions, and some love of ending, or all texts would be alike and of full length
        theirs.text_decoder.cls.predictions.decoder.weight.mul_(6)
        theirs.text_decoder.cls.predictions.bias[2] += 6
    ours = captioner(TINY, theirs.state_dict(), decode_id=48)
    images, prompts = 2 * torch.randn(6, 3, 32, 32), torch.randint(7, 48, (6, 2))
    lengths = set()
    for options in GENERATION:
        for prompt in (None, prompts):
            same = {"max_length": 14, **options}
            written = ours.generate(images, prompt, **same)
            beams = same.pop("beams", 1)
            # transformers drops the last of the ids it is given, usually [SEP], and puts its own [DEC] first
            given = None if prompt is None else torch.nn.functional.pad(prompt, (1, 1))
            expected = theirs.generate(images, given, num_beams=beams, do_sample=False, **same)[:, 1:]
            assert texts(written) == texts(expected), options
            lengths |= {len(text) for text in texts(written)}
    assert len(lengths) > 4  # texts of many lengths were compared


def texts(ids: torch.Tensor) -> list[list[int]]:
    """Each row up to and with [SEP]; what fills it up is another story (transformers' beam search takes [SEP])."""
    return [row[: row.index(2) + 1] if 2 in row else row for row in ids.tolist()]


def test_nucleus_sampling_draws_as_transformers_does():
    """The first two words, 1,500 times each: how often each pair, by a chi-square test of both against the truth."""
    from scipy.stats import chisquare

    theirs = reference("BlipForConditionalGeneration")
    with torch.no_grad():
        theirs.text_decoder.cls.predictions.decoder.weight.mul_(4)
    ours = captioner(TINY, theirs.state_dict(), decode_id=48)
    image = torch.randn(1, 3, 32, 32)
    truth = {}
    with torch.no_grad():
        visual = ours.encode_image(image)
        first = after(ours, visual, [48])
        for i in first.nonzero()[:, 0].tolist():
            for j, p in enumerate((first[i] * after(ours, visual, [48, i])).tolist()):
                truth[i, j] = p
    truth = {pair: p for pair, p in truth.items() if p > 0}
    assert 10 < len(truth) < 1000
    many = image.expand(1500, -1, -1, -1)
    torch.manual_seed(0)
    for drawn in (
        ours.generate(many, top_p=0.6, max_length=3),
        theirs.generate(many, do_sample=True, top_p=0.6, top_k=0, max_length=3)[:, 1:],
    ):
        pairs = [tuple(row) for row in drawn.tolist()]
        assert set(pairs) <= set(truth)  # nothing from outside the nucleus
        often = sorted(truth, key=truth.get)[::-1]
        frequent = [pair for pair in often if truth[pair] * 1500 >= 5]
        seen = [pairs.count(pair) for pair in frequent]
        rest = 1 - sum(truth[pair] for pair in frequent)
        expected = [1500 * truth[pair] for pair in frequent] + [1500 * rest] * (rest > 1e-9)
        seen += [1500 - sum(seen)] * (rest > 1e-9)
        assert chisquare(seen, expected).pvalue > 1e-3


def after(model: BLIP, visual: torch.Tensor, ids: list[int], top_p: float = 0.6) -> torch.Tensor:
    """(V,) probability of each next word, by transformers' own filter."""
    from transformers import TopPLogitsWarper

    logits = model.word_head(model.tell(torch.tensor([ids]), visual))[:, -1]
    return TopPLogitsWarper(top_p)(None, logits).softmax(dim=-1)[0]


# --------------------------------------------------------------------------------------------------- what is shared


def test_encoder_and_decoder_share_all_but_self_attention_as_in_the_released_model():
    """Each of the decoder's 56 tensors is the encoder's own in ours exactly where it is in the released one: 36."""
    g = Golden("blip_pretrain")
    model, prefix = BLIP(config_of(g.numbers, momentum=None)), "text_decoder.bert."
    text, decoder = dict(model.text.named_parameters()), dict(model.decoder.named_parameters())
    theirs_of = sources(prefix, g.numbers["text_layers"])
    assert set(theirs_of) == set(text) == set(decoder)
    shared = {name for ours, names in theirs_of.items() if text[ours] is decoder[ours] for name in names}
    assert len(shared) == 36 and sum(map(len, theirs_of.values())) == 56
    assert shared == {name for name in g.tied if name.startswith(prefix)}
    assert model.word_head.decoder.weight is model.decoder.embed.words.weight


def text_stack(shared: tuple[str, ...]) -> int:
    """Parameters of the paper's text encoder and decoder together."""
    with torch.device("meta"):
        model = BLIP(dataclasses.replace(BLIPConfig.paper(), shared=shared, momentum=None))
    return sum(p.numel() for p in {*model.image.parameters(), *model.text.parameters(), *model.decoder.parameters()})


def test_the_papers_sharing_ablation_has_its_parameter_counts():
    """Image tower and both text stacks; the paper counts 224, 252, 252 and 361 M, with what it has besides."""
    everything = SELF_ATTENTION + CROSS_ATTENTION + THE_REST
    counts = [everything, BLIPConfig.paper().shared, SELF_ATTENTION + THE_REST, ()]
    assert [round(text_stack(shared) / 1e6) for shared in counts] == [223, 251, 251, 360]
    with pytest.raises(ValueError, match="'self_atention' to share"):
        BLIP(dataclasses.replace(BLIPConfig.nano(), shared=("self_atention",)))


def test_the_papers_captioner_is_as_large_as_transformers():
    from transformers import BlipConfig, BlipForConditionalGeneration

    with torch.device("meta"):
        ours = BLIP(dataclasses.replace(BLIPConfig.paper(), momentum=None))
        theirs = BlipForConditionalGeneration(BlipConfig(vision_config={"image_size": 224}))
    used = {*ours.image.parameters(), *ours.decoder.parameters(), *ours.word_head.parameters()}
    assert sum(p.numel() for p in used) == sum(p.numel() for p in theirs.parameters())


# --------------------------------------------------------------------------------------------------- what must hold


def tiny(**changes) -> BLIP:
    """A nano model, smaller still, with every parameter moved, so that nothing hides behind a zero."""
    nano = BLIPConfig.nano(50)
    block = dataclasses.replace(nano.image.block, width=32, heads=2, hidden=64)
    small = {
        "image": dataclasses.replace(nano.image, image_size=32, block=block),
        "text": dataclasses.replace(nano.text, block=block),
        "queue_size": 8,
    }
    model = BLIP(dataclasses.replace(nano, **{**small, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def numbers(losses: dict) -> dict[str, float]:
    return {name: value.item() for name, value in losses.items()}


def test_losses_before_training():
    torch.set_default_dtype(torch.float32)
    model = BLIP(BLIPConfig.nano())
    batch = some_pairs(16, 12, 1200)
    batch.images = torch.randn(16, 3, 64, 64)
    losses = numbers(model.losses(batch))
    assert set(losses) == {"itc", "itm", "lm"}
    assert 2.2 < losses["itc"] < 4.5  # ln 16 = 2.8, and whatever the untrained towers think
    assert abs(losses["itm"] - math.log(2)) < 0.15
    assert abs(losses["lm"] - math.log(1200)) < 0.6


def test_only_the_losses_of_the_config_are_computed_and_each_reaches_its_part():
    batch = some_pairs()
    reached = {}
    for on in ("itc", "itm", "lm"):
        model = tiny(losses=(on,))
        losses = model.losses(batch)
        assert set(losses) == {on}
        losses[on].backward()
        reached[on] = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
        cross = model.text.blocks[0].cross_attention.q.weight.grad
        assert (cross is None) is (on == "itc"), "shared cross-attention learns from ITM and from LM"
    assert reached["itc"] == {"image", "text", "project_image", "project_text", "temperature"}
    assert reached["itm"] == {"image", "text", "match_head"}
    assert reached["lm"] == {"image", "text", "decoder", "word_head"}


@pytest.mark.parametrize("shared", [(), SELF_ATTENTION + CROSS_ATTENTION + THE_REST])
def test_any_sharing_trains_and_writes(shared):
    model, batch = tiny(shared=shared), some_pairs()
    sum(model.losses(batch).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.generate(batch.images, max_length=6).shape == (4, 5)


def test_the_decoder_never_looks_ahead_and_the_encoder_does():
    model, batch = tiny(), some_pairs()
    batch.mask[:] = True
    changed = batch.ids.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 40 + 7
    visual = model.encode_image(batch.images)
    told, told_changed = model.tell(batch.ids, visual), model.tell(changed, visual)
    assert torch.equal(told[:, :6], told_changed[:, :6]) and not torch.isclose(told[:, 6:], told_changed[:, 6:]).all()
    for read in (model.encode_text, lambda ids, mask: model.fuse(ids, mask, visual)):
        assert not torch.isclose(read(batch.ids, batch.mask)[:, 0], read(changed, batch.mask)[:, 0]).all()


def test_what_stands_behind_the_text_and_at_its_start_does_not_matter():
    """Padding is never seen nor asked; [CLS] gives way to [ENC] and [DEC]."""
    model, batch = tiny(), some_pairs()
    negatives = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 3, 0]))
    losses = numbers(model.losses(batch, negatives))
    ids = torch.nn.functional.pad(batch.ids, (0, 3))
    ids[~torch.nn.functional.pad(batch.mask, (0, 3))] = 30
    padded = dataclasses.replace(batch, ids=ids, mask=torch.nn.functional.pad(batch.mask, (0, 3)))
    assert numbers(model.losses(padded, negatives)) == pytest.approx(losses, abs=1e-12)
    other_start = dataclasses.replace(batch, ids=begin(batch.ids, 30))
    again = numbers(model.losses(other_start, negatives))
    assert again["itm"] == losses["itm"] and again["lm"] == losses["lm"] and again["itc"] != losses["itc"]


def test_every_verb_looks_at_its_own_image():
    model, batch = tiny(), some_pairs()
    turned = batch.images.roll(1, 0)
    ids, mask = batch.ids, batch.mask
    for verb in (model.match, model.caption_logprob):
        there, elsewhere = verb(batch.images, ids, mask), verb(turned, ids, mask)
        assert there.shape == (4,) and not torch.isclose(there, elsewhere).any()
        alone = torch.cat([verb(batch.images[i : i + 1], ids[i : i + 1], mask[i : i + 1]) for i in range(4)])
        assert torch.allclose(alone, there, atol=1e-12)
    assert (model.match(batch.images, ids, mask) > 0).all() and (model.match(batch.images, ids, mask) < 1).all()
    rows = torch.tensor([3, 0, 0, 1])
    many = model.match_many(batch.images, rows, ids, mask)  # each image encoded once
    assert torch.allclose(many, model.match(batch.images[rows], ids, mask), atol=1e-12)
    table = model.similarity(batch.images, ids, mask)
    assert torch.allclose(model.similarity(turned, ids, mask), table.roll(1, 0))
    assert torch.allclose(model.embed_images(turned).norm(dim=1), torch.ones(4))


def test_a_prompt_is_given_and_not_asked():
    model, batch = tiny(losses=("lm",), prompt=3), some_pairs()
    changed = dataclasses.replace(batch, ids=batch.ids.clone())
    labels = next_words(batch.ids, batch.mask, 3)
    assert (labels[:, :2] == -100).all() and torch.equal(labels[0, 2:], batch.ids[0, 3:])
    changed.ids[:, 2] += 1  # a word of the prompt is still read
    assert model.losses(changed)["lm"] != model.losses(batch)["lm"]
    assert torch.equal(next_words(changed.ids, batch.mask, 3), labels)
    prompts = batch.ids[:, 1:3]
    assert torch.equal(model.generate(batch.images, prompts, max_length=8)[:, :2], prompts)
    assert torch.equal(model.generate(batch.images, prompts[0], beams=2, max_length=8)[:, :2], prompts[:1].expand(4, 2))


def test_false_captions_are_wrong_pairs_for_matching():
    model, batch = tiny(), some_pairs()
    negatives = Negatives(torch.tensor([1, 2, 3, -1]), torch.tensor([1, -1, 3, 0]))
    wrong = some_pairs(4, 12)
    more = dataclasses.replace(batch, wrong_ids=wrong.ids, wrong_mask=wrong.mask)
    visual, right = model.encode_image(batch.images), torch.arange(4)
    pairs = [(right, right), negatives.image_pairs(), negatives.text_pairs()]
    logits = [model.match_logits(model.fuse(batch.ids[j], batch.mask[j], visual[i])) for i, j in pairs]
    logits.append(model.match_logits(model.fuse(wrong.ids, wrong.mask, visual)))
    labels = torch.tensor([1] * 4 + [0] * (3 + 3 + 4))
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), labels)
    losses, plain = model.losses(more, negatives), model.losses(batch, negatives)
    assert losses["itm"].item() == pytest.approx(expected.item(), abs=1e-12)
    assert losses["itc"] == plain["itc"] and losses["lm"] == plain["lm"]


def test_wrong_pairs_are_drawn_by_likeness_as_in_the_released_code(monkeypatch):
    """By both directions' own similarities, and with a floor of 1e-4 under the weights."""
    from minivlp.models import blip

    def drawn(*arguments, **options):
        asked.append((*arguments, options))
        return hard_negatives(*arguments, **options)

    asked = []
    monkeypatch.setattr(blip, "hard_negatives", drawn)
    model, batch = tiny(), some_pairs()
    model.losses(batch)
    ((likeness, together, options),) = asked
    assert torch.allclose(likeness, model.similarity(batch.images, batch.ids, batch.mask))
    assert torch.allclose(options["back"], likeness.T) and options["floor"] == 1e-4
    assert torch.equal(together, torch.eye(4, dtype=torch.bool))


def test_captions_of_one_image_are_never_its_wrong_pairs():
    model, batch = tiny(), some_pairs()
    batch.image_ids = torch.zeros(4, dtype=torch.long)
    right = model.match_logits(model.look(batch.images, batch.ids, batch.mask))
    expected = torch.nn.functional.cross_entropy(right, torch.ones(4, dtype=torch.long))
    for on in (("itc", "itm"), ("itm",)):  # drawn by likeness, drawn evenly
        model.config = dataclasses.replace(model.config, losses=on)
        assert model.losses(batch)["itm"].item() == pytest.approx(expected.item(), abs=1e-12)


# ------------------------------------------------------------------------------------------------------- the teacher

MOMENTUM = {"momentum": 0.9, "alpha": 0.4, "alpha_steps": 10}


def test_the_teacher_moves_in_training_only_and_only_for_itc():
    batch = some_pairs()
    for losses, training, moves in ((("itc", "lm"), True, 1), (("itc", "lm"), False, 0), (("lm",), True, 0)):
        model = tiny(**MOMENTUM, losses=losses).train(training)
        before = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("teacher.model")}
        model.losses(batch)["lm"].backward()
        assert model.teacher.updates == moves and len(model.queue) == 4 * moves
        for name, old in before.items():
            assert torch.equal(model.state_dict()[name], old) is not bool(moves), name
    assert all(p.grad is None for p in model.teacher.parameters())
    parts = {name.split(".")[0] for name, _ in model.teacher.model.named_parameters()}
    assert parts == {"image", "text", "project_image", "project_text"}


def test_without_a_teacher_it_is_the_plain_contrastive_loss():
    from minivlp.objectives.contrastive import contrastive_loss, same_group

    model, batch = tiny(losses=("itc",)), some_pairs()
    v, t = model.embed_images(batch.images), model.embed_texts(batch.ids, batch.mask)
    together = same_group(batch.image_ids, batch.ids, batch.mask)
    expected = contrastive_loss(v, t, 1 / model.temperature, together)
    assert model.losses(batch)["itc"].item() == pytest.approx(expected.item(), abs=1e-12)
    assert model.teacher is None and not any(name.startswith(("teacher", "queue")) for name in model.state_dict())


# -------------------------------------------------------------------------------------------------- use as a whole


def test_it_learns_to_say_what_it_was_shown():
    """Four pictures, four captions: after a few seconds each picture gets its caption, however it is written."""
    torch.set_default_dtype(torch.float32)
    from minivlp.training.loop import overfit_one_batch

    model, batch = tiny(), some_pairs()
    losses = overfit_one_batch(model, batch, steps=60, lr=4e-3)
    assert losses[-1] < 0.4 * losses[0]
    captions = texts(batch.ids[:, 1:])
    for how in ({}, {"beams": 3}, {"top_p": 0.5}):
        assert texts(model.generate(batch.images, **how)) == captions, how
    assert (model.match(batch.images, batch.ids, batch.mask) > 0.5).all()
    assert (model.match(batch.images.roll(1, 0), batch.ids, batch.mask) < 0.5).all()


def test_a_checkpoint_brings_back_teacher_queue_and_what_is_shared(tmp_path):
    from minivlp.training.checkpoint import load_model, save_model

    torch.set_default_dtype(torch.float32)
    model, batch = tiny(**MOMENTUM).train(), some_pairs()
    batch.images = batch.images.float()
    model.losses(batch)
    save_model(model, tmp_path / "blip.safetensors")
    back = load_model(BLIP, tmp_path / "blip.safetensors")
    assert back.config == model.config and len(back.queue) == 4 and back.teacher.updates == 1
    assert back.text.blocks[1].cross_attention is back.decoder.blocks[1].cross_attention
    one, two = model.eval().losses(batch, NEXT), back.losses(batch, NEXT)
    assert numbers(one) == numbers(two)


NEXT = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 3, 0]))


@pytest.mark.parametrize("shared", [(), CROSS_ATTENTION + THE_REST, SELF_ATTENTION + CROSS_ATTENTION + THE_REST])
def test_it_begins_as_the_towers_of_xvlm_and_its_decoder_as_its_encoder(shared):
    from minivlp.models.xvlm import XVLM, XVLMConfig

    torch.set_default_dtype(torch.float32)
    towers, batch = XVLM(XVLMConfig.nano(50)).eval(), some_pairs()
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    batch.images = torch.randn(4, 3, 64, 64)
    model = BLIP(dataclasses.replace(BLIPConfig.nano(50), shared=shared, **MOMENTUM)).eval()
    model.start_from(towers)
    for ours in (model, model.teacher.model):
        assert torch.equal(ours.image(batch.images), towers.image(batch.images))
        assert equal(ours.project_image, towers.project_image)
        assert torch.equal(ours.embed_texts(batch.ids, batch.mask), towers.embed_texts(batch.ids, batch.mask))
    assert model.temperature == towers.temperature
    for stack in (model.text, model.decoder):
        for block, read, look in zip(stack.blocks, towers.text.blocks, towers.fusion.blocks, strict=True):
            assert equal(block.self_attention, read.self_attention) and equal(block.feed_forward, read.feed_forward)
            assert equal(block.cross_attention, look.cross_attention) and equal(block.cross_norm, look.cross_norm)
    assert (model.text.blocks[0].self_attention is model.decoder.blocks[0].self_attention) == (len(shared) == 8)
    with pytest.raises(ValueError, match="other sizes than BLIP: .*cross_attention"):
        tiny().start_from(towers)


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_half_precision_keeps_losses_precise():
    torch.set_default_dtype(torch.float32)
    model, batch = tiny(**MOMENTUM).train(), some_pairs()
    batch.images = batch.images.float()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(batch, NEXT)
        assert model.generate(batch.images, beams=2, max_length=6).shape[0] == 4
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()


def test_attention_can_be_looked_at():
    model, batch = tiny(), some_pairs()
    with record_attention(model) as maps:
        model.look(batch.images, batch.ids, batch.mask)
        read = maps["text.1.cross"].clone()
        model.tell(batch.ids, model.encode_image(batch.images))
    assert read.shape == maps["text.1.cross"].shape == (4, 2, 9, 17)  # shared: the decoder's stands under the same name
    assert not torch.isclose(read, maps["text.1.cross"]).all()
    assert (maps["decoder.0.self"].triu(1) == 0).all()
