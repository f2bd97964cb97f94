"""BLIP: the released model's numbers to 1e-9, transformers' model live, what is shared, and what must hold."""

import math
from dataclasses import replace

import pytest
import torch
from released import Comparison, four_heads, golden_negatives, golden_text, places_of, released_model
from small_models import (
    assert_exact_without_shortcuts,
    jittered,
    longer,
    recorded_maps,
    small_model,
    values_of,
)

from minivlp.data.batch import Batch, Text
from minivlp.layers.attention import record_attention
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.generation import DecodingConfig
from minivlp.layers.transformer import BlockConfig
from minivlp.models import aligned
from minivlp.models.blip import BLIP, CROSS_ATTENTION, SELF_ATTENTION, THE_REST, BLIPConfig
from minivlp.models.xvlm import XVLM, XVLMConfig
from minivlp.objectives.captioning import caption_loss, next_tokens
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits, find_positives, soft_cross_entropy
from minivlp.objectives.matching import Negatives, hard_negatives, matching_loss, sampling_weights
from minivlp.objectives.momentum import MomentumConfig, soft_targets
from minivlp.pretrained import blip as release
from minivlp.training.checkpoint import load_model, save_model
from minivlp.training.loop import overfit_one_batch

pytestmark = pytest.mark.usefixtures("float64")

EVERYTHING = SELF_ATTENTION + CROSS_ATTENTION + THE_REST
NEXT = Negatives(torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 3, 0]))


# ---------------------------------------------------------------------------------------------- the released weights


def decoder_tokens(model: BLIP, image_tokens: torch.Tensor, text: Text) -> torch.Tensor:
    """What the decoder makes of the texts, each with [DEC] first: (B, L, D)."""
    return model.decode(text.with_first(model.config.tokens.dec), image_tokens)


def released(g, alpha: float) -> BLIP:
    """The released model with its momentum model and its filled queue, before its training step."""
    n = g.config
    momentum = MomentumConfig(n["momentum"], alpha, 0, n["queue_size"], distill=("itc",))
    config = replace(four_heads(release.authors_config(g.state, {})), momentum=momentum)
    assert (config.tokens.dec, config.tokens.enc) == (n["dec_token_id"], n["enc_token_id"])
    return released_model("blip", g.state, config)


