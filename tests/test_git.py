"""GIT: the released model's numbers to 1e-9, transformers' model live, the mask, the loss, generation, and videos."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from released import Comparison, four_heads, golden_text, released_model
from small_models import (
    assert_exact_without_shortcuts,
    jittered,
    longer,
    small_config,
    small_model,
    some_batch,
    values_of,
)
from test_blip import GENERATION, up_to_end
from torch import nn

from minivlp.data.batch import Batch, Text
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.evaluation.answering import reply
from minivlp.layers.attention import record_attention
from minivlp.layers.embeddings import ImageConfig
from minivlp.layers.generation import DecodingConfig, generate
from minivlp.layers.transformer import BlockConfig
from minivlp.models.git import GIT, GITConfig, decoder_config
from minivlp.models.xvlm import XVLM, XVLMConfig
from minivlp.objectives.captioning import caption_loss, next_tokens, smoothed_kl
from minivlp.pretrained import git as release
from minivlp.training.loop import overfit_one_batch

pytestmark = pytest.mark.usefixtures("float64")


def next_token_logits(model: GIT, images: torch.Tensor, text: Text) -> torch.Tensor:
    """(B, L, V) logits of the token after each."""
    return model.caption_head(model.decode(text, model.encode_image(images)))


# ---------------------------------------------------------------------------------------------- the released weights


def test_every_number_of_the_released_model(golden):
    g = golden("git_official")
    same, n = Comparison(g), g.config
    config = four_heads(release.authors_config(g.state, {}))
    assert config.frames == n["frames"] and config.text.layers == n["text_layers"] and config.tie_words
    model = released_model("git", g.state, replace(config, tokens=replace(config.tokens, pad=0, cls=1, sep=2)))
    images, text = g.inputs["pixel_values"], golden_text(g.inputs)
    image_tokens, video = model.encode_image(images), g.inputs["frames"].transpose(0, 1)
    same("vision_tokens", image_tokens)
    same("projected_tokens", model.decoder.project(image_tokens))
    same("video_tokens", model.encode_image(video))
    same("logits", next_token_logits(model, images, text) * text.mask[..., None])
    greedy = model.generate(images, decoding=DecodingConfig(max_length=n["max_steps"]))
    same("greedy_ids", torch.cat([text.ids[:, :1], greedy], dim=1))

    batch = Batch(images, text, torch.arange(len(text)))
    same("loss_no_prefix", model.losses(batch)["lm"])
    same("loss_video", model.losses(replace(batch, images=video))["lm"])
    batch.prefix_length = torch.tensor(n["prefix"])
    labels = next_tokens(text, batch.prefix_length)
    assert torch.equal(labels != -100, g.inputs["need_predict"][:, 1:].bool())
    same("loss_plain_ce", caption_loss(next_token_logits(model, images, text)[:, :-1], labels))
    loss = model.losses(batch)["lm"]
    same("loss", loss)
    loss.backward()
    same.gradients("git", model)
    assert same.done == set(g.outputs)


def test_every_number_of_transformers_model(golden):
    """Its output layer is not tied, its loss is the plain cross-entropy, and its embedding has BERT's epsilon."""
    g = golden("git_hf")
    same, n = Comparison(g), g.config
    tower = BlockConfig(n["vision_width"], n["vision_heads"], n["vision_ffn"], activation="quick_gelu")
    block = BlockConfig(n["text_width"], n["text_heads"], n["text_ffn"], norm_eps=1e-12, norm_first=False)
    length = len(g.state["git.embeddings.position_embeddings.weight"])
    config = GITConfig(
        ImageConfig(n["image_size"][0], n["patch_size"], n["vision_layers"], tower, ln_pre=True, patch_bias=False),
        decoder_config(n["vocab"], length, n["text_layers"], block),
        embed_eps=1e-12,
        tie_words=False,
        smoothing=0.0,
    )
    model = released_model("git", g.state, config)
    images, text = g.inputs["pixel_values"], golden_text(g.inputs)
    image_tokens = model.encode_image(images)
    count = image_tokens.shape[1]
    same("num_image_tokens", torch.tensor(count))
    same("vision_tokens", image_tokens)
    same("projected_tokens", model.decoder.project(image_tokens))
    both = model.caption_head(model.cross_encode(images, text))
    same("logits_image_positions", both[:, :count])
    same("logits_text", both[:, count:] * text.mask[..., None])
    same("logits_text", next_token_logits(model, images, text) * text.mask[..., None])
    greedy = model.generate(images, decoding=DecodingConfig(max_length=1 + n["greedy_steps"]))
    same("greedy_ids", torch.cat([text.ids[:, :1], greedy], dim=1))
    loss = model.losses(Batch(images, text, torch.arange(len(text))))["lm"]
    same("loss", loss)
    loss.backward()
    same.gradients("git", model)
    assert same.done == set(g.outputs)


