# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#     notebook_metadata_filter: kernelspec,jupytext,-all
#     cell_metadata_filter: tags,slideshow,-all
#   kernelspec: {display_name: Python 3 (ipykernel), language: python, name: python3}
# ---

# %% [markdown] slideshow={"slide_type": "slide"}
# # 01 · CLIP: two towers and one shared space
#
# **The question.** Most image classifiers are trained with a fixed list of classes. Can a model learn what words mean from
# pictures and their captions alone?
#
# CLIP ([Radford et al. 2021](https://arxiv.org/abs/2103.00020)) has one tower for pictures and one for captions. Each
# returns a single vector. The model is trained to answer two questions: *which caption of this batch belongs to this
# picture,* and *which picture belongs to this caption?*
#
# **Goals.** You write CLIP's loss, assemble the model, write a training step and see it learn. You measure retrieval and
# zero-shot classification, and find out which facts of a caption the model checks and which it ignores.
#
# **Prerequisites.** Lesson 00 (tokens, patches, class token, attention); softmax and cross-entropy.
#
# **Time.** 50 minutes to read, of which two to three minutes are training on two CPU cores; 75 minutes for the exercises.
# Each exercise has a check that says which property failed. Solutions are in the executed notebook.

# %% tags=["setup"] slideshow={"slide_type": "skip"}
import math
import random
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from minivlp.data.batch import to_tensor
from minivlp.data.folders import Photos
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer, tokenize
from minivlp.device import profile
from minivlp.evaluation.grounding import attention_in_box, pointing_game
from minivlp.evaluation.matching import counterfactual
from minivlp.evaluation.records import by_variant
from minivlp.evaluation.retrieval import retrieval, zero_shot
from minivlp.evaluation.score import Scores, spread
from minivlp.layers.attention import attention_mask, record_attention
from minivlp.layers.embeddings import ImageEmbedding, TextEmbedding
from minivlp.layers.transformer import Block
from minivlp.lessons import clip as exercise
from minivlp.lessons import clip_parts
from minivlp.lessons.common import phrases
from minivlp.models.clip import CLIP, CLIPConfig
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits
from minivlp.papers import paper
from minivlp.training.checkpoint import bundled, load_model
from minivlp.training.loop import fit, overfit_one_batch
from minivlp.visualize import attention, drawing
from minivlp.visualize.widgets import LiveCurves, RetrievalBrowser

recipe = paper("clip").recipe(profile())
tokenizer = load_tokenizer()
CONTEXT = 56  # the nano models read texts of up to 56 tokens
_ = torch.manual_seed(0)  # the same numbers in every run; without "_ =" the notebook would print the generator

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Four pictures, four captions
# Our pictures are drawn by a program, so everything about them is known (lesson 00). Here is a batch of four.

# %%
scenes = Scenes(recipe.scenes, split="train", seed=0, size=recipe.size, objects=recipe.objects)
four = [3, 8, 12, 21]
drawing.show_scenes([scenes[row] for row in four])

# %% [markdown] slideshow={"slide_type": "subslide"}
# Each [tower](../docs/glossary.md#tower) turns its input into a vector of length one. The dot product of two such vectors is
# their [**cosine similarity**](../docs/glossary.md#cosine-similarity): 1 if they point in the same direction, 0 if they are
# orthogonal. Rows are pictures and columns are captions, in the order from above, so the matching pairs are on the diagonal.
# On the left is a model with random weights. On the right is the trained model that comes with minivlp (the **bundled**
# model; the same kind of model as you will train, with more scenes and more steps):

# %%
fresh = CLIP(CLIPConfig.nano(len(tokenizer))).eval()
trained = load_model(CLIP, bundled("clip_nano"))
images = to_tensor(scenes.pixels(four, 64))
captions = [scenes.captions(row)[0] for row in four]
text = tokenize(tokenizer, captions, max_tokens=CONTEXT)
with torch.no_grad():
    tables = {name: (m.embed_images(images) @ m.embed_texts(text).T).numpy() for name, m in
              {"random weights": fresh, "trained": trained}.items()}
drawing.similarity_matrices(tables, [scenes[row].image for row in four])