@pytest.mark.parametrize("alpha", ["0", "0.4"])
def test_every_number_of_the_released_model(golden, alpha):
    g = golden("blip_pretrain")
    same, model, n = Comparison(g), released(g, float(alpha)), g.config
    images, text, negatives = g.inputs["pixel_values"], golden_text(g.inputs), golden_negatives(g.inputs)
    pad, own = text.mask[..., None], torch.arange(len(text))
    image_tokens = model.encode_image(images)
    same("image_tokens", image_tokens)
    same("text_tokens", model.encode_text(text) * pad)
    same("fused_tokens", model.cross_encode(images, text) * pad)
    decoded = decoder_tokens(model, image_tokens, text)
    same("decoder_tokens", decoded * pad)
    same("lm_logits", model.caption_head(decoded) * pad)
    same("image_feat", model.embed_images(images))
    same("text_feat", model.embed_texts(text))
    same("caption_logprob", model.caption_logprob(images, text))
    given = n["prompt_length"]
    decoding = DecodingConfig(max_length=given + n["greedy_steps"])
    greedy = model.generate(images, text.ids[:, 1:given], decoding)
    same("greedy_ids", torch.cat([torch.full_like(text.ids[:, :1], n["dec_token_id"]), greedy], dim=1))

    # one training step: the momentum model moves, is used, and its features join the queue
    model.train()
    batch = Batch(images, text, own)
    old_images, old_texts = (features.clone() for features in model.queue.features())
    losses = model.losses(batch, negatives=negatives)
    same(f"loss_itc.alpha{alpha}", losses["itc"])
    same("loss_itm", losses["itm"])
    same("loss_lm", losses["lm"])
    same(f"loss_total.alpha{alpha}", sum(losses.values()))
    same("image_queue_after", model.queue.images.T)
    same("text_queue_after", model.queue.texts.T)
    same("queue_ptr_after", (model.queue.count % n["queue_size"])[None])
    sum(losses.values()).backward()
    same.gradients("blip", model, after=f".alpha{alpha}")
    same.momentum_weights("blip", model)

    # what the losses are made of
    momentum, scale = model.momentum_model.model, model.itc_head.scale()
    ours = model.embed_images(images), model.embed_texts(text)
    theirs = momentum.embed_images(images), momentum.embed_texts(text)
    same("image_feat_m", theirs[0])
    same("text_feat_m", theirs[1])
    positives = torch.eye(len(text), len(text) + n["queue_size"], dtype=torch.bool)
    for way, name, candidates in (
        (0, "i2t", torch.cat([theirs[1], old_texts])),
        (1, "t2i", torch.cat([theirs[0], old_images])),
    ):
        logits = cosine_logits(ours[way], candidates, scale)
        targets = soft_targets(cosine_logits(theirs[way], candidates, scale), positives, float(alpha))
        same(f"sim_{name}", logits)
        same(f"itc_targets_{name}.alpha{alpha}", targets)
        same(f"loss_itc_{name}.alpha{alpha}", soft_cross_entropy(logits, targets))
        square = logits[:, : len(text)], positives[:, : len(text)]
        same(f"itm_sampling_weights_{name}", sampling_weights(*square, floor=model.negative_floor))
    image_rows, text_rows = (torch.cat([own, drawn]) for drawn in negatives.pairs())
    same("itm_logits", model.match_head(model.cross_encode_many(images, image_rows, text[text_rows])))
    for name, smoothing, prompt in (("", 0.1, 1), ("_no_smoothing", 0.0, 1), ("_prompt", 0.1, given)):
        labels = next_tokens(text, prompt)
        same(f"loss_lm{name}", caption_loss(model.caption_head(decoded)[:, :-1], labels, smoothing))
    model.config = replace(model.config, losses=("lm",), prefix_length=given)
    same("loss_lm_prompt", model.losses(batch)["lm"])
    other_alpha = {name for name in g.outputs if name.endswith(".alpha0.4" if alpha == "0" else ".alpha0")}
    assert same.done | other_alpha == set(g.outputs)


def test_every_number_of_the_captioner(golden):
    g = golden("blip_caption_hf")
    same, n = Comparison(g), g.config
    image_block = BlockConfig(n["vision_width"], n["vision_heads"], n["vision_ffn"], norm_eps=1e-6)
    text_block = BlockConfig(n["text_width"], n["text_heads"], n["text_ffn"], norm_eps=1e-12, norm_first=False)
    config = BLIPConfig(
        ImageConfig(n["image_size"][0], n["patch_size"], n["vision_layers"], image_block),
        TextConfig(n["vocab"], 16, n["text_layers"], text_block, embed_norm=True, position_std=0.02),
        n["embed_dim"],
        losses=("lm",),
        smoothing=n["label_smoothing"],
        momentum=None,
    )
    model = released_model("blip", g.state, replace(config, tokens=replace(config.tokens, dec=n["vocab"] - 2)))
    images, text = g.inputs["pixel_values"], golden_text(g.inputs)
    image_tokens = model.encode_image(images)
    same("image_tokens", image_tokens)
    same("logits", model.caption_head(model.decode(text, image_tokens)) * text.mask[..., None])
    batch = Batch(images, text, torch.arange(len(text)))
    same("loss", model.losses(batch)["lm"])
    greedy = model.generate(images, decoding=DecodingConfig(max_length=1 + n["greedy_steps"]))
    same("greedy_ids", torch.cat([text.ids[:, :1], greedy], dim=1))
    model.config = replace(model.config, prefix_length=n["prompt_length"])
    same("loss_prompt", model.losses(batch)["lm"])
    assert same.done == set(g.outputs)


# ------------------------------------------------------------------------------------------------- transformers, live


