"""One ALBEF training step: what sharing passes brings, and transformers' modules put together to the same size.

    python -m benchmarks.albef_step [--batch 64] [--rounds 8] [--threads 2]

All do the same on the same batch of drawn scenes with their captions: the contrastive loss, hard negatives, matching of
3B pairs, masked words, backward, AdamW; without a teacher unless it says so. "Anew" encodes the image or the text for
each loss and each kind of pair, as one does who writes the losses one by one; the released code shares both, like the
first line. The parts of transformers (its BLIP's ViT, BERT, and BLIP's text layers for the fusion) have the same sizes
as the first line, and the same function but for the weights. The columns are explained at `benchmarks._step.race`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._step import options, race
from minivlp.data.batch import Batch
from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.layers.heads import WordHead
from minivlp.machine import device
from minivlp.models.albef import ALBEF, ALBEFConfig
from minivlp.objectives.contrastive import contrastive_loss, same_group
from minivlp.objectives.masking import IGNORE, choose_tokens, hide, maskable
from minivlp.objectives.matching import hard_negatives, matching_loss

WIDTH, HEADS, HIDDEN, SIZE, PATCH, LENGTH = 128, 4, 512, 64, 8, 56


def published(vocabulary: int, **changes) -> ALBEF:
    """Our class with every published choice, at nano's size."""
    config = ALBEFConfig(
        image=ImageConfig(SIZE, PATCH, 3, BlockConfig(WIDTH, HEADS, HIDDEN, norm_eps=1e-6)),
        text=TextConfig(
            vocabulary, LENGTH, 2, BlockConfig(WIDTH, HEADS, HIDDEN, norm_eps=1e-12, norm_first=False), embed_norm=True
        ),
        fusion_layers=2,
        embed_width=64,
        momentum=None,
    )
    return ALBEF(replace(config, **changes))


class Composed(nn.Module):
    """transformers' modules under our verbs."""

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
        self.fusion.embeddings = None  # it starts from the text tower's tokens
        self.project_image, self.project_text = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.match_head = nn.Linear(WIDTH, 2)
        self.word_head = WordHead(WIDTH, vocabulary, 1e-12, self.text.embeddings.word_embeddings)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.image(images).last_hidden_state

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.text(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def fuse(self, words: Tensor, mask: Tensor, visual: Tensor) -> Tensor:
        fused = self.fusion(encoder_embeds=words, attention_mask=mask.long(), encoder_hidden_states=visual)
        return fused.last_hidden_state


def shared(model: ALBEF, batch: Batch) -> Tensor:
    """Our own step."""
    return sum(model.losses(batch).values())


def by_passes(model: nn.Module, batch: Batch, image_anew: bool, text_anew: bool) -> Tensor:
    """The same three losses one after the other, with or without what the first has encoded."""
    images, ids, mask = batch.images, batch.ids, batch.mask
    visual, words = model.encode_image(images), model.encode_text(ids, mask)
    together = same_group(batch.image_ids, ids, mask)
    image_vectors = F.normalize(model.project_image(visual[:, 0]).float(), dim=-1)
    text_vectors = F.normalize(model.project_text(words[:, 0]).float(), dim=-1)
    loss = contrastive_loss(image_vectors, text_vectors, 1 / model.temperature, together)

    rows = torch.arange(len(batch), device=ids.device)
    negatives = hard_negatives(image_vectors @ text_vectors.T / model.temperature, together)
    logits = []
    for of_image, of_text in ((rows, rows), negatives.image_pairs(), negatives.text_pairs()):
        seen = model.encode_image(images[of_image]) if image_anew else visual[of_image]
        read = model.encode_text(ids[of_text], mask[of_text]) if text_anew else words[of_text]
        logits.append(model.match_head(model.fuse(read, mask[of_text], seen)[:, 0]).float())
    loss = loss + matching_loss(logits[0], torch.cat(logits[1:]))

    chosen = choose_tokens(maskable(ids, mask, (0, 1)), 0.15)
    masked = hide(ids, chosen, 3, model.word_head.decoder.out_features)
    seen = model.encode_image(images) if image_anew else visual
    guesses = model.word_head(model.fuse(model.encode_text(masked.ids, mask), mask, seen)).float()
    return loss + F.cross_entropy(guesses.flatten(0, 1), masked.labels.flatten(), ignore_index=IGNORE)


def main() -> None:
    chosen = options(__doc__)
    where, tokenizer = device(), load_tokenizer()
    vocabulary = len(tokenizer)
    batch = Loader(Scenes(chosen.batch, "train", 0, size=SIZE), tokenizer, chosen.batch, SIZE).batch(0).to(where)
    pad = (0, LENGTH - batch.ids.shape[1])
    padded = replace(batch, ids=F.pad(batch.ids, pad), mask=F.pad(batch.mask, pad))
    print(f"captions of {batch.mask.sum(dim=1).float().mean():.0f} tokens, {batch.ids.shape[1]} at most")
    taught = dict(momentum=0.995, queue_size=1024, alpha_steps=0)

    def enter(model: nn.Module, loss_of, *arguments):
        return model.to(where), partial(loss_of, model, *arguments)

    contenders = {
        "minivlp, published choices": enter(published(vocabulary), shared, batch),
        "minivlp, nano as in lesson 03": enter(ALBEF(ALBEFConfig.nano(vocabulary)), shared, batch),
        "minivlp, losses one by one": enter(published(vocabulary), by_passes, batch, False, False),
        "minivlp, image anew": enter(published(vocabulary), by_passes, batch, True, False),
        "minivlp, text anew": enter(published(vocabulary), by_passes, batch, False, True),
        f"minivlp, all texts of {LENGTH} tokens": enter(published(vocabulary), shared, padded),
        "minivlp, with teacher and queue": enter(published(vocabulary, **taught), shared, batch),
        "transformers' parts, shared": enter(Composed(vocabulary), by_passes, batch, False, False),
        "transformers' parts, anew": enter(Composed(vocabulary), by_passes, batch, True, True),
    }
    race(contenders, chosen.batch, chosen.rounds)


if __name__ == "__main__":
    main()
