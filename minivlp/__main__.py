"""Train and evaluate models and inspect data, from the command line.

    python -m minivlp info                                     the models: verbs, sizes, released weights, lessons
    python -m minivlp data coco:~/coco                         what a folder contains, and what is wrong with it
    python -m minivlp train clip                               train on the scene world, as lesson 01 does
    python -m minivlp train clip --data flickr:~/flickr8k      the same on a real folder
    python -m minivlp train clip --data flickr:~/flickr8k --tower vit_small_patch16_224 --tower-weights FILE --frozen
                                                               with a frozen image tower from timm
    torchrun --nproc-per-node 4 -m minivlp train clip          the same by four processes (docs/distributed.md)
    python -m minivlp evaluate clip                            measure the bundled checkpoint
    python -m minivlp evaluate clip --weights runs/clip/model.safetensors --data coco:~/coco

Data is `scenes` (drawn when they are needed), `photos` (the free photos that come with minivlp), or a folder of yours:
`coco:DIR`, `flickr:DIR`, `folder:DIR`, or pictures inside larger files: `wds:DIR` (tar shards), `parquet:DIR`, `hf:DIR`
or `hf:OWNER/NAME` (Hugging Face's `datasets`). docs/your_own_data.md describes the layouts.
The exit status is 0, or 1 for an error, 2 for options that cannot be understood, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

from minivlp.commands import describe, evaluate, info, run_folder, train
from minivlp.console import Parser, notices_in_one_line, print_in_any_encoding, stopped_by_signals
from minivlp.option_words import in_options
from minivlp.papers import PAPERS


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    print_in_any_encoding()
    options = parser().parse_args(arguments)
    with notices_in_one_line(), stopped_by_signals() as signals:
        try:
            options.run(options)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print(f"\n{this_process()}: stopped. {what_is_saved(options, arguments)}", file=sys.stderr)
            return 128 + (signals or [signal.SIGINT])[0]
        except BrokenPipeError:  # whoever reads the output (`| head`) has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            said = in_options(error, options)
            if said is None:  # a fault of ours: its traceback is needed
                raise
            print(f"{this_process()}: {said}", file=sys.stderr)
            return 1
    return 0


def this_process() -> str:
    """Who speaks: torchrun starts several of us, whose errors stand in one terminal."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"minivlp (process {os.environ['RANK']})" if several else "minivlp"


def what_is_saved(options: argparse.Namespace, arguments: list[str]) -> str:
    """What a stopped command leaves, and the command that goes on."""
    from minivlp.training.run import saved_step

    if options.run is not train:
        return "Nothing was changed"
    out, same = run_folder(options), f"python -m minivlp {shlex.join(arguments)}"
    if (out / "model.safetensors").is_file():
        return f"The trained model is in {out / 'model.safetensors'}. This measures it:\n  {same}"
    if step := saved_step(out):
        return f"The first {step} steps are saved in {out}. This goes on from there:\n  {same}"
    return f"No step was saved yet. This starts again:\n  {same}"


def parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    top = Parser(prog="python -m minivlp", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run, what: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=what, description=what)
        sub.set_defaults(run=run)
        return sub

    listing = command("info", info, "List the models: verbs, parameters, length of the code, weights, lesson.")
    listing.add_argument("--markdown", action="store_true", help="as a table for a page, as it stands in docs/zoo.md")

    data = command("data", describe, "Describe a dataset and draw a sheet of samples.")
    data.add_argument("data", help="scenes, photos, or coco: flickr: folder: wds: parquet: hf: before DIR")
    data.add_argument("--split", default="all", type=_split, choices=SPLITS, help="default: all")
    data.add_argument(
        "--sheet", metavar="PNG", type=Path, help="draw twelve samples with captions and boxes into this file"
    )
    _reading(data)

    training = command("train", train, "Train a model, resumable, and measure it.")
    training.add_argument("model", choices=sorted(PAPERS))
    training.add_argument("--data", default="scenes", help="scenes (default), or DIR with coco:, wds:, ... before it")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_count, help="passes over the pictures (default: by the model and the data)")
    length.add_argument("--steps", type=_count, help="optimizer steps, in place of epochs")
    training.add_argument(
        "--batch", type=_count, help="pairs per step, of all processes together; halve it when memory runs out"
    )
    training.add_argument(
        "--accumulate",
        type=_count,
        default=1,
        metavar="N",
        help="compute a batch in N parts to need less memory; exact, for clip (default: 1)",
    )
    training.add_argument(
        "--local-negatives",
        action="store_true",
        help="with torchrun: hard negatives come from the same process (default: from all)",
    )
    training.add_argument("--lr", type=_rate, help="highest learning rate (default: by the model and the data)")
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
    evaluating.add_argument(
        "--split", type=_split, choices=SPLITS, help="default: test, or validation where there is no test split"
    )
    _reading(evaluating)
    return top


SPLITS = ("train", "validation", "test", "all")


def _split(text: str) -> str:
    """The name of a split, of which "val" and "dev" are other names of validation."""
    return {"val": "validation", "dev": "validation"}.get(text, text)


def _count(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _rate(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _reading(sub: argparse.ArgumentParser) -> None:
    """Options of every command that reads data."""
    sub.add_argument("--subset", type=_count, help="use only so many images, drawn with seed 0")
    sub.add_argument("--language", default="en", choices=["en", "zh"], help="captions in English (default) or Chinese")
    sub.add_argument("--skip-errors", action="store_true", help="skip and count invalid rows instead of stopping")
    sub.add_argument("--tokenizer", help="a transformers tokenizer folder (default: the run's own, else ours)")


if __name__ == "__main__":
    sys.exit(main())