def reference_and_ours(kind: str) -> tuple[torch.nn.Module, BLIP]:
    """A tiny random BLIP of transformers, every parameter changed, and a function that gives ours its weights."""
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
    model = jittered(getattr(modeling_blip, kind)(config).eval())

    def ours() -> BLIP:
        losses = ("lm",) if "Generation" in kind else ("itc", "itm")
        state = model.state_dict()
        derived = release.transformers_config(state, config.to_dict())
        return released_model("blip", state, replace(derived, losses=losses))

    return model, ours


def some_pairs(count: int = 4, length: int = 9, vocabulary: int = 48, side: int = 32) -> Batch:
    """Images with texts of random length, [CLS] first and [SEP] last."""
    lengths = torch.randint(4, length + 1, (count, 1))
    lengths[0] = length
    places = torch.arange(length)
    ids = torch.randint(7, vocabulary, (count, length)).masked_fill(places == lengths - 1, 2) * (places < lengths)
    ids[:, 0] = 1
    return Batch(torch.randn(count, 3, side, side), Text(ids, places < lengths), torch.arange(count))


def test_logits_and_loss_of_transformers_captioner():
    theirs, make = reference_and_ours("BlipForConditionalGeneration")
    ours, batch = make(), some_pairs()
    text = batch.text.with_first(48)
    with torch.no_grad():
        labels = text.ids.masked_fill(~text.mask, -100)
        expected = theirs(pixel_values=batch.images, input_ids=text.ids, attention_mask=text.mask.long(), labels=labels)
        image_tokens = ours.encode_image(batch.images)
        logits = ours.caption_head(ours.decode(text, image_tokens))
        assert (image_tokens - expected.last_hidden_state).abs().max() < 1e-10
        assert ((logits - expected.logits) * text.mask[..., None]).abs().max() < 1e-10
        assert abs(ours.losses(batch)["lm"] - expected.loss) < 1e-10


def test_matching_and_similarity_of_transformers_retrieval():
    theirs, make = reference_and_ours("BlipForImageTextRetrieval")
    ours, batch = make(), some_pairs()
    images, text, mask = batch.images, batch.text, batch.text.mask.long()
    with torch.no_grad():
        ids = text.with_first(49).ids
        expected = theirs(input_ids=ids, pixel_values=images, attention_mask=mask, use_itm_head=True).itm_score
        assert (ours.match_head(ours.cross_encode(images, text)) - expected).abs().max() < 1e-10
        assert (ours.match(images, text) - expected.softmax(1)[:, 1]).abs().max() < 1e-10
        cosines = theirs(input_ids=text.ids, pixel_values=images, attention_mask=mask, use_itm_head=False).itm_score
        similarity = ours.similarity(images, text) / ours.itc_head.scale()
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
    theirs, make = reference_and_ours("BlipForConditionalGeneration")
    with (
        torch.no_grad()
    ):  # larger logits, above all of the closing token, or all texts would be equal and of full length
        theirs.text_decoder.cls.predictions.decoder.weight.mul_(6)
        theirs.text_decoder.cls.predictions.bias[2] += 6
    ours = make()
    images, prompts = 2 * torch.randn(6, 3, 32, 32), torch.randint(7, 48, (6, 2))
    lengths = set()
    for options in GENERATION:
        for prompt in (None, prompts):
            options = {"max_length": 14, **options}
            written = up_to_end(ours.generate(images, prompt, DecodingConfig(**options)))
            own = {"num_beams" if name == "beams" else name: value for name, value in options.items()}
            # transformers drops the last of the ids it is given, usually [SEP], and puts its own [DEC] first
            ids = None if prompt is None else torch.nn.functional.pad(prompt, (1, 1))
            assert written == up_to_end(theirs.generate(images, ids, do_sample=False, **own)[:, 1:]), options
            lengths |= {len(text) for text in written}
    assert len(lengths) > 4  # texts of many lengths were compared


def up_to_end(ids: torch.Tensor) -> list[list[int]]:
    """Each row up to and with [SEP]; what follows is padding, for which transformers' beam search takes [SEP]."""
    return [row[: row.index(2) + 1] if 2 in row else row for row in ids.tolist()]