# %% tags=["check", "nbval-check-output"]
for name, table in tables.items():
    own, others = table.diagonal().mean(), (table.sum() - table.trace()) / 12
    print(f"{name:15} mean cosine of a picture with its own caption {own:5.1f}, with the other captions {others:5.1f}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The architecture

# %%
drawing.structure("CLIP")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The loss, by hand
# Let $x_i$ be the vector of picture $i$ and $y_j$ that of caption $j$, both of length one, in a batch of $B$ pairs. A
# softmax turns row $i$ of the table into probabilities, and the loss is minus the logarithm of the probability of the
# right caption. The same is done for the columns. The mean of both is the symmetric
# [**contrastive loss**](../docs/glossary.md#contrastive-loss) (InfoNCE):
#
# $$\mathcal{L} = -\frac{1}{2B}\sum_{i=1}^{B}\left[\log\frac{\exp(x_i^\top y_i/\tau)}{\sum_{j}\exp(x_i^\top y_j/\tau)}
# {} + \log\frac{\exp(x_i^\top y_i/\tau)}{\sum_{j}\exp(x_j^\top y_i/\tau)}\right]$$
#
# The other captions of row $i$ are its [negatives](../docs/glossary.md#negative). $\tau$ is the
# [**temperature**](../docs/glossary.md#temperature). Cosines lie between -1 and 1. Without division by a small $\tau$, the
# probability of the right one of 64 captions could not exceed $e^{1}/(e^{1}+63\,e^{-1}) = .10$.

# %% tags=["nbval-check-output"]
with torch.no_grad():
    pictures, texts = trained.embed_images(images), trained.embed_texts(text)
temperature = 0.07
by_hand = 0.0
for i in range(4):
    row = [torch.exp(pictures[i] @ texts[j] / temperature) for j in range(4)]  # this picture, every caption
    column = [torch.exp(pictures[j] @ texts[i] / temperature) for j in range(4)]  # this caption, every picture
    by_hand += -torch.log(row[i] / sum(row)) - torch.log(column[i] / sum(column))
by_hand = by_hand / (2 * 4)
print(f"loss of the trained model: {by_hand:.2f}; of a uniform guess among four: ln 4 = {torch.log(torch.tensor(4.0)):.2f}")

# %% [markdown]
# The library computes the same with one matrix product. Check that both agree:

# %% tags=["check", "nbval-check-output"]
library = contrastive_loss(cosine_logits(pictures, texts, 1 / temperature))
assert torch.isclose(by_hand, library, atol=1e-5)
print("the loop and the library agree")

# %% [markdown]
# ## Exercise 1 · The loss *(easy, 10 minutes)*
# Write the symmetric contrastive loss of `B` pairs of unit vectors.
# *Predict first:* which loss would a model with random weights have for B = 64?
#
# <details><summary>Hint</summary>
#
# `F.cross_entropy(table, torch.arange(B))` is the mean of the row losses. The columns of a table are the rows of `table.T`.
#
# </details>

# %% tags=["exercise"]
def my_loss(images, texts, temperature):
    """images, texts: (B, E) unit vectors, row i belongs to row i. Returns a scalar."""
    ### BEGIN SOLUTION
    table = images @ texts.T / temperature
    truth = torch.arange(len(images))
    return (F.cross_entropy(table, truth) + F.cross_entropy(table.T, truth)) / 2
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_loss(my_loss)

# %% [markdown]
# ## Exercise 2 · From tokens to vectors *(medium, 15 minutes)*
# Each tower returns one vector per token. CLIP keeps one token of each: the class token of the picture, and the **last real
# token** of the text. A matrix, the [**projection**](../docs/glossary.md#projection), brings each into the shared space, and
# the result is scaled to length one.
#
# Texts of a batch have different lengths. Shorter ones are filled up with [padding](../docs/glossary.md#padding) at the end;
# `mask` is True on real tokens.
#
# *Predict first:* CLIP's text tower is **causal**: a token attends only to itself and to the tokens in front of it. What
# would the vector of a caption depend on if the first token were read instead of the last?
#
# <details><summary>Hint 1</summary>
#
# The class token is `image_tokens[:, 0]`. The last real token of text i stands at place `mask[i].sum() - 1`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `text_tokens[rows, places]` with two index tensors of shape (B,) takes one token from each row.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `rows = torch.arange(len(mask))`, `places = mask.sum(dim=1) - 1`. Then project, then `F.normalize(..., dim=-1)`.
#
# </details>

# %% tags=["exercise"]
def my_vectors(image_tokens, text_tokens, mask, project_image, project_text):
    """Tokens (B, 1+P, D) and (B, L, D), mask (B, L), two linear layers -> unit vectors (B, E) and (B, E)."""
    ### BEGIN SOLUTION
    last = text_tokens[torch.arange(len(mask)), mask.sum(dim=1) - 1]  # (B, D)
    pictures = F.normalize(project_image(image_tokens[:, 0]), dim=-1)
    return pictures, F.normalize(project_text(last), dim=-1)
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
clip_parts.check_vectors(my_vectors)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Build it
# Now we put CLIP together. A tower is an embedding (lesson 00: patches or words become tokens, positions are added) and a
# stack of blocks. `minivlp.layers` has both. The rest is yours.

# %%
class ImageTower(nn.Module):
    """images (B, 3, 64, 64) -> tokens (B, 65, 128): the class token, then 64 patches."""

    def __init__(self, config):
        super().__init__()
        self.embed = ImageEmbedding(config)
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.block.width)

    def forward(self, images):
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TextTower(nn.Module):
    """Token ids (B, L) with their mask -> tokens (B, L, 128). Causal: no token attends to a later one."""

    def __init__(self, config):
        super().__init__()
        self.embed = TextEmbedding(config)
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.block.width)

    def forward(self, text):
        x, mask = self.embed(text.ids), attention_mask(text.mask, causal=True)  # (B, L, 128), (B, 1, L, L)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class MyCLIP(nn.Module):
    """Two towers, two projections, and the logarithm of 1 / temperature, which is learned."""

    def __init__(self, config):
        super().__init__()
        self.image, self.text = ImageTower(config.image), TextTower(config.text)
        self.project_image = nn.Linear(config.image.block.width, config.embed_width, bias=False)
        self.project_text = nn.Linear(config.text.block.width, config.embed_width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    def forward(self, images, text):
        image_tokens, text_tokens = self.image(images), self.text(text)
        return my_vectors(image_tokens, text_tokens, text.mask, self.project_image, self.project_text)


# %% tags=["nbval-check-output"]
mine = MyCLIP(trained.config).eval()
for name, tensor in {
    "pixels": images,
    "after the embedding": mine.image.embed(images),
    "after the image tower": mine.image(images),
    "token ids": text.ids,
    "after the text tower": mine.text(text),
}.items():
    print(f"{name:22} {tuple(tensor.shape)}")

# %% [markdown] slideshow={"slide_type": "subslide"}
# Is this CLIP? Give it the weights of the library's trained model. If every layer is in its place, both compute the same
# vectors and the same loss.

# %% tags=["check", "nbval-check-output", "needs-solution"]
def weights_of(library):
    """The weights of the library's model, under the names that `MyCLIP` uses."""
    return {name.replace("itc_head.scale.", "").replace("itc_head.", ""): x for name, x in library.state_dict().items()}


mine.load_state_dict(weights_of(trained))
with torch.no_grad():
    my_pictures, my_texts = mine(images, text)
    my_value = my_loss(my_pictures, my_texts, 1 / mine.log_scale.exp())
    assert torch.allclose(my_pictures, trained.embed_images(images), atol=1e-5)
    assert torch.allclose(my_texts, trained.embed_texts(text), atol=1e-5)
    assert torch.isclose(my_value, contrastive_loss(trained.similarity(images, text)), atol=1e-5)
print("MyCLIP and minivlp.models.clip.CLIP compute the same vectors and the same loss")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Exercise 3 · One training step *(medium, 15 minutes)*
# Write what happens in every step of training: forward, loss, backward, optimizer. After the step, CLIP limits the scale
# 1 / temperature to 100. Without this limit, the scale could grow until training becomes unstable (section 2.5 of the paper).
#
# *Predict first:* below, your step trains twice. The first run uses your loss. The second uses a loss **without negatives**,
# 1 minus the cosine of each matching pair. Which of the two losses falls faster? In which run does a picture find its own
# caption?
#
# <details><summary>Hint 1</summary>
#
# PyTorch adds new gradients to those that are already there. So first set them to zero: `optimizer.zero_grad()`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `loss(*model(images, text), 1 / model.log_scale.exp())` is the loss, with a gradient for the temperature, too. Then come
# `backward()` and `optimizer.step()`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# The limit: `with torch.no_grad(): model.log_scale.clamp_(max=math.log(100))`. Return `value.item()`, a plain number.
#
# </details>

# %% tags=["exercise"]
def my_step(model, images, text, loss, optimizer):
    """One training step. `model(images, text)` returns two sets of unit vectors; `loss(pictures, captions, temperature)`
    is a scalar. Returns the loss as a number."""
    ### BEGIN SOLUTION
    optimizer.zero_grad()
    value = loss(*model(images, text), 1 / model.log_scale.exp())
    value.backward()
    optimizer.step()
    with torch.no_grad():
        model.log_scale.clamp_(max=math.log(100))
    return value.item()
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
clip_parts.check_step(my_step)

# %% [markdown]
# Now train with your own step. To **overfit one batch** is the first test of any new model: train on the same sixteen pairs
# again and again. If the model cannot learn even these, there is a bug.

# %%
sixteen = Loader(scenes, tokenizer, 16, recipe.size, seed=0).batch(0)

# %% tags=["needs-solution"]
def without_negatives(pictures, captions, temperature):
    return (1 - (pictures * captions).sum(dim=1)).mean() / temperature


def overfit(loss, steps=25):
    """Returns, for each step, the loss and the share of pictures whose own caption is the nearest of sixteen."""
    torch.manual_seed(0)
    model = MyCLIP(trained.config)
    model.load_state_dict(weights_of(CLIP(trained.config)))  # random weights, scaled as the library does
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    losses, shares = [], []
    for _ in range(steps):
        losses.append(my_step(model, sixteen.images, sixteen.text, loss, optimizer))
        with torch.no_grad():
            pictures, captions = model(sixteen.images, sixteen.text)
        shares.append(((pictures @ captions.T).argmax(dim=1) == torch.arange(16)).float().mean().item())
    return losses, shares


runs = {"your loss": overfit(my_loss), "without negatives": overfit(without_negatives)}
names = ("loss", "own caption is the nearest of 16")
drawing.curves({name: {run: both[i] for run, both in runs.items()} for i, name in enumerate(names)}, {names[1]: 1 / 16})

# %% tags=["check", "nbval-check-output", "needs-solution"]
last = {run: shares[-1] for run, (_, shares) in runs.items()}
assert last["your loss"] > 0.9 and last["without negatives"] < 0.5 and runs["without negatives"][0][-1] < 0.2
print("your loss: more than 9 of 10 pictures find their caption; without negatives: fewer than half")

# %% [markdown]
# *What we see:* both losses fall to almost 0, but only one model learns the pairs. Without negatives, the model maps all
# pictures and all captions to nearly the same vector. Then every matching pair has cosine 1, and so has every other pair.
# The negatives forbid this.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The library's model
# `minivlp/models/clip.py` is the model that you have built, with a few options. Our nano model is a small version of the
# published one. It differs in a few choices, which come from a prototype that had to learn within minutes:
#
# | field of the config | published | nano | why |
# |---|---|---|---|
# | `two_step_patches` | one projection per patch | two small ones | learned faster in the prototype |
# | `sincos_positions` | learned | fixed sine waves | positions differ from the first step on |
# | `activation` | QuickGELU | ReLU | needs less memory |
# | `word_std`, `position_std` | .02, .01 | .5, .2 | larger initial embeddings; not tested separately |
# | `diagonal_only` | yes | no | two captions of one picture count as positives; the loss is nearly the same (exercise 6) |
#
# The optimizer differs as well: Muon for the matrices inside the blocks, AdamW for the rest (`docs/recipe.md`).

# %% tags=["nbval-check-output"]
model = recipe.build(CLIP, tokenizer)
count = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("image", "text", "itc_head")}
print("parameters:", {part: f"{n / 1e6:.2f} M" for part, n in count.items()}, f"in all {sum(count.values()) / 1e6:.2f} M")

