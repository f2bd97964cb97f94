"""Which captions does a filter keep?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import traitlets as T

from minivlp.data.pictures import Picture
from minivlp.visualize.widgets.base import STATIC, Widget, source
from minivlp.visualize.widgets.pictures import data_url, png, thumbnail

Line = Mapping[str, Any]
TRUE = ("clean", "true")


class FilterBoard(Widget):
    """Pictures with the caption from the web and the new one, each with its score, the filter's verdict and the truth.

    The threshold is a slider: verdicts, and how many of the kept are true, follow at once. Pictures can be sorted by
    score or by mistake, and filtered by kind of caption and by verdict.

    Args:
        images: n pictures: PIL, paths, arrays; shown at 96 pixels. About fifty is a good number.
        web, synthetic: one line each per image, dicts with `caption`, `score`, and perhaps `truth`: "clean" or "true"
            for a caption that is true, another word for what is wrong with it. Without `synthetic` there are only web
            captions.
        threshold: a caption that scores this much is kept.

    Raises ValueError where the numbers do not fit or a score is not finite.
    """

    _esm = source("board")
    _css = Widget._css + (STATIC / "board.css").read_text(encoding="utf-8")
    thumbs = T.List(T.Unicode()).tag(sync=True)
    rows = T.List(help="{web: {caption, score, truth, holds, more}, synthetic: the same or None}").tag(sync=True)
    kinds = T.List(T.Unicode(), help="of the web captions").tag(sync=True)
    first = T.Float(help="the threshold to begin with").tag(sync=True)
    threshold = T.Float().tag(sync=True)
    kind = T.Unicode("", help="show these web captions only").tag(sync=True)
    verdict = T.Unicode("", help="'', 10, 01, 11, 00 (web and new: kept or not), kept, out or mistake").tag(sync=True)
    order = T.Unicode("", help="'' as in the data, web, synthetic, gain or mistake").tag(sync=True)

    def __init__(
        self,
        images: Sequence[Picture],
        web: Sequence[Line],
        synthetic: Sequence[Line] | None = None,
        threshold: float = 0.5,
    ) -> None:
        new = [None] * len(images) if synthetic is None else synthetic
        if not len(images) == len(web) == len(new) or not len(images):
            raise ValueError(f"{len(images)} images, {len(web)} web and {len(new)} new captions: give one of each")
        rows = [{"web": _line(a), "synthetic": b and _line(b)} for a, b in zip(web, new, strict=True)]
        kinds = list(dict.fromkeys(row["web"]["truth"] for row in rows if row["web"]["truth"]))
        self.small = [thumbnail(image) for image in images]
        super().__init__(
            thumbs=[data_url(small, "JPEG") for small in self.small],
            rows=rows,
            kinds=sorted(kinds, key=lambda kind: kind not in TRUE),  # the true ones first
            first=threshold,
            threshold=threshold,
        )

    @classmethod
    def of(
        cls,
        table: Sequence[Line],
        noisy: Any,
        is_true: Callable[[int, str], bool] | None = None,
        limit: int = 60,
        threshold: float = 0.5,
    ) -> FilterBoard:
        """The first `limit` images of `CapFilt.table()`, with the dataset `noisy` that it was made from.

        Of several captions of an image from the web the first is shown. What is wrong with it, `noisy.kind` tells, if
        it can (`NoisyCaptions`); whether a new caption is true of a row, `is_true`. Raises ValueError when the table's
        verdicts were made with another threshold.
        """
        if any(line["kept"] is not bool(line["caption"] and line["score"] >= threshold) for line in table):
            raise ValueError(f"These verdicts are not those of a threshold of {threshold}: pass the one of the table")
        web: dict[int, dict[str, Any]] = {}
        new: dict[int, dict[str, Any]] = {}
        for line in table:
            row = line["row"]
            if line["source"] == "synthetic":
                truth = is_true and ("true" if is_true(row, line["caption"]) else "false")
                new[row] = {**line, "truth": truth}
            elif row in web:
                web[row]["more"] += 1
            elif len(web) < limit:
                web[row] = {**line, "truth": noisy.kind(row) if hasattr(noisy, "kind") else None, "more": 0}
        images = [noisy[row].image for row in web]
        return cls(images, list(web.values()), [new.get(row) for row in web] if new else None, threshold)

    def __repr__(self) -> str:
        return f"FilterBoard({len(self.rows)} images, threshold={self.threshold:.2f})"

    def to_png(self) -> bytes:
        from minivlp.visualize.drawing.ink import WIDTH, new_figure, show_image, style, wrap

        some = np.unique(np.linspace(0, len(self.rows) - 1, 8).astype(int))
        lines = -(-len(some) // 4)
        with style():
            figure, axes = new_figure(lines, 4, WIDTH, lines * (WIDTH / 4 + 0.6))
            for ax in axes.flat:
                ax.axis("off")
            for ax, i in zip(axes.flat, some, strict=False):
                show_image(ax, np.asarray(self.small[i]))
                said = [line for line in self.rows[i].values() if line]
                ax.set_title("\n".join(wrap(self._label(line), 36) for line in said), y=-0.04, va="top", fontsize=8)
        return png(figure)

    def _label(self, line: Line) -> str:
        keep = bool(line["caption"]) and line["score"] >= self.threshold
        truth = f" ({line['truth']})" if line["truth"] else ""
        return f"{'✓' if keep else '✗'} {line['score']:.2f} {line['caption'] or '(nothing)'}{truth}"


def _line(line: Line) -> dict[str, Any]:
    """A line as the browser gets it. `holds`: whether the caption is true, None if nobody knows."""
    score, truth = float(line["score"]), line.get("truth")
    if not np.isfinite(score):
        raise ValueError(f"the score of {line['caption']!r} is not finite")
    holds = None if not truth else truth in TRUE
    more = {"truth": truth or "", "holds": holds, "more": line.get("more", 0)}
    return {"caption": str(line["caption"]), "score": score, **more}
