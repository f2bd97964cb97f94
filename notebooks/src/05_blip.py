# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#     notebook_metadata_filter: kernelspec,jupytext,-all
#     cell_metadata_filter: tags,slideshow,-all
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 05 · BLIP: reading, judging, writing
#
# **The question.** All models so far *read*: they say how well a text fits a picture. None of them can say a word of its
# own. And all of them believed what they read. Captions from the web are cheap, but many do not say what is shown. If a
# model can tell a good caption from a bad one, and can write a better one, could it not **mend its own schoolbook**?
#
# BLIP (Li et al. 2022) does both. One text transformer is used in three ways: it reads, it judges, it writes. And when
# it can judge and write, it goes through the captions it learned from, throws out what is false, writes what is missing,
# and a new model learns from the result. That is **CapFilt**: captioner and filter.
#
# You will compute the loss of writing by hand, train a model that writes captions, mark its errors fact by fact, see
# where it looks for each word, and let it clean up a data set of which *you* know which captions are wrong.

# %% tags=["setup"] slideshow={"slide_type": "skip"}
import json
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch

from minivlp.data.batch import to_tensor
from minivlp.data.loading import Loader
from minivlp.data.noise import NoisyCaptions
from minivlp.data.scenes import Scenes
from minivlp.data.text import group_words, load_tokenizer, tokenize
from minivlp.device import profile
from minivlp.evaluation.captions import captions, write
from minivlp.evaluation.facts import proofread, tells_all
from minivlp.evaluation.filtering import filter_quality, roc
from minivlp.evaluation.grounding import pointing_game
from minivlp.evaluation.records import RECORDS, by_variant
from minivlp.evaluation.score import Scores, bootstrap
from minivlp.layers.attention import record_attention
from minivlp.layers.generation import DecodingConfig, nucleus
from minivlp.lessons import blip as exercise
from minivlp.models.blip import BLIP, CROSS_ATTENTION, SELF_ATTENTION, THE_REST
from minivlp.papers import paper
from minivlp.training.capfilt import CapFilt, by_cosine
from minivlp.training.checkpoint import bundled, load_model
from minivlp.training.loop import fit, overfit_one_batch
from minivlp.visualize import attention, drawing
from minivlp.visualize.widgets import AttentionViewer, FilterBoard, LiveCurves

recipe = paper("blip").recipe(profile())
tokenizer = load_tokenizer()
seeded = torch.manual_seed(0)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## One model, three answers
# The model that comes with minivlp, and a picture that it has never seen. It **reads** some captions and says which is
# nearest to the picture. It **judges** whether a caption is true of it. And it **writes** one.

# %%
trained = load_model(BLIP, bundled("blip_nano"))
test = Scenes(1500, split="test", seed=7)
row = next(r for r in range(40, len(test)) if len(test.scene(r).objects) == 2 and not test.scene(r).background.texture)
scene, picture = test.scene(row), to_tensor(test.pixels([row], 64))
true = scene.captions()[0]
others = [test.captions(r)[0] for r in range(row + 1, row + 4)]
false = list(scene.counterfactuals(np.random.default_rng(0)).values())[:3]
with torch.no_grad():
    near = trained.similarity(picture, tokenize(tokenizer, [true, *others], 56))[0].softmax(dim=0)
    fits = trained.match(picture.expand(1 + len(false), -1, -1, -1), tokenize(tokenizer, [true, *false], 56))
written = write(trained, test, tokenizer, [row])[0]
with drawing.style():
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.7), layout="constrained", width_ratios=[1, 1.6, 1.6])
    axes[0].imshow(test[row].image), axes[0].axis("off")
    axes[0].set_title("writes: " + written, y=-0.04, va="top", fontsize=9, wrap=True)
    for ax, name, texts, values in ((axes[1], "reads: which is nearest?", [true, *others], near),
                                    (axes[2], "judges: is it true?", [true, *false], fits)):
        colors = [drawing.BLUE, *[drawing.VERMILION] * (len(texts) - 1)]
        ax.barh(range(len(texts)), values, height=0.3, color=colors)
        for y, text in enumerate(texts):
            ax.text(0.01, y - 0.2, text, va="bottom", fontsize=8)
        ax.set(xlim=(0, 1), ylim=(len(texts) - 0.6, -0.7), yticks=[], title=name)
    plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The idea
#
# ```text
#                    [CLS] a red heart … ──► reads text alone ──────────────► ITC: who belongs to whom?
#                                               │ the same layers
# picture ─► image tower ──┬──► [ENC] a red … ──► looks at the patches ────► ITM: is this true of the picture?
#                          │                    │ the same, but for self-attention
#                          └──► [DEC] a red … ──► looks at the patches, ───► LM: what is the next word?
#                                                 never ahead
# ```
#
# Three passes through *one* stack of layers. The first token says what is to be done: [CLS] read, [ENC] judge,
# [DEC] write. Two of the passes we know from ALBEF (lesson 03). The third is new: at every place of a text the model
# says what comes next. For that it may look at the picture and at the words up to there, but **never ahead**, or the
# answer would stand in the question.
#
# Does it keep to that? Change the last word of a caption. What it thought of all earlier words must not change when it
# writes; when it judges, every word may have seen every other.

