"""minivlp: vision-language pre-training from scratch, one file per paper, on one small shared library."""

__version__ = "0.2.0"
