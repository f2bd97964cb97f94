"""Phrases grounded per second: every image encoded once for all of its phrases, against once for each phrase.

    python -m benchmarks.grounding [--images 8] [--rounds 5] [--threads 1]

X-VLM nano with random weights, which take as long as trained ones; both ways give the same boxes. Rounds are
interleaved, so that a busy machine slows both alike, and the best round of each counts.
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks._step import synchronise
from minivlp.asking import evaluating
from minivlp.machine import device, reuse_memory
from minivlp.models.xvlm import XVLM, XVLMConfig

VOCABULARY, LENGTH = 1200, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    reuse_memory()
    torch.manual_seed(0)
    where = device()
    model = XVLM(XVLMConfig.nano(VOCABULARY)).to(where)
    print(f"{where}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.images} images at a time")
    print("phrases per second, the image encoded")
    print(f"{'phrases per image':<20}{'once per phrase':>17}{'once per image':>17}{'ratio':>8}")
    for phrases in (1, 4, 16):
        images = torch.randn(options.images, 3, 64, 64, device=where)
        rows = torch.arange(options.images, device=where).repeat_interleave(phrases)
        ids = torch.randint(7, VOCABULARY, (len(rows), LENGTH), device=where)
        asked = ids, torch.ones_like(ids, dtype=torch.bool)
        ways = {
            "phrase": lambda images=images, rows=rows, asked=asked: model.ground(images[rows], *asked),
            "image": lambda images=images, rows=rows, asked=asked: model.ground_many(images, rows, *asked),
        }
        best: dict[str, float] = {}
        with evaluating(model):
            assert torch.allclose(ways["phrase"](), ways["image"](), atol=1e-4), "the two ways must agree"
            for _ in range(options.rounds):
                for name, way in ways.items():
                    synchronise(where)
                    began = time.perf_counter()
                    way()
                    synchronise(where)
                    best[name] = min(best.get(name, 1e9), time.perf_counter() - began)
        one, other = (len(rows) / best[name] for name in ("phrase", "image"))
        print(f"{phrases:<20}{one:>17,.0f}{other:>17,.0f}{other / one:>8.2f}")


if __name__ == "__main__":
    main()
