"""Generating captions: tokens per second, ours against transformers' BLIP of the same size, greedy and with beams.

    python -m benchmarks.blip_generate [--batch 64] [--rounds 8] [--threads 2]

Both have the same weights and compute the same function (the tests compare the texts of both), images included. Texts
have 20 tokens. All but the last keep keys and values of earlier tokens. Rounds are interleaved, so that a busy machine
slows all alike, and the best round of each counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks._step import copy_weights, options, synchronize
from minivlp.device import device
from minivlp.layers.embeddings import ImageConfig, TextConfig
from minivlp.layers.generation import DecodingConfig
from minivlp.layers.transformer import BlockConfig
from minivlp.models.blip import BLIP, BLIPConfig
from minivlp.pretrained.blip import RELEASES

VOCABULARY, WIDTH, HEADS, SIZE, PATCH, LENGTH = 1200, 128, 4, 64, 8, 20


def published(**changes) -> BLIP:
    """Our class with every published choice, at nano's size, without a momentum model."""
    block = BlockConfig(WIDTH, HEADS, 4 * WIDTH, norm_eps=1e-6)
    text = TextConfig(VOCABULARY, LENGTH, 2, replace(block, norm_eps=1e-12, norm_first=False), embed_norm=True)
    return BLIP(replace(BLIPConfig(ImageConfig(SIZE, PATCH, 3, block), text, 64, momentum=None), **changes))


def transformers_blip() -> nn.Module:
    """transformers' BlipForConditionalGeneration of the same size; it has eager attention only."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    same = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=HEADS)
    text = dict(same, vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=LENGTH)
    text |= dict(encoder_hidden_size=WIDTH, bos_token_id=5, sep_token_id=2, eos_token_id=2, pad_token_id=0)
    text |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, label_smoothing=0.1)
    vision = dict(same, num_hidden_layers=3, image_size=SIZE, patch_size=PATCH, layer_norm_eps=1e-6)
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))


def main() -> None:
    chosen, where = options(__doc__), device()
    minivlp, reference = published(), transformers_blip()
    copy_weights(reference, RELEASES[0], minivlp)
    minivlp.to(where).eval(), reference.to(where).eval()
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32; tokens per second")
    for batch in (1, chosen.batch):
        images = torch.randn(batch, 3, SIZE, SIZE, device=where)
        for beams in (1, 3):
            lengths = dict(min_length=LENGTH, max_length=LENGTH)  # no text may end early
            theirs = partial(reference.generate, images, num_beams=beams, do_sample=False, **lengths)
            ways: dict[str, Callable[[], torch.Tensor]] = {
                "minivlp": partial(minivlp.generate, images, decoding=DecodingConfig(beams, **lengths)),
                "transformers": theirs,
                "transformers, no cache": partial(theirs, use_cache=False),
            }
            best: dict[str, float] = {}
            for _ in range(chosen.rounds + 1):  # the first warms up
                for name, generate in ways.items():
                    start = time.perf_counter()
                    generate()
                    synchronize(where)
                    best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
            print(f"\nbatch {batch}, {'greedy' if beams == 1 else f'{beams} beams'}")
            for name, seconds in best.items():
                rate = batch * (LENGTH - 1) / seconds
                print(f"{name:32}{rate:10.0f}{best['minivlp'] / seconds:8.2f}", flush=True)


if __name__ == "__main__":
    main()