# %% [markdown] slideshow={"slide_type": "subslide"}
# The same test as above for the library's model, with its optimizer:

# %% tags=["check", "nbval-check-output"]
loader = Loader(scenes, tokenizer, recipe.batch_size, recipe.size, seed=0)
losses = overfit_one_batch(CLIP(CLIPConfig.nano(len(tokenizer))), sixteen, steps=40)
assert losses[-1] < 0.3 and 2.5 < losses[0] < 3.5
print("the loss falls from about ln 16 = 2.77, a uniform guess among sixteen, to below .3")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Now train
# The stop button of the notebook ends training early; the weights learned so far are kept.
#
# *Profile `laptop` takes two to three minutes on two cores. Profile `quick`, which the automatic tests use, shows the first
# steps only. Set the environment variable `MINIVLP_PROFILE` before you start Jupyter to choose.*

# %% tags=["nbval-ignore-output"]
curves = LiveCurves()
display(curves)
with curves.guard():
    history = fit(model, loader.batch, recipe.settings(), on_step=[curves.log_row], bar=False)
model.cpu()  # fast enough for all that follows
history

# %% tags=["check", "nbval-check-output"]
start = sum(row["loss"] for row in history.steps[:10]) / 10
end = sum(row["loss"] for row in history.steps[-10:]) / 10
assert end < 0.9 * start
print("the mean loss of the last ten steps is more than 10 % below that of the first ten")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What has it learned?
# [**Retrieval**](../docs/glossary.md#retrieval) on test scenes with 500 different captions. For each caption, which rank does its picture have among the
# five hundred (text to image)? For each picture, which rank does its caption have (image to text)?
# [**R@k**](../docs/glossary.md#rk) (recall at k) is the share whose partner is among the first k. The column `chance` is what random ranks would give.
#
# The model is the one that you have just trained; in profile `quick` it is the bundled one.

