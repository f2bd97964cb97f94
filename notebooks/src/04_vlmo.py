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
# **The question.** You have met two kinds of model. A [**dual encoder**](../docs/glossary.md#dual-encoder) (CLIP,
# lesson 01) turns each image and each caption into one vector. Search is fast, but no word attends to a patch. A [**fusion
# encoder**](../docs/glossary.md#fusion-encoder) (ViLT, lesson 02) lets words and patches attend to each other. It can
# check what a caption says, but it must run once for every pair. ALBEF (lesson 03) contains both, one on top of the other.
# Can **one set of weights** do both?
#
# VLMo ([Bao et al. 2022](https://arxiv.org/abs/2111.02358)) answers yes. Its block is the
# [**mixture of modality experts (MoME)**](../docs/glossary.md#mixture-of-modality-experts): all tokens share the attention
# of a layer, but the feed-forward layer exists several times, once per modality. Text tokens use the text expert, patches
# the image expert, and in the top layers pairs use a third one, the vision-language (VL) expert. The same layers accept an
# image alone, a text alone, or both.
#
# | | |
# |---|---|
# | **After this lesson you can** | route tokens to experts; write VLMo's block and build the model from it; say which parameters each training stage updates; use one model for search and for matching; judge whether a comparison of two models is fair |
# | **You need** | lessons 01 to 03: contrastive loss, matching (ITM), masked words (MLM); the parts of a transformer layer |
# | **Time** | 60 minutes to read and 90 for the exercises. The cells need about 8 minutes in profile `laptop` on two cores |

# %% tags=["setup"] slideshow={"slide_type": "skip"}
from copy import deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from minivlp.data.batch import to_tensor
from minivlp.data.grammar import COLORS
from minivlp.data.scenes import Scenes
from minivlp.data.text import group_words, load_tokenizer, tokenize
from minivlp.device import profile
from minivlp.evaluation.cost import cost
from minivlp.evaluation.grounding import pointing_game
from minivlp.evaluation.matching import counterfactual, masked_words
from minivlp.evaluation.records import by_variant
from minivlp.evaluation.retrieval import reranked, retrieval
from minivlp.evaluation.score import Scores
from minivlp.layers.attention import Attention, record_attention
from minivlp.layers.embeddings import ImageEmbedding, TextEmbedding
from minivlp.layers.experts import Expert, ExpertBlock
from minivlp.layers.transformer import Block
from minivlp.layers.weights import copy_parts
from minivlp.lessons import vlmo as exercise
from minivlp.lessons.common import object_words
from minivlp.models.albef import ALBEF
from minivlp.models.clip import CLIP
from minivlp.models.vilt import ViLT
from minivlp.models.vlmo import VLMo
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits
from minivlp.papers import paper
from minivlp.training.checkpoint import bundled, load_model
from minivlp.training.grounded_stream import GroundedStream
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
_ = torch.manual_seed(0)  # assigned, so that the cell prints nothing
CONTEXT = 56  # the longest text, in tokens, that the nano models read

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Search cost against reading ability
# How long does it take to compare a thousand images with a thousand captions? We measure twenty of each and scale up. The
# last column shows how often a model prefers a true caption to one with a single fact changed. It is the mean over the
# kinds of facts and over the three seeds of each lesson; chance is .50.

# %% tags=["nbval-ignore-output"]
test = Scenes(1500, split="test", seed=7)


def one_fact(record, variant):
    """The true caption against one with a fact changed: the mean over all kinds of facts and over the seeds."""
    runs = by_variant(record)[variant]
    return sum(run["counterfactual: mean"].value for run in runs) / len(runs)


def costs(rows):
    """A table of (name, model, share of pairs where the true caption wins)."""
    print(f"{'':<8}{'parameters':>12}{'each once':>12}{'every pair':>12}{'best 16':>10}{'one fact':>11}")
    for name, model, right in rows:
        took, count = cost(model, test, tokenizer).scaled(1000, 1000), sum(p.numel() for p in model.parameters())
        pairs = took.seconds_pairs if took.seconds_shared is None else took.seconds_shared  # images encoded once
        seconds = [took.seconds_once, pairs, took.seconds_best(16)]
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
# * **each once:** every image and every caption is encoded once, then all vectors are compared. ViLT has no such vectors.
# * **every pair:** the model reads each of a million pairs. CLIP cannot do this. ALBEF encodes each image once and uses
#   the result for all texts. ViLT must run all its layers for every pair.
# * **best 16:** search with vectors, then read only the sixteen best candidates.
#
# ALBEF can do all three, and needs three transformers for it: image tower, text tower and fusion layers.
#
# The last column compares models with different starts and budgets. CLIP starts from random weights. ViLT starts from a
# single stream, and ALBEF from towers and fusion layers, that were trained on scenes with boxes. ViLT and ALBEF also see
# negative captions, which CLIP does not.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The idea

# %%
drawing.structure("VLMo")

# %% [markdown]
# The same layers take three kinds of input:
#
# | input | lower layers | top layers | used for |
# |---|---|---|---|
# | an image | image expert | image expert | a vector for search |
# | a text | text expert | text expert | a vector for search |
# | both, text first | text tokens: text expert; image tokens: image expert | all tokens: VL expert | does the pair match? which word is masked? |

# %% [markdown]
# A transformer layer has two parts. **Attention** moves information between tokens. The [**feed-forward
# layer**](../docs/glossary.md#feed-forward-layer) (FFN) processes each token by itself. VLMo shares attention between the
# modalities and gives each modality its own FFN, the
# **expert**. For the tokens $x$ of a layer, an expert $m$, and LayerNorm (LN):
#
# $$h = x + \mathrm{Attention}(\mathrm{LN}(x)), \qquad
# y = h + \mathrm{FFN}_m(\mathrm{LN}_m(h)), \quad m \in \{\text{text}, \text{image}, \text{VL}\}$$
#
# Large language models have experts too, but there a small network, the router, learns which expert processes a token.
# In VLMo nothing is learned about routing: the modality of the token decides. (The NeurIPS version of the paper calls
# this block a *Multiway Transformer*.)

