"""Writing captions: tokens per second, ours against transformers' BLIP of the same size, greedy and with beams.

    python -m benchmarks.blip_generate [--batch 64] [--rounds 5] [--threads 2]

All compute the same function (the tests hold ours to transformers' word for word), images included, and write texts of
20 tokens; all but the last remember keys and values. Rounds are interleaved and the best of each counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks._step import options, synchronise
from minivlp.layers.block import BlockConfig
from minivlp.layers.encoders import ImageConfig, TextConfig
from minivlp.machine import device
from minivlp.models.blip import BLIP, BLIPConfig

VOCABULARY, WIDTH, HEADS, SIZE, PATCH, LENGTH = 1200, 128, 4, 64, 8, 20


def ours() -> BLIP:
    """Nano's size with every published choice."""
    block = BlockConfig(WIDTH, HEADS, 4 * WIDTH, norm_eps=1e-6)
    text = TextConfig(VOCABULARY, LENGTH, 2, replace(block, norm_eps=1e-12, norm_first=False), embed_norm=True)
    return BLIP(BLIPConfig(ImageConfig(SIZE, PATCH, 3, block), text, 64, momentum=None))


def theirs():
    """transformers' BlipForConditionalGeneration of the same size; its attention is eager, it has no other."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    same = dict(hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_attention_heads=HEADS)
    text = dict(same, vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=LENGTH)
    text |= dict(encoder_hidden_size=WIDTH, bos_token_id=5, sep_token_id=2, eos_token_id=2, pad_token_id=0)
    vision = dict(same, num_hidden_layers=3, image_size=SIZE, patch_size=PATCH)
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))


def main() -> None:
    chosen, where = options(__doc__), device()
    mine, reference = ours().to(where).eval(), theirs().to(where).eval()
    whole = dict(min_length=LENGTH, max_length=LENGTH)  # nobody may stop early
    more = dict(whole, do_sample=False)
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32; tokens per second")
    for batch in (1, chosen.batch):
        images = torch.randn(batch, 3, SIZE, SIZE, device=where)
        for beams in (1, 3):
            ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
                "minivlp": partial(mine.generate, beams=beams, **whole),
                "transformers": partial(reference.generate, num_beams=beams, **more),
                "transformers, no cache": partial(reference.generate, num_beams=beams, use_cache=False, **more),
            }
            best: dict[str, float] = {}
            for _ in range(chosen.rounds + 1):  # the first warms up
                for name, write in ways.items():
                    began = time.perf_counter()
                    write(images)
                    synchronise(where)
                    best[name] = min(best.get(name, 1e9), time.perf_counter() - began)
            print(f"\nbatch {batch}, {'greedy' if beams == 1 else f'{beams} beams'}")
            for name, seconds in best.items():
                rate = batch * (LENGTH - 1) / seconds
                print(f"{name:32}{rate:10.0f}{best['minivlp'] / seconds:8.2f}")


if __name__ == "__main__":
    main()
