"""The papers, one file each. `MODELS` lists them by their short names."""

from minivlp.models.albef import ALBEF
from minivlp.models.clip import CLIP
from minivlp.models.xvlm import XVLM

MODELS = {"clip": CLIP, "albef": ALBEF, "xvlm": XVLM}