# %% tags=["nbval-ignore-output"]
if profile() == "quick":
    model = trained
test, size = Scenes(1500, split="test", seed=7, size=recipe.size), model.config.image.image_size
found = retrieval(model, test, tokenizer)
Scores({name: score for name, score in found.items() if "R@" in name})

# %% tags=["check", "nbval-check-output"]
assert found["text to image R@5"].value > 0.8
print("text to image R@5 is above .8; chance is .01")

# %%
rows = [5, 17, 29]
gallery = list(range(48))
with torch.no_grad():
    image_vectors = model.embed_images(to_tensor(test.pixels(gallery, size)))
    queries = model.embed_texts(tokenize(tokenizer, [test.captions(row)[0] for row in rows], CONTEXT))
drawing.retrieval_grid(
    [test.captions(row)[0] for row in rows], [test[row].image for row in gallery], (image_vectors @ queries.T).numpy(), rows
)

# %% [markdown] slideshow={"slide_type": "subslide"}
# Try it: choose a caption or write one, or click a picture to see the captions that are most similar to it.

# %% tags=["nbval-ignore-output"]
with torch.no_grad():
    all_texts = model.embed_texts(tokenize(tokenizer, [test.captions(row)[0] for row in gallery], CONTEXT))


def score_text(text):
    with torch.no_grad():
        return (image_vectors @ model.embed_texts(tokenize(tokenizer, [text], CONTEXT)).T)[:, 0].tolist()


