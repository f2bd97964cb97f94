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
# Our CLIP is at chance on *left of*. Does it help if words and patches are read together?
#
# Most models before ViLT did this with a transformer, but first ran an object detector over the picture. The detector was
# slow and knew a fixed list of objects. ViLT ([Kim, Son and Kim 2021](https://arxiv.org/abs/2102.03334)) has neither a
# detector nor an image tower. A word becomes a vector by a table. A [patch](../docs/glossary.md#patch) becomes a vector by
# **one matrix product**. Then **one transformer** reads words and patches together, from its first layer on. Such a model is
# called a [**single stream**](../docs/glossary.md#single-stream).
#
# | | |
# |---|---|
# | **After this lesson you can** | say where a model does its computation; build ViLT from its parts, the self-attention included; compute optimal transport between words and patches; say why relation words are masked alone |
# | **You need** | lessons 00 and 01: transformer, class token, contrastive loss |
# | **Time** | 60 minutes to read and 75 for the exercises. The cells need about 8 minutes in profile `laptop` on two cores |

# %% tags=["setup"] slideshow={"slide_type": "skip"}
import json
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from minivlp.data.batch import Text, to_tensor
from minivlp.data.english import RELATION_WORDS
from minivlp.data.grammar import COLORS, OBJECTS
from minivlp.data.scenes import Scenes
from minivlp.data.text import content_free_ids, group_words, load_tokenizer, tokenize, word_ids
from minivlp.data.tokenizer_training import pieces_tokenizer
from minivlp.device import profile
from minivlp.evaluation.cost import cost
from minivlp.evaluation.grounding import pointing_game
from minivlp.evaluation.matching import counterfactual, masked_words
from minivlp.evaluation.records import by_variant
from minivlp.evaluation.score import Scores
from minivlp.layers.attention import record_attention
from minivlp.layers.embeddings import ImageEmbedding, TextEmbedding
from minivlp.layers.heads import MaskedLMHead
from minivlp.layers.transformer import Block, FeedForward
from minivlp.layers.weights import copy_parts
from minivlp.lessons import vilt as exercise
from minivlp.lessons.check import attempt
from minivlp.lessons.common import milliseconds, multiplications, object_words
from minivlp.models.albef import ALBEF
from minivlp.models.clip import CLIP
from minivlp.models.vilt import ViLT
from minivlp.objectives.alignment import cosine_cost, inner_words, ipot
from minivlp.objectives.masking import IGNORE, WordMasking
from minivlp.papers import paper
from minivlp.training.checkpoint import bundled, load_model
from minivlp.training.loop import fit, overfit_one_batch
from minivlp.visualize import attention, drawing
from minivlp.visualize.widgets import AttentionViewer, LiveCurves

recipe = paper("vilt").recipe(profile())
tokenizer = load_tokenizer()
CONTEXT = 56  # the nano models read texts of up to 56 tokens
_ = torch.manual_seed(0)  # the same numbers in every run; without "_ =" the notebook would print the generator

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The idea

# %%
drawing.structure("ViLT")

# %% [markdown]
# The figure has the sizes of the paper; ours has 4 layers. There is no image tower and no text tower. Three losses are
# computed from the outputs:
#
# * [**Image-text matching (ITM)**](../docs/glossary.md#image-text-matching): from the output of `[CLS]`, a classifier gives
#   the probability $p$ that the pair matches. With the label $y$ (1 for a pair that matches, 0 for a negative):
#   $\mathcal{L}_\mathrm{itm} = -y \log p - (1 - y) \log (1 - p)$, averaged over all pairs.
# * [**Masked language modeling (MLM)**](../docs/glossary.md#masked-language-modeling): some words are replaced by `[MASK]`.
#   From the output at each masked position $m$, a classifier over the vocabulary predicts the word $w_m$ that stood there:
#   $\mathcal{L}_\mathrm{mlm} = -\frac{1}{|M|}\sum_{m \in M} \log p(w_m)$.
# * [**Word-patch alignment (WPA)**](../docs/glossary.md#word-patch-alignment): the cost of moving words onto patches. It is
#   explained below.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Where does the computation go?
# Every model has an image encoder (**VE**, visual embedding), a text encoder (**TE**, textual embedding) and the modality
# interaction (**MI**; see lesson 00). We run the parts of three nano models on the same 64 pairs. Left: milliseconds on this
# machine. Right: multiplications, which are the same on every machine. Weights do not matter for this, so they are random.

# %%
scenes = Scenes(recipe.scenes, split="train", seed=0, size=recipe.size, objects=recipe.objects)
images = to_tensor(scenes.pixels(range(64), 64))
text = tokenize(tokenizer, [scenes.captions(row)[0] for row in range(64)], CONTEXT)
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
        lambda: vilt.match_head(vilt.joint(vilt_image, text, first)),  # includes the embedding of words, once more
    ),
}
measures = {
    "ms for 64 pairs": milliseconds,
    "million multiplications for a pair": lambda run: multiplications(run) / 64 / 1e6,
}
with torch.no_grad():
    measured = {unit: {name: [measure(run) for run in runs] for name, runs in parts.items()} for unit, measure in measures.items()}
drawing.stacked_bars(measured, {"VE": drawing.BLUE, "TE": drawing.ORANGE, "MI": drawing.GREEN})

# %% tags=["check", "nbval-check-output"]
share = {name: values[2] / sum(values) for name, values in measured["million multiplications for a pair"].items()}
assert share["CLIP"] < 0.01 and 0.1 < share["ALBEF"] < 0.6 and share["ViLT"] > 0.9
print("share of the multiplications in the modality interaction: " + ", ".join(f"{k} {v:.0%}" for k, v in share.items()))

# %% [markdown] slideshow={"slide_type": "subslide"}
# At this size a pair costs ViLT about as much as ALBEF. The paper compares with models that have a detector: UNITER takes
# about 900 ms for a pair, ViLT-B/32 about 15 ms (Table 6, without the embedding of words).
#
# **The disadvantage:** nothing can be computed in advance. CLIP stores one vector for each picture and each caption. ViLT
# has no vector of a picture alone, so a thousand pictures and a thousand captions need a million forward passes. We measure
# twenty by twenty and multiply. (The result depends on the machine and on what else runs on it; other lessons that measure
# a million pairs were run at another time.)