# %% tags=["check", "nbval-check-output"]
text = tokenize(tokenizer, ["a heart left of a dog", "a heart left of a cup"], 56)
pictures, special = picture.expand(2, -1, -1, -1), trained.config.tokens
with torch.no_grad():
    written_as = trained.decode(text.with_first(special.dec), trained.encode_image(pictures))  # (2, L, D)
    judged_as = trained.cross_encode(pictures, text)
same = [torch.isclose(both[0], both[1], atol=1e-5).all(dim=1) for both in (written_as, judged_as)]  # (L,) per place
print("unchanged where it writes:", "".join("✓" if x else "·" for x in same[0][:-1]))
print("unchanged where it judges:", "".join("✓" if x else "·" for x in same[1][:-1]))
assert same[0][:-2].all() and not same[0][-2] and not same[1].any()

# %% [markdown] slideshow={"slide_type": "subslide"}
# The two kinds of looking, on that caption: a row is a word, the columns are the words that it looks at (first layer,
# mean of the heads). This is the one part that reading and writing do not share, and one sees why: whoever may look
# both ways, and whoever may look back only, need different habits.

# %%
caption = true
text = tokenize(tokenizer, [caption], 56)
with torch.no_grad(), record_attention(trained) as maps:
    trained.match(picture, text)
    trained.caption_logprob(picture, text)
tokens = tokenizer.convert_ids_to_tokens(text.ids[0].tolist())
with drawing.style():
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for ax, name, first, title in zip(axes, ("text.0.self", "decoder.0.self"), ("[ENC]", "[DEC]"), ("judging", "writing"), strict=True):
        ax.imshow(maps[name][0].mean(dim=0), cmap=drawing.HEAT, vmin=0)
        ax.set_xticks(range(len(tokens)), [first, *tokens[1:]], rotation=60, ha="right")
        ax.set_yticks(range(len(tokens)), [first, *tokens[1:]])
        ax.set_title(title)
    plt.show()

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The loss of writing, by hand
# For each place of each caption: how much probability did the model give to the word that really comes next? The loss is
# minus its logarithm, averaged over all words of all captions. The closing [SEP] is a word like any other: a model that
# never learns it never stops. Padding is not asked.
#
# One addition, **label smoothing**: a tenth of the target is spread evenly over *all* words. Nearly every picture can be
# told in several ways, so no word should ever be the only possible one. By hand, for four pairs:

# %% tags=["nbval-check-output"]
four = Loader(Scenes(8, split="validation", seed=5), tokenizer, 4, 64, seed=2).batch(0)
torch.manual_seed(0)
fresh = recipe.build(BLIP, tokenizer).eval()
with torch.no_grad():
    hidden = fresh.decode(four.text.with_first(special.dec), fresh.encode_image(four.images))  # (4, L, D)
    logits = fresh.caption_head(hidden)  # (4, L, V)
total, count = 0.0, 0
for i in range(4):
    for t in range(four.text.length - 1):
        if four.text.mask[i, t + 1]:  # is there a next word?
            logprob = logits[i, t].log_softmax(dim=0)  # (V,)
            total -= 0.9 * logprob[four.text.ids[i, t + 1]] + 0.1 * logprob.mean()
            count += 1
by_hand = total / count
print(f"{count} words asked")

# %% [markdown]
# The library does it at once, and agrees:

# %% tags=["check", "nbval-check-output"]
with torch.no_grad():
    by_library = fresh.losses(four)["lm"]
assert torch.isclose(by_hand, by_library, atol=1e-4)
print("the loop and the library agree")

# %% [markdown]
# A word to the wise: with smoothing the loss can never reach zero. For our vocabulary the floor is

# %% tags=["nbval-check-output"]
V = len(tokenizer)
right, other = 0.9 + 0.1 / V, 0.1 / V
floor = -right * np.log(right) - (V - 1) * other * np.log(other)
print(f"guessing among {V} words costs {np.log(V):.2f}, certain and right costs {floor:.2f}")

# %% [markdown] slideshow={"slide_type": "subslide"}
# What does the trained model expect, word by word? Below, the words of a true caption; in each column the three most likely
# ones at that place (dark: the word that comes). Where it hesitates, look at the words: is it unsure of the
# *picture*, or of the *wording*?

# %%
text = tokenize(tokenizer, [caption], 56)
with torch.no_grad():
    hidden = trained.decode(text.with_first(special.dec), trained.encode_image(picture))
    expected = trained.caption_head(hidden)[0].softmax(dim=-1)  # (L, V); row t: the word after token t
best = expected.topk(3)
next_tokens = tokenizer.convert_ids_to_tokens(text.ids[0, 1:].tolist())
with drawing.style():
    figure, axes = plt.subplots(1, len(next_tokens), figsize=(9, 1.9), layout="constrained", sharey=True)
    for ax, t, said in zip(axes, range(len(next_tokens)), next_tokens, strict=True):
        likely = tokenizer.convert_ids_to_tokens(best.indices[t].tolist())
        colors = [drawing.BLUE if word == said else drawing.SKY for word in likely]
        ax.barh(range(3), best.values[t], height=0.35, color=colors)
        for y, word in enumerate(likely):
            ax.text(0.02, y - 0.25, word, va="bottom", fontsize=8)
        ax.set(xlim=(0, 1), ylim=(2.5, -0.9), yticks=[], xticks=[], xlabel=said)
        ax.spines[:].set_visible(False)
    plt.show()

