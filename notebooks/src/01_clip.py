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
# **Goals.** You write this loss, train the model, measure retrieval and zero-shot classification, and find out which facts
# of a caption the model checks and which it ignores.
#
# **Prerequisites.** Lesson 00 (tokens, patches, class token, attention); softmax and cross-entropy.
#
# **Time.** 45 minutes to read, of which two to three minutes are training on two CPU cores; 50 minutes for the exercises.

# %% tags=["setup"] slideshow={"slide_type": "skip"}
import random
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

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
from minivlp.layers.attention import record_attention
from minivlp.lessons import clip as exercise
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
# Each tower turns its input into a vector of length one. The dot product of two such vectors is their **cosine**: 1 if
# they point in the same direction, 0 if they are orthogonal. Rows are pictures and columns are captions, so the matching
# pairs are on the diagonal. First a model with random weights:

# %%
fresh = CLIP(CLIPConfig.nano(len(tokenizer))).eval()
trained = load_model(CLIP, bundled("clip_nano"))
images = to_tensor(scenes.pixels(four, 64))
captions = [scenes.captions(row)[0] for row in four]
text = tokenize(tokenizer, captions, max_tokens=CONTEXT)
with torch.no_grad():
    tables = {name: m.embed_images(images) @ m.embed_texts(text).T for name, m in
              {"fresh": fresh, "trained": trained}.items()}
drawing.similarity_matrix(tables["fresh"].numpy(), captions, [scenes[row].image for row in four])

# %% [markdown] slideshow={"slide_type": "subslide"}
# And the trained model that comes with minivlp (the **bundled** model; the same kind of model as you will train, with more
# scenes and more steps):

# %%
drawing.similarity_matrix(tables["trained"].numpy(), captions, [scenes[row].image for row in four])

# %% tags=["check", "nbval-check-output"]
for name, table in tables.items():
    own, others = table.diagonal().mean(), (table.sum() - table.diagonal().sum()) / 12
    print(f"{name:8} mean cosine of a picture with its own caption {own:5.1f}, with the other captions {others:5.1f}")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The loss, by hand
# Let $x_i$ be the vector of picture $i$ and $y_j$ that of caption $j$, both of length one, in a batch of $B$ pairs. A
# softmax turns row $i$ of the table into probabilities, and the loss is minus the logarithm of the probability of the
# right caption. The same is done for the columns. The mean of both is the **symmetric contrastive loss** (InfoNCE):
#
# $$\mathcal{L} = -\frac{1}{2B}\sum_{i=1}^{B}\left[\log\frac{\exp(x_i^\top y_i/\tau)}{\sum_{j}\exp(x_i^\top y_j/\tau)}
# {} + \log\frac{\exp(x_i^\top y_i/\tau)}{\sum_{j}\exp(x_j^\top y_i/\tau)}\right]$$
#
# $\tau$ is the **temperature**. Cosines lie between -1 and 1. Without division by a small $\tau$, the probability of the
# right one of 64 captions could not exceed $e^{1}/(e^{1}+63\,e^{-1}) = .10$.

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

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The model
# CLIP is this loss and two ordinary transformers (`minivlp/models/clip.py`). In each, the output of one token (the class
# token of the picture, the last token of the text) is multiplied by a matrix into the shared space.
# Our nano model is a small version of the published one. It differs in a few choices, which come from a prototype that had
# to learn within minutes:
#
# | field of the config | published | nano | why |
# |---|---|---|---|
# | `two_step_patches` | one projection per patch | two small ones | learned faster in the prototype |
# | `sincos_positions` | learned | fixed sine waves | positions differ from the first step on |
# | `activation` | QuickGELU | ReLU | needs less memory |
# | `word_std`, `position_std` | .02, .01 | .5, .2 | larger initial embeddings; not tested separately |
# | `diagonal_only` | yes | no | two captions of one picture count as positives; the loss is nearly the same (exercise 4) |
#
# The optimizer differs as well: Muon for the matrices inside the blocks, AdamW for the rest (`docs/recipe.md`).

# %% tags=["nbval-check-output"]
model = recipe.build(CLIP, tokenizer)
count = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("image", "text")}
print({part: f"{n / 1e6:.2f} M" for part, n in count.items()})

# %% [markdown] slideshow={"slide_type": "slide"}
# ## First, overfit one batch
# Before a long run, train on the same sixteen pairs again and again. If the loss does not fall to almost 0, there is a
# bug in the model or in the loss.

# %% tags=["check", "nbval-check-output"]
loader = Loader(scenes, tokenizer, recipe.batch_size, recipe.size, seed=0)
one_batch = Loader(scenes, tokenizer, 16, recipe.size, seed=0).batch(0)
losses = overfit_one_batch(CLIP(CLIPConfig.nano(len(tokenizer))), one_batch, steps=40)
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
# **Retrieval** on test scenes with 500 different captions. For each caption, which rank does its picture have among the
# five hundred (text to image)? For each picture, which rank does its caption have (image to text)? **R@k** (recall at k)
# is the share whose partner is among the first k. The column `chance` is what random ranks would give.
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
rows = [5, 17, 29, 41]
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

