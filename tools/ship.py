"""Train a checkpoint that comes with minivlp and write it: weights in half precision, the run's log, a card.

    python tools/ship.py towers_nano                 train (or go on with) runs/towers_nano, then write checkpoints/
    python tools/ship.py --list                      what is shipped, and how each is trained

Measured on test scenes, from the very file that is shipped (half precision included). `clip_nano` is older than this
tool: its card has the commands.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from experiments import Variant

from minivlp.__main__ import measure
from minivlp.data.scenes import Scenes
from minivlp.data.text import load_tokenizer
from minivlp.evaluation.score import table
from minivlp.models import MODELS
from minivlp.training.checkpoint import CHECKPOINTS, load_model, save_model
from minivlp.training.labels import LabelledConfig, LabelledTower, labelled_batches
from minivlp.training.loop import History, Settings, fit

ALL = ("itc", "itm", "mlm", "box_l1", "box_giou")


@dataclass(frozen=True)
class Shipped:
    """One checkpoint: what it is for, how it is trained, and what its config forgets of the training."""

    purpose: str
    variant: Variant
    forget: dict | None = None


SHIPPED = {
    "towers_nano": Shipped(
        "The shared towers that later lessons start from, as the papers start from DeiT and BERT. They were trained\n"
        "with boxes (X-VLM's box loss and the contrast of regions and phrases), so their patches know where they are:\n"
        "never start from them where the claim tested is that boxes help. Matching and filling in were not trained.",
        Variant("xvlm", recipe={"scenes": 20000, "steps": 3500}),
    ),
    "xvlm_nano": Shipped(
        "X-VLM with all of its losses, trained further from `towers_nano`: it also tells whether a phrase fits and\n"
        "fills in words, and so can say how sure it is of a box.",
        Variant(
            "xvlm",
            {"losses": ALL},
            {
                "scenes": 20000,
                "steps": 1600,
                "lr": 1e-3,
                "regions_per_image": 2,
                "wrong_captions": True,
                "pairs_between": True,
                "start": "towers_nano",
            },
        ),
    ),
    "vilt_nano": Shipped(
        "ViLT as lesson 02 trains it, on more scenes and twice as long: matching begins late.",
        Variant("vilt", recipe={"scenes": 20000, "steps": 1100}),
    ),
    "blip_nano": Shipped(
        "BLIP as lesson 05 trains it, on more scenes and for longer; no teacher, no queue.",
        Variant("blip", recipe={"scenes": 20000, "steps": 1500}),
    ),
    "vlmo_nano": Shipped(
        "VLMo as lesson 04 trains it, on more scenes and for longer: matching begins late, as in ViLT.",
        Variant("vlmo", recipe={"scenes": 20000, "steps": 750}),
    ),
    "albef_nano": Shipped(
        "ALBEF as lesson 03 trains it, on more scenes and for longer; no teacher, no queue.",
        Variant("albef", recipe={"scenes": 20000, "steps": 1200}),
    ),
}

IMAGE_CARD = """# image_nano

An image tower that has learnt from labels alone: which thing and which colour each patch shows, and which things are in
the picture. It stands for a ViT trained on ImageNet, where no part of a model may have read a clean caption before
(lesson 05, CapFilt). {millions:.1f} M parameters with its heads, trained from scratch on {scenes:,} of our own drawn
scenes (split `train`) and nothing else: no photo, no sentence, no phrase, no official weights.

Made by `python tools/ship.py image_nano`: {steps:,} steps of {batch} pictures, {minutes:.0f} minutes on one core of a
CPU that did other work beside it. `image_nano.log.jsonl` has every tenth step. Weights are stored in half precision.