# %% [markdown]
# Mostly of the wording. A caption may set out from either thing, or say *a picture of* first; and a size is told or left
# out as chance will have it. Once it is said which thing comes first and where the other lies, little is left to guess.
# That is why a tenth is kept for all words, and why the loss stays above its floor even for a perfect model.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The model
# `minivlp/models/blip.py` holds what only BLIP does; towers, matching and hard negatives are those of ALBEF.
#
# | field of the config | published | nano | why |
# |---|---|---|---|
# | layers: image, text | 12, 12 | 3, 2 | minutes on a laptop |
# | words look at patches | in every layer of the text | the same | |
# | `shared` | all but self-attention | the same | see *Who shares what* |
# | `smoothing` | .1 | the same | |
# | start | ViT trained on ImageNet, BERT | the shared towers; image tower frozen | as in lesson 03 |
# | negatives | hard ones of the batch | the same, and one negative caption each | as in lesson 03 |
# | `momentum` | .995, queue of 57,600 | None | it needs time (lesson 03) |
#
# Three passes over the text in each step; the picture is encoded once, and its keys and values serve both passes that
# look at it.

# %% tags=["nbval-check-output"]
model = recipe.build(BLIP, tokenizer)
parts = ("image", "text", "decoder", "match_head", "caption_head")
print({part: f"{sum(p.numel() for p in getattr(model, part).parameters()) / 1e6:.2f} M" for part in parts})
print(f"all: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M, since text and decoder share most of theirs")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## First, overfit one batch

# %% tags=["check", "nbval-check-output"]
train_scenes = Scenes(recipe.scenes, split="train", seed=0, size=recipe.size, objects=recipe.objects)
few = replace(recipe, batch_size=8).batches(train_scenes, tokenizer)(0)
losses = overfit_one_batch(recipe.build(BLIP, tokenizer), few, steps=40)
assert losses[-1] - floor < 0.35 * (losses[0] - floor)
print("overfit: the sum of the three losses is far on its way down to the floor")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Now train
# Three curves. `itc` starts low (the towers are aligned already), `itm` and `lm` start at a blind guess, and `lm` has its
# floor at about 1.
#
# *Profile `laptop` takes about three minutes on two cores; `quick`, in which this page was made, only shows the first
# steps. Set `MINIVLP_PROFILE` before you start Jupyter to choose.*

# %% tags=["nbval-ignore-output"]
batches = recipe.batches(train_scenes, tokenizer)
curves = LiveCurves()
display(curves)
with curves.guard():
    history = fit(model, batches, recipe.settings(), on_step=[curves.log_row], bar=False)
history

# %% tags=["check", "nbval-check-output"]
first, last = (sum(row["lm"] for row in rows) / len(rows) for rows in (history.steps[:5], history.steps[-5:]))
assert last < 0.95 * first
print("the loss of writing is falling")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What does it write?
# Captions of scenes that it has never seen, by taking the likeliest word at each place. Here the truth is known, so each
# word can be checked: what has a wavy line is **false**, what the caption leaves out is listed, a tick stands below
# captions that say everything and nothing wrong. The model is yours if you trained in profile `laptop`, and the bundled
# one otherwise.

# %%
model = trained if profile() == "quick" else model.cpu()
shown = list(range(8, 16))
said = write(model, test, tokenizer, shown)
marked = [proofread(text, test.scene(r)) for text, r in zip(said, shown, strict=True)]
drawing.caption_grid([test[r].image for r in shown], [text for text, _ in marked], [gone for _, gone in marked])

# %% [markdown] slideshow={"slide_type": "subslide"}
# In numbers. **BLEU-4, ROUGE-L and CIDEr-D** compare the words with those of the true captions, as the papers do.
# **Facts** asks what is *true*: which share of all facts of a picture is told rightly, wrongly, or not at all. Chance is
# the caption of another picture: good English, wrong picture.

# %% tags=["nbval-ignore-output"]
judged = captions(model, test, tokenizer, limit=400)
judged

# %% [markdown]
# Compare the two chances. A sentence about another picture gets a good part of ROUGE-L, since all our captions are made of
# the same few words; among its facts hardly any holds. Measures of overlap cannot tell *a heart left of a dog* from
# *a dog left of a heart*; no wonder that the field looks for better ones.
#
# Sizes are told worst, and for a reason that is worth knowing: our captions mention a size *by chance*. For a word
# that may be there or not, the likeliest next word is often to leave it out. So nearly all of its missing sizes are no
# failure to see. *A true caption* counts the captions that name every thing with its color, and say nothing false.