RetrievalBrowser(
    [test[row].image for row in gallery],
    [test.captions(row)[0] for row in gallery],
    image_vectors @ all_texts.T,
    score_text=score_text,
)

# %% [markdown]
# ## Exercise 4 · R@k *(easy, 10 minutes)*
# In how many rows is the right column (the diagonal) among the `k` largest?

# %% tags=["exercise"]
def my_recall(similarity, k):
    """similarity (N, N), rows are images, columns are texts. Returns a share between 0 and 1."""
    ### BEGIN SOLUTION
    nearest = similarity.topk(k, dim=1).indices  # (N, k)
    right = torch.arange(len(similarity))[:, None]  # (N, 1)
    return (nearest == right).any(dim=1).float().mean().item()
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_recall(my_recall)

# %% [markdown] slideshow={"slide_type": "slide"}
# [**Zero-shot classification.**](../docs/glossary.md#zero-shot-classification) The model was never trained to classify. Write each class name as a caption; the class
# whose caption has the largest cosine with the picture is the answer. Here are pictures with one object each and 52 names,
# so chance is 1/52. (All names occur in training captions, and similar pictures do too. "Zero-shot" means that no
# classifier was trained, not that the objects are new.)

# %% tags=["nbval-ignore-output"]
single = Scenes(400, split="all", seed=11, size=recipe.size, objects=(1, 1))
names = sorted({scene.objects[0].noun for scene in map(single.scene, range(len(single)))})
zero_shot(model, single, tokenizer, names, prompts=("a {}", "there is a {}", "a picture of a {}"))

# %% [markdown]
# ## Exercise 5 · Zero-shot classification *(medium, 15 minutes)*
# Each class has `K` prompts. Average their vectors, scale the mean to length one, and take the class with the largest
# cosine.

# %% tags=["exercise"]
def my_zero_shot(images, prompts):
    """images (N, E), prompts (C, K, E), all of length one. Returns the class of each image, (N,)."""
    ### BEGIN SOLUTION
    classes = F.normalize(prompts.mean(dim=1), dim=-1)  # (C, E)
    return (images @ classes.T).argmax(dim=1)
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_zero_shot(my_zero_shot)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Which patches does it use?
# The picture's vector is computed from the class token. From which patches does the class token take its values? One map
# is the attention of the last layer. [**Rollout**](../docs/glossary.md#attention-rollout)
# ([Abnar and Zuidema 2020](https://arxiv.org/abs/2005.00928)) multiplies the attention of all layers. Bright patches have the
# largest weight; dashed boxes are the objects that the caption names.
# The model is the bundled one.

# %%
shown = [2, 9, 5]
with torch.no_grad(), record_attention(trained) as maps:
    trained.encode_image(to_tensor(test.pixels(shown, 64)))
layers = [maps[f"image.{n}.self"] for n in range(trained.config.image.layers)]
rolled = attention.to_grid(attention.cls_map(attention.rollout(layers)))
last = attention.to_grid(attention.cls_map(layers[-1]))
drawing.attention_grid([test[row] for row in shown], {"rollout": rolled, "last layer": last})

