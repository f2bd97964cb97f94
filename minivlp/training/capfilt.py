"""CapFilt: a model mends the captions it learns from (Li et al., ICML 2022, BLIP, section 3.3).

    web captions ∪ good ones ──► pre-train ──┬──► fine-tune on the good ones: captioner ──► one new caption per image ─┐
                                             └──► fine-tune on the good ones: filter                                   │
                                                                                └──► keep what matches, old or new ◄───┘
    what was kept ∪ good ones ──► pre-train a NEW model, from scratch

Captioner and filter are fine-tuned apart, or the filter would find the captioner's mistakes right. The captioner draws
its words (nucleus sampling): a beam search writes safer captions, which say less that is new. Good captions are never
filtered.

Every stage keeps its result in the folder and is not run again; a stage that was cut off goes on where its training
last saved. `captions.jsonl` holds every caption with its score and verdict, for a person to read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlp.data.batch import to_tensor
from minivlp.data.loading import Loader
from minivlp.data.recaptioned import Recaptioned
from minivlp.data.text import encode
from minivlp.machine import device as best_device
from minivlp.training.checkpoint import CheckpointError, load_tensors, save_model, set_weights, weights
from minivlp.training.loop import Settings, fit

PRETRAIN, CAPTION, FILTER = ("itc", "itm", "lm"), ("lm",), ("itc", "itm")


def by_matching(model: Any, images: Tensor, which: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """(R,) probability that text r matches image which[r]: the paper's filter, with a threshold of one half."""
    return model.match_many(images, which, ids, mask)