# %% tags=["check", "nbval-check-output"]
assert judged["facts right"].value > 2 * judged["facts right"].chance
assert judged["facts wrong"].value < 0.5 * judged["facts wrong"].chance
print("far more of what it writes is true than of a caption taken at random")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Where does it look while it writes?
# At the moment when a word is written, the decoder has the words before it and looks at the picture. We let it write a
# caption, give it that caption again word by word, and keep each look: a film strip. Note the small shift: the look that
# *led to* a word stands one place **before** the word.
#
# Which layer and head should we watch? As in lesson 06 the pointing game decides, on *validation* scenes: when a thing's
# noun is about to be written, how often does the strongest patch lie in the thing's box?

# %%
def noun_maps(scenes, later=0):
    """Maps (R, rows, columns) by layer and head (-1: their mean) when each noun is predicted, or `later` places after
    it; boxes; rows."""
    asked = [(r, region) for r in range(len(scenes)) for region in scenes.regions(r) if region.kind == "object"]
    rows, nouns = [r for r, _ in asked], [region.phrase.split()[-1] for _, region in asked]
    text = tokenize(tokenizer, [scenes.captions(r)[0] for r in rows], 56)
    named = zip(text.ids, nouns, strict=True)
    where = torch.tensor([next(p[0] for w, p in group_words(tokenizer, ids) if w == noun) for ids, noun in named])
    every, found = torch.arange(len(rows)), {}
    by_layer = attention.decoder_attention(model, to_tensor(scenes.pixels(rows, 64)), text)
    for layer, weights in enumerate(by_layer.values()):  # (R, H, L, P)
        chosen = weights[every, :, where + later]  # (R, H, P)
        found |= {(layer, head): attention.to_grid(heat) for head, heat in enumerate(chosen.unbind(dim=1))}
        found[layer, -1] = attention.to_grid(chosen.mean(dim=1))
    return found, torch.tensor([region.box for _, region in asked]), rows


maps, boxes, rows = noun_maps(Scenes(150, split="validation", seed=3))
layer, head = max(maps, key=lambda key: pointing_game(maps[key], boxes).value)
maps, boxes, rows = noun_maps(Scenes(150, split="test", seed=7))  # scenes that had no say in the choice
after, _, _ = noun_maps(Scenes(150, split="test", seed=7), later=1)

# %% tags=["nbval-ignore-output"]
name = f"layer {layer}, {'mean of heads' if head < 0 else f'head {head}'}"
points = pointing_game(maps[layer, head], boxes, images=rows)
Scores({f"{name}, as the noun is written": points,
        f"{name}, one word later": pointing_game(after[layer, head], boxes, images=rows)})

# %% tags=["check", "nbval-check-output"]
assert points.value > 2 * points.chance
print("chosen on validation scenes, and it still points on test scenes")

# %%
look_at = next(r for r in range(60, len(test)) if len(test.scene(r).objects) == 3 and not test.scene(r).background.texture)
image, caption = to_tensor(test.pixels([look_at], 64)), write(model, test, tokenizer, [look_at])[0]
text = tokenize(tokenizer, [caption], 56)
by_layer = attention.decoder_attention(model, image, text)
heads = list(by_layer.values())[layer][0]  # (H, L, P)
heat = heads.mean(dim=0) if head < 0 else heads[head]
heat = heat / heat.sum(dim=1, keepdim=True)  # of each token's attention to the patches, where does it go? (row 0 is empty)
frames = [*group_words(tokenizer, text.ids[0]), ("(end)", [text.length - 1])]
things = [region for region in test.regions(look_at) if region.kind in ("object", "phrase")]
drawing.attention_figure(
    test[look_at].image,
    [word for word, _ in frames],
    [attention.to_grid(heat[pieces].mean(dim=0)).numpy() for _, pieces in frames],
    [region.box for region in things],
    columns=6,
)

# %% [markdown]
# Before it says *heart* it looks at the heart, before *fish* at the fish. One word later the same head does not look there
# any more: what is said is said. This is the shift that is easily forgotten; whoever reads the map at the word's own place
# sees the look for the *next* word. Before words that name nothing (*of*, *above*, the end) this head looks at the empty
# edge. That does not mean that nobody looks at the relation, only that this head does not.
#
# All layers and heads of it, to play with:

# %% tags=["nbval-ignore-output"]
AttentionViewer.of(model, test[look_at].image, caption, tokenizer, things,
                   maps={f"layer {i}": weights[0] for i, weights in enumerate(by_layer.values())})

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Three ways to write
# At each place the model gives a probability to every word. What then?
#
# * **Greedy:** take the likeliest word.
# * **Beam search:** keep the three likeliest *texts* in play, and take the best one that ends. It finds texts that are
#   likelier as a whole, and safe: what is said of everything.
# * **Nucleus sampling:** draw a word, but only from the likeliest that together reach 90 %. Less safe, more varied. The
#   paper's captioner writes like this, and we will see why.
#
# How large is the nucleus? Where the model is sure, one word; where it hesitates, many.

# %%
sizes = nucleus(expected.log(), 0.9).isfinite().sum(dim=-1)  # (L,)
print("words in the nucleus:", ", ".join(f"{word} {n}" for word, n in zip(next_tokens, sizes.tolist(), strict=False)))

# %%
WAYS = {"greedy": DecodingConfig(), "3 beams": DecodingConfig(beams=3, min_length=4), "nucleus": DecodingConfig(top_p=0.9)}