Measured on 500 test scenes (seed 7), over all patches that show a thing: noun right {noun:.2f}, colour right
{colour:.2f}.
"""


def ship_image() -> None:
    """The tower that has learnt from labels."""
    config, scenes = LabelledConfig(MODELS["blip"].Config.nano().image), 20_000
    torch.manual_seed(0)
    model = LabelledTower(config)
    batches = labelled_batches(Scenes(scenes, "train", 20), config.image, 64)
    settings = Settings(1000, save_every=200)
    history = fit(model, batches, settings, run_dir=Path("runs") / "image_nano")
    if history.interrupted:
        sys.exit(f"stopped after {len(history.steps)} steps; the same command goes on")
    weights = CHECKPOINTS / "image_nano.safetensors"
    save_model(model.cpu(), weights, half=True, scenes=scenes, seed=20, seconds=round(history.seconds))
    model = load_model(LabelledTower, weights)
    test = labelled_batches(Scenes(500, "test", 7), config.image, 500)(0)
    with torch.no_grad():
        patches = model.image(test.images)[:, 1:]
        right = [
            (head(patches).argmax(dim=-1) == truth)[test.nouns > 0].float().mean().item()
            for head, truth in ((model.noun_head, test.nouns), (model.color_head, test.colors))
        ]
    write_log(weights, history)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    more = dict(millions=millions, scenes=scenes, steps=settings.steps, batch=64, minutes=history.seconds / 60)
    card = IMAGE_CARD.format(noun=right[0], colour=right[1], **more)
    weights.with_suffix(".md").write_text(card, encoding="utf-8")
    print(card)


def write_log(weights: Path, history: History) -> None:
    """Every tenth step of a run, beside its weights."""
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in history.steps[::10]]
    weights.with_suffix(".log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


CARD = """# {name}

{purpose}

{kind} with {millions:.1f} M parameters, trained {origin} on our own drawn scenes (split `train`, {scenes:,} of them)
and nothing else: no photo, no text from the web, no official weights. It has seen the emoji, shapes, colours and sizes
of the scene world, and no photograph. {wrong}

Made by `python tools/ship.py {name}`: {steps:,} steps of {batch} pictures, {minutes:.0f} minutes on one core of a CPU
that did other work beside it. `{name}.log.jsonl` has every tenth step. Weights are stored in half precision.

Measured on 1,500 test scenes (seed 7), which no choice was made on:

{scores}
"""


def ship(name: str) -> None:
    """Train if that is still to be done, then write the three files."""
    how, tokenizer = SHIPPED[name], load_tokenizer()
    recipe, kind = how.variant.sized(), MODELS[how.variant.model]
    torch.manual_seed(0)
    model = recipe.build(kind, len(tokenizer))
    scenes = Scenes(recipe.scenes, "train", 0, recipe.size, recipe.objects)
    history = fit(model, recipe.batches(scenes, tokenizer), recipe.settings(), run_dir=Path("runs") / name)
    if history.interrupted:
        sys.exit(f"stopped after {len(history.steps)} steps; the same command goes on")
    weights = CHECKPOINTS / f"{name}.safetensors"
    if how.forget:
        whole = model.state_dict()
        model = kind(replace(model.config, **how.forget))
        model.load_state_dict({key: whole[key] for key in model.state_dict()})
    save_model(model.cpu(), weights, half=True, scenes=recipe.scenes, seed=0, seconds=round(history.seconds))
    model = load_model(kind, weights)
    scores = measure(model, Scenes(1500, "test", 7), tokenizer)
    if "itm" not in getattr(model.config, "losses", ("itm",)):  # the heads are there, but were never asked
        scores = {name: score for name, score in scores.items() if not name.startswith(("counterfactual", "masked"))}
    write_log(weights, history)
    card = CARD.format(
        name=name,
        purpose=how.purpose,
        kind=kind.__name__,
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        origin=f"from `{recipe.start}`" if recipe.start else "from scratch",
        wrong="Matching also learnt from false captions made by rule." if recipe.wrong_captions else "",
        scenes=recipe.scenes,
        steps=recipe.steps,
        batch=recipe.batch_size,
        minutes=history.seconds / 60,
        scores=table(scores),
    )
    weights.with_suffix(".md").write_text(card.replace(" \n", "\n"), encoding="utf-8")
    print(table(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*SHIPPED, "image_nano", []], help="which checkpoints")
    parser.add_argument("--list", action="store_true", help="say what there is")
    options = parser.parse_args()
    if options.list or not options.names:
        for name, how in SHIPPED.items():
            print(f"{name}: {how.purpose}\n  {asdict(how.variant.sized())}\n")
        sys.exit(0)
    for name in options.names:
        ship_image() if name == "image_nano" else ship(name)


if __name__ == "__main__":
    main()
