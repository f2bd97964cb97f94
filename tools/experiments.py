"""The long runs behind the tables: several variants, several seeds, one small JSON each in `records/`.

    python tools/experiments.py clip_seeds            all runs of one table (runs that are there already are kept)
    python tools/experiments.py --list                which tables there are, and which are made

Settings were chosen on validation scenes; what is recorded here is measured on test scenes that no choice has seen.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minivlp.data.loading import Loader
from minivlp.data.noise import NoisyCaptions
from minivlp.data.questions import QuestionLoader, a_question, a_statement, answers_of, one_list
from minivlp.data.scene import LABELS
from minivlp.data.scenes import Scenes
from minivlp.data.text import SPECIAL, load_tokenizer, pieces_tokenizer
from minivlp.evaluation.answering import answering, entailment
from minivlp.evaluation.captions import captions
from minivlp.evaluation.facts import tells_all
from minivlp.evaluation.filtering import filter_quality
from minivlp.evaluation.grounding import grounding, mean_box_of
from minivlp.evaluation.matching import FUNCTION_WORDS, counterfactual, masked_words
from minivlp.evaluation.records import RECORDS, load_runs, save_record
from minivlp.evaluation.retrieval import retrieval
from minivlp.evaluation.score import bootstrap
from minivlp.models import MODELS
from minivlp.models.blip import BLIP, CROSS_ATTENTION, SELF_ATTENTION, THE_REST
from minivlp.models.vilt import AnswersConfig, ViLTAnswers
from minivlp.models.xvlm import XVLM
from minivlp.objectives.masking import IGNORE
from minivlp.training.capfilt import CapFilt, by_cosine
from minivlp.training.checkpoint import load_model, shipped, start_from
from minivlp.training.loop import fit
from minivlp.training.recipes import RECIPES, Recipe
from minivlp.training.stages import (
    ImageStage,
    TextStage,
    freeze_for_images,
    freeze_for_text,
    unfreeze,
)

TEST_SEED = 7


@dataclass(frozen=True)
class Variant:
    """One row of a table: what differs from the recipe, in the model's config and in the training.

    pieces: names of objects fall to pieces (`pieces_tokenizer`), so that all words are new to the model.
    """

    model: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    pieces: bool = False

    def tokenizer(self) -> Any:
        """Ours, or the one of pieces."""
        return pieces_tokenizer() if self.pieces else load_tokenizer()

    def sized(self) -> Recipe:
        """The recipe with what differs."""
        recipe = replace(RECIPES[self.model]["laptop"], **self.recipe)
        return replace(recipe, config=recipe.config | self.config)

    def train(self, seed: int, tokenizer: Any) -> tuple[Any, float, Recipe]:
        """A model trained by the recipe, the seconds it took, and the recipe it followed."""
        recipe = self.sized()
        torch.manual_seed(seed)
        kind = MODELS[self.model]
        model = with_pieces(recipe, kind, tokenizer) if self.pieces else recipe.build(kind, len(tokenizer))
        scenes = Scenes(recipe.scenes, "train", seed, recipe.size, recipe.objects)
        history = fit(model, recipe.batches(scenes, tokenizer, seed), recipe.settings(), bar=sys.stderr.isatty())
        if history.interrupted:  # `fit` takes the stop button quietly: half a run must not be recorded as a whole one
            sys.exit(f"stopped after {len(history.steps)} of {recipe.steps} steps: this run is not recorded")
        return model, history.seconds, recipe


@dataclass(frozen=True)
class Staged(Variant):
    """A VLMo from scratch that learns from images and from texts, each alone, before pairs or in place of them.

    stages: in their order, of `STAGES`; each takes the recipe's steps. Where the last one is not "pairs", it is the
    stage itself that is measured.
    """

    stages: tuple[str, ...] = ()

    def train(self, seed: int, tokenizer: Any) -> tuple[Any, float, Recipe]:
        recipe, seconds = self.sized(), 0.0
        torch.manual_seed(seed)
        model = recipe.build(MODELS[self.model], len(tokenizer))
        for number, name in enumerate(self.stages):
            freeze, kind = STAGES[name]
            freeze(model)
            stage = kind(model) if kind else model
            unpaired = 10 * seed + number  # every stage has scenes of its own
            scenes = Scenes(recipe.scenes, "train", unpaired, recipe.size, recipe.objects)
            history = fit(stage, recipe.batches(scenes, tokenizer, seed), recipe.settings(), bar=sys.stderr.isatty())
            if history.interrupted:
                sys.exit(f"stopped in the stage of {name}: this run is not recorded")
            seconds += history.seconds
        return stage, seconds, recipe


STAGES: dict[str, tuple[Callable[[Any], None], Callable[[Any], Any] | None]] = {
    "images": (unfreeze, ImageStage),
    "texts": (unfreeze, TextStage),
    "texts, attention frozen": (freeze_for_text, TextStage),
    "images, attention frozen": (freeze_for_images, ImageStage),
    "pairs": (unfreeze, None),
}


@dataclass(frozen=True)
class Asked(Variant):
    """A shipped model fine-tuned on questions: BLIP writes the answers, ViLT chooses them from a list (`chooses`)."""

    chooses: bool = False
    ask: Callable[..., tuple[str, str]] = a_question

    def train(self, seed: int, tokenizer: Any) -> tuple[Any, float, Recipe]:
        recipe, answers = self.sized(), None
        torch.manual_seed(seed)
        scenes = Scenes(recipe.scenes, "train", 0, recipe.size, recipe.objects)  # one list of answers for all seeds
        if self.chooses:
            answers = LABELS if self.ask is a_statement else one_list(answers_of(scenes))
            model = ViLTAnswers(replace(AnswersConfig.nano(len(tokenizer)), answers=len(answers)))
            start_from(model, shipped("vilt_nano"), ("words.", "joint.", "modality", "pool."))
        else:
            model = replace(recipe, start=None).build(BLIP, len(tokenizer))
            start_from(model, shipped("blip_nano"), ("",))
        more = dict(answers=answers, ask=self.ask, seed=seed)
        loader = QuestionLoader(scenes, tokenizer, recipe.batch_size, recipe.size, **more)
        history = fit(model, loader.batch, recipe.settings(), bar=sys.stderr.isatty())
        if history.interrupted:
            sys.exit(f"stopped after {len(history.steps)} of {recipe.steps} steps: this run is not recorded")
        return model, history.seconds, recipe


def answered(model: Any, test: Scenes, tokenizer: Any) -> dict[str, Any]:
    """Questions about 300 scenes, written or chosen; if written, those about 60 scenes also by ranking a list."""
    known = answers_of(Scenes(RECIPES["vilt"]["laptop"].scenes, "train", 0))
    if hasattr(model, "answer"):
        return dict(answering(model, test, tokenizer, answers=known, limit=300))
    ranked = answering(model, test, tokenizer, answers=known, limit=60)
    written = answering(model, test, tokenizer, limit=300, max_length=40)
    return dict(written) | {f"ranked: {kind}": score for kind, score in ranked.items()}


def entailed(model: Any, test: Scenes, tokenizer: Any) -> dict[str, Any]:
    """Statements about 500 scenes: entailed, neutral, contradicted?"""
    return dict(entailment(model, test, tokenizer, limit=500))


NOISE = 0.4  # of the captions "from the web" are false
GOOD = 600  # good captions, beside ten times as many from the web
BEAM = {"beams": 3, "min_length": 4}


def bootstrapping(recipe: Recipe, seed: int, tokenizer: Any, beam: bool = False) -> CapFilt:
    """CapFilt on an image tower that has learnt from labels alone: no part has read a clean caption before.

    Its stages are kept under `runs/`.
    """

    def build(losses: tuple[str, ...]) -> BLIP:
        return replace(recipe, config={"losses": losses}).build(BLIP, len(tokenizer))

    noisy = NoisyCaptions(Scenes(recipe.scenes, "train", seed, recipe.size, recipe.objects), NOISE, seed)
    clean = Scenes(GOOD, "train", seed + 1000, recipe.size, recipe.objects)
    folder = Path("runs") / f"capfilt-{seed}"
    steps = dict(pretrain=recipe.settings(), finetune=recipe.settings(steps=recipe.steps // 3, lr=recipe.lr / 2))
    more = dict(batch_size=recipe.batch_size, seed=seed, bar=sys.stderr.isatty())
    nucleus = CapFilt(build, noisy, clean, tokenizer, folder, **steps, **more)
    if not beam:
        return nucleus
    nucleus.captioner(), nucleus.filter()  # the same ones
    other = folder.with_name(f"{folder.name}-beam")
    for stage in ("pretrained", "captioner", "filter"):
        if not (other / stage).exists():
            shutil.copytree(folder / stage, other / stage)
    return CapFilt(build, noisy, clean, tokenizer, other, writing=BEAM, **steps, **more)


@dataclass(frozen=True)
class Mended(Variant):
    """A BLIP trained from scratch on captions that a first one has mended; without `sources`, on them as they are."""

    sources: tuple[str, ...] = ()
    filtered: bool = True
    beam: bool = False

    def train(self, seed: int, tokenizer: Any) -> tuple[Any, float, Recipe]:
        recipe, start = self.sized(), time.perf_counter()
        run = bootstrapping(recipe, seed, tokenizer, self.beam)
        model = run.final(self.sources, self.filtered) if self.sources else run.pretrained()
        return model, time.perf_counter() - start, recipe


@dataclass(frozen=True)
class Judged(Variant):
    """CapFilt up to the verdicts: no model but the run itself is measured."""

    beam: bool = False

    def train(self, seed: int, tokenizer: Any) -> tuple[Any, float, Recipe]:
        recipe, start = self.sized(), time.perf_counter()
        run = bootstrapping(recipe, seed, tokenizer, self.beam)
        run.table()
        if seed == 0 and not self.beam:
            keep_captions(run)
        return run, time.perf_counter() - start, recipe


def keep_captions(run: CapFilt, pictures: int = 240) -> None:
    """Keep what lesson 05 shows on its board: captions of the first pictures with both judges' scores."""
    lines = [line for line in run.table() if line["row"] < pictures]
    both = zip(lines, run.scores(lines, by_cosine), strict=True)
    text = "".join(json.dumps({**line, "cosine": round(cosine, 4)}) + "\n" for line, cosine in both)
    (RECORDS / "capfilt_captions.jsonl").write_text(text, encoding="utf-8")