def in_three_ways(rows):
    """Texts by way; nucleus sampling is drawn three times."""
    found = {name: write(model, test, tokenizer, rows, decoding=way) for name, way in WAYS.items() if name != "nucleus"}
    for draw in (1, 2, 3):
        random = torch.Generator().manual_seed(draw)
        found[f"nucleus, draw {draw}"] = write(model, test, tokenizer, rows, decoding=WAYS["nucleus"], generator=random)
    return found


pair = [look_at, shown[1]]
ways = in_three_ways(pair)
for place, r in enumerate(pair):
    marked = [proofread(texts[place], test.scene(r)) for texts in ways.values()]
    figure = drawing.caption_grid([test[r].image] * len(ways), [text for text, _ in marked], [gone for _, gone in marked], columns=5)
    for ax, way in zip(figure.axes, ways, strict=True):
        ax.set_title(way)
    display(figure)

# %% [markdown]
# Over 300 scenes: how true, and how varied? (Random drawing now and then takes a word that nobody would say.)

# %% tags=["nbval-ignore-output"]
three_hundred = range(300)
compared = {}
for way, decoding in WAYS.items():
    random = torch.Generator().manual_seed(0)
    texts = write(model, test, tokenizer, three_hundred, decoding=decoding, generator=random)
    true_ones = [tells_all(text, test.scene(r)) for text, r in zip(texts, three_hundred, strict=True)]
    opening = len({tuple(text.split()[:3]) for text in texts}) / len(texts)
    compared[f"{way}: says all, and only what is true"] = bootstrap(np.array(true_ones, dtype=float), 0.0)
    print(f"{way}: {len(set(texts)) / len(texts):.0%} different captions, {opening:.0%} different beginnings, "
          f"{np.mean([len(text.split()) for text in texts]):.1f} words")
Scores(compared)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Who shares what
# Text encoder and decoder are two stacks, but most of their parts are the *same* tensors. Counted from the model, not
# from the paper:

# %% tags=["nbval-check-output"]
def shared_share(some):
    """Of the decoder's numbers, by part: how many are there, and how many are also the encoder's."""
    readers = {id(p) for p in some.text.parameters()}
    counts = {}
    for name, p in some.decoder.named_parameters():
        part = next((part for part in ("self_", "cross_", "feed_", "embed") if part in name), "last norm")
        total, common = counts.get(part, (0, 0))
        counts[part] = total + p.numel(), common + p.numel() * (id(p) in readers)
    return counts


for part, (total, common) in shared_share(trained).items():
    print(f"{part:10} {total:8,} numbers, {'shared' if common == total else 'its own' if common == 0 else 'in part'}")

# %% tags=["nbval-check-output"]
sharing = {"nothing": (), "all but self-attention": CROSS_ATTENTION + THE_REST, "everything": SELF_ATTENTION + CROSS_ATTENTION + THE_REST}
for name, parts in sharing.items():
    some = BLIP(replace(BLIP.Config.nano(len(tokenizer)), shared=parts))
    print(f"{name:24} {sum(p.numel() for p in some.parameters()) / 1e6:.2f} M parameters")

# %% [markdown]
# The saving is real, but is it paid for in quality? The paper says no; sharing self-attention too is what hurts. Here, from
# the shared towers, 300 steps, three seeds (`python tools/experiments.py blip_sharing`):

# %%
drawing.bars_with_spread(by_variant("blip_sharing"), ["facts right", "facts wrong", "exact", "text to image R@1", "counterfactual: mean"])

# %% [markdown]
# *What we see.* As in the paper, sharing **everything** is worst: .56 to .58 of the facts are right, against .59 to .62 if
# self-attention is not shared. But here sharing **nothing** is best at writing, .62 to .68, and the models differ in
# little else: search and matching hardly notice. So half of the paper's sentence holds (self-attention should be the
# decoder's own); that the rest is shared for free does not. Why? A guess: after 300 steps there is no data to run out of
# and much to learn, and whoever shares must serve two masters with the same few steps. The published model trains for
# weeks and saves a third of its size.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## How good is it?
# As trained above, three seeds (`python tools/experiments.py blip_seeds`). Captions of scenes with one or two things,
# then search and the counterfactuals of lesson 03.

# %%
drawing.bars_with_spread(by_variant("blip_seeds"), [
    "a true caption", "facts right", "facts wrong", "objects right", "relations right", "text to image R@1", "counterfactual: mean"])

# %% [markdown]
# *What we see.* After two or three minutes, .93 to .94 of the things are named and three captions in four tell all and
# nothing wrong (.75). Word for word (`exact`) they are one of ours in .41 to .43, and could be in no more than .68: in the
# others a size is said, which nobody can know beforehand. Relations are what it errs in most.
#
# And look at the counterfactuals: .86 to .91, with .78 to .93 for turned relations. That is ALBEF's level (.91 to .92),
# reached with fusion in *every* text layer instead of on top.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Asking it.** Who can go on with a text can also answer: the question is the beginning of a text, the answer is how it
# goes on. The bundled BLIP was fine-tuned on questions for 500 steps and writes its answers; beside it lesson 02's ViLT,
# fine-tuned for 400, which *chooses* among all answers that it has seen (one seed each,
# `python tools/experiments.py answers`). The dashed line always says the commonest answer. (The paper reads the question
# with [ENC] first and lets the decoder look at that; ours only goes on with it.)

