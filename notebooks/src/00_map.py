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
# A **vision-language model** reads a picture and a text together. It may search, answer a question, find an object or
# write a caption. This lesson introduces the parts of such models, the models of this course, the tasks, and the small
# world of drawn scenes in which we train.
#
# **Goals.** After this lesson you can say what a patch, a token, a head and cross-attention are; place a model on the map;
# name the usual tasks with their metrics; and read one of our scenes.
#
# **Prerequisites.** Python, and some PyTorch: tensors, `nn.Module`, a training loop. No knowledge of transformers.
#
# **Time.** 30 minutes to read, 25 minutes for the exercises. Nothing is trained here.

# %% tags=["setup"] slideshow={"slide_type": "skip"}
import random

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from minivlp import device
from minivlp.data.folders import Photos
from minivlp.data.noise import NoisyCaptions
from minivlp.data.scenes import Scenes
from minivlp.data.text import group_words, load_tokenizer, tokenize
from minivlp.lessons import world as exercise
from minivlp.papers import paper
from minivlp.visualize import drawing

# %% [markdown]
# ## Is the machine ready?
# A laptop is enough. If a line below says that something is missing, it also says what to do.
# All paths and times in this course are for two CPU cores; a GPU is used if there is one.

# %% tags=["nbval-ignore-output"]
print(device.report())

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The world
# Captions from the web are often wrong, and we cannot check them all. So we draw our own pictures. Of each we know which
# objects it shows, where, in which color, and which statements about it are false.

# %%
scenes = Scenes(2000, split="train", seed=0)
drawing.show_scenes([scenes[row] for row in range(8)])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A transformer in ten minutes
# All models of this course are **transformers** ([Vaswani et al. 2017](https://arxiv.org/abs/1706.03762)). A transformer
# reads a sequence of vectors, called **tokens**, and returns as many vectors.
#
# * A **text** becomes tokens by a table: one vector for each word or piece of a word.
# * A **picture** becomes tokens by cutting it into square **patches**; each patch, a list of pixel values, is multiplied
#   by a matrix to give its vector. This is the **vision transformer**, or ViT
#   ([Dosovitskiy et al. 2020](https://arxiv.org/abs/2010.11929)).
# * A **position embedding** is added to each token, since the order would be lost otherwise.
# * One more token is put in front, the same for every input: the **class token**, `[CLS]`. It stands for no word or patch.
#   Its output serves as the vector of the whole picture or text.

# %%
pixels = scenes[3].image  # (64, 64, 3), values 0 to 255
patches = pixels.reshape(8, 8, 8, 8, 3).swapaxes(1, 2).reshape(64, 8, 8, 3)  # row by row
with drawing.style():
    figure = plt.figure(figsize=(6, 3), layout="constrained")
    left, right = figure.subfigures(1, 2)
    whole = left.subplots()
    whole.imshow(pixels), whole.axis("off"), whole.set_title("64 x 64 pixels")
    for patch, ax in zip(patches, right.subplots(8, 8).flat, strict=True):
        ax.imshow(patch), ax.axis("off")
    right.suptitle("64 patches of 8 x 8 pixels", fontsize=10)
    plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Attention** lets tokens exchange information. Each token is multiplied by three matrices, which gives its **query**
# $q$, its **key** $k$ and its **value** $v$, of width $d$. A token's query is compared with all keys; the softmax of these
# products says how much of each value it receives:
#
# $$\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt{d}}\right) V$$
#
# * **Self-attention:** queries, keys and values come from the same sequence.
# * **Cross-attention:** queries come from one sequence (the words), keys and values from another (the patches). This is
#   how a word receives information from patches.
# * **Heads:** the width is divided into several equal parts, and each part does this on its own.
# * **Attention mask:** tokens that must not be attended to, such as padding, get weight 0.
#
# A **block** is attention followed by a small two-layer network (the **feed-forward layer**), each with a **residual
# connection** (its input is added to its output) and a **LayerNorm** (each vector is brought to mean 0 and variance 1). A
# transformer is a stack of such blocks. Here is cross-attention from 3 words to 5 patches, by hand and by PyTorch:

# %% tags=["check", "nbval-check-output"]
draw = torch.Generator().manual_seed(0)
word_vectors, patch_vectors = torch.randn(3, 8, generator=draw), torch.randn(5, 8, generator=draw)
to_query, to_key, to_value = torch.randn(3, 8, 8, generator=draw) / 8**0.5
query, key, value = word_vectors @ to_query, patch_vectors @ to_key, patch_vectors @ to_value  # (3, 8), (5, 8), (5, 8)
weights = (query @ key.T / 8**0.5).softmax(dim=1)  # (3, 5): for each word, how much it takes from each patch
by_hand = weights @ value  # (3, 8)
by_torch = F.scaled_dot_product_attention(query[None, None], key[None, None], value[None, None])[0, 0]
assert torch.allclose(by_hand, by_torch, atol=1e-5)
print("weights of the first word, in percent:", (100 * weights[0]).round().int().tolist())

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Three parts of every model
# A vision-language model has an image encoder (**VE**, visual embedding), a text encoder (**TE**, textual embedding), and
# a part that combines the two, the **modality interaction** (**MI**). An encoder that works on one modality alone is also
# called a **tower**. The ViLT paper ([Kim et al. 2021](https://arxiv.org/abs/2102.03334), figure 2) sorts models by which
# part is largest. Heights in the figure show which part is larger; they are not measurements.

# %%
drawing.taxonomy()

# %% [markdown] slideshow={"slide_type": "subslide"}
# From left to right:
#
# * **VSE, CLIP:** a **dual encoder**. Each picture and each text is encoded once, and a pair is compared by a dot product.
#   So search needs little computation. No word attends to any patch.
# * **UNITER:** an object detector finds regions first, which takes most of the time; then one transformer reads words and
#   regions.
# * **ViLT:** a **single stream**. There is no detector and no tower; one transformer reads words and patches together.
#   Every pair of a picture and a text needs its own forward pass.
# * **ALBEF:** two towers, whose outputs are first brought into one space (**aligned**), and then layers with
#   cross-attention, in which words attend to patches (**fused**).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The models of this course
# The months are those of the first version on arXiv. Filled: a lesson of this course builds and trains the model. Hollow:
# known models that are named in the course but have no lesson yet.

# %%
TWO, ONE, FUSE, WRITE = "dual encoder", "single stream", "towers, then fusion", "writes text"
color_of = {TWO: drawing.BLUE, ONE: drawing.GREEN, FUSE: drawing.PURPLE, WRITE: drawing.VERMILION}
timeline = [  # name, year and month, kind, our name of the paper if there is a lesson
    ("ViLT", 2021, 2, ONE, "vilt"),
    ("CLIP", 2021, 3, TWO, "clip"),
    ("ALBEF", 2021, 7, FUSE, "albef"),
    ("VLMo", 2021, 11, ONE, "vlmo"),
    ("X-VLM", 2021, 11, FUSE, "xvlm"),
    ("BLIP", 2022, 1, WRITE, "blip"),
    ("CoCa", 2022, 5, WRITE, None),
    ("GIT", 2022, 5, WRITE, None),
    ("BEiT-3", 2022, 8, ONE, None),
]
with drawing.style():
    figure, ax = plt.subplots(figsize=(9, 2.9), layout="constrained")
    rows = {kind: -n for n, kind in enumerate(color_of)}
    for name, year, month, kind, ours in timeline:
        x, y = year + (month - 0.5) / 12, rows[kind]
        ax.scatter(x, y, s=130, color=color_of[kind] if ours else "white", edgecolors=color_of[kind], lw=2, zorder=3)
        below = name == "GIT"  # same month and row as CoCa
        label = f"{name}, lesson {paper(ours).lesson}" if ours else name
        ax.annotate(label, (x, y), (0, -20 if below else 12), textcoords="offset points", ha="center")
    ax.set(xlim=(2020.85, 2022.85), ylim=(-3.7, 0.7), yticks=list(rows.values()), yticklabels=list(rows))
    ax.set_xticks([2021 + quarter / 4 for quarter in range(8)])
    ax.set_xticklabels([f"{month} {year}" for year in (2021, 2022) for month in ("Jan", "Apr", "Jul", "Oct")])
    plt.show()

