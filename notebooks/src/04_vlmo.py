# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#     notebook_metadata_filter: kernelspec,jupytext,-all
#     cell_metadata_filter: tags,slideshow,-all
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 04 · VLMo: one transformer, an expert per modality
#
# **The question.** You have met two kinds of model. A **dual encoder** (CLIP, lesson 01) turns each picture and each
# caption into one vector: it searches fast, but no word ever looks at a patch. A **fusion encoder** (ViLT, lesson 02)
# lets words and patches read each other: it could check what a caption says, but it must run for every pair. ALBEF
# (lesson 03) has both, one built on top of the other. Can **one set of weights** be both, as you please?
#
# VLMo (Bao et al. 2022) says yes. In every layer of one transformer, attention is shared by all, and only the
# feed-forward part knows what a token is: words go to a text expert, patches to an image expert, and near the top pairs
# go to a third. Send in a picture alone, a text alone, or both: the same layers serve.
#
# You will route tokens by hand, see what is frozen when such a model learns from texts alone, train one in a few
# minutes, and ask a question that the paper leaves open: does it have to be images first?

# %% tags=["setup"] slideshow={"slide_type": "skip"}
from copy import deepcopy
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

from minivlp.data.batch import to_tensor
from minivlp.data.scenes import Scenes
from minivlp.data.text import group_words, load_tokenizer, tokenize
from minivlp.device import profile
from minivlp.evaluation.cost import cost
from minivlp.evaluation.grounding import pointing_game
from minivlp.evaluation.matching import counterfactual, masked_words
from minivlp.evaluation.records import by_variant
from minivlp.evaluation.retrieval import reranked, retrieval
from minivlp.evaluation.score import Scores
from minivlp.layers.attention import record_attention
from minivlp.layers.transformer import Block
from minivlp.lessons import vlmo as exercise
from minivlp.models.albef import ALBEF
from minivlp.models.clip import CLIP
from minivlp.models.vilt import ViLT
from minivlp.models.vlmo import VLMo
from minivlp.papers import paper
from minivlp.training.checkpoint import bundled, load_model
from minivlp.training.loop import fit, overfit_one_batch
from minivlp.training.stages import (
    ImageStage,
    TextStage,
    component,
    freeze_for_text,
    mask_blocks,
    patch_pixels,
    trainable,
    unfreeze,
)
from minivlp.visualize import attention, drawing
from minivlp.visualize.widgets import AttentionViewer, LiveCurves

recipe = paper("vlmo").recipe(profile())
tokenizer = load_tokenizer()
seeded = torch.manual_seed(0)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Fast, or careful?
# A thousand pictures and a thousand captions: what would it take to compare them all? Measured here on twenty of each,
# and scaled up. Beside the seconds, how often each model tells a true caption from one with a single fact changed (the
# lessons' three seeds; chance is .50).

# %% tags=["nbval-ignore-output"]
test = Scenes(1500, split="test", seed=7)


def one_fact(record, variant):
    """The true caption against one with a fact changed: the mean over all kinds of facts and over the seeds."""
    runs = by_variant(record)[variant]
    return sum(run["counterfactual: mean"].value for run in runs) / len(runs)


def costs(rows):
    """A table of (name, model, share of facts told right)."""
    print(f"{'':<8}{'parameters':>12}{'each once':>12}{'every pair':>12}{'best 16':>10}{'one fact':>11}")
    for name, model, right in rows:
        took, count = cost(model, test, tokenizer).scaled(1000, 1000), sum(p.numel() for p in model.parameters())
        seconds = [took.seconds_once, took.seconds_pairs, took.seconds_best(16)]
        if not hasattr(model, "match"):
            seconds[1:] = None, None  # vectors are all it has
        shown = ["–" if s is None else f"{s:.1f} s" if s < 100 else f"{s / 60:.0f} min" for s in seconds]
        print(f"{name:<8}{count / 1e6:>10.1f} M{shown[0]:>12}{shown[1]:>12}{shown[2]:>10}{right:>11.2f}")


known = [
    ("CLIP", load_model(CLIP, bundled("clip_nano")), one_fact("clip_seeds", "CLIP nano")),
    ("ViLT", load_model(ViLT, bundled("vilt_nano")), one_fact("vilt_seeds", "ViLT nano")),
    ("ALBEF", load_model(ALBEF, bundled("albef_nano")), one_fact("albef_seeds", "ALBEF nano")),
]
costs(known)

