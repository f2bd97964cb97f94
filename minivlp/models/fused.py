"""What ALBEF, BLIP and X-VLM share: two towers, a space in which they meet, layers in which words look at patches.

    image ──► image tower ──► tokens ──┬─► project ──► unit vector ─┐
                                       │                            ├─► cosine / temperature
    text  ──► text tower ───► tokens ──┼─► project ──► unit vector ─┘
                                 │     │
                                 └─────┴─► fusion ──► match? (yes / no) · which word is hidden?

Align before fuse (Li et al., NeurIPS 2021): the towers are pulled together first, so that the fusion layers can relate
words and patches instead of having to find a common language. A paper's own file says what only that paper does.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.data.batch import Batch
from minivlp.layers.attention import KeysValues
from minivlp.layers.encoders import FusionEncoder, TextEncoder
from minivlp.layers.heads import WordHead
from minivlp.objectives.masking import IGNORE, Masked
from minivlp.objectives.matching import Negatives, matching_loss


class AlignedTowers(nn.Module):
    """Two towers, the space in which they meet, and a head that says whether image and text belong together.

    Subclasses add `losses`, and with `fuse`, `look` and `look_many` the way in which words look at patches. `config`
    needs `image`, `text`, `embed_width` and `temperature`; `match_head` maps (…, D) to two logits; `more` are further
    layers by name.
    """

    def __init__(
        self, config: Any, image: nn.Module, text: nn.Module, match_head: nn.Module, **more: nn.Module
    ) -> None:
        super().__init__()
        self.config = config
        for name, part in {"image": image, "text": text, **more}.items():
            self.add_module(name, part)
        self.project_image = nn.Linear(config.image.block.width, config.embed_width)
        self.project_text = nn.Linear(config.text.block.width, config.embed_width)
        self.temperature = nn.Parameter(torch.tensor(config.temperature))
        self.match_head = match_head

    def encode_image(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> tokens (B, 1+P, D); the first sums up the image."""
        return self.image(images)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, L) -> tokens (B, L, D)."""
        return self.text(ids, mask)

    def embed_images(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> unit vectors (B, E)."""
        return self.embed_visual(self.encode_image(images))

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, L) -> unit vectors (B, E)."""
        return self.embed_words(self.encode_text(ids, mask))

    def embed_visual(self, tokens: Tensor) -> Tensor:
        """Image tokens (B, 1+P, D) -> unit vectors (B, E)."""
        return F.normalize(precise(self.project_image(tokens[:, 0])), dim=-1)

    def embed_words(self, tokens: Tensor) -> Tensor:
        """Text tokens (B, L, D) -> unit vectors (B, E)."""
        return F.normalize(precise(self.project_text(tokens[:, 0])), dim=-1)

    def similarity(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Scaled cosines of every image with every text, (B_img, B_txt): towers only, no fusion."""
        return self.embed_images(images) @ self.embed_texts(ids, mask).T / self.temperature

    def match(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,) probability that image and text of equal rows belong together."""
        return self.match_logits(self.look(images, ids, mask)).softmax(dim=-1)[:, 1]

    def match_many(self, images: Tensor, rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(R,) `match` of text r (ids, mask (R, L)) and image rows[r]; many texts of one image encode it once."""
        return self.match_logits(self.look_many(images, rows, ids, mask)).softmax(dim=-1)[:, 1]

    def match_logits(self, fused: Tensor) -> Tensor:
        """Fused tokens (B, L, D) -> logits (B, 2), column 1 = they belong together."""
        return precise(self.match_head(fused[:, 0]))

    def matching(
        self, words: Tensor, mask: Tensor, visual: list[KeysValues], negatives: Negatives, seen: Tensor | None = None
    ) -> Tensor:
        """The matching loss of all rows with their own image, and of the `negatives`, fused in one go.

        words (B, L, D) and mask (B, L) come from the text tower, `visual` from `fusion.keys_values`, so that nothing is
        encoded twice for the up to 3B pairs. With 2B rows of words (`with_wrong`) the second half is false of the
        images of the first: B wrong pairs more.
        """
        right = torch.arange(len(negatives.text), device=words.device)
        wrong = torch.arange(len(right), len(words), device=words.device)
        pairs = [(right, right), negatives.image_pairs(), negatives.text_pairs(), (wrong - len(right), wrong)]
        of_image, of_text = (torch.cat(rows) for rows in zip(*pairs, strict=True))
        allowed = None if seen is None else seen[of_image]
        fused = self.fuse(words[of_text], mask[of_text], take(visual, of_image), allowed)
        logits = self.match_logits(fused)
        return matching_loss(logits[: len(right)], logits[len(right) :])

    def after_step(self) -> None:
        """Keep the temperature in the range of the released code."""
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)