# %% tags=["nbval-ignore-output"]
test = Scenes(1500, split="test", seed=7)
by_clip, by_vilt = (cost(model, test, tokenizer).scaled(1000, 1000) for model in (clip, vilt))
print(f"CLIP: {by_clip.encodings:9,} passes of a tower, {by_clip.seconds_once:5.1f} seconds")
print(f"ViLT: {by_vilt.pairs:9,} passes of a pair,  {by_vilt.seconds_pairs / 60:5.1f} minutes")

# %% [markdown]
# So ViLT suits questions about a given pair better than search. Lesson 03 shows a model that can do both.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## One sequence of tokens
# These are the inputs of the transformer for three pairs of a batch. The text comes first, padded to the longest caption
# (hatched). Then come the picture's class token and its 64 patches, row by row; we draw 14 of them.

# %%
lengths = text.mask.sum(dim=1)
three = [next(row for row in range(64) if lengths[row] == n) for n in sorted(set(lengths.tolist())) if n <= 12][::2][-3:]
shown = text[three].trimmed()
tokens = [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in shown.ids]
tokens = [[t if real else None for t, real in zip(*row, strict=True)] for row in zip(tokens, shown.mask.tolist(), strict=True)]
drawing.token_strip(tokens, scenes.pixels(three, 64), range(24, 38))  # patches in the middle of the picture

# %% [markdown]
# [**Position embedding**](../docs/glossary.md#position-embedding): each token gets a vector for its place in the sentence
# or in the picture. [**Token-type embedding**](../docs/glossary.md#token-type-embedding): one learned vector is added to
# all text tokens, another to all image tokens. **Attention mask:** no token attends to padding. We check the last point: a
# caption alone must give the same result as in a batch with longer ones.

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
print("with the mask, padding does not change the result; without the mask it does")

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### Exercise 1 · One sequence *(easy, 10 minutes)*
# Put words and patches into one sequence, text first, and add to every token its token-type embedding. Also return the mask:
# which tokens may be attended to?
#
# *Predict first:* which will fail if padding is set to 0 instead of masked: a caption alone, or the same caption in a
# batch with longer ones?
#
# <details><summary>Hint 1</summary>Both results have as many tokens as text and image together: <code>L + 1 +
# P</code>.</details>
# <details><summary>Hint 2</summary><code>token_type[0]</code> has the shape (D,), so it can be added to (B, L, D) as it
# is.</details>
# <details><summary>Hint 3</summary><code>torch.cat([first, second], dim=1)</code> puts the tokens of each pair in one row;
# for the mask it is the same.</details>

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
# ## Build it: ViLT from its parts
# The whole model is an embedding of words, an embedding of patches, a stack of blocks and three small heads. You know the
# block from lesson 00: self-attention, then a feed-forward layer, each behind a [LayerNorm](../docs/glossary.md#layernorm)
# and with a [residual connection](../docs/glossary.md#residual-connection):
#
# $$h = x + \mathrm{Attention}(\mathrm{LN}(x)), \qquad y = h + \mathrm{FFN}(\mathrm{LN}(h))$$
#
# The summary of a pair is the output at `[CLS]`, passed through one more layer with $\tanh$. This is BERT's
# [**pooler**](../docs/glossary.md#pooler).

# %% tags=["nbval-check-output"]
class MyViLT(nn.Module):
    """B pairs, L text tokens, P patches, N = L + 1 + P tokens in one sequence, D width, V vocabulary."""

    def __init__(self, config):
        super().__init__()
        block, width = config.image.block, config.image.block.width
        self.words = TextEmbedding(config.text, norm_eps=1e-12)  # a table, learned positions, LayerNorm
        self.patches = ImageEmbedding(config.image)  # a projection, positions, a class token in front
        self.token_type = nn.Parameter(0.02 * torch.randn(2, width))
        self.blocks = nn.ModuleList(Block(block) for _ in range(config.image.layers))
        self.norm = nn.LayerNorm(width, eps=block.norm_eps)
        self.pooler, self.match = nn.Linear(width, width), nn.Linear(width, 2)
        self.mlm = MaskedLMHead(width, config.text.vocabulary, norm_eps=1e-12)

    def forward(self, images, text):
        words = self.words(text.ids) + self.token_type[0]  # (B, L, D)
        patches = self.patches(images) + self.token_type[1]  # (B, 1+P, D)
        x = torch.cat([words, patches], dim=1)  # (B, N, D)
        real = F.pad(text.mask, (0, patches.shape[1]), value=True)  # (B, N): all image tokens are real
        for block in self.blocks:
            x = block(x, real[:, None, None, :])  # the mask broadcasts to (B, heads, queries, keys)
        return self.norm(x)  # (B, N, D)

    def itm_logits(self, tokens):
        return self.match(self.pooler(tokens[:, 0]).tanh())  # (B, 2), column 1: the pair matches

    def mlm_logits(self, tokens, length):
        return self.mlm(tokens[:, :length])  # (B, L, V)


mine = MyViLT(trained.config)
pair, its_words = images[three], text[three].trimmed()
with torch.no_grad():
    tokens = mine(pair, its_words)
    print("pictures", tuple(pair.shape), "and texts", tuple(its_words.ids.shape), "-> tokens", tuple(tokens.shape))
    print("ITM", tuple(mine.itm_logits(tokens).shape), "· MLM", tuple(mine.mlm_logits(tokens, its_words.length).shape))

# %% [markdown]
# Is it the same as the library's `minivlp.models.vilt.ViLT`? We copy the weights of the bundled model into ours, part by
# part, and compare what both say about these pairs.

# %% tags=["check", "nbval-check-output"]
joint, head = trained.joint, trained.match_head
copied = {"words": joint.text_embed, "patches": joint.image_embed, "token_type": joint.token_type, "blocks": joint.blocks}
copied |= {"norm": joint.norm, "pooler": head.pooler.dense, "match": head.classifier, "mlm": trained.mlm_head}
copy_parts(copied, mine)
with torch.no_grad():
    tokens = mine(pair, its_words)
    assert torch.allclose(mine.itm_logits(tokens).softmax(dim=1)[:, 1], trained.match(pair, its_words), atol=1e-5)
    assert torch.allclose(mine.mlm_logits(tokens, its_words.length), trained.mlm_logits(pair, its_words), atol=1e-4)
assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in trained.parameters())
print("the same probability of a match and the same words as minivlp.models.vilt.ViLT, with the same number of parameters")

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### Exercise 2 · Build the paper: a masked self-attention block *(hard, 40 minutes)*
# `Block` hides the most important step. Write it yourself: $x + \mathrm{Attention}(\mathrm{LN}(x))$ with several
# [heads](../docs/glossary.md#head) and a mask. With $H$ heads, each head has $D/H$ channels. For one head:
#
# $$\mathrm{Attention} = \mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{D/H}} + M\right) V, \qquad
# M_{ij} = \begin{cases} 0 & \text{token } j \text{ is real} \\ -\infty & \text{token } j \text{ is padding}\end{cases}$$
#
# The results of the heads stand side by side, and a last linear layer, `out`, mixes them.
#
# *Predict first:* in which of these cases will a caption in a padded batch get another result than alone: (a) the mask is
# left out; (b) the scores of padding are set to 0; (c) the scores of padding are set to $-\infty$?
#
# The check needs these names: `self.norm`, an `nn.LayerNorm(width)`; `self.qkv`, an `nn.Linear(width, 3 * width)` whose
# outputs are queries, keys and values, in this order; `self.out`, an `nn.Linear(width, width)`.
#
# <details><summary>Hint 1</summary>Steps and shapes: LayerNorm (B, N, D); <code>qkv</code> (B, N, 3D); <code>chunk(3,
# dim=-1)</code> gives three times (B, N, D); each is cut into heads, (B, H, N, D/H); scores (B, H, N, N); weights of the
# same shape; mixed values (B, H, N, D/H); side by side (B, N, D); <code>out</code>; plus x.</details>
# <details><summary>Hint 2</summary>Cut into heads: <code>q.unflatten(-1, (H, -1)).transpose(1, 2)</code>. Back:
# <code>mixed.transpose(1, 2).flatten(2)</code>.</details>
# <details><summary>Hint 3</summary>The mask (B, N) belongs to the keys, the last axis of the scores:
# <code>scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(dim=-1)</code>.</details>

# %% tags=["exercise"]
class MyAttention(nn.Module):
    """x + attention(LayerNorm(x)). The width is a multiple of the number of heads."""

    def __init__(self, width, heads):
        super().__init__()
        ### BEGIN SOLUTION
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        ### END SOLUTION

    def forward(self, x, mask):
        """x (B, N, D), mask (B, N) bool, True on tokens that may be attended to. Returns (B, N, D)."""
        ### BEGIN SOLUTION
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)  # (B, H, N, D/H)
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # (B, H, N, N)
        weights = scores.masked_fill(~mask[:, None, None, :], -torch.inf).softmax(dim=-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))
        ### END SOLUTION

# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_attention(MyAttention)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Now train with it.** We put your attention into the model, with a feed-forward layer behind it, and overfit sixteen
# pairs from random weights: the captions are `a [MASK] heart` and the like, and the model must say the color. For comparison,
# the same with a block in which no token attends to any other. Without attention all masked positions have the same input,
# so the best that it can do is to predict how frequent each color is; that loss is the last column.

# %% tags=["nbval-ignore-output", "needs-solution"]
class MyBlock(nn.Module):
    def __init__(self, attention, config):
        super().__init__()
        self.attention = attention(config.width, config.heads)
        self.norm = nn.LayerNorm(config.width)
        self.feed = FeedForward(config.width, config.hidden, config.activation)

    def forward(self, x, mask):
        x = self.attention(x, mask[:, 0, 0])  # (B, 1, 1, N) -> (B, N)
        return x + self.feed(self.norm(x))


class NoAttention(nn.LayerNorm):
    """Every token stays by itself."""

    def __init__(self, width, heads):
        super().__init__(width)

    def forward(self, x, mask):
        return x + super().forward(x)


singles = Scenes(200, split="train", seed=1, size=64, objects=(1, 1))
named = [row for row in range(200) if singles.captions(row)[0].split()[1] in COLORS and len(singles.captions(row)[0].split()) == 3][:16]
sixteen, said = to_tensor(singles.pixels(named, 64)), tokenize(tokenizer, [singles.captions(row)[0] for row in named], CONTEXT)
colors = said.ids[:, 2]  # [CLS] a red heart [SEP]
asked = said.with_ids(said.ids.index_fill(1, torch.tensor([2]), tokenizer.mask_token_id))