# %% [markdown]
# *Each once*: every picture and every caption gets its vector, then all vectors are compared. *Every pair*: the model
# reads each of a million pairs. *Best 16*: search with vectors, then read only the sixteen best. CLIP cannot read
# pairs, ViLT has no vectors. ALBEF has both, and pays with three transformers: image tower, text tower, fusion.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The idea
#
# ```text
#                                           ┌─► text expert ──┐
#     text  ──► words ────┐                 │                 │
#                         ├─► attention, ───┼─► image expert ─┼──► next layer
#     image ──► patches ──┘   shared        │                 │
#                                           └─► VL expert ────┘   (only in the top layers)
#
#     what comes in      lower layers           top layers      what it is good for
#     an image           image expert           image expert    a vector to search with
#     a text             text expert            text expert     a vector to search with
#     both, text first   text | image expert    VL expert       match? · which word is masked?
# ```
#
# A layer of a transformer has two parts. **Attention** moves information between tokens; the **feed-forward** part works
# on each token by itself. To compare and to collect is perhaps the same craft for words and for patches. What a token
# *means* is not. So attention is shared, and the feed-forward part exists several times: the **experts**.
#
# Large language models have experts too, but there a small network, the router, has to *learn* whom to send a token to.
# Here nothing is to be learned: a word goes to the text expert, because it is a word.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## By hand: who goes where
# Four pictures with their captions, in one lower layer. The text stands first. Attention is done for all tokens
# together; then we take each token by the hand and lead it to its expert.

# %% tags=["nbval-check-output"]
trained = load_model(VLMo, bundled("vlmo_nano"))
four = [row for row in range(60) if len(test.scene(row).objects) == 2][:4]
captions = [test.captions(row)[0] for row in four]
images, text = to_tensor(test.pixels(four, 64)), tokenize(tokenizer, captions, 56)
with torch.no_grad():
    x = torch.cat([trained.joint.embed_text(text), trained.joint.embed_image(images)], dim=1)  # (4, L+1+P, D)
length, tokens = text.length, x.shape[1]
layer = trained.joint.blocks[0]
mask = trained.joint.masks(length, tokens - length, text.mask)  # (4, 1, 1, N): padding is not attended to

with torch.no_grad():
    attended = x + layer.self_attention(layer.self_norm(x), mask=mask)  # all tokens together
    by_hand, sent = attended.clone(), {"text": 0, "image": 0}
    for i in range(4):
        for n in range(tokens):
            name = "text" if n < length else "image"
            expert = layer.experts[name]
            by_hand[i, n] = attended[i, n] + expert.feed_forward(expert.norm(attended[i, n]))
            sent[name] += 1
print(f"{tokens} tokens in each of 4 pairs; sent to the text expert: {sent['text']}, to the image expert: {sent['image']}")

# %% [markdown]
# Note that each expert brings its own LayerNorm: the sizes of words and patches differ too. The library splits the row
# of tokens once and runs each expert on its part. Check that both agree:

# %% tags=["check", "nbval-check-output"]
parts = (("text", length), ("image", tokens - length))
with torch.no_grad():
    assert torch.allclose(layer(x, mask, parts=parts), by_hand, atol=1e-5)
print("token by token and all at once: the same")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Nothing else is new.** If all experts were equal, it would not matter who goes where, and the layer would be an
# ordinary transformer layer. That is a good test, because it can fail: let us copy the text expert over the image
# expert, and compare with the block of the other lessons.

# %% tags=["check", "nbval-check-output"]
plain = Block(trained.config.image.block)
plain.self_norm.load_state_dict(layer.self_norm.state_dict())
plain.self_attention.load_state_dict(layer.self_attention.state_dict())
plain.feed_norm.load_state_dict(layer.experts["text"].norm.state_dict())
plain.feed_forward.load_state_dict(layer.experts["text"].feed_forward.state_dict())
equal = deepcopy(layer)
equal.experts["image"].load_state_dict(equal.experts["text"].state_dict())
with torch.no_grad():
    assert torch.allclose(equal(x, mask, parts=parts), plain(x, mask), atol=1e-5)
    assert not torch.allclose(layer(x, mask, parts=parts), plain(x, mask), atol=1e-2)
print("equal experts: the plain block; the layer's own experts: something else")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The model
# `minivlp/models/vlmo.py`. Three losses, all known from lesson 03: contrast of the two vectors (ITC), matching with
# hard negatives (ITM), masked words (MLM). One detail is VLMo's own. The contrast is computed twice: once with the
# experts of one modality up to the top (search uses this), and once with the VL expert in the top layers, so that the
# VL expert has seen pictures and texts alone as well. The mean of both is the loss.
#
# | | published (base) | nano | why |
# |---|---|---|---|
# | layers, width | 12, 768 | 4, 128 | minutes on a laptop |
# | VL expert from layer | 10 (the top two) | 3 (the top one) | the same share |
# | positions | relative, one table for all routes | absolute: sine waves, and learned for words | as in all our nano models |
# | LayerScale | .1 | none | in a short run it only delays |
# | start | BEiT, trained on images alone | the shared towers' image layers and words | see below |
# | negatives for ITM | hard ones of all GPUs' batches | hard ones of the batch, and a negative caption each | small batches |
# | weight of MLM | a quarter | a quarter | |
# | `mask_rate` | .15 of the words | .4, of words that name something | short captions |
#
# (The negative captions are not VLMo's idea but NegCLIP's, Yuksekgonul et al. 2023; lesson 03 shows why we need them.)