# ------------------------------------------------------------------------------------------------- transformers, live


def reference_and_ours(frames: int | None = None, tied: bool = False) -> tuple[nn.Module, GIT]:
    """A tiny random GIT of transformers, every parameter changed, with large logits; and ours with its weights."""
    from transformers import GitConfig, GitForCausalLM

    config = GitConfig(
        vision_config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32,
            patch_size=8,
        ),
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
        max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0, num_image_with_embedding=frames,
        tie_word_embeddings=tied,
    )  # fmt: skip
    theirs = jittered(GitForCausalLM(config).eval())
    for module in theirs.git.image_encoder.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "sdpa"  # the eager one rounds attention weights to float32
    with torch.no_grad():  # or all texts would be equal and of full length
        theirs.output.weight.mul_(8)
        theirs.output.bias[2] += 4
    state = theirs.state_dict()
    return theirs, released_model("git", state, release.transformers_config(state, config.to_dict()))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_loss_of_transformers_model(tied):
    theirs, ours = reference_and_ours(tied=tied)
    assert (ours.caption_head.decoder.weight is ours.decoder.embed.token.weight) == tied
    batch = some_batch()
    text, labels = batch.text.with_first(1), batch.text.ids.masked_fill(~batch.text.mask, -100)
    with torch.no_grad():
        expected = theirs(pixel_values=batch.images, input_ids=text.ids, attention_mask=text.mask.long(), labels=labels)
        both = ours.caption_head(ours.cross_encode(batch.images, text))
        real = F.pad(text.mask, (17, 0), value=True)
        assert (both - expected.logits)[real].abs().max() < 1e-10
        assert (next_token_logits(ours, batch.images, text) - both[:, 17:])[text.mask].abs().max() < 1e-10
        ours.config = replace(ours.config, smoothing=0.0)
        loss = F.cross_entropy(expected.logits[:, 17:-1].flatten(0, 1), labels[:, 1:].flatten())
        assert abs(ours.losses(batch)["lm"] - loss) < 1e-10 and abs(loss - expected.loss) < 1e-6  # theirs is float32


def test_videos_of_transformers_model():
    theirs, ours = reference_and_ours(frames=3)
    video, text = torch.randn(4, 3, 3, 32, 32), some_batch().text.with_first(1)
    with torch.no_grad():
        expected = theirs(pixel_values=video, input_ids=text.ids, attention_mask=text.mask.long()).logits
        both = ours.caption_head(ours.cross_encode(video, text))
    assert both.shape == (4, 3 * 17 + 9, 50)
    assert (both - expected)[F.pad(text.mask, (51, 0), value=True)].abs().max() < 1e-10


@pytest.mark.parametrize("seed", [1, 2])
def test_greedy_and_beam_search_write_what_transformers_writes(seed):
    torch.manual_seed(seed)
    theirs, ours = reference_and_ours()
    images, prompts = 2 * torch.randn(6, 3, 32, 32), torch.randint(7, 48, (6, 2))
    lengths = set()
    for options in [*GENERATION, {"beams": 4, "length_penalty": 0.6}]:
        for prompt in (None, prompts):
            options = {"max_length": 14, **options}
            written = up_to_end(ours.generate(images, prompt, DecodingConfig(**options)))
            own = {"num_beams" if name == "beams" else name: value for name, value in options.items()}
            start = torch.ones(6, 1, dtype=torch.long)
            ids = start if prompt is None else torch.cat([start, prompt], dim=1)
            expected = theirs.generate(pixel_values=images, input_ids=ids, do_sample=False, **own)
            assert written == up_to_end(expected[:, 1:]), options
            lengths |= {len(text) for text in written}
    assert len(lengths) > 4  # texts of many lengths were compared


