"""What is kept between runs: indexes of shards, and shards that were fetched."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from minivlp.data.stored.library import library
from minivlp.data.validation import DataError


def cache_folder() -> Path:
    """Where indexes and fetched shards are kept."""
    return Path(os.environ.get("MINIVLP_CACHE") or "~/.cache/minivlp").expanduser()


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its place only when the block has ended without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def fetched(url: str) -> Path:
    """The shard of a URL or `pipe:` command as a file of the cache; webdataset fetches it the first time."""
    name = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])[-80:].removesuffix(".tar")
    path = cache_folder() / "fetched" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}.tar"
    if path.exists():
        return path
    gopen = library("webdataset.gopen", "wds").gopen
    try:
        print(f"fetching {url} into {path.parent}")
        with written_whole(path) as file, gopen(url, "rb") as stream:
            shutil.copyfileobj(stream, file)
    except Exception as error:  # of the library, of curl and of other programs
        raise DataError(f"{url}: cannot be fetched ({error}). Check the address, or download the shards.") from error
    return path
