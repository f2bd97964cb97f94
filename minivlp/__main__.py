"""Train, evaluate and look, from the command line.

    python -m minivlp info                                     which models there are, what they can do and load
    python -m minivlp data coco:~/coco                         what is in a folder, and what is wrong with it
    python -m minivlp train clip                               train on the scene world, as lesson 01 does
    python -m minivlp train clip --data flickr:~/flickr8k      the same on a real folder
    python -m minivlp train clip --data flickr:~/flickr8k --tower vit_small_patch16_224 --tower-weights FILE --frozen
                                                               with an image tower of timm's that stays as it is
    python -m minivlp evaluate clip                            measure the shipped checkpoint
    python -m minivlp evaluate clip --weights runs/clip/model.safetensors --data coco:~/coco

Data is `scenes` (our own world, made on the spot), `photos` (the open photos that come along), or a folder of yours:
`coco:DIR`, `flickr:DIR`, `folder:DIR` (docs/your_own_data.md shows each layout).
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from minivlp.machine import profile

EVALUATION_SCENES = 1000


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = parser().parse_args(arguments)
    from minivlp.data.folders import DataError
    from minivlp.training.checkpoint import CheckpointError

    try:
        options.run(options)
    except (DataError, CheckpointError, FileNotFoundError, FloatingPointError, ValueError) as error:
        print(f"minivlp: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("minivlp: stopped; the same command goes on from what is on disk", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    from minivlp.models import MODELS

    top = argparse.ArgumentParser(
        prog="python -m minivlp", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, what: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=what)
        sub.set_defaults(run=run)
        return sub

    listing = command("info", info, "List the models: verbs, parameters, length of the code, weights, lesson.")
    listing.add_argument("--markdown", action="store_true", help="as a table for a page, as it stands in docs/zoo.md")

    data = command("data", describe, "Say what a dataset holds and draw a sheet of it.")
    data.add_argument("data", help="scenes, photos, coco:DIR, flickr:DIR or folder:DIR")
    data.add_argument("--split", default=None, help="train, validation or test (default: everything)")
    data.add_argument("--sheet", metavar="PNG", help="draw twelve samples with captions and boxes into this file")
    _reading(data)

    training = command("train", train, "Train a model, resumable, and measure it.")
    training.add_argument("model", choices=sorted(MODELS))
    training.add_argument("--data", default="scenes", help="scenes (default), coco:DIR, flickr:DIR or folder:DIR")
    training.add_argument("--steps", type=_count, help="optimiser steps (default: as in the model's lesson)")
    training.add_argument("--batch", type=_count, help="pairs per step; halve it when memory runs out")
    training.add_argument("--seed", type=int, default=0, help="of weights, order and scenes")
    training.add_argument("--start", type=Path, help="a checkpoint to start from (default: random weights)")
    training.add_argument("--tower", metavar="NAME", help="one of timm's image models in place of our image tower")
    training.add_argument(
        "--tower-weights", metavar="FILE", help="its weights, or `pretrained` to fetch timm's (default: random)"
    )
    training.add_argument(
        "--frozen", action="store_true", help="leave the image tower as it is; it sees each picture only once"
    )
    training.add_argument("--out", type=Path, help="folder of the run (default runs/MODEL-SEED); call again to resume")
    _reading(training)

    evaluating = command("evaluate", evaluate, "Measure a checkpoint: retrieval, counterfactuals, boxes, as it can.")
    evaluating.add_argument("model", choices=sorted(MODELS))
    evaluating.add_argument("--weights", type=Path, help="a checkpoint (default: the shipped one)")
    evaluating.add_argument("--data", default="scenes", help="scenes (default), photos, or a folder as above")
    evaluating.add_argument("--split", default="test", help="default: test")
    _reading(evaluating)
    return top


def _count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _reading(sub: argparse.ArgumentParser) -> None:
    """Options of every command that reads data."""
    sub.add_argument("--subset", type=_count, help="use only so many images, drawn with seed 0")
    sub.add_argument("--language", default="en", choices=["en", "zh"], help="captions in English (default) or Chinese")
    sub.add_argument("--skip-errors", action="store_true", help="leave damaged rows out and count them, don't stop")
    sub.add_argument("--tokenizer", help="a transformers tokenizer folder (default: ours)")


def open_data(options: argparse.Namespace, split: str | None, count: int, **scene: Any):
    """The dataset that `--data` names; `count` and the rest say how to make scenes."""
    from minivlp.data.folders import DataError, Photos, open_folder
    from minivlp.data.scenes import Scenes

    if options.data == "scenes":
        count = options.subset if options.subset and split != "validation" else count
        return Scenes(count, split=split or "train", language=options.language, **scene)
    if options.data == "photos":
        if split == "validation":
            raise DataError("the photos that come along are too few to keep some apart for validation")
        return Photos(options.language)
    on_error = "skip" if options.skip_errors else "raise"
    return open_folder(options.data, split=split, subset=options.subset, language=options.language, on_error=on_error)


def read_tokenizer(options: argparse.Namespace) -> Any:
    """The tokenizer that `--tokenizer` names; one that is not ours also gets the tokens that tell BLIP what to do."""
    from minivlp.data.text import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    return tokenizer


def special_ids(kind: type, tokenizer: Any) -> dict[str, Any]:
    """The fields of `kind`'s config that name ids of the tokenizer. Raises ValueError if it has no such token."""
    ids = {"pad_id": tokenizer.pad_token_id, "stop_id": tokenizer.sep_token_id, "mask_id": tokenizer.mask_token_id}
    ids |= {"decode_id": tokenizer.convert_tokens_to_ids("[DEC]"), "never_mask": tuple(tokenizer.all_special_ids)}
    ids["match_id"] = tokenizer.convert_tokens_to_ids("[ENC]")
    ids = {field.name: ids[field.name] for field in fields(kind.Config) if field.name in ids}
    if absent := [name for name, value in ids.items() if value is None]:
        raise ValueError(f"{kind.__name__} needs a tokenizer like BERT's: this one has no {', '.join(absent)}")
    return ids


