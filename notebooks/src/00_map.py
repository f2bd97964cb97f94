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
# **Prerequisites.** Python, and some PyTorch: tensors, `nn.Module`, a training loop. You know what a softmax is. No
# knowledge of transformers is needed.
#
# **Time.** 30 minutes to read, 25 minutes for the exercises. Nothing is trained here.
#
# Terms in bold are explained where they first occur; the [glossary](../docs/glossary.md) has all of them, in English and
# Chinese.

# %% tags=["setup"] slideshow={"slide_type": "skip"}
import random

import torch
import torch.nn.functional as F

from minivlp import device
from minivlp.data.folders import Photos
from minivlp.data.noise import NoisyCaptions
from minivlp.data.scenes import Scenes
from minivlp.data.text import group_words, load_tokenizer, tokenize
from minivlp.lessons import world as exercise
from minivlp.lessons.common import show
from minivlp.papers import PAPERS
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
# All models of this course are [**transformers**](../docs/glossary.md#transformer)
# ([Vaswani et al. 2017](https://arxiv.org/abs/1706.03762)). A transformer reads a sequence of vectors, called
# [**tokens**](../docs/glossary.md#token), and returns as many vectors. All have the same length, the **width** of the model.
#
# **From a picture to tokens.** A picture is cut into square [**patches**](../docs/glossary.md#patch). This is the
# [**vision transformer**](../docs/glossary.md#vision-transformer), or ViT
# ([Dosovitskiy et al. 2020](https://arxiv.org/abs/2010.11929)).

# %%
drawing.cut_into_patches(scenes[3].image, patch=8)

# %% [markdown] slideshow={"slide_type": "subslide"}
# Each patch is a list of pixel values. A matrix, which is learned, turns the list into a token. Here is a gray picture of
# 4 x 4 pixels with patches of 2 x 2 pixels, and tokens of width 3:

# %% tags=["nbval-check-output"]
picture = torch.arange(16.0).reshape(4, 4)
patches = picture.reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)  # row by row, 4 pixel values each
matrix = torch.tensor([[0.1, 0.0, 0.0], [0.1, 0.1, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.1]])  # (pixels, width)
image_tokens = patches @ matrix
show(picture=picture, patches=patches, image_tokens=image_tokens)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **From a text to tokens.** Each word has a number, its id. The id names a row of a table, which is learned as well.

# %% tags=["nbval-check-output"]
table = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])  # 4 words, width 3
ids = {"a": 0, "red": 1, "heart": 2, "star": 3}
text_tokens = table[[ids[word] for word in ("a", "red", "heart")]]
show(text_tokens=text_tokens)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Two additions.** The next layers treat all tokens alike, so they could not tell the first from the last. Therefore a
# learned vector for each place, the [**position embedding**](../docs/glossary.md#position-embedding), is added.
#
# Often we need one vector for the whole picture or text. So one more token is put in front, the same for every input: the
# [**class token**](../docs/glossary.md#class-token), `[CLS]`. It stands for no patch and no word. Its output serves as the
# vector of the whole.

# %% tags=["nbval-check-output"]
class_token = torch.tensor([[2.0, 2.0, 2.0]])
positions = torch.tensor([[0.0, 0.0], [0.0, 0.1], [0.0, 0.2], [0.1, 0.0], [0.1, 0.1]])
positions = F.pad(positions, (0, 1))  # (5, 3): one vector for each place, made up for this example
sequence = torch.cat([class_token, image_tokens]) + positions
show(sequence=sequence)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Attention
# [**Attention**](../docs/glossary.md#attention) lets tokens exchange information. Each token is multiplied by three
# matrices, which gives its **query** $q$, its **key** $k$ and its **value** $v$, of width $d$. A token's query is compared
# with all keys by a dot product. A softmax turns the results into weights that sum to 1. The token receives the mean of all
# values with these weights:
#
# $$\mathrm{Attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{QK^\top}{\sqrt{d}}\right) V$$
#
# * **Self-attention:** queries, keys and values come from the same sequence.
# * [**Cross-attention:**](../docs/glossary.md#cross-attention) queries come from one sequence (here the words), keys and
#   values from another (here the patches). This is how a word receives information from patches.
#
# Here is cross-attention from our 3 words to the class token and the 4 patches, by hand and by PyTorch:

# %% tags=["check", "nbval-check-output"]
draw = torch.Generator().manual_seed(0)
to_query, to_key, to_value = torch.randn(3, 3, 4, generator=draw)  # three matrices, from width 3 to d = 4
query, key, value = text_tokens @ to_query, sequence @ to_key, sequence @ to_value  # (3, 4), (5, 4), (5, 4)
weights = (query @ key.T / 4**0.5).softmax(dim=1)  # (3, 5): one row for each word
by_hand = weights @ value  # (3, 4)
by_torch = F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
assert torch.allclose(by_hand, by_torch, atol=1e-5)
show(weights=weights, output=by_hand)

