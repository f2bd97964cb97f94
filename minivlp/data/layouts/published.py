"""The flaws of published data sets, by name. They are counted and told, and never a reason to stop.

The same flaw in any other data set is an error: there, it is not known to be harmless.
"""

from __future__ import annotations

from pathlib import Path, PurePath

# Pictures that have captions but are in no archive. Flickr8k.token.txt captions this one five times; its namesake
# without the ".1" is another picture with captions of its own.
MISSING = {"2258277193_586949ec62.jpg.1": "picture that Flickr8k names and no archive of it holds"}

# Folders that hold pictures in the published archives, some of them within themselves: Kaggle's Flickr30k has all
# pictures in flickr30k_images/flickr30k_images and again in a third folder of this name inside it.
PICTURE_FOLDERS = frozenset({"flickr30k_images", "flickr30k-images", "flicker8k_dataset", "flickr8k_dataset"})


def is_leftover(path: PurePath) -> bool:
    """Whether macOS left this file or folder in an archive: __MACOSX, .DS_Store, ._name."""
    return path.name.startswith("._") or path.name == ".DS_Store" or "__MACOSX" in path.parts


def without_picture_folders(path: Path, root: Path) -> tuple[str, ...]:
    """The parts of a path below the root, without the folders that published archives nest in themselves."""
    return tuple(part for part in path.relative_to(root).parts if part.lower() not in PICTURE_FOLDERS)
