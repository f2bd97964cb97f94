"""A single stream that has learned where the named objects are: what ViLT and VLMo start from in the lessons.

    [CLS] a red [MASK] left of a dog [SEP] │ class token, patches ──► ViLT's transformer ──► masked words
                 │                    └── box of the dog   (read one layer below the masked words)
                 └── box of the heart

The papers start from transformers that were trained on millions of labeled images and on text. A start of ours has to
be made in minutes, and relations such as "left of" are learned only where words are tied to places. So every noun of a
caption predicts the box of its object, masked or not, as X-VLM's phrases do (Zeng et al., ICML 2022, section 3.2), and
masked words are predicted from the image. There is no matching: no false caption is seen.

Axes: B batch, L text tokens, R boxes, N = L + 1 + P, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minivlp.data import english
from minivlp.data.batch import Text, moved, to_tensor
from minivlp.data.loading import MAX_TOKENS, CachedTokenizer, rows_of_step
from minivlp.data.scene import Scene
from minivlp.layers.attention import attention_mask
from minivlp.layers.heads import BoxHead, MaskedLMHead
from minivlp.layers.single_stream import BERT_EPS, ViLTStream
from minivlp.models.vilt import ViLTConfig
from minivlp.objectives.boxes import box_losses
from minivlp.objectives.masking import IGNORE, labeled_places, masked_loss


@dataclass
class NamedObjects:
    """Captions, their images, and where the object of each noun is."""

    images: Tensor  # (B, 3, H, W) float, in [-1, 1]
    text: Text  # (B, L)
    rows: Tensor  # (R,) long: the caption that has the noun
    places: Tensor  # (R,) long: the position of the noun's last token in its caption
    boxes: Tensor  # (R, 4) cx, cy, w, h in 0..1

    def to(self, device: torch.device | str) -> NamedObjects:
        """The same batch on another device."""
        return moved(self, device)


class GroundedStream(nn.Module):
    """ViLT's transformer with a box head; its parts have the names that they have in `ViLT`. `config` is ViLT's."""

    Config = ViLTConfig

    def __init__(self, config: ViLTConfig) -> None:
        super().__init__()
        self.config = config
        self.joint = ViLTStream(config.image, config.text)
        width = config.image.block.width
        self.mlm_head = MaskedLMHead(width, config.text.vocabulary, BERT_EPS)
        self.box_head = BoxHead(width)

    def losses(self, batch: NamedObjects) -> dict[str, Tensor]:
        """Masked language modeling, and the two losses of the boxes; one pass for both."""
        masked = self.config.masking.apply(batch.text, self.config.text.vocabulary)
        lower, mask = self.below(batch.images, masked.text)
        named = self.joint.norm(lower[batch.rows, batch.places])[:, None]  # (R, 1, D)
        l1, giou = box_losses(self.box_head(named), batch.boxes)
        places, labels = labeled_places(masked.labels)  # (B, M) each
        last = len(self.joint.blocks) - 1
        top = self.joint.norm(self.joint.run(lower, range(last, last + 1), mask, rows=places))  # (B, M, D)
        asked = labels != IGNORE
        mlm = masked_loss(self.mlm_head(top[asked]), labels[asked])
        return {"mlm": mlm, "box_l1": l1, "box_giou": giou}

    def below(self, images: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, D), text first, below the last block, and the mask of the attention."""
        image = self.joint.embed_images(images)
        x = torch.cat([self.joint.embed_text(text), image.tokens], dim=1)  # (B, N, D)
        mask = attention_mask(torch.cat([text.mask, image.mask], dim=1))
        return self.joint.run(x, range(len(self.joint.blocks) - 1), mask), mask

    def boxes(self, batch: NamedObjects) -> Tensor:
        """The predicted box (R, 4) of each noun of the captions."""
        lower, _ = self.below(batch.images, batch.text)
        return self.box_head(self.joint.norm(lower[batch.rows, batch.places])[:, None])

    def mlm_logits(self, images: Tensor, text: Text) -> Tensor:
        """(B, L, V) logits of the token at every place; put [MASK] where you want a prediction."""
        image = self.joint.embed_images(images)
        return self.mlm_head(self.joint(image, text, slice(0, text.length)))

    def init_from(self, towers: nn.Module) -> None:
        """Start from trained towers: see `ViLTStream.init_from`."""
        self.joint.init_from(towers)


def named_objects(scene: Scene, caption: str) -> list[tuple[int, tuple[float, float, float, float]]]:
    """For each noun of one of the scene's English captions: which word it is, and the box of its object."""
    nouns = [number for number, word in enumerate(caption.split()) if word in english.NOUNS]
    objects = scene.objects if english.parse(caption) == scene.facts else scene.objects[::-1]
    found = []
    for word, one in zip(nouns, objects, strict=True):
        x0, y0, x1, y1 = (value / scene.side for value in one.corners)
        found.append((word, ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)))
    return found


def grounded_batches(scenes: Any, tokenizer: Any, batch_size: int, seed: int = 0) -> Callable[[int], NamedObjects]:
    """The batch of a training step, for `fit`: `Scenes` with one of their English captions each."""
    tokenize = CachedTokenizer(tokenizer, MAX_TOKENS)

    def batch(step: int) -> NamedObjects:
        rows, rng = rows_of_step(len(scenes), batch_size, seed, step), np.random.default_rng((seed, step))
        captions = [str(rng.choice(scenes.captions(row))) for row in rows]
        text, found = tokenize(captions), []
        for number, (row, caption) in enumerate(zip(rows, captions, strict=True)):
            for word, box in named_objects(scenes.scene(int(row)), caption):
                found.append((number, int((text.word[number] == word).nonzero().max()), box))
        which, places, boxes = zip(*found, strict=True)
        images = to_tensor(scenes.pixels(rows, scenes.size))
        return NamedObjects(images, text, torch.tensor(which), torch.tensor(places), torch.tensor(boxes))

    return batch
