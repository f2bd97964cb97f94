"""CapFilt: a model improves the captions that it is trained on (Li et al., ICML 2022, BLIP, section 3.3).

    web captions ∪ clean ones ─► pre-train ─┬─► fine-tune on the clean ones: captioner ─► a new caption per image ─┐
                                            └─► fine-tune on the clean ones: filter                                │
                                                             └─► keep captions, old or new, that match ◄───────────┘
    kept captions ∪ clean ones ─► pre-train a NEW model, from scratch

Captioner and filter are fine-tuned apart: with shared weights, the filter would accept the captioner's mistakes. The
captioner samples (nucleus sampling); beam search writes safer captions, which add less that is new. Clean captions are
not filtered.

Each stage keeps its result in the folder and is not run again; a stage that was interrupted resumes from its last save.

    run.json               what identifies the run (see `training.run`)
    pretrained/ captioner/ filter/ final/ …    a run folder each, with `model.safetensors` when it is trained
    synthetic.jsonl        the new captions
    captions.jsonl         every caption with its score and whether it is kept
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.data.batch import Text, to_tensor
from minivlp.data.loading import Loader
from minivlp.data.recaptioned import Recaptioned
from minivlp.device import device as best_device
from minivlp.inference import device_of, evaluating, tokenize_for
from minivlp.layers.generation import DecodingConfig
from minivlp.training.cached import token_cache
from minivlp.training.checkpoint import load_tensors, save_model, save_text, set_weights, weights
from minivlp.training.loop import Settings, fit
from minivlp.training.recipes import reads_frozen_tower
from minivlp.training.run import RunFolder, run_identity
from minivlp.training.tokenizer_of_run import keep_tokenizer

PRETRAIN, CAPTION, FILTER = ("itc", "itm", "lm"), ("lm",), ("itc", "itm")  # losses of the stages
NUCLEUS = DecodingConfig(top_p=0.9)  # how the paper's captioner generates
CHUNK = 200  # images at a time when captions are written and scored

Scorer = Callable[[Any, Tensor, Tensor, Text], Tensor]
Line = dict[str, Any]  # of a .jsonl file


def by_matching(model: Any, images: Tensor, image_rows: Tensor, text: Text) -> Tensor:
    """(R,) probability that text r matches image `image_rows[r]`: the paper's filter, with a threshold of one half."""
    return model.match_many(images, image_rows, text)


def by_cosine(model: Any, images: Tensor, image_rows: Tensor, text: Text) -> Tensor:
    """(R,) cosine of text r and image `image_rows[r]`; it needs another threshold."""
    return (model.embed_images(images)[image_rows] * model.embed_texts(text)).sum(dim=-1)


def candidates(noisy: Any, synthetic: Sequence[str]) -> list[Line]:
    """All captions that the filter is to judge, as lines of `row`, `source`, `caption`: those of the web, and the new
    ones, one for each row of `noisy`, row by row."""
    return [
        {"row": row, "source": source, "caption": text}
        for row in range(len(noisy))
        for source, texts in (("web", noisy.captions(row)), ("synthetic", [synthetic[row]]))
        for text in texts
    ]


def judged(lines: Sequence[Line], scores: Sequence[float], threshold: float) -> list[Line]:
    """The lines with the `score` of each, and whether it is `kept`: at least `threshold`, and not an empty caption."""
    return [
        {**line, "score": round(score, 6), "kept": score >= threshold and bool(line["caption"])}
        for line, score in zip(lines, scores, strict=True)
    ]


def merge(lines: Sequence[Line]) -> dict[int, list[str]]:
    """The captions of these lines by row, in their order, without repetitions and empty captions."""
    texts: dict[int, list[str]] = {}
    for line in lines:
        if line["caption"] and line["caption"] not in texts.setdefault(line["row"], []):
            texts[line["row"]].append(line["caption"])
    return texts


