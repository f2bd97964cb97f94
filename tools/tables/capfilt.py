"""CapFilt under 40 % caption noise: the filter itself, and a new model trained on the captions that it keeps."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minivlp.data.noise import NoisyCaptions
from minivlp.data.scenes import Scenes
from minivlp.evaluation.facts import is_true, tells_all
from minivlp.evaluation.filtering import filter_quality
from minivlp.evaluation.records import RECORDS
from minivlp.evaluation.score import bootstrap
from minivlp.layers.generation import DecodingConfig
from minivlp.models.blip import BLIP
from minivlp.training.capfilt import NUCLEUS, CapFilt, Line, by_cosine
from minivlp.training.checkpoint import save_text
from minivlp.training.recipes import Recipe
from tables.measures import Found, captioning
from tables.variants import Table, Trained, Variant, scenes_of

NOISE = 0.4  # share of the web captions that are false
BEAM = DecodingConfig(beams=3, min_length=4)
# The image tower was trained on labels alone, so no part of the model has read a clean caption before.
WEB = {"scenes": 6000, "objects": (1, 2), "steps": 400, "init_from": "image_nano", "init_parts": ("image.",)}


def pipeline(recipe: Recipe, seed: int, tokenizer: Any, beam: bool = False) -> CapFilt:
    """CapFilt on the recipe's scenes with noisy captions, and a tenth as many clean ones. Stages are kept in `runs/`.

    With `beam` the captioner uses beam search; all models are those of the run without.
    """

    def build(losses: tuple[str, ...]) -> BLIP:
        return replace(recipe, config={"losses": losses}).build(BLIP, tokenizer)

    noisy = NoisyCaptions(scenes_of(recipe, seed), NOISE, seed)
    clean = scenes_of(replace(recipe, scenes=recipe.scenes // 10), seed + 1000)
    finetune = recipe.settings(steps=max(1, recipe.steps // 3), lr=recipe.lr / 2)
    options = {"pretrain": recipe.settings(), "finetune": finetune, "batch_size": recipe.batch_size, "seed": seed}
    options["bar"] = sys.stderr.isatty()

    def in_folder(folder: Path, decoding: DecodingConfig) -> CapFilt:
        return CapFilt(build, noisy, clean, tokenizer, folder, decoding=decoding, **options)

    folder = Path("runs") / f"capfilt-{seed}"
    nucleus = in_folder(folder, NUCLEUS)
    if not beam:
        return nucleus
    nucleus.captioner(), nucleus.filter()  # trains them where they are missing
    other = folder.with_name(f"{folder.name}-beam")
    for stage in ("pretrained", "captioner", "filter"):
        if not (other / stage).exists():
            shutil.copytree(folder / stage, other / stage)
    return in_folder(other, BEAM)


@dataclass(frozen=True)
class FilterVariant(Variant):
    """CapFilt up to the scores of all captions: the pipeline itself is measured, not a model."""

    beam: bool = False

    def train(self, seed: int, tokenizer: Any) -> Trained:
        recipe, start = self.full_recipe(), time.perf_counter()
        run = pipeline(recipe, seed, tokenizer, self.beam)
        run.table()
        return Trained(run, time.perf_counter() - start, recipe)


@dataclass(frozen=True)
class RecaptionedVariant(Variant):
    """A BLIP trained from scratch on the captions of these `sources`; without any, on the web captions as they are."""

    sources: tuple[str, ...] = ()
    filtered: bool = True
    beam: bool = False

    def train(self, seed: int, tokenizer: Any) -> Trained:
        recipe, start = self.full_recipe(), time.perf_counter()
        run = pipeline(recipe, seed, tokenizer, self.beam)
        model = run.final(self.sources, self.filtered) if self.sources else run.pretrained()
        return Trained(model, time.perf_counter() - start, recipe)


def oracle(run: CapFilt) -> list[Line]:
    """Exactly the captions that state nothing false of their image: no filter can choose better by truth."""
    return [line for line in run.table() if is_true(line["caption"], run.noisy.dataset.scene(line["row"]))]


def cosine(run: CapFilt) -> list[Line]:
    """The captions of the highest cosine, as many as the filter by matching keeps; equal cosines by their order."""
    lines = run.table()
    scores = run.scores(lines, by_cosine)
    written = [i for i, line in enumerate(lines) if line["caption"]]
    best = sorted(written, key=lambda i: -scores[i])[: sum(line["kept"] for line in lines)]
    return [lines[i] for i in sorted(best)]


@dataclass(frozen=True)
class OtherFilterVariant(Variant):
    """A BLIP trained from scratch on web and new captions that another filter than the paper's has chosen."""

    choose: Callable[[CapFilt], list[Line]] = oracle

    def train(self, seed: int, tokenizer: Any) -> Trained:
        recipe, start = self.full_recipe(), time.perf_counter()
        run = pipeline(recipe, seed, tokenizer)
        model = run.trained_on(self.choose(run), f"final-{self.choose.__name__}")
        return Trained(model, time.perf_counter() - start, recipe)


def filtering(run: CapFilt, test: Scenes, tokenizer: Any) -> Found:
    """How well the filter tells true web captions from false ones, and how many of the new captions are true."""
    lines = run.table()
    first = {line["row"]: line for line in reversed(lines) if line["source"] == "web"}  # one caption of each image
    web = [first[row] for row in sorted(first)]
    is_clean = [run.noisy.is_clean(line["row"]) for line in web]
    quality = filter_quality([line["score"] for line in web], is_clean, run.threshold)
    scores = {"AUC (itm)" if name == "AUC" else name: score for name, score in quality.items()}
    scores["AUC (itc)"] = filter_quality(run.scores(web, by_cosine), is_clean)["AUC"]
    new = [line for line in lines if line["source"] == "synthetic"]
    for name, some in (("new captions, true", new), ("new captions kept, true", [n for n in new if n["kept"]])):
        true = [tells_all(line["caption"], run.noisy.dataset.scene(line["row"])) for line in some]
        scores[name] = bootstrap(np.array(true, dtype=float), 0.0)
    if run.seed == 0 and run.decoding == NUCLEUS:
        save_captions(run)
    return scores


def save_captions(run: CapFilt, images: int = 240) -> None:
    """Record the captions of the first images with both scores: lesson 06 shows them."""
    lines = [line for line in run.table() if line["row"] < images]
    rows = [{**line, "cosine": round(c, 4)} for line, c in zip(lines, run.scores(lines, by_cosine), strict=True)]
    save_text(RECORDS / "capfilt_captions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


TABLES = {
    "blip_filter": Table(
        "CapFilt at 40 % noise: which captions are kept, and how many of the new ones are true",
        {"nucleus": FilterVariant("blip", recipe=WEB), "beam": FilterVariant("blip", recipe=WEB, beam=True)},
        filtering,
    ),
    "blip_capfilt": Table(
        "a second BLIP from scratch, on captions that the first one has improved, at 40 % noise",
        {
            "neither": RecaptionedVariant("blip", recipe=WEB),
            "captioner only": RecaptionedVariant("blip", recipe=WEB, sources=("web", "synthetic"), filtered=False),
            "filter only": RecaptionedVariant("blip", recipe=WEB, sources=("web",)),
            "both": RecaptionedVariant("blip", recipe=WEB, sources=("web", "synthetic")),
            "both, beam search": RecaptionedVariant("blip", recipe=WEB, sources=("web", "synthetic"), beam=True),
            "both, oracle filter": OtherFilterVariant("blip", recipe=WEB, choose=oracle),
            "both, cosine filter": OtherFilterVariant("blip", recipe=WEB, choose=cosine),
        },
        captioning,
    ),
}
