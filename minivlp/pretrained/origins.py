"""What `load` reads of each family, in words: for the table of models (`python -m minivlp info`, docs/zoo.md)."""

WEIGHTS = {
    "clip": "transformers, open_clip",
    "vilt": "transformers, authors' .ckpt",
    "albef": "authors' .pth",
    "vlmo": "authors' .pth",
    "blip": "transformers, authors' .pth",
    "xvlm": "authors' .pth",
}
