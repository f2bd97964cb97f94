"""Widgets for JupyterLab, Notebook, VS Code and Colab: look where a word looks, ask for a box, watch training, search.

Each is an anywidget: hand-written JavaScript in `static/`, nothing to build and nothing fetched from the network. What
a widget shows travels to the browser once; sliders and clicks are answered there, so they also work while the kernel is
busy and, in a static page (`minivlp.visualize.page.save_page`), without any kernel. Beside each widget a still picture
is stored in the notebook, for places that run no JavaScript.
"""

from __future__ import annotations

import base64
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import torch
import traitlets as T
from PIL import Image, ImageOps

from minivlp.data.batch import Box, Region, to_tensor
from minivlp.data.text import encode, words
from minivlp.layers.attention import record_attention
from minivlp.visualize.attention import word_patch_similarity

STATIC = Path(__file__).parent / "static"
POINTS = 400  # of a curve that are sent to the browser; more cannot be told apart there

Picture = Image.Image | np.ndarray


def source(name: str) -> str:
    """The JavaScript of one widget: the shared part, then its own."""
    return "\n".join((STATIC / file).read_text(encoding="utf-8") for file in ("common.js", f"{name}.js"))


class Widget(anywidget.AnyWidget):
    """What our four widgets share: one style sheet, a short name in text, a still picture beside the live view."""

    _css = (STATIC / "widgets.css").read_text(encoding="utf-8")

    def to_png(self) -> bytes:
        """The still picture, as the bytes of a PNG."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        live = super()._repr_mimebundle_(**kwargs)
        data, metadata = live if isinstance(live, tuple) else (live, {})
        still = base64.b64encode(self.to_png()).decode("ascii")
        return {**data, "text/plain": repr(self), "image/png": still}, metadata


class AttentionViewer(Widget):
    """Which patches does a word look at, and which words look at a patch?

    Point at a word or click it: a heat-map falls on the image. Click a patch: bars fill the words that look there.
    Layer, head and temperature are chosen in the widget.

    Args:
        image: any PIL image, or uint8 pixels (H, W, 3) or (H, W).
        words: L of them, as they are to be shown.
        attention: (layers, heads, L, P), not negative, patches row by row; a class token must have been left out.
        grid: rows and columns of patches.
        boxes: what is known to be where, as `Region`s or pairs (name, box): drawn with the words that name them.

    Raises ValueError when the numbers do not fit each other, or are negative or not finite.
    """

    _esm = source("attention")
    image = T.Unicode().tag(sync=True)
    words = T.List(T.Unicode()).tag(sync=True)
    attention = T.Bytes().tag(sync=True)
    shape = T.List(T.Int()).tag(sync=True)
    grid = T.List(T.Int()).tag(sync=True)
    boxes = T.List().tag(sync=True)
    layer = T.Int().tag(sync=True)
    head = T.Int(-1, help="-1 is the mean of all heads").tag(sync=True)
    temperature = T.Float(1.0).tag(sync=True)
    word = T.Int(-1).tag(sync=True)
    patch = T.Int(-1).tag(sync=True)

    def __init__(
        self,
        image: Picture,
        words: Sequence[str],
        attention: np.ndarray | torch.Tensor,
        grid: tuple[int, int],
        boxes: Iterable[Region | tuple[str, Box]] = (),
    ) -> None:
        if isinstance(attention, torch.Tensor):
            attention = attention.detach().float().cpu().numpy()
        weights = np.ascontiguousarray(attention, dtype=np.float32)  # (layers, heads, L, P)
        rows, columns = grid
        if weights.ndim != 4 or weights.shape[2:] != (len(words), rows * columns):
            raise ValueError(
                f"attention has shape {weights.shape}; {len(words)} words and a grid of {rows} x {columns} ask for "
                f"(layers, heads, {len(words)}, {rows * columns}). Leave the class token out."
            )
        if weights.size == 0 or not np.isfinite(weights).all() or weights.min() < 0:
            raise ValueError("attention must hold finite numbers that are not negative, and at least one of them")
        self.weights, self.pixels = weights, rgb(image)
        super().__init__(
            image=data_url(self.pixels),
            words=list(words),
            attention=weights.tobytes(),
            shape=list(weights.shape),
            grid=[rows, columns],
            boxes=[[name, list(map(float, box))] for name, box in map(name_and_box, boxes or ())],
            layer=len(weights) - 1,
            word=int(self.shares().max(axis=1).argmax()),  # begin with the word that looks at one place most
        )

    @classmethod
    def of(
        cls,
        model: torch.nn.Module,
        image: Picture,
        caption: str,
        tokenizer: Any,
        boxes: Iterable[Region | tuple[str, Box]] = (),
    ) -> AttentionViewer:
        """Run `model` on an image and a caption and show how its words look at the patches.

        Models with cross-attention show that of all layers and heads. A model whose words and patches never meet (CLIP)
        shows the cosine of each word's vector with each patch's in the joint space, as a softmax over the patches with
        temperature 0.07: no attention, but the nearest thing to it. Words of several pieces show the mean of their
        pieces. Raises TypeError when the model has neither.
        """
        images, (ids, mask) = pixels_of(model, [image]), texts_of(model, tokenizer, [caption])
        with looking(model), record_attention(model) as maps:
            verb = next((getattr(model, name) for name in ("match", "ground", "fill") if hasattr(model, name)), None)
            if verb is not None:
                verb(images, ids, mask)
            names = sorted((n for n in maps if n.endswith(".cross")), key=lambda n: int(n.split(".")[1]))
            if names:
                weights = torch.stack([maps[name][0] for name in names])[..., 1:]  # (layers, H, L, P): no class token
            else:
                near = word_patch_similarity(model, images, ids, mask)  # (1, L, P)
                weights = (near / 0.07).softmax(dim=-1)[None]  # (1, 1, L, P)
        found = words(tokenizer, ids[0])
        if not found:
            raise ValueError(f"the caption {caption!r} has no words")
        weights = torch.stack([weights[:, :, pieces].mean(dim=2) for _, pieces in found], dim=2)
        side = math.isqrt(weights.shape[-1])
        return cls(image, [word for word, _ in found], weights, (side, side), boxes)

    def shares(self) -> np.ndarray:
        """(L, P): the chosen layer and head (or the mean of the heads), each word's weights summing to one."""
        layer = self.weights[self.layer if self.shape else -1]
        chosen = layer.mean(axis=0) if self.head < 0 else layer[self.head]
        return chosen / np.maximum(chosen.sum(axis=1, keepdims=True), 1e-12)

    def __repr__(self) -> str:
        layers, heads, words, _ = self.shape
        rows, columns = self.grid
        return f"AttentionViewer(words={words}, grid={rows}x{columns}, layers={layers}, heads={heads})"

    def to_png(self) -> bytes:
        from minivlp.visualize.drawing import attention_figure

        maps = self.shares().reshape(-1, *self.grid)  # (L, rows, columns)
        return png(attention_figure(np.asarray(self.pixels), self.words, maps))


