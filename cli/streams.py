"""Standard streams that no terminal, pipe or closed descriptor turns into an error."""

from __future__ import annotations

import io
import os
import sys


class Output(io.TextIOWrapper):
    """A text stream that replaces what its encoding has not got, and goes silent where its reader went away.

    The run then ends with the exit code of its work, as ``modhifi ... | head -1`` should.
    """

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except BrokenPipeError:
            return self._silence()

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:
            self._silence()

    def _silence(self) -> int:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        return 0


def settle() -> None:
    """Lets go what cannot be written: tried again at exit, it would spoil the exit code."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def mend() -> None:
    """Open the streams that are closed, and let the two that are written be of :class:`Output`.

    A file that is opened next would otherwise take the number of a closed one, and get what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.flush()
            errors = "replace" if name == "stdout" else "backslashreplace"
            lines, through = stream.line_buffering, stream.write_through
            setattr(
                sys,
                name,
                Output(stream.buffer, stream.encoding, errors, line_buffering=lines, write_through=through),
            )