def verdicts(run: CapFilt, test: Scenes, tokenizer: Any) -> dict[str, Any]:
    """How well the filter tells true web captions from false ones, and how many of the new captions are true."""
    scores, lines = {}, run.table()
    web = [line for line in lines if line["source"] == "web"]
    web = [line for n, line in enumerate(web) if n == 0 or line["row"] != web[n - 1]["row"]]  # one of each picture
    clean = [run.noisy.is_clean(line["row"]) for line in web]
    judged = filter_quality([line["score"] for line in web], clean, run.threshold)
    scores |= {"AUC (itm)" if name == "AUC" else name: score for name, score in judged.items()}
    scores["AUC (itc)"] = filter_quality(run.scores(web, by_cosine), clean)["AUC"]
    for name, some in (("new captions, true", True), ("new captions kept, true", False)):
        asked = [line for line in lines if line["source"] == "synthetic" and (some or line["kept"])]
        true = [tells_all(line["caption"], run.noisy.dataset.scene(line["row"])) for line in asked]
        scores[name] = bootstrap(np.array(true, dtype=float), 0.0)
    return scores


def with_pieces(recipe: Recipe, kind: type, tokenizer: Any) -> Any:
    """A one-stream model of this recipe for a tokenizer of pieces: from the towers it gets all but their words."""
    vocabulary = tokenizer.get_vocab()
    never = (*range(len(SPECIAL)), *(vocabulary[word] for word in sorted(FUNCTION_WORDS) if word in vocabulary))
    model = replace(recipe, start=None, config=recipe.config | {"never_mask": never}).build(kind, len(tokenizer))
    model.continues = torch.tensor([token.startswith("##") for token in sorted(vocabulary, key=vocabulary.get)])
    towers = load_model(XVLM, shipped(recipe.start))
    towers.text.embed = model.words  # another tokenizer's; the model keeps its own
    model.start_from(towers)
    return model


