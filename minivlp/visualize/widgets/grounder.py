"""From words to a box, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import traitlets as T

from minivlp.data.batch import Box, Region
from minivlp.data.pictures import Picture
from minivlp.inference import evaluating, share_image_encoding, tokenize_for
from minivlp.visualize.widgets.base import Widget, show_errors, source
from minivlp.visualize.widgets.pictures import data_url, pixels_of, png, rgb


class Grounder(Widget):
    """From words to a box, and from a box to words.

    Type a phrase: the model's box is drawn with its confidence. Drag a box (or make one with the arrow keys): the
    phrases that fit it are listed.

    Args:
        image: any picture: PIL, path, array (see `minivlp.data.pictures.to_rgb`).
        ground: phrase -> (box, confidence); the confidence may be None.
        describe: box -> [(text, score), …], best first. Without it the browser ranks the known phrases by how much the
            model's box for them overlaps the drawn one.
        phrases: grounded at once, so that they are answered without delay and also without a kernel; or their answers.
        meaning: what the confidence is the probability of.
    """

    _esm = source("grounder")
    image = T.Unicode().tag(sync=True)
    known = T.Dict(help="phrase -> [cx, cy, w, h, confidence or None]").tag(sync=True)
    phrases = T.List(help="the known ones in their order, which a notebook file does not keep in a dict").tag(sync=True)
    asks = T.Bool(help="the kernel answers phrases").tag(sync=True)
    describes = T.Bool(help="the kernel describes boxes").tag(sync=True)
    question = T.Dict(help="from the browser: a phrase or a box").tag(sync=True)
    answer = T.Dict(help="phrase, box, confidence; or phrase, problem").tag(sync=True)
    meaning = T.Unicode().tag(sync=True)
    drawn = T.List(help="the reader's box").tag(sync=True)
    found = T.Dict(help="box, items [[text, score], …]; or box, problem").tag(sync=True)

    def __init__(
        self,
        image: Picture,
        ground: Callable[[str], tuple[Box, float | None]] | None = None,
        describe: Callable[[Box], Sequence[tuple[str, float]]] | None = None,
        phrases: Iterable[str] | Mapping[str, tuple[Box, float | None]] = (),
        meaning: str = "phrase and image belong together",
    ) -> None:
        if not isinstance(phrases, Mapping):
            if ground is None:
                raise ValueError("phrases without a `ground` function: give a dict phrase -> (box, confidence) instead")
            phrases = {phrase: ground(phrase) for phrase in phrases}
        self.ground, self.describe, self.pixels = ground, describe, rgb(image)
        known = {phrase: packed(*answer) for phrase, answer in phrases.items()}
        super().__init__(
            image=data_url(self.pixels),
            known=known,
            phrases=list(known),
            asks=ground is not None,
            describes=describe is not None,
            meaning=meaning,
        )
        if known:
            self.ask(next(iter(known)))
        self.observe(self._on_question, "question")

    @classmethod
    def of(cls, model: torch.nn.Module, image: Picture, tokenizer: Any, phrases: Sequence[str]) -> Grounder:
        """Ground with `model.ground`. The confidence is the matching probability of the phrase and that box
        (`match_regions`) or the image (`match`), if the model was trained to match.

        A drawn box is described by the phrases whose vectors are nearest to the region's (`embed_regions`), where the
        model can embed regions. Raises TypeError for a model without `ground`.
        """
        if not hasattr(model, "ground"):
            raise TypeError(f"{type(model).__name__} cannot predict boxes: it has no `ground`. X-VLM has.")
        pixels = pixels_of(model, [image])
        phrases = list(dict.fromkeys(phrases))
        # a matching head that no loss has trained returns a number all the same
        matches = hasattr(model, "match") and "itm" in getattr(model.config, "losses", ("itm",))
        matches_regions = hasattr(model, "match_regions")

        def ground_all(texts: list[str]) -> dict[str, tuple[Box, float | None]]:
            if not texts:
                return {}
            with evaluating(model):
                text = tokenize_for(model, tokenizer, texts)
                rows = torch.zeros(len(texts), dtype=torch.long, device=pixels.device)
                boxes = share_image_encoding(model, "ground", pixels, rows, text)  # (R, 4)
                confidences = [None] * len(texts)
                if matches and matches_regions:
                    confidences = model.match_regions(pixels, boxes, rows, text).tolist()
                elif matches:
                    confidences = share_image_encoding(model, "match", pixels, rows, text).tolist()
            answers = zip(texts, boxes.tolist(), confidences, strict=True)
            return {phrase: (box, confidence) for phrase, box, confidence in answers}

        def describe(box: Box) -> list[tuple[str, float]]:
            with evaluating(model):
                where = torch.tensor([box], device=pixels.device)
                region = model.embed_regions(pixels, where, torch.zeros(1, dtype=torch.long, device=pixels.device))
                scores = (region @ model.embed_texts(tokenize_for(model, tokenizer, phrases)).T)[0].tolist()
            return sorted(zip(phrases, scores, strict=True), key=lambda pair: -pair[1])

        can_describe = hasattr(model, "embed_regions") and len(phrases) > 0
        known = ground_all(phrases)
        meaning = {"meaning": "the phrase says what is in it"} if matches_regions else {}
        return cls(image, lambda text: ground_all([text])[text], describe if can_describe else None, known, **meaning)

    def ask(self, phrase: str) -> dict[str, Any]:
        """Ask for a phrase, as typing it does; returns what is then shown. Raises KeyError for an unknown phrase where
        there is no `ground` function."""
        if phrase in self.known:
            *box, confidence = self.known[phrase]
        elif self.ground is None:
            raise KeyError(f"{phrase!r} is not among the known phrases, and there is no `ground` function to ask")
        else:
            *box, confidence = packed(*self.ground(phrase))
        self.answer = {"phrase": phrase, "box": box, "confidence": confidence}
        return self.answer

    def describe_box(self, box: Box) -> dict[str, Any]:
        """Describe a box, as drawing it does; returns what is then shown. Raises TypeError without `describe`."""
        if self.describe is None:
            raise TypeError("this Grounder has no `describe` function; the browser compares the box with known phrases")
        box = tuple(float(x) for x in box)
        items = [[str(text), float(score)] for text, score in list(self.describe(box))[:6]]
        self.drawn, self.found = list(box), {"box": list(box), "items": items}
        return self.found

    def _on_question(self, change: Any) -> None:
        question = change["new"]
        if "phrase" in question:
            with show_errors(self, "answer", question):
                self.ask(question["phrase"])
        elif "box" in question:
            with show_errors(self, "found", question):
                self.describe_box(question["box"])

    def __repr__(self) -> str:
        return f"Grounder({len(self.known)} phrases)"

    def _worth_drawing(self, at_most: int = 3) -> list[tuple[str, Box, float | None]]:
        """Phrase, box and confidence of a few known phrases for the still picture.

        Those that the model believes to fit, one for each place, so that neither boxes nor tags overlap. The first
        phrase if none fits.
        """
        answers = [(phrase, tuple(box), fit) for phrase, (*box, fit) in self.known.items()]
        chosen: list[tuple[str, Box, float | None]] = []
        for phrase, box, fit in answers:
            if (fit is None or fit >= 0.5) and all(apart(box, other) for _, other, _ in chosen):
                chosen.append((phrase, box, fit))
        return chosen[:at_most] or answers[:1]

    def to_png(self) -> bytes:
        from matplotlib.figure import Figure

        from minivlp.visualize.drawing import draw_boxes, style

        with style():
            figure = Figure(figsize=(4, 4 * self.pixels.height / self.pixels.width), layout="constrained")
            regions = [
                Region(box, phrase if fit is None else f"{phrase} {fit:.0%}")
                for phrase, box, fit in self._worth_drawing()
            ]
            draw_boxes(figure.add_subplot(), np.asarray(self.pixels), regions)
            return png(figure)


def apart(one: Box, other: Box) -> bool:
    """Whether neither box holds the center of the other."""
    return any(abs(one[k] - other[k]) > max(one[k + 2], other[k + 2]) / 2 for k in (0, 1))


def packed(box: Box, confidence: float | None) -> list[float | None]:
    """cx, cy, w, h and confidence as plain numbers. Raises ValueError unless the box has four finite ones."""
    numbers = [float(x) for x in box]
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"a box is four numbers cx, cy, w, h between 0 and 1, not {box!r}")
    return [*numbers, None if confidence is None else float(confidence)]
