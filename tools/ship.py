"""Train a checkpoint that is bundled with minivlp, and write its weights (in half precision), log and card.

    python tools/ship.py towers_nano                 train (or resume) in runs/towers_nano, then write checkpoints/
    python tools/ship.py --list                      the bundled checkpoints, and how each is trained

The scores of a card are measured with the file that is bundled, half precision included. `clip_nano` was made before
this script: its card has the commands.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tables.measures import TEST_SCENES, TEST_SEED, grounded
from tables.variants import Variant, scenes_of

from minivlp.console import print_in_any_encoding
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.evaluation.score import table
from minivlp.evaluation.suite import measure
from minivlp.models.blip import BLIPConfig
from minivlp.papers import PAPERS
from minivlp.training.checkpoint import CHECKPOINTS, load_model, save_model, save_text
from minivlp.training.grounded_stream import GroundedStream, grounded_batches
from minivlp.training.labels import LabeledConfig, LabeledTower, labeled_batches
from minivlp.training.loop import History, Settings, fit
from minivlp.training.run import run_identity
from minivlp.training.tokenizer_of_run import tokenizer_fingerprint

SCENES = 20_000


@dataclass(frozen=True)
class Bundled:
    """One checkpoint: what it is for, and how it is trained."""

    purpose: str
    variant: Variant


BUNDLED = {
    "towers_nano": Bundled(
        "The shared towers that initialize the models of later lessons, as DeiT and BERT initialize those of the\n"
        "papers. They were trained with boxes (X-VLM's box losses and region-text contrast), so their patches know\n"
        "where they are: do not use them to test whether boxes help. Matching and masked language modeling were not\n"
        "trained.",
        Variant("xvlm", recipe={"scenes": SCENES, "steps": 3500}),
    ),
    "xvlm_nano": Bundled(
        "X-VLM with all of its losses, initialized from `towers_nano`: it also matches phrases and predicts masked\n"
        "words, and so can rate its own boxes.",
        Variant(
            "xvlm",
            {"losses": ("itc", "itm", "mlm", "box_l1", "box_giou")},
            {
                "scenes": SCENES,
                "steps": 1600,
                "lr": 1e-3,
                "regions_per_image": 2,
                "negative_captions": True,
                "pairs_between": True,
                "init_from": "towers_nano",
            },
        ),
    ),
    "vilt_nano": Bundled(
        "ViLT as lesson 02 trains it, from `joint_nano`, on more scenes and for more steps.",
        Variant("vilt", recipe={"scenes": SCENES, "steps": 600}),
    ),
    "blip_nano": Bundled(
        "BLIP as lesson 05 trains it, on more scenes and for more steps; without momentum model and queue.",
        Variant("blip", recipe={"scenes": SCENES, "steps": 1500}),
    ),
    "vlmo_nano": Bundled(
        "VLMo as lesson 04 trains it, from `joint_nano`, on more scenes and for more steps.",
        Variant("vlmo", recipe={"scenes": SCENES, "steps": 450}),
    ),
    "albef_nano": Bundled(
        "ALBEF as lesson 03 trains it, on more scenes and for more steps; without momentum model and queue.",
        Variant("albef", recipe={"scenes": SCENES, "steps": 1200}),
    ),
}

# The single stream: from the towers, with relation words masked alone so often that they are learned in this time.
JOINT = {"steps": 1800, "batch_size": 48, "init_from": "towers_nano", "mask_relations_alone": 0.75}

CARD = """# {name}

{purpose}

{model} with {millions:.1f} M parameters, trained {origin} on our own drawn scenes (split `train`, {scenes:,} of them)
and nothing else: no photo, no text from the web, no official weights. It has seen the emoji, shapes, colors and sizes
of the scene world, and no photograph. {negatives}

Made by `python tools/ship.py {name}`: {steps:,} steps of {batch} images, {minutes:.0f} minutes on one CPU core of a
machine that did other work, too. `{name}.log.jsonl` has every tenth step. Weights are stored in half precision.