def test_nucleus_sampling_draws_as_transformers_does():
    """The first two tokens, 1,500 times each: a chi-square test of both samples against the true distribution."""
    from scipy.stats import chisquare

    theirs, make = reference_and_ours("BlipForConditionalGeneration")
    with torch.no_grad():
        theirs.text_decoder.cls.predictions.decoder.weight.mul_(4)
    ours, image = make(), torch.randn(1, 3, 32, 32)
    truth = {}
    with torch.no_grad():
        image_tokens = ours.encode_image(image)
        first = next_token_probabilities(ours, image_tokens, [48])
        for i in first.nonzero()[:, 0].tolist():
            for j, p in enumerate((first[i] * next_token_probabilities(ours, image_tokens, [48, i])).tolist()):
                truth[i, j] = p
    truth = {pair: p for pair, p in truth.items() if p > 0}
    assert 10 < len(truth) < 1000
    many = image.expand(1500, -1, -1, -1)
    torch.manual_seed(0)
    for drawn in (
        ours.generate(many, decoding=DecodingConfig(top_p=0.6, max_length=3)),
        theirs.generate(many, do_sample=True, top_p=0.6, top_k=0, max_length=3)[:, 1:],
    ):
        pairs = [tuple(row) for row in drawn.tolist()]
        assert set(pairs) <= set(truth)  # nothing from outside the nucleus
        frequent = [pair for pair in sorted(truth, key=truth.get)[::-1] if truth[pair] * 1500 >= 5]
        counts = [pairs.count(pair) for pair in frequent]
        others = 1 - sum(truth[pair] for pair in frequent)
        expected = [1500 * truth[pair] for pair in frequent] + [1500 * others] * (others > 1e-9)
        counts += [1500 - sum(counts)] * (others > 1e-9)
        assert chisquare(counts, expected).pvalue > 1e-3