# %% [markdown] slideshow={"slide_type": "subslide"}
# The weights here mean nothing, since the matrices are random. In a trained model the row of "heart" should have its
# largest weights at the patches of the heart. We will look at such rows in every lesson.
#
# [**Heads:**](../docs/glossary.md#head) queries, keys and values are cut into several equal parts, and each part has its own
# weights. Two heads of width 2 instead of one of width 4:

# %% tags=["nbval-check-output"]
first, second = (x.chunk(2, dim=1) for x in (query, key))  # the queries of two heads, the keys of two heads
for head, (q, k) in enumerate(zip(first, second, strict=True), 1):
    show(**{f"weights_of_head_{head}": (q @ k.T / 2**0.5).softmax(dim=1)})

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Attention mask:** tokens that must not be attended to, such as [padding](../docs/glossary.md#padding), get weight 0.
#
# A **block** is attention followed by a small two-layer network, the
# [**feed-forward layer**](../docs/glossary.md#feed-forward-layer). Each of the two has a
# [**residual connection**](../docs/glossary.md#residual-connection) (its input is added to its output) and a
# [**LayerNorm**](../docs/glossary.md#layernorm) (each vector is brought to mean 0 and variance 1, then scaled and shifted).
# A transformer is a stack of such blocks.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Three parts of every model
# A vision-language model has an image encoder (**VE**, visual embedding), a text encoder (**TE**, textual embedding), and
# a part that combines the two, the **modality interaction** (**MI**). An encoder that works on one
# [modality](../docs/glossary.md#modality) alone is also called a [**tower**](../docs/glossary.md#tower). The ViLT paper
# ([Kim et al. 2021](https://arxiv.org/abs/2102.03334), figure 2) sorts models by which part is largest. Heights in the figure
# show which part is larger; they are not measurements.

# %%
drawing.taxonomy()

# %% [markdown] slideshow={"slide_type": "subslide"}
# From left to right:
#
# * **VSE, CLIP:** a [**dual encoder**](../docs/glossary.md#dual-encoder). Each picture and each text is encoded once, and a
#   pair is compared by a dot product. So search needs little computation. No word attends to any patch.
# * **UNITER:** an object detector finds regions first, which takes most of the time; then one transformer reads words and
#   regions.
# * **ViLT:** a [**single stream**](../docs/glossary.md#single-stream). There is no detector and no tower; one transformer
#   reads words and patches together. Every pair of a picture and a text needs its own forward pass.
# * **ALBEF:** two towers, whose outputs are first brought into one space (**aligned**), and then layers with
#   cross-attention, in which words attend to patches (**fused**).

# %% [markdown]
# ## Exercise 1 · How many forward passes? *(easy, 10 minutes)*
# You want to rank `n` captions for each of `m` pictures. How many forward passes does a dual encoder need, which encodes
# every picture and every caption once? How many does a model need that runs once for every pair? *Guess first:* how much
# longer does the second take for a thousand pictures and five thousand captions?

# %% tags=["exercise"]
def my_cost(m, n):
    """Returns (runs of a dual encoder, runs of a fusion model)."""
    ### BEGIN SOLUTION
    return m + n, m * n
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_cost(my_cost)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The models of this course
# Filled: a lesson of this course builds and trains the model. Hollow: the course names the model, but has no lesson on it
# yet. The months are those in the arXiv numbers. Each model keeps its color in all figures of the course.

# %%
drawing.timeline({row.title.split(" (")[0]: row.lesson for row in PAPERS.values()})

# %% [markdown] slideshow={"slide_type": "subslide"}
# | model | paper | its main idea |
# |---|---|---|
# | ViLT | [Kim et al. 2021](https://arxiv.org/abs/2102.03334) | one transformer for patches and words, no detector |
# | CLIP | [Radford et al. 2021](https://arxiv.org/abs/2103.00020) | contrast of all pictures and captions of a batch |
# | ALBEF | [Li et al. 2021](https://arxiv.org/abs/2107.07651) | align the towers before fusing; a momentum model |
# | VLMo | [Bao et al. 2021](https://arxiv.org/abs/2111.02358) | one transformer with a feed-forward expert for each modality |
# | FILIP | [Yao et al. 2021](https://arxiv.org/abs/2111.07783) | compare every word with every patch, without fusion layers |
# | X-VLM | [Zeng et al. 2021](https://arxiv.org/abs/2111.08276) | align phrases with boxes |
# | FLAVA | [Singh et al. 2021](https://arxiv.org/abs/2112.04482) | one model for images alone, texts alone and pairs |
# | BLIP | [Li et al. 2022](https://arxiv.org/abs/2201.12086) | write captions, and filter noisy ones |
# | CoCa | [Yu et al. 2022](https://arxiv.org/abs/2205.01917) | contrast and captioning in one pass |
# | GIT | [Wang et al. 2022](https://arxiv.org/abs/2205.14100) | one decoder that reads the image and writes |
# | BridgeTower | [Xu et al. 2022](https://arxiv.org/abs/2206.08657) | every fusion layer reads another layer of the towers |
# | BEiT-3 | [Wang et al. 2022](https://arxiv.org/abs/2208.10442) | images, texts and pairs by one task, masked prediction |
# | Chinese-CLIP | [Yang et al. 2022](https://arxiv.org/abs/2211.01335) | CLIP for Chinese captions, in two stages of training |

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Tasks and metrics
#
# | task | input, output | metric | usual data | here |
# |---|---|---|---|---|
# | [**retrieval**](../docs/glossary.md#retrieval) | a caption, the pictures ranked; and the reverse | R@k: share whose partner is among the first k | COCO, Flickr30k | lessons CLIP, ALBEF |
# | [**zero-shot classification**](../docs/glossary.md#zero-shot-classification) | a picture, one of C class names | accuracy | ImageNet | lesson CLIP |
# | [**VQA**](../docs/glossary.md#visual-question-answering)**, open** | a picture and a question, an answer in words | accuracy against the answers of people | VQA v2 | lesson BLIP |
# | **VQA, closed** | the same, an answer from a fixed list | accuracy | VQA v2, most frequent answers | scenes |
# | [**visual entailment**](../docs/glossary.md#visual-entailment) | a picture and a statement: true (entailed), false (contradicted) or undecided (neutral) | accuracy, chance 1/3 | SNLI-VE | lesson BLIP |
# | **NLVR2** | two pictures and a statement: true or false | accuracy, chance 1/2 | NLVR2 | no lesson yet |
# | [**grounding**](../docs/glossary.md#visual-grounding) | a picture and a phrase, a box | share of boxes with IoU of at least .5 | RefCOCO+ | lesson X-VLM |
# | [**captioning**](../docs/glossary.md#captioning) | a picture, a caption | CIDEr, BLEU-4: overlap of phrases with captions by people | COCO | lesson BLIP |
# | [**counterfactuals**](../docs/glossary.md#counterfactual-caption) | a picture, a true caption and one with a fact changed | accuracy, chance 1/2 | Winoground, ARO | all lessons |
#
# **IoU**, intersection over union: the area that two boxes share, divided by the area that they cover together.

# %% [markdown] slideshow={"slide_type": "subslide"}
# One example of each. "This picture" is the left one; the right one is needed for NLVR2. What the model is given stands
# left of the arrow.

# %%
row = 10  # a scene with two objects
drawing.show_scenes([scenes[row], scenes[1]], columns=2)

# %% tags=["nbval-check-output"]
for task, example in exercise.task_examples(scenes, row, other=1).items():
    print(f"{task:15} {example}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What a scene knows
# Captions, false captions, questions with answers, phrases and boxes of a scene all come from one description of it, in
# English and in Chinese.

# %% tags=["nbval-check-output"]
scene = scenes.scene(row)
print("captions:")
for caption in scene.captions() + scene.captions("zh")[:1]:
    print("   ", caption)
print("one fact changed, now false:")
for kind, caption in scene.counterfactuals(random.Random(0)).items():
    print(f"    {kind:9} {caption}")
print("questions:")
for question, answer in scene.questions()[:5]:
    print(f"    {question} {answer}")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Boxes** are `(cx, cy, w, h)` everywhere in minivlp: center, width and height, as fractions of the picture's width and
# height. A [**region**](../docs/glossary.md#region) is a phrase with a box. Its kind says what the phrase names: an object
# alone (`object`), an object with its attributes (`phrase`), an object by its relation to another (`relation`), or the whole
# picture (`image`).

# %% tags=["nbval-check-output"]
for region in scene.regions():
    print(f"{region.kind:9} {region.phrase:45}", " ".join(f"{value:.2f}" for value in region.box))

# %%
drawing.show_scenes([scenes[r] for r in (row, 6, 16)], columns=3, boxes=True)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Exercise 2 · Corners *(easy, 5 minutes)*
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
# ## Exercise 3 · Left of *(easy, 10 minutes)*
# When is one box left of another? Our captions name a relation only if it is clear. For *left* and *right*, the centers
# must differ at least 1.25 times as much across as down; for *above* and *below*, at least 1.25 times as much down as
# across.
#
# <details><summary>Hint</summary>
#
# y grows downward: a smaller cy is higher up. The sizes of the boxes do not matter.
#
# </details>

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
# A [**tokenizer**](../docs/glossary.md#tokenizer) splits a text into tokens and gives each a number, its id. Ours knows 1,200 tokens. Each English word
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
# ## Recap
# * A transformer reads tokens: words, patches and a class token.
# * Self-attention works within one sequence, cross-attention between two; several heads do this side by side.
# * Models differ in where picture and text are combined: in a dot product, in one joint transformer, in fusion layers on
#   top of two towers, or in a decoder that writes.
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