def short_run(attention, steps=40):
    torch.manual_seed(0)
    small = MyViLT(trained.config)
    small.blocks = nn.ModuleList(MyBlock(attention, trained.config.image.block) for _ in range(2))
    optimizer, losses = torch.optim.AdamW(small.parameters(), lr=1e-3), []
    for _ in range(steps):
        loss = F.cross_entropy(small.mlm_logits(small(sixteen, asked), said.length)[:, 2], colors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


share = colors.unique(return_counts=True)[1] / len(colors)
frequent = -(share * share.log()).sum()
curves = {"your attention": short_run(MyAttention), "no attention": short_run(NoAttention)}
for name, losses in curves.items():
    print(f"{name:<15} loss at first {losses[0]:.2f}, after 40 steps {losses[-1]:.2f}; by the colors' frequency {frequent:.2f}")

# %% tags=["check", "nbval-check-output", "needs-solution"]
assert curves["your attention"][-1] < 0.5 * frequent < curves["no attention"][-1]
print("with your attention the colors are learned; without attention they are not")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Moving words onto patches
# Does a caption match a picture? **Word-patch alignment** measures what it costs to move the words onto the patches. Moving
# word $i$ to patch $j$ costs $C_{ij} = 1 - \cos(w_i, v_j)$, where $w_i$ and $v_j$ are their output vectors. Each of $L$ words
# has $1/L$ to give and each of $P$ patches takes $1/P$. A **plan** $T_{ij} \ge 0$ says how much goes from word to patch.
# [**Optimal transport**](../docs/glossary.md#optimal-transport) is the plan of lowest cost:
#
# $$\min_{T} \sum_{ij} T_{ij} C_{ij} \quad\text{with}\quad \sum_j T_{ij} = \tfrac{1}{L},\; \sum_i T_{ij} = \tfrac{1}{P}$$
#
# A small example with made-up costs: three words, four patches. The plan is found step by step with IPOT (inexact proximal
# point method, [Xie et al. 2020](https://arxiv.org/abs/1802.04307)).

# %%
word_names, shown = ["red", "heart", "dog"], ["heart", "heart", "dog", "ground"]
price = [[0.3, 0.4, 0.9, 0.8], [0.1, 0.2, 0.9, 0.9], [0.9, 0.8, 0.1, 0.7]]


def move(price, steps, beta=0.5):
    """A plan by inexact proximal steps (Xie et al. 2020), element by element."""
    n, m = len(price), len(price[0])
    plan, give = [[1.0] * m for _ in range(n)], [1 / n] * n
    for _ in range(steps):
        # take the plan so far, and increase the entries of low cost
        step = [[plan[i][j] * math.exp(-price[i][j] / beta) for j in range(m)] for i in range(n)]
        # rescale the columns so that every patch takes 1 / m, then the rows so that every word gives 1 / n
        take = [1 / m / sum(give[i] * step[i][j] for i in range(n)) for j in range(m)]
        give = [1 / n / sum(step[i][j] * take[j] for j in range(m)) for i in range(n)]
        plan = [[give[i] * step[i][j] * take[j] for j in range(m)] for i in range(n)]
    return plan


plans = {steps: torch.tensor(move(price, steps)) for steps in (1, 5, 50)}
shares = {f"plan, {steps} step{'s' * (steps > 1)}": plan.numpy() for steps, plan in plans.items()}
drawing.number_tables({"cost": torch.tensor(price).numpy(), **shares}, word_names, shown, percent=list(shares))

# %% [markdown]
# Each step starts from the plan of the step before. After fifty steps, *heart* goes to the hearts and *dog* to the dog.
# The ground patch must take its share too, although no word names it. It takes half of *red*, because *heart* costs less
# elsewhere, and the part of *dog* that the dog patch cannot take.

# %% tags=["nbval-check-output"]
for steps, plan in plans.items():
    cents = 100 * (plan * torch.tensor(price)).sum()
    print(f"{steps:2} steps: the plan costs {cents / 100:.2f}; from heart to dog {100 * plan[1, 2]:.0f} %")

# %% [markdown]
# The library computes this for a whole batch, with padding. Check that both agree:

# %% tags=["check", "nbval-check-output"]
everything = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
assert torch.allclose(ipot(torch.tensor(price)[None], *everything)[0], plans[50], atol=1e-5)
assert torch.allclose(plans[50].sum(dim=1), torch.full((3,), 1 / 3))
assert torch.allclose(plans[50].sum(dim=0), torch.full((4,), 1 / 4), atol=1e-3)
print("the loop and the library agree; words give a third each, patches take a quarter")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **As a loss.** Let $\langle T, C\rangle = \sum_{ij} T_{ij} C_{ij}$ be the transport cost of a pair. It should be low for
# matching pairs and high for mismatched ones. For a batch of $B$ pairs:
#
# $$\mathcal{L}_\mathrm{wpa} = \frac{0.1}{B}\Big(\sum_{\text{matching}} \langle T, C\rangle
# {} - \sum_{\text{mismatched}} \langle T, C\rangle\Big)$$
#
# The plan $T$ counts as a constant, so the gradient flows through the cost $C$ only: words move toward the patches to
# which the plan sends them. We compare the cost for 64 matching pairs with that for 64 mismatched pairs:

# %% tags=["check", "nbval-check-output"]
with torch.no_grad():
    moves = {}
    for name, others in {"own picture": images, "another's": images.roll(1, dims=0)}.items():
        picture = trained.joint.embed_images(others)
        moves[name] = trained.alignment(trained.joint(picture, text), text.mask, picture.mask).distance  # (64,)
assert moves["own picture"].mean() < moves["another's"].mean() - 0.02
print("the mean transport cost of matching pairs is lower by more than .02")

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### Exercise 3 · The plan, without loops over words and patches *(medium, 20 minutes)*
# Write `move` from above with tensors. Keep the loop over the steps, and the order: columns first, then rows.
#
# *Predict first:* which sums will be exact after a single step, those of the rows or those of the columns?
#
# <details><summary>Hint 1</summary><code>torch.exp(-cost / beta)</code> is the same in all steps. Start from a plan of
# ones.</details>
# <details><summary>Hint 2</summary>Keep a factor for each row in <code>give</code> (L, 1), and compute one for each column,
# <code>take</code> (1, P). <code>sum(dim=0, keepdim=True)</code> keeps the shape for broadcasting.</details>
# <details><summary>Hint 3</summary><code>take = 1 / P / (give * step).sum(dim=0, keepdim=True)</code>, then the same for
# <code>give</code> with the sum over dim 1, then <code>plan = give * step * take</code>.</details>

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
# Compare yours with the plan of the trained model for one pair. `[CLS]`, `[SEP]` and the class token take no part in WPA,
# so we leave them out.

# %%
example = next(r for r in range(60, len(test)) if len(test.scene(r).objects) == 2 and not test.scene(r).background.texture)
caption = test.captions(example)[0]
regions = [region for region in test.regions(example) if region.kind in ("object", "phrase")]
picture, its_text = to_tensor(test.pixels([example], 64)), tokenize(tokenizer, [caption], CONTEXT)
caption_words = group_words(tokenizer, its_text.ids[0])

# %% tags=["check", "nbval-check-output", "needs-solution"]
with torch.no_grad():
    fused, length = trained.cross_encode(picture, its_text), its_text.length
    real = cosine_cost(fused[:, 1 : length - 1], fused[:, length + 1 :])[0]  # (words, 64)
    theirs = trained.transport(picture, its_text)[0][inner_words(its_text.mask)[0]]
assert torch.allclose(attempt(my_plan, real, 0.5, 50), theirs, atol=1e-5)
print("the same plan as the model's")

# %% [markdown]
# A plan also gives a map for each word. Dashed boxes are the objects. **It is a poor map.** Measured below, the strongest
# patch for an object's name lies inside its box in about four of ten cases. The plan must send the same amount to each
# patch, so the ground takes much of every word; and a patch's output also depends on other patches, by attention.

# %%
with torch.no_grad():
    plan = attention.to_grid(trained.transport(picture, its_text)[0])  # (L, 8, 8)
drawing.attention_figure(
    test[example].image,
    [word for word, _ in caption_words],
    [plan[pieces].mean(dim=0).numpy() for _, pieces in caption_words],
    [region.box for region in regions],
    columns=-(-(len(caption_words) + 1) // 2),
)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Mask whole words
# A tokenizer splits rare words into pieces: `gir ##af ##fe`. If one piece is masked, the other two reveal it, and the model
# need not use the picture. So ViLT masks all pieces of a word or none ([**whole-word
# masking**](../docs/glossary.md#whole-word-masking)).
#
# With our tokenizer every word of our captions is one token. For this experiment we make another one that splits the names
# of objects. How often do the remaining pieces leave only one possible name?

# %% tags=["nbval-check-output"]
pieces = pieces_tokenizer()
names = {noun: pieces.tokenize(noun) for noun in OBJECTS}
print(" · ".join(" ".join(names[noun]) for noun in ("butterfly", "penguin", "sunflower", "dog", "frog")))
cases = [(noun, n) for noun, broken in names.items() for n in range(len(broken)) if len(broken) > 1]
rest = {(noun, n): (*names[noun][:n], "?", *names[noun][n + 1 :]) for noun, n in cases}
unique = [question for question in rest.values() if list(rest.values()).count(question) == 1]
print(f"one piece of a name masked: only one name is possible in {100 * len(unique) / len(cases):.0f} % of the cases")

# %% [markdown]
# *Change one thing* below measures whether that matters in training.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### Exercise 4 · Whole words *(easy, 15 minutes)*
# Which tokens are masked? Every word with probability `rate`, all of its pieces or none. Draw new numbers in each call.
#
# *Predict first:* if you draw a number for each *piece* and mask the word when any of its pieces is drawn, which words are
# masked too often?
#
# <details><summary>Hint 1</summary>Draw one random number per word of each row. There are at most as many words as tokens, so
# <code>torch.rand(word.shape)</code> is enough.</details>
# <details><summary>Hint 2</summary><code>draws.gather(1, word)</code> gives every token the number of its word.</details>
# <details><summary>Hint 3</summary>A number below <code>rate</code> masks its word, where <code>maskable</code> allows
# it.</details>

# %% tags=["exercise"]
def my_choice(word, maskable, rate):
    """word (B, L): the index of each token's word, from 0; maskable (B, L) bool: False on [CLS], [SEP] and padding.

    Returns (B, L) bool, True on what is to be masked.
    """
    ### BEGIN SOLUTION
    draws = torch.rand(word.shape)  # there are at most as many words as tokens
    return (draws.gather(1, word) < rate) & maskable
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_whole_words(my_choice)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The three losses in code
# Now all parts of the training are known. `paired[i]` is the picture that caption $i$ is shown with: its own for half of the
# captions, another one for the rest. The negative captions (see *The model*) are further pairs that do not match. Masked
# words are predicted with the right picture, in a pass of their own: with a wrong picture they could not be predicted.

# %%
def my_losses(model, batch, paired, masked):
    """paired (B,): the picture of each caption; masked: the captions with [MASK], and the words that stood there."""
    length, matched = batch.text.length, paired == torch.arange(len(paired))  # (B,)
    tokens = model(batch.images[paired], batch.text)  # (B, N, D)
    negative = model(batch.images, batch.negatives)  # (B, N, D)
    logits = torch.cat([model.itm_logits(tokens), model.itm_logits(negative)])  # (2B, 2)
    itm = F.cross_entropy(logits, F.pad(matched, (0, len(negative))).long())  # negative captions never match

    logits = model.mlm_logits(model(batch.images, masked.text), masked.text.length)  # (B, L, V)
    mlm = F.cross_entropy(logits.flatten(0, 1), masked.labels.flatten(), ignore_index=IGNORE)

    words, patches = tokens[:, :length], tokens[:, length + 1 :]
    price = cosine_cost(words, patches)  # (B, L, P)
    plan = ipot(price, inner_words(batch.text.mask), torch.ones(patches.shape[:2], dtype=torch.bool))
    distance = (plan * price).sum(dim=(1, 2))  # (B,)
    wpa = 0.1 * torch.where(matched, distance, -distance).mean()
    return {"itm": itm, "mlm": mlm, "wpa": wpa}

# %% tags=["check", "nbval-check-output"]
few = replace(recipe, batch_size=8).batches(scenes, tokenizer)(0)
paired = torch.tensor([0, 1, 2, 3, 5, 6, 7, 4])  # the first four captions are shown with their own picture
masked = trained.config.masking.apply(few.text, len(tokenizer))
with torch.no_grad():
    ours, theirs = my_losses(mine, few, paired, masked), trained.losses(few, paired=paired, masked=masked)
assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
print("the same as ViLT.losses:", ", ".join(ours))

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Where it starts from
# The paper starts from a ViT that was trained to classify millions of photographs. When ViLT's own training begins, its
# transformer can already recognize objects. Ours needs a start as well, one that a laptop can make. It is a **grounded single
# stream** (`minivlp/training/grounded_stream.py`; bundled as `joint_nano`): ViLT's own transformer, with the same layers and
# the same sequence of words and patches, trained with two losses before ViLT's training begins. Its image layers and words
# come from the bundled towers (`checkpoints/towers_nano.md`).
#
# * **Boxes.** Every noun of the caption predicts the box of its object, whether the noun is masked or not. The box is read
#   from the noun's token, one layer below the top. The losses are those of X-VLM (lesson 07): the distance between the
#   numbers of the predicted and the true box, and their overlap. To predict the box of *heart*, the token *heart* must
#   find the patches that show the heart. So each noun is tied to a place in the picture
#   ([**grounding**](../docs/glossary.md#visual-grounding)).
# * **Masked words**, read from the top layer.
#
# There is no matching: the start has never seen a false caption. So ViLT's own training still has to learn ITM and WPA.
#
# **What this means for comparisons.** *The start has seen boxes*, and so have the towers that it comes from. ViLT's paper
# uses no boxes, and CLIP in lesson 01 begins with random weights. So our ViLT shows what a single stream can learn *from
# this start*. It does not show that a single stream is better than two towers.
#
# **What the start knows** on test scenes (`checkpoints/joint_nano.md`): the box of a noun overlaps the true one by more
# than half in .96 of the cases, a masked noun is right in .87, and a masked relation word in .98.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### Why relation words are masked alone
# *Left*, *right*, *above* and *below* are **relation words**. In the usual way, each word that names something is masked
# with the same probability, nouns and relation words alike. Then a relation word is often masked together with a noun.
# What can a model learn from that? Take one picture and its caption, mask some words, and list which true captions fit.
#
# *Predict first:* the picture shows a ring below a star. In `a green [MASK] [MASK] a green [MASK]`, which relation words
# are right?

# %% tags=["nbval-check-output"]
true = [test.captions(example)[0], test.captions(example)[2]]  # both orders of the two objects


def fits(pattern, caption):
    """Whether the caption has the same words wherever the pattern shows one."""
    pairs = list(zip(pattern.split(), caption.split(), strict=False))
    return len(pattern.split()) == len(caption.split()) and all(shown in ("[MASK]", word) for shown, word in pairs)


nouns = {region.phrase.split()[-1] for region in test.regions(example) if region.kind == "object"}
for masked_too in ({*RELATION_WORDS, *nouns}, set(RELATION_WORDS)):
    pattern = " ".join("[MASK]" if word in masked_too else word for word in caption.split())
    found = [caption for caption in true if fits(pattern, caption)]
    print(f"{pattern}\n   " + "   or   ".join(found))

# %% [markdown]
# Both captions are true of the same picture. If the nouns are masked too, nothing says which object comes first, so two
# opposite relation words are equally right. In training the label is one of them in half of the cases, and the other in the
# rest. The best prediction gives each of them one half. Such a question can teach that the objects lie one above the other,
# but never which of them is above. If the relation word alone is masked, the caption says which object comes first. Then one
# answer is right, and only the picture tells which: the model must compare two places.
#
# So the training masks in one of two ways. In a share of the captions that state a relation (here half),
# it masks the relation words alone; in all other captions, other words and no word of a relation. This is an option of the
# library's masking (`TokenMasking.alone`); the papers do not have it.
# What questions does each way ask? We mask one caption a thousand times.

# %% tags=["nbval-check-output"]
usual = WordMasking(rate=0.4, mask_id=tokenizer.mask_token_id, never_mask=content_free_ids(tokenizer))
alone = replace(usual, alone=word_ids(tokenizer, RELATION_WORDS))
many = Text(*(part.repeat(1000, 1) for part in (its_text.ids, its_text.mask, its_text.word)))
said = tokenizer.convert_ids_to_tokens(its_text.ids[0].tolist())
is_relation, is_noun = (torch.tensor([token in words for token in said]) for words in (RELATION_WORDS, nouns))
for name, masking in {"all words alike": usual, "relation words alone": alone}.items():
    chosen = masking.choose(many, torch.Generator().manual_seed(0))  # (1000, L)
    asked = chosen[chosen[:, is_relation].any(dim=1)]  # the draws that ask for the relation
    with_it = asked[:, is_noun].sum(dim=1)  # how many of the two nouns are masked as well
    print(f"{name}. Three of the draws that ask for the relation:")
    for row in asked[:3].tolist():
        print("    " + " ".join("[MASK]" if mask else token for token, mask in zip(said[1:-1], row[1:-1], strict=True)))
    none, one, both = (f"{100 * (with_it == n).float().mean():.0f} %" for n in range(3))
    print(f"    of all such draws: no noun is masked in {none}, one in {one}, both in {both}\n")

# %% [markdown]
# With all words masked alike, some of the questions about a relation have no answer. In about half of them one noun is
# missing: the answer then follows only if the model first finds out which object the other noun names. Masking relation words
# alone leaves the clear questions. What it is worth was measured: see [docs/recipe.md](../docs/recipe.md).

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The model
# See `minivlp/models/vilt.py`. The transformer is a ViT whose input also contains words. The paper starts from a ViT trained
# to classify pictures, ours from the grounded single stream of the last section.
#
# | | published | nano | why |
# |---|---|---|---|
# | blocks, width | 12, 768 | 4, 128 | minutes on a laptop |
# | patches | one product, 32 pixels wide | two small steps, 8 wide | as in all our nano models |
# | negatives for ITM | half of the texts get another picture | the same, and a negative caption each | see below |
# | `mask_rate` | .15 of the words | .4, of words that name something | short captions |
# | relation words | masked like all others | masked alone | see the last section |
# | `losses` | ITM, MLM, WPA | the same | |
#
# The [**negative captions**](../docs/glossary.md#negative-caption) are made by rule with one fact changed, as in "a heart
# *right* of a dog". Without them most negatives name other objects and are easy. This idea is NegCLIP's
# ([Yuksekgonul et al. 2023](https://arxiv.org/abs/2210.01936)), not ViLT's. The rules are those that make the
# counterfactual test below, so the test measures something that was trained directly. CLIP in lesson 01 did not have them.

# %% tags=["nbval-check-output"]
model = recipe.build(ViLT, tokenizer)
modules = {"patches": model.joint.image_embed.patches, "words": model.joint.text_embed, "transformer": model.joint.blocks}
modules["MLM head"] = model.mlm_head
print({name: f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M" for name, module in modules.items()})

# %% [markdown] slideshow={"slide_type": "slide"}
# ## First, overfit one batch
# From random weights, so that the loss begins high: a model that can learn must fit eight pairs in a few steps.

# %% tags=["check", "nbval-check-output"]
losses = overfit_one_batch(replace(recipe, init_from=None).build(ViLT, tokenizer), few, steps=40)
assert losses[-1] < 0.35 * losses[0]
print("the sum of the three losses falls to less than .35 of its first value")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Now train
# Where do the losses start? `mlm` starts low, because the start has been trained on masked words; with
# random weights it would start near 7, the logarithm of 1,200 tokens. In a batch of 48 pairs, `itm` sees 96
# pairs, of which 24 match: half of the 48 texts get another picture, and there are 48 negative captions. Always predicting
# a probability of 1/4 gives a loss of .56. `wpa` starts near 0 and becomes negative when matching pairs cost less.
#
# *Profile `laptop` takes some minutes on two cores. Profile `quick`, which the automatic tests use, runs 15 steps, too few
# to learn anything: look at the log in the next section instead. Set the environment variable `MINIVLP_PROFILE` before you
# start Jupyter to choose. The stop button ends training early.*

# %% tags=["nbval-ignore-output"]
batches = recipe.batches(scenes, tokenizer)
curves = LiveCurves()
display(curves)
with curves.guard():
    history = fit(model, batches, recipe.settings(), on_step=[curves.log_row], bar=False)
history

# %% tags=["check", "nbval-check-output"]
first, last = (sum(row["mlm"] for row in rows) / len(rows) for rows in (history.steps[:5], history.steps[-5:]))
assert first < 4 and last < 3
print("masked words: from the first steps on, the loss is far below the 7 of random weights")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Matching is what is left to learn
# The bundled model was trained like yours, on more scenes and for 600 steps. Here is its log. The dashed line is the `itm`
# loss of a constant prediction, .56.

# %%
lines = bundled("vilt_nano").with_suffix(".log.jsonl").read_text(encoding="utf-8").splitlines()
log = [json.loads(line) for line in lines]  # every tenth step
figure = drawing.training_curves(log, ["mlm", "itm", "wpa"])
figure.axes[1].axhline(0.562, color=drawing.INK, ls=(0, (3, 2)))
figure

# %% tags=["check", "nbval-check-output"]
early, late = (
    {key: sum(row[key] for row in rows) / len(rows) for key in ("mlm", "itm")} for rows in (log[:3], log[-10:])
)
assert early["mlm"] < 3 and early["itm"] > 0.5 and late["itm"] < 0.5 * early["itm"]
print("masked words: low from the beginning; matching: near a constant prediction at first, less than half of it at the end")

# %% [markdown]
# The start knows masked words, and the `mlm` loss shows it. It has never matched a pair, so `itm` begins where a model
# begins that knows nothing of matching, and falls. From random weights or from towers, `itm` stays on this plateau for
# hundreds of steps.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Which facts does it check?
# For each picture its true caption against one with a single fact changed. Chance is .5. CLIP's bars are those of lesson 01.
# ViLT's three seeds are trained like yours (`python tools/experiments.py vilt_seeds`). Between them stands ViLT from the
# **towers**: the same model, number of steps and negative captions, but its start gives it image blocks and word
# embeddings only, and relation words are masked like all others (`vilt_relations`). Test scenes are the same. CLIP differs
# in more: 500 steps of 64 pairs, random weights as a start, and no negative captions.

# %%
kinds = [f"counterfactual: {kind}" for kind in ("object", "color", "size", "count", "relation", "swap")]
relations = by_variant("vilt_relations")
drawing.bars_with_spread(
    {
        "CLIP nano": by_variant("clip_seeds")["CLIP nano"],
        "ViLT, from towers": relations["towers, usual masking"],
        "ViLT, grounded start": by_variant("vilt_seeds")["ViLT nano"],
    },
    kinds,
)

# %% [markdown]
# *What we see.* With the grounded start ViLT learns relations (.96 to .97) and swaps (.97), where CLIP is at
# chance. From the towers it does not (.48 to .56 and .50), although it reads words and patches together
# in the same way and sees the same negative captions. So **reading both together is not enough** in this budget: the
# model also needs to know where the named things are, or to be asked for relation words in a way that has an answer. The
# two changed together here, so this figure does not tell them apart.
#
# Nor does it compare ViLT with CLIP fairly: CLIP has neither the start, nor the boxes behind it, nor negative captions.
# Counts are the weakest kind (.57 to .62; only some fifty scenes have one).
#
# Without any start, one run of 300 steps from scratch (`python tools/experiments.py from_scratch`) is at chance for
# every kind (mean .50); masked words are right in .32 with the right picture and in .17 with a wrong one.

# %% [markdown] slideshow={"slide_type": "subslide"}
# The same for your model; in profile `quick` it is the bundled one, which was trained for more steps.

# %% tags=["nbval-ignore-output"]
model = trained if profile() == "quick" else model.cpu()
test_scenes = Scenes(400, split="test", seed=7)
found = counterfactual(model, test_scenes, tokenizer)
found

# %% [markdown]
# **Masked words.** One word that names an object, a color or the like is masked in each caption. We predict it with the
# right picture, a wrong picture, and a gray picture ("no image"). What is right with the gray picture can be guessed from
# the other words.

# %% tags=["nbval-ignore-output"]
filled = masked_words(model, test_scenes, tokenizer)
filled

# %% tags=["check", "nbval-check-output"]
assert found["color"].value > 0.8 and filled["right image"].value > filled["wrong image"].value + 0.4
assert found["relation"].value > 0.8 and found["swap"].value > 0.8
print("masked words depend on the picture; wrong colors, relations and swaps are found")

# %% [markdown]
# Over three seeds (`vilt_seeds`), masked words are right in .92 of the cases with the right picture and in .18 to .20
# with a wrong one. So word tokens do use the patches.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Which patches does a word use?
# Words and patches are in one sequence, so a word's attention goes to both. We take the part that goes to patches. There
# are several ways to make a map for a word:
#
# * **attention** of one layer, averaged over heads;
# * [**rollout**](../docs/glossary.md#attention-rollout): the attention of all layers multiplied (lesson 01);
# * [**Grad-CAM**](../docs/glossary.md#grad-cam) ([Selvaraju et al. 2017](https://arxiv.org/abs/1610.02391)) **of the
#   match**: attention, weighted by the gradient of the matching logit;
# * **Grad-CAM of the word**: the word is masked, and attention is weighted by the gradient of its logit;
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


def maps_of_objects(words):
    """`maps_of` the word that names an object, of all `object_words`; some of them at a time, to save memory."""
    some = [maps_of(part.images, part.text, part.places) for part in words.parts()]
    return {name: torch.cat([maps[name] for maps in some]) for name in some[0]}

# %% [markdown]
# We compare them by the [**pointing game**](../docs/glossary.md#pointing-game): how often does the strongest patch for an
# object's word lie inside the object's box? The layer is chosen on *validation* scenes, and the result is measured on test
# scenes.

# %% tags=["nbval-ignore-output"]
words = object_words(Scenes(100, split="validation", seed=3), tokenizer)
tried = {name: pointing_game(heat, words.boxes, images=words.rows).value for name, heat in maps_of_objects(words).items()}
ways = ("attention", "rollout", "Grad-CAM of the match", "Grad-CAM of the word", "transport plan")
best = [max((name for name in tried if name.startswith(way)), key=tried.get) for way in ways]
words = object_words(Scenes(100, split="test", seed=7), tokenizer)  # scenes that were not used for the choice
maps = maps_of_objects(words)
points = Scores({name: pointing_game(maps[name], words.boxes, images=words.rows) for name in best})
points

# %% tags=["check", "nbval-check-output"]
chosen = next(name for name in best if name.startswith("Grad-CAM of the word"))
assert points[chosen].value > 0.5
print("Grad-CAM of the word, with the layer chosen on validation scenes: above .5 on test scenes")

# %% [markdown]
# Rollout and Grad-CAM of the word have the best score, and the transport plan is the worst. In the viewer below you can see
# that rollout's maps are similar for all words: they show objects, but not which of them. Maps by Grad-CAM differ from
# word to word, so we use Grad-CAM of the word.

# %% [markdown] slideshow={"slide_type": "subslide"}
# The same caption as above, by Grad-CAM of the word. Each word is masked and predicted in turn.

# %%
length = its_text.length
each = torch.zeros(length, dtype=torch.long)  # the same picture and caption for each token
by_token = maps_of(picture[each], its_text[each], torch.arange(length))  # (L, 8, 8) by name
drawing.attention_figure(
    test[example].image,
    [word for word, _ in caption_words],
    [by_token[chosen][pieces].mean(dim=0).numpy() for _, pieces in caption_words],
    [region.box for region in regions],
    columns=-(-(len(caption_words) + 1) // 2),
)

# %% [markdown] slideshow={"slide_type": "subslide"}
# Try it: point at a word or click a patch, and choose among the five kinds of map.

# %% tags=["nbval-ignore-output"]
ways_of = {name: by_token[name].flatten(1) for name in best}
AttentionViewer.of(model, test[example].image, caption, tokenizer, regions, maps=ways_of)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Change one thing
# **Word-patch alignment.** The same training with and without WPA, three seeds each, both from the towers
# (`python tools/experiments.py vilt_ablation` and `vilt_relations`).

# %%
with_and_without = by_variant("vilt_ablation") | {"+ WPA": by_variant("vilt_relations")["towers, usual masking"]}
measures = [f"counterfactual: {kind}" for kind in ("object", "color", "relation", "swap")]
drawing.bars_with_spread(with_and_without, [*measures, "masked word: right image"])

# %% [markdown]
# *What we see:* no difference beyond the spread of the seeds. From this start matching and relations are hardly learned at
# all; whether WPA helps from the grounded start has not been measured. The paper defines WPA and shows its maps, but has
# no ablation of it, so the gain there is not known.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Whole words.** With the tokenizer that splits names: mask whole words, or single pieces? Trained with MLM alone, three
# seeds each (200 steps, `python tools/experiments.py vilt_words`). In the test, all pieces of the word are masked.

# %%
drawing.bars_with_spread(by_variant("vilt_words"), [f"masked word: {name} image" for name in ("right", "wrong", "no")])

# %% [markdown]
# *What we see:* .22 to .26 are right with whole words, .18 to .26 with single pieces. The ranges overlap, so we see no
# reliable difference in 200 steps. In the paper the gain is small as well: VQA 70.16 to 70.33 (Table 5).

# %% [markdown] slideshow={"slide_type": "subslide"}
# *Your turn:* is matching learned earlier without the other losses? About two minutes for 200 steps.
# You can also try `negative_captions=False`, or another `lr`.

# %% tags=["nbval-ignore-output"]
mine = replace(recipe, config=recipe.config | {"losses": ("itm",)})
if profile() != "quick":
    other = mine.build(ViLT, tokenizer)
    fit(other, mine.batches(scenes, tokenizer), mine.settings(steps=200))
    print(counterfactual(other.cpu(), Scenes(400, split="validation", seed=5), tokenizer))
else:
    print(f"losses: {mine.config['losses']}; not trained: profile quick skips this run of 200 steps")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What the paper reported, and what we measured
# Numbers of [the paper](https://arxiv.org/abs/2102.03334), longest training (200,000 steps), unless noted.
#
# | | the paper | here |
# |---|---|---|
# | data | 4.1 M pictures, 9.9 M captions | 12,000 scenes, drawn |
# | size | 87.4 M parameters, word embeddings not counted (Table 6) | 1.2 M |
# | start | a ViT-B/32 trained on ImageNet | a single stream trained on scenes with boxes |
# | training | batch 4,096, 64 V100 GPUs | batch 48, two CPU cores |
# | time for a pair | about 15 ms; UNITER with a detector about 900 ms (Table 6) | see above |
# | search | Flickr30k R@1 64.4 image, 83.5 text, fine-tuned (Table 4) | not tried: a million passes |
# | question answering | VQA 71.26 (Table 2) | not tried |
# | two pictures and a statement | NLVR2 75.70 dev, 76.13 test-P (Table 2) | not tried |
# | whole-word masking | VQA 70.16 to 70.33 (Table 5) | no reliable difference |
# | masked **patch** prediction | VQA 70.33 to 70.21, NLVR2 dev 74.41 to 72.76: it does not help (Table 5) | not tried |
# | RandAugment in fine-tuning | VQA 70.33 to 70.85 (Table 2) | not tried |
#
# **Two limits of ViLT.** First, it stays below models with a detector on some tasks: UNITER-base reaches 85.9 text and 72.5
# image on Flickr30k and VQA 72.70 (as reported in later papers' tables). Second, it needs long training: from 25,000 to
# 100,000 steps all scores rise (VQA 68.96, 69.80, 70.16); at 200,000 steps VQA and NLVR2 still rise, while fine-tuned text
# retrieval falls (Flickr30k 83.69 to 83.50).
#
# ## Recap
# * A single stream reads words and patches in one transformer. It needs neither a detector nor an image tower.
# * Every pair needs its own forward pass, so search is expensive.
# * A single stream that only gets towers as a start stays at chance on relations in a few minutes. From a start that has
#   grounded nouns, and with relation words masked alone, it learns them.
# * Word-patch alignment made no measurable difference here, and its map is poor.
#
# **To discuss**
# 1. Why does `itm` start at .56 and not at ln 2 = .69?
# 2. What would you change to compare ViLT with CLIP fairly? And to tell the effect of the start from that of the masking?
# 3. Why does whole-word masking not matter with our own tokenizer?
#
# <details><summary>Answers</summary>
#
# 1. Only a quarter of its pairs match; predicting 1/4 for all has a loss of .56. (In the first steps it can be higher.)
# 2. The same start, the same negative captions, the same number of pairs and the same time or steps, and several seeds. For
#    the second question, change one of the two at a time.
# 3. Every word of our captions is one token, so a word has no other pieces that could reveal it.
#
# </details>
#
# **Next:** [03 · ALBEF](03_albef.ipynb). It keeps two towers, aligns their outputs first, and then fuses them by
# cross-attention.