def by_cosine(model: Any, images: Tensor, which: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """(R,) cosine of text r and image which[r]; it needs a threshold of its own."""
    return (model.embed_images(images)[which] * model.embed_texts(ids, mask)).sum(dim=-1)


class CapFilt:
    """The pipeline. Each method is one stage and runs those it needs first; `final()` runs all.

    Args:
        build: makes a fresh model that computes these losses, `build(("lm",))`, always of the same size.
        noisy, clean: datasets (docs/architecture.md): captions from the web, and few good ones.
        folder: where the results are kept. pretrain, finetune: settings for `fit`.
        judge, threshold: `by_matching` or `by_cosine` or your own; a caption that scores `threshold` is kept.
        writing: how the captioner writes, options of `BLIP.generate`; nucleus sampling with `top_p` .9 if None.
        more: options of `fit` (device, bar).

    Raises CheckpointError if the folder holds a run with other settings.
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
        judge: Callable[..., Tensor] = by_matching,
        threshold: float = 0.5,
        writing: Mapping[str, Any] | None = None,
        seed: int = 0,
        **more: Any,
    ) -> None:
        self.build, self.noisy, self.clean, self.tokenizer, self.folder = build, noisy, clean, tokenizer, Path(folder)
        self.pretrain, self.finetune, self.batch_size, self.seed, self.more = pretrain, finetune, batch_size, seed, more
        self.judge, self.threshold = judge, threshold
        self.writing = {"top_p": 0.9} if writing is None else dict(writing)
        self._claim_folder()

    def pretrained(self) -> nn.Module:
        """Learns from everything, noise included: also what the final model is to be compared with."""
        return self._trained("pretrained", PRETRAIN, self._mixed(self._web()), self.pretrain)

    def captioner(self) -> nn.Module:
        """The pre-trained model, fine-tuned to write as the good captions do."""
        return self._trained("captioner", CAPTION, self.clean, self.finetune, start=self.pretrained)

    def filter(self) -> nn.Module:
        """The pre-trained model, fine-tuned to tell whether a good caption belongs to an image."""
        return self._trained("filter", FILTER, self.clean, self.finetune, start=self.pretrained)

    def synthetic(self) -> list[str]:
        """One new caption for every noisy image."""
        return [line["caption"] for line in self._kept("synthetic.jsonl", self._write)]

    def table(self) -> list[dict[str, Any]]:
        """Every caption of every noisy image: `row`, `source` (web or synthetic), `caption`, `score`, `kept`."""
        return self._kept("captions.jsonl", self._judge)

    def final(self, sources: Sequence[str] = ("web", "synthetic"), filtered: bool = True) -> nn.Module:
        """A new model, trained from scratch on what was kept and on the good captions.

        For comparison (the paper's ablation): captions of one source alone, or all of them, good or bad.
        """
        texts: dict[int, list[str]] = {}
        for line in self.table():
            wanted = line["source"] in sources and (line["kept"] or not filtered)
            if wanted and line["caption"] and line["caption"] not in texts.setdefault(line["row"], []):
                texts[line["row"]].append(line["caption"])
        whole = filtered and len(sources) == 2
        name = "final" if whole else "-".join(["final", *sources, *([] if filtered else ["unfiltered"])])
        return self._trained(name, PRETRAIN, self._mixed(texts), self.pretrain)

    def _web(self) -> dict[int, list[str]]:
        return {row: self.noisy.captions(row) for row in range(len(self.noisy))}

    def _mixed(self, texts: Mapping[int, Sequence[str]]) -> Recaptioned:
        return Recaptioned(self.noisy, texts, self.clean)

    def _trained(
        self,
        name: str,
        losses: tuple[str, ...],
        dataset: Any,
        settings: Settings,
        start: Callable[[], nn.Module] | None = None,
    ) -> nn.Module:
        """The model of this stage: read from the folder, or trained and kept there."""
        path = self.folder / name / "model.safetensors"
        first = None if start is None or path.exists() else weights(start())
        torch.manual_seed(self.seed)  # whatever ran before, or did not run again
        model = self.build(losses)
        if path.exists():
            set_weights(model, load_tensors(path)[0], str(path))
            return model.to(self.more.get("device") or best_device()).eval()
        if first is not None:
            set_weights(model, first, "the pre-trained model")
        false = losses == FILTER and hasattr(dataset, "wrong_caption")  # scenes can also say what is nearly right
        size, longest = model.config.image.image_size, model.config.text.context_length
        more = dict(seed=self.seed, max_tokens=longest, wrong_captions=false)
        loader = Loader(dataset, self.tokenizer, self.batch_size, size, **more)
        history = fit(model, loader.batch, settings, run_dir=path.parent, **self.more)
        if history.interrupted:
            raise KeyboardInterrupt(f"{name} was stopped; run again to go on")
        save_model(model, path)
        return model

    def _write(self) -> list[dict[str, Any]]:
        model, lines = self.captioner(), []
        draw = torch.Generator(_device(model)).manual_seed(self.seed)
        for rows in self._chunks():
            ids = model.generate(self._images(model, rows), generator=draw, **self.writing)
            texts = self.tokenizer.batch_decode(ids.tolist(), skip_special_tokens=True)
            lines += [{"row": row, "caption": text.strip()} for row, text in zip(rows, texts, strict=True)]
        return lines

    def _judge(self) -> list[dict[str, Any]]:
        synthetic = self.synthetic()
        lines = [
            {"row": row, "source": source, "caption": text}
            for row in range(len(self.noisy))
            for source, texts in (("web", self.noisy.captions(row)), ("synthetic", [synthetic[row]]))
            for text in texts
        ]
        verdicts = []
        for line, score in zip(lines, self.scores(lines, self.judge), strict=True):
            kept = score >= self.threshold and bool(line["caption"])
            verdicts.append({**line, "score": round(score, 6), "kept": kept})
        return verdicts

    def scores(self, lines: Sequence[Mapping[str, Any]], judge: Callable[..., Tensor]) -> list[float]:
        """What a judge, with the filter, makes of captions: `lines` as in `table`, in the order of their rows."""
        model, found = self.filter(), []
        longest = model.config.text.context_length
        for rows in self._chunks():
            some = [line for line in lines if line["row"] in rows]
            if not some:
                continue
            ids, mask = encode(self.tokenizer, [line["caption"] for line in some], longest)
            which = torch.tensor([line["row"] - rows[0] for line in some])
            asked = (x.to(_device(model)) for x in (which, ids, mask))
            with torch.no_grad():
                found += judge(model, self._images(model, rows), *asked).float().tolist()
        return found

    def _chunks(self, size: int = 200) -> list[range]:
        """The rows of the noisy images, some at a time."""
        rows = range(len(self.noisy))
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _images(self, model: nn.Module, rows: Sequence[int]) -> Tensor:
        return to_tensor(self.noisy.pixels(list(rows), model.config.image.image_size)).to(_device(model))

    def _kept(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The lines of a file in the folder, made and written (whole or not at all) if they are not there."""
        path = self.folder / name
        if not path.exists():
            lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in make())
            _write_whole(path, lines)
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def _claim_folder(self) -> None:
        """Note what this run is made with, or see that a run which is there was made with the same."""
        own = {
            "pretrain": dataclasses.asdict(self.pretrain),
            "finetune": dataclasses.asdict(self.finetune),
            "batch_size": self.batch_size,
            "judge": f"{self.judge.__name__} >= {self.threshold}",
            "writing": self.writing,
            "seed": self.seed,
            "data": [len(self.noisy), len(self.clean)],
        }
        path = self.folder / "settings.json"
        if not path.exists():
            _write_whole(path, json.dumps(own, indent=1))
        there = json.loads(path.read_text(encoding="utf-8"))
        if there != own:
            other = ", ".join(name for name in own if there.get(name) != own[name])
            raise CheckpointError(f"{self.folder} holds a run with other settings ({other}): choose another folder")


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _write_whole(path: Path, text: str) -> None:
    """Beside first, then renamed: a kill leaves no half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
