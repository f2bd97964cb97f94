# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#     notebook_metadata_filter: kernelspec,jupytext,-all
#     cell_metadata_filter: tags,slideshow,-all
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # Your own pictures
#
# **The question.** You have a folder with some hundred or some thousand captioned pictures. What can a laptop learn from
# it in minutes, and how good is it?
#
# This notebook trains CLIP on your folder, with the recipe that `python -m minivlp train clip --data …` uses by default.
# Without a folder of yours it runs on the twelve free photos that come with minivlp: enough to see every step, far too few
# to learn from.

# %% tags=["setup"] slideshow={"slide_type": "skip"}
import os
from dataclasses import replace

import torch
import torch.nn.functional as F

from minivlp.data.dataset import Wrapper
from minivlp.data.folders import DataError, Photos, open_folder
from minivlp.data.text import load_tokenizer, tokenize
from minivlp.data.tokenizer_training import folder_tokenizer
from minivlp.device import profile
from minivlp.evaluation.retrieval import retrieval, similarities
from minivlp.inference import evaluating
from minivlp.models.clip import CLIP
from minivlp.papers import paper
from minivlp.training.build import build_model
from minivlp.training.checkpoint import bundled, init_from, load_model
from minivlp.training.loop import fit
from minivlp.visualize import drawing
from minivlp.visualize.widgets import RetrievalBrowser

seeded = torch.manual_seed(0)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Name your folder
# Write it into the next cell, or set the environment variable `MINIVLP_PICTURES` before you start Jupyter.
# [docs/your_own_data.md](../docs/your_own_data.md) describes the layouts: `flickr:DIR`, `coco:DIR`, and `folder:DIR` with a
# CSV or JSONL file.
#
# `TOWER` is an image model of timm that has been trained before. `WEIGHTS` is its file; "pretrained" downloads it once (14 MB
# for `mobilenetv2_100`).

# %%
PICTURES = os.environ.get("MINIVLP_PICTURES")  # "flickr:~/flickr8k"
TOWER = os.environ.get("MINIVLP_TOWER", "mobilenetv2_100" if PICTURES else "")
WEIGHTS = os.environ.get("MINIVLP_TOWER_WEIGHTS", "pretrained")

# %% [markdown] slideshow={"slide_type": "subslide"}
# A model is tested on what it has not seen. A folder of some size is split: 80 % of the pictures to train on, 10 % to test
# on. Twelve photos are too few for that. There we train on the first caption of each picture and search with the last
# one, so the *words* are new and the pictures are not. This is an easier question, and the scores below say less. (One of
# the photos has a single caption, which is in both.)

# %%
class SomeCaptions(Wrapper):
    """The same pictures with some of their captions."""

    def __init__(self, dataset, which):
        super().__init__(dataset)
        self.which = which

    def captions(self, row):
        return self.dataset.captions(row)[self.which]


def open_both():
    """What is trained on, and what is tested on."""
    if not PICTURES:
        return SomeCaptions(Photos(), slice(0, 1)), SomeCaptions(Photos(), slice(-1, None))
    train = open_folder(PICTURES, split="train")
    try:
        return train, open_folder(PICTURES, split="test")
    except DataError:  # COCO's test split has no captions
        return train, open_folder(PICTURES, split="validation")


train, test = open_both()
print(f"train: {len(train):,} pictures. test: {len(test):,} pictures.")
drawing.show_scenes([train[row] for row in range(min(4, len(train)))])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## A tokenizer of your words
# The tokenizer of the lessons has 1,200 tokens, made for a world of emoji. It can spell any word, but a word in five pieces
# is hard to learn. So the recipe trains a tokenizer of up to 8,000 tokens on the captions of the training split, and only
# on these. On Flickr8k this choice alone was worth .13 in recall at 10, more than any other one.

