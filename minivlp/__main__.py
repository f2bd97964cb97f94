"""Train and evaluate models and inspect data, from the command line.

    python -m minivlp info                                     the models: verbs, sizes, released weights, lessons
    python -m minivlp data coco:~/coco                         what a folder contains, and what is wrong with it
    python -m minivlp train clip                               train on the scene world, as lesson 01 does
    python -m minivlp train clip --data flickr:~/flickr8k      the same on a real folder
    python -m minivlp train clip --data flickr:~/flickr8k --tower vit_small_patch16_224 --tower-weights FILE --frozen
                                                               with a frozen image tower from timm
    python -m minivlp evaluate clip                            measure the bundled checkpoint
    python -m minivlp evaluate clip --weights runs/clip/model.safetensors --data coco:~/coco

Data is `scenes` (drawn when they are needed), `photos` (the free photos that come with minivlp), or a folder of yours:
`coco:DIR`, `flickr:DIR`, `folder:DIR` (docs/your_own_data.md describes the layouts).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minivlp.device import profile
from minivlp.papers import PAPERS

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
        print("minivlp: stopped; the same command resumes from what is on disk", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
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

    data = command("data", describe, "Describe a dataset and draw a sheet of samples.")
    data.add_argument("data", help="scenes, photos, coco:DIR, flickr:DIR or folder:DIR")
    data.add_argument("--split", default=None, help="train, validation or test (default: everything)")
    data.add_argument("--sheet", metavar="PNG", help="draw twelve samples with captions and boxes into this file")
    _reading(data)

    training = command("train", train, "Train a model, resumable, and measure it.")
    training.add_argument("model", choices=sorted(PAPERS))
    training.add_argument("--data", default="scenes", help="scenes (default), coco:DIR, flickr:DIR or folder:DIR")
    training.add_argument("--steps", type=_count, help="optimizer steps (default: as in the model's lesson)")
    training.add_argument("--batch", type=_count, help="pairs per step; halve it when memory runs out")
    training.add_argument("--seed", type=int, default=0, help="of weights, order and scenes")
    training.add_argument("--start", type=Path, help="a checkpoint to start from (default: random weights)")
    training.add_argument("--tower", metavar="NAME", help="an image model of timm in place of our image tower")
    training.add_argument(
        "--tower-weights", metavar="FILE", help="its weights, or `pretrained` to download timm's (default: random)"
    )
    training.add_argument(
        "--frozen", action="store_true", help="do not train the image tower; it runs only once per image"
    )
    training.add_argument("--out", type=Path, help="folder of the run (default runs/MODEL-SEED); call again to resume")
    _reading(training)

    evaluating = command("evaluate", evaluate, "Measure a checkpoint: retrieval, counterfactuals, captions, boxes.")
    evaluating.add_argument("model", choices=sorted(PAPERS))
    evaluating.add_argument("--weights", type=Path, help="a checkpoint (default: the bundled one)")
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
    sub.add_argument("--skip-errors", action="store_true", help="skip and count invalid rows instead of stopping")
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
            raise DataError("the photos that come with minivlp are too few to keep some for validation")
        return Photos(options.language)
    on_error = "skip" if options.skip_errors else "raise"
    return open_folder(options.data, split=split, subset=options.subset, language=options.language, on_error=on_error)


def read_tokenizer(options: argparse.Namespace) -> Any:
    """The tokenizer that `--tokenizer` names; one that is not ours also gets BLIP's tokens [DEC] and [ENC]."""
    from minivlp.data.text import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    return tokenizer


def browse(model: Any, dataset: Any, tokenizer: Any, file: Path) -> None:
    """Write an HTML page on which the first fifty images can be searched, and print its path."""
    from PIL import Image

    from minivlp.evaluation.retrieval import similarities
    from minivlp.inference import evaluating
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


def train(options: argparse.Namespace) -> None:
    """Train, save `model.safetensors` in the run's folder, and print the scores on held-out images."""
    import torch

    from minivlp.evaluation.suite import measure
    from minivlp.training.build import build_model
    from minivlp.training.checkpoint import save_model
    from minivlp.training.loop import fit
    from minivlp.training.run import run_identity

    paper, tokenizer, real = PAPERS[options.model], read_tokenizer(options), options.data != "scenes"
    recipe = paper.recipe(profile())
    if real:
        recipe = recipe.for_folder()
    if options.tokenizer:  # the bundled towers know the tokens of ours only
        recipe = replace(recipe, init_from=None, frozen=())
    towers = {"tower": options.tower, "tower_weights": options.tower_weights, "frozen": options.frozen}
    torch.manual_seed(options.seed)
    model = build_model(paper.model_class(), recipe, tokenizer, init_from=options.start, **towers)
    scenes = {"seed": options.seed, "size": max(model.config.image.size), "objects": recipe.objects}
    dataset = open_data(options, "train", recipe.scenes, **scenes)
    recipe = replace(recipe, batch_size=options.batch or min(recipe.batch_size, len(dataset)))
    changes: dict[str, Any] = {"steps": options.steps} if options.steps else {}
    if real:
        changes["save_every"] = 50  # with large images and towers, steps may be slow
    if options.tower_weights and not options.frozen:
        changes["lr_multipliers"] = {"image.": 0.05}  # keeps what the tower has learned
    settings = recipe.settings(**changes)
    out = options.out or Path("runs") / f"{options.model}-{options.seed}"
    print(f"{dataset!r}: {settings.steps} steps of {recipe.batch_size}, run in {out}")
    if options.frozen and options.tower and not options.tower_weights:
        print("the tower's weights are random and stay so: --tower-weights gives it trained ones")
    identity = run_identity(dataset, tokenizer, options.seed, start=options.start, recipe=asdict(recipe), **towers)
    cache_dir = out.parent / "features" if options.frozen else None
    batches = recipe.batches(dataset, tokenizer, options.seed, model=model, cache_dir=cache_dir)
    history = fit(model, batches, settings, run_dir=out, identity=identity)
    if history.interrupted:
        print(f"stopped after {len(history.steps)} steps; the same command resumes from the last saved one")
        return
    notes = {"data": options.data, "scenes": len(dataset), "seed": options.seed, "seconds": round(history.seconds)}
    save_model(model, out / "model.safetensors", **notes)
    print(f"trained in {history.seconds:.0f} s; saved {out / 'model.safetensors'}\n")
    held_out = open_held_out(options, **scenes)
    if held_out is not None:
        print(f"on {held_out!r}:")
        print(measure(model, held_out, tokenizer))
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
    from minivlp.evaluation.suite import measure
    from minivlp.training.checkpoint import bundled, load_model

    path = options.weights or bundled(f"{options.model}_nano")
    model = load_model(PAPERS[options.model].model_class(), path)
    dataset = open_data(options, options.split, EVALUATION_SCENES, size=max(model.config.image.size))
    print(f"{path} on {dataset!r}\n")
    print(measure(model, dataset, read_tokenizer(options)))


def describe(options: argparse.Namespace) -> None:
    """Print a dataset's summary and its first captions."""
    dataset = open_data(options, options.split, 100)
    print(repr(dataset))
    if not len(dataset):
        return
    sample = dataset[0]
    print(f"first: {sample.image.shape[1]} x {sample.image.shape[0]} pixels, {sample.source or 'drawn from a seed'}")
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