# %% [markdown] slideshow={"slide_type": "slide"}
# ## By hand: which expert processes which token
# Take four images with their captions, and one lower layer. Text tokens come first. Attention runs over all tokens
# together. Then a loop sends each token to its expert.

# %% tags=["nbval-check-output"]
trained = load_model(VLMo, bundled("vlmo_nano"))
four = [row for row in range(60) if len(test.scene(row).objects) == 2][:4]
captions = [test.captions(row)[0] for row in four]
images, text = to_tensor(test.pixels(four, 64)), tokenize(tokenizer, captions, CONTEXT)
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
# Each expert has its own LayerNorm, $\mathrm{LN}_m$ in the equation. The library splits the sequence once and runs each
# expert on its part. Check that both agree:

# %% tags=["check", "nbval-check-output"]
parts = (("text", length), ("image", tokens - length))
with torch.no_grad():
    assert torch.allclose(layer(x, mask, parts=parts), by_hand, atol=1e-5)
print("token by token and all at once: the same")

# %% [markdown] slideshow={"slide_type": "subslide"}
# If all experts were equal, routing would not matter, and the layer would be an ordinary transformer layer. This can be
# tested: copy the text expert over the image expert and compare with the block of the other lessons.

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
print("with equal experts the layer equals the plain block; with its own experts it does not")

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### Exercise 1 · Route the tokens *(easy, 15 minutes)*
# Send each token to its expert. Below layer `vl_from`, text tokens use `experts["text"]` and the tokens of the image use
# `experts["image"]`. From layer `vl_from` on, a *pair* uses `experts["vl"]` for all tokens. A single modality uses its own
# expert in all layers. `experts["vl"]` exists only from layer `vl_from` on.
#
# *Predict first:* which expert must a text without an image use in the top layer?
#
# <details><summary>Hint 1</summary>There are three cases: a pair in an upper layer, a pair in a lower layer, one modality
# alone.</details>
# <details><summary>Hint 2</summary>There is a pair if <code>0 &lt; length &lt; x.shape[1]</code>.</details>
# <details><summary>Hint 3</summary>Collect the parts in a list, text first, and use <code>torch.cat(parts,
# dim=1)</code>.</details>

