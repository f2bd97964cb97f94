"""The papers, one file each. `MODELS` lists them by their short names."""

from minivlp.models.albef import ALBEF
from minivlp.models.blip import BLIP
from minivlp.models.clip import CLIP
from minivlp.models.vilt import ViLT
from minivlp.models.vlmo import VLMo
from minivlp.models.xvlm import XVLM

MODELS = {"clip": CLIP, "vilt": ViLT, "albef": ALBEF, "vlmo": VLMo, "blip": BLIP, "xvlm": XVLM}