# %% [markdown]
# A few pictures prove little, so we measure: which share of the attention falls inside the object's box? Chance is the share
# of the picture that the box covers. Each picture shows one object, so it is clear which patches matter.

# %% tags=["nbval-ignore-output"]
alone = Scenes(300, split="test", seed=7, objects=(1, 1))
boxed = [(row, r.box) for row in range(len(alone)) for r in alone.regions(row) if r.kind == "object"]
with torch.no_grad(), record_attention(trained) as maps:
    trained.encode_image(to_tensor(alone.pixels([row for row, _ in boxed], 64)))
boxes = torch.tensor([box for _, box in boxed])
layers = [maps[f"image.{n}.self"] for n in range(trained.config.image.layers)]
rolled, last = (attention.to_grid(attention.cls_map(x)) for x in (attention.rollout(layers), layers[-1]))
inside = Scores(
    {
        "rollout: share inside": attention_in_box(rolled, boxes),
        "last layer: share inside": attention_in_box(last, boxes),
        "last layer: strongest patch inside": pointing_game(last, boxes),
    }
)
inside

# %% tags=["check", "nbval-check-output"]
assert inside["last layer: share inside"].value > 1.5 * inside["last layer: share inside"].chance
print("the share of attention inside the box is more than 1.5 times the share of the area")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Where is the heart?
# The class token says what is in the whole picture. Can CLIP also say *where*? We compare the vector of a phrase, such as "a
# red heart", with every patch. But which vector of a patch?
#
# * **Its output:** the patch's own token after the last layer. The loss never reads it, so nothing in training asks these
#   outputs to lie near the right words.
# * **Its value:** what the class token receives when it attends to this patch alone. The last layer multiplies each patch
#   by its value matrix and its output matrix, and the class token gets the weighted mean. So these vectors do reach the
#   loss. This [**value readout**](../docs/glossary.md#value-readout) is that of MaskCLIP
#   ([Zhou et al. 2022](https://arxiv.org/abs/2112.01071)).
#
# The [**pointing game**](../docs/glossary.md#pointing-game) asks: is the center of the best patch inside the phrase's box?
# The values of the first layers can be read in the same way. Which layer is best is chosen on validation scenes.

# %% tags=["nbval-ignore-output"]
def point(patches_of, split, count=150):
    """The pointing game with phrases for scenes of two or three objects."""
    world = Scenes(count, split=split, seed=7, objects=(2, 3))
    rows, texts, boxes = phrases(world, tokenizer)
    with torch.no_grad():
        tokens = patches_of(to_tensor(world.pixels(range(count), 64)))  # (count, P, D)
    similarity = attention.text_patch_similarity(trained, tokens[rows], texts)  # (phrases, P)
    return pointing_game(attention.to_grid((similarity / 0.07).softmax(dim=-1)), boxes, images=rows)


readouts = {"outputs": lambda x: trained.encode_image(x)[:, 1:]}
for n in range(trained.config.image.layers):
    readouts[f"values of layer {n}"] = lambda x, n=n: attention.value_tokens(trained.image, x, n)
Scores({name: point(of, "validation") for name, of in readouts.items()})

# %% [markdown]
# The outputs and the values of the last layer, once more on test scenes, which took no part in the choice:

# %% tags=["nbval-ignore-output"]
chosen = "values of layer 2"
pointed = Scores({name: point(readouts[name], "test") for name in ("outputs", chosen)})
pointed

# %% tags=["check", "nbval-check-output"]
assert pointed["outputs"].value < 0.25 and pointed[chosen].value > 0.5
print("the best patch lies in the phrase's box: outputs below .25, values of the last layer above .5; chance is about .1")

# %%
pictured = [3, 6]  # the values point at the object in the first, and miss it in the second
several = Scenes(10, split="test", seed=7, objects=(2, 3))
asked = [next(r for r in several.regions(row) if r.kind == "object") for row in pictured]
said = tokenize(tokenizer, [region.phrase for region in asked], CONTEXT)
with torch.no_grad():
    pixels = to_tensor(several.pixels(pictured, 64))
    found = {name: attention.text_patch_similarity(trained, readouts[name](pixels), said) for name in ("outputs", chosen)}
drawing.attention_grid(
    [replace(several[row], captions=[r.phrase], regions=[r]) for row, r in zip(pictured, asked, strict=True)],
    {name: attention.to_grid((similarity / 0.07).softmax(dim=-1)) for name, similarity in found.items()},
)

