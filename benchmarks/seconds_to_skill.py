"""How long until CLIP nano finds the caption of an unseen picture among 500? Seconds of training, from scratch.

    python -m benchmarks.seconds_to_skill [--seed 0]

Prints R@1 and R@5 on validation scenes every 100 steps with the seconds of training so far (evaluation not counted).
"""

from __future__ import annotations

import argparse

import torch

from minivlp.data.loading import Loader
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.evaluation.retrieval import retrieval
from minivlp.models.clip import CLIP, CLIPConfig
from minivlp.training.loop import fit
from minivlp.training.recipes import RECIPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    recipe, tokenizer = RECIPES["clip"]["laptop"], load_tokenizer()
    torch.manual_seed(seed)
    model = CLIP(CLIPConfig.nano(len(tokenizer)))
    scenes, held_out = Scenes(recipe.scenes, "train", seed), Scenes(1500, "validation", 1)
    loader = Loader(scenes, tokenizer, recipe.batch_size, recipe.size, seed=seed)
    rows: list[dict[str, float]] = []

    def validate() -> dict[str, float]:
        found = retrieval(model, held_out, tokenizer)
        r1, r5 = (found[f"image to text R@{k}"].value for k in (1, 5))
        print(f"{rows[-1]['seconds']:6.0f} s  step {len(rows):4}  R@1 {r1:.2f}  R@5 {r5:.2f}", flush=True)
        return {"R@1": r1, "R@5": r5}

    fit(model, loader.batch, recipe.settings(validate_every=100), validate=validate, on_step=[rows.append], bar=False)


if __name__ == "__main__":
    main()
