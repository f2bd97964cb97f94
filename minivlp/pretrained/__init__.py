"""Released weights in our classes: from the model hub, a folder or the authors' file (docs/pretrained.md).

clip = load("clip", "openai/clip-vit-base-patch32")
clip.model.similarity(**clip(pictures, ["a cat", "a dog"]))
"""

from minivlp.pretrained.loaded import Pretrained, save_pretrained
from minivlp.pretrained.loading import load

__all__ = ["Pretrained", "load", "save_pretrained"]