# %% tags=["nbval-check-output"]
model = recipe.build(VLMo, tokenizer)
for name, (_, count) in trainable(model).items():
    print(f"{name:<17} {count / 1e3:6.1f} thousand")

# %% [markdown]
# The experts are most of the model. But of the text expert and the image expert, a token sees only one: more weights,
# and not a multiplication more.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## First, overfit one batch

# %% tags=["check", "nbval-check-output"]
scenes = Scenes(recipe.scenes, split="train", seed=0, size=recipe.size, objects=recipe.objects)
few = replace(recipe, batch_size=8).batches(scenes, tokenizer)(0)
losses = overfit_one_batch(recipe.build(VLMo, tokenizer), few, steps=30)
assert losses[-1] < 0.5 * losses[0]
print("overfit: the sum of the three losses is far below where it began")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Images first, then texts, then pairs
# Image-text pairs are expensive to collect; images alone and text alone are cheap. With experts one can learn from them,
# in **stages**:
#
# 1. **Images.** Mask some patches, predict them. This trains attention and image experts.
# 2. **Texts.** Mask some words, predict them. This trains the text experts, *on the attention that images have made*,
#    which is **frozen**.
# 3. **Pairs.** Everything learns.
#
# Is stage 2 not odd? That words should make do with an attention that has never read a word? That is the paper's
# boldest claim: attention, once learned, serves both.
#
# What learns where? We ask the model: which parts get a gradient from a stage's loss at all, and which of them are
# frozen nevertheless?

# %%
def what_learns(stage, freeze):
    """Per component that takes part in a stage's loss: how many of its numbers learn, and how many it has."""
    unfreeze(model)
    sum(stage.losses(few).values()).backward()
    takes_part = {component(name) for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    freeze(model)
    return {name: counts for name, counts in trainable(model).items() if name in takes_part}


stages = {
    "1 · images": what_learns(ImageStage(model), unfreeze),
    "2 · texts": what_learns(TextStage(model), freeze_for_text),
    "3 · pairs": what_learns(model, unfreeze),
}
drawing.frozen_table(stages)

# %% tags=["check", "nbval-check-output"]
assert stages["2 · texts"]["attention"][0] == 0 and "image expert" not in stages["2 · texts"]
assert all(learn == have for learn, have in stages["3 · pairs"].values())
print("stage 2: attention works but is frozen; stage 3: everything learns")

# %% [markdown]
# "Only the text experts learn in stage 2" is how one retells the paper. The table says a little more, and so does the
# released code: words and their head must learn too, and the final LayerNorm and the token-type embedding learn along,
# although images use them as well.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Stage 1, a moment of it.** From scratch. The paper's model has BEiT behind it, which predicts codes of an image
# tokenizer; ours predicts pixels, as MAE does. Squares of two by two patches are masked, two fifths of the picture.

# %%
torch.manual_seed(0)
beginner = VLMo(VLMo.Config.nano(len(tokenizer)))
stage = ImageStage(beginner)
steps = {"quick": 20, "laptop": 200}.get(profile(), 2000)
pictures_only = replace(recipe, batch_size=32, negative_captions=False).batches(scenes, tokenizer, seed=1)
seen = fit(stage, pictures_only, recipe.settings(steps=steps), bar=False)
stage.cpu()

some = to_tensor(test.pixels(four, 64))
torch.manual_seed(1)
masked = mask_blocks(4, 8, 8, stage.rate)  # (4, P)
with torch.no_grad():
    mean, spread = some.mean(dim=(0, 2, 3)), some.std(dim=(0, 2, 3), correction=0)
    predicted = patch_pixels(some, 8)  # (4, P, 3 * 64)
    predicted[masked] = stage.predict(some, masked)
    predicted = torch.pixel_shuffle(predicted.unflatten(1, (8, 8)).permute(0, 3, 1, 2), 8)  # (4, 3, 64, 64)
    predicted = predicted * spread[:, None, None] + mean[:, None, None]
gray = masked.view(4, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
with drawing.style():
    figure, axes = plt.subplots(2, 4, figsize=(7.5, 4), layout="constrained")
    for line, shown, name in zip(axes, (some.masked_fill(gray, 1), predicted), ("masked", "predicted"), strict=True):
        line[0].set_ylabel(name)
        for ax, picture in zip(line, shown, strict=True):
            ax.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0))
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    plt.show()

