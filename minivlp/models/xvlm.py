"""X-VLM: words meet the part of the picture they speak of (Zeng, Zhang and Li, ICML 2022, "Multi-Grained Vision
Language Pre-Training: Aligning Texts with Visual Concepts").

    image ──► image tower, once ──► all patches ────────────────────────────┐ (for the box: the FULL image)
                                      │                                     │
                  box of each phrase ─┴─► region tokens ──┬─► ITC           ▼
                                                          └─► fusion ──► ITM, MLM     fusion ──► box (cx, cy, w, h)
    "a heart", "a red heart", a caption ──► text tower ───────┘ ───────────────────────────┘

What was new: an object, a region and a whole image are all just a set of patches with a text, so one contrastive, one
matching and one masking loss serve all grains; the image is encoded once for all of its regions; and a box is predicted
from words, which forces the towers to keep *where* things are.

Two published ways to turn a box into tokens: `PooledRegions` (the paper's Swin tower) and `RerunRegions` (its ViT and
CLIP towers). A whole-image box reproduces the plain forward pass in both.

Code and paper: the box is never predicted from the region's own tokens, which would give the answer away. In the code
every other row of a batch is a negative; here rows with the same words or the same box are not (`same_place`), because
in a small world "a red heart" is often true twice. New modules (the cross-attention, the heads) learn at twice the rate
when the towers come pre-trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Batch
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, ImageEncoder, TextConfig
from minivlp.layers.timm_tower import image_tower
from minivlp.models.fused import FusedTowers, precise, take, with_wrong
from minivlp.objectives.boxes import box_losses, box_to_patches
from minivlp.objectives.contrastive import contrastive_loss, same_group
from minivlp.objectives.masking import IGNORE, Masked, choose_spans, hide, maskable, masked_loss, word_groups
from minivlp.objectives.matching import Negatives, hard_negatives


@dataclass(frozen=True)
class SwinConfig(ImageConfig):
    """The paper's image tower, taken from timm. `patch_size` and `block` are those of the last stage, which we see."""

    first_patch: int = 4
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)
    window: int = 7


@dataclass(frozen=True)
class XVLMConfig:
    """Sizes, and which losses are on.

    rerun_blocks: how many of the last image blocks are run again for each region, seeing only its box; 0 pools instead.
    tie_words: masked words are read off with the word embedding itself.
    losses: any of itc, itm, mlm, box_l1, box_giou, for ablations. Leave out the objects or all regions by the loader's
    `kinds` and `regions_per_image`.
    mask_rate, mask_at_most: of the tokens of a text. never_mask: ids that are not asked, the special tokens at least;
    add the ids of "a" and "of" to ask for content only. Defaults are the ids of our tokenizer.
    """

    image: ImageConfig
    text: TextConfig
    fusion_layers: int
    embed_width: int
    rerun_blocks: int = 0
    tie_words: bool = True
    losses: tuple[str, ...] = ("itc", "itm", "mlm", "box_l1", "box_giou")
    temperature: float = 0.07
    mask_rate: float = 0.25
    mask_at_most: int = 8
    mask_id: int = 3
    never_mask: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> XVLMConfig:
        """2.0 M parameters, minutes on a laptop.

        Ours, because the published choice learns nothing in minutes: fixed sine-cosine positions (with learned ones the
        box head stays blind), patches in two steps, LayerNorm first, ReLU, wider initial word embeddings, which are
        too wide to read words off (a masked word would start at a loss of 17 instead of ln V = 7).
        """
        block = BlockConfig(width=128, heads=4, hidden=512, activation="relu")
        return cls(
            image=ImageConfig(64, 8, 3, block, two_step_patches=True, sincos_positions=True),
            text=TextConfig(vocabulary, 56, 2, block, word_std=0.5, position_std=0.2),
            fusion_layers=2,
            embed_width=64,
            tie_words=False,
        )

    @classmethod
    def small(cls, vocabulary: int = 30522) -> XVLMConfig:
        """About 55 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        block = BlockConfig(width=384, heads=6, hidden=1536)
        return cls(
            image=ImageConfig(128, 8, 8, block, two_step_patches=True, sincos_positions=True),
            text=TextConfig(vocabulary, 64, 4, block, word_std=0.5, position_std=0.2),
            fusion_layers=4,
            embed_width=256,
            tie_words=False,
        )

    @classmethod
    def paper(cls) -> XVLMConfig:
        """Swin-B at 224 pixels and BERT-base, whose upper six layers fuse: 216 M parameters. Needs timm."""
        text_block = BlockConfig(768, 12, 3072, norm_eps=1e-12, norm_first=False)
        return cls(
            image=SwinConfig(224, 32, 24, BlockConfig(1024, 32, 4096)),
            text=TextConfig(30522, 512, 6, text_block, embed_norm=True, position_std=0.02),
            fusion_layers=6,
            embed_width=256,
            mask_id=103,
            never_mask=(0, 100, 101, 102, 103),
        )


class SwinEncoder(nn.Module):
    """timm's Swin transformer as one of our towers: images (B, 3, H, W) -> tokens (B, 1+P, D), their mean first."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformer  # only the paper's size needs it

        self.swin = SwinTransformer(
            img_size=config.image_size,
            patch_size=config.first_patch,
            embed_dim=config.block.width // 2 ** (len(config.depths) - 1),
            depths=config.depths,
            num_heads=config.heads,
            window_size=config.window,
            num_classes=0,
            drop_path_rate=0.0,  # as everywhere here: nothing random in a forward pass
        )

    def forward(self, images: Tensor) -> Tensor:
        patches = self.swin.forward_features(images).flatten(1, 2)  # (B, rows, columns, D) -> (B, P, D)
        return torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1)  # (B, 1+P, D)


