"""X-VLM: texts are aligned with the part of the picture they describe (Zeng, Zhang and Li, ICML 2022, "Multi-Grained
Vision Language Pre-Training: Aligning Texts with Visual Concepts").

    image ──► image tower, once ──► all patches ────────────────────────────┐ (for the box: the FULL image)
                                      │                                     │
                  box of each phrase ─┴─► region tokens ──┬─► ITC           ▼
                                                          └─► fusion ──► ITM, MLM     fusion ──► box (cx, cy, w, h)
    "a heart", "a red heart", a caption ──► text tower ───────┘ ───────────────────────────┘

What was new: an object, a region and a whole image are all a set of patches with a text, so one contrastive, one
matching and one masking loss serve all granularities; the image is encoded once for all of its regions; and a box is
predicted from the text, which makes the towers keep where things are.

Two published ways to turn a box into tokens stand in `models.regions`: `PooledRegions` (the paper's Swin tower) and
`ReencodedRegions` (its ViT and CLIP towers). A box around the whole image reproduces the plain forward pass in both.

Code and paper: the box is never predicted from the region's own tokens, which would give the answer away. In the code
every other row of a batch is a negative; here rows with the same text or the same box are not (`same_place`), because
in a small world "a red heart" is often true of two pictures. New modules (the cross-attention, the heads) learn at
twice the rate when the towers come pre-trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minivlp.data.batch import Batch, Text
from minivlp.data.processes import ALONE, Processes
from minivlp.layers.attention import KeysValues, Rows, gather_kv, select
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.heads import BoxHead, mlp
from minivlp.layers.swin import SwinConfig, SwinEncoder
from minivlp.layers.timm_tower import image_tower
from minivlp.layers.transformer import BlockConfig
from minivlp.models.aligned import AlignedEncoded
from minivlp.models.fusion_encoder import FusionEncoder
from minivlp.models.regions import PooledRegions, ReencodedRegions, same_place, with_first
from minivlp.models.verbs import FIRST
from minivlp.objectives.boxes import BoxLosses, box_losses, box_to_patches, counted_boxes
from minivlp.objectives.contrastive import find_positives
from minivlp.objectives.masking import SpanMasking, TokenMasking


@dataclass(frozen=True)
class XVLMConfig:
    """Sizes, and which losses are on.

    region_blocks: how many of the last image blocks are run again for each region, attending to its box alone; 0 pools
    instead. tie_words: masked tokens are predicted with the token embedding itself.
    losses: any of itc, itm, mlm, box_l1, box_giou, for ablations. Leave out the objects or all regions by the loader's
    `kinds` and `regions_per_image`.
    """

    image: ImageConfig
    text: TextConfig
    fusion_layers: int
    embed_width: int
    region_blocks: int = 0
    tie_words: bool = True
    losses: tuple[str, ...] = ("itc", "itm", "mlm", "box_l1", "box_giou")
    temperature: float = 0.07
    masking: TokenMasking = SpanMasking()

    @classmethod
    def nano(cls, vocabulary: int = 1200) -> XVLMConfig:
        """2.0 M parameters, minutes on a laptop.

        Its choices are ours, because the published ones learn nothing in minutes: fixed sine-cosine positions (with
        learned ones the box head predicts no better than the mean box), patches in two steps, LayerNorm first, ReLU,
        wider initial token embeddings, to which the output layer cannot be tied (a masked token would start at a loss
        of 17 instead of ln V = 7).
        """
        return cls(ImageConfig.nano(), TextConfig.nano(vocabulary), 2, 64, tie_words=False)

    @classmethod
    def small(cls, vocabulary: int = 30522) -> XVLMConfig:
        """About 55 M parameters for one GPU and a real folder of some thousand pictures (sized on paper only)."""
        return cls(ImageConfig.small(), TextConfig.small(vocabulary), 4, 256, tie_words=False)

    @classmethod
    def paper(cls) -> XVLMConfig:
        """Swin-B at 224 pixels and BERT-base, whose upper six layers fuse: 216 M parameters. Needs timm."""
        bert = BlockConfig(768, 12, 3072, norm_eps=1e-12, norm_first=False)
        return cls(
            image=SwinConfig(224, 32, 24, BlockConfig(1024, 32, 4096)),
            text=TextConfig(30522, 512, 6, bert, embed_norm=True, position_std=0.02),
            fusion_layers=6,
            embed_width=256,
            masking=SpanMasking(mask_id=103, never_mask=(0, 100, 101, 102, 103)),
        )


class RegionsEncoded(AlignedEncoded):
    """The same shared parts where a batch has regions: each region stands where an image does otherwise.

    Without regions, a batch of image-caption pairs is encoded as in ALBEF.
    """

    @cached_property
    def inside(self) -> Tensor:
        """(R, P) bool: which patches each box touches."""
        return self.model.patches_inside(self.batch.regions.boxes, self.batch.images)

    @cached_property
    def both_tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens of images (B, 1+P, D) and of re-encoded regions (R, 1+P, D)."""
        model, regions = self.model, self.batch.regions
        return model.regions.both(model.image, self.batch.images, regions.image_rows, self.inside)

    @property
    def pools(self) -> bool:
        """Whether regions are pooled from the image's tokens."""
        return isinstance(self.model.regions, PooledRegions)

    @cached_property
    def full_tokens(self) -> Tensor:
        """Tokens of the full images (B, 1+P, D)."""
        return super().image_tokens if self.pools or self.batch.image_tokens is not None else self.both_tokens[0]

    @cached_property
    def first_tokens(self) -> Tensor:
        """The token (R, 1, D) that sums up each region."""
        if self.pools:
            return self.model.regions.first_tokens(self.full_tokens, self.batch.regions.image_rows, self.inside)
        return self.both_tokens[1][:, :1]

    @cached_property
    def full_keys_values(self) -> list[KeysValues]:
        """Keys and values of the full images, for the boxes."""
        return self.model.keys_values(self.full_tokens)

    @cached_property
    def text(self) -> Text:
        return self.batch.regions.text

    @property
    def captions(self) -> Text:
        return self.batch.regions.text

    @cached_property
    def positives(self) -> Tensor:
        regions = self.batch.regions
        (image_ids,) = self.processes.gather(self.batch.image_ids[regions.image_rows])
        (boxes,) = self.processes.gather(regions.boxes)
        return find_positives(same_place(image_ids, boxes), self.all_captions)

    @cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        head = self.model.itc_head
        return head.embed_image(self.first_tokens), head.embed_text(self.text_tokens)

    @cached_property
    def keys_values(self) -> list[KeysValues]:
        if self.pools:
            return self.model.regions.keys_values(self.model, self)
        return self.model.keys_values(self.both_tokens[1])

    @cached_property
    def box_losses(self) -> BoxLosses:
        """From texts that attend to the full image: the region's own tokens would give the box away."""
        model, regions = self.model, self.batch.regions
        image = gather_kv(self.full_keys_values, regions.image_rows)
        mask = self.text.mask[:, : self.text_tokens.shape[1]]
        first = model.fuse(self.text_tokens, mask, image, rows=FIRST)
        return box_losses(model.box_head(first), regions.boxes, regions.is_image)

    @property
    def box_count(self) -> Tensor:
        """How many boxes these losses count."""
        return counted_boxes(self.batch.regions.boxes, self.batch.regions.is_image).sum()