# %% [markdown]
# First it learns how bright the ground is, then its color, and then that things go on behind a square. In profile
# `quick` it gets no further than a gray. But not one word was needed for it.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Stage 2, a moment of it.** A good stage 1 takes longer than we want to wait. But we have an attention that was made
# on images: the image tower of the shared towers, with which our recipe begins. (It was trained with boxes and their
# phrases, so it is not as innocent as BEiT. And its words come along.) The text experts are new. Freeze, and train on
# captions alone:

# %% tags=["nbval-ignore-output"]
torch.manual_seed(0)
reader = recipe.build(VLMo, tokenizer)
before = {name: parameter.detach().clone() for name, parameter in reader.named_parameters()}
short = min(captions, key=len)
alone = tokenize(tokenizer, [short], 56)


def text_attention():
    """Which word attends to which when the text is alone: (L, L) of each layer, the mean of the heads."""
    with torch.no_grad(), record_attention(reader.eval()) as maps:
        reader.encode_text(alone)
    return [maps[f"joint.{n}.self"][0].mean(dim=0) for n in range(len(reader.joint.blocks))]


early = text_attention()
freeze_for_text(reader)
texts_only = replace(recipe, batch_size=64, negative_captions=False).batches(scenes, tokenizer, seed=2)
read = fit(TextStage(reader), texts_only, recipe.settings(steps={"quick": 60, "laptop": 300}.get(profile(), 2000)), bar=False)
reader.cpu()
unfreeze(reader)
late = text_attention()
drawing.training_curves(read)

# %% tags=["check", "nbval-check-output"]
moved = {component(name) for name, parameter in reader.named_parameters() if not torch.equal(parameter, before[name])}
assert "attention" not in moved and "image expert" not in moved and {"text expert", "token embedding"} <= moved
assert read.steps[-1]["loss"] < 0.75 * read.steps[0]["loss"]
print("masked words are predicted better, and of the attention not one number has moved:", ", ".join(sorted(moved)))

# %% [markdown] slideshow={"slide_type": "subslide"}
# Attention is frozen. Does it look at the same words, then? Before and after stage 2, the same caption:

# %%
said = tokenizer.convert_ids_to_tokens(alone.ids[0].tolist())
shown = {f"layer {n}, {when}": maps[n].numpy() for n in (0, 2) for when, maps in (("before", early), ("after", late))}
drawing.word_attention(said, shown)

# %% tags=["nbval-ignore-output"]
for n, (was, now) in enumerate(zip(early, late, strict=True)):
    print(f"layer {n}: {50 * (was - now).abs().sum(dim=1).mean():2.0f} % of the attention has moved to another word")

# %% [markdown]
# In layer 0 it does, nearly: all that could change there are the words' vectors, and they hardly did. Higher up it looks
# elsewhere. The weights that compare are the same, but what is *compared* now comes out of text experts that have learned.
# So that is how words make do with an attention that has never read: they cannot change how it looks, but they can
# change what it finds. In the 60 steps of profile `quick` one sees the beginning of it: a map has been redrawn, and
# nobody would call it grammar. Whether it helps that *images* have made this attention is a question for below.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Now train: pairs
# Stage 3, from the towers. What a blind guess costs: `itc` 3.5, the logarithm of a batch of 32; it falls first. `itm`
# .56: one pair in four is right, and that is all one knows. `mlm` is shown with its weight of a quarter, and begins
# near 1.8.
#
# *Profile `laptop` takes a few minutes on two cores; `quick`, in which this page was made, only shows the first
# steps. Set `MINIVLP_PROFILE` before you start Jupyter to choose. The stop button ends training whenever you like.*

# %% tags=["nbval-ignore-output"]
batches = recipe.batches(scenes, tokenizer)
curves = LiveCurves()
display(curves)
with curves.guard():
    history = fit(model, batches, recipe.settings(), on_step=[curves.log_row], bar=False)
history

# %% tags=["check", "nbval-check-output"]
first, last = (sum(row["loss"] for row in rows) / len(rows) for rows in (history.steps[:5], history.steps[-5:]))
assert last < 0.95 * first
print("the loss is falling")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Look: three routes through the same layers
# Which expert handles which token? This is read off the model while it runs; layers go from below to the top. The gray
# band is attention, whose weights are shared by both modalities. The model is yours if you trained in profile `laptop`,
# and the bundled one otherwise.