# %%
asked = by_variant("answers")
kinds = ["is there", "color", "how many", "relation", "what", "where", "mean", "mean, gray image"]
drawing.bars_with_spread({"BLIP, written": asked["BLIP"], "ViLT, chosen": asked["ViLT"]}, kinds)

# %% [markdown]
# *What we see.* BLIP knows what is there (.99) and in which color (.87), often *what* stands beside something (.53) and
# *where* (.69), and on yes-or-no questions about relations it is near chance (.58). ViLT has only colors and presence to
# offer; an answer such as "left of the small red heart" is one of a very long list for it, and words for BLIP. Of *how many*
# nothing can be learned here: nearly always it is one. And with a gray picture .35 and .39 are right all the same: so much is
# in the questions alone. Ranking a list of answers by their probability does what writing does (.78 against .77).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## CapFilt: mend what you learn from
#
# ```text
# web captions ∪ few good ones ─► pre-train ─┬─► fine-tune on the good ones: captioner ─► one new caption per picture ─┐
#                                            └─► fine-tune on the good ones: filter                                    │
#                                                             └─► keep what is true, old or new ◄──────────────────────┘
# what was kept ∪ good ones ─► pre-train a NEW model, from scratch
# ```
#
# First the "web". In our noisy data set four of ten captions are wrong, of three kinds: another picture's caption
# (*swapped*), one thing exchanged (*replaced*), and *junk*, as it stands beside pictures on web pages. And since we made
# the noise, we know which:

# %%
noisy = NoisyCaptions(Scenes(6000, split="train", seed=0, objects=(1, 2)), 0.4)
examples = [next(r for r in range(len(noisy)) if noisy.kind(r) == kind) for kind in ("clean", "swapped", "replaced", "junk")]
with drawing.style():
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.9), layout="constrained")
    for ax, r in zip(axes, examples, strict=True):
        ax.imshow(noisy[r].image), ax.axis("off")
        ax.set_title(noisy.kind(r), fontweight="bold")
        ax.text(0.5, -0.04, noisy.captions(r)[0], transform=ax.transAxes, ha="center", va="top", fontsize=8, wrap=True)
    plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# Now the two tools. `CapFilt` trains a model on the noisy captions and 600 good ones, fine-tunes it into captioner and
# filter, and keeps every stage in a folder. No part of it may have read a clean caption before, so it does not start from
# the shared towers but from an image tower that has learned from labels alone (`checkpoints/image_nano.md`), as the paper's
# starts from ImageNet. In profile `laptop` the real thing runs here (about five minutes; stop it whenever you like, it
# goes on where it was); in profile `quick` we read what such a run has left behind about the first 240 pictures.

# %%
if profile() == "quick":
    kept_lines = (RECORDS / "capfilt_captions.jsonl").read_text(encoding="utf-8").splitlines()
    table = [json.loads(line) for line in kept_lines]
else:
    start = {"init_from": "image_nano", "init_parts": ("image.",), "negative_captions": False}
    mending = replace(recipe, scenes=len(noisy), objects=(1, 2), steps=400, **start)
    run = CapFilt(
        lambda losses: replace(mending, config={"losses": losses}).build(BLIP, tokenizer),
        noisy, Scenes(600, split="train", seed=1000, objects=(1, 2)), tokenizer, RECORDS.parent / "runs" / "lesson05",
        pretrain=mending.settings(), finetune=mending.settings(steps=133, lr=mending.lr / 2), bar=False,
    )
    table = [line for line in run.table() if line["row"] < 240]
    table = [{**line, "cosine": cosine} for line, cosine in zip(table, run.scores(table, by_cosine), strict=True)]
print(f"{len(table)} captions of 240 pictures; the first two:", *table[:2], sep="\n")

# %% [markdown]
# **The board.** Each picture with its old and its new caption, what the filter thinks of them, and the truth. Sort by *worst
# mistakes*; look at the *replaced* ones; move the threshold and watch how precision is paid for with recall.

# %% tags=["nbval-ignore-output"]
FilterBoard.of(table, noisy, lambda row, text: tells_all(text, noisy.dataset.scene(row)))

# %% [markdown] slideshow={"slide_type": "subslide"}
# **How good is the filter?** Over all thresholds at once: how many of the true captions are kept (up), for how many of the
# false ones (to the right). The area under the curve (AUC) is how often a true caption scores above a false one. Two
# judges of the same model: matching (ITM), which lets the words look at the patches, and the cosine of the two vectors
# (ITC), which does not.

# %%
web = {}  # of each picture the first old caption: true ones have several wordings
for line in table:
    if line["source"] == "web":
        web.setdefault(line["row"], line)