# %% tags=["exercise"]
def my_route(x, length, layer, vl_from, experts):
    """x (B, N, D): `length` tokens of text first, then those of the image. experts: functions by name.

    Returns the output of the experts, (B, N, D), without the residual connection.
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

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Build it: VLMo from its blocks
# `ExpertBlock` is the layer that you have just taken apart: attention for all tokens, then an expert for each run of
# tokens. A
# **route** says which expert gets how many tokens, for instance `(("text", 9), ("image", 65))`. The model needs one route per
# layer, and these are the three rows of the table above.

# %% tags=["nbval-check-output"]
class MyVLMo(nn.Module):
    """B pairs, L text tokens, P patches, N tokens of one sequence, D width."""

    def __init__(self, config):
        super().__init__()
        block, width, self.vl_from = config.image.block, config.image.block.width, config.vl_from
        self.words = TextEmbedding(config.text, norm_eps=1e-12 if config.text.embed_norm else None)
        self.patches = ImageEmbedding(config.image)
        self.token_type = nn.Parameter(0.02 * torch.randn(2, width))
        lower, upper = ("text", "image"), ("text", "image", "vl")
        kinds = [lower if layer < self.vl_from else upper for layer in range(config.image.layers)]
        self.blocks = nn.ModuleList(ExpertBlock(block, names) for names in kinds)
        self.norm = nn.LayerNorm(width, eps=block.norm_eps)

    def forward(self, images=None, text=None):
        """Tokens (B, N, D) of images, of texts, or of both, text first."""
        parts, real = [], []
        if text is not None:
            parts.append(self.words(text.ids) + self.token_type[0])  # (B, L, D)
            real.append(text.mask)
        if images is not None:
            parts.append(self.patches(images) + self.token_type[1])  # (B, 1+P, D)
            real.append(torch.ones(parts[-1].shape[:2], dtype=torch.bool))
        x, mask = torch.cat(parts, dim=1), torch.cat(real, dim=1)  # (B, N, D), (B, N)
        length = 0 if text is None else text.length
        for layer, block in enumerate(self.blocks):
            x = self.run(block, x, mask, length, self.route(layer, length, x.shape[1]))
        return self.norm(x)

    def route(self, layer, length, tokens):
        """Which expert gets how many tokens; `length` of all `tokens` are text."""
        if 0 < length < tokens and layer >= self.vl_from:
            return (("vl", tokens),)
        return tuple((name, count) for name, count in (("text", length), ("image", tokens - length)) if count)

    def run(self, block, x, mask, length, route):
        return block(x, mask[:, None, None, :], parts=route)


mine = MyVLMo(trained.config)
with torch.no_grad():
    shapes = {"images": mine(images), "texts": mine(text=text), "both": mine(images, text)}
print(" · ".join(f"{name}: {tuple(tokens.shape)}" for name, tokens in shapes.items()))
print("layer 0:", mine.route(0, length, tokens), "· layer 3:", mine.route(3, length, tokens))

# %% [markdown]
# Is it the same as the library's (`VLMoStream` in `minivlp/models/vlmo_stream.py`)? We copy the weights of the bundled
# model, and compare all three routes.

# %% tags=["check", "nbval-check-output"]
joint = trained.joint
copied = {"words": joint.text_embed, "patches": joint.image_embed, "token_type": joint.token_type}
copy_parts(copied | {"blocks": joint.blocks, "norm": joint.norm}, mine)
with torch.no_grad():
    assert torch.allclose(mine(images), trained.encode_image(images), atol=1e-4)
    assert torch.allclose(mine(text=text), trained.encode_text(text), atol=1e-4)
    assert torch.allclose(mine(images, text), trained.cross_encode(images, text), atol=1e-4)
assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in joint.parameters())
print("an image alone, a text alone, both: the same tokens as those of minivlp.models.vlmo.VLMo")

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### Exercise 2 · Build the paper: the MoME block *(medium, 30 minutes)*
# Write VLMo's block yourself:
#
# $$h = x + \mathrm{Attention}(\mathrm{LN}(x)), \qquad
# y = h + \mathrm{FFN}_m(\mathrm{LN}_m(h)), \quad m \in \{\text{text}, \text{image}, \text{VL}\}$$
#
# All tokens share `self.norm` and `self.attention`. The library's `Attention` is the one of lesson 02; it is called as
# `self.attention(tokens, mask=...)` with a mask that broadcasts to (B, heads, queries, keys). `Expert` has its own LayerNorm
# inside: it computes $\mathrm{FFN}_m(\mathrm{LN}_m(h))$. A block of the top layers has an expert `"vl"`, and a block below
# has none. You may use `my_route` of exercise 1.
#
# *Predict first:* which will fail if you run the attention on the text tokens and on the image tokens separately: search with
# vectors, matching, or both?
#
# <details><summary>Hint 1</summary>First the attention, once, for all tokens. The mask (B, N) needs two more axes:
# <code>mask[:, None, None, :]</code>.</details>
# <details><summary>Hint 2</summary>There are two residual connections: <code>h = x + ...</code> and <code>h + ...</code>. The
# experts read <code>h</code>, not <code>x</code>.</details>
# <details><summary>Hint 3</summary>With <code>my_route(h, length, layer, vl_from, experts)</code>: take
# <code>vl_from=1</code>, and
# <code>layer=1</code> if <code>"vl" in self.experts</code>, else <code>layer=0</code>.</details>

# %% tags=["exercise"]
class MyMoMEBlock(nn.Module):
    def __init__(self, config, names):
        """names: ("text", "image"), and "vl" as well in the top layers."""
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.experts = nn.ModuleDict({name: Expert(config) for name in names})

    def forward(self, x, length, mask):
        """x (B, N, D): `length` text tokens, then image tokens; mask (B, N), True on tokens that may be attended to.

        length is 0 for images alone and N for texts alone. Returns (B, N, D).
        """
        ### BEGIN SOLUTION
        h = x + self.attention(self.norm(x), mask=mask[:, None, None, :])
        return h + my_route(h, length, int("vl" in self.experts), 1, self.experts)
        ### END SOLUTION

# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_block(MyMoMEBlock)

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Now train with it.** Your blocks take the place of the library's. Sixteen pairs are overfitted from random weights,
# with two losses: the contrastive loss of the vectors (one modality at a time), and masked words (both together, with the
# VL expert): all three words of *a red heart* are masked, and the model must say the color. For comparison, the same with a
# block whose attention reads one modality at a time. Which of its losses will stay high?

# %% tags=["nbval-ignore-output", "needs-solution"]
class ApartBlock(MyMoMEBlock):
    """Text attends to text, and the image to the image."""

    def forward(self, x, length, mask):
        if not 0 < length < x.shape[1]:
            return super().forward(x, length, mask)
        text, image = (x[:, :length], length, mask[:, :length]), (x[:, length:], 0, mask[:, length:])
        return torch.cat([super().forward(*text), super().forward(*image)], dim=1)


class MyVLMoOfMyBlocks(MyVLMo):
    def __init__(self, config, block):
        super().__init__(config)
        self.blocks = nn.ModuleList(block(config.image.block, tuple(old.experts)) for old in self.blocks[-2:])
        self.vl_from = 1  # two layers: one without a VL expert, one with it
        self.predict = nn.Linear(config.image.block.width, config.text.vocabulary)

    def run(self, block, x, mask, length, route):
        return block(x, length, mask)  # your block finds the experts itself


singles = Scenes(200, split="train", seed=1, size=64, objects=(1, 1))
said = {row: singles.captions(row)[0] for row in range(200)}
named = [row for row in said if len(said[row].split()) == 3 and said[row].split()[1] in COLORS]
named = list({said[row]: row for row in named}.values())[:16]  # sixteen different captions, such as "a red heart"
sixteen, words = to_tensor(singles.pixels(named, 64)), tokenize(tokenizer, [said[row] for row in named], CONTEXT)
colors = words.ids[:, 2]  # [CLS] a red heart [SEP]
asked = words.with_ids(words.ids.index_fill(1, torch.tensor([1, 2, 3]), tokenizer.mask_token_id))  # all three words


def short_run(block, steps=40):
    torch.manual_seed(0)
    small = MyVLMoOfMyBlocks(trained.config, block)
    optimizer, rows = torch.optim.AdamW(small.parameters(), lr=1e-3), []
    for _ in range(steps):
        vectors = (F.normalize(tokens[:, 0], dim=1) for tokens in (small(sixteen), small(text=words)))
        contrast = contrastive_loss(cosine_logits(*vectors, torch.tensor(10.0)), torch.eye(16, dtype=torch.bool))
        masked = F.cross_entropy(small.predict(small(sixteen, asked)[:, 2]), colors)
        optimizer.zero_grad()
        (contrast + masked).backward()
        optimizer.step()
        rows.append((contrast.item(), masked.item()))
    return rows


runs = {"your block": short_run(MyMoMEBlock), "one modality at a time": short_run(ApartBlock)}
for name, rows in runs.items():
    print(f"{name:<24} contrastive {rows[0][0]:.2f} -> {rows[-1][0]:.2f}   masked colors {rows[0][1]:.2f} -> {rows[-1][1]:.2f}")
share = colors.unique(return_counts=True)[1] / len(colors)
frequent = -(share * share.log()).sum()
print(f"masked colors, by their frequency alone: {frequent:.2f}")

# %% tags=["check", "nbval-check-output", "needs-solution"]
(contrast, masked), (contrast_apart, masked_apart) = runs["your block"][-1], runs["one modality at a time"][-1]
assert contrast < 1 and contrast_apart < 1 and masked < 0.6 * frequent < 0.9 * masked_apart
print("both losses fall with your block; without attention between words and patches the colors are not learned")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The model
# `minivlp/models/vlmo.py`. The three losses are those of lesson 03: the contrastive loss of the two vectors (ITC),
# matching with hard negatives (ITM), and masked words (MLM).
#
# $$\mathcal L = \tfrac12\left(\mathcal L_\text{ITC} + \mathcal L_\text{ITC}^\text{VL}\right) + \mathcal L_\text{ITM} + \tfrac14\,\mathcal L_\text{MLM}$$
#
# With unit vectors $v_i, t_i$ of image $i$ and text $i$, batch size $B$ and a learned scale $s$:
#
# $$\mathcal L_\text{ITC} = -\frac{1}{2B}\sum_{i=1}^{B} \left[\log\frac{e^{s\,v_i^\top t_i}}{\sum_j e^{s\,v_i^\top t_j}} + \log\frac{e^{s\,v_i^\top t_i}}{\sum_j e^{s\,v_j^\top t_i}}\right]$$
#
# $\mathcal L_\text{ITM}$ is the binary cross-entropy of "do they match?", and $\mathcal L_\text{MLM}$ the cross-entropy of
# the masked words. ITC is computed twice. The first time the experts of one modality are used in all layers, as in search.
# The second time, $\mathcal L_\text{ITC}^\text{VL}$, the VL expert takes over in the top layers, so that it also
# processes images alone and texts alone.
#
# | | published (base) | nano | reason |
# |---|---|---|---|
# | layers, width | 12, 768 | 4, 128 | minutes on a laptop |
# | VL expert from layer | 10 (the top two) | 3 (the top one) | a similar share |
# | positions | relative, one table for all inputs | absolute: sine waves for patches, learned for words | as in all our nano models |
# | [**LayerScale**](../docs/glossary.md#layerscale): a learned factor per channel behind attention and FFN, small at first | starts at .1 | none | it slows down a short run |
# | start | BEiT, trained on images alone | a grounded single stream, see *Where it starts from* | |
# | negatives for ITM | hard ones from the batches of all GPUs | hard ones of the batch, and a negative caption each | small batches |
# | weight of MLM | a quarter | a quarter | |
# | `mask_rate` | .15 of the words | .4 of the words that name something | short captions |
# | relation words (*left*, *above*) | masked like all others | masked alone | lesson 02 explains it |
#
# Negative captions are not part of VLMo. They come from NegCLIP
# ([Yuksekgonul et al. 2023](https://arxiv.org/abs/2210.01936)); lesson 03 explains them.

# %% tags=["nbval-check-output"]
model = recipe.build(VLMo, tokenizer)
for name, (_, count) in trainable(model).items():
    print(f"{name:<17} {count / 1e3:6.1f} thousand")

# %% [markdown]
# The experts hold most of the parameters. But each token passes through only one of them. More experts mean more
# parameters, not more computation per token.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Where it starts from
# Our VLMo starts from the **grounded single stream** of lesson 02 (`joint_nano`): one transformer for words and patches,
# which was trained to predict the box of every noun, and masked words; it has seen boxes and no false caption. It has one
# feed-forward layer per block, where VLMo has two or three experts. Every expert begins as a *copy* of it (`VLMo.init_from`).
#
# So the experts are equal at first. You have tested above what follows: with equal experts the routing changes nothing. At
# the first step of training, VLMo computes for a pair exactly what the single stream computes. Check it:

# %% tags=["check", "nbval-check-output"]
stream = load_model(GroundedStream, bundled("joint_nano"))
started = VLMo(replace(VLMo.Config.nano(len(tokenizer)), text=replace(VLMo.Config.nano(len(tokenizer)).text, embed_norm=True)))
started.init_from(stream)
with torch.no_grad():
    image = stream.joint.embed_images(images)
    assert torch.allclose(started.cross_encode(images, text), stream.joint(image, text), atol=1e-4)
    assert not torch.allclose(trained.cross_encode(images, text), stream.joint(image, text), atol=1e-2)
print("before training VLMo computes for pairs what the single stream computes; the trained VLMo does not")

# %% [markdown]
# Training then makes the experts different. Search with single modalities is new to these weights: the single stream has
# never seen an image or a text alone.
#
# **What this means for comparisons.** The paper's start, BEiT, has seen images alone, and later stages add texts. *Ours
# has seen boxes.* A comparison with a model that has another start compares the starts, too.
#
# **What the start knows** on test scenes (`checkpoints/joint_nano.md`): boxes of nouns .96 (IoU above .5), masked nouns .87,
# masked relation words .98.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### Exercise 3 · Relative positions *(medium, 20 minutes)*
# The published VLMo does not give a patch an absolute position. It adds to each attention score a number that depends on
# the offset between the two patches: how far down and how far right. All pairs of patches with the same offset share a row
# of a table. Which row?
#
# Patches are numbered row by row. The offset is the position of the query patch *i* minus that of the key patch *j*. Offsets
# are numbered like patches: row by row from the topmost, within a row from left to right. Return integers (`torch.long`),
# since they are used as indices.
#
# *Predict first:* on a grid of 2 x 3 patches, how many different offsets are there, and how many pairs of patches?
#
# <details><summary>Hint 1</summary>The vertical offset runs from <code>-(rows - 1)</code> to <code>rows - 1</code>. Shift it
# to start at 0.</details>
# <details><summary>Hint 2</summary>One row of offsets has <code>2 * columns - 1</code> entries.</details>
# <details><summary>Hint 3</summary><code>row[:, None] - row[None, :]</code> gives all differences at once.</details>

# %% tags=["exercise"]
def my_index(rows, columns):
    """Row of the table for query patch i (first axis) and key patch j (second axis): (P, P) long."""
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
# ## First, overfit one batch
# From random weights, so that the loss begins high: a model that can learn must fit eight pairs in a few steps.

# %% tags=["check", "nbval-check-output"]
scenes = Scenes(recipe.scenes, split="train", seed=0, size=recipe.size, objects=recipe.objects)
few = replace(recipe, batch_size=8).batches(scenes, tokenizer)(0)
losses = overfit_one_batch(replace(recipe, init_from=None).build(VLMo, tokenizer), few, steps=30)
assert losses[-1] < 0.5 * losses[0]
print("overfit: the sum of the three losses is far below where it began")

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Images first, then texts, then pairs
# Image-text pairs are expensive to collect; images alone and text alone are cheap. With experts, a model can learn from
# them in **stages**:
#
# 1. **Images.** Mask some patches and predict them. This trains attention and image experts.
# 2. **Texts.** Mask some words and predict them. This trains the text experts. Attention is **frozen**: it stays as it was
#    after stage 1.
# 3. **Pairs.** All parameters are trained.
#
# Stage 2 is surprising: text experts learn on top of an attention that has never processed a word. Before you run the next
# cell, predict: which parts does stage 2 train?
#
# The table is computed from the model. It shows which parts receive a gradient from the loss of a stage, and how many of
# their parameters are frozen all the same.

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
print("stage 2: attention is used but frozen; stage 3: all parameters are trained")

# %% [markdown]
# "Only the text experts learn in stage 2" is a common summary of the paper. The table shows more, and it follows the
# released code: the token embedding and the MLM head are trained as well. So are the final LayerNorm and the token-type
# embedding, although images use them too.

# %% [markdown] slideshow={"slide_type": "subslide"}
# ### Exercise 4 · What must not be trained *(medium, 15 minutes)*
# Prepare a VLMo for stage 2, texts without images: set `requires_grad` of every parameter, to True or to False. The model
# may arrive partly frozen. Train the text experts (`.experts.text.`), the token embedding (`joint.text_embed`) and the head
# that predicts masked words (`mlm_head`). As in the released code, also train the final LayerNorm (`joint.norm`), the
# relative positions (`joint.relative`) and the token types (`joint.token_type`). Freeze everything else.
#
# *Predict first:* which will fail if you set `requires_grad = False` on the rest and touch nothing else: the first stage that
# calls your function, or a later one?
#
# <details><summary>Hint 1</summary>Loop over <code>model.named_parameters()</code> and print a few names.</details>
# <details><summary>Hint 2</summary><code>name.startswith((...))</code> accepts a tuple of beginnings.</details>
# <details><summary>Hint 3</summary>Assign a bool: <code>parameter.requires_grad = ... or ...</code></details>
#
# If your function is right, the check cell also compares it with the library's `freeze_for_text`.

# %% tags=["exercise"]
def my_freeze(model):
    """Sets `requires_grad` of all parameters of a VLMo for stage 2, texts alone. Returns nothing."""
    ### BEGIN SOLUTION
    for name, parameter in model.named_parameters():
        of_text = ".experts.text." in name or name.startswith(("joint.text_embed.", "mlm_head."))
        of_all = name.startswith(("joint.norm.", "joint.relative.", "joint.token_type"))
        parameter.requires_grad = of_text or of_all
    ### END SOLUTION


# %% tags=["check", "nbval-check-output", "needs-solution"]
exercise.check_frozen(my_freeze)
fresh = VLMo(VLMo.Config.nano(len(tokenizer)))
my_freeze(fresh)
mine = trainable(fresh)
freeze_for_text(fresh)
print("the same as freeze_for_text:", mine == trainable(fresh))

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Stage 1 in short.** From random weights. The published model starts from BEiT
# ([Bao et al. 2021](https://arxiv.org/abs/2106.08254)), which predicts the codes of an image tokenizer. Ours predicts pixels,
# as MAE does ([He et al. 2021](https://arxiv.org/abs/2111.06377)). Blocks of two by two patches are masked, about two
# fifths of the image. With masked patches $M$, their normalized pixels $p_i$ and the prediction $\hat p_i$:
#
# $$\mathcal L_\text{MIM} = \frac{1}{|M|}\sum_{i \in M} \operatorname{mean}\left((\hat p_i - p_i)^2\right)$$

# %%
torch.manual_seed(0)
from_scratch = VLMo(VLMo.Config.nano(len(tokenizer)))
stage = ImageStage(from_scratch)
steps = {"quick": 20, "laptop": 200}.get(profile(), 2000)
pictures_only = replace(recipe, batch_size=32, negative_captions=False).batches(scenes, tokenizer, seed=1)
images_history = fit(stage, pictures_only, recipe.settings(steps=steps), bar=False)
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
states = {"masked": some.masked_fill(gray, 1), "predicted": predicted}
shown = {name: ((127.5 * (x + 1)).clamp(0, 255)).byte().permute(0, 2, 3, 1).numpy() for name, x in states.items()}
drawing.picture_rows(shown)

# %% [markdown]
# The model first learns the brightness of the background, then its color, then that objects continue behind the mask. In
# profile `quick` it reaches only a gray mean. No word was needed for any of this.

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Stage 2 in short.** A good stage 1 takes longer than a lesson. But an attention trained on images is available: that of
# the bundled image tower (`checkpoints/towers_nano.md`). We start VLMo from it here, in place of the single stream, whose
# attention has processed words. It is not the same as BEiT: it was trained with boxes *and their phrases*, and its word
# embeddings are copied as well. The text experts are new. Freeze, and train on captions alone:

# %% tags=["nbval-ignore-output"]
torch.manual_seed(0)
reader = replace(recipe, init_from="towers_nano").build(VLMo, tokenizer)
before = {name: parameter.detach().clone() for name, parameter in reader.named_parameters()}
short = min(captions, key=len)
alone = tokenize(tokenizer, [short], CONTEXT)


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
print("masked words are predicted better; attention is unchanged; trained were:", ", ".join(sorted(moved)))

# %% [markdown] slideshow={"slide_type": "subslide"}
# Attention is frozen. Do the words still attend to the same words as before? The same caption before and after stage 2:

# %%
said = tokenizer.convert_ids_to_tokens(alone.ids[0].tolist())
shown = {f"layer {n}, {when}": maps[n].numpy() for n in (0, 2) for when, maps in (("before", early), ("after", late))}
drawing.word_attention(said, shown)

# %% tags=["nbval-ignore-output"]
for n, (was, now) in enumerate(zip(early, late, strict=True)):
    print(f"layer {n}: {50 * (was - now).abs().sum(dim=1).mean():2.0f} % of the attention has moved to another word")

# %% [markdown]
# In layer 0 the maps hardly change: only the token embeddings can change its input, and they changed little. In higher
# layers the maps do change. The weights that compute queries and keys are the same, but their *input* now comes from text
# experts that have been trained. This is how text can adapt to frozen attention. With the 60 steps of profile `quick` the
# change is small, and it does not show that the model has learned grammar. Whether it helps that *images* trained this
# attention is tested further below.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Now train: pairs
# Stage 3. Values of an uninformed model: `itc` 3.5, the logarithm of a batch of 32; it falls first. `itm` .56: one pair in
# four matches, and always answering "one in four" gives this loss. `mlm` is shown with its weight of a quarter. It is
# low from the beginning, because the start has been trained on masked words.
#
# *Profile `laptop` takes about five minutes on two cores; `quick` only shows the first steps. Set `MINIVLP_PROFILE` before
# you start Jupyter to choose. The stop button ends training at any time.*

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
# ## Three routes through the same layers
# Which expert processes which token? The figure is recorded while the model runs; layers go from bottom to top. The gray
# band is attention, whose weights are shared by both modalities. The model is yours if you trained in profile `laptop`,
# and the bundled one otherwise.

# %%
model = trained if profile() == "quick" else model.cpu()
shown_row = next(r for r in range(60, len(test)) if len(test.scene(r).objects) == 2 and not test.scene(r).background.texture)
caption = test.captions(shown_row)[0]
size = model.config.image.image_size
picture, text = to_tensor(test.pixels([shown_row], size)), tokenize(tokenizer, [caption], CONTEXT)
rows, columns = model.config.image.grid
text_tokens = tokenizer.convert_ids_to_tokens(text.ids[0].tolist())
image_tokens = ["class", *["patch"] * (rows * columns)]
routes = {
    "an image alone": attention.expert_map(model, lambda: model.embed_images(picture)),
    "a text alone": attention.expert_map(model, lambda: model.embed_texts(text)),
    "both": attention.expert_map(model, lambda: model.match(picture, text)),
}
drawing.expert_figure(
    routes,
    {"an image alone": image_tokens, "a text alone": text_tokens, "both": text_tokens + image_tokens},
)

# %% tags=["check", "nbval-check-output"]
top = model.config.vl_from
assert {name for row in routes["an image alone"] for name in row} == {"image"}
assert {name for row in routes["both"][top:] for name in row} == {"vl"}
print(f"alone: its own expert in all layers; both: the VL expert from layer {top} on")

# %% [markdown] slideshow={"slide_type": "subslide"}
# **Attention maps.** Left: an image alone, and the patches to which its class token attends. Then the words of the
# caption, when image and text are together. Layer and head are chosen as in lesson 03, by the pointing game on validation
# scenes: how often does the strongest patch of a noun lie inside the box of its object?

# %%
def noun_maps(words):
    """By (layer, head), -1 for the mean of the heads: the map (R, 8, 8) of the word that names each of `object_words`."""
    found = {}
    for part in words.parts():  # some at a time, to save memory
        with torch.no_grad(), record_attention(model) as maps:
            model.match(part.images, part.text)
        for n, heat in enumerate(attention.word_patch_attention(maps, part.text.length).values()):  # (R, H, L, P)
            of_noun = heat[torch.arange(len(part)), :, part.places]  # (R, H, P)
            for head, one in [*enumerate(of_noun.unbind(dim=1)), (-1, of_noun.mean(dim=1))]:
                found.setdefault((n, head), []).append(attention.to_grid(one))
    return {key: torch.cat(some) for key, some in found.items()}


nouns = object_words(Scenes(100, split="validation", seed=3), tokenizer)
maps = noun_maps(nouns)
best, head = max(maps, key=lambda key: pointing_game(maps[key], nouns.boxes).value)
nouns = object_words(Scenes(150, split="test", seed=7), tokenizer)  # scenes that had no say in the choice
points = pointing_game(noun_maps(nouns)[best, head], nouns.boxes, images=nouns.rows)

# %% tags=["nbval-ignore-output"]
Scores({f"layer {best}, {'mean of heads' if head < 0 else f'head {head}'}: strongest patch inside": points})

# %% tags=["check", "nbval-check-output"]
assert points.value > 3 * points.chance
print("chosen on validation scenes; on test scenes it points more than three times as often as chance")

# %%
with torch.no_grad(), record_attention(model) as image_maps:
    model.embed_images(picture)
with torch.no_grad(), record_attention(model) as pair_maps:
    model.match(picture, text)
of_class = attention.cls_map(image_maps[f"joint.{best}.self"])[0]  # (P,)
heat = attention.word_patch_attention(pair_maps, text.length)[f"joint.{best}.self"][0]  # (H, L, P)
heat = heat.mean(dim=0) if head < 0 else heat[head]
heat = heat / heat.sum(dim=1, keepdim=True)  # of each word's attention to the patches, where does it go?
caption_words = group_words(tokenizer, text.ids[0])
named = [region for region in test.regions(shown_row) if region.kind in ("object", "phrase")]
drawing.attention_figure(
    test[shown_row].image,
    ["alone: class", *[word for word, _ in caption_words]],
    [attention.to_grid(m).numpy() for m in (of_class, *[heat[pieces].mean(dim=0) for _, pieces in caption_words])],
    [region.box for region in named],
    columns=-(-(len(caption_words) + 2) // 2),
)

# %% [markdown]
# Look at the colors and nouns in the figure. The maps are on the objects rather than on the background, but they often do
# not separate one object from the other. The score above shows how often a noun points into the right box.
#
# How much attention goes from words to patches, layer by layer, and from patches to words?

# %% tags=["nbval-ignore-output"]
length = text.length
for n, name in enumerate(pair_maps):
    weights = pair_maps[name][0].mean(dim=0)  # (N, N), the mean of the heads
    to_patches, to_words = weights[:length, length:].sum(dim=1).mean(), weights[length:, :length].sum(dim=1).mean()
    print(f"layer {n}: {100 * to_patches:2.0f} % of the words' attention goes to patches, {100 * to_words:2.0f} % of the patches' to words")

# %% [markdown]
# All layers and heads: point at a word, or click a patch.

# %% tags=["nbval-ignore-output"]
viewer = AttentionViewer.of(model, test[shown_row].image, caption, tokenizer, named)
viewer.layer, viewer.head = best, head
viewer

# %% [markdown] slideshow={"slide_type": "slide"}
# ## The same weights, used twice
# **As a dual encoder:** encode images alone and texts alone, compare vectors. **As a fusion encoder:** encode both
# together; does the text match, which word is masked? No weight changes in between. Your model, or the bundled one in
# profile `quick`:

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
print("the same weights are above chance at search, at changed facts and at masked words")

# %% [markdown] slideshow={"slide_type": "subslide"}
# How does it compare with the models of the earlier lessons? Three seeds each, same test scenes
# (`python tools/experiments.py vlmo_seeds`). **The comparison is not at equal conditions:**
#
# | model | start | pairs seen in training (steps x batch) | negative captions |
# |---|---|---|---|
# | CLIP | random | 500 x 64 = 32,000 | no |
# | ViLT | grounded single stream (boxes of nouns, masked words) | 450 x 48 = 21,600 | yes |
# | ALBEF | shared towers and their fusion layers, trained to find the boxes of relation phrases | 700 x 48 = 33,600 | yes |
# | VLMo | the same as ViLT | 350 x 32 = **11,200**, a third of ALBEF's | yes |
#
# How to read the bars: a bar is the mean of the seeds, each mark is one seed, the line is the widest 95 % interval among
# them, and the dashed line is chance. First search, by vectors alone (ViLT has none):

# %%
of_each = {"VLMo nano": "vlmo_seeds", "ALBEF nano": "albef_seeds", "CLIP nano": "clip_seeds", "ViLT nano": "vilt_seeds"}
found = {name: by_variant(record)[name] for name, record in of_each.items()}
searchers = {name: runs for name, runs in found.items() if name != "ViLT nano"}
drawing.bars_with_spread(searchers, ["text to image R@1", "image to text R@1"])

# %% [markdown]
# Then reading: the true caption against one with a changed fact, and masked words (which CLIP cannot predict).

# %%
kinds = [f"counterfactual: {kind}" for kind in ("object", "color", "size", "relation", "swap", "mean")]
drawing.bars_with_spread(found, kinds)

# %%
readers = {name: runs for name, runs in found.items() if name != "CLIP nano"}
drawing.bars_with_spread(readers, ["masked word: right image", "masked word: wrong image"])

# %% [markdown]
# *What we see.*
#
# * **Search:** VLMo reaches R@1 .83 to .87 (text to image), ALBEF .84 to .85 with three times as many pairs,
#   CLIP .79 from a random start.
# * **Changed facts** (mean of the kinds): VLMo .88 to .90, ViLT .84 to .86, ALBEF .91 to .92, CLIP .72 to .74. VLMo finds
#   changed relations (.89 to .95) and swaps (.92 to .96). From the shared towers, with relation words masked like all
#   others, it was at chance on both (the rows with experts of `vlmo_ablation`, further below).
# * **Masked words:** VLMo .90 to .91 with the right image and .16 to .20 with a wrong one; ViLT .92, ALBEF .90 to .94.
#
# **So one set of weights serves for search and for reading**, at 350 steps of 32 pairs beyond its start.
#
# **What this does not show:** whether MoME is better than ViLT's single feed-forward layers or ALBEF's fusion layers. The
# starts, the losses and the numbers of pairs differ. And the start has seen boxes, which the paper's has not.
#
# The cost table once more, with a row for VLMo:

# %% tags=["nbval-ignore-output"]
costs([*known, ("VLMo", trained, one_fact("vlmo_seeds", "VLMo nano"))])

# %% [markdown]
# * **each once:** VLMo runs one modality at a time, as CLIP does.
# * **every pair:** VLMo runs all layers on words and patches together, as ViLT does, and can share nothing between pairs.
#   ALBEF's time in this column counts each image encoding once; per pair only its text side and fusion layers run.
# * **best 16** is the practical way: search with vectors, then re-rank with matching. Does re-ranking help here?

# %% tags=["nbval-ignore-output"]
ranked = {k: reranked(model, test, tokenizer, k=k, unique=100) for k in (0, 4)}
Scores({f"{way} R@1, best {k} re-ranked": ranked[k][f"{way} R@1"] for way in ("text to image", "image to text") for k in ranked})

# %% [markdown]
# Compare the rows with 0 and 4 re-ranked candidates. Re-ranking can help only if matching is better than the vectors at
# telling the best candidates apart. These often differ in their relations only.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Change one thing: do experts help?
# One feed-forward layer for all tokens against experts, both from the shared towers and with the usual masking. Everything
# else is equal, also the computation per token. Three seeds
# each (`python tools/experiments.py vlmo_ablation`). **The number of parameters is not equal:** 1.9 million with experts, 1.2
# million with one shared layer. So the experiment measures experts *together with* the additional parameters.

# %%
measures = ["text to image R@1", "counterfactual: object", "counterfactual: color", "counterfactual: relation"]
measures += ["counterfactual: mean", "masked word: right image"]
drawing.bars_with_spread(by_variant("vlmo_ablation"), measures)

# %% [markdown]
# *What we see.* With experts R@1 (text to image) is .83 to .85, without .79 to .82. Changed colors: .79 to .97 against .59
# to .73. Changed objects: .60 to .71 against .51 to .58. Masked words: .30 to .36 against .24 to .29. In these four
# measures every seed with experts is above every seed without, although the 95 % intervals of single runs come close or
# overlap. Relations are at chance in both, and their ranges overlap. For sizes (not drawn) the order is reversed: .54 to .58
# with experts, .59 to .60 without.
#
# At equal computation per token the model with experts is better in most measures. A shared layer with as many
# *parameters* as all experts together would be the missing control; we have not run it.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Do the stages help?
# From random weights this time. Four orders: pairs alone; images, then pairs; images, texts, pairs, as in the paper;
# texts, images, pairs. Each stage has 120 steps, so all rows see the same number of pairs. Only ITC and MLM are trained,
# because matching learns nothing in so few steps (`python tools/experiments.py vlmo_stages`).

# %%
drawing.bars_with_spread(
    by_variant("vlmo_stages"),
    ["text to image R@1", "image to text R@1", "masked word: right image", "masked word: wrong image"],
)

# %% [markdown]
# *What we see.* In these short runs the stages do not help search: R@1 is .12 to .20 for pairs alone, and .03 to .09 after
# any earlier stage. After a stage of texts, masked words are right in .14 to .20 instead of .07 to .08, but just as often
# with a wrong image: the model predicts them from the sentence.
#
# **This cannot bear on the paper's claim.** Our stage has 120 steps on drawn scenes and predicts pixels. The paper's first
# stage is BEiT, trained for a long time on millions of photographs to predict visual codes. Our result says only that a
# very short stage of pixel prediction is a worse start than random weights here. Why it is worse, we have not tested.

# %% [markdown] slideshow={"slide_type": "slide"}
# ## Which modality first?
# VLMo freezes an attention trained on images and trains texts on it. Would an attention trained on *texts* serve images?
# A related experiment has been published: [Lu et al. 2021](https://arxiv.org/abs/2103.05247) froze the attention and the
# feed-forward layers of a language model and trained only the remaining small parts on other data, images among them.
# They report results close to training all parameters.
#
# We ask it of VLMo, where only attention is frozen, with two controls: a **random** attention that is frozen, and an
# attention that is **trained along**. No pairs are used. The score is how much of the masked part is predicted
# (`python tools/experiments.py vlmo_frozen`).

# %%
carried = by_variant("vlmo_frozen")
drawing.bars_with_spread({name: runs for name, runs in carried.items() if name.startswith("texts")}, ["masked words"])

# %%
drawing.bars_with_spread({name: runs for name, runs in carried.items() if name.startswith("images")}, ["masked patches"])

# %% [markdown]
# Masked words: the share predicted right from the text alone. Masked patches: the share of the variance of the pixels that
# is explained, between 0 and 1.
#
# *What we see.* In both directions, the attention trained on the other modality is no better than a random one. Masked
# words: .25 to .27 with the attention of images, .25 to .26 with a random one, .27 to .28 when it is trained along. Masked
# patches: .36 with the attention of texts, .36 with a random one, .38 to .39 when it is trained along.
#
# **What follows.** Freezing the attention costs little in this task, even if it is random. So good results on frozen
# attention are no evidence that anything was *transferred*; a random control is needed. **What does not follow:** whether
# attention transfers after long training on much data. Ours was trained for 250 steps.

# %% [markdown] slideshow={"slide_type": "subslide"}
# *Your turn:* the VL expert. What changes without it (`vl_from=4`), so that pairs keep the experts of their modality up to
# the top? What if it starts early (`vl_from=1`)? Predict, then run; about two minutes each in profile `laptop`.

# %% tags=["nbval-ignore-output"]
if profile() == "quick":
    print("profile quick: not run; restart with MINIVLP_PROFILE=laptop")
for vl_from in (4, 1):
    if profile() != "quick":
        torch.manual_seed(0)
        mine = replace(recipe, config=recipe.config | {"vl_from": vl_from})
        other = mine.build(VLMo, tokenizer)
        fit(other, mine.batches(scenes, tokenizer), mine.settings(steps=200))
        print(vl_from, counterfactual(other.cpu(), Scenes(400, split="validation", seed=5), tokenizer)["mean"])

# %% [markdown] slideshow={"slide_type": "slide"}
# ## What the paper reported, and what we saw
# The paper: [Bao et al. 2022, arXiv 2111.02358](https://arxiv.org/abs/2111.02358). Its numbers below are those of the
# [authors' README](https://github.com/microsoft/unilm/tree/master/vlmo) for the base model.
#
# | | the paper | here |
# |---|---|---|
# | data | images of BEiT; Wikipedia and BookCorpus; 4 million images with captions | 12,000 scenes made on the spot |
# | size (base) | 175 M parameters | 1.9 M |
# | start | BEiT, then texts on frozen attention | a single stream trained on scenes with boxes |
# | search, fine-tuned, R@1 image to text / text to image | COCO 74.8 / 57.2; Flickr30k 92.3 / 79.3 | about as good as our ALBEF |
# | reading | VQA test-dev 76.64; NLVR2 test-P 83.34 | all kinds of changed facts above chance, see above |
# | experts or one FFN for all | experts are better | better in most measures, with more parameters |
# | images first, then texts | each stage helps | not testable in 120 steps |
# | texts first, then images | not reported; see Lu et al. 2021 | frozen attention of the other modality is no better than a random one after 250 steps |
# | hard negatives from all GPUs | better than from one batch | not tested |
#
# ## Recap
# * MoME: attention is shared, the feed-forward layer and its LayerNorm exist once per modality. No router is learned.
# * The same weights serve as a dual encoder (one modality at a time) and as a fusion encoder (both, with the VL expert).
# * Experts allow stages on images alone and on text alone. Stage 2 trains text experts with attention frozen.
# * A comparison needs equal starts, budgets and parameters, or these must be stated.
#
# ## Discussion
# 1. The experts add parameters but no computation per token. Which resource do they cost?
# 2. A colleague trains text experts on frozen attention of images and gets good masked words: "Attention is universal."
#    Which control do you ask for?
# 3. Why can VLMo not reuse the encoding of an image for many texts when it matches pairs? ALBEF can.
#
# <details><summary>Answers</summary>
#
# 1. Memory: weights, their gradients and the optimizer state. Loading and sending the model also take longer.
# 2. A frozen *random* attention. In our runs it did as well.
# 3. In VLMo words and patches attend to each other in every layer, so the states of the patches depend on the text. ALBEF's
#    image tower sees the image only.
# </details>
#
# **Next:** lesson 05, BLIP. It adds a decoder that writes captions, and uses it to clean its training data.