class CapFilt:
    """The pipeline. Each method is a stage and first runs the stages that it needs; `final()` runs all.

    Args:
        build: makes a fresh model with these losses, `build(("lm",))`, always of the same size.
        noisy, clean: datasets: captions from the web, and few clean ones.
        folder: where the results are kept. pretrain, finetune: settings for `fit`.
        scorer, threshold: `by_matching`, `by_cosine` or your own; captions that score at least `threshold` are kept.
        decoding: how the captioner generates.
        cache_dir: a folder for the output of a frozen image tower (`training.cached`); None keeps it in memory.
        fit_options: further options of `fit` (device, bar).

    Raises CheckpointError if the folder holds another run.
    """

    def __init__(
        self,
        build: Callable[[tuple[str, ...]], nn.Module],
        noisy: Any,
        clean: Any,
        tokenizer: Any,
        folder: Path | str,
        *,
        pretrain: Settings,
        finetune: Settings,
        batch_size: int = 48,
        scorer: Scorer = by_matching,
        threshold: float = 0.5,
        decoding: DecodingConfig = NUCLEUS,
        seed: int = 0,
        cache_dir: Path | str | None = None,
        **fit_options: Any,
    ) -> None:
        self.build, self.noisy, self.clean, self.tokenizer, self.folder = build, noisy, clean, tokenizer, Path(folder)
        self.pretrain, self.finetune, self.batch_size, self.seed = pretrain, finetune, batch_size, seed
        self.scorer, self.threshold, self.decoding = scorer, threshold, decoding
        self.cache_dir, self.fit_options = cache_dir, fit_options
        with RunFolder(self.folder, self._identity()):
            pass  # it is this run's folder; each stage claims its own

    def _identity(self) -> dict[str, Any]:
        """What distinguishes this run from others."""
        return {
            "noisy": run_identity(self.noisy, self.tokenizer, self.seed),
            "clean": run_identity(self.clean, self.tokenizer, self.seed)["data"],
            "pretrain": asdict(self.pretrain),
            "finetune": asdict(self.finetune),
            "batch_size": self.batch_size,
            "scorer": self.scorer.__name__,
            "threshold": self.threshold,
            "decoding": asdict(self.decoding),
        }

    # ---------------------------------------------------------------------------------------------------------- stages

    def pretrained(self) -> nn.Module:
        """Trained on everything, noise included: also what the final model is compared with."""
        web = {row: self.noisy.captions(row) for row in range(len(self.noisy))}
        return self._train("pretrained", PRETRAIN, Recaptioned(self.noisy, web, self.clean), self.pretrain)

    def captioner(self) -> nn.Module:
        """The pre-trained model, fine-tuned to generate captions like the clean ones."""
        return self._train("captioner", CAPTION, self.clean, self.finetune, init_from=self.pretrained)

    def filter(self) -> nn.Module:
        """The pre-trained model, fine-tuned to decide whether a clean caption matches an image."""
        return self._train("filter", FILTER, self.clean, self.finetune, init_from=self.pretrained)

    def synthetic(self) -> list[str]:
        """One new caption for every noisy image."""
        return [line["caption"] for line in self._lines("synthetic.jsonl", self._generate)]

    def table(self) -> list[Line]:
        """Every caption of every noisy image: `row`, `source` (web or synthetic), `caption`, `score`, `kept`."""
        return self._lines("captions.jsonl", self._score)

    def final(self, sources: Sequence[str] = ("web", "synthetic"), filtered: bool = True) -> nn.Module:
        """A new model, trained from scratch on the captions that were kept and on the clean ones.

        The paper's ablation compares it with captions of one source alone, and with all of them unfiltered.
        """
        lines = [line for line in self.table() if line["source"] in sources and (line["kept"] or not filtered)]
        name = "final"
        if not filtered or len(sources) < 2:
            name = "-".join([name, *sources, *([] if filtered else ["unfiltered"])])
        return self.trained_on(lines, name)

    def trained_on(self, lines: Sequence[Line], name: str) -> nn.Module:
        """A new model, trained from scratch on the captions of these lines of `table` and on the clean ones.

        `final` calls it with the captions that the filter keeps; call it with another choice of lines to compare
        filters. The model is kept in the folder `name`, so give each choice its own name.
        """
        return self._train(name, PRETRAIN, Recaptioned(self.noisy, merge(lines), self.clean), self.pretrain)

    def scores(self, lines: Sequence[Mapping[str, Any]], scorer: Scorer) -> list[float]:
        """What a scorer makes of captions with the filter: `lines` as in `table`, in the order of their rows."""
        found: list[float] = []
        with evaluating(self.filter()) as model:
            for rows in self._chunks():
                some = [line for line in lines if line["row"] in rows]
                if some:
                    text = tokenize_for(model, self.tokenizer, [line["caption"] for line in some])
                    image_rows = torch.tensor([line["row"] - rows[0] for line in some], device=device_of(model))
                    found += scorer(model, self._images(model, rows), image_rows, text).float().tolist()
        return found

    # ------------------------------------------------------------------------------------------------------------ work

    def _train(
        self,
        name: str,
        losses: tuple[str, ...],
        dataset: Any,
        settings: Settings,
        init_from: Callable[[], nn.Module] | None = None,
    ) -> nn.Module:
        """The model of this stage: read from its folder, or trained and saved there."""
        path = self.folder / name / "model.safetensors"
        initial = None if init_from is None or path.exists() else weights(init_from())
        torch.manual_seed(self.seed)  # the stages before may have drawn, or have been read
        model = self.build(losses)
        if path.exists():
            set_weights(model, load_tensors(path)[0], str(path))
            return model.to(self.fit_options.get("device") or best_device()).eval()
        if initial is not None:
            set_weights(model, initial, "the pre-trained model")
        loader = Loader(
            dataset,
            self.tokenizer,
            self.batch_size,
            model.config.image.image_size,
            seed=self.seed,
            max_tokens=model.config.text.context_length,
            negative_captions=losses == FILTER and hasattr(dataset, "negative_caption"),  # scenes can make them
            image_tokens=token_cache(model, dataset, self.cache_dir) if reads_frozen_tower(model) else None,
        )
        identity = run_identity(dataset, self.tokenizer, self.seed)
        history = fit(model, loader.batch, settings, run_dir=path.parent, identity=identity, **self.fit_options)
        if history.interrupted:
            raise KeyboardInterrupt(f"{name} was stopped; run it again to resume")
        keep_tokenizer(self.tokenizer, path.parent)
        save_model(model, path, tokenizer=identity["tokenizer"])
        return model

    def _generate(self) -> list[Line]:
        model, lines = self.captioner(), []
        generator = torch.Generator(device_of(model)).manual_seed(self.seed)
        for rows in self._chunks():
            ids = model.generate(self._images(model, rows), decoding=self.decoding, generator=generator)
            texts = self.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
            lines += [{"row": row, "caption": text.strip()} for row, text in zip(rows, texts, strict=True)]
        return lines

    def _score(self) -> list[Line]:
        lines = candidates(self.noisy, self.synthetic())
        return judged(lines, self.scores(lines, self.scorer), self.threshold)

    def _lines(self, name: str, make: Callable[[], list[Line]]) -> list[Line]:
        """The lines of a file in the folder, which is made first where it is missing."""
        path = self.folder / name
        if not path.exists():
            save_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in make()))
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def _chunks(self) -> list[range]:
        rows = range(len(self.noisy))
        return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]

    def _images(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        return to_tensor(self.noisy.pixels(list(rows), model.config.image.image_size)).to(device_of(model))
