"""Errors that the user can correct. (What the operating system refuses is put into words in `console`.)"""

from __future__ import annotations

from collections.abc import Mapping


class UserError(ValueError):
    """Something that the user gave cannot be used. The message names it, what is wrong with it and what to do.

    Args:
        message: complete without the advice.
        advice: one more sentence, which names an argument as `{}`.
        argument: that argument as it is written in Python, such as `split=None`.

    `str(error)` is for Python. Where arguments have other names, as on the command line, `told(names)` uses these.
    """

    def __init__(self, message: str, advice: str = "", argument: str = "") -> None:
        super().__init__(f"{message} {advice.format(argument)}" if advice else message)
        self.message, self.advice, self.argument = message, advice, argument

    def told(self, names: Mapping[str, str]) -> str:
        """The message with the argument's name in `names`. Advice about an argument without a name is left out."""
        if self.argument and self.argument not in names:
            return self.message
        return f"{self.message} {self.advice.format(names.get(self.argument, ''))}".rstrip()


class NotFinite(UserError, FloatingPointError):
    """A computation gave infinity or no number."""


class Notice(UserWarning):
    """Something that the user should know although the work goes on. On the command line it is one line."""