Measured on {count:,} test scenes (seed {seed}), which no choice has used:

{scores}
"""

IMAGE_CARD = """# image_nano

An image tower that was trained on labels alone: which object each patch shows and in which color, and which objects are
in the image. It takes the place of a ViT trained on ImageNet where no part of a model may have read a clean caption
(lesson 06, CapFilt). {millions:.1f} M parameters with its heads, trained from scratch on {scenes:,} of our own drawn
scenes (split `train`) and nothing else: no photo, no sentence, no phrase, no official weights.

Made by `python tools/ship.py image_nano`: {steps:,} steps of {batch} images, {minutes:.0f} minutes on one CPU core of a
machine that did other work, too. `image_nano.log.jsonl` has every tenth step. Weights are stored in half precision.

Measured on 500 test scenes (seed {seed}), over all patches that show an object: noun right {noun:.2f}, color right
{color:.2f}.
"""

JOINT_CARD = """# joint_nano

A single stream in which words know their places: what ViLT and VLMo start from in the lessons, as those of the
papers start from a ViT trained on ImageNet and from BEiT. {millions:.1f} M parameters, trained from `towers_nano` on
{scenes:,} of our own drawn scenes (split `train`) and nothing else: no photo, no text from the web, no official
weights.

Every noun of a caption predicted the box of its object, and masked words were predicted from the image; in {alone:.0%}
of the captions with a relation only its words were masked (docs/recipe.md says why). **It has seen boxes**: do not use
it to test whether boxes help. It has seen no false caption, and matching was not trained.

Made by `python tools/ship.py joint_nano`: {steps:,} steps of {batch} images, {minutes:.0f} minutes on one CPU core of a
machine that did other work, too. `joint_nano.log.jsonl` has every tenth step. Weights are stored in half precision.

Measured on {count:,} test scenes (seed {seed}), which no choice has used; of every caption the first noun or relation
word is masked:

