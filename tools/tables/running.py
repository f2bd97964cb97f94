"""Running tables: which runs are missing, and the record after each run."""

from __future__ import annotations

import argparse
import sys

from minivlp.data.scenes import Scenes
from minivlp.evaluation.records import RECORDS, load_runs, save_record
from tables import TABLES
from tables.measures import TEST_SCENES, TEST_SEED
from tables.variants import Table


def run(name: str, table: Table) -> None:
    """Make the runs of a table that are not recorded yet, and write the record after each."""
    test = Scenes(TEST_SCENES, "test", TEST_SEED)
    runs = load_runs(name) if recorded(name) else []
    done = {(run["variant"], run["seed"]) for run in runs}
    for label, variant in table.variants.items():
        tokenizer = variant.tokenizer()
        for seed in table.seeds:
            if (label, seed) in done:
                continue
            print(f"{name}: {label}, seed {seed}", flush=True)
            model, seconds, recipe = variant.train(seed, tokenizer)
            scores = dict(table.measure(model, test, tokenizer))
            row = {"variant": label, "seed": seed, "steps": recipe.steps, "seconds": round(seconds), "scores": scores}
            runs.append(row)
            save_record(name, f"python tools/experiments.py {name}", runs)
            print("  " + ", ".join(f"{key} {score.value:.2f}" for key, score in scores.items()), flush=True)


def recorded(name: str) -> bool:
    """Whether there is a record of this table."""
    return (RECORDS / f"{name}.json").exists()


def main(about: str) -> None:
    """The command line; `about` is the description of the script."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    # argparse compares an empty list with the choices, too, so it has to be one of them
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which tables", metavar="TABLE")
    parser.add_argument("--list", action="store_true", help="list the tables")
    options = parser.parse_args()
    if options.list or not options.tables:
        for name, table in TABLES.items():
            state = "recorded" if recorded(name) else "not recorded"
            print(f"{name:20} {len(table.variants)} x {len(table.seeds)} runs, {state}: {table.purpose}")
        sys.exit(0)
    for name in options.tables:
        run(name, TABLES[name])
