# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#     notebook_metadata_filter: kernelspec,jupytext,-all
#     cell_metadata_filter: tags,slideshow,-all
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 02 · ViLT: one transformer for both
#
# **The question.** CLIP (lesson 01) turns a picture into one vector and a caption into another, and compares the two.
# No word ever looks at a patch, and on *left of* it is at chance. So words and picture must meet earlier. How early?
#
# Most models before ViLT let them meet in a transformer, but first they ran an object detector over the picture. The
# detector was slow, and it knew only its own list of things. ViLT (Kim, Son and Kim 2021) asks: do we need it? Do we
# need any image tower at all? A word becomes a vector by a look into a table. Let a patch become a vector just as
# cheaply, by **one matrix product**. Then let **one transformer** read words and patches together, from the first layer
# on.
#
# You will see where the computation goes, move words onto patches by hand, train such a model in a few minutes, and
# find out what it learns first, and what last.

# %% tags=["setup"] slideshow={"slide_type": "skip"}
import json
import math
from dataclasses import replace
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch.utils.flop_counter import FlopCounterMode

from minivlp.data.batch import Text, to_tensor
from minivlp.data.grammar import OBJECTS
from minivlp.data.scenes import Scenes
from minivlp.data.text import group_words, load_tokenizer, tokenize
from minivlp.data.tokenizer_training import pieces_tokenizer
from minivlp.device import profile
from minivlp.evaluation.cost import cost
from minivlp.evaluation.grounding import pointing_game
from minivlp.evaluation.matching import counterfactual, masked_words
from minivlp.evaluation.records import by_variant
from minivlp.evaluation.score import Scores
from minivlp.layers.attention import record_attention
from minivlp.lessons import vilt as exercise
from minivlp.models.albef import ALBEF
from minivlp.models.clip import CLIP
from minivlp.models.vilt import ViLT
from minivlp.objectives.alignment import cosine_cost, inner_words, ipot
from minivlp.papers import paper
from minivlp.training.checkpoint import bundled, load_model
from minivlp.training.loop import fit, overfit_one_batch
from minivlp.visualize import attention, drawing
from minivlp.visualize.widgets import AttentionViewer, LiveCurves

recipe = paper("vilt").recipe(profile())
tokenizer = load_tokenizer()
seeded = torch.manual_seed(0)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The idea
#
# ```text
#  [CLS] a red heart [SEP]     class token, 64 patches
#    │   │  │    │     │            │   │ │ │ │ ...
#    └───┴──┴────┴─────┴── one row ─┴───┴─┴─┴─┴
#                             ▼
#          one transformer: every token looks at every other
#    │             │                         │
#  [CLS]         words                    patches
#    ▼             ▼                         ▼
#   ITM           MLM                       WPA
#  does it     which word          can the words be moved
#  match?      is masked?          cheaply onto the patches?
# ```
#
# No image tower and no text tower: nothing is computed for the picture alone but one product per patch. Everything else
# happens where the two meet. Three questions are asked of the result: *matching* (ITM), *masked words* (MLM) and
# *word-patch alignment* (WPA). The last is new to us, and we shall do it by hand.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Where does the computation go?
# Every model of the family has three parts: the picture's own (**VE**, visual embedding), the text's own (**TE**), and
# the place where the two meet (**MI**, modality interaction; lesson 00 drew the map). We run the parts of three nano
# models on the same 64 pairs. Left: milliseconds here. Right: multiplications, which are the same on every machine.
# (Weights do not matter for this, so the models are fresh. X-VLM has ALBEF's parts.)

# %%
scenes = Scenes(recipe.scenes, split="train", seed=0, size=recipe.size, objects=recipe.objects)
images = to_tensor(scenes.pixels(range(64), 64))
text = tokenize(tokenizer, [scenes.captions(row)[0] for row in range(64)], 56)
clip, albef, vilt = (kind(kind.Config.nano(len(tokenizer))).eval() for kind in (CLIP, ALBEF, ViLT))
with torch.no_grad():  # outputs of the first two parts, inputs of the third
    clip_image, clip_text = clip.embed_images(images), clip.embed_texts(text)
    albef_image, albef_text = albef.encode_image(images), albef.encode_text(text)
    vilt_image = vilt.joint.embed_images(images)