class XVLM(FusionEncoder):
    """Aligns texts with images, regions and objects, and predicts where they are."""

    Config = XVLMConfig
    negative_floor = 1e-5

    def __init__(self, config: XVLMConfig) -> None:
        image = SwinEncoder(config.image) if isinstance(config.image, SwinConfig) else image_tower(config.image)
        super().__init__(config, image, mlp(config.text.block.width, 2))
        self.regions = ReencodedRegions(config.region_blocks) if config.region_blocks else PooledRegions()
        self.box_head = BoxHead(config.text.block.width)

    def encode(self, batch: Batch, processes: Processes = ALONE, **given) -> AlignedEncoded:
        has_regions = batch.regions is not None and processes.total(len(batch.regions)) > 0
        return (RegionsEncoded if has_regions else AlignedEncoded)(self, batch, processes=processes, **given)

    def draws_hard_negatives(self) -> bool:
        return True  # also where itc is left out of the losses

    def encode_image(self, images: Tensor, rows: Rows | None = None) -> Tensor:
        tokens = self.regions.image_tokens(self.image, images)
        return tokens if rows is None else select(tokens, rows)

    def patches_inside(self, boxes: Tensor, images: Tensor | None) -> Tensor:
        """(R, P) bool: which patches of `images`, or of the configured size, each box (R, 4) touches."""
        config = self.config.image
        grid = config.grid if images is None else [side // config.patch_size for side in images.shape[-2:]]
        return box_to_patches(boxes, tuple(grid))

    def embed_regions(self, images: Tensor, boxes: Tensor, image_rows: Tensor) -> Tensor:
        """What is inside each of `boxes` (R, 4), box r in image `image_rows[r]`, as unit vectors (R, E)."""
        return self.itc_head.embed_image(self.encode_regions(images, boxes, image_rows)[0])

    def encode_regions(self, images: Tensor, boxes: Tensor, image_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the regions (R, 1+P, D), and as a mask for the fusion layers (R, 1+P) bool which lie inside, the
        first token always. Each image is encoded once."""
        inside = self.patches_inside(boxes, images)
        if isinstance(self.regions, PooledRegions):
            tokens = self.encode_image(images)
            first = self.regions.first_tokens(tokens, image_rows, inside)
            return torch.cat([first, tokens[image_rows, 1:]], dim=1), with_first(inside)
        return self.regions.both(self.image, images, image_rows, inside)[1], with_first(inside)

    def match_regions(self, images: Tensor, boxes: Tensor, image_rows: Tensor, text: Text) -> Tensor:
        """(R,) probability that text r describes what is inside box r of image `image_rows[r]`."""
        tokens, inside = self.encode_regions(images, boxes, image_rows)
        fused = self.fuse(self.encode_text(text), text.mask, tokens, inside, FIRST)
        return self.match_head(fused).softmax(dim=-1)[:, 1]

    def ground(self, images: Tensor, text: Text) -> Tensor:
        """Boxes (B, 4) of what the texts describe."""
        return self.box_head(self.cross_encode(images, text, FIRST))

    def ground_many(self, images: Tensor, image_rows: Tensor, text: Text) -> Tensor:
        """Boxes (R, 4) of what text r describes in image `image_rows[r]`; each image is encoded once."""
        return self.box_head(self.cross_encode_many(images, image_rows, text, FIRST))

    def image_mask(self, encoded: AlignedEncoded) -> Tensor | None:
        return with_first(encoded.inside) if isinstance(encoded, RegionsEncoded) else None

    def box_l1(self, encoded: AlignedEncoded) -> Tensor | None:
        """Distance of the predicted box; only batches with regions have one."""
        if not isinstance(encoded, RegionsEncoded):
            return None
        return encoded.share(encoded.box_losses.l1, encoded.box_count)

    def box_giou(self, encoded: AlignedEncoded) -> Tensor | None:
        """One minus the generalized IoU of the predicted box; only batches with regions have one."""
        if not isinstance(encoded, RegionsEncoded):
            return None
        return encoded.share(encoded.box_losses.giou, encoded.box_count)