def retrieval_and_counterfactuals(model: Any, test: Scenes, tokenizer: Any) -> dict[str, Any]:
    """R@k of 500 unique captions, and the true caption against one with a single fact changed."""
    scores = dict(retrieval(model, test, tokenizer))
    return scores | {f"counterfactual: {kind}": s for kind, s in counterfactual(model, test, tokenizer).items()}


def boxes_and_retrieval(model: Any, test: Scenes, tokenizer: Any) -> dict[str, Any]:
    """Boxes against what a blind guess would get, and R@k of the two towers."""
    mean_box = mean_box_of(Scenes(2000, "train", TEST_SEED))
    return grounding(model, test, tokenizer, mean_box=mean_box, limit=500) | retrieval(model, test, tokenizer)


@dataclass(frozen=True)
class Table:
    """Variants by name, what is measured of each, and a word on what the table is for."""

    purpose: str
    variants: dict[str, Variant]
    measure: Callable[[Any, Scenes, Any], dict[str, Any]] = retrieval_and_counterfactuals
    seeds: tuple[int, ...] = (0, 1, 2)


def boxes_and_matching(model: Any, test: Scenes, tokenizer: Any) -> dict[str, Any]:
    """As `boxes_and_retrieval`, and the true caption against one with a single fact changed."""
    return boxes_and_retrieval(model, test, tokenizer) | retrieval_and_counterfactuals(model, test, tokenizer)