class FusedTowers(AlignedTowers):
    """Two towers with fusion layers on top, which also fill in hidden words.

    `config` also needs `fusion_layers` and `tie_words`.
    """

    def __init__(self, config: Any, image: nn.Module, match_head: nn.Module) -> None:
        width, image_width = config.text.block.width, config.image.block.width
        text = TextEncoder(config.text)
        fusion = FusionEncoder(config.fusion_layers, config.text.block, context_width=image_width)
        super().__init__(config, image, text, match_head, fusion=fusion)
        tied = self.text.embed.words if config.tie_words else None
        self.word_head = WordHead(width, config.text.vocabulary, config.text.block.norm_eps, tied)

    def fuse(
        self, words: Tensor, mask: Tensor, visual: Tensor | list[KeysValues], seen: Tensor | None = None
    ) -> Tensor:
        """Let text tokens (B, L, D) look at image tokens (B, 1+P, D), of those only at `seen` (B, 1+P)."""
        return self.fusion(words, mask, visual, seen)

    def look(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Text tokens (B, L, D) that have looked at the image of their row."""
        return self.fuse(self.encode_text(ids, mask), mask, self.encode_image(images))

    def look_many(self, images: Tensor, rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Text tokens (R, L, D) that have looked at image rows[r]; each of the images (B, 3, H, W) is encoded once."""
        visual = take(self.fusion.keys_values(self.encode_image(images)), rows)
        return self.fuse(self.encode_text(ids, mask), mask, visual)

    def fill(self, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L, V) logits of the word at every position; hide those that you ask for behind [MASK]."""
        return self.word_head(self.look(images, ids, mask))

    def guess(
        self, masked: Masked, mask: Tensor, visual: Tensor | list[KeysValues], seen: Tensor | None = None
    ) -> Tensor:
        """Logits (M, V) of the words that `masked` hides, in the order of their labels: the head runs on no others."""
        fused = self.fuse(self.encode_text(masked.ids, mask), mask, visual, seen)
        return precise(self.word_head(fused[masked.labels != IGNORE]))


def with_wrong(batch: Batch) -> tuple[Tensor, Tensor]:
    """ids and mask of the captions (B, L), followed by the false ones if the batch has any: (2B, L)."""
    if batch.wrong_ids is None:
        return batch.ids, batch.mask
    length = max(batch.ids.shape[1], batch.wrong_ids.shape[1])
    ids, mask, wrong_ids, wrong_mask = (
        F.pad(x, (0, length - x.shape[1])) for x in (batch.ids, batch.mask, batch.wrong_ids, batch.wrong_mask)
    )
    return torch.cat([ids, wrong_ids]), torch.cat([mask, wrong_mask])


def take(keys_values: list[KeysValues], rows: Tensor) -> list[KeysValues]:
    """Each layer's keys and values for these rows, which may repeat: several texts look at one image."""
    return [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in keys_values]


def precise(x: Tensor) -> Tensor:
    """At least float32: bf16 would round a coordinate to 1/256 of the image."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