def test_the_papers_base_model_is_as_large_as_transformers():
    """Theirs has an output layer of its own, as large as the token embedding."""
    from transformers import GitConfig, GitForCausalLM

    with torch.device("meta"):
        ours, theirs = GIT(GITConfig.paper()), GitForCausalLM(GitConfig())
    count = sum(p.numel() for p in ours.parameters())
    assert count == 153_178_170
    assert count + 30522 * 768 == sum(p.numel() for p in theirs.parameters())


# ------------------------------------------------------------------------------------------------------- the loss


def test_the_smoothed_divergence_is_the_naive_one():
    """Each wrong token gets smoothing / (V - 1), unlike torch's smoothing; the targets' entropy is left out."""
    logits, labels = torch.randn(2, 3, 11), torch.tensor([[4, 0, -100], [10, -100, -100]])
    costs = []
    for row, place in ((0, 0), (0, 1), (1, 0)):
        target = torch.full((11,), 0.1 / 10)
        target[labels[row, place]] = 0.9
        costs.append((target * (target.log() - logits[row, place].log_softmax(-1))).sum())
    expected = torch.stack(costs).mean()
    assert torch.isclose(smoothed_kl(logits, labels, 0.1), expected, atol=1e-12)
    assert abs(caption_loss(logits, labels, 0.1) - expected) > 0.1
    assert torch.equal(smoothed_kl(logits, labels), caption_loss(logits, labels))
    perfect = torch.full((1, 11), math.log(0.01)).index_fill(1, torch.tensor([3]), math.log(0.9))
    assert smoothed_kl(perfect, torch.tensor([3]), 0.1).abs() < 1e-12, "it can reach zero"
    logits.requires_grad_()
    nothing = smoothed_kl(logits, torch.full_like(labels, -100), 0.1)
    nothing.backward()
    assert nothing == 0 and (logits.grad == 0).all()


def test_the_loss_before_training():
    """ln V less the entropy of the targets: 6.06 for 1200 tokens."""
    torch.set_default_dtype(torch.float32)
    model = GIT(GITConfig.nano())
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1 / 1199)
    loss = values_of(model.losses(some_batch(16, side=64)))
    assert set(loss) == {"lm"} and abs(loss["lm"] - (math.log(1200) - entropy)) < 0.4


def tiny(**changes) -> GIT:
    """Narrow blocks, images of 32 pixels, 40 tokens; the decoder keeps its order of LayerNorm."""
    config = small_config(GIT)
    text = replace(config.text, block=replace(config.text.block, norm_first=False))
    return small_model(GIT, **{"text": text, **changes})


@pytest.mark.parametrize("prefix", [None, [2, 1, 4, 3]])
def test_the_loss_is_the_naive_loop(prefix):
    """Every token from the image and the tokens before it alone; a question is read and not predicted."""
    model, batch = tiny(), some_batch()
    batch.prefix_length = None if prefix is None else torch.tensor(prefix)
    costs = []
    for row in range(4):
        ids = batch.text.ids[row, : int(batch.text.mask[row].sum())].tolist()
        for place in range(1 if prefix is None else prefix[row], len(ids)):
            before = torch.tensor([[1, *ids[1:place]]])  # [CLS] first
            both = model.cross_encode(batch.images[row : row + 1], Text(before, before >= 0))
            costs.append(smoothed_kl(model.caption_head(both[:, -1]), torch.tensor(ids[place : place + 1]), 0.1))
    assert torch.isclose(model.losses(batch)["lm"], torch.stack(costs).mean(), atol=1e-12)


def test_a_question_is_read_and_not_predicted():
    model, batch = tiny(), some_batch()
    batch.prefix_length = torch.tensor([4, 2, 2, 3])
    loss = model.losses(batch)["lm"]
    ids = batch.text.ids.clone()
    ids[0, 2] = (ids[0, 2] + 1) % 30 + 7
    changed = replace(batch, text=batch.text.with_ids(ids))
    assert not torch.isclose(model.losses(changed)["lm"], loss), "a token of the question is read"
    assert torch.equal(next_tokens(changed.text, batch.prefix_length), next_tokens(batch.text, batch.prefix_length))