def build(options: argparse.Namespace, recipe: Any, tokenizer: Any) -> Any:
    """The model that the options ask for: begun from shipped towers on scenes, but with random ones on anything else,
    as those know only our scenes and words; or with a tower of timm's."""
    from minivlp.layers.timm_tower import timm_tower
    from minivlp.models import MODELS
    from minivlp.models.fused import AlignedTowers
    from minivlp.training.checkpoint import load_model

    kind = MODELS[options.model]
    if (options.tower or options.frozen) and not issubclass(kind, (MODELS["clip"], AlignedTowers)):
        raise ValueError(f"{options.model} has no image tower of its own to exchange or to freeze")
    if options.tower_weights and not options.tower:
        raise ValueError("--tower-weights are those of a --tower: name it")
    if options.tower and options.start:
        raise ValueError("--start brings its own image tower: leave --tower out")
    if options.start:
        return load_model(kind, options.start)
    changes = special_ids(kind, tokenizer) if options.tokenizer else {}
    tower = None
    if options.tower:
        hub = options.tower_weights == "pretrained"
        tower = timm_tower(options.tower, None if hub else options.tower_weights, pretrained=hub)
        changes["image"] = tower.config
    if changes or options.data != "scenes":
        recipe = replace(recipe, start=None, frozen=(), config={**recipe.config, **changes})
    model = recipe.build(kind, len(tokenizer))
    if tower is not None:
        model.image.load_state_dict(tower.state_dict())
        if getattr(model, "teacher", None) is not None:
            model.teacher.copy_from(model)
    return model


