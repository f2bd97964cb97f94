"""What the commands of `python -m minivlp` do with their options, by subject: data, training, measuring.

What a command needs is imported in it, so that `--help` and a mistyped option are answered at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minivlp.console import did_you_mean
from minivlp.device import profile
from minivlp.errors import UserError
from minivlp.option_words import in_options
from minivlp.papers import PAPERS

EVALUATION_SCENES = 1000
LONGEST_TEXT = 10_000  # tokens; more are not counted


def open_data(options: argparse.Namespace, split: str, count: int, **scene: Any):
    """The dataset that `--data` names; `count` and the rest say how to make scenes."""
    from minivlp.data.folders import DataError, Photos, open_folder
    from minivlp.data.scenes import Scenes

    check_data_name(options.data)
    split = None if split == "all" else split
    if options.data == "scenes":
        count = options.subset if options.subset and split != "validation" else count
        return Scenes(count, split=split or "train", language=options.language, **scene)
    if options.data == "photos":
        if split == "validation":
            raise DataError("the photos that come with minivlp are too few to keep some for validation")
        return Photos(options.language)
    on_error = "skip" if options.skip_errors else "raise"
    return open_folder(options.data, split=split, subset=options.subset, language=options.language, on_error=on_error)


def check_data_name(spec: str) -> None:
    """Raise UserError for what is no path and nearly a word or prefix that we know, such as `scene` or `cocco:DIR`."""
    word, colon, rest = spec.partition(":")
    known = ("coco", "flickr", "folder", "wds", "parquet", "hf") if colon else ("scenes", "photos")
    if word not in known and not Path(spec).expanduser().exists() and (hint := did_you_mean(word, known)):
        raise UserError(f"{spec}: there is no such data{hint[:-1]}{colon}{rest}?")


def tokenizer_for_training(options: argparse.Namespace, new: Callable[[], Any] | None = None) -> Any:
    """The tokenizer that `--tokenizer` names, else that of `--start`, else that of the run to resume, else a `new` one
    (ours, if none can be made)."""
    from minivlp.training.tokenizer_of_run import kept_tokenizer, open_tokenizer, tokenizer_of_checkpoint

    if options.start:
        return tokenizer_of_checkpoint(options.start, options.tokenizer)
    if options.tokenizer:
        return open_tokenizer(options.tokenizer)
    kept = kept_tokenizer(run_folder(options))
    if kept is not None:
        return kept
    return open_tokenizer() if new is None else new()


def tokenizer_of_captions(dataset: Any, size: int) -> Any:
    """A new tokenizer of at most `size` tokens, trained on the captions of the training split."""
    from minivlp.data.tokenizer_training import folder_tokenizer

    tokenizer = folder_tokenizer(dataset, size)
    print(f"a tokenizer of {len(tokenizer):,} tokens, trained on the captions")
    return tokenizer


def run_folder(options: argparse.Namespace) -> Path:
    """Where a training run is kept."""
    return options.out or Path("runs") / f"{options.model}-{options.seed}"


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
    """Train, save `model.safetensors` in the run's folder, and print the scores on held-out images.

    As one of the processes that torchrun started, if it did; then only the first one prints.
    Raises KeyboardInterrupt when it was stopped.
    """
    from minivlp.training.distributed import join

    with join(options.local_negatives) as processes, open(os.devnull, "w") as nowhere:
        with redirect_stdout(nowhere if processes.rank else sys.stdout):
            train_with(options, processes)


def train_with(options: argparse.Namespace, processes: Any) -> None:
    """`train` as one of these processes."""
    import torch

    from minivlp.evaluation.suite import measure
    from minivlp.training import accumulation
    from minivlp.training.build import build_model
    from minivlp.training.checkpoint import save_model
    from minivlp.training.loop import fit
    from minivlp.training.run import RunFolder, model_identity, run_identity
    from minivlp.training.tokenizer_of_run import is_ours, keep_tokenizer

    paper, real = PAPERS[options.model], options.data != "scenes"
    if real:
        dataset = open_data(options, "train", 0)
        recipe = paper.folder_recipe(profile(), len(dataset), options.frozen)
        tokenizer = tokenizer_for_training(options, lambda: tokenizer_of_captions(dataset, recipe.vocabulary))
    else:
        recipe, tokenizer = paper.recipe(profile()), tokenizer_for_training(options)
    if not is_ours(tokenizer):  # the bundled towers know the tokens of ours only
        recipe = replace(recipe, init_from=None, frozen=())
    towers = {"tower": options.tower, "tower_weights": options.tower_weights, "frozen": options.frozen}
    torch.manual_seed(options.seed)
    model = build_model(paper.model_class(), recipe, tokenizer, init_from=options.start, **towers)
    scenes = {"seed": options.seed, "size": max(model.config.image.size), "objects": recipe.objects}
    if not real:
        dataset = open_data(options, "train", recipe.scenes, **scenes)
    recipe = recipe.sized(len(dataset), options.batch, options.epochs, options.steps)
    changes: dict[str, Any] = {"lr": options.lr} if options.lr else {}
    if real:
        changes["save_every"] = 50  # with large images and towers, steps may be slow
    if options.tower_weights and not options.frozen:
        changes["lr_multipliers"] = {"image.": 0.05}  # keeps what the tower has learned
    if options.accumulate > 1:
        accumulation.check(model, recipe.batch_size // processes.size, options.accumulate)
    if options.local_negatives and (processes.size == 1 or "itm" not in model.config.losses):
        raise UserError("--local-negatives is for several processes (torchrun) and a model that is trained with itm")
    settings, out = recipe.settings(**changes), run_folder(options)
    print(f"{dataset!r}: {settings.steps} steps of {recipe.batch_size}, run in {out}")
    if options.frozen and not (options.tower_weights or options.start or recipe.init_from):
        print("the image tower's weights are random and stay so: --tower with --tower-weights gives trained ones")
    identity = run_identity(dataset, tokenizer, options.seed, start=options.start, recipe=asdict(recipe), **towers)
    if options.local_negatives:
        identity["options"]["local_negatives"] = True
    data = {"from": options.data, **identity["data"]}
    if options.start:
        say_what_it_was_trained_on(options.start, data, training_split=True)
    run = RunFolder(out, {**identity, **model_identity(model, settings)})
    with processes.opened_by_first(run):  # before the tower's long work
        processes.on_first(lambda: keep_tokenizer(tokenizer, out))
        cache_dir = out.parent / "features" if options.frozen else None
        reading = {"model": model, "cache_dir": cache_dir, "processes": processes}
        batches = recipe.batches(dataset, tokenizer, options.seed, **reading)
        history = fit(model, batches, settings, run_dir=run, accumulate=options.accumulate, processes=processes)
        if history.interrupted:
            raise KeyboardInterrupt
        notes = {"data": data, "tokenizer": identity["tokenizer"], "seed": options.seed, "steps": settings.steps}
        notes["seconds"] = round(history.seconds)
        processes.on_first(lambda: save_model(model, out / "model.safetensors", **notes))
    if processes.rank:
        return
    print(f"trained in {history.seconds:.0f} s; saved {out / 'model.safetensors'}\n")
    held_out = held_out_for(options, scenes)
    if held_out is not None:
        print(f"on {held_out!r}:")
        print(measure(model, held_out, tokenizer))
        untrained = say_what_is_not_trained(model)
        if real and hasattr(model, "similarity") and "similarity" not in untrained:
            browse(model, held_out, tokenizer, out / "retrieval.html")


def held_out_for(options: argparse.Namespace, scenes: dict[str, Any]) -> Any:
    """What a run is measured on; None, and a line that says why, where a folder has nothing to measure it on."""
    from minivlp.data.folders import DataError

    try:
        splits = ("validation",) if options.data in ("scenes", "photos") else ("test", "validation")
        return open_first(options, splits, **scenes)
    except DataError as error:  # a folder too small to be split, or one whose other splits are damaged
        print(f"not measured: {in_options(error, options)}")
        return None


def open_first(options: argparse.Namespace, splits: tuple[str, ...], **scenes: Any) -> Any:
    """The first of these splits that the data have; it says so if that is not the first of all. Raises NoSuchSplit."""
    from minivlp.data.folders import NoSuchSplit

    for split in splits[:-1]:
        try:
            return open_data(options, split, EVALUATION_SCENES, **scenes)
        except NoSuchSplit:
            print(f"{options.data} has no {split} split: using {splits[-1]}")
    return open_data(options, splits[-1], EVALUATION_SCENES, **scenes)


def evaluate(options: argparse.Namespace) -> None:
    """Print every measure that the model and the data allow."""
    from minivlp.evaluation.suite import measure
    from minivlp.training.checkpoint import bundled, load_model
    from minivlp.training.run import data_fingerprint
    from minivlp.training.tokenizer_of_run import tokenizer_of_checkpoint

    path = options.weights or bundled(f"{options.model}_nano")
    tokenizer = tokenizer_of_checkpoint(path, options.tokenizer)
    model = load_model(PAPERS[options.model].model_class(), path)
    splits = ("test", "validation") if options.split is None else (options.split,)
    if options.data in ("scenes", "photos"):
        splits = splits[:1]
    dataset = open_first(options, splits, size=max(model.config.image.size))
    print(f"{path} on {dataset!r}")
    data = {"from": options.data, **data_fingerprint(dataset)}
    say_what_it_was_trained_on(path, data, training_split=options.split == "train")
    print()
    print(measure(model, dataset, tokenizer))
    say_what_is_not_trained(model)


def say_what_is_not_trained(model: Any) -> list[str]:
    """The verbs that this model was not trained for, and a line that says that they were not measured."""
    from minivlp.evaluation.suite import untrained_verbs

    verbs = untrained_verbs(model)
    if verbs:
        print(f"trained with {', '.join(model.config.losses)} alone, so not measured: {', '.join(verbs)}")
    return verbs


def say_what_it_was_trained_on(checkpoint: Path, data: dict[str, str], training_split: bool) -> None:
    """One line that compares these data with those that a checkpoint notes; nothing if it notes none.

    training_split: whether these data would have to be the same if nothing has changed.
    """
    from minivlp.training.checkpoint import read_notes

    known = read_notes(checkpoint).get("data")
    if not isinstance(known, dict):
        return
    if known["hash"] == data["hash"]:
        print(f"the weights were trained on these very data ({known['description']})")
    else:
        other = "other data: " if training_split or known["from"] != data["from"] else ""
        print(f"the weights were trained on {other}{known['description']} of {known['from']}")


def describe(options: argparse.Namespace) -> None:
    """Print a dataset's summary, its first captions, and what the tokenizer loses of the texts."""
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
    describe_tokens(dataset, options.tokenizer)
    if options.sheet:
        from minivlp.visualize.drawing import show_scenes

        figure = show_scenes([dataset[row] for row in range(min(12, len(dataset)))], boxes=True)
        sheet, drawn = options.sheet, io.BytesIO()
        if not sheet.suffix and not sheet.is_dir():
            sheet = sheet.with_suffix(".png")
        figure.savefig(drawn, format=sheet.suffix[1:] or "png", dpi=110, bbox_inches="tight")
        sheet.write_bytes(drawn.getvalue())
        print(f"drawn: {sheet}")