web = list(web.values())
clean = np.array([noisy.is_clean(line["row"]) for line in web])
by_judge = {name: [line[key] for line in web] for name, key in {"matching (ITM)": "score", "cosine (ITC)": "cosine"}.items()}
quality = {name: filter_quality(scores, clean) for name, scores in by_judge.items()}
with drawing.style():
    figure, ax = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    ax.plot([0, 1], [0, 1], color=drawing.INK, ls=(0, (3, 2)), label="chance")
    for (name, scores), color, dash in zip(by_judge.items(), (drawing.BLUE, drawing.VERMILION), ("-", "-."), strict=True):
        ax.plot(*roc(scores, clean), dash, color=color, label=f"{name}: AUC {quality[name]['AUC'].value:.2f}")
    kept = np.array(by_judge["matching (ITM)"]) >= 0.5
    ax.plot(kept[~clean].mean(), kept[clean].mean(), "o", color=drawing.BLUE, ms=8, mec="white", label="threshold one half")
    ax.set(xlabel="false captions kept", ylabel="true captions kept", xlim=(-0.02, 1), ylim=(0, 1.02))
    ax.legend(loc="lower right")
    plt.show()

# %% [markdown]
# **Precision:** how many of those kept are true. **Recall:** how many of the true are kept. And which kind of noise slips
# through? Last, the captioner's own work: how many of the new captions are true, before and after the filter.

# %% tags=["nbval-ignore-output"]
kinds = np.array([noisy.kind(line["row"]) for line in web])
slips = {f"{kind}: kept": bootstrap(kept[kinds == kind].astype(float), kept.mean()) for kind in ("clean", "replaced", "swapped", "junk")}
new = [line for line in table if line["source"] == "synthetic"]
new_true = np.array([tells_all(line["caption"], noisy.dataset.scene(line["row"])) for line in new], dtype=float)
new_kept = np.array([line["kept"] for line in new])
Scores({name: quality["matching (ITM)"][name] for name in ("precision", "recall", "kept")} | slips
       | {"new captions: true": bootstrap(new_true, 0.0), "new captions kept: true": bootstrap(new_true[new_kept], new_true.mean())})

# %% tags=["check", "nbval-check-output"]
assert quality["matching (ITM)"]["AUC"].value > 0.85 and quality["matching (ITM)"]["precision"].value > clean.mean()
assert kept[kinds == "junk"].mean() < kept[kinds == "clean"].mean()
print("the filter tells true captions from false ones, and what it keeps is cleaner than the web")

# %% [markdown] slideshow={"slide_type": "subslide"}
# Over all 6,000 pictures, three seeds (`python tools/experiments.py blip_filter`); the captioner writes by nucleus sampling
# as in the paper, or by beam search.

# %%
drawing.bars_with_spread(by_variant("blip_filter"), [
    "AUC (itm)", "AUC (itc)", "precision", "recall", "kept", "new captions, true", "new captions kept, true"])

# %% [markdown]
# *What we see.* **The filter is good:** AUC .93 to .94 by matching and .98 by the cosine, which is surprising: the judge that
# never lets words look at patches is the better one. Most of our noise names wrong things, and for that a cosine is
# enough; it was also trained more thoroughly than matching, which begins late. At a threshold of one half, matching is
# strict: .96 of what it keeps is true, but it keeps only half of the true captions (recall .49 to .53). It has seen three
# negatives for each positive pair, which lowers its probabilities.
#
# **The captioner is not so good:** .35 of what it draws is true and whole, .50 by beam search; of what the filter keeps, .62
# and .63. As in the paper, drawn captions are the noisier ones.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Change one thing: does mending pay?
# That a filter works is nice; what counts is whether the **new model** is better for it. Trained anew (on the same image tower), as long as
# the first one, three seeds each (`python tools/experiments.py blip_capfilt`):
#
# * **neither:** on the web captions as they are, and the good ones;
# * **captioner only:** new captions are added, nothing is thrown out;
# * **filter only:** false web captions are thrown out, nothing is added;
# * **both:** that is BLIP; and once more with a captioner that writes by beam search.
#
# Before you look: what do you expect? Is it worse to learn from a false caption, or to have none?

# %%
mended = by_variant("blip_capfilt")
drawing.bars_with_spread(mended, ["facts right", "facts wrong", "text to image R@1", "image to text R@1", "counterfactual: object"])

# %% [markdown]
# *What we see.* **It pays, a little, and each half of it does.** Search: R@1 (text to image) .67 to .69 on the captions as
# they are, .69 to .72 with either tool or both. Another thing in the caption is noticed in .75 to .77, then in .80 to .82 with new captions,
# .83 to .87 with the filter, .81 to .84 with both. Facts told rightly: .43 to .44, .45 with new captions, .44 to .46 with the
# filter, .45 to .47 with both. So the order is the paper's, though what both together add to one of them is within the
# spread of the seeds.
#
# Is that not strange? Two thirds of the new captions are not wholly true, and still they help. But of these, half of what
# they say is right (2.1 facts right and 2.2 wrong in each), while false web captions have next to nothing right (0.4
# and 2.4). And the filter throws away half of the true web captions; it helps nevertheless. **Nucleus or beam:** no difference here beyond the spread.

# %% [markdown] slideshow={"slide_type": "subslide"}
# *Your turn:* the last step of the pipeline that you ran above; about two minutes. What it was trained on lies beside it:
# `captions.jsonl`, every caption with its score and its verdict, for a person to read.

