"""Widgets for JupyterLab, Notebook, VS Code and Colab: attention maps, grounding, training curves, search, and the
decisions of a caption filter.

Each is an anywidget: hand-written JavaScript in `static/`, nothing to build and nothing fetched from the network. The
data is sent to the browser once; sliders and clicks are answered there, so they also work while the kernel is busy and,
in a static page (`minivlp.visualize.page.save_page`), without any kernel. A still picture of each widget is stored in
the notebook, for places that run no JavaScript.
"""

from minivlp.visualize.widgets.attention import AttentionViewer
from minivlp.visualize.widgets.base import STATIC, Widget
from minivlp.visualize.widgets.board import FilterBoard
from minivlp.visualize.widgets.curves import LiveCurves
from minivlp.visualize.widgets.grounder import Grounder
from minivlp.visualize.widgets.pictures import rgb
from minivlp.visualize.widgets.retrieval import RetrievalBrowser

__all__ = ["STATIC", "AttentionViewer", "FilterBoard", "Grounder", "LiveCurves", "RetrievalBrowser", "Widget", "rgb"]