class PooledRegions:
    """The Swin way: an image's first token is the mean of its patches, a region's the mean of those inside its box.

    All patches are kept for every region; the fusion layers are told which to look at. Nothing is computed twice.
    """

    def whole(self, image: nn.Module, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, 1+P, D)."""
        patches = image(images)[:, 1:]  # (B, P, D)
        return self.pool(patches, torch.ones_like(patches[..., 0], dtype=torch.bool))

    def parts(self, image: nn.Module, images: Tensor, rows: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Also the tokens (R, 1+P, D) of regions: `rows` (R,) says of which image, `inside` (R, P) of which patches."""
        whole = self.whole(image, images)
        return whole, self.pool(whole[:, 1:].index_select(0, rows), inside)

    @staticmethod
    def pool(patches: Tensor, inside: Tensor) -> Tensor:
        """Put the mean of the patches `inside` (R, P) in front of them: (R, P, D) -> (R, 1+P, D)."""
        share = inside.to(patches.dtype) / inside.sum(dim=1, keepdim=True)  # (R, P)
        return torch.cat([share[:, None, :] @ patches, patches], dim=1)


@dataclass(frozen=True)
class RerunRegions:
    """The ViT way: the last `blocks` layers run again for each region, and see nothing outside its box.

    The first token sums up the region as the class token sums up the image; the layers below saw the whole image, so a
    region still knows its surroundings.
    """

    blocks: int

    def whole(self, image: ImageEncoder, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, 1+P, D)."""
        return image(images)

    def parts(self, image: ImageEncoder, images: Tensor, rows: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """Also the tokens (R, 1+P, D) of regions: `rows` (R,) says of which image, `inside` (R, P) of which patches."""
        x = image.embed(images)
        for block in image.blocks[: -self.blocks]:
            x = block(x)
        regions, seen = x.index_select(0, rows), with_first(inside)[:, None, None, :]  # (R, 1+P, D), (R, 1, 1, 1+P)
        for block in image.blocks[-self.blocks :]:
            x, regions = block(x), block(regions, seen)
        return image.norm(x), image.norm(regions)


class XVLM(FusedTowers):
    """Aligns texts with images, regions and objects, and says where they are."""

    Config = XVLMConfig
    lesson = "06"

    def __init__(self, config: XVLMConfig, continues: Tensor | None = None) -> None:
        """`continues` (V,) bool: which ids go on with the word before ("##ing"); None if every token is a word."""
        image = SwinEncoder(config.image) if isinstance(config.image, SwinConfig) else image_tower(config.image)
        super().__init__(config, image, mlp_head(config.text.block.width, 2))
        self.regions = RerunRegions(config.rerun_blocks) if config.rerun_blocks else PooledRegions()
        self.box_head = mlp_head(config.text.block.width, 4)
        none = torch.zeros(config.text.vocabulary, dtype=torch.bool)
        self.register_buffer("continues", none if continues is None else continues, persistent=False)

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, 1+P, D); the first sums up the image."""
        return self.regions.whole(self.image, images)

    def encode_regions(self, images: Tensor, boxes: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images and the parts of them that `boxes` (R, 4) frame, each image encoded once.

        `rows` (R,) says which image a box is in. Returns image tokens (B, 1+P, D), region tokens (R, 1+P, D) and, as a
        mask for the fusion layers, which of a region's tokens lie inside: (R, 1+P) bool, the first always.
        """
        patch = self.config.image.patch_size
        inside = box_to_patches(boxes, (images.shape[2] // patch, images.shape[3] // patch))
        return *self.regions.parts(self.image, images, rows, inside), with_first(inside)

    def embed_regions(self, images: Tensor, boxes: Tensor, rows: Tensor) -> Tensor:
        """What is inside each of `boxes` (R, 4), box r in image `rows[r]`, as unit vectors (R, E)."""
        return self.embed_visual(self.encode_regions(images, boxes, rows)[1])

    def match_regions(self, images: Tensor, boxes: Tensor, rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(R,) probability that text r (ids, mask (R, L)) says what is inside box r of image rows[r]."""
        _, visual, seen = self.encode_regions(images, boxes, rows)
        return self.match_logits(self.fuse(self.encode_text(ids, mask), mask, visual, seen)).softmax(dim=-1)[:, 1]

    def ground(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Boxes (B, 4) of what the texts speak of."""
        return self.boxes_from(self.look(images, ids, mask))

    def ground_many(self, images: Tensor, rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Boxes (R, 4) of what text r (ids, mask (R, L)) speaks of in image rows[r]; each image is encoded once."""
        return self.boxes_from(self.look_many(images, rows, ids, mask))

    def boxes_from(self, fused: Tensor) -> Tensor:
        """Fused tokens (B, L, D), looking at the FULL image, -> boxes (B, 4)."""
        return precise(self.box_head(fused[:, 0])).sigmoid()

    def losses(
        self, batch: Batch, negatives: Negatives | None = None, masked: Masked | None = None
    ) -> dict[str, Tensor]:
        """The losses of `config.losses`, of the batch's regions if it has any, else of its image-caption pairs.

        The paper mixes both kinds of batch. Box losses need regions; whole-image rows do not count in them. False
        captions that pairs bring along are more wrong pairs for the matching loss. `negatives` and `masked` take the
        place of what is otherwise drawn at random.
        """
        on = set(self.config.losses)
        has_regions = batch.region_boxes is not None and len(batch.region_boxes) > 0
        if not has_regions:
            visual, seen = self.encode_image(batch.images), None
            ids, mask, place = batch.ids, batch.mask, batch.image_ids
        else:
            whole, visual, seen = self.encode_regions(batch.images, batch.region_boxes, batch.region_image)
            ids, mask = batch.region_ids, batch.region_mask
            place = same_place(batch.image_ids[batch.region_image], batch.region_boxes)
        texts, real = (ids, mask) if has_regions or "itm" not in on else with_wrong(batch)
        words = self.encode_text(texts, real)
        out = {}
        if on & {"itc", "itm"}:
            together = same_group(place, ids, mask)
            visual_vectors, text_vectors = self.embed_visual(visual), self.embed_words(words[: len(ids)])
        if "itc" in on:
            out["itc"] = contrastive_loss(visual_vectors, text_vectors, 1 / self.temperature, together)
        if on & {"itm", "mlm"}:  # once for all the texts that will look at it
            keys_values = self.fusion.keys_values(visual)
        if "itm" in on:
            if negatives is None:
                negatives = hard_negatives(visual_vectors @ text_vectors.T / self.temperature, together)
            out["itm"] = self.matching(words, real, keys_values, negatives, seen)
        if "mlm" in on:
            masked = masked or self.hide_words(ids, mask)
            asked = masked.labels[masked.labels != IGNORE]
            out["mlm"] = masked_loss(self.guess(masked, mask, keys_values, seen), asked)
        if on & {"box_l1", "box_giou"} and has_regions:
            fused = self.fuse(words, mask, take(self.fusion.keys_values(whole), batch.region_image))
            l1, giou = box_losses(self.boxes_from(fused), batch.region_boxes, batch.region_is_image)
            out |= {name: loss for name, loss in (("box_l1", l1), ("box_giou", giou)) if name in on}
        return out

    def hide_words(self, ids: Tensor, mask: Tensor) -> Masked:
        """Put some of each text (B, L) behind [MASK]: whole words and short spans, at most `mask_at_most` tokens."""
        config = self.config
        candidates = maskable(ids, mask, config.never_mask)
        chosen = choose_spans(candidates, word_groups(self.continues[ids]), config.mask_rate, config.mask_at_most)
        return hide(ids, chosen, config.mask_id, config.text.vocabulary)


def mlp_head(width: int, out: int) -> nn.Sequential:
    """The head of matching and of boxes: (..., D) -> (..., out)."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(), nn.Linear(2 * width, out))


def with_first(inside: Tensor) -> Tensor:
    """Patches (R, P) bool -> tokens (R, 1+P): the first token is always seen."""
    return F.pad(inside, (1, 0), value=True)


def same_place(image_ids: Tensor, boxes: Tensor) -> Tensor:
    """(R,) numbers, equal where image and box are: "a heart" and "a red heart" of one box are no negatives.

    image_ids (R,), boxes (R, 4).
    """
    return torch.cat([image_ids[:, None].double(), boxes.double()], dim=1).unique(dim=0, return_inverse=True)[1]