# %% [markdown] slideshow={"slide_type": "subslide"}
# | model | paper | its main idea |
# |---|---|---|
# | CLIP | [Radford et al. 2021](https://arxiv.org/abs/2103.00020) | contrast of all pictures and captions of a batch |
# | ViLT | [Kim et al. 2021](https://arxiv.org/abs/2102.03334) | one transformer for patches and words, no detector |
# | ALBEF | [Li et al. 2021](https://arxiv.org/abs/2107.07651) | align the towers before fusing; a momentum model |
# | VLMo | [Bao et al. 2021](https://arxiv.org/abs/2111.02358) | one transformer with a feed-forward expert for each modality |
# | X-VLM | [Zeng et al. 2021](https://arxiv.org/abs/2111.08276) | align phrases with boxes |
# | BLIP | [Li et al. 2022](https://arxiv.org/abs/2201.12086) | write captions, and filter noisy ones |
# | CoCa | [Yu et al. 2022](https://arxiv.org/abs/2205.01917) | contrast and captioning in one pass |
# | GIT | [Wang et al. 2022](https://arxiv.org/abs/2205.14100) | one decoder that reads the image and writes |
# | BEiT-3 | [Wang et al. 2022](https://arxiv.org/abs/2208.10442) | images, texts and pairs by one task, masked prediction |

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Tasks and metrics
#
# | task | input, output | metric | usual data | here |
# |---|---|---|---|---|
# | **retrieval** | a caption, the pictures ranked; and the reverse | R@k: share whose partner is among the first k | COCO, Flickr30k | lessons CLIP, ALBEF |
# | **zero-shot classification** | a picture, one of C class names | accuracy | ImageNet | lesson CLIP |
# | **VQA, open** | a picture and a question, an answer in words | accuracy against the answers of people | VQA v2 | lesson BLIP |
# | **VQA, closed** | the same, an answer from a fixed list | accuracy | VQA v2, most frequent answers | scenes |
# | **visual entailment** | a picture and a statement: true, false or undecided | accuracy, chance 1/3 | SNLI-VE | lesson BLIP |
# | **NLVR2** | two pictures and a statement: true or false | accuracy, chance 1/2 | NLVR2 | no lesson yet |
# | **grounding** | a picture and a phrase, a box | share of boxes with IoU of at least .5 | RefCOCO+ | lesson X-VLM |
# | **captioning** | a picture, a caption | CIDEr, BLEU-4: overlap of phrases with captions by people | COCO | lesson BLIP |
# | **counterfactuals** | a picture, a true caption and one with a fact changed | accuracy, chance 1/2 | Winoground, ARO | all lessons |
#
# **IoU**, intersection over union: the area that two boxes share, divided by the area that they cover together.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What a scene knows

# %% [markdown] slideshow={"slide_type": "subslide"}
# Captions, false captions, questions with answers, phrases and boxes of a scene all come from one description of it, in
# English and in Chinese.

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
# **Boxes** are `(cx, cy, w, h)` everywhere in minivlp: center, width and height, as fractions of the picture's width and
# height. A **region** is a phrase with a box. Its kind says what the phrase names: an object alone (`object`), an object
# with its attributes (`phrase`), an object by its relation to another (`relation`), or the whole picture (`image`).

# %% tags=["nbval-check-output"]
for region in scene.regions():
    print(f"{region.kind:9} {region.phrase:45}", " ".join(f"{value:.2f}" for value in region.box))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Training, validation, test
# No set of objects occurs in two of the three splits, so no caption of one occurs in another. A fourth split,
# `composition`, holds combinations that training never shows: purple rings, for example, while training shows other
# purple objects and rings of other colors.

