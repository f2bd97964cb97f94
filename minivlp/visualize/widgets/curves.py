"""Training curves that grow while a cell runs."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import traitlets as T

from minivlp.visualize.widgets.base import Widget, source
from minivlp.visualize.widgets.pictures import png

POINTS = 400  # of a curve that are sent to the browser; more cannot be told apart there


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
            point = (float(step), float(value))  # made before it is added: the stop button may interrupt at any line
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
            with self._listening():
                yield self
        except KeyboardInterrupt:
            self.interrupted = True
        finally:
            self.state = "stopped" if self.interrupted else "done"
            self.flush()
            if self._output is not None:
                data, metadata = self._repr_mimebundle_()
                self._output.update(data, metadata=metadata, raw=True)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Notice the stop button also where what runs inside takes the KeyboardInterrupt for itself, as `fit` does."""
        before = signal.getsignal(signal.SIGINT)
        if not callable(before) or threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            self.interrupted = True
            before(number, frame)

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

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
                axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
                axes.grid(axis="y")
            else:
                axes.text(0.5, 0.5, "no step is logged yet", ha="center", transform=axes.transAxes)
            return png(figure)


def thinned(points: list[tuple[float, float]]) -> list[list[float | None]]:
    """About POINTS points of a curve as [steps, values], always with the last one and each that begins a gap.

    JSON knows no NaN: None stands for it.
    """
    stride = math.ceil(len(points) / POINTS) or 1
    last, fine = len(points) - 1, [math.isfinite(value) for _, value in points]
    gaps = {i for i in range(len(points)) if not fine[i] and (i == 0 or fine[i - 1])}
    kept = sorted(gaps | set(range(last, -1, -stride)))
    return [[points[i][0] for i in kept], [points[i][1] if fine[i] else None for i in kept]]