first = slice(0, 1)  # matching reads the first token alone
parts = {
    "CLIP": (
        lambda: clip.embed_images(images),
        lambda: clip.embed_texts(text),
        lambda: clip.score(clip_image, clip_text),
    ),
    "ALBEF": (
        lambda: albef.encode_image(images),
        lambda: albef.encode_text(text),
        lambda: albef.match_head(albef.fuse(albef_text, text.mask, albef_image, rows=first)),
    ),
    "ViLT": (
        lambda: vilt.joint.embed_images(images),
        lambda: vilt.joint.embed_text(text),
        lambda: vilt.match_head(vilt.joint(vilt_image, text, first)),  # embeds the words once more
    ),
}


def milliseconds(run):
    """The best of five runs: whatever else the machine is doing can only add to it."""
    times = []
    for _ in range(5):
        start = perf_counter()
        run()
        times.append(1000 * (perf_counter() - start))
    return min(times)


def multiplications(run):
    """Millions of them, for one pair."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2 / 64 / 1e6


with torch.no_grad():
    measured = {
        unit: {name: [measure(run) for run in runs] for name, runs in parts.items()}
        for unit, measure in (("ms for 64 pairs", milliseconds), ("million multiplications for a pair", multiplications))
    }

# %%
with drawing.style():
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", sharey=True)
    kinds = {"VE": drawing.BLUE, "TE": drawing.ORANGE, "MI": drawing.GREEN}
    for ax, (unit, bars) in zip(axes, measured.items(), strict=True):
        for y, values in enumerate(bars.values()):
            for part, (kind, color) in enumerate(kinds.items()):
                start = sum(values[:part])
                ax.barh(y, values[part], left=start, color=color, height=0.6, label=kind if y == 0 else None)
                if values[part] > 0.08 * max(map(sum, bars.values())):
                    ink = "white" if kind == "VE" else "black"
                    ax.text(start + values[part] / 2, y, kind, ha="center", va="center", color=ink, fontsize=9)
        ax.set(title=unit, yticks=range(len(bars)), yticklabels=list(bars), ylim=(len(bars) - 0.5, -0.5))
    axes[1].legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1.12), borderaxespad=0)
    plt.show()

# %% tags=["check", "nbval-check-output"]
share = {name: values[2] / sum(values) for name, values in measured["million multiplications for a pair"].items()}
assert share["CLIP"] < 0.01 and 0.1 < share["ALBEF"] < 0.6 and share["ViLT"] > 0.9
print("where the two meet: CLIP spends next to nothing there, ALBEF a part, ViLT nearly everything")

# %% [markdown] slideshow={"slide_type": "subslide"}
# At this size one run of ViLT is about as much work as one of ALBEF; it is only done elsewhere. The paper's comparison
# was with models that have a detector: about 900 ms for a pair against about 15 *(as we remember it; check the paper)*.
#
# **The price** is that nothing can be computed ahead. CLIP keeps one vector for each picture and each caption. ViLT has
# no vector of a picture alone, so to compare a thousand pictures with a thousand captions is a million runs. Here we
# run twenty by twenty, and scale it up:

# %% tags=["nbval-ignore-output"]
test = Scenes(1500, split="test", seed=7)
by_clip, by_vilt = (cost(model, test, tokenizer).scaled(1000, 1000) for model in (clip, vilt))
print(f"CLIP: {by_clip.encodings:9,} towers run, {by_clip.seconds_once:5.1f} seconds")
print(f"ViLT: {by_vilt.pairs:9,} pairs run,  {by_vilt.seconds_pairs / 60:5.1f} minutes")

# %% [markdown]
# ViLT is made to answer about a pair, not to search. Lesson 03 shows a way to have both.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## One row of tokens
# This is what the transformer gets: three pairs of a batch. The text stands first, padded to the longest caption. Then
# come the picture's class token (`c`) and its 64 patches, row by row.

# %%
three = sorted(range(64), key=lambda row: int(text.mask[row].sum()))[::31]  # a short, a middling and a long caption
wide = 5  # a word is drawn as wide as five patches
with drawing.style():
    figure, ax = plt.subplots(figsize=(9, 2.7), layout="constrained")
    for line, row in enumerate(three):
        y, names = -1.6 * line, tokenizer.convert_ids_to_tokens(text.ids[row].tolist())
        for n, name in enumerate([*names, "c"]):
            real = n == len(names) or bool(text.mask[row, n])
            width = wide if n < len(names) else 1.5
            color = drawing.BLUE if n == len(names) else drawing.ORANGE
            ax.add_patch(Rectangle((n * wide, y), width * 0.94, 1, fc=color if real else "none", alpha=0.55, ec="none"))
            if not real:
                ax.add_patch(Rectangle((n * wide, y), width * 0.94, 1, fc="none", ec=drawing.INK, hatch="////", lw=0.4))
            else:
                ax.text(n * wide + 0.47 * width, y + 0.5, name, ha="center", va="center", fontsize=5.5, color="black")
        left = len(names) * wide + 1.6
        pixels = (images[row].permute(1, 2, 0) + 1) / 2  # (64, 64, 3)
        strip = pixels.unflatten(1, (8, 8)).unflatten(0, (8, 8)).permute(1, 0, 2, 3, 4).reshape(8, 512, 3)
        ax.imshow(strip, extent=(left, left + 64, y, y + 1), aspect="auto")
        ax.plot([left + n for n in range(65) for _ in range(3)], [y, y + 1, np.nan] * 65, color="white", lw=0.5)
    middle, end = len(names) * wide, left + 64
    for start, stop, name, color in ((0, middle, "text", drawing.ORANGE), (middle, end, "image", drawing.BLUE)):
        ax.plot([start, stop - 0.5], [1.35, 1.35], color=color, lw=2)
        ax.text((start + stop) / 2, 1.5, f"+ token type: {name}", ha="center", va="bottom", fontsize=9)
    ax.set(xlim=(-0.5, end + 0.5), ylim=(y - 0.2, 2.3), aspect="auto")
    ax.axis("off")
    plt.show()

# %% [markdown]
# Three things tell the tokens apart. **Position:** where in the sentence, where in the picture. **Token type:** a learned
# vector is added to all words, another to all patches. And the **attention mask**: hatched tokens are padding, and no token
# attends to them. Let us see whether that is true: a caption alone, and the same caption in a batch with longer ones.

# %% tags=["check", "nbval-check-output"]
trained = load_model(ViLT, bundled("vilt_nano"))
short = three[0]
padded = text[[short]]
alone = padded.trimmed()
unmasked = Text(padded.ids, torch.ones_like(padded.mask))
with torch.no_grad():
    by_itself, in_batch, with_padding = (trained.match(images[[short]], some) for some in (alone, padded, unmasked))
assert padded.length > alone.length and torch.allclose(by_itself, in_batch, atol=1e-5)
assert not torch.allclose(by_itself, with_padding, atol=1e-5)
print("masked padding changes nothing; padding that is attended to would")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Moving words onto patches
# Does a caption belong to a picture? One way to ask: **what does it cost to move its words onto the patches?** A word
# and a patch are near each other if their vectors point the same way: the cost of a move is one minus their cosine.
# Every word has the same share to give, every patch the same to take. The cheapest such plan is called *optimal
# transport*.
#
# A small example: three words, four patches.

# %%
said, shown = ["red", "heart", "dog"], ["heart", "heart", "dog", "ground"]
price = [[0.3, 0.4, 0.9, 0.8], [0.1, 0.2, 0.9, 0.9], [0.9, 0.8, 0.1, 0.7]]


def move(price, steps, beta=0.5):
    """A plan by inexact proximal steps (Xie et al. 2020), element by element."""
    n, m = len(price), len(price[0])
    plan, give = [[1.0] * m for _ in range(n)], [1 / n] * n
    for _ in range(steps):
        # stay near the plan so far, but prefer what is cheap
        step = [[plan[i][j] * math.exp(-price[i][j] / beta) for j in range(m)] for i in range(n)]
        # stretch the columns until every patch takes 1 / m, then the rows until every word gives 1 / n
        take = [1 / m / sum(give[i] * step[i][j] for i in range(n)) for j in range(m)]
        give = [1 / n / sum(step[i][j] * take[j] for j in range(m)) for i in range(n)]
        plan = [[give[i] * step[i][j] * take[j] for j in range(m)] for i in range(n)]
    return plan


plans = {steps: torch.tensor(move(price, steps)) for steps in (1, 5, 50)}
with drawing.style():
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.5), layout="constrained", sharey=True)
    for ax, (name, table) in zip(axes, {"cost": torch.tensor(price), **plans}.items(), strict=True):
        ax.imshow(table, cmap="cividis", vmin=0, vmax=1 if name == "cost" else 0.35)
        for (i, j), value in np.ndenumerate(table.numpy()):
            label = f"{value:.1f}" if name == "cost" else f"{100 * value:.0f} %"
            ink = "black" if value > (0.5 if name == "cost" else 0.17) else "white"
            ax.text(j, i, label, ha="center", va="center", color=ink, fontsize=8)
        ax.set(xticks=range(4), yticks=range(3), yticklabels=said)
        ax.set_xticklabels(shown, rotation=40, ha="right")
        ax.set_title("cost" if name == "cost" else f"plan, {name} step{'s' * (name > 1)}")
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    plt.show()

# %% [markdown]
# The first step is timid, and each goes on from the plan before. After fifty, *heart* lies on the hearts and *dog* on
# the dog. And the ground? Every patch takes its share, so somebody must go there: *red* most of all, as *heart* has
# better places, and what is left over of *dog*.

# %% tags=["nbval-check-output"]
for steps, plan in plans.items():
    cents = 100 * (plan * torch.tensor(price)).sum()
    print(f"{steps:2} steps: the move costs {cents:.0f} hundredths, heart to dog {100 * plan[1, 2]:.0f} %")

# %% [markdown]
# The library does it for a whole batch, with padding. Check that both agree:

# %% tags=["check", "nbval-check-output"]
everything = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
assert torch.allclose(ipot(torch.tensor(price)[None], *everything)[0], plans[50], atol=1e-5)
assert torch.allclose(plans[50].sum(dim=1), torch.full((3,), 1 / 3))
assert torch.allclose(plans[50].sum(dim=0), torch.full((4,), 1 / 4), atol=1e-3)
print("the loop and the library agree; words give a third each, patches take a quarter")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **As a loss (WPA):** the transport cost should be low for matching pairs and high for mismatched ones. The plan is taken
# as given; the gradient flows through the cost alone, and pulls words towards the patches on which they lie. Its weight
# is small, a tenth. Here is what the trained model makes of it, in a batch of 64 pairs, and with the pictures passed on
# by one:

# %% tags=["check", "nbval-check-output"]
with torch.no_grad():
    moves = {}
    for name, others in {"own picture": images, "another's": images.roll(1, dims=0)}.items():
        picture = trained.joint.embed_images(others)
        moves[name] = trained.alignment(trained.joint(picture, text), text.mask, picture.mask).distance  # (64,)
assert moves["own picture"].mean() < moves["another's"].mean() - 0.02
print("the way to one's own picture is cheaper")

# %% [markdown]
# And a plan is a map, from every word to all patches. The dashed boxes are the things. See who takes the ground: words
# that have no patch of their own. And the names often lie at the *edge* of their thing: patches know what is beside
# them.

# %%
look_at = next(r for r in range(60, len(test)) if len(test.scene(r).objects) == 2 and not test.scene(r).background.texture)
caption = test.captions(look_at)[0]
things = [region for region in test.regions(look_at) if region.kind in ("object", "phrase")]
picture, its_text = to_tensor(test.pixels([look_at], 64)), tokenize(tokenizer, [caption], 56)
spoken = group_words(tokenizer, its_text.ids[0])
with torch.no_grad():
    plan = attention.to_grid(trained.transport(picture, its_text)[0])  # (L, 8, 8)
drawing.attention_figure(
    test[look_at].image,
    [word for word, _ in spoken],
    [plan[pieces].mean(dim=0).numpy() for _, pieces in spoken],
    [region.box for region in things],
    columns=-(-(len(spoken) + 1) // 2),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Mask whole words
# Masked words are the other lesson that the picture gives: mask a word, and predict it. But a tokenizer breaks rare
# words to pieces, `gir ##af ##fe`. Mask one piece, and the other two give it away: no need to look at the picture. So
# ViLT masks all pieces of a word, or none.
#
# In our world every word is one token, so there is nothing to see. But we can make a tokenizer that breaks the names of
# objects. How often do the other pieces leave only one possible name?

# %% tags=["nbval-check-output"]
pieces = pieces_tokenizer()
names = {noun: pieces.tokenize(noun) for noun in OBJECTS}
print(" · ".join(" ".join(names[noun]) for noun in ("butterfly", "penguin", "sunflower", "dog", "frog")))
asked = [(noun, n) for noun, broken in names.items() for n in range(len(broken)) if len(broken) > 1]
rest = {(noun, n): (*names[noun][:n], "?", *names[noun][n + 1 :]) for noun, n in asked}
given_away = [question for question in rest.values() if list(rest.values()).count(question) == 1]
print(f"mask one piece of a name: in {100 * len(given_away) / len(asked):.0f} of 100 cases only one name is left")

# %% [markdown]
# Whether that matters in training is a question for *Change one thing*.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The model
# `minivlp/models/vilt.py`. The transformer is a plain ViT that finds words among its patches. The paper begins with one
# that was trained to classify pictures; ours takes its patch embedding, three of its four blocks and its words from the
# **shared towers** (`checkpoints/towers_nano.md`), which were trained with boxes. Lesson 06 shows why that helps.
#
# | | published | nano | why |
# |---|---|---|---|
# | blocks, width | 12, 768 | 4, 128 | minutes on a laptop |
# | patches | one product, 32 pixels wide | two small steps, 8 wide | as in all our nano models |
# | negatives for ITM | half of the texts get another picture | the same, and a negative caption each | see below |
# | `mask_rate` | .15 of the words | .4, of words that name something | short captions |
# | `losses` | ITM, MLM, WPA | the same | |
#
# The negative captions are made by rule, one fact changed, as in "a heart *right* of a dog". Without them most negatives
# are easy: other things. (That is not ViLT's idea, but NegCLIP's, Yuksekgonul et al. 2023.)

# %% tags=["nbval-check-output"]
model = recipe.build(ViLT, tokenizer)
modules = {"patches": model.joint.image_embed.patches, "words": model.joint.text_embed, "transformer": model.joint.blocks}
modules["MLM head"] = model.mlm_head
print({name: f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M" for name, module in modules.items()})

# %% [markdown] slideshow={"slide_type": "slide"}
# ## First, overfit one batch

# %% tags=["check", "nbval-check-output"]
few = replace(recipe, batch_size=8).batches(scenes, tokenizer)(0)
losses = overfit_one_batch(recipe.build(ViLT, tokenizer), few, steps=40)
assert losses[-1] < 0.35 * losses[0]
print("overfit: the sum of the three losses is far below where it began")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Now train
# What a blind guess costs: `mlm` begins near 7, the logarithm of the 1,200 words. A quarter of the pairs that `itm`
# asks about are right (24 of 96), and always to say "one in four" costs .56. `wpa` is near zero, and falls below it
# when the right pairs become the cheaper ones.
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
first, last = (sum(row["mlm"] for row in rows) / len(rows) for rows in (history.steps[:5], history.steps[-5:]))
assert last < 0.95 * first
print("masked words: the loss is falling")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## First words, then matching
# The bundled model was trained like yours, on more scenes and for more than twice as many steps. Here is its log. The
# dashed line is the blind guess of `itm`.

# %%
lines = bundled("vilt_nano").with_suffix(".log.jsonl").read_text(encoding="utf-8").splitlines()
log = [json.loads(line) for line in lines]  # every tenth step
figure = drawing.training_curves(log, ["mlm", "itm", "wpa"])
figure.axes[1].axhline(0.562, color=drawing.INK, ls=(0, (3, 2)))
figure

# %% tags=["check", "nbval-check-output"]
early, late = (
    {key: sum(row[key] for row in rows) / len(rows) for key in ("mlm", "itm")} for rows in (log[10:16], log[-10:])
)
assert early["mlm"] < 0.5 * log[0]["mlm"] and early["itm"] > 0.53 and late["itm"] < 0.42
print("when masked words have lost half of their loss, matching has hardly begun; it begins late")

# %% [markdown]
# Why in this order? Our reading: a masked word tells one token exactly what it should have been, and there are several
# in every caption. Matching says one bit about a whole pair. And before a word can be checked against the picture, it
# must have found its patch, in a stream where words and patches have never been brought together. Nothing is
# **aligned** here before it is **fused**. Keep that in mind for the next lesson.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Does it read the words?
# For each picture its true caption against one with a single fact changed. Chance is .5. CLIP's bars are lesson 01's;
# ViLT's three seeds are trained like yours (`python tools/experiments.py vilt_seeds`); same test scenes.

# %%
kinds = [f"counterfactual: {kind}" for kind in ("object", "color", "size", "count", "relation", "swap")]
drawing.bars_with_spread(
    {"CLIP nano": by_variant("clip_seeds")["CLIP nano"], "ViLT nano": by_variant("vilt_seeds")["ViLT nano"]}, kinds
)

# %% [markdown]
# *What we see:* in these few minutes ViLT learns which color is wrong, and begins to notice another size. Things,
# which CLIP knows well, it has hardly begun to check, and relations are at chance. The wall of lesson 01 still stands.
#
# And without the towers' start? Once, for 300 steps from scratch (`python tools/experiments.py from_scratch`): matching
# is at chance for every kind (mean .50), masked words are right in .32 with the right picture and .17 with a wrong one. The
# head start is what the paper has from ImageNet; a few minutes are no substitute.

# %% [markdown] slideshow={"slide_type": "subslide"}
# The same for your model; in profile `quick` it is the bundled one, which had more time.

# %% tags=["nbval-ignore-output"]
model = trained if profile() == "quick" else model.cpu()
asked_scenes = Scenes(400, split="test", seed=7)
found = counterfactual(model, asked_scenes, tokenizer)
found

# %% [markdown]
# **Masked words.** One word that names something is masked in each caption. With the right picture, a wrong one, and
# none (a gray one): what is right without the picture was guessed from the sentence.

# %% tags=["nbval-ignore-output"]
filled = masked_words(model, asked_scenes, tokenizer)
filled

# %% tags=["check", "nbval-check-output"]
assert found["color"].value > 0.7 and filled["right image"].value > filled["wrong image"].value + 0.2
assert abs(found["relation"].value + found["swap"].value - 1) < 0.3
print("it fills in words by looking, and knows a wrong color; who stands where is still close to chance")

# %% [markdown]
# So the words *do* look at the patches now. But a few minutes of one stream do not bring it to relations, the very
# thing that we came for. More steps would help: in the bundled model, things and counts have come with twice the time.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Where do the words look?
# Words and patches stand in one row, so a word's row of the attention holds both. We cut out what it gives to patches.
# There are many ways to ask. Which one should we believe?
#
# * **attention** of one layer (heads averaged);
# * **rollout**: attention followed through all layers (lesson 01);
# * **Grad-CAM of the match**: attention, weighted by how much it speaks for *these two belong together*;
# * **Grad-CAM of the word**: mask the word, and weight by how much it speaks for *this word was here*;
# * the **transport plan** of WPA.

# %%
def maps_of(images, text, where):
    """Maps by name, (R, rows, columns) each: what token where[r] of text r attends to in picture r."""
    names, every = [f"joint.{layer}.self" for layer in range(model.config.image.layers)], torch.arange(len(where))
    ids = text.ids.clone()
    ids[every, where] = tokenizer.mask_token_id
    masked = text.with_ids(ids)

    def cut(weights):
        return attention.joint_map(weights, text.length)[every, where]  # (R, P)

    def match():
        return model.match_head(model.cross_encode(images, text))[:, 1]

    def word():
        return model.mlm_logits(images, masked)[every, where, text.ids[every, where]]

    with torch.no_grad(), record_attention(model) as weights:
        model.match(images, text)
        plan = model.transport(images, text)[every, where]
    of_match, of_word = attention.grad_cam(model, match, names), attention.grad_cam(model, word, names)
    found = {f"attention, layer {n}": cut(weights[name]) for n, name in enumerate(names)}
    found["rollout"] = cut(attention.rollout([weights[name] for name in names]))
    found |= {f"Grad-CAM of the match, layer {n}": cut(of_match[name]) for n, name in enumerate(names)}
    found |= {f"Grad-CAM of the word, layer {n}": cut(of_word[name]) for n, name in enumerate(names)}
    return {name: attention.to_grid(heat + 1e-9) for name, heat in (found | {"transport plan": plan}).items()}


def of_things(scenes):
    """`maps_of` the word that names a thing, for all things of these scenes; their boxes; their rows."""
    asked = [(row, region) for row in range(len(scenes)) for region in scenes.regions(row) if region.kind == "object"]
    rows, nouns = [row for row, _ in asked], [region.phrase.split()[-1] for _, region in asked]
    text = tokenize(tokenizer, [scenes.captions(row)[0] for row in rows], 56)
    named = zip(text.ids, nouns, strict=True)
    where = [next(p[-1] for w, p in group_words(tokenizer, ids) if w == noun) for ids, noun in named]
    maps = maps_of(to_tensor(scenes.pixels(rows, 64)), text, torch.tensor(where))
    return maps, torch.tensor([region.box for _, region in asked]), rows


# %% [markdown]
# The **pointing game** decides: how often does the strongest patch for a thing's word lie in the thing's box? The layer
# is chosen on *validation* scenes; what is shown is measured on test scenes.

# %% tags=["nbval-ignore-output"]
maps, boxes, rows = of_things(Scenes(100, split="validation", seed=3))
tried = {name: pointing_game(heat, boxes, images=rows).value for name, heat in maps.items()}
ways = ("attention", "rollout", "Grad-CAM of the match", "Grad-CAM of the word", "transport plan")
best = [max((name for name in tried if name.startswith(way)), key=tried.get) for way in ways]
maps, boxes, rows = of_things(Scenes(100, split="test", seed=7))  # scenes that had no say in the choice
points = Scores({name: pointing_game(maps[name], boxes, images=rows) for name in best})
points

# %% tags=["check", "nbval-check-output"]
chosen = next(name for name in best if name.startswith("Grad-CAM of the word"))
assert points[chosen].value > 0.5
print("chosen on validation scenes, and it still points on test scenes")

# %% [markdown]
# Rollout and Grad-CAM of the word point best; the plan is the roughest, as expected. Which to trust? Play with the
# viewer below: rollout's maps hardly differ from word to word, they show *things* rather than *this* thing, and only
# their peaks move. Grad-CAM of the word tells one word from another. So here we trust that one.

# %% [markdown] slideshow={"slide_type": "subslide"}
# The same caption as above, by Grad-CAM of the word. Each word is masked and predicted in turn.

# %%
length = its_text.length
each = torch.zeros(length, dtype=torch.long)  # the same picture and caption for each token
by_token = maps_of(picture[each], its_text[each], torch.arange(length))  # (L, 8, 8) by name
drawing.attention_figure(
    test[look_at].image,
    [word for word, _ in spoken],
    [by_token[chosen][pieces].mean(dim=0).numpy() for _, pieces in spoken],
    [region.box for region in things],
    columns=-(-(len(spoken) + 1) // 2),
)

# %% [markdown] slideshow={"slide_type": "subslide"}
# To play with: point at a word, click a patch, and choose among the five ways.

# %% tags=["nbval-ignore-output"]
ways_of = {name: by_token[name].flatten(1) for name in best}
AttentionViewer.of(model, test[look_at].image, caption, tokenizer, things, maps=ways_of)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Change one thing
# **Word-patch alignment.** The same training without WPA, three seeds each
# (`python tools/experiments.py vilt_ablation`).

# %%
with_and_without = by_variant("vilt_ablation") | {"+ WPA": by_variant("vilt_seeds")["ViLT nano"]}
measures = [f"counterfactual: {kind}" for kind in ("object", "color", "relation", "swap")]
drawing.bars_with_spread(with_and_without, [*measures, "masked word: right image"])

# %% [markdown]
# *What we see:* no difference beyond the spread of the seeds. Moving words to patches is asked for with a tenth of the
# weight, and begins to tell pairs apart only when matching does (see the log above). As we remember the paper, it gains
# little there, too.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Whole words.** With the tokenizer that breaks names: mask whole words, or single pieces? Masked words alone, three
# seeds each (200 steps, `python tools/experiments.py vilt_words`). All pieces of the word are masked when we ask.

# %%
drawing.bars_with_spread(by_variant("vilt_words"), [f"masked word: {name} image" for name in ("right", "wrong", "no")])

# %% [markdown]
# *What we see:* .22 to .26 are right with whole words, .18 to .26 with single pieces: on average a little better, but
# the seeds lie further apart than the two ways. So the paper's gain does not show here. 200 steps are short, and all
# the names' pieces are new to the model; a longer run might tell. (Without the picture, both guess .04 to .09.)

# %% [markdown] slideshow={"slide_type": "subslide"}
# *Your turn:* matching begins late. Does it begin earlier if nothing else is asked? About two minutes for 200 steps.
# Other things worth a run: `negative_captions=False`, or another `lr`.

# %% tags=["nbval-ignore-output"]
mine = replace(recipe, config=recipe.config | {"losses": ("itm",)})
if profile() != "quick":
    other = mine.build(ViLT, tokenizer)
    fit(other, mine.batches(scenes, tokenizer), mine.settings(steps=200))
    print(counterfactual(other.cpu(), Scenes(400, split="validation", seed=5), tokenizer))

# %% [markdown] slideshow={"slide_type": "slide"}
# # Exercises
# Each has a check that says which property failed. Solutions are in the executed notebook.
#
# ## 1 · Whole words *(easy, 15 minutes)*
# Which tokens are to be masked? Every word with probability `rate`, all of its pieces or none.
# *Hint:* draw one number per word of each row; `draws.gather(1, word)` lets every token look up its word's.

# %% tags=["exercise"]
def my_choice(word, maskable, rate):
    """word (B, L): the index of each token's word, from 0; maskable (B, L) bool: False on [CLS], [SEP] and padding.

    Returns (B, L) bool, True on what is to be masked.
    """
    ### BEGIN SOLUTION
    draws = torch.rand(word.shape)  # as many numbers as tokens are enough for the words
    return (draws.gather(1, word) < rate) & maskable
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_whole_words(my_choice)

# %% [markdown]
# ## 2 · The plan, without loops over words and patches *(medium, 20 minutes)*
# Write `move` from above with tensors: only the loop over the steps is left.

# %% tags=["exercise"]
def my_plan(cost, beta, outer):
    """cost (L, P). Returns the plan (L, P) after `outer` steps: rows sum to 1 / L, columns nearly to 1 / P."""
    ### BEGIN SOLUTION
    (length, patches), plan = cost.shape, torch.ones_like(cost)
    give = torch.full((length, 1), 1 / length)
    for _ in range(outer):
        step = plan * torch.exp(-cost / beta)
        take = 1 / patches / (give * step).sum(dim=0, keepdim=True)  # (1, P)
        give = 1 / length / (step * take).sum(dim=1, keepdim=True)  # (L, 1)
        plan = give * step * take
    return plan
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_plan(my_plan)

# %% [markdown]
# Yours does what the model does. Try it on the words and patches of a picture (without `[CLS]`, `[SEP]` and class
# token):

# %% tags=["check", "nbval-check-output", "needs-solution"]
with torch.no_grad():
    fused = trained.cross_encode(picture, its_text)
    real = cosine_cost(fused[:, 1 : length - 1], fused[:, length + 1 :])[0]  # (words, 64)
    theirs = trained.transport(picture, its_text)[0][inner_words(its_text.mask)[0]]
print("the model's own plan:", torch.allclose(my_plan(real, 0.5, 50), theirs, atol=1e-5))

# %% [markdown]
# ## 3 · One row *(easy, 10 minutes)*
# Put words and patches into one sequence, text first. Every token gets its token-type embedding. And which tokens may be
# attended to?

# %% tags=["exercise"]
def my_sequence(text, text_mask, image, image_mask, token_type):
    """text (B, L, D), text_mask (B, L); image (B, 1+P, D), image_mask (B, 1+P); token_type (2, D), row 0 for text.

    Returns the sequence (B, N, D) and its mask (B, N), True on what may be attended to.
    """
    ### BEGIN SOLUTION
    sequence = torch.cat([text + token_type[0], image + token_type[1]], dim=1)
    return sequence, torch.cat([text_mask, image_mask], dim=1)
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_sequence(my_sequence)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What the paper reported, and what we saw
# The paper's column is as we remember it; check the paper.
#
# | | the paper | here |
# |---|---|---|
# | data | 4 million pictures, 10 million captions | 12,000 scenes made on the spot |
# | size | 87 M parameters | 1.2 M |
# | start | a ViT trained on ImageNet | towers trained on scenes with boxes |
# | speed | about 15 ms for a pair, 900 with a detector | nearly all work is done where the two meet |
# | search | Flickr30k R@1 64.4 (text to image), 83.5 (image to text), fine-tuned | not tried: a million runs |
# | reasoning over two pictures | NLVR2 75.7 (dev), 76.1 (test) | who stands where: close to chance in a few minutes |
# | more steps | better with each doubling | the same: matching begins late |
# | whole words | help | *Change one thing* |
#
# **Next:** ViLT must learn everything at once, in one stream. ALBEF keeps two towers, brings them together *first*, and
# lets the words look *then*.