class Grounder(Widget):
    """From words to a box, and from a box to words.

    Type a phrase: the model's box is drawn with its confidence. Drag a box (or make one with the arrow keys): the
    phrases that fit it are listed.

    Args:
        image: any PIL image or uint8 pixels.
        ground: phrase -> (box, confidence); the confidence may be None.
        describe: box -> [(text, score), …], best first. Without it the browser ranks the known phrases by how much the
            model's box for them overlaps the drawn one.
        phrases: those that are asked now, so that they are answered at once and also without a kernel.
    """

    _esm = source("grounder")
    image = T.Unicode().tag(sync=True)
    known = T.Dict(help="phrase -> [cx, cy, w, h, confidence or None]").tag(sync=True)
    phrases = T.List(help="the known ones in their order, which a notebook file does not keep in a dict").tag(sync=True)
    asks = T.Bool(help="the kernel answers phrases").tag(sync=True)
    describes = T.Bool(help="the kernel describes boxes").tag(sync=True)
    question = T.Dict(help="from the browser: a phrase or a box").tag(sync=True)
    answer = T.Dict(help="phrase, box, confidence; or phrase, problem").tag(sync=True)
    drawn = T.List(help="the reader's box").tag(sync=True)
    found = T.Dict(help="box, items [[text, score], …]; or box, problem").tag(sync=True)

    def __init__(
        self,
        image: Picture,
        ground: Callable[[str], tuple[Box, float | None]] | None = None,
        describe: Callable[[Box], Sequence[tuple[str, float]]] | None = None,
        phrases: Iterable[str] | Mapping[str, tuple[Box, float | None]] = (),
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
        )
        if known:
            self.ask(next(iter(known)))
        self.observe(self._on_question, "question")

    @classmethod
    def of(cls, model: torch.nn.Module, image: Picture, tokenizer: Any, phrases: Sequence[str]) -> Grounder:
        """Ground with `model.ground`; the confidence is `model.match` of phrase and image, where the model has it.

        A drawn box is described by the phrases whose vectors are nearest to the region's (`embed_regions`), where the
        model can embed regions. Raises TypeError when the model has no `ground`.
        """
        if not hasattr(model, "ground"):
            raise TypeError(f"{type(model).__name__} cannot predict boxes: it has no `ground`. X-VLM has.")
        pixels = pixels_of(model, [image])
        phrases = list(dict.fromkeys(phrases))

        def ground_all(texts: list[str]) -> dict[str, tuple[Box, float | None]]:
            if not texts:
                return {}
            with looking(model):
                ids, mask = texts_of(model, tokenizer, texts)
                images = pixels.expand(len(texts), -1, -1, -1)
                boxes = model.ground(images, ids, mask).tolist()
                fits = model.match(images, ids, mask).tolist() if hasattr(model, "match") else [None] * len(texts)
            return {text: (box, fit) for text, box, fit in zip(texts, boxes, fits, strict=True)}

        def describe(box: Box) -> list[tuple[str, float]]:
            with looking(model):
                where = torch.tensor([box], device=pixels.device)
                region = model.embed_regions(pixels, where, torch.zeros(1, dtype=torch.long, device=pixels.device))
                scores = (region @ model.embed_texts(*texts_of(model, tokenizer, phrases)).T)[0].tolist()
            return sorted(zip(phrases, scores, strict=True), key=lambda pair: -pair[1])

        can_describe = hasattr(model, "embed_regions") and len(phrases) > 0
        known = ground_all(phrases)
        return cls(image, lambda text: ground_all([text])[text], describe if can_describe else None, known)

    def ask(self, phrase: str) -> dict[str, Any]:
        """Ask for a phrase, as typing it does; returns what is then shown."""
        if phrase in self.known:
            *box, confidence = self.known[phrase]
        elif self.ground is None:
            raise KeyError(f"{phrase!r} is not among the known phrases, and there is no `ground` function to ask")
        else:
            *box, confidence = packed(*self.ground(phrase))
        self.answer = {"phrase": phrase, "box": box, "confidence": confidence}
        return self.answer

    def look_at(self, box: Box) -> dict[str, Any]:
        """Describe a box, as drawing it does; returns what is then shown. Needs a `describe` function."""
        if self.describe is None:
            raise TypeError("this Grounder has no `describe` function; the browser compares the box with known phrases")
        box = tuple(float(x) for x in box)
        items = [[str(text), float(score)] for text, score in list(self.describe(box))[:6]]
        self.drawn, self.found = list(box), {"box": list(box), "items": items}
        return self.found

    def _on_question(self, change: Any) -> None:
        question = change["new"]
        if "phrase" in question:
            with told(self, "answer", question):
                self.ask(question["phrase"])
        elif "box" in question:
            with told(self, "found", question):
                self.look_at(question["box"])

    def __repr__(self) -> str:
        return f"Grounder({len(self.known)} phrases)"

    def to_png(self) -> bytes:
        from matplotlib.figure import Figure

        from minivlp.visualize.drawing import draw_boxes, style

        with style():
            figure = Figure(figsize=(4, 4 * self.pixels.height / self.pixels.width), layout="constrained")
            regions = [
                Region(tuple(box), phrase if fit is None else f"{phrase} {fit:.0%}")
                for phrase, (*box, fit) in list(self.known.items())[:6]
            ]
            draw_boxes(figure.add_subplot(), np.asarray(self.pixels), regions)
            return png(figure)


