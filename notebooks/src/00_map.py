# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#     notebook_metadata_filter: kernelspec,jupytext,-all
#     cell_metadata_filter: tags,slideshow,-all
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 00 · The map
#
# A vision-language model is given a picture and a text and asked whether, where and how they belong together. This lesson
# shows the map of the family, the little world in which we train, and whether your machine is ready. Nothing is trained
# here; it takes a few minutes to read.

# %% tags=["setup"] slideshow={"slide_type": "skip"}
import random

import matplotlib.pyplot as plt

from minivlp import device
from minivlp.data.folders import Photos
from minivlp.data.noise import NoisyCaptions
from minivlp.data.scenes import Scenes
from minivlp.data.text import group_words, load_tokenizer, tokenize
from minivlp.lessons import world as exercise
from minivlp.visualize import drawing

# %% [markdown]
# ## Is the machine ready?
# A laptop is enough. If a line below says that something is missing, it also says what to do.

# %% tags=["nbval-ignore-output"]
print(device.report())

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Three parts, and where the work is done
# Every model of the family has three parts: an image encoder (**VE**), a text encoder (**TE**), and the place where the
# two meet, the modality interaction (**MI**). Kim et al. (2021, the ViLT paper) sorted the family by which of them is heavy.

# %%
drawing.taxonomy()

# %% [markdown] slideshow={"slide_type": "subslide"}
# Read it from left to right.
#
# * **VSE, CLIP:** the two meet only in a dot product. Each picture and each text is encoded once, and a million pairs cost
#   a million dot products: made for search. But no word ever looks at a patch.
# * **UNITER and its like:** a detector cuts the picture into regions first, and that takes most of the time.
# * **ViLT:** no detector, hardly an encoder: everything happens where the two meet. Every pair is a run of its own.
# * **ALBEF and its like:** towers that first agree (align), then layers that let words look at patches (fuse).
#
# Lesson 01 builds the second column and finds what it cannot do. The later lessons move to the right.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The world
# Web pictures come with captions that nobody has checked. So we draw our own world, and know the truth of every picture:
# what is in it, where, in which color, and what would be false to say.

# %%
scenes = Scenes(2000, split="train", seed=0)
drawing.show_scenes([scenes[row] for row in range(8)])

# %% [markdown] slideshow={"slide_type": "subslide"}
# From one scene comes all that a lesson may need, in English and in Chinese, true by construction.

# %% tags=["nbval-check-output"]
row = next(r for r in range(100) if len(scenes.scene(r).objects) == 2 and scenes.scene(r).objects[0].color)
scene = scenes.scene(row)
print("captions:")
for caption in scene.captions() + scene.captions("zh")[:1]:
    print("   ", caption)
print("one fact changed, now false:")
for kind, caption in scene.counterfactuals(random.Random(0)).items():
    print(f"    {kind:9} {caption}")
print("questions:")
for question, answer in scene.questions()[:4]:
    print(f"    {question} {answer}")

# %%
figure, ax = plt.subplots(figsize=(4, 4))
drawing.draw_boxes(ax, scenes[row].image, [r for r in scene.regions() if r.kind == "object"])
plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Boxes** are `(cx, cy, w, h)`, fractions of the picture's width and height, everywhere in minivlp. A **region** is a
# phrase with a box; its kind says how much of the phrase one must understand to find it.

# %% tags=["nbval-check-output"]
for region in scene.regions():
    print(f"{region.kind:9} {region.phrase:45}", " ".join(f"{value:.2f}" for value in region.box))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Training, validation, test
# Three splits share no set of things, so no caption of one can turn up in another. A fourth, `composition`, holds
# combinations that training never shows, such as a purple ring, though it shows purple things and rings.

# %% tags=["check", "nbval-check-output"]
worlds = [Scenes(400, split, seed=1) for split in ("train", "validation", "test", "composition")]
said = {world.split: {text for r in range(400) for text in world.captions(r)} for world in worlds}
names = list(said)
shared = {(a, b) for i, a in enumerate(names) for b in names[i + 1:] if said[a] & said[b]}
assert not shared
print("captions shared between splits: none,", "in about", round(sum(map(len, said.values())), -3), "captions")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Noise, with the truth kept
# Nobody knows how many captions on the web are wrong. We can make a world in which four in ten are, and still know which:
# what a filter throws out can then be counted.

# %%
noisy = NoisyCaptions(scenes, rate=0.4, seed=0)
wrong = [next(r for r in range(len(noisy)) if noisy.kind(r) == kind) for kind in ("swapped", "replaced", "junk")]
drawing.show_scenes([noisy[r] for r in wrong], columns=3)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## From text to numbers
# A model reads numbers (ids), not letters. Our tokenizer has only 1,200: every English word of the world is one token, a
# Chinese character of it too; all else falls to pieces, and nothing is ever unknown.

# %% tags=["nbval-check-output"]
tokenizer = load_tokenizer()
for text in ("a red heart left of a dog", "a flabbergasted wombat", "一只狗在一个红色爱心的左边"):
    tokens = tokenize(tokenizer, [text], max_tokens=56)
    print(f"{int(tokens.mask.sum()):3} tokens:", " | ".join(word for word, _ in group_words(tokenizer, tokens.ids[0])))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Real photographs
# Twelve open photographs come along, with captions and boxes. What trains on scenes trains on them, and on a folder of
# yours in any of the usual layouts: `docs/your_own_data.md` shows how.

# %%
photos = Photos()
drawing.show_scenes([photos[r] for r in (1, 2)], columns=2, boxes=True)

# %% [markdown] slideshow={"slide_type": "slide"}
# # Exercises
#
# ## 1 · Corners *(easy, 5 minutes)*
# Many files hold boxes as pixel corners. Turn `(x0, y0, x1, y1)` in a picture of `width` x `height` pixels into our fractions.

# %% tags=["exercise"]
def my_box(x0, y0, x1, y1, width, height):
    """Pixel corners -> (cx, cy, w, h) as fractions."""
    ### BEGIN SOLUTION
    return (x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_box(my_box)

# %% [markdown]
# ## 2 · Left of *(easy, 10 minutes)*
# When is one box left of another? In our world a relation is said only if nobody could argue: the centers must differ at
# least 1.25 times as much from left to right as from top to bottom (for above and below, the other way round).
# *Hint:* y grows downwards.

# %% tags=["exercise"]
def my_relation(one, other):
    """Boxes (cx, cy, w, h). Returns where `one` lies seen from `other`: "left", "right", "above", "below" or None."""
    ### BEGIN SOLUTION
    dx, dy = other[0] - one[0], other[1] - one[1]
    if abs(dx) >= 1.25 * abs(dy):
        return "left" if dx > 0 else "right"
    if abs(dy) >= 1.25 * abs(dx):
        return "above" if dy > 0 else "below"
    return None
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_relation(my_relation)

# %% [markdown]
# ## 3 · How many forward passes? *(easy, 10 minutes)*
# You want to rank `n` captions for each of `m` pictures. How often must the transformer run if every picture and every
# caption is encoded once (a dual encoder), and how often if every pair is a run of its own (a fusion model)?

# %% tags=["exercise"]
def my_cost(m, n):
    """Returns (runs of a dual encoder, runs of a fusion model)."""
    ### BEGIN SOLUTION
    return m + n, m * n
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_cost(my_cost)

# %% [markdown] slideshow={"slide_type": "slide"}
# **Next:** [01 · CLIP](01_clip.ipynb), two towers that meet in one space.
