"""VLMo: one transformer whose layers keep an expert per modality (Bao et al., NeurIPS 2022, "VLMo: Unified
Vision-Language Pre-Training with Mixture-of-Modality-Experts").

                                          ┌─► text expert ──┐
    text  ──► words ────┐                 │                 │
                        ├─► attention, ───┼─► image expert ─┼──► next layer
    image ──► patches ──┘   one for all   │                 │
                                          └─► VL expert ────┘   (only in the top layers)

    what comes in      lower layers           top layers      what it is good for
    an image           image expert           image expert    a vector to search with
    a text             text expert            text expert     a vector to search with
    both, text first   text | image expert    VL expert       match? (yes / no) · which word is hidden?

What was new: a dual encoder and a fusion encoder in one set of weights. Attention is shared by all, and only the
feed-forward layer knows what a token is; no router is learned, the modality decides. So the layers can be trained in
stages, on images without text and on text without images, before there are any pairs (`training.stages`).

Here as in the released code: the contrastive loss is computed twice, with the experts of one modality up to the top and
with the VL expert in the top layers, and both are averaged; retrieval uses the first. Each expert has its own LayerNorm
in front, while LayerScale is shared. Both temperatures are learned and never clamped; hidden words count a quarter.

Where we differ and it does not matter: keys have no bias there, since it adds the same number to all scores of a query
and the softmax takes it out again; ours may stay. There, texts are padded to one length and the joint input is split at
it; here at the longest text of the batch, since nothing looks at padding. Where it does: another row of the same image
or caption is no wrong pair here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Batch
from minivlp.layers.attention import Attention, padding_mask
from minivlp.layers.block import BlockConfig, FeedForward, initialise
from minivlp.layers.embed import PatchEmbed, TwoStepPatchEmbed, WordEmbed, sincos_positions
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.layers.heads import WordHead
from minivlp.layers.relative import RelativePositions
from minivlp.models.fused import precise, with_wrong
from minivlp.objectives.contrastive import contrastive_loss, same_group
from minivlp.objectives.masking import IGNORE, Masked, choose_words, hide, maskable, masked_loss, word_groups
from minivlp.objectives.matching import Negatives, hard_negatives, matching_loss

Parts = tuple[tuple[str, int], ...]  # which expert takes how many tokens, in their order: (("text", 9), ("image", 65))
Looks = Callable[[int], Tensor | None]  # the mask of each layer, as in `Attention`

BERT_EPS = 1e-12  # of the LayerNorms that come from BERT: after the words, and in the head that guesses them
LOWEST = torch.finfo(torch.bfloat16).min  # the bias of what must not be looked at; fits bfloat16 and float32
MLM_WEIGHT = 0.25  # the released code's
EVERYBODYS = ("joint.norm.", "joint.relative.", "modality")  # beginnings of names: what every stage trains


@dataclass(frozen=True)
class VLMoConfig:
    """Sizes, and which losses are on.

    image, text: `layers` and `block` must agree, since both go through the same layers. `image.sincos_positions` is
    ours: absolute positions, sine-cosine for patches and learned for words, in place of the published relative ones.
    vl_from: first layer with a VL expert. layer_scale: initial size of each residual branch, None leaves the factor
    out. shared_expert: one feed-forward layer for all modalities instead of experts, at equal compute (the paper's
    ablation). losses: any of itc, itm, mlm, for ablations. mask_rate: of whole words. never_mask: ids that are not
    asked, the special tokens at least.
    """

    image: ImageConfig
    text: TextConfig
    vl_from: int
    embed_width: int
    layer_scale: float | None = 0.1
    shared_expert: bool = False
    losses: tuple[str, ...] = ("itc", "itm", "mlm")
    temperature: float = 0.07
    mask_rate: float = 0.15
    mask_id: int = 3
    never_mask: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> VLMoConfig:
        """1.9 M parameters, minutes on a laptop. Ours, as for X-VLM: absolute positions, two-step patches, ReLU.

        LayerScale is left out: in a run of minutes it only delays.
        """
        block = BlockConfig(width=128, heads=4, hidden=512, activation="relu")
        return cls(
            image=ImageConfig(64, 8, 4, block, two_step_patches=True, sincos_positions=True),
            text=TextConfig(vocabulary, 56, 4, block, word_std=0.5, position_std=0.2),
            vl_from=3,
            embed_width=64,
            layer_scale=None,
        )

    @classmethod
    def small(cls, vocabulary: int = 30522) -> VLMoConfig:
        """About 50 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        block = BlockConfig(width=384, heads=6, hidden=1536)
        return cls(
            image=ImageConfig(128, 8, 8, block, two_step_patches=True, sincos_positions=True),
            text=TextConfig(vocabulary, 64, 8, block, word_std=0.5, position_std=0.2),
            vl_from=6,
            embed_width=256,
            layer_scale=None,
        )

    @classmethod
    def paper(cls) -> VLMoConfig:
        """VLMo-Base: 175 M parameters without the heads of pre-training, as the README of the released code counts."""
        block = BlockConfig(768, 12, 3072, norm_eps=1e-6)
        return cls(
            image=ImageConfig(224, 16, 12, block),
            text=TextConfig(30522, 196, 12, block, embed_norm=True),
            vl_from=10,
            embed_width=768,
            mask_id=103,
            never_mask=(0, 100, 101, 102, 103),
        )