# %% [markdown]
# (Each map has its own scale of colors.) *What we see:* the outputs point no better than a random patch. The values of the
# last layer point at the named object in about two of three cases, although CLIP has never seen a box. They fail in the
# others, as in the picture on the right. A vector that no loss reads need not lie near the right words.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Change one thing
# **The temperature.** CLIP learns it. Does that matter? Three variants, three seeds each, 150 steps, test scenes
# (made by `python tools/experiments.py clip_temperature`). In this figure and those like it, a bar is the mean of the seeds and
# each mark is one run. The line is the widest 95 % confidence interval of a single run, from resampling the pictures, and the
# dashed line is chance.

# %%
drawing.bars_with_spread(by_variant("clip_temperature"), ["text to image R@1", "image to text R@1"])

# %% [markdown] slideshow={"slide_type": "subslide"}
# *What we see:* if the temperature starts at a good value, learning it makes no difference in 150 steps. A temperature of 1
# halves the score.
#
# **The batch size.** All other pairs of the batch serve as negatives, and the paper's batch holds 32,768 pairs. Here are
# batches of 16, 64 and 256 with the same number of pairs seen, 9,600, and the same learning rate
# (`python tools/experiments.py clip_batch`).

# %%
drawing.bars_with_spread(by_variant("clip_batch"), ["text to image R@1", "image to text R@1"])

# %% [markdown]
# *What we see:* the small batch scores best. But two things change at once: batches of 16 give 600 steps and batches of 256
# give 37, and the learning rate was not tuned for each size. So this experiment cannot tell what the number of negatives
# does by itself, and it does not contradict the paper, whose runs are much longer.
#
# *Your turn:* make one bar of these figures: change the two values below. It takes a minute or two.

# %% tags=["nbval-ignore-output"]
variant = CLIP(replace(CLIPConfig.nano(len(tokenizer)), learn_temperature=True, temperature=0.07))
if profile() != "quick":
    fit(variant, loader.batch, recipe.settings(steps=150))
    print(retrieval(variant, test, tokenizer)["text to image R@1"])
else:
    print(f"temperature {1 / variant.itc_head.scale().item():.2f}; not trained: profile quick skips this run of 150 steps")

# %% [markdown]
# ## Exercise 6 · Two captions of one picture *(medium, 15 minutes)*
# COCO has five captions for each picture. If two of them are in one batch, the diagonal treats each as a negative in the
# other's row. Make a table of targets that divides the target equally among all rows with the same picture.
#
# *Does it matter?* If both rows hold exactly the same picture, no: both rows of the table have the same image vector, and
# the sum of the two losses is the same with either kind of target. (Try it with pencil and paper.) The same holds for two
# pictures with the same caption. It matters if both vectors differ, for example with two different crops of the picture.

# %% tags=["exercise"]
def my_targets(image_ids):
    """image_ids (B,). Returns targets (B, B) whose rows sum to one."""
    ### BEGIN SOLUTION
    same = (image_ids[:, None] == image_ids[None, :]).float()
    return same / same.sum(dim=1, keepdim=True)
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_targets(my_targets)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What this CLIP does not learn
# A sharper test: for each test picture, take its true caption and change **one fact**. The changed fact is another object,
# color, size or count; or a relation replaced by its opposite ("left of" becomes "right of"); or the two objects **swapped**.
# Which of the two captions gets the larger cosine? Chance is .5. Three seeds.

# %%
drawing.bars_with_spread(
    {"CLIP nano": by_variant("clip_seeds")["CLIP nano"]},
    [f"counterfactual: {kind}" for kind in ("object", "color", "size", "count", "relation", "swap")],
)

# %% tags=["check", "nbval-check-output"]
kinds = counterfactual(model, test, tokenizer)
assert kinds["object"].value > 0.75 and max(kinds["relation"].value, kinds["swap"].value) < 0.65
print("another object: above .75; opposite relation and swapped objects: below .65, close to chance")

# %% [markdown]
# What does "chance" look like? For 300 pictures with two objects we draw the cosine of the true caption minus that of the
# changed one. Right of 0 the model prefers the true caption.

# %%
two = [row for row in range(len(test)) if len(test.scene(row).objects) == 2][:300]
changed = {row: test.scene(row).counterfactuals(random.Random(0)) for row in two}
two = [row for row in two if {"object", "swap"} <= set(changed[row])]
with torch.no_grad():
    vectors = model.embed_images(to_tensor(test.pixels(two, size)))
    cosines = {}
    for name in ("true", "object", "swap"):
        texts_of = [test.captions(row)[0] if name == "true" else changed[row][name] for row in two]
        cosines[name] = (vectors * model.embed_texts(tokenize(tokenizer, texts_of, CONTEXT))).sum(dim=1)
for name in ("true", "object", "swap"):
    print(f"{name:7} {test.captions(two[0])[0] if name == 'true' else changed[two[0]][name]}: {cosines[name][0]:.2f}")