class LiveCurves(Widget):
    """Curves that grow while a cell trains:

        curves = LiveCurves()
        display(curves)
        with curves.guard():                 # the stop button ends this block and keeps the history
            for step in range(1000):
                curves.log(step, loss=...)

    `history` maps each name to its points (step, value); `interrupted` says whether the stop button was pressed. With
    our training loop: `with curves.guard(): fit(..., on_step=[curves.log_row])`. At the end of the block the still
    picture in the notebook is renewed; without `guard` it stays as it was when the widget was displayed.
    """

    _esm = source("curves")
    series = T.List(help="[name, steps, values] each, thinned out; None where a value was not a number").tag(sync=True)
    log_axis = T.Bool(False).tag(sync=True)
    smooth = T.Float(0.0, help="width of the running mean, as a share of the run").tag(sync=True)
    state = T.Unicode("", help="'', running, done or stopped").tag(sync=True)

    def __init__(self, every: float = 0.2) -> None:
        """`every`: seconds between two messages to the browser, however often `log` is called."""
        super().__init__()
        self.history: dict[str, list[tuple[float, float]]] = {}
        self.interrupted = False
        self._every, self._sent = every, -math.inf
        self._output: Any = None  # where it is displayed, once it is

    def log(self, step: float, **values: float) -> None:
        """Add one point to each named curve. Values may be numbers or tensors with one element."""
        for name, value in values.items():
            point = (float(step), float(value))  # whole before it is added: the stop button may strike at any line
            self.history.setdefault(name, []).append(point)
        if time.monotonic() - self._sent > self._every:
            self.flush()

    def log_row(self, row: Mapping[str, float]) -> None:
        """`log` for the rows of `minivlp.training.loop.fit`: the losses; not the clock, not the gradient's norm.

        A loss of one term alone is drawn once.
        """
        terms = {name: row[name] for name in row if name not in ("step", "seconds", "gradient", "loss")}
        self.log(row["step"], loss=row["loss"], **(terms if len(terms) > 1 else {}))

    def flush(self) -> None:
        """Send what is there now."""
        self._sent = time.monotonic()
        self.series = [[name, *thinned(points)] for name, points in self.history.items()]

    @contextmanager
    def guard(self) -> Iterator[LiveCurves]:
        """Let the stop button (KeyboardInterrupt) end the block quietly: the history stays, the next cells can run."""
        self.interrupted, self.state = False, "running"
        try:
            yield self
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            self.state = "stopped" if self.interrupted else "done"
            self.flush()
            if self._output is not None:
                data, metadata = self._repr_mimebundle_()
                self._output.update(data, metadata=metadata, raw=True)

    def _ipython_display_(self) -> None:
        """Shown before training, its picture is empty: remember the place, so that `guard` can put in the full one."""
        from IPython.display import display

        data, metadata = self._repr_mimebundle_()
        self._output = display(data, metadata=metadata, raw=True, display_id=True)

    def __repr__(self) -> str:
        return "LiveCurves()"  # the same before and after training

    def to_png(self) -> bytes:
        from matplotlib.figure import Figure

        from minivlp.visualize.drawing import PALETTE, style

        with style():
            figure = Figure(figsize=(6.4, 2.7), layout="constrained")
            axes = figure.add_subplot(xlabel="step", yscale="log" if self.log_axis and self.history else "linear")
            for i, (name, points) in enumerate(self.history.items()):
                look = {"linestyle": ("-", "--", ":", "-.")[i % 4], "color": PALETTE[i % len(PALETTE)]}
                axes.plot(*np.array(points).T, **look, marker="o" if len(points) < 2 else "", label=name)
            if self.history:
                axes.legend()
                axes.grid(axis="y")
            else:
                axes.text(0.5, 0.5, "no step is logged yet", ha="center", transform=axes.transAxes)
            return png(figure)