# %% tags=["check", "nbval-check-output"]
worlds = [Scenes(400, split, seed=1) for split in ("train", "validation", "test", "composition")]
captions_of = {world.split: {text for r in range(400) for text in world.captions(r)} for world in worlds}
names = list(captions_of)
shared = {(a, b) for i, a in enumerate(names) for b in names[i + 1:] if captions_of[a] & captions_of[b]}
assert not shared
print("captions shared between splits: none, of about", round(sum(map(len, captions_of.values())), -3))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Noise, with the truth kept
# How many captions on the web are wrong is not known. In our world we can make four of ten wrong and still know which
# ones, so we can count how many of them a filter removes.

# %%
noisy = NoisyCaptions(scenes, rate=0.4, seed=0)
wrong = [next(r for r in range(len(noisy)) if noisy.kind(r) == kind) for kind in ("swapped", "replaced", "junk")]
drawing.show_scenes([noisy[r] for r in wrong], columns=3)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## From text to numbers
# A **tokenizer** splits a text into tokens and gives each a number, its id. Ours knows 1,200 tokens. Each English word
# that occurs in our captions is one token, and so is each Chinese character. Other words are split into pieces, down to
# single letters. The count includes `[CLS]` in front and the end mark `[SEP]`, which are not shown.

# %% tags=["nbval-check-output"]
tokenizer = load_tokenizer()
for text in ("a red heart left of a dog", "a flabbergasted wombat", "一只狗在一个红色爱心的左边"):
    tokens = tokenize(tokenizer, [text], max_tokens=56)  # longer texts are cut
    print(f"{int(tokens.mask.sum()):3} tokens:", " | ".join(word for word, _ in group_words(tokenizer, tokens.ids[0])))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Real photographs
# Twelve openly licensed photographs with captions and boxes are part of minivlp. Every model that trains on scenes can
# train on them, or on a folder of your own: `docs/your_own_data.md` shows how.

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
# When is one box left of another? Our captions name a relation only if it is clear. For *left* and *right*, the centers
# must differ at least 1.25 times as much across as down; for *above* and *below*, at least 1.25 times as much down as
# across. *Hint:* y grows downward.

# %% tags=["exercise"]
def my_relation(one, other):
    """Boxes (cx, cy, w, h). Returns where `one` lies relative to `other`: "left", "right", "above", "below" or None."""
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
# You want to rank `n` captions for each of `m` pictures. How many forward passes does a dual encoder need, which encodes
# every picture and every caption once? How many does a model need that runs once for every pair?

# %% tags=["exercise"]
def my_cost(m, n):
    """Returns (runs of a dual encoder, runs of a fusion model)."""
    ### BEGIN SOLUTION
    return m + n, m * n
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_cost(my_cost)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Recap
# * A transformer reads tokens: words, patches and a class token. Self-attention works within one sequence, cross-attention
#   between two.
# * Models differ in where picture and text are combined: in a dot product, in one joint transformer, or in fusion layers on
#   top of two towers.
# * A dual encoder needs $m + n$ forward passes for $m$ pictures and $n$ captions; a model that reads pairs needs $m n$.
# * In our world the truth of every caption is known, so each kind of error can be counted.
#
# **To discuss**
# 1. A search engine holds ten million pictures. Which columns of the figure can it use, and which only for the last step?
# 2. Why are three splits by sets of objects better than a random split of pictures?
# 3. What can drawn scenes not tell us about models for photographs?
#
# <details><summary>Answers</summary>
#
# 1. Dual encoders can search all pictures: their vectors are computed once. A model that reads pairs would need ten million
#    passes for each query; it can re-rank the best few.
# 2. With a random split the same caption could occur in training and test, and a model could score by memory.
# 3. They have no clutter, no lighting, few kinds of objects and captions made by rules. Absolute scores do not transfer.
#    Differences between two methods are a hint at best and must be checked on photographs.
#
# </details>
#
# **Next:** [01 · CLIP](01_clip.ipynb), a dual encoder trained by contrast.