drawing.differences(
    {"another object": cosines["true"] - cosines["object"], "objects swapped": cosines["true"] - cosines["swap"]},
    "cosine: true minus changed",
    test[two[0]].image,
)

# %% [markdown]
# For swapped objects the differences are close to 0 and lie on both sides: the text tower gives both captions nearly the same
# vector. On a single picture the model is right or wrong by chance.
#
# Why? We do not know for sure. Two explanations are common. First, the training question can nearly always be answered by
# *which* objects there are: in few batches do two pictures show the same objects in the same colors with different captions.
# So a [**bag of words**](../docs/glossary.md#bag-of-words), which ignores order, is enough
# ([Yuksekgonul et al. 2023](https://arxiv.org/abs/2210.01936)). We can count such batches:

# %% tags=["nbval-check-output"]
found_in, of = exercise.same_objects_elsewhere(scenes, batch_size=64)
print(f"two pictures with the same objects and colors, but other captions: in {found_in} of {of} batches")

# %% [markdown]
# Second, the design: picture and text are combined only at the end, as two vectors. Which explanation holds here would
# need an experiment that changes one and keeps the other. CLIP with made negative captions is such an experiment; it is
# called NegCLIP in the paper above. ALBEF in lesson 03 changes both at once, so it cannot decide the question.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same code on real photographs
# Only the dataset changes: twelve openly licensed photographs. A model that has seen only drawn scenes knows little about
# photographs. So we train a small model on these twelve until it has memorized them, which shows that the code runs. For a
# real experiment use a folder of your own (`docs/your_own_data.md`).

# %% tags=["check", "nbval-check-output"]
photos = Photos()
torch.manual_seed(0)
album = CLIP(CLIPConfig.nano(len(tokenizer)))
fit(album, Loader(photos, tokenizer, 12, 64, seed=0).batch, recipe.settings(steps=60, warmup=5), bar=False)
on_photos = {name: retrieval(some, photos, tokenizer, unique=None)["text to image R@1"].value
             for name, some in (("trained on scenes", model), ("trained on these photos", album))}
assert on_photos["trained on scenes"] < 0.5 and on_photos["trained on these photos"] > 0.6
print(f"R@1 on {len(photos)} photos: below .5 if trained on scenes, above .6 if trained on these very photos")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What the paper reported, and what we measured
#
# | | [the paper](https://arxiv.org/abs/2103.00020) | here |
# |---|---|---|
# | data | 400 million pairs from the web | 12,000 scenes, drawn |
# | batch size | 32,768 | 64 |
# | training time | largest ViT: 12 days on 256 V100 GPUs (section 2.5) | two to three minutes on two CPU cores |
# | zero-shot | ImageNet 76.2 % for the best model (Table 1) | 52 names of objects: see above |
# | retrieval, zero-shot, R@1 | Flickr30k 88.0 text, 68.7 image (Table 13) | .75 to .78 text, .79 image, of 500 |
# | temperature | learned, start .07, logits at most 100 | a good start matters; learning it made no difference in 150 steps |
# | relations | not measured | .49 to .55, three seeds; chance .5 |
#
# The columns cannot be compared with each other: data, sizes and tasks differ.

# %% tags=["nbval-check-output"]
for name, value in spread(by_variant("clip_seeds")["CLIP nano"]).items():
    if "swap" in name or "object" in name:
        print(f"{name}: {value}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Recap
# * CLIP encodes pictures and texts separately: one token of each tower, projected to a vector of length one.
# * It is trained by a symmetric contrastive loss over a batch. Without negatives all vectors become the same.
# * One training gives retrieval and zero-shot classification.
# * The last layer's values of the patches say where an object is; the outputs of the patches do not.
# * Our CLIP checks objects, colors and, less well, sizes and counts. It ignores order: relations and swaps are at chance.
#
# **To discuss**
# 1. Why are both directions, rows and columns, part of the loss?
# 2. Which batch would force the model to learn *left of*?
# 3. The batch with the smallest size scored best here. Plan an experiment that isolates the number of negatives.
#
# <details><summary>Answers</summary>
#
# 1. Rows alone do not compare pictures for one caption. A picture whose vector is close to all captions would hurt image
#    retrieval and hardly change the row losses.
# 2. One with several pictures of the same objects in other arrangements, or with the swapped caption as an extra column.
# 3. Keep batch, steps and learning rate fixed, and compute the loss within blocks of 8, 16 or 64 pairs of the batch.
#
# </details>
#
# **Next:** [02 · ViLT](02_vilt.ipynb), one transformer that reads words and patches together.