class RetrievalBrowser(Widget):
    """Search among images by captions, and among captions by images, with the model's own similarities.

    Args:
        images: n of them, PIL or uint8 pixels; shown at 96 pixels. About fifty is a good number.
        captions: one text per image, or a list of texts per image.
        similarity: (n, m), higher means closer; m counts all captions in order.
        score_text: optional, text -> n similarities, for words that the reader types.
    """

    _esm = source("retrieval")
    thumbs = T.List(T.Unicode()).tag(sync=True)
    captions = T.List(T.Unicode()).tag(sync=True)
    owner = T.List(T.Int(), help="which image a caption belongs to").tag(sync=True)
    similarity = T.Bytes().tag(sync=True)
    asks = T.Bool().tag(sync=True)
    caption = T.Int(-1).tag(sync=True)
    image = T.Int(-1).tag(sync=True)
    question = T.Dict().tag(sync=True)
    answer = T.Dict(help="text, scores; or text, problem").tag(sync=True)

    def __init__(
        self,
        images: Sequence[Picture],
        captions: Sequence[str] | Sequence[Sequence[str]],
        similarity: np.ndarray | torch.Tensor,
        score_text: Callable[[str], Sequence[float]] | None = None,
    ) -> None:
        if len(captions) != len(images):
            raise ValueError(f"{len(images)} images but captions for {len(captions)}: give one entry per image")
        of_image = [[texts] if isinstance(texts, str) else list(texts) for texts in captions]
        texts = [text for group in of_image for text in group]
        owner = [i for i, group in enumerate(of_image) for _ in group]
        if isinstance(similarity, torch.Tensor):
            similarity = similarity.detach().float().cpu().numpy()
        self.table = np.ascontiguousarray(similarity, dtype=np.float32)  # (n, m)
        if self.table.shape != (len(images), len(texts)) or not texts:
            raise ValueError(
                f"similarity has shape {self.table.shape}; {len(images)} images and {len(texts)} captions ask for "
                f"({len(images)}, {len(texts)}), at least one of each"
            )
        if not np.isfinite(self.table).all():
            raise ValueError("similarity holds numbers that are not finite")
        self.score_text = score_text
        self.small = [thumbnail(image) for image in images]
        super().__init__(
            thumbs=[data_url(small, "JPEG") for small in self.small],
            captions=texts,
            owner=owner,
            similarity=self.table.tobytes(),
            asks=score_text is not None,
        )
        self.observe(self._on_question, "question")

    @classmethod
    def of(
        cls, model: torch.nn.Module, images: Sequence[Picture], captions: Sequence[Any], tokenizer: Any
    ) -> RetrievalBrowser:
        """Use `model.similarity`, for the captions given and for any the reader types.

        Raises TypeError when the model has no `similarity` (ViLT has none).
        """
        if not hasattr(model, "similarity"):
            raise TypeError(f"{type(model).__name__} has no `similarity`: fill a table with `match` and pass that")
        texts = [text for group in captions for text in ([group] if isinstance(group, str) else group)]
        pixels = pixels_of(model, images)

        def score(some: Sequence[str]) -> torch.Tensor:
            with looking(model):
                return model.similarity(pixels, *texts_of(model, tokenizer, some)).float().cpu()  # (n, m)

        return cls(images, captions, score(texts), lambda text: score([text])[:, 0].tolist())

    def search(self, text: str) -> list[int]:
        """Rank the images for any words, as typing them does; returns their numbers, best first."""
        if self.score_text is None:
            raise TypeError("this RetrievalBrowser has no `score_text` function to ask")
        scores = [float(score) for score in self.score_text(text)]
        self.caption = self.image = -1
        self.answer = {"text": text, "scores": scores}
        return list(map(int, np.argsort(scores)[::-1]))

    def _on_question(self, change: Any) -> None:
        question = change["new"]
        if "text" in question:
            with told(self, "answer", question):
                self.search(question["text"])

    def __repr__(self) -> str:
        return f"RetrievalBrowser({len(self.thumbs)} images, {len(self.captions)} captions)"

    def to_png(self) -> bytes:
        from minivlp.visualize.drawing import retrieval_grid

        some = np.unique(np.linspace(0, len(self.captions) - 1, 4).astype(int))
        images = [np.asarray(small) for small in self.small]
        right = [self.owner[i] for i in some]
        return png(retrieval_grid([self.captions[i] for i in some], images, self.table[:, some], right, top=6))