def test_padding_and_the_first_token_do_not_matter():
    model, batch = tiny(), some_batch()
    loss = values_of(model.losses(batch))
    assert values_of(model.losses(replace(batch, text=longer(batch.text)))) == pytest.approx(loss, abs=1e-12)
    assert values_of(model.losses(replace(batch, text=batch.text.with_first(30)))) == loss
    logprob = model.caption_logprob(batch.images, batch.text)
    assert torch.allclose(model.caption_logprob(batch.images, longer(batch.text)), logprob, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"tie_words": False, "smoothing": 0.0}, {"frames": 3}])
def test_losses_and_gradients_are_those_of_all_tokens_of_all_texts(changes):
    model, batch = tiny(**changes), some_batch()
    if "frames" in changes:
        batch.images = torch.randn(4, 2, 3, 32, 32)
    assert_exact_without_shortcuts(model, batch)
    batch.prefix_length = torch.tensor([2, 1, 3, 2])
    assert_exact_without_shortcuts(model, batch)


# ------------------------------------------------------------------------------------------------------- the mask


def test_image_tokens_never_see_the_text_and_text_sees_what_is_before_it():
    model, batch = tiny(), some_batch()
    text = Text(batch.text.ids, torch.ones_like(batch.text.mask))
    ids = text.ids.clone()
    ids[:, 5] = (ids[:, 5] + 1) % 30 + 7
    one, two = (model.cross_encode(batch.images, t) for t in (text, text.with_ids(ids)))
    assert torch.equal(one[:, : 17 + 5], two[:, : 17 + 5])
    assert not torch.isclose(one[:, 17 + 5 :], two[:, 17 + 5 :]).all(dim=-1).any()
    images = batch.images.clone()
    images[:, :, -8:, -8:] += 1  # the last patch: all others see it, and every token of the text
    assert not torch.isclose(model.cross_encode(images, text), one).all(dim=-1).any()


def test_the_maps_show_the_mask():
    model, batch = tiny(), some_batch()
    with record_attention(model) as maps:
        model.cross_encode(batch.images, batch.text)
        whole = maps["decoder.1.self"]
        model.caption_logprob(batch.images, batch.text)
    assert whole.shape == (4, 2, 26, 26) and maps["decoder.1.self"].shape == (4, 2, 9, 26)
    seen = (whole > 0).all(dim=1)[0]  # the first text is of full length
    assert seen[:17, :17].all() and not seen[:17, 17:].any() and seen[17:, :17].all()
    assert torch.equal(seen[17:, 17:], torch.ones(9, 9, dtype=torch.bool).tril())
    assert (whole[1, :, :, 17 + int(batch.text.mask[1].sum()) :] == 0).all(), "nobody attends to padding"
    assert torch.allclose(maps["decoder.1.self"][0], whole[0, :, 17:], atol=1e-12), "the two ways are one"


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("options", [{}, {"beams": 3}, {"beams": 2, "length_penalty": 0.6}])
def test_generation_with_the_cache_is_generation_without(options, monkeypatch):
    """The image is read once; without the cache, image and text are read anew for every token."""
    model, images = tiny(), 2 * torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        model.caption_head.decoder.weight.mul_(6)
    calls, decoding = [], DecodingConfig(max_length=10, **options)
    run = model.image.forward
    monkeypatch.setattr(model.image, "forward", lambda *given, **named: calls.append(1) or run(*given, **named))
    prompt = torch.randint(7, 40, (5, 2))
    written = model.generate(images, prompt, decoding)
    assert len(calls) == 1
    start, so_far = torch.cat([torch.ones(5, 1, dtype=torch.long), prompt], dim=1), []
    repeated = images.repeat_interleave(decoding.beams, dim=0)

    def step(ids, origin):
        before = so_far.pop() if so_far else None
        if before is not None:
            ids = torch.cat([before if origin is None else before[origin], ids], dim=1)
        so_far.append(ids)
        return model.caption_head(model.cross_encode(repeated, Text(ids, ids >= 0))[:, -1])

    with torch.no_grad():
        expected = generate(step, start, decoding, 2, 0, 56)
    assert torch.equal(written, expected[:, 1:])
    assert torch.equal(written[:, :2], prompt) and len({tuple(row) for row in written.tolist()}) > 1