def fusion(model: Any, test: Scenes, tokenizer: Any) -> dict[str, Any]:
    """One fact changed, masked words, and R@k where the model has two towers."""
    changed, hidden = (measure(model, test, tokenizer, limit=600) for measure in (counterfactual, masked_words))
    scores = {f"counterfactual: {kind}": s for kind, s in changed.items()}
    scores |= {f"masked word: {name}": s for name, s in hidden.items()}
    return scores | (dict(retrieval(model, test, tokenizer)) if hasattr(model, "embed_images") else {})


def hidden_words(model: Any, test: Scenes, tokenizer: Any) -> dict[str, Any]:
    """Masked words alone, for models that were trained on nothing else."""
    return {f"masked word: {name}": s for name, s in masked_words(model, test, tokenizer, limit=600).items()}


@torch.no_grad()
def alone(stage: Any, test: Scenes, tokenizer: Any) -> dict[str, Any]:
    """What a stage of VLMo learns to guess of one modality without the other.

    Hidden words: the share that is right; chance is always to say the commonest. Hidden patches: the share of the
    pixels' variance that is explained, batch by batch.
    """
    stage, model = stage.cpu().eval(), stage.model
    torch.manual_seed(TEST_SEED)
    loader = Loader(test, tokenizer, 50, model.config.image.image_size, seed=TEST_SEED)
    batches = [loader.batch(step) for step in range(loader.steps_per_epoch)]
    if isinstance(stage, ImageStage):
        explained = [1 - float(stage.losses(batch)["pixels"]) for batch in batches]
        return {"hidden patches": bootstrap(explained, 0.0)}
    right, labels = [], []
    for batch in batches:
        masked = model.hide_words(batch.ids, batch.mask)
        asked = masked.labels != IGNORE  # (B, L)
        guessed = model.word_logits(model.encode_text(masked.ids, batch.mask)[asked]).argmax(dim=-1)
        labels.append(masked.labels[asked])
        right.append(guessed == labels[-1])
    words = torch.cat(labels)
    return {"hidden words": bootstrap(torch.cat(right).float(), float((words == words.mode().values).float().mean()))}


def writing(model: Any, test: Scenes, tokenizer: Any) -> dict[str, Any]:
    """Captions of 500 scenes with one or two things; then what `fusion` asks of a model that writes."""
    simple = Scenes(500, "test", TEST_SEED, objects=(1, 2))
    return captions(model, simple, tokenizer) | retrieval_and_counterfactuals(model, test, tokenizer)