# What a model needs, by its verbs.


@contextmanager
def looking(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every part is as it was."""
    training = {part: part.training for part in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, was in training.items():
            part.training = was


def device_of(model: torch.nn.Module) -> torch.device:
    """Where the model's weights lie."""
    return next((weight.device for weight in model.parameters()), torch.device("cpu"))


def pixels_of(model: torch.nn.Module, images: Sequence[Picture]) -> torch.Tensor:
    """Images as the model reads them, squashed to its square: (B, 3, size, size)."""
    size = (model.config.image.image_size,) * 2
    squashed = [np.asarray(rgb(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
    return to_tensor(np.stack(squashed)).to(device_of(model))


def texts_of(model: torch.nn.Module, tokenizer: Any, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, (B, L) each, on the model's device."""
    ids, mask = encode(tokenizer, list(texts), model.config.text.context_length)
    return ids.to(device_of(model)), mask.to(device_of(model))


# Small things.


@contextmanager
def told(widget: Widget, trait: str, question: dict[str, Any]) -> Iterator[None]:
    """Show an error in the widget: a callback has no cell whose output it could appear in."""
    try:
        yield
    except Exception as error:
        setattr(widget, trait, {**question, "problem": f"{type(error).__name__}: {error}"})


def name_and_box(what: Region | tuple[str, Box]) -> tuple[str, Box]:
    return (what.phrase, what.box) if isinstance(what, Region) else what


def packed(box: Box, confidence: float | None) -> list[float | None]:
    """cx, cy, w, h and confidence as plain numbers. Raises ValueError unless the box has four finite ones."""
    numbers = [float(x) for x in box]
    if len(numbers) != 4 or not all(map(math.isfinite, numbers)):
        raise ValueError(f"a box is four numbers cx, cy, w, h between 0 and 1, not {box!r}")
    return [*numbers, None if confidence is None else float(confidence)]


def thinned(points: list[tuple[float, float]]) -> list[list[float | None]]:
    """About POINTS points of a curve as [steps, values], always with the last one and each that begins a gap.

    JSON knows no NaN: None stands for it.
    """
    stride = math.ceil(len(points) / POINTS) or 1
    last, fine = len(points) - 1, [math.isfinite(value) for _, value in points]
    gaps = {i for i in range(len(points)) if not fine[i] and (i == 0 or fine[i - 1])}
    kept = sorted(gaps | set(range(last, -1, -stride)))
    return [[points[i][0] for i in kept], [points[i][1] if fine[i] else None for i in kept]]


def rgb(image: Picture, longest: int = 512) -> Image.Image:
    """Any PIL image, or uint8 pixels (H, W, 3) or (H, W), as RGB of at most `longest` pixels a side."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
            raise ValueError(f"an image is uint8 (H, W, 3) or (H, W), not {image.dtype} {image.shape}")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"an image is a PIL image or a uint8 array, not {type(image).__name__}")
    image = ImageOps.exif_transpose(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):  # on white, not on whatever lies beneath
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((longest, longest))
    return image


def thumbnail(image: Picture) -> Image.Image:
    return rgb(image, longest=96)


def data_url(image: Image.Image, kind: str | None = None) -> str:
    """The picture as what a browser's <img> takes without a request; by default small ones are PNG, photos JPEG."""
    kind = kind or ("PNG" if max(image.size) <= 160 else "JPEG")
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 88, "subsampling": 0} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def png(figure: Any) -> bytes:
    """A matplotlib figure as a small PNG: 256 colours, less than half of the bytes."""
    file, small = io.BytesIO(), io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    Image.open(file).quantize(256, method=Image.Quantize.FASTOCTREE).save(small, "PNG", optimize=True)
    return small.getvalue()
