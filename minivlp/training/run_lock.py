"""One process at a time in a folder, by a file `lock` that names the process.

Where the file system has locks (flock), that file is locked, and the end of a process releases it. Elsewhere (Windows,
some network file systems) the process that the file names is looked up: if it has ended, its claim is taken over. A
process of another machine cannot be looked up, so its claim stands until someone deletes the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlp.training.checkpoint import CheckpointError, naming

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FRESH = 5.0  # seconds in which a process that has made the file surely writes its name into it
_claimed: set[Path] = set()  # by this process: a number alone may be that of an ended process, as in a container


@dataclass(frozen=True)
class Owner:
    """The process that a lock file names."""

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid}" + ("" if self.host == socket.gethostname() else f" on {self.host}")


class FolderLock:
    """Claims an existing folder while the `with` block lasts. Raises CheckpointError while another process has it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "lock"
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        with naming(self.file):
            while True:
                made = not self.file.exists()
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    locked = lock(descriptor)
                    if locked is None:
                        self._claim_by_name(made)
                    elif not locked:
                        raise self._in_use()
                    elif not self._is_current(descriptor):  # released, and so removed, after it was opened
                        os.close(descriptor)
                        continue
                    write(descriptor, Owner(os.getpid(), socket.gethostname()))
                except BaseException:
                    os.close(descriptor)
                    raise
                break
        if locked:
            self._descriptor = descriptor
        else:
            os.close(descriptor)
            if not made:
                self._confirm()
        _claimed.add(self.file.resolve())
        return self

    def __exit__(self, *_: Any) -> None:
        _claimed.discard(self.file.resolve())
        with contextlib.suppress(OSError):  # a folder that was deleted or made read-only meanwhile is no longer ours
            self.file.unlink()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _claim_by_name(self, made: bool) -> None:
        """Without locks: raise unless the file is new or the process it names has ended."""
        if made:
            return
        owner = read(self.file)
        if owner is None:
            if time.time() - self.file.stat().st_mtime < FRESH:
                raise self._in_use()
        elif owner.host != socket.gethostname():
            raise self._in_use(f"; if that process has ended, delete {self.file}")
        elif self.file.resolve() in _claimed or (owner.pid != os.getpid() and is_running(owner.pid)):
            raise self._in_use()

    def _confirm(self) -> None:
        """Two processes may take over the same claim at once; the later one has it."""
        time.sleep(0.05)
        if read(self.file) != Owner(os.getpid(), socket.gethostname()):
            raise self._in_use()

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.file))
        except FileNotFoundError:
            return False

    def _in_use(self, what_else: str = "") -> CheckpointError:
        owner = read(self.file)
        who = f" ({owner})" if owner else ""
        return CheckpointError(
            f"{self.folder} is in use by another training process{who}: wait for its end, or choose another folder"
            f"{what_else}"
        )


def lock(descriptor: int) -> bool | None:
    """Whether the open file could be locked; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def read(file: Path) -> Owner | None:
    """Whom the file names; None for a file that cannot be understood."""
    try:
        found = json.loads(file.read_bytes())
        return Owner(int(found["pid"]), str(found["host"]))
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write(descriptor: int, owner: Owner) -> None:
    """Make the file name this process."""
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, json.dumps({"pid": owner.pid, "host": owner.host}).encode())


def is_running(pid: int) -> bool:
    """Whether this machine has a process of this number."""
    if os.name == "nt":  # there, signal 0 would end the process
        kernel, waiting = ctypes.windll.kernel32, 0x102
        handle = kernel.OpenProcess(0x100000, False, pid)  # the right to wait for its end
        if not handle:
            return kernel.GetLastError() == 5  # it exists, but is another user's
        try:
            return kernel.WaitForSingleObject(handle, 0) == waiting
        finally:
            kernel.CloseHandle(handle)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