def measure(model: Any, dataset: Any, tokenizer: Any) -> dict[str, Any]:
    """Every measure that this model and this dataset allow."""
    from minivlp.evaluation.captions import captions
    from minivlp.evaluation.grounding import grounding, region_retrieval
    from minivlp.evaluation.matching import counterfactual, masked_words
    from minivlp.evaluation.retrieval import retrieval

    scenes = hasattr(dataset, "scene")
    many = max(8, 250 * 64**2 // model.config.image.image_size**2)  # pictures at a time: as much memory at any size
    scores = {}
    if hasattr(model, "embed_images"):  # finding by fusing every picture with every caption would take an hour
        scores |= retrieval(model, dataset, tokenizer, unique=500 if scenes else None, batch_size=many)
    if scenes:
        changed = counterfactual(model, dataset, tokenizer, language=dataset.language)
        scores |= {f"counterfactual: {kind}": score for kind, score in changed.items()}
    if scenes and hasattr(model, "fill"):
        scores |= {f"masked word: {name}": s for name, s in masked_words(model, dataset, tokenizer).items()}
    if hasattr(model, "generate") and len(dataset) > 1:
        written = captions(model, dataset, tokenizer, batch_size=many)
        scores |= {f"caption: {name}": score for name, score in written.items()}
    boxed = any(dataset.regions(row) for row in range(min(50, len(dataset))))
    if boxed and hasattr(model, "ground"):
        scores |= grounding(model, dataset, tokenizer, batch_size=many)
    if boxed and hasattr(model, "embed_regions"):
        scores |= region_retrieval(model, dataset, tokenizer, batch_size=min(50, many))
    return scores


def browse(model: Any, dataset: Any, tokenizer: Any, file: Path) -> None:
    """Write a page on which the first fifty pictures can be searched, and print where it is."""
    from PIL import Image

    from minivlp.evaluation.retrieval import evaluating, similarities
    from minivlp.visualize.page import save_page
    from minivlp.visualize.widgets import RetrievalBrowser

    rows = range(min(50, len(dataset)))
    said, pictures = [dataset.captions(row) for row in rows], []
    for row in rows:
        pictures.append(Image.fromarray(dataset[row].image))
        pictures[-1].thumbnail((192, 192))
    with evaluating(model):
        table = similarities(model, dataset, tokenizer, rows, [text for texts in said for text in texts], 8)
    title = f"{type(model).__name__} searches {len(rows)} pictures"
    print(f"\nto search in a browser: {save_page([RetrievalBrowser(pictures, said, table)], file, title)}")


def same_run(out: Path, options: argparse.Namespace) -> None:
    """Keep in the run's folder what it is trained on; raise ValueError if it already holds a run on something else."""
    names = ("model", "data", "subset", "language", "tokenizer", "batch", "seed", "start")
    names += ("tower", "tower_weights", "frozen")
    given = {name: getattr(options, name) for name in names}
    asked = {name: None if value is None or value is False else str(value) for name, value in given.items()}
    file = out / "options.json"
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        other = [
            f"--{name.replace('_', '-')} {kept.get(name) or 'left out'}"
            for name in names
            if kept.get(name) != asked[name]
        ]
        if other:
            raise ValueError(f"{out} holds a run with {', '.join(other)}: choose another --out, or delete that folder")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


def train(options: argparse.Namespace) -> None:
    """Train, save `model.safetensors` in the run's folder, and print what pictures that were held out say."""
    import torch

    from minivlp.evaluation.score import Scores
    from minivlp.training.cached import kept_tokens
    from minivlp.training.checkpoint import save_model
    from minivlp.training.loop import fit
    from minivlp.training.recipes import RECIPES

    recipe, tokenizer = RECIPES[options.model][profile()], read_tokenizer(options)
    real = options.data != "scenes"
    if options.frozen and not real:
        raise ValueError("--frozen keeps what the tower says of pictures that lie on disk: choose a folder by --data")
    torch.manual_seed(options.seed)
    model = build(options, recipe, tokenizer)
    size = model.config.image.image_size
    scene = dict(seed=options.seed, size=size, objects=recipe.objects)
    dataset = open_data(options, "train", recipe.scenes, **scene)
    batch = options.batch or min(recipe.batch_size, len(dataset))
    wrong = recipe.wrong_captions and hasattr(dataset, "wrong_caption")
    recipe = replace(recipe, batch_size=batch, size=size, wrong_captions=wrong)
    changes: dict[str, Any] = {"steps": options.steps} if options.steps else {}
    if real:  # its boxes come without captions, unlike those of scenes; and its steps may be slow
        recipe = replace(recipe, pairs_between=recipe.regions_per_image > 0)
        changes["save_every"] = 50
    if options.tower_weights and not options.frozen:
        changes["faster"] = {"image.": 0.05}  # what is learnt already is to be kept
    settings = recipe.settings(**changes)
    out = options.out or Path("runs") / f"{options.model}-{options.seed}"
    same_run(out, options)
    print(f"{dataset!r}: {settings.steps} steps of {batch}, run in {out}")
    if options.frozen:
        model.image.requires_grad_(False)
        if options.tower and not options.tower_weights:
            print("the tower's weights are random and stay so: --tower-weights gives it trained ones")
    with kept_tokens(model, dataset, out.parent / "features") if options.frozen else nullcontext(dataset) as seen:
        batches = recipe.batches(seen, tokenizer, options.seed, model.config.text.context_length)
        history = fit(model, batches, settings, run_dir=out)
    if history.interrupted:
        print(f"stopped after {len(history.steps)} steps; the same command goes on from the last saved one")
        return
    notes = {"data": options.data, "scenes": len(dataset), "seed": options.seed, "seconds": round(history.seconds)}
    save_model(model, out / "model.safetensors", **notes)
    print(f"trained in {history.seconds:.0f} s; saved {out / 'model.safetensors'}\n")
    held_out = open_held_out(options, **scene)
    if held_out is not None:
        print(f"on {held_out!r}:")
        print(Scores(measure(model, held_out, tokenizer)))
        if real and hasattr(model, "similarity"):
            browse(model, held_out, tokenizer, out / "retrieval.html")


def open_held_out(options: argparse.Namespace, **scene: Any) -> Any:
    """What a run is measured on: of a folder its test split, else validation; if there is neither, say so: None."""
    from minivlp.data.folders import DataError

    problem = None
    for split in ("validation",) if options.data in ("scenes", "photos") else ("test", "validation"):
        try:
            return open_data(options, split, EVALUATION_SCENES, **scene)
        except DataError as error:  # a folder too small to be split has nothing to be measured on
            problem = problem or error
    print(f"not measured: {problem}")
    return None


def evaluate(options: argparse.Namespace) -> None:
    """Print every measure that the model and the data allow."""
    from minivlp.evaluation.score import Scores
    from minivlp.models import MODELS
    from minivlp.training.checkpoint import load_model, shipped

    path = options.weights or shipped(f"{options.model}_nano")
    model = load_model(MODELS[options.model], path)
    dataset = open_data(options, options.split, EVALUATION_SCENES, size=model.config.image.image_size)
    print(f"{path} on {dataset!r}\n")
    print(Scores(measure(model, dataset, read_tokenizer(options))))


def describe(options: argparse.Namespace) -> None:
    """Print a dataset's summary and its first captions."""
    dataset = open_data(options, options.split, 100)
    print(repr(dataset))
    if not len(dataset):
        return
    sample = dataset[0]
    print(f"first: {sample.image.shape[1]} x {sample.image.shape[0]} pixels, {sample.source or 'made on the spot'}")
    for caption in sample.captions:
        print(f"  {caption}")
    for region in sample.regions:
        print(f"  [{region.kind}] {region.phrase}: " + " ".join(f"{value:.2f}" for value in region.box))
    if options.sheet:
        from minivlp.visualize.drawing import show_scenes

        figure = show_scenes([dataset[row] for row in range(min(12, len(dataset)))], boxes=True)
        figure.savefig(options.sheet, dpi=110, bbox_inches="tight")
        print(f"drawn: {options.sheet}")


def info(options: argparse.Namespace) -> None:
    """Print the table of models, in columns or as markdown."""
    from minivlp.zoo import as_markdown, in_columns, zoo

    rows = zoo()
    print(as_markdown(rows) if options.markdown else in_columns(rows))


if __name__ == "__main__":
    sys.exit(main())