# %%
model = trained if profile() == "quick" else model.cpu()
look_at = next(r for r in range(60, len(test)) if len(test.scene(r).objects) == 2 and not test.scene(r).background.texture)
caption = test.captions(look_at)[0]
size = model.config.image.image_size
picture, text = to_tensor(test.pixels([look_at], size)), tokenize(tokenizer, [caption], 56)
rows, columns = model.config.image.grid
text_tokens = tokenizer.convert_ids_to_tokens(text.ids[0].tolist())
image_tokens = ["class", *["patch"] * (rows * columns)]
routes = {
    "a picture alone": attention.expert_map(model, lambda: model.embed_images(picture)),
    "a text alone": attention.expert_map(model, lambda: model.embed_texts(text)),
    "both": attention.expert_map(model, lambda: model.match(picture, text)),
}
drawing.expert_figure(
    routes,
    {"a picture alone": image_tokens, "a text alone": text_tokens, "both": text_tokens + image_tokens},
)

# %% tags=["check", "nbval-check-output"]
top = model.config.vl_from
assert {name for row in routes["a picture alone"] for name in row} == {"image"}
assert {name for row in routes["both"][top:] for name in row} == {"vl"}
print(f"alone: its own expert in all layers; both: the VL expert from layer {top} on")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Where does it look?** Left: a picture alone; what does its class token look at, on the way to becoming a vector? Then
# the words of the caption, when both are together. One attention does both. Which layer and head to show is decided as
# in lesson 03: by the pointing game, on validation scenes.

# %%
def noun_maps(scenes):
    """By (layer, head), -1 for the mean of the heads: where the word that names a thing looks; boxes; rows."""
    asked = [(r, region) for r in range(len(scenes)) for region in scenes.regions(r) if region.kind == "object"]
    rows, boxes = [r for r, _ in asked], torch.tensor([region.box for _, region in asked])
    its_text = tokenize(tokenizer, [scenes.captions(r)[0] for r in rows], 56)
    nouns = [region.phrase.split()[-1] for _, region in asked]
    named = zip(its_text.ids, nouns, strict=True)
    where = torch.tensor([next(p[-1] for w, p in group_words(tokenizer, ids) if w == noun) for ids, noun in named])
    with torch.no_grad(), record_attention(model) as maps:
        model.match(to_tensor(scenes.pixels(rows, size)), its_text)
    found = {}
    for n, heat in enumerate(attention.word_patch_attention(maps, its_text.length).values()):  # (R, H, L, P)
        of_noun = heat[torch.arange(len(rows)), :, where]  # (R, H, P)
        found |= {(n, head): attention.to_grid(one) for head, one in enumerate(of_noun.unbind(dim=1))}
        found[n, -1] = attention.to_grid(of_noun.mean(dim=1))
    return found, boxes, rows


maps, boxes, _ = noun_maps(Scenes(100, split="validation", seed=3))
best, head = max(maps, key=lambda key: pointing_game(maps[key], boxes).value)
maps, boxes, rows = noun_maps(Scenes(150, split="test", seed=7))  # scenes that had no say in the choice
points = pointing_game(maps[best, head], boxes, images=rows)

# %% tags=["nbval-ignore-output"]
Scores({f"layer {best}, {'mean of heads' if head < 0 else f'head {head}'}: strongest patch inside": points})

# %% tags=["check", "nbval-check-output"]
assert points.value > 3 * points.chance
print("chosen on validation scenes, and it still points on test scenes")

# %%
with torch.no_grad(), record_attention(model) as image_maps:
    model.embed_images(picture)
with torch.no_grad(), record_attention(model) as pair_maps:
    model.match(picture, text)