def next_token_probabilities(model: BLIP, image_tokens: torch.Tensor, ids: list[int], top_p: float = 0.6):
    """(V,) probability of each next token, by transformers' own filter."""
    from transformers import TopPLogitsWarper

    text = Text(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
    logits = model.caption_head(model.decode(text, image_tokens))[:, -1]
    return TopPLogitsWarper(top_p)(None, logits).softmax(dim=-1)[0]


# --------------------------------------------------------------------------------------------------- what is shared


def test_encoder_and_decoder_share_all_but_self_attention_as_in_the_released_model(golden):
    """Each of the decoder's 56 tensors is the encoder's own in ours exactly where it is in the released one: 36."""
    g, prefix = golden("blip_pretrain"), "text_decoder.bert."
    config = four_heads(release.authors_config(g.state, {}))
    model, apart = BLIP(config), BLIP(replace(config, shared=(), tie_words=False))
    names = [name for name, tensor in g.state.items() if name.startswith(prefix) and tensor.is_floating_point()]
    text, decoder = dict(model.text.named_parameters()), dict(model.decoder.named_parameters())
    state, shared = {name: tensor.clone() for name, tensor in g.state.items()}, set()  # nothing is tied
    for name in names:
        (ours,) = places_of(release.RELEASES[1], state, apart, name)
        own = ours.removeprefix("decoder.")
        shared |= {name} if text[own] is decoder[own] else set()
    assert len(names) == 56 and len(shared) == 36
    assert shared == {name for name in g.info["state"]["tied"] if name.startswith(prefix)}
    assert model.caption_head.decoder.weight is model.decoder.embed.token.weight


def text_stack(shared: tuple[str, ...]) -> int:
    """Parameters of the paper's image tower, text encoder and decoder together."""
    with torch.device("meta"):
        model = BLIP(replace(BLIPConfig.paper(), shared=shared, momentum=None))
    return sum(p.numel() for p in {*model.image.parameters(), *model.text.parameters(), *model.decoder.parameters()})


def test_the_papers_sharing_ablation_has_its_parameter_counts():
    """Image tower and both text stacks; the paper counts 224, 252, 252 and 361 M, with what it has besides."""
    counts = [EVERYTHING, BLIPConfig.paper().shared, SELF_ATTENTION + THE_REST, ()]
    assert [round(text_stack(shared) / 1e6) for shared in counts] == [223, 251, 251, 360]
    with pytest.raises(ValueError, match="'self_atention' to share"):
        BLIP(replace(BLIPConfig.nano(), shared=("self_atention",)))


def test_the_papers_captioner_is_as_large_as_transformers():
    from transformers import BlipConfig, BlipForConditionalGeneration

    with torch.device("meta"):
        ours = BLIP(replace(BLIPConfig.paper(), momentum=None))
        theirs = BlipForConditionalGeneration(BlipConfig(vision_config={"image_size": 224}))
    used = {*ours.image.parameters(), *ours.decoder.parameters(), *ours.caption_head.parameters()}
    assert sum(p.numel() for p in used) == sum(p.numel() for p in theirs.parameters())


# --------------------------------------------------------------------------------------------------- what must hold

MOMENTUM = MomentumConfig(momentum=0.9, alpha=0.4, alpha_steps=10, queue_size=8, distill=("itc",))


def tiny(**changes) -> BLIP:
    return small_model(BLIP, text=replace(BLIPConfig.nano(50).text, block=small_text_block()), **changes)


def small_text_block() -> BlockConfig:
    return replace(BlockConfig.nano(), width=32, heads=2, hidden=64)


def test_losses_before_training():
    torch.set_default_dtype(torch.float32)
    model = BLIP(BLIPConfig.nano())
    losses = values_of(model.losses(some_pairs(16, 12, 1200, side=64)))
    assert set(losses) == {"itc", "itm", "lm"}
    assert 2.2 < losses["itc"] < 4.5  # ln 16 = 2.8, and the untrained towers prefer some pairs
    assert abs(losses["itm"] - math.log(2)) < 0.35
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
    assert reached["itc"] == {"image", "text", "itc_head"}
    assert reached["itm"] == {"image", "text", "match_head"}
    assert reached["lm"] == {"image", "text", "decoder", "caption_head"}


@pytest.mark.parametrize("shared", [(), EVERYTHING])
def test_any_sharing_trains_and_writes(shared):
    model, batch = tiny(shared=shared), some_pairs()
    sum(model.losses(batch).values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.generate(batch.images, decoding=DecodingConfig(max_length=6)).shape == (4, 5)


VARIANTS = {
    "as published, without momentum": {},
    "nothing shared": {"shared": ()},
    "all shared": {"shared": EVERYTHING},
    "momentum": {"momentum": MOMENTUM},
    "captioner": {"losses": ("lm",)},
    "filter": {"losses": ("itc", "itm")},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_losses_and_gradients_are_those_of_all_tokens_of_all_texts(changes):
    model, batch = tiny(**changes), some_pairs()
    batch.negatives = some_pairs(4, 12).text
    assert_exact_without_shortcuts(model, batch, negatives=NEXT)
    batch.prefix_length = torch.tensor([2, 1, 3, 2])
    assert_exact_without_shortcuts(model, batch, negatives=NEXT)


def test_the_decoder_never_attends_to_later_tokens_and_the_encoder_does():
    model, batch = tiny(), some_pairs()
    text = Text(batch.text.ids, torch.ones_like(batch.text.mask))
    ids = text.ids.clone()
    ids[:, 6] = (ids[:, 6] + 1) % 40 + 7
    changed, image_tokens = text.with_ids(ids), model.encode_image(batch.images)
    one, two = model.decode(text, image_tokens), model.decode(changed, image_tokens)
    assert torch.equal(one[:, :6], two[:, :6]) and not torch.isclose(one[:, 6:], two[:, 6:]).all()
    for encode in (model.encode_text, lambda text: model.cross_encode(batch.images, text)):
        assert not torch.isclose(encode(text)[:, 0], encode(changed)[:, 0]).all()


def test_padding_and_the_first_token_do_not_matter():
    """Nothing attends to padding or predicts it; [CLS] gives way to [ENC] and [DEC]."""
    model, batch = tiny(), some_pairs()
    losses = values_of(model.losses(batch, negatives=NEXT))
    padded = replace(batch, text=longer(batch.text, 3, filler=30))
    assert values_of(model.losses(padded, negatives=NEXT)) == pytest.approx(losses, abs=1e-12)
    again = values_of(model.losses(replace(batch, text=batch.text.with_first(30)), negatives=NEXT))
    assert again["itm"] == losses["itm"] and again["lm"] == losses["lm"] and again["itc"] != losses["itc"]


def test_every_verb_reads_its_own_image():
    model, batch = tiny(), some_pairs()
    images, text = batch.images, batch.text
    rolled = images.roll(1, 0)
    for verb in (model.match, model.caption_logprob):
        there, elsewhere = verb(images, text), verb(rolled, text)
        assert there.shape == (4,) and not torch.isclose(there, elsewhere).any()
        alone = torch.cat([verb(images[i : i + 1], text[i : i + 1]) for i in range(4)])
        assert torch.allclose(alone, there, atol=1e-12)
    assert (model.match(images, text) > 0).all() and (model.match(images, text) < 1).all()
    rows = torch.tensor([3, 0, 0, 1])
    for verb, many in ((model.match, model.match_many), (model.caption_logprob, model.caption_logprob_many)):
        assert torch.allclose(many(images, rows, text), verb(images[rows], text), atol=1e-12)
    table = model.similarity(images, text)
    assert torch.allclose(model.similarity(rolled, text), table.roll(1, 0))
    assert torch.allclose(model.embed_images(rolled).norm(dim=1), torch.ones(4))


def test_a_prompt_is_given_and_not_predicted():
    model, batch = tiny(losses=("lm",), prefix_length=3), some_pairs()
    labels = next_tokens(batch.text, 3)
    assert (labels[:, :2] == -100).all() and torch.equal(labels[0, 2:], batch.text.ids[0, 3:])
    ids = batch.text.ids.clone()
    ids[:, 2] += 1  # a token of the prompt is still read
    changed = replace(batch, text=batch.text.with_ids(ids))
    assert model.losses(changed)["lm"] != model.losses(batch)["lm"]
    assert torch.equal(next_tokens(changed.text, 3), labels)
    prompts = batch.text.ids[:, 1:3]
    written = model.generate(batch.images, prompts, DecodingConfig(max_length=8))
    assert torch.equal(written[:, :2], prompts)
    written = model.generate(batch.images, prompts[0], DecodingConfig(beams=2, max_length=8))
    assert torch.equal(written[:, :2], prompts[:1].expand(4, 2))


def test_each_row_may_have_its_own_prefix():
    """Questions of several lengths: the loss and the log-probability count the tokens after them."""
    model, batch = tiny(losses=("lm",), smoothing=0.0), some_pairs()
    prefix = torch.tensor([4, 1, 2, 3])
    labels = next_tokens(batch.text, prefix)
    logits = model.caption_head(decoder_tokens(model, model.encode_image(batch.images), batch.text))[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(model.losses(replace(batch, prefix_length=prefix))["lm"], expected)
    predicted = labels != -100
    chosen = logits.log_softmax(-1).gather(-1, labels.where(predicted, 0)[..., None])[..., 0]
    assert torch.allclose(model.caption_logprob(batch.images, batch.text, prefix), (chosen * predicted).sum(1))


def test_negative_captions_are_negatives_for_matching():
    model, batch = tiny(), some_pairs()
    drawn = Negatives(torch.tensor([1, 2, 3, -1]), torch.tensor([1, -1, 3, 0]))
    false = some_pairs(4, 12).text
    more = replace(batch, negatives=false)
    image_rows, text_rows = drawn.pairs()
    assert len(image_rows) == 3 + 3
    matched = model.match_head(model.cross_encode(batch.images, batch.text))
    wrong = [
        model.match_head(model.cross_encode(batch.images[image_rows], batch.text[text_rows])),
        model.match_head(model.cross_encode(batch.images, false)),
    ]
    losses, plain = model.losses(more, negatives=drawn), model.losses(batch, negatives=drawn)
    assert losses["itm"].item() == pytest.approx(matching_loss(matched, torch.cat(wrong)).item(), abs=1e-12)
    assert torch.allclose(losses["itc"], plain["itc"]) and torch.allclose(losses["lm"], plain["lm"])


def test_negatives_are_drawn_by_similarity_as_in_the_released_code(monkeypatch):
    """By the similarities of both directions, in float32 at least, and with a floor of 1e-4 under the weights."""
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return hard_negatives(*arguments)

    monkeypatch.setattr(aligned, "hard_negatives", spy)
    model, batch = tiny(), some_pairs()
    model.losses(batch)
    ((logits, positives, floor, back, _),) = calls
    assert torch.allclose(logits, model.similarity(batch.images, batch.text))
    assert torch.allclose(back, logits.T) and floor == 1e-4
    assert torch.equal(positives, torch.eye(4, dtype=torch.bool))
    torch.set_default_dtype(torch.float32)
    model, batch = tiny(), some_pairs()
    with torch.autocast("cpu", torch.bfloat16):
        model.losses(batch)
    for logits in (calls[-1][0], calls[-1][3]):
        assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


def test_captions_of_one_image_are_never_its_negatives():
    model, batch = tiny(), some_pairs()
    batch.image_ids = torch.zeros(4, dtype=torch.long)
    matched = model.match_head(model.cross_encode(batch.images, batch.text))
    expected = torch.nn.functional.cross_entropy(matched, torch.ones(4, dtype=torch.long))
    for on in (("itc", "itm"), ("itm",)):  # drawn by similarity, drawn evenly
        model.config = replace(model.config, losses=on)
        assert model.losses(batch)["itm"].item() == pytest.approx(expected.item(), abs=1e-12)


# ------------------------------------------------------------------------------------------------ the momentum model


def test_the_momentum_model_moves_in_training_only_and_only_for_itc():
    batch = some_pairs()
    for losses, training, moves in ((("itc", "lm"), True, 1), (("itc", "lm"), False, 0), (("lm",), True, 0)):
        model = tiny(momentum=MOMENTUM, losses=losses).train(training)
        before = {n: value.clone() for n, value in model.momentum_model.model.state_dict().items()}
        model.losses(batch)["lm"].backward()
        assert model.momentum_model.updates == moves and len(model.queue) == 4 * moves
        for name, old in before.items():
            moved = not torch.equal(model.momentum_model.model.state_dict()[name], old)
            assert moved is (bool(moves) and "embed.positions" not in name), name  # nano's positions are fixed
    assert all(p.grad is None for p in model.momentum_model.parameters())
    parts = {name.split(".")[0] for name, _ in model.momentum_model.model.named_parameters()}
    assert parts == {"image", "text", "itc_head"}


def test_without_a_momentum_model_it_is_the_plain_contrastive_loss():
    model, batch = tiny(losses=("itc",)), some_pairs()
    logits = cosine_logits(model.embed_images(batch.images), model.embed_texts(batch.text), model.itc_head.scale())
    expected = contrastive_loss(logits, find_positives(batch.image_ids, batch.text))
    assert model.losses(batch)["itc"].item() == pytest.approx(expected.item(), abs=1e-12)
    assert model.momentum_model is None
    assert not any(name.startswith(("momentum_model", "queue")) for name in model.state_dict())


# -------------------------------------------------------------------------------------------------- use as a whole


def test_it_learns_to_write_its_captions():
    """Four images, four captions: after a few seconds each image gets its caption, however it is generated."""
    torch.set_default_dtype(torch.float32)
    model, batch = tiny(), some_pairs()
    losses = overfit_one_batch(model, batch, steps=60, lr=4e-3)
    assert losses[-1] < 0.4 * losses[0]
    captions = up_to_end(batch.text.ids[:, 1:])
    for options in ({}, {"beams": 3}, {"top_p": 0.5}):
        assert up_to_end(model.generate(batch.images, decoding=DecodingConfig(**options))) == captions, options
    assert (model.match(batch.images, batch.text) > 0.5).all()
    assert (model.match(batch.images.roll(1, 0), batch.text) < 0.5).all()


def test_a_checkpoint_restores_momentum_model_queue_and_what_is_shared(tmp_path):
    torch.set_default_dtype(torch.float32)
    model, batch = tiny(momentum=MOMENTUM).train(), some_pairs()
    model.losses(batch)
    save_model(model, tmp_path / "blip.safetensors")
    back = load_model(BLIP, tmp_path / "blip.safetensors")
    assert back.config == model.config and len(back.queue) == 4 and back.momentum_model.updates == 1
    assert back.text.blocks[1].cross_attention is back.decoder.blocks[1].cross_attention
    one, two = model.eval().losses(batch, negatives=NEXT), back.losses(batch, negatives=NEXT)
    assert values_of(one) == values_of(two)


@pytest.mark.parametrize("shared", [(), CROSS_ATTENTION + THE_REST, EVERYTHING])
def test_it_begins_as_the_towers_of_xvlm_and_its_decoder_as_its_encoder(shared):
    torch.set_default_dtype(torch.float32)
    towers, batch = jittered(XVLM(XVLMConfig.nano(50)).eval()), some_pairs(side=64)
    model = BLIP(replace(BLIPConfig.nano(50), shared=shared, momentum=MOMENTUM)).eval()
    model.init_from(towers)
    for ours in (model, model.momentum_model.model):
        assert torch.equal(ours.image(batch.images), towers.image(batch.images))
        assert equal(ours.itc_head.project_image, towers.itc_head.project_image)
        assert torch.equal(ours.embed_texts(batch.text), towers.embed_texts(batch.text))
    assert model.itc_head.scale.temperature == towers.itc_head.scale.temperature
    for stack in (model.text, model.decoder):
        for block, text, fusion in zip(stack.blocks, towers.text.blocks, towers.fusion.blocks, strict=True):
            assert equal(block.self_attention, text.self_attention) and equal(block.feed_forward, text.feed_forward)
            assert equal(block.cross_attention, fusion.cross_attention) and equal(block.cross_norm, fusion.cross_norm)
    same = model.text.blocks[0].self_attention is model.decoder.blocks[0].self_attention
    assert same == (shared == EVERYTHING)
    with pytest.raises(ValueError, match="other sizes than BLIP: .*cross_attention"):
        tiny().init_from(towers)


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_losses_are_float32_under_autocast():
    torch.set_default_dtype(torch.float32)
    model, batch = tiny(momentum=MOMENTUM).train(), some_pairs()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(batch, negatives=NEXT)
        assert model.generate(batch.images, decoding=DecodingConfig(beams=2, max_length=6)).shape[0] == 4
    assert all(value.dtype == torch.float32 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()


def test_attention_can_be_recorded():
    model, batch = tiny(), some_pairs()
    with record_attention(model) as maps:
        model.cross_encode(batch.images, batch.text)
        encoder = maps["text.1.cross"].clone()
        model.decode(batch.text, model.encode_image(batch.images))
    # shared cross-attention: the decoder's map is stored under the same name
    assert encoder.shape == maps["text.1.cross"].shape == (4, 2, 9, 17)
    assert not torch.isclose(encoder, maps["text.1.cross"]).all()
    assert (maps["decoder.0.self"].triu(1) == 0).all()


def test_all_queries_are_recorded_where_one_token_is_read():
    model, batch = tiny(), some_pairs()
    maps = recorded_maps(model, lambda: model.match(batch.images, batch.text))
    assert maps["text.1.self"].shape == (4, 2, 9, 9) and maps["text.1.cross"].shape == (4, 2, 9, 17)
    maps = recorded_maps(model, lambda: model.similarity(batch.images, batch.text))
    assert maps["text.1.self"].shape == (4, 2, 9, 9) and maps["image.2.self"].shape == (4, 2, 17, 17)
