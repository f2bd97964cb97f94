"""Threads that decode images."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

THREADS = min(8, os.cpu_count() or 1)


class DecodingThreads:
    """One pool of threads, started when it is first used.

    A copy made by pickling, and a process made by forking, starts a pool of its own: threads exist in one process only.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._process = 0  # the id of the process whose pool it is

    @property
    def pool(self) -> ThreadPoolExecutor:
        """The pool of this process."""
        if self._pool is None or self._process != os.getpid():
            self._pool, self._process = ThreadPoolExecutor(THREADS, "minivlp-decode"), os.getpid()
        return self._pool

    def __getstate__(self) -> dict[str, Any]:
        return {"_pool": None, "_process": 0}
