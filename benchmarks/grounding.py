"""Phrases grounded per second: each image encoded once for all of its phrases, or once for each phrase.

    python -m benchmarks.grounding [--batch 8] [--rounds 5] [--threads 1]

X-VLM nano with random weights, which take as long as trained ones; both ways give the same boxes. `--batch` counts
images. Rounds are interleaved, so that a busy machine slows both alike, and the best round of each counts.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from benchmarks._step import options, synchronize
from minivlp.data.batch import Text
from minivlp.device import device
from minivlp.inference import evaluating
from minivlp.models.xvlm import XVLM, XVLMConfig

VOCABULARY, LENGTH = 1200, 10


def main() -> None:
    chosen, where = options(__doc__, batch=8, rounds=5), device()
    model, count = XVLM(XVLMConfig.nano(VOCABULARY)).to(where), chosen.batch
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads, {count} images at a time")
    print("phrases per second, the image encoded")
    print(f"{'phrases per image':<20}{'once per phrase':>17}{'once per image':>17}{'ratio':>8}")
    for phrases in (1, 4, 16):
        images = torch.randn(count, 3, 64, 64, device=where)
        rows = torch.arange(count, device=where).repeat_interleave(phrases)
        ids = torch.randint(7, VOCABULARY, (len(rows), LENGTH), device=where)
        text = Text(ids, torch.ones_like(ids, dtype=torch.bool))
        ways = {
            "phrase": lambda images=images, rows=rows, text=text: model.ground(images[rows], text),
            "image": partial(model.ground_many, images, rows, text),
        }
        best: dict[str, float] = {}
        with evaluating(model):
            assert torch.allclose(ways["phrase"](), ways["image"](), atol=1e-4), "both ways must agree"
            for _ in range(chosen.rounds):
                for name, way in ways.items():
                    synchronize(where)
                    start = time.perf_counter()
                    way()
                    synchronize(where)
                    best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
        per_phrase, per_image = (len(rows) / best[name] for name in ("phrase", "image"))
        print(f"{phrases:<20}{per_phrase:>17,.0f}{per_image:>17,.0f}{per_image / per_phrase:>8.2f}")


if __name__ == "__main__":
    main()
