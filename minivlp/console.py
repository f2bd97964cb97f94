"""A command at the terminal: output in any encoding, an end by Ctrl-C or a signal, and one line for what went wrong.

The command line (`minivlp.__main__`, `minivlp.commands`) and the tools use it.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from minivlp.errors import Notice, UserError

REMEDIES = {  # of what the operating system refuses
    errno.ENOSPC: "the disk is full: free some space, or choose another disk",
    errno.EDQUOT: "your quota of this disk is used up: free some space, or choose another disk",
    errno.EROFS: "this disk can only be read: choose another place",
    errno.EACCES: "no permission: change the rights of the file or its folder, or choose another place",
    errno.EPERM: "no permission: change the rights of the file or its folder, or choose another place",
    errno.EEXIST: "a file stands where a folder is needed: choose another place, or move the file away",
    errno.ENOTDIR: "a file stands where a folder is needed: choose another place, or move the file away",
    errno.EISDIR: "a folder stands where a file is needed: write the path of a file",
    errno.ENOENT: "no such file or folder: check the path",
    errno.EMFILE: "too many files are open: raise the limit, for instance with `ulimit -n 4096`",
    errno.ENFILE: "too many files are open on this machine: close other programs",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.EIO: "the disk cannot be read or written: check it, and copy the file from elsewhere",
    errno.ELOOP: "its links lead in a circle: check the path",
}
NO_MEMORY = ("out of memory", "not enough memory", "DefaultCPUAllocator", "can't allocate memory")  # in torch's errors


def print_in_any_encoding() -> None:
    """Characters that the output's encoding lacks (a pipe on Windows, the locale C) are printed as `\\u4e00`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's stream takes any text
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def notices_in_one_line() -> Iterator[None]:
    """In this block each `Notice` is printed once, without the place in the code where Python would look for it."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
            if issubclass(category, Notice):
                print(f"minivlp: {message}", file=sys.stderr)
            else:
                usual(message, category, *where, **options)

        warnings.showwarning = show
        warnings.simplefilter("default", Notice)
        yield


@contextmanager
def stopped_by_signals() -> Iterator[list[int]]:
    """In this block SIGTERM raises KeyboardInterrupt, as Ctrl-C does. The list holds the signal that came."""
    came: list[int] = []

    def stop(number: int, _: Any) -> NoReturn:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield came
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, before)


def explained(error: Exception, options: Mapping[str, Any], names: Mapping[str, str]) -> str | None:
    """An error in one line, with the file and a remedy; None for an error that is a fault of our own.

    options: the values of the command's options, to tell which of them named a file. names: what `UserError` calls
    arguments -> what the command line calls them.
    """
    if isinstance(error, UserError):
        return error.told(names)
    if is_out_of_memory(error):
        ways = [f"--{name}" for name in ("batch", "subset") if name in options]
        return f"not enough memory: {'try a smaller ' + ' or '.join(ways) if ways else 'close other programs'}"
    if isinstance(error, OSError):
        return _of_the_system(error, options)
    if isinstance(error, ImportError) and not (error.name or "minivlp").startswith("minivlp"):
        return f"{error}: install it, with `pip install {(error.name or '').partition('.')[0]}`"
    if isinstance(error, ValueError | FloatingPointError) or type(error).__name__ == "SafetensorError":
        return str(error)
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, numpy or torch (on any device) ran out of memory."""
    of_torch = isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)
    return isinstance(error, MemoryError) or of_torch


def _of_the_system(error: OSError, options: Mapping[str, Any]) -> str:
    remedy = REMEDIES.get(error.errno)
    if error.filename is None:  # libraries raise OSError with a sentence of their own
        said = " ".join(str(error.strerror or error).split())
        return f"{said}: {remedy}" if remedy else said
    file = os.fspath(error.filename) if not isinstance(error.filename, int) else str(error.filename)
    file = file.decode(errors="backslashreplace") if isinstance(file, bytes) else file
    given = [name for name, value in options.items() if name != "run" and value and _names(str(value), file)]
    option = f" (--{given[0].replace('_', '-')})" if given else ""
    return f"{file}{option}: {remedy or error.strerror}"


def _names(value: str, file: str) -> bool:
    """Whether the value of an option, perhaps after a prefix such as `coco:`, is this file or a folder above it."""
    path = os.path.expanduser(value.partition(":")[2] or value)
    return file == path or file.startswith(path.rstrip(os.sep) + os.sep)


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest choice or option for a word that it does not know."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(str(value), map(str, action.choices))
            raise argparse.ArgumentError(action, f"{value!r} is none of {', '.join(map(str, action.choices))}{hint}")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """As in argparse, but a word that looks like an option and is none is an error of this (sub)command."""
        found, rest = super().parse_known_args(args, namespace)
        unknown = next((word.partition("=")[0] for word in rest if word.startswith("--")), None)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            self.error(f"there is no option {unknown}{did_you_mean(unknown, known)}")
        return found, rest


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean clip?`, or nothing where no known word is near. Case and punctuation do not count."""
    plain = {"".join(filter(str.isalnum, name.lower())) or name: name for name in known}
    near = difflib.get_close_matches("".join(filter(str.isalnum, word.lower())), plain, n=1, cutoff=0.6)
    return f"; did you mean {plain[near[0]]}?" if near else ""