# ------------------------------------------------------------------------------------------------------------ layers


class Expert(nn.Module):
    """LayerNorm and feed-forward of one modality: (B, n, D) -> (B, n, D)."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config.width, config.hidden, config.activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.norm(x))


class MoMEBlock(nn.Module):
    """Self-attention for all tokens together, then each token's own expert; both residual, LayerNorm first."""

    def __init__(self, config: BlockConfig, experts: tuple[str, ...], layer_scale: float | None) -> None:
        super().__init__()
        width = config.width
        self.self_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.self_attention = Attention(width, config.heads)
        self.experts = nn.ModuleDict({name: Expert(config) for name in experts})
        scales = [1.0 if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale)) for _ in range(2)]
        self.attention_scale, self.expert_scale = scales  # (D,) each: LayerScale (Touvron et al. 2021)

    def expert(self, name: str) -> Expert:
        """The expert of this name, or the one that all share."""
        return self.experts[name if name in self.experts else "shared"]

    def forward(self, x: Tensor, parts: Parts, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D); mask as in `Attention`."""
        x = x + self.attention_scale * self.self_attention(self.self_norm(x), mask=mask)
        runs = x.split([count for _, count in parts], dim=1)  # (B, n, D) each
        done = [self.expert(name)(run) for (name, _), run in zip(parts, runs, strict=True)]
        return x + self.expert_scale * (torch.cat(done, dim=1) if len(done) > 1 else done[0])


class MoMEEncoder(nn.Module):
    """All layers, and the routes through them: x (B, N, D), whose first `words` tokens are text and the rest image."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__()
        block, layers = config.image.block, config.image.layers
        self.lower, self.upper = range(config.vl_from), range(config.vl_from, layers)
        below, above = (("shared",),) * 2 if config.shared_expert else (("text", "image"), ("text", "image", "vl"))
        experts = [below if layer < config.vl_from else above for layer in range(layers)]
        self.blocks = nn.ModuleList(MoMEBlock(block, names, config.layer_scale) for names in experts)
        self.norm = nn.LayerNorm(block.width, eps=block.norm_eps)
        self.relative = None
        if not config.image.sincos_positions:
            self.relative = RelativePositions(config.text.context_length, config.image.grid, layers, block.heads)
        initialise(self.blocks)

    def forward(self, x: Tensor, words: int, mask: Tensor | None = None) -> Tensor:
        """Tokens after the final LayerNorm, (B, N, D). mask (B, words) is True on real text tokens."""
        own, looks = self.parts(words, x.shape[1] - words), self.looks(words, x.shape[1] - words, mask)
        top = own if len(own) == 1 else (("vl", x.shape[1]),)
        return self.norm(self.run(self.run(x, self.lower, own, looks), self.upper, top, looks))

    def both(self, x: Tensor, words: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One modality's tokens with its own expert up to the top, and with the VL expert in the top layers."""
        own, looks = self.parts(words, x.shape[1] - words), self.looks(words, x.shape[1] - words, mask)
        middle = self.run(x, self.lower, own, looks)
        tops = own, (("vl", x.shape[1]),)
        return tuple(self.norm(self.run(middle, self.upper, parts, looks)) for parts in tops)

    def run(self, x: Tensor, layers: range, parts: Parts, looks: Looks) -> Tensor:
        """Some of the layers."""
        for layer in layers:
            x = self.blocks[layer](x, parts, looks(layer))
        return x

    @staticmethod
    def parts(words: int, patches: int) -> Parts:
        """Each token to the expert of its modality."""
        return tuple((name, count) for name, count in (("text", words), ("image", patches)) if count)

    def looks(self, words: int, patches: int, mask: Tensor | None) -> Looks:
        """For each layer, who may look at whom and what relative positions add to that."""
        real = None if mask is None else padding_mask(F.pad(mask, (0, patches), value=True))  # (B, 1, 1, N)
        if self.relative is None:
            return lambda layer: real
        bias = self.relative(words, patches)[:, None]  # (layers, 1, H, N, N)
        return lambda layer: bias[layer] if real is None else bias[layer].masked_fill(~real, LOWEST)


# ------------------------------------------------------------------------------------------------------------- model


class VLMo(nn.Module):
    """A dual encoder and a fusion encoder in the same weights."""

    Config = VLMoConfig
    lesson = "04"

    def __init__(self, config: VLMoConfig, continues: Tensor | None = None) -> None:
        """`continues` (V,) bool: which ids go on with the word before ("##ing"); None if every token is a word.

        Raises ValueError where image and text differ in `layers` or `block`.
        """
        super().__init__()
        self.config = config
        image, text = config.image, config.text
        if (image.layers, image.block) != (text.layers, text.block):
            raise ValueError("image and text go through the same layers: give both the same `layers` and `block`")
        width, position_std = image.block.width, text.position_std if image.sincos_positions else None
        self.patches = (TwoStepPatchEmbed if image.two_step_patches else PatchEmbed)(image.patch_size, width)
        self.class_token = nn.Parameter(0.02 * torch.randn(width))
        norm_eps = BERT_EPS if text.embed_norm else None
        self.words = WordEmbed(text.vocabulary, text.context_length, width, text.word_std, position_std, norm_eps)
        self.modality = nn.Parameter(0.02 * torch.randn(2, width))  # of text, of image
        self.joint = MoMEEncoder(config)
        self.pooler = nn.Linear(width, width)
        self.match_head = nn.Linear(width, 2)
        self.word_head = WordHead(width, text.vocabulary, BERT_EPS)
        self.project_image, self.project_text, self.project_image_vl, self.project_text_vl = (
            nn.Linear(width, config.embed_width, bias=False) for _ in range(4)
        )
        start = math.log(1 / config.temperature)  # learned as logarithms, as in CLIP
        self.log_scale, self.log_scale_vl = (nn.Parameter(torch.tensor(start)) for _ in range(2))
        none = torch.zeros(text.vocabulary, dtype=torch.bool)
        self.register_buffer("continues", none if continues is None else continues, persistent=False)

    def image_input(self, images: Tensor, hidden: Tensor | None = None, instead: Tensor | None = None) -> Tensor:
        """What the first layer sees of images (B, 3, H, W): (B, 1+P, D). `instead` (D,) stands for `hidden` (B, P)."""
        config, (height, width) = self.config.image, images.shape[-2:]
        if height % config.patch_size or width % config.patch_size:  # a convolution would silently cut the rest off
            raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of {config.patch_size}")
        patches = self.patches(images)  # (B, D, rows, columns)
        grid = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)  # (B, P, D)
        if hidden is not None:
            patches = torch.where(hidden[..., None], instead, patches)
        if config.sincos_positions:
            patches = patches + sincos_positions(*grid, patches.shape[-1]).to(patches.device)
        elif grid != (config.grid, config.grid):
            raise ValueError(
                f"relative positions are learned for images of {config.image_size} x {config.image_size} pixels, "
                f"not {height} x {width}"
            )
        first = self.class_token.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.modality[1]

    def text_input(self, ids: Tensor) -> Tensor:
        """What the first layer sees of ids (B, L): (B, L, D)."""
        return self.words(ids) + self.modality[0]

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, 1+P, D), by the image experts alone; the first sums up the image."""
        return self.joint(self.image_input(images), words=0)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, L) -> tokens (B, L, D), by the text experts alone."""
        return self.joint(self.text_input(ids), ids.shape[1], mask)

    def fuse(self, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """`text_input` (B, L, D) with its mask, and `image_input` (B, 1+P, D), in one pass -> (B, L+1+P, D)."""
        return self.joint(torch.cat([text, image], dim=1), text.shape[1], mask)

    def embed_images(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> unit vectors (B, E)."""
        return unit(self.project_image, self.encode_image(images))

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, L) -> unit vectors (B, E)."""
        return unit(self.project_text, self.encode_text(ids, mask))

    def similarity(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Scaled cosines of every image with every text, (B_img, B_txt), each encoded alone."""
        return self.log_scale.exp() * self.embed_images(images) @ self.embed_texts(ids, mask).T

    def match(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,) probability that image and text of equal rows belong together."""
        fused = self.fuse(self.text_input(ids), mask, self.image_input(images))
        return self.match_logits(fused).softmax(dim=-1)[:, 1]

    def fill(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L, V) logits of the word at every position; hide those that you ask for behind [MASK]."""
        fused = self.fuse(self.text_input(ids), mask, self.image_input(images))
        return self.word_logits(fused[:, : ids.shape[1]])

    def match_logits(self, fused: Tensor) -> Tensor:
        """Fused tokens (B, N, D) -> logits (B, 2), read at the first token of the text; column 1 = they match."""
        return precise(self.match_head(self.pooler(fused[:, 0]).tanh()))

    def word_logits(self, tokens: Tensor) -> Tensor:
        """Tokens (…, D), fused or of a text alone -> logits (…, V)."""
        return precise(self.word_head(tokens))

    def losses(
        self, batch: Batch, negatives: Negatives | None = None, masked: Masked | None = None
    ) -> dict[str, Tensor]:
        """The losses of `config.losses`. `wrong_ids` of the batch are wrong pairs for the matching loss.

        `negatives` and `masked` take the place of what is otherwise drawn at random.
        """
        on, rows = set(self.config.losses), len(batch.ids)
        image = self.image_input(batch.images)
        ids, mask = with_wrong(batch)  # (2B, L) if there are false captions
        text = self.text_input(ids)
        out = {}
        if on & {"itc", "itm"}:
            together = same_group(batch.image_ids, batch.ids, batch.mask)
            image_tokens, image_tokens_vl = self.joint.both(image, words=0)
            text_tokens, text_tokens_vl = self.joint.both(text[:rows], text.shape[1], mask[:rows])
            v, t = unit(self.project_image, image_tokens), unit(self.project_text, text_tokens)
        if "itc" in on:
            v_vl, t_vl = unit(self.project_image_vl, image_tokens_vl), unit(self.project_text_vl, text_tokens_vl)
            own = contrastive_loss(v, t, self.log_scale.exp(), together)
            out["itc"] = (own + contrastive_loss(v_vl, t_vl, self.log_scale_vl.exp(), together)) / 2
        if "itm" in on:
            if negatives is None:
                negatives = hard_negatives(self.log_scale.exp() * v @ t.T, together)
            right, wrong = torch.arange(rows, device=ids.device), torch.arange(rows, len(ids), device=ids.device)
            pairs = [(right, right), negatives.image_pairs(), negatives.text_pairs(), (wrong - rows, wrong)]
            i, j = (torch.cat(side) for side in zip(*pairs, strict=True))
            logits = self.match_logits(self.fuse(text[j], mask[j], image[i]))
            out["itm"] = matching_loss(logits[:rows], logits[rows:])
        if "mlm" in on:
            masked = masked or self.hide_words(batch.ids, batch.mask)
            asked = masked.labels != IGNORE  # (B, L)
            fused = self.fuse(self.text_input(masked.ids), batch.mask, image)[:, : asked.shape[1]]
            out["mlm"] = MLM_WEIGHT * masked_loss(self.word_logits(fused[asked]), masked.labels[asked])
        return out

    def hide_words(self, ids: Tensor, mask: Tensor) -> Masked:
        """Put some of the whole words of each text (B, L) behind [MASK]."""
        config = self.config
        words = word_groups(self.continues[ids])
        chosen = choose_words(maskable(ids, mask, config.never_mask), words, config.mask_rate)
        return hide(ids, chosen, config.mask_id, config.text.vocabulary)

    def start_from(self, towers: nn.Module) -> None:
        """Begin with a trained image tower, as the paper begins with BEiT, and with the words that came with it.

        `towers` has an `ImageEncoder` as `image` and a `TextEncoder` as `text`, such as `XVLM`. Its image blocks become
        the attention and the image experts of our lowest layers. Raises ValueError when sizes or positions differ.
        """
        image, expert = towers.image, "shared" if self.config.shared_expert else "image"
        parts = {"patches": image.patches, "words": towers.text.embed}
        for layer, block in enumerate(image.blocks[: len(self.joint.blocks)]):
            ours = {"feed_norm": f"experts.{expert}.norm", "feed_forward": f"experts.{expert}.feed_forward"}
            parts |= {f"joint.blocks.{layer}.{ours.get(name, name)}": part for name, part in block.named_children()}
        new = {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
        own, new["class_token"] = self.state_dict(), image.class_token
        wrong = [name for name, t in new.items() if name not in own or own[name].shape != t.shape]
        if wrong or not image.config.sincos_positions:
            raise ValueError(f"these towers have other sizes or positions than VLMo: {', '.join(wrong) or 'positions'}")
        self.load_state_dict(new, strict=False)

    @staticmethod
    def learns_from_text(name: str) -> bool:
        """Whether the parameter of this name is trained on text alone (stage 2), as in the released code.

        The text experts, all that turns ids into tokens and tokens into words, and, shared with images, the relative
        positions, the modality vectors and the final LayerNorm. Attention, which has learned from images, is not.
        """
        own = ("words.", "word_head.")
        return name.startswith(EVERYBODYS + own) or ".experts.text." in name or ".experts.shared." in name

    @staticmethod
    def learns_from_images(name: str) -> bool:
        """The mirror image of `learns_from_text`: image experts and patches on an attention that is not touched."""
        own = ("patches.", "class_token")
        return name.startswith(EVERYBODYS + own) or ".experts.image." in name or ".experts.shared." in name


def unit(project: nn.Module, tokens: Tensor) -> Tensor:
    """The first of tokens (B, N, D) as unit vectors (B, E)."""
    return F.normalize(precise(project(tokens[:, 0])), dim=-1)
