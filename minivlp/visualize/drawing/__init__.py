"""Figures: scenes and boxes, heat maps, captions, experts, retrieval, training curves, scores over seeds, the
family of models, and the structure of each.

Every function returns a matplotlib Figure and shows nothing by itself: as the last line of a cell it is displayed once,
`figure.savefig("x.png")` saves it; `draw_boxes` and `heat` draw into given axes. Backgrounds are transparent, and text
is in a gray that is readable on white and on black, for light and dark notebooks. Colors are Okabe and Ito's, which
color-blind readers can tell apart; nothing is shown by color alone.
"""

from minivlp.visualize.drawing.captions import caption_grid
from minivlp.visualize.drawing.experts import expert_figure, frozen_table, word_attention
from minivlp.visualize.drawing.family import taxonomy, timeline
from minivlp.visualize.drawing.filters import capfilt, roc_curves
from minivlp.visualize.drawing.first_lessons import curves, cut_into_patches, differences
from minivlp.visualize.drawing.ink import (
    BLUE,
    GREEN,
    HEAT,
    INK,
    MARKERS,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    VERMILION,
    WIDTH,
    style,
)
from minivlp.visualize.drawing.model_colors import color_of
from minivlp.visualize.drawing.options import Options, option_bars, ticks
from minivlp.visualize.drawing.pictures import attention_figure, attention_grid, draw_boxes, heat, show_scenes
from minivlp.visualize.drawing.results import bars_with_spread, training_curves
from minivlp.visualize.drawing.retrieval import retrieval_grid, similarity_matrices, similarity_matrix
from minivlp.visualize.drawing.sequences import number_tables, picture_rows, stacked_bars, token_strip
from minivlp.visualize.drawing.structure import structure

__all__ = [
    "attention_figure", "attention_grid", "bars_with_spread", "capfilt", "caption_grid", "color_of", "curves",
    "cut_into_patches", "differences", "draw_boxes", "expert_figure", "frozen_table", "heat", "number_tables",
    "option_bars", "picture_rows", "retrieval_grid", "roc_curves", "show_scenes", "similarity_matrices",
    "similarity_matrix", "stacked_bars", "structure", "style", "taxonomy", "ticks", "timeline", "token_strip",
    "training_curves", "word_attention",
    "BLUE", "GREEN", "HEAT", "INK", "MARKERS", "ORANGE", "PALETTE", "PURPLE", "SKY", "VERMILION", "WIDTH", "Options",
]  # fmt: skip