{scores}
"""


def ship(name: str) -> None:
    """Train what is not trained yet, then write the three files."""
    bundled, tokenizer = BUNDLED[name], load_tokenizer()
    recipe, model_class = bundled.variant.full_recipe(), PAPERS[bundled.variant.model].model_class()
    torch.manual_seed(0)
    model, scenes = bundled.variant.build(recipe, tokenizer), scenes_of(recipe, 0)
    identity = run_identity(scenes, tokenizer, 0, recipe=asdict(recipe))
    batches = recipe.batches(scenes, tokenizer, model=model)
    history = fit(model, batches, recipe.settings(), run_dir=Path("runs") / name, identity=identity)
    notes = {"scenes": recipe.scenes, "seed": 0, "tokenizer": tokenizer_fingerprint(tokenizer)}
    weights = save(model, name, history, **notes)
    model = load_model(model_class, weights)
    scores = measure(model, Scenes(TEST_SCENES, "test", TEST_SEED), tokenizer)
    if "itm" not in getattr(model.config, "losses", ("itm",)):  # the heads are there, but were not trained
        scores = {key: score for key, score in scores.items() if not key.startswith(("counterfactual", "masked"))}
    card = CARD.format(
        name=name,
        purpose=bundled.purpose,
        model=model_class.__name__,
        millions=millions(model),
        origin=f"from `{recipe.init_from}`" if recipe.init_from else "from scratch",
        negatives="Matching was also trained on negative captions made by rule." if recipe.negative_captions else "",
        scenes=recipe.scenes,
        steps=recipe.steps,
        batch=recipe.batch_size,
        minutes=history.seconds / 60,
        count=TEST_SCENES,
        seed=TEST_SEED,
        scores=table(scores),
    )
    save_text(weights.with_suffix(".md"), card.replace(" \n", "\n"))
    print(table(scores))


def ship_image(name: str = "image_nano") -> None:
    """The same for the image tower that is trained on labels."""
    config, batch_size, seed = LabeledConfig(BLIPConfig.nano().image), 64, 20
    torch.manual_seed(0)
    model = LabeledTower(config)
    batches = labeled_batches(Scenes(SCENES, "train", seed), config.image, batch_size)
    settings = Settings(1000, save_every=200)
    history = fit(model, batches, settings, run_dir=Path("runs") / name, identity={"scenes": SCENES, "seed": seed})
    weights = save(model, name, history, scenes=SCENES, seed=seed)
    model = load_model(LabeledTower, weights)
    test = labeled_batches(Scenes(500, "test", TEST_SEED), config.image, 500)(0)
    with torch.no_grad():
        patches = model.image(test.images)[:, 1:]
        noun, color = (
            (head(patches).argmax(dim=-1) == labels)[test.nouns > 0].float().mean().item()
            for head, labels in ((model.noun_head, test.nouns), (model.color_head, test.colors))
        )
    card = IMAGE_CARD.format(
        millions=millions(model),
        scenes=SCENES,
        steps=settings.steps,
        batch=batch_size,
        minutes=history.seconds / 60,
        seed=TEST_SEED,
        noun=noun,
        color=color,
    )
    save_text(weights.with_suffix(".md"), card)
    print(card)


def ship_joint(name: str = "joint_nano") -> None:
    """The same for the single stream that ViLT and VLMo start from."""
    recipe = replace(PAPERS["vilt"].recipe("laptop"), scenes=SCENES, **JOINT)
    tokenizer = load_tokenizer()
    torch.manual_seed(0)
    model, scenes = recipe.build(GroundedStream, tokenizer), scenes_of(recipe, 0)
    identity = run_identity(scenes, tokenizer, 0, recipe=asdict(recipe))
    batches = grounded_batches(scenes, tokenizer, recipe.batch_size)
    history = fit(model, batches, recipe.settings(save_every=200), run_dir=Path("runs") / name, identity=identity)
    notes = {"scenes": recipe.scenes, "seed": 0, "tokenizer": tokenizer_fingerprint(tokenizer)}
    weights = save(model, name, history, **notes)
    model = load_model(GroundedStream, weights)
    scores = grounded(model, Scenes(TEST_SCENES, "test", TEST_SEED), tokenizer)
    card = JOINT_CARD.format(
        millions=millions(model),
        scenes=recipe.scenes,
        alone=recipe.mask_relations_alone,
        steps=recipe.steps,
        batch=recipe.batch_size,
        minutes=history.seconds / 60,
        count=TEST_SCENES,
        seed=TEST_SEED,
        scores=table(scores),
    )
    save_text(weights.with_suffix(".md"), card)
    print(table(scores))


def save(model: torch.nn.Module, name: str, history: History, **notes: Any) -> Path:
    """Write the weights of a finished run, and every tenth step of its log; returns the path of the weights."""
    if history.interrupted:
        sys.exit(f"stopped after {len(history.steps)} steps; the same command resumes")
    weights = CHECKPOINTS / f"{name}.safetensors"
    save_model(model.cpu(), weights, float16=True, **notes, seconds=round(history.seconds))
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in history.steps[::10]]
    save_text(weights.with_suffix(".log.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
    return weights


def millions(model: torch.nn.Module) -> float:
    """Parameters in millions."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


OTHERS = {"image_nano": ship_image, "joint_nano": ship_joint}  # trained by code of their own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*BUNDLED, *OTHERS, []], help="which", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="list the bundled checkpoints")
    options = parser.parse_args()
    if options.list or not options.names:
        for name, bundled in BUNDLED.items():
            print(f"{name}: {bundled.purpose}\n  {asdict(bundled.variant.full_recipe())}\n")
        sys.exit(0)
    for name in options.names:
        OTHERS[name]() if name in OTHERS else ship(name)


if __name__ == "__main__":
    print_in_any_encoding()
    main()