def describe_tokens(dataset: Any, tokenizer_name: str | None) -> None:
    """Print how long the texts are as tokens, and warn of what is lost when they are cut as `train` cuts them."""
    import torch

    from minivlp.data.loading import MAX_TOKENS
    from minivlp.data.lost_text import check_texts
    from minivlp.data.text import tokenize
    from minivlp.training.tokenizer_of_run import open_tokenizer

    tokenizer, rows = open_tokenizer(tokenizer_name), range(len(dataset))
    name = tokenizer_name or "our tokenizer (on a folder, `train` makes one of its captions, which needs fewer)"
    captions = [text for row in rows for text in dataset.captions(row)]
    phrases = [region.phrase for row in rows for region in dataset.regions(row)]
    for what, texts in (("captions", captions), ("phrases", phrases)):
        if texts:
            parts = [
                texts[start : start + 10_000] for start in range(0, len(texts), 10_000)
            ]  # long texts pad all others
            lengths = torch.cat([tokenize(tokenizer, part, LONGEST_TEXT).mask.sum(1) for part in parts])
            print(
                f"{what}: {lengths.min()} to {lengths.max()} tokens each, {lengths.median()} in the middle, by {name}"
            )
            check_texts(tokenizer, texts, MAX_TOKENS, what)


def info(options: argparse.Namespace) -> None:
    """Print the table of models, in columns or as markdown."""
    from minivlp.zoo import as_markdown, in_columns, zoo

    rows = zoo()
    print(as_markdown(rows) if options.markdown else in_columns(rows))
