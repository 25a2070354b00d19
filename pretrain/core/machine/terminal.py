"""What a command prints: text of unknown origin is shown, not sent, and every character can be printed."""

from __future__ import annotations

import io
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

from pretrain.core.text import shown_lines

if TYPE_CHECKING:
    from rich.console import Console


class _Shown:
    """A text stream that replaces control characters in what is written by their escapes; line breaks are kept."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(shown_lines(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _wrapped(stream: TextIO | None) -> TextIO:
    if isinstance(stream, io.TextIOWrapper):
        cast(io.TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    return cast(TextIO, stream if stream is None or isinstance(stream, _Shown) else _Shown(cast(TextIO, stream)))


@contextmanager
def safe_output() -> Generator[None, None, None]:
    """Everything that is printed inside goes through `shown_lines`, also tracebacks and messages of libraries.

    The `main` of every command is decorated with it. What the encoding of a stream lacks is printed as an escape.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _wrapped(sys.stdout), _wrapped(sys.stderr)
    try:
        yield
    except Exception:  # the streams stay, for its traceback
        raise
    except BaseException:
        sys.stdout, sys.stderr = before
        raise
    sys.stdout, sys.stderr = before


def console(*, stderr: bool = False) -> Console:
    """A console of rich, whose own colours and movements reach the terminal: give it only text that is `shown`."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream.stream if isinstance(stream, _Shown) else stream, highlight=False, markup=False)
