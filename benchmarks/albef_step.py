"""One ALBEF training step: what sharing passes brings, and transformers' modules put together to the same size.

    python -m benchmarks.albef_step [--batch 64] [--rounds 8] [--threads 2]

All compute the same losses of the same batch of drawn scenes with their captions: contrastive loss, matching of 3B
pairs with hard negatives, masked language modeling; backward, AdamW; without a momentum model unless the row says so.
"Anew" encodes the image or the text for each loss and each kind of pair, which is what separately written losses do;
the released code shares both, as the first row does. "No length buckets" computes every text as long as the longest of
the batch, or all as long as the model's context. The parts of transformers (the ViT of its BLIP, BERT, and BLIP's text
layers for the fusion) have the sizes of the first row, and the same function but for the weights. The columns are
explained at `benchmarks._step.race`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._step import Contender, options, race
from minivlp.data.batch import Batch, Text
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.device import device
from minivlp.layers import buckets
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.heads import ContrastiveHead, MaskedLMHead, MatchingHead, Temperature
from minivlp.layers.transformer import BlockConfig
from minivlp.models.albef import ALBEF, ALBEFConfig
from minivlp.objectives.contrastive import contrastive_loss, cosine_logits, find_positives
from minivlp.objectives.masking import IGNORE, TokenMasking
from minivlp.objectives.matching import hard_negatives, matching_loss
from minivlp.objectives.momentum import MomentumConfig

WIDTH, HEADS, HIDDEN, SIZE, PATCH, LENGTH, EMBED = 128, 4, 512, 64, 8, 56, 64
MASKING = TokenMasking(never_mask=(0, 1))


def published(vocabulary: int, momentum: MomentumConfig | None = None) -> ALBEF:
    """Our class with every published choice, at nano's size."""
    text_block = BlockConfig(WIDTH, HEADS, HIDDEN, norm_eps=1e-12, norm_first=False)
    return ALBEF(
        ALBEFConfig(
            image=ImageConfig(SIZE, PATCH, 3, BlockConfig(WIDTH, HEADS, HIDDEN, norm_eps=1e-6)),
            text=TextConfig(vocabulary, LENGTH, 2, text_block, embed_norm=True),
            fusion_layers=2,
            embed_width=EMBED,
            masking=MASKING,
            momentum=momentum,
        )
    )


class Composed(nn.Module):
    """transformers' modules under our verbs, with our heads."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel, BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        same = dict(hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=HIDDEN)
        text = dict(same, vocab_size=vocabulary, max_position_embeddings=LENGTH, num_hidden_layers=2)
        text |= dict(bos_token_id=1, sep_token_id=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        vision = BlipVisionConfig(**same, num_hidden_layers=3, image_size=SIZE, patch_size=PATCH, layer_norm_eps=1e-6)
        self.image = BlipVisionModel(vision)
        self.text = BertModel(BertConfig(**text), add_pooling_layer=False)
        self.fusion = BlipTextModel(BlipTextConfig(**text, encoder_hidden_size=WIDTH), add_pooling_layer=False)
        self.fusion.embeddings = None  # it starts from the tokens of the text tower
        self.itc_head = ContrastiveHead(WIDTH, WIDTH, EMBED, Temperature(0.07))
        self.match_head = MatchingHead(nn.Linear(WIDTH, 2))
        self.mlm_head = MaskedLMHead(WIDTH, vocabulary, 1e-12, self.text.embeddings.word_embeddings)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image(images).last_hidden_state

    def encode_text(self, text: Text) -> Tensor:
        return self.text(input_ids=text.ids, attention_mask=text.mask.long()).last_hidden_state

    def fuse(self, text_tokens: Tensor, text_mask: Tensor, image: Tensor) -> Tensor:
        fused = self.fusion(encoder_embeds=text_tokens, attention_mask=text_mask.long(), encoder_hidden_states=image)
        return fused.last_hidden_state


def shared(model: ALBEF, batch: Batch) -> Tensor:
    """Our own step."""
    return sum(model.losses(batch).values())


def without_buckets(model: ALBEF, batch: Batch) -> Tensor:
    """Our own step, with all texts of a batch in one group, as long as they are given."""
    with patch.object(buckets, "pays", return_value=False):
        return shared(model, batch)


def by_passes(model: nn.Module, batch: Batch, image_anew: bool, text_anew: bool) -> Tensor:
    """The same three losses one after the other, with or without what the first has encoded."""
    images, text = batch.images, batch.text
    image_tokens, text_tokens = model.encode_image(images), model.encode_text(text)
    positives, head = find_positives(batch.image_ids, text), model.itc_head
    logits = cosine_logits(head.embed_image(image_tokens), head.embed_text(text_tokens), head.scale())
    loss = contrastive_loss(logits, positives)

    own = torch.arange(len(batch), device=text.ids.device)
    drawn = hard_negatives(logits, positives)
    pairs = ((own, own), (drawn.image, own), (own, drawn.text))
    matching = []
    for image_rows, text_rows in pairs:
        real = (image_rows >= 0) & (text_rows >= 0)
        image_rows, text_rows = image_rows[real], text_rows[real]
        image = model.encode_image(images[image_rows]) if image_anew else image_tokens[image_rows]
        tokens = model.encode_text(text[text_rows]) if text_anew else text_tokens[text_rows]
        matching.append(model.match_head(model.fuse(tokens, text.mask[text_rows], image)))
    loss = loss + matching_loss(matching[0], torch.cat(matching[1:]))

    masked = MASKING.apply(text, model.mlm_head.decoder.out_features)
    image = model.encode_image(images) if image_anew else image_tokens
    predicted = model.mlm_head(model.fuse(model.encode_text(masked.text), text.mask, image))
    return loss + F.cross_entropy(predicted.flatten(0, 1), masked.labels.flatten(), ignore_index=IGNORE)


def main() -> None:
    chosen = options(__doc__)
    where, tokenizer = device(), load_tokenizer()
    vocabulary = len(tokenizer)
    batch = Loader(Scenes(chosen.batch, "train", 0, size=SIZE), tokenizer, chosen.batch, SIZE).batch(0).to(where)
    padded = replace(batch, text=batch.text.padded(LENGTH))
    print(f"captions of {batch.text.mask.sum(dim=1).float().mean():.0f} tokens, {batch.text.length} at most")

    def enter(model: nn.Module, loss_of, *arguments) -> Contender:
        return model.to(where), partial(loss_of, model, *arguments)

    momentum = MomentumConfig(queue_size=1024, alpha_steps=0)
    contenders = {
        "minivlp, published choices": enter(published(vocabulary), shared, batch),
        "minivlp, nano as in lesson 03": enter(ALBEF(ALBEFConfig.nano(vocabulary)), shared, batch),
        "minivlp, losses one by one": enter(published(vocabulary), by_passes, batch, False, False),
        "minivlp, image anew": enter(published(vocabulary), by_passes, batch, True, False),
        "minivlp, text anew": enter(published(vocabulary), by_passes, batch, False, True),
        "minivlp, no length buckets": enter(published(vocabulary), without_buckets, batch),
        f"minivlp, all texts of {LENGTH} tokens": enter(published(vocabulary), without_buckets, padded),
        "minivlp, momentum model and queue": enter(published(vocabulary, momentum), shared, batch),
        "transformers' parts, shared": enter(Composed(vocabulary), by_passes, batch, False, False),
        "transformers' parts, anew": enter(Composed(vocabulary), by_passes, batch, True, True),
    }
    race(contenders, chosen.batch, chosen.rounds)


if __name__ == "__main__":
    main()