# %% tags=["nbval-ignore-output"]
if profile() != "quick":
    simple = Scenes(400, split="validation", seed=5, objects=(1, 2))
    for name, some in {"web captions as they are": run.pretrained(), "mended": run.final()}.items():
        found = captions(some, simple, tokenizer)
        print(f"{name}: facts right {found['facts right'].value:.2f}, wrong {found['facts wrong'].value:.2f}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Traps
# Things that are easily done wrong when one builds a BLIP, or its data:
#
# * **One self-attention for both.** Shared self-attention makes reading and writing disturb each other.
# * **[CLS] for all three.** The first token must say what is to be done.
# * **No label smoothing.** Some ports leave it out; the losses then cannot be compared.
# * **Asking for the prompt.** Fine-tuned captioners begin all captions with "a picture of": these words are given, not
#   asked (`config.prefix_length`).
# * **Captioner and filter in one.** The filter must not find the captioner's own mistakes right: fine-tune them apart.
# * **Filtering the good captions**, or going on with the old model. The final model begins anew.

# %% [markdown] slideshow={"slide_type": "slide"}
# # Exercises
# Each has a check that says which property failed. Solutions are in the executed notebook.
#
# ## 1 · The nucleus *(medium, 20 minutes)*
# Keep only the likeliest words that together reach `p`, the one that crosses the line included; the logits of all others
# become `-inf`.
# *Hint:* sort, add up, and ask what the words *before* one have reached already. Then bring the answer back into the old
# order (`scatter`).

# %% tags=["exercise"]
def my_nucleus(logits, p):
    """logits (B, V). Returns (B, V): the same where a word may be drawn, -inf elsewhere."""
    ### BEGIN SOLUTION
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(outside, -torch.inf)
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_nucleus(my_nucleus)

# %% [markdown]
# ## 2 · The loss of writing *(medium, 20 minutes)*
# `logits[:, t]` speaks of the word at place `t + 1`. Ask for every real token but the first, the closing one too, and
# average over all words asked. A share `smoothing` of the target is spread evenly over all V words.
# *Hint:* shift by one, choose by the mask, and remember the loop above.

# %% tags=["exercise"]
def my_caption_loss(logits, ids, mask, smoothing):
    """logits (B, L, V), ids (B, L), mask (B, L) bool, True on real tokens. Returns a scalar."""
    ### BEGIN SOLUTION
    asked = mask[:, 1:]
    logprob = logits[:, :-1][asked].log_softmax(dim=-1)  # (M, V)
    chosen = logprob.gather(1, ids[:, 1:][asked][:, None])[:, 0]
    return -((1 - smoothing) * chosen + smoothing * logprob.mean(dim=-1)).mean()
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_caption_loss(my_caption_loss)

# %% [markdown]
# Yours is the library's, on the four pairs of the beginning:

# %% tags=["nbval-check-output", "needs-solution"]
with torch.no_grad():
    hidden = fresh.decode(four.text.with_first(special.dec), fresh.encode_image(four.images))
    mine = my_caption_loss(fresh.caption_head(hidden), four.text.ids, four.text.mask, 0.1)
print(torch.isclose(mine, by_library, atol=1e-4).item())

# %% [markdown]
# ## 3 · What is a filter worth? *(easy, 10 minutes)*
# A caption is kept if its score is *at least* the threshold. Precision: the share of the kept that are clean. Recall: the
# share of the clean that are kept. If nothing is kept, both are 0.

# %% tags=["exercise"]
def my_filter(scores, is_clean, threshold):
    """scores (N,), is_clean (N,) bool. Returns precision and recall, two numbers in 0..1."""
    ### BEGIN SOLUTION
    kept = scores >= threshold
    good = (kept & is_clean).sum()
    return float(good / kept.sum().clamp(min=1)), float(good / is_clean.sum().clamp(min=1))
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_filter(my_filter)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What the paper reported, and what we saw
# The paper's column is as we remember it; check the paper.
#
# | | the paper | here |
# |---|---|---|
# | data | 14 or 129 million pictures, most with captions from the web | 12,000 scenes made on the spot |
# | size | 224 M parameters (ViT-B) | 1.6 M |
# | start | ViT trained on ImageNet, BERT | towers trained on scenes with boxes; for CapFilt an image tower trained on labels |
# | share all but self-attention | as good as sharing nothing, with 224 M instead of 361 M; sharing self-attention too costs a point of retrieval | sharing all is worst; sharing nothing writes best |
# | captioner and filter | each helps, both together most: retrieval (text / image) 78.4 / 60.7 to 80.6 / 63.1, CIDEr 127.8 to 129.7 | each helps a little, both together hardly more than one |
# | nucleus or beam | nucleus: a quarter of the new captions is thrown out (beam: a fifth), and the final model is better | nucleus: .35 of the new captions are true and whole (beam .50); the final models are alike |
# | captioner and filter share weights | fewer captions are thrown out (8 %), and the results fall | not tried |
# | captions | COCO: CIDEr 133 .. 137, BLEU-4 .40 | the bundled model tells .78 of all facts rightly and .09 wrongly; .76 of its captions are true and whole |
# | how good the filter is | not measured: nobody knows which captions of the web are true | AUC, precision and recall, above |
#
# **Next:** X-VLM asks for the place: which part of the picture is it that a phrase speaks of?