of_class = attention.cls_map(image_maps[f"joint.{best}.self"])[0]  # (P,)
heat = attention.word_patch_attention(pair_maps, text.length)[f"joint.{best}.self"][0]  # (H, L, P)
heat = heat.mean(dim=0) if head < 0 else heat[head]
heat = heat / heat.sum(dim=1, keepdim=True)  # of each word's attention to the patches, where does it go?
spoken = group_words(tokenizer, text.ids[0])
things = [region for region in test.regions(look_at) if region.kind in ("object", "phrase")]
drawing.attention_figure(
    test[look_at].image,
    ["alone: class", *[word for word, _ in spoken]],
    [attention.to_grid(m).numpy() for m in (of_class, *[heat[pieces].mean(dim=0) for _, pieces in spoken])],
    [region.box for region in things],
    columns=-(-(len(spoken) + 2) // 2),
)

# %% [markdown]
# The maps are on the things and not on the ground, but they hardly tell *which* thing: *green*, of which there are two,
# looks at both, and *star* is brightest where the two meet. As pointers they do for .70 of the things in the bundled
# model. ALBEF's first fusion layer reaches .94, ViLT .82 (by Grad-CAM).
#
# How much do words look at the picture at all, layer by layer, and patches at the words?

# %% tags=["nbval-ignore-output"]
length = text.length
for n, name in enumerate(pair_maps):
    weights = pair_maps[name][0].mean(dim=0)  # (N, N), the mean of the heads
    to_patches, to_words = weights[:length, length:].sum(dim=1).mean(), weights[length:, :length].sum(dim=1).mean()
    print(f"layer {n}: words give {100 * to_patches:2.0f} % to the picture, patches give {100 * to_words:2.0f} % to the words")

# %% [markdown]
# All layers and heads, to play with: point at a word, click a patch.

# %% tags=["nbval-ignore-output"]
viewer = AttentionViewer.of(model, test[look_at].image, caption, tokenizer, things)
viewer.layer, viewer.head = best, head
viewer

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same weights, used twice
# **As a dual encoder:** pictures alone, texts alone, compare vectors. **As a fusion encoder:** both together; does it
# match, which word is masked? No weight is changed in between. For your model, or the bundled one in profile `quick`:

# %% tags=["nbval-ignore-output"]
search = retrieval(model, test, tokenizer, unique=200)
facts = counterfactual(model, test, tokenizer, limit=200)
filled = masked_words(model, test, tokenizer, limit=200)
Scores(
    {f"alone · {name}": search[name] for name in ("text to image R@1", "image to text R@1")}
    | {f"together · {kind}": facts[kind] for kind in ("object", "color", "relation", "mean")}
    | {f"together · masked word, {name}": filled[name] for name in ("right image", "wrong image")}
)

# %% tags=["check", "nbval-check-output"]
assert search["text to image R@1"].value > 30 * search["text to image R@1"].chance
assert facts["mean"].value > 0.55 and filled["right image"].value > filled["wrong image"].value + 0.1
print("one set of weights: it searches, and it reads")

# %% [markdown] slideshow={"slide_type": "subslide"}
# Beside the models of the lessons before, three seeds each (`python tools/experiments.py vlmo_seeds`; the others are
# those of their lessons, on the same test scenes). First the search, by vectors alone (ViLT has none):

# %%
of_each = {"VLMo nano": "vlmo_seeds", "ALBEF nano": "albef_seeds", "CLIP nano": "clip_seeds", "ViLT nano": "vilt_seeds"}
found = {name: by_variant(record)[name] for name, record in of_each.items()}
searchers = {name: runs for name, runs in found.items() if name != "ViLT nano"}
drawing.bars_with_spread(searchers, ["text to image R@1", "image to text R@1"])

# %% [markdown]
# Then the reading: the true caption or the one with a changed fact, and masked words (which CLIP cannot predict).

# %%
kinds = [f"counterfactual: {kind}" for kind in ("object", "color", "size", "relation", "swap", "mean")]
drawing.bars_with_spread(found, kinds)

# %%
readers = {name: runs for name, runs in found.items() if name != "CLIP nano"}
drawing.bars_with_spread(readers, ["masked word: right image", "masked word: wrong image"])

# %% [markdown]
# *What we see.*
#
# * **It searches** as well as ALBEF: R@1 .83 to .85, ALBEF .84 to .86, CLIP .75 to .79. (Be fair: CLIP starts from
#   nothing, the others from towers trained with boxes.)
# * **It reads** late, as ViLT does. Together, one changed fact is noticed in .60 to .63 (ViLT .59 to .65, ALBEF .91 to
#   .92): colors, mostly, and other things now and then; relations are at chance. CLIP's vectors alone get .72 to .74!
# * **Masked words** say that it does look: .30 to .36 with the right picture, .07 with a wrong one. ViLT gets .58 to .64:
#   its masked words count four times as much, and it trains longer. ALBEF gets .90 to .94.
#
# Why? Our reading: contrast is learned first, and fast, since both routes for it were there from the start. Reading needs
# words to look at patches, with an attention that has only ever compared patches with patches. ALBEF's cross-attention
# is a part of its own, which in our case had already learned to find boxes, and its recipe is longer (700 steps of 48
# pairs against 350 of 32). The bundled VLMo trained for 750 steps: by then one
# changed fact is noticed in .74 (things .93, colors 1.00), masked words are .72 right, and relations are still at chance.
#
# And the dilemma of the beginning? The table once more, with a new row:

# %% tags=["nbval-ignore-output"]
costs([*known, ("VLMo", trained, one_fact("vlmo_seeds", "VLMo nano"))])

# %% [markdown]
# *Each once* costs VLMo what it costs CLIP: a short pass for a picture, a shorter one for a text. *Every pair* costs it
# what it costs ViLT: all layers, for words and patches together, where ALBEF runs its two fusion layers only. And *best
# 16* is what one does in practice: search with the one face, re-rank with the other. Does it pay here?

# %% tags=["nbval-ignore-output"]
ranked = {k: reranked(model, test, tokenizer, k=k, unique=100) for k in (0, 4)}
Scores({f"{way} R@1, best {k} re-ranked": ranked[k][f"{way} R@1"] for way in ("text to image", "image to text") for k in ranked})

# %% [markdown]
# It does not: with its second face the bundled model spoils what it has found with the first (R@1 falls by some points). To
# re-rank, one must be the better reader, and on relations, by which the best few often differ, this one is at chance.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Change one thing: are experts worth it?
# One feed-forward layer for all, at the same cost per token, against the experts; all else equal, three seeds each
# (`python tools/experiments.py vlmo_ablation`).

# %%
measures = ["text to image R@1", "counterfactual: object", "counterfactual: color", "counterfactual: relation"]
measures += ["counterfactual: mean", "masked word: right image"]
ablation = {"experts": by_variant("vlmo_seeds")["VLMo nano"]} | by_variant("vlmo_ablation")
drawing.bars_with_spread(ablation, measures)

# %% [markdown]
# *What we see.* **Experts win, in everything that has begun to be learned.** R@1 .83 to .85 against .79 to .82, another color noticed in
# .79 to .97 against .59 to .73, another thing in .60 to .71 against .51 to .58, masked words .30 to .36 against .24 to .29.
# The ranges do not overlap. Both cost the same per token; what experts cost is memory (1.9 against 1.2 million parameters).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Are the stages worth it?
# From scratch this time, without towers: pairs alone; pairs after a stage of images; after images and texts, as in the
# paper; and after texts and images, the other way round. 120 steps for each stage, so that every row sees as many pairs;
# contrast and masked words only, since matching does not begin so early (`python tools/experiments.py vlmo_stages`).

# %%
drawing.bars_with_spread(
    by_variant("vlmo_stages"),
    ["text to image R@1", "image to text R@1", "masked word: right image", "masked word: wrong image"],
)

# %% [markdown]
# *What we see.* **Here the stages do not pay for search.** Pairs alone reach R@1 .12 to .20; after any stage before them it
# is .03 to .09. **Texts teach grammar:** masked words are right in .14 to .18 instead of .07 to .08, but just as often with a
# wrong picture; they are guessed from the sentence.
#
# Why? Guessing pixels asks for colors and edges, and in 120 steps it has moved the layers to where contrast must fetch
# them back from. BEiT, the paper's first stage, guesses codes that stand for *what* is shown, on millions of pictures.
# We have measured that a bad start is worse than none; about a good one this table is silent. The shared towers, on
# the other hand, are a start that pays: R@1 .83 to .85.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## An open question: does it have to be images first?
# The paper freezes the attention that *images* have made and lets texts use it. Would the attention that *texts* have
# made serve images? Nobody has published that, so let us try. Attention from the other modality, frozen; attention from
# nowhere, random and frozen; and attention that learns along, as the best one could hope for. No pairs anywhere. How
# much of what is masked is predicted (`python tools/experiments.py vlmo_frozen`)?

# %%
carried = by_variant("vlmo_frozen")
drawing.bars_with_spread({name: runs for name, runs in carried.items() if name.startswith("texts")}, ["masked words"])

# %%
drawing.bars_with_spread({name: runs for name, runs in carried.items() if name.startswith("images")}, ["masked patches"])

# %% [markdown]
# Masked words: the share that is predicted right from the text alone. Masked patches: how much of the pixels' variance is
# explained; nothing would be 0, all of it 1.
#
# *What we see.* **In both directions, the attention that the other modality has made is worth no more than a random
# one.** Masked words: .25 to .27 with the attention of images, .25 to .26 with a random one, .27 to .28 when it learns along.
# Masked patches: .36 with the attention of texts, .36 with a random one, .38 to .39 when it learns along.
#
# So what have we learned? First, that frozen attention is no great loss here: experts can make do with nearly any, since
# much of what is masked can be predicted from the mean of what is there. Secondly, that "texts do well on the attention of
# images" is no proof that anything was *carried over*: ask how well they do on a random one. (As far as we remember, the
# paper does not.) And what we have not learned: whether an attention that has been trained on millions of images for
# weeks carries over. Ours had 250 steps, in which it hardly became better than random itself.

# %% [markdown] slideshow={"slide_type": "subslide"}
# *Your turn:* the VL expert. What if there is none (`vl_from=4`), so that pairs keep the experts of their modality to
# the top? What if it comes early (`vl_from=1`)? About two minutes each.

# %% tags=["nbval-ignore-output"]
for vl_from in (4, 1):
    if profile() != "quick":
        torch.manual_seed(0)
        mine = replace(recipe, config=recipe.config | {"vl_from": vl_from})
        other = mine.build(VLMo, tokenizer)
        fit(other, mine.batches(scenes, tokenizer), mine.settings(steps=200))
        print(vl_from, counterfactual(other.cpu(), Scenes(400, split="validation", seed=5), tokenizer)["mean"])

# %% [markdown] slideshow={"slide_type": "slide"}
# # Exercises
# Each has a check that says which property failed. Solutions are in the executed notebook.
#
# ## 1 · Whom to ask *(easy, 15 minutes)*
# Send each token to its expert. Below layer `vl_from`, words go to the text expert and the image's tokens to the image
# expert. From `vl_from` on, a *pair* goes to the VL expert as a whole; who comes alone stays with its own.
# *Hint:* three cases. How do you see from `length` that a modality comes alone?

# %% tags=["exercise"]
def my_route(x, length, layer, vl_from, experts):
    """x (B, N, D): `length` tokens of text first, then those of the image. experts: functions by name.

    Returns what the experts make of x, (B, N, D), without the residual.
    """
    ### BEGIN SOLUTION
    pair = 0 < length < x.shape[1]
    if pair and layer >= vl_from:
        return experts["vl"](x)
    done = []
    if length:
        done.append(experts["text"](x[:, :length]))
    if length < x.shape[1]:
        done.append(experts["image"](x[:, length:]))
    return torch.cat(done, dim=1)
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_route(my_route)

# %% [markdown]
# ## 2 · What must not learn *(medium, 15 minutes)*
# Prepare a VLMo for stage 2, texts without pictures: set `requires_grad` of every parameter. Text experts, the text
# embedding (`joint.text_embed`) and the head that predicts masked words (`mlm_head`) learn; so do, as in the released code,
# the final LayerNorm (`joint.norm`), the relative positions (`joint.relative`) and the token types (`joint.token_type`).
# Nothing else does.
# *Hint:* `for name, parameter in model.named_parameters()`. Print a few names first.

# %% tags=["exercise"]
def my_freeze(model):
    """Sets `requires_grad` of all parameters of a VLMo for learning from texts alone. Returns nothing."""
    ### BEGIN SOLUTION
    for name, parameter in model.named_parameters():
        of_text = ".experts.text." in name or name.startswith(("joint.text_embed.", "mlm_head."))
        of_all = name.startswith(("joint.norm.", "joint.relative.", "joint.token_type"))
        parameter.requires_grad = of_text or of_all
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_frozen(my_freeze)

# %% [markdown]
# Yours does what the library does:

# %% tags=["nbval-check-output", "needs-solution"]
fresh = VLMo(VLMo.Config.nano(len(tokenizer)))
my_freeze(fresh)
mine = trainable(fresh)
freeze_for_text(fresh)
print("the same as freeze_for_text:", mine == trainable(fresh))

# %% [markdown]
# ## 3 · Relative positions *(medium, 20 minutes)*
# The published VLMo does not tell a patch where it is. It adds to attention a number that depends on how far one patch
# is *from the other*: down and to the right. All pairs of patches with the same offset share a row of a table. Which row?
#
# Patches are numbered row by row. The offset is the looking patch's place minus the other's. Number the offsets as
# patches are numbered: first the one that is most up, and of these the one most to the left.
# *Hint:* `down` goes from `-(rows - 1)` to `rows - 1`. Shift it so that it begins at 0. How many offsets has one line?

# %% tags=["exercise"]
def my_index(rows, columns):
    """Which row of the table serves patch i (first axis) looking at patch j (second axis): (P, P) long."""
    ### BEGIN SOLUTION
    patch = torch.arange(rows * columns)
    row, column = patch // columns, patch % columns
    down = row[:, None] - row[None, :] + rows - 1  # (P, P), 0 .. 2 rows - 2
    right = column[:, None] - column[None, :] + columns - 1
    return down * (2 * columns - 1) + right
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_index(my_index)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What the paper reported, and what we saw
# The paper's column is as we remember it; check the paper.
#
# | | the paper | here |
# |---|---|---|
# | data | BEiT's images; Wikipedia and books; 4 million pictures with captions | 12,000 scenes made on the spot |
# | size (base) | 175 M parameters | 1.9 M |
# | start | BEiT, then texts on frozen attention | towers trained on scenes with boxes |
# | search, base, fine-tuned | COCO R@1 74.8 (image to text), 57.2 (text to image); Flickr30k 92.3, 79.3 | as good as ALBEF's: R@1 .83 to .85 |
# | reading, base | VQA 76.6; NLVR2 82.8 (dev), 83.3 (test) | late, as ViLT: one fact .60 to .63, colors mostly; relations at chance |
# | experts or one for all | experts are better | experts are better: R@1 .83 to .85 against .79 to .82 |
# | images first; texts too | each helps; texts on top help more | predicting pixels first harms search; texts help masked words, without looking |
# | texts first, then images | not tried | frozen attention of the other: no better than a random one, both ways |
# | hard negatives from all GPUs | better than from one's own batch | one batch is all we have |
#
# **Next:** VLMo reads and searches, but it cannot *say* anything. BLIP (lesson 05) learns to write captions, and uses
# them to clean its own training data.