# %% tags=["nbval-check-output"]
ours, tokenizer = load_tokenizer(), folder_tokenizer(train, size=8000)
print(f"{len(tokenizer):,} tokens")
for row in range(3):
    text = train.captions(row)[0]
    before, after = (len(one.tokenize(text)) for one in (ours, tokenizer))
    print(f"{before:3} pieces before, {after:3} now   {text[:80]}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Two towers, of which one has been trained before
# A few thousand pictures cannot teach a network to see. The image tower therefore comes trained and stays **frozen**: its
# weights do not change, so each picture has to pass it only once. The text side is as small as possible: a text is the
# **mean of its word vectors**, then one linear layer. In our trials a transformer learned less from 30,000 captions in
# three times the time; from about twenty thousand pictures on the recipe uses one (where exactly it pays was not measured).
#
# Two things keep so small a model from memorizing the training captions. Half of the image features are dropped in
# each step, and a fifth of the words is replaced by [MASK].
#
# Without a folder of yours, the image tower is that of our small CLIP. It has seen nothing but emoji in its life.

# %%
recipe = paper("clip").folder_recipe(profile(), len(train), frozen=True).sized(len(train))


def clip_of_recipe():
    """CLIP by the recipe, with timm's tower or that of our small CLIP."""
    if TOWER:
        return build_model(CLIP, recipe, tokenizer, tower=TOWER, tower_weights=WEIGHTS, frozen=True)
    emoji = load_model(CLIP, bundled("clip_nano")).config.image
    model = replace(recipe, config={**recipe.config, "image": emoji}).build(CLIP, tokenizer)
    init_from(model, bundled("clip_nano"), parts=("image.",))
    model.image.requires_grad_(False)
    return model


model = clip_of_recipe()
for name, parameter in model.named_parameters():
    if parameter.requires_grad:
        print(f"{name:32} {tuple(parameter.shape)}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Exercise: the mean of the words
# *Easy, 5 minutes.* The texts of a batch have different lengths. The shorter ones are padded, and `mask` says which tokens
# are real. Write the mean of the real tokens' vectors. Padding must not count, neither in the sum nor in the number.

# %% tags=["exercise"]
def mean_of_words(vectors, mask):
    """vectors (B, L, D), mask (B, L) bool -> (B, D)."""
    ### BEGIN SOLUTION
    real = mask[..., None]
    return (vectors * real).sum(dim=1) / real.sum(dim=1)
    ### END SOLUTION

# %% tags=["check"]
def check_mean(student):
    """A mean over two tokens, whatever the third, which is padding, holds; then the model's own mean."""
    vectors = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    got = student(vectors, torch.tensor([[True, True, False]]))
    assert got.shape == (1, 2), f"one vector per text: (1, 2), not {tuple(got.shape)}"
    assert torch.allclose(got, torch.tensor([[2.0, 4.0]])), f"the mean of (1, 2) and (3, 6) is (2, 4), not {got.tolist()}"
    text = tokenize(tokenizer, [train.captions(0)[0], train.captions(1)[0]], 56)
    if model.config.mean_text:
        assert torch.allclose(student(model.encode_text(text), text.mask), model.summarize(text)[:, 0], atol=1e-6)
    print("ok: padding does not count.")


check_mean(mean_of_words)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Train
# `recipe.batches` runs each picture through the frozen tower when it is first needed and keeps the result. The first epoch
# is slow for that reason, the others are fast.

# %%
print(f"{recipe.steps} steps of {recipe.batch_size}, about {recipe.steps * recipe.batch_size / len(train):.0f} epochs")
history = fit(model, recipe.batches(train, tokenizer, model=model), recipe.settings(), bar=False)
drawing.training_curves(history)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## How good is it?
# Each test caption searches among all test pictures, and each picture among all captions. **R@10** is the share of searches
# that find a right answer among their first ten. Look at *chance* beside it: with few pictures it is high.

# %%
retrieval(model, test, tokenizer, unique=None)

# %% [markdown]
# What a laptop can expect (one thread, frozen MobileNetV2, 1,000 test pictures that were never seen):
#
# | Flickr8k | text → image R@1 / 5 / 10 | image → text R@1 / 5 / 10 | training |
# |---|---|---|---|
# | ridge regression from the same features to words | .15 / .34 / .46 | | |
# | this recipe, in a prototype | .18 / .45 / .58 | .26 / .51 / .65 | 35 s |
#
# [docs/what_to_expect.md](../docs/what_to_expect.md) says what was measured and what was not.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Search
# Click a caption to see its nearest pictures, or a picture to see its captions.

# %%
rows = list(range(min(24, len(test))))
captions = [test.captions(row)[0] for row in rows]
with evaluating(model):
    table = similarities(model, test, tokenizer, rows, captions).numpy()
RetrievalBrowser([test[row].image for row in rows], captions, table)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What it cannot know
# A mean has no order. Whoever bites whom, the words are the same, and so is the vector.

# %% tags=["nbval-check-output"]
def same_vector(one, other):
    """Whether the model gives both texts the same vector."""
    with evaluating(model):
        first, second = model.embed_texts(tokenize(tokenizer, [one, other], 56))
    return bool(F.cosine_similarity(first, second, dim=0) > 0.9999)


print("a dog bites a man = a man bites a dog:", same_vector("a dog bites a man", "a man bites a dog"))
print("a dog bites a man = a dog sees a man: ", same_vector("a dog bites a man", "a dog sees a man"))

# %% [markdown]
# (From about twenty thousand pictures on, texts are read by a transformer, and the first line says `False`.)
#
# ## Go on
# The same from the command line, with everything kept in a folder: the model, its tokenizer, the log, a page to search in.
#
# ```
# python -m minivlp train clip --data flickr:~/flickr8k --tower mobilenetv2_100 --tower-weights pretrained --frozen
# python -m minivlp evaluate clip --data flickr:~/flickr8k --weights runs/clip-0/model.safetensors
# python -m minivlp train blip --data flickr:~/flickr8k --tower mobilenetv2_100 --tower-weights pretrained --frozen
# ```
#
# The last one learns to *write* captions. [docs/your_own_data.md](../docs/your_own_data.md) has the details.
