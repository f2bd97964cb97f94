"""Widgets for JupyterLab, Notebook, VS Code and Colab: see where a word looks, ask for a box, watch training, search,
judge a filter.

Each is an anywidget: hand-written JavaScript in `static/`, nothing to build and nothing fetched from the network. What
a widget shows travels to the browser once; sliders and clicks are answered there, so they also work while the kernel is
busy and, in a static page (`minivlp.visualize.page.save_page`), without any kernel. Beside each widget a still picture
is stored in the notebook, for places that run no JavaScript.
"""

from minivlp.visualize.widgets.attention import AttentionViewer
from minivlp.visualize.widgets.base import STATIC, Widget
from minivlp.visualize.widgets.board import FilterBoard
from minivlp.visualize.widgets.curves import LiveCurves
from minivlp.visualize.widgets.grounder import Grounder
from minivlp.visualize.widgets.pictures import rgb
from minivlp.visualize.widgets.retrieval import RetrievalBrowser

__all__ = ["STATIC", "AttentionViewer", "FilterBoard", "Grounder", "LiveCurves", "RetrievalBrowser", "Widget", "rgb"]
