"""How long until CLIP nano finds the caption of an unseen image among 500? Seconds of training, from scratch.

    python -m benchmarks.seconds_to_skill [--seed 0] [--steps 500]

Prints R@1 and R@5 on validation scenes every 100 steps, with the seconds of training so far (validation not counted).
"""

from __future__ import annotations

import argparse

import torch

from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.evaluation.retrieval import retrieval
from minivlp.papers import PAPERS
from minivlp.training.loop import fit


def main() -> None:
    clip = PAPERS["clip"]
    recipe, tokenizer = clip.recipe("laptop"), load_tokenizer()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=recipe.steps)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = recipe.build(clip.model_class(), tokenizer)
    scenes = Scenes(recipe.scenes, "train", options.seed, recipe.size, recipe.objects)
    held_out = Scenes(1500, "validation", 1)
    rows: list[dict[str, float]] = []

    def validate() -> dict[str, float]:
        found = retrieval(model, held_out, tokenizer)
        r1, r5 = (found[f"image to text R@{k}"].value for k in (1, 5))
        print(f"{rows[-1]['seconds']:6.0f} s  step {len(rows):4}  R@1 {r1:.2f}  R@5 {r5:.2f}", flush=True)
        return {"R@1": r1, "R@5": r5}

    batches = recipe.batches(scenes, tokenizer, options.seed, model=model)
    settings = recipe.settings(steps=options.steps, validate_every=100)
    fit(model, batches, settings, validate=validate, on_step=[rows.append], bar=False)


if __name__ == "__main__":
    main()