# %% [markdown] slideshow={"slide_type": "slide"}
# **Zero-shot classification.** The model was never trained to classify. Write each class name as a caption; the class
# whose caption has the largest cosine with the picture is the answer. Here are pictures with one object each and 52 names,
# so chance is 1/52. (All names occur in training captions, and similar pictures do too. "Zero-shot" means that no
# classifier was trained, not that the objects are new.)

# %% tags=["nbval-ignore-output"]
single = Scenes(400, split="all", seed=11, size=recipe.size, objects=(1, 1))
names = sorted({scene.objects[0].noun for scene in map(single.scene, range(len(single)))})
zero_shot(model, single, tokenizer, names, prompts=("a {}", "there is a {}", "a picture of a {}"))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Which patches does it use?
# The picture's vector is computed from the class token. From which patches does the class token take its values? One map
# is the attention of the last layer. **Rollout** ([Abnar and Zuidema 2020](https://arxiv.org/abs/2005.00928)) multiplies
# the attention of all layers. Bright patches have the largest weight; dashed boxes are the objects that the caption names.
# The model is the bundled one.

# %%
shown = [2, 9, 0, 5]
with torch.no_grad(), record_attention(trained) as maps:
    trained.encode_image(to_tensor(test.pixels(shown, 64)))
layers = [maps[f"image.{n}.self"] for n in range(trained.config.image.layers)]
rolled = attention.to_grid(attention.cls_map(attention.rollout(layers)))
last = attention.to_grid(attention.cls_map(layers[-1]))
drawing.attention_grid([test[row] for row in shown], {"rollout": rolled, "last layer": last})

# %% [markdown]
# Four pictures prove little, so we measure: which share of the attention falls inside the object's box? Chance is the share
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
mine = CLIP(replace(CLIPConfig.nano(len(tokenizer)), learn_temperature=True, temperature=0.07))
if profile() != "quick":
    fit(mine, loader.batch, recipe.settings(steps=150))
    print(retrieval(mine, test, tokenizer)["text to image R@1"])
else:
    print(f"temperature {1 / mine.itc_head.scale().item():.2f}; not trained: profile quick skips this run of 150 steps")

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
with drawing.style():
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.7), layout="constrained", width_ratios=[1, 1.6, 1.6])
    axes[0].imshow(test[two[0]].image), axes[0].axis("off")
    for ax, name, title in zip(axes[1:], ("object", "swap"), ("another object", "objects swapped"), strict=True):
        ax.hist(cosines["true"] - cosines[name], bins=24, range=(-0.6, 1.0), color=drawing.BLUE)
        ax.axvline(0, color=drawing.INK, ls=(0, (3, 2)))
        ax.set(title=title, xlabel="cosine: true minus changed")
    axes[1].set_ylabel("pictures")
    plt.show()
for name in ("true", "object", "swap"):
    print(f"{name:7} {test.captions(two[0])[0] if name == 'true' else changed[two[0]][name]}: {cosines[name][0]:.2f}")

# %% [markdown]
# For swapped objects the differences are close to 0 and lie on both sides: the text tower gives both captions nearly the same
# vector. On a single picture the model is right or wrong by chance.
#
# Why? We do not know for sure. Two explanations are common. First, the training question can nearly always be answered by
# *which* objects there are: in few batches do two pictures show the same objects in the same colors with different captions.
# So a **bag of words**, which ignores order, is enough
# ([Yuksekgonul et al. 2023](https://arxiv.org/abs/2210.01936)). We can count such batches:

# %% tags=["nbval-check-output"]
shuffled, batches_with = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(0)), 0
batches = shuffled[: len(shuffled) // 64 * 64].view(-1, 64)[:100]
for rows_of_batch in batches.tolist():
    captions_of = {}
    for scene in map(scenes.scene, rows_of_batch):
        if len(scene.objects) > 1:
            objects = tuple(sorted((item.noun, str(item.color)) for item in scene.objects))
            captions_of.setdefault(objects, set()).add(scene.captions()[0])
    batches_with += any(len(captions) > 1 for captions in captions_of.values())
print(f"two pictures with the same objects and colors, but other captions: in {batches_with} of {len(batches)} batches")

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

# %%
drawing.show_scenes([photos[2]], columns=2, boxes=True)

# %% [markdown] slideshow={"slide_type": "slide"}
# # Exercises
# Each has a check that says which property failed. Solutions are in the executed notebook.
#
# ## 1 · The loss *(easy, 10 minutes)*
# Write the symmetric contrastive loss of `B` pairs of unit vectors.
# *Predict first:* which loss would a model with random weights have for B = 64?
# *Hint:* `F.cross_entropy(table, torch.arange(B))` is the mean of the row losses.

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
# ## 2 · R@k *(easy, 10 minutes)*
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

# %% [markdown]
# ## 3 · Zero-shot classification *(medium, 15 minutes)*
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

# %% [markdown]
# ## 4 · Two captions of one picture *(medium, 15 minutes)*
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
# * CLIP encodes pictures and texts separately and is trained by a symmetric contrastive loss over a batch.
# * One training gives retrieval and zero-shot classification.
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