def test_every_verb_reads_its_own_image():
    model, batch = tiny(), some_batch()
    images, text = batch.images, batch.text
    there = model.caption_logprob(images, text)
    assert there.shape == (4,) and not torch.isclose(there, model.caption_logprob(images.roll(1, 0), text)).any()
    alone = torch.cat([model.caption_logprob(images[i : i + 1], text[i : i + 1]) for i in range(4)])
    assert torch.allclose(alone, there, atol=1e-12)
    rows = torch.tensor([3, 0, 0, 1])
    many = model.caption_logprob_many(images, rows, text)
    assert torch.allclose(many, model.caption_logprob(images[rows], text), atol=1e-12)
    prefix = torch.tensor([4, 1, 2, 3])
    logits, labels = next_token_logits(model, images, text.with_first(1))[:, :-1], next_tokens(text, prefix)
    sums = torch.stack([-F.cross_entropy(*pair, reduction="sum") for pair in zip(logits, labels, strict=True)])
    assert torch.allclose(model.caption_logprob(images, text, prefix), sums)


def test_it_answers_questions_by_writing_and_by_ranking():
    torch.set_default_dtype(torch.float32)
    model, scenes, tokenizer = GIT(GITConfig.nano(len(load_tokenizer()))), Scenes(3), load_tokenizer()
    questions = ["is there a dog?", "how many dogs are there?", "is there a red heart?"]
    answers = {"is there": ["yes", "no"], "how many": ["one", "two"]}
    ranked = reply(model, scenes, tokenizer, [0, 1, 2], questions, answers)
    assert ranked[0] in answers["is there"] and ranked[1] in answers["how many"]
    assert len(reply(model, scenes, tokenizer, [0, 1, 2], questions, decoding=DecodingConfig(max_length=14))) == 3


# ------------------------------------------------------------------------------------------------------------ videos


def test_a_video_is_the_tokens_of_its_frames_with_a_vector_for_each():
    model, text = tiny(frames=3), some_batch().text
    video = torch.randn(4, 2, 3, 32, 32)
    tokens = model.encode_image(video)
    for n in range(2):
        expected = model.encode_image(video[:, n]) + model.frames[n]  # a single image gets no vector
        assert torch.allclose(tokens[:, n * 17 : (n + 1) * 17], expected, atol=1e-12)
    assert not torch.isclose(model.caption_logprob(video.flip(1), text), model.caption_logprob(video, text)).any()
    unordered = tiny()
    logprob = unordered.caption_logprob(video, text)
    assert torch.allclose(unordered.caption_logprob(video.flip(1), text), logprob, atol=1e-12)
    assert model.generate(video, decoding=DecodingConfig(max_length=5)).shape[0] == 4
    with pytest.raises(ValueError, match="videos of 4 frames, but the model knows the order of 3"):
        model.encode_image(torch.randn(1, 4, 3, 32, 32))


# -------------------------------------------------------------------------------------------------- use as a whole


def test_it_learns_to_write_its_captions():
    """Four images, four captions: after a few seconds each image gets its caption, however it is generated."""
    torch.set_default_dtype(torch.float32)
    model, batch = tiny(), some_batch()
    ids = batch.text.ids.clone()
    ids[torch.arange(4), batch.text.mask.sum(1) - 1] = 2
    batch.text = batch.text.with_ids(ids)
    losses = overfit_one_batch(model, batch, steps=80, lr=4e-3)
    assert losses[-1] < 0.3 * losses[0]
    captions = up_to_end(ids[:, 1:])
    for options in ({}, {"beams": 3}):
        assert up_to_end(model.generate(batch.images, decoding=DecodingConfig(**options))) == captions, options


def test_it_begins_with_a_trained_image_tower_and_a_random_decoder():
    torch.set_default_dtype(torch.float32)
    towers, model = XVLM(XVLMConfig.nano(50)), GIT(GITConfig.nano(50))
    before = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    model.init_from(towers)
    assert all(torch.equal(value, towers.image.state_dict()[name]) for name, value in model.image.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.decoder.state_dict().items())
    with pytest.raises(ValueError, match="other sizes than GIT"):
        tiny().init_from(towers)


def test_losses_are_float32_under_autocast():
    torch.set_default_dtype(torch.float32)
    model, batch = tiny(frames=2), some_batch()
    batch.images = torch.randn(4, 2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.losses(batch)["lm"]
        assert model.generate(batch.images, decoding=DecodingConfig(beams=2, max_length=6)).shape[0] == 4
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
