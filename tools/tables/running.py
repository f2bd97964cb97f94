"""Running tables: which runs are missing, and the record after each run."""

from __future__ import annotations

import argparse
import sys

from minivlp.data.scenes import Scenes
from minivlp.evaluation.records import RECORDS, load_runs, save_record
from tables import TABLES
from tables.measures import TEST_SCENES, TEST_SEED
from tables.variants import Table


def run(name: str, table: Table, only: str = "", seeds: tuple[int, ...] | None = None) -> None:
    """Make the runs of a table that are not recorded yet, one seed of all variants after the other, and record each.

    only: a part of the names of the variants to run. seeds: which of the table's seeds. Several processes can run parts
    of one table at the same time.
    """
    test = Scenes(TEST_SCENES, "test", TEST_SEED)
    for seed in table.seeds if seeds is None else seeds:
        for label, variant in table.variants.items():
            if only not in label or (label, seed) in {(run["variant"], run["seed"]) for run in recorded_runs(name)}:
                continue
            print(f"{name}: {label}, seed {seed}", flush=True)
            tokenizer = variant.tokenizer()
            model, seconds, recipe = variant.train(seed, tokenizer)
            scores = dict(table.measure(model, test, tokenizer))
            row = {"variant": label, "seed": seed, "steps": recipe.steps, "seconds": round(seconds), "scores": scores}
            save_record(name, f"python tools/experiments.py {name}", in_order(table, [*recorded_runs(name), row]))
            print("  " + ", ".join(f"{key} {score.value:.2f}" for key, score in scores.items()), flush=True)


def in_order(table: Table, runs: list[dict]) -> list[dict]:
    """The runs by variant, in the table's order, and seed; runs of variants that the table no longer has come last."""
    names = list(table.variants)
    return sorted(
        runs, key=lambda run: (names.index(run["variant"]) if run["variant"] in names else len(names), run["seed"])
    )


def recorded_runs(name: str) -> list[dict]:
    """The runs of this table that are recorded by now."""
    return load_runs(name) if recorded(name) else []


def recorded(name: str) -> bool:
    """Whether there is a record of this table."""
    return (RECORDS / f"{name}.json").exists()


def main(about: str) -> None:
    """The command line; `about` is the description of the script."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    # argparse compares an empty list with the choices, too, so it has to be one of them
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which tables", metavar="TABLE")
    parser.add_argument("--list", action="store_true", help="list the tables")
    parser.add_argument("--only", default="", metavar="TEXT", help="only variants whose name has this text")
    parser.add_argument("--seeds", type=int, nargs="*", metavar="SEED", help="only these seeds")
    options = parser.parse_args()
    if options.list or not options.tables:
        for name, table in TABLES.items():
            state = "recorded" if recorded(name) else "not recorded"
            print(f"{name:20} {len(table.variants)} x {len(table.seeds)} runs, {state}: {table.purpose}")
        sys.exit(0)
    for name in options.tables:
        run(name, TABLES[name], options.only, None if options.seeds is None else tuple(options.seeds))