SHORT = {"steps": 150}
MIXED = {"steps": 400, "batch_size": 32, "regions_per_image": 2, "pairs_between": True, "wrong_captions": True}
# the image tower, trained on clean phrases and frozen, stands for DeiT; everything else is new
ALONE = {"steps": 400, "wrong_captions": False, "start_parts": ("image.",)}
NOISY = {"steps": 150, "batch_size": 32, "wrong_captions": False}
SCRATCH = {"steps": 300, "start": None, "frozen": ()}
# momentum scaled to the run: .98 looks back over 50 of 400 steps, .97 over 33 of 150 (the paper's .995 over 200)
TAUGHT = {"momentum": 0.98, "alpha_steps": 100, "queue_size": 960}
TAUGHT_BRIEFLY = TAUGHT | {"momentum": 0.97, "alpha_steps": 50}
EARLY = {"losses": ("itc", "mlm")}  # matching does not begin in so few steps from scratch
STAGE = {"steps": 250, "start": None, "wrong_captions": False}
BRIEF = STAGE | {"steps": 120}
BEGUN = {
    "images first": ("images", "pairs"),
    "images, then texts": ("images", "texts, attention frozen", "pairs"),
    "texts, then images": ("texts", "images, attention frozen", "pairs"),
}
CARRIED = {
    "texts, attention of images": ("images", "texts, attention frozen"),
    "texts, random attention": ("texts, attention frozen",),
    "texts, attention learns": ("texts",),
    "images, attention of texts": ("texts", "images, attention frozen"),
    "images, random attention": ("images, attention frozen",),
    "images, attention learns": ("images",),
}
WRITTEN = {"steps": 300, "wrong_captions": False}
WEB = {"scenes": 10 * GOOD, "objects": (1, 2), "steps": 400, "start": "image_nano", "start_parts": ("image.",)}
WITH_BOXES, WITHOUT = {"losses": ("itc", "itm", "box_l1", "box_giou")}, {"losses": ("itc", "itm")}
TABLES = {
    "clip_seeds": Table("CLIP nano as lesson 01 trains it, three seeds", {"CLIP nano": Variant("clip")}),
    "clip_temperature": Table(
        "temperature learned, or fixed (150 steps)",
        {
            "learned from .07": Variant("clip", recipe=SHORT),
            "fixed at .07": Variant("clip", {"learn_temperature": False}, SHORT),
            "fixed at 1": Variant("clip", {"learn_temperature": False, "temperature": 1.0}, SHORT),
        },
        retrieval,
    ),
    "clip_batch": Table(
        "batch size at the same number of pairs seen (9,600)",
        {
            f"batch {size}": Variant("clip", recipe={"batch_size": size, "steps": 9600 // size})
            for size in (16, 64, 256)
        },
        retrieval,
    ),
    "xvlm_seeds": Table(
        "X-VLM nano from scratch, boxes and region contrast, three seeds",
        {"X-VLM nano": Variant("xvlm")},
        boxes_and_retrieval,
    ),
    "xvlm_ablation": Table(
        "X-VLM from scratch without boxes, things, regions (400 steps)",
        {
            "everything": Variant("xvlm", WITH_BOXES, MIXED),
            "no box loss": Variant("xvlm", WITHOUT, MIXED),
            "no things": Variant("xvlm", WITH_BOXES, MIXED | {"kinds": ("phrase", "relation", "image")}),
            "no regions": Variant("xvlm", WITH_BOXES, MIXED | {"kinds": ("object", "image")}),
        },
        boxes_and_matching,
    ),
    "albef_seeds": Table("ALBEF nano as lesson 03 trains it, three seeds", {"ALBEF nano": Variant("albef")}, fusion),
    "albef_ablation": Table(
        "ALBEF's parts, one after the other, from the image tower alone (400 steps)",
        {
            "MLM + ITM": Variant("albef", {"losses": ("itm", "mlm")}, ALONE),
            "+ ITC": Variant("albef", {"hard_negatives": False}, ALONE),
            "+ hard negatives": Variant("albef", recipe=ALONE),
            "+ teacher on ITC": Variant("albef", TAUGHT | {"distil": ("itc",)}, ALONE),
            "+ teacher on MLM": Variant("albef", TAUGHT, ALONE),
            "false captions instead": Variant("albef", recipe=ALONE | {"wrong_captions": True}),
        },
        fusion,
    ),
    "from_scratch": Table(
        "the fusion models without the towers' start, shown once (300 steps)",
        {name: Variant(model, recipe=SCRATCH) for name, model in (("ALBEF nano", "albef"), ("ViLT nano", "vilt"))},
        fusion,
        seeds=(0,),
    ),
    "vilt_seeds": Table("ViLT nano as lesson 02 trains it, three seeds", {"ViLT nano": Variant("vilt")}, fusion),
    "vilt_ablation": Table(
        "ViLT without word-patch alignment (with it: vilt_seeds)",
        {"ITM + MLM": Variant("vilt", {"losses": ("itm", "mlm")})},
        fusion,
    ),
    "vilt_words": Table(
        "what is hidden where names fall to pieces: whole words or single pieces (masked words alone, 200 steps)",
        {
            name: Variant("vilt", {"losses": ("mlm",), "whole_words": whole}, {"steps": 200}, pieces=True)
            for name, whole in (("whole words", True), ("single pieces", False))
        },
        hidden_words,
    ),
    "vlmo_seeds": Table("VLMo nano as lesson 04 trains it, three seeds", {"VLMo nano": Variant("vlmo")}, fusion),
    "vlmo_ablation": Table(
        "VLMo with one feed-forward layer for all, at equal compute (with experts: vlmo_seeds)",
        {"shared feed-forward": Variant("vlmo", {"shared_expert": True})},
        fusion,
    ),
    "vlmo_stages": Table(
        "VLMo from scratch: pairs alone, or after stages of images and texts (120 steps each)",
        {
            "pairs alone": Staged("vlmo", EARLY, BRIEF, stages=("pairs",)),
            **{name: Staged("vlmo", EARLY, BRIEF, stages=stages) for name, stages in BEGUN.items()},
        },
        fusion,
    ),
    "vlmo_frozen": Table(
        "what the attention that one modality has made is worth to the other (250 steps a stage)",
        {name: Staged("vlmo", recipe=STAGE, stages=stages) for name, stages in CARRIED.items()},
        alone,
    ),
    "blip_seeds": Table("BLIP nano as lesson 05 trains it, three seeds", {"BLIP nano": Variant("blip")}, writing),
    "blip_sharing": Table(
        "what encoder and decoder of BLIP share (300 steps)",
        {
            "all but self-attention": Variant("blip", recipe=WRITTEN),
            "everything": Variant("blip", {"shared": SELF_ATTENTION + CROSS_ATTENTION + THE_REST}, WRITTEN),
            "nothing": Variant("blip", {"shared": ()}, WRITTEN),
        },
        writing,
    ),
    "blip_filter": Table(
        "CapFilt at 40 % noise: who is kept, and how true the new captions are",
        {"nucleus": Judged("blip", recipe=WEB), "beam": Judged("blip", recipe=WEB, beam=True)},
        verdicts,
    ),
    "blip_capfilt": Table(
        "a second BLIP from scratch, on captions that the first one has mended, at 40 % noise",
        {
            "neither": Mended("blip", recipe=WEB),
            "captioner only": Mended("blip", recipe=WEB, sources=("web", "synthetic"), filtered=False),
            "filter only": Mended("blip", recipe=WEB, sources=("web",)),
            "both": Mended("blip", recipe=WEB, sources=("web", "synthetic")),
            "both, beam search": Mended("blip", recipe=WEB, sources=("web", "synthetic"), beam=True),
        },
        writing,
    ),
    "answers": Table(
        "questions answered, written by BLIP or chosen by ViLT, after a short fine-tuning (one seed)",
        {
            "BLIP": Asked("blip", {"losses": ("lm",)}, {"steps": 500, "lr": 2e-3}),
            "ViLT": Asked("vilt", recipe={"steps": 400, "lr": 1e-3}, chooses=True),
        },
        answered,
        seeds=(0,),
    ),
    "entailment": Table(
        "statements judged by ViLT, after a short fine-tuning (one seed)",
        {"ViLT": Asked("vilt", recipe={"steps": 300, "lr": 1e-3}, chooses=True, ask=a_statement)},
        entailed,
        seeds=(0,),
    ),
    "albef_noise": Table(
        "momentum distillation under caption noise, from the trained towers (150 steps of 32)",
        {
            f"{noise:.0%} noise, {name}": Variant("albef", how, NOISY | {"noise": noise})
            for noise in (0.0, 0.2, 0.4, 0.6)
            for name, how in {"alone": {}, "with a teacher": TAUGHT_BRIEFLY}.items()
        },
        fusion,
    ),
}


def run(name: str) -> None:
    """Make the runs of a table that are missing, writing the record after each."""
    table = TABLES[name]
    test = Scenes(1500, "test", TEST_SEED)
    runs = load_runs(name) if (RECORDS / f"{name}.json").exists() else []
    done = {(run["variant"], run["seed"]) for run in runs}
    for variant, how in table.variants.items():
        tokenizer = how.tokenizer()
        for seed in table.seeds:
            if (variant, seed) in done:
                continue
            print(f"{name}: {variant}, seed {seed}", flush=True)
            model, seconds, recipe = how.train(seed, tokenizer)
            scores = table.measure(model, test, tokenizer)
            runs.append(
                {"variant": variant, "seed": seed, "steps": recipe.steps, "seconds": round(seconds), "scores": scores}
            )
            save_record(name, f"python tools/experiments.py {name}", runs)
            print("  " + ", ".join(f"{k} {s.value:.2f}" for k, s in scores.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # argparse holds the empty list itself against the choices, so it must be one of them
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], help="which tables")
    parser.add_argument("--list", action="store_true", help="say what there is")
    options = parser.parse_args()
    if options.list or not options.tables:
        for name, table in TABLES.items():
            made = "made" if (RECORDS / f"{name}.json").exists() else "not made yet"
            print(f"{name:20} {len(table.variants)} x {len(table.seeds)} runs, {made}: {table.purpose}")
        sys.exit(0)
    for name in options.tables:
        run(name)


if __name__ == "__main__":
    main()
