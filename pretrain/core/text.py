"""Text of unknown origin (names of files, classes and fields, values) for a terminal, a log, Markdown and HTML.

Such text is shown, not sent: a character that a terminal or a reader would act on becomes its escape, `\\x1b`.
"""

from __future__ import annotations

import re
from html import escape

# Control characters (Cc), line and paragraph separators, characters that reverse the direction of the text around them
# (embeddings, overrides, isolates: Unicode Technical Report 36).
_ACTS = "\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_SURROGATES = "\ud800-\udfff"  # bytes of a name that are not UTF-8: no encoding has them
_ACTING = re.compile(f"[{_ACTS}]")
_NOT_SHOWN = re.compile(f"[{_ACTS}{_SURROGATES}]")
_NOT_SHOWN_IN_LINES = re.compile(f"(?![\n\t])[{_ACTS}{_SURROGATES}]")
# Markdown: these act anywhere, `_` at the edge of a word, `:` within a link or an emoji, others at the start of a line.
_MARKS = re.compile(r"[\\`*\[\]|~#@$]|(?<![^\W_])_|_(?![^\W_])|:(?=\S)|(?<=www)\.")
_AT_THE_START = re.compile(r"^(?:[-+=]|\d+(?=[.)](?:\s|$)))")


def has_control_characters(text: str) -> bool:
    """Whether a character of `text` would act: a control character, a line separator, a direction override."""
    return _ACTING.search(text) is not None


def shown(text: object) -> str:
    """One line: control characters, line breaks, direction overrides and undecodable bytes as escapes."""
    return _NOT_SHOWN.sub(_escaped, str(text))


def shown_lines(text: str) -> str:
    """`shown`, but line breaks and tabs are kept: for a message whose parts are `shown`."""
    return _NOT_SHOWN_IN_LINES.sub(_escaped, text)


def html(text: object, *, lines: bool = False) -> str:
    """Text for an element or a quoted attribute of HTML. lines: keep line breaks."""
    return escape(shown_lines(str(text)) if lines else shown(text))


def markdown(text: object) -> str:
    """Text for a paragraph, list or table of Markdown (CommonMark and GitHub's): nothing in it is markup or a link."""
    marked = _MARKS.sub(r"\\\g<0>", escape(shown(text).strip(), quote=False))
    start = _AT_THE_START.match(marked)
    if start is None:
        return marked
    number = start[0] if start[0].isdigit() else ""
    return f"{number}\\{marked[len(number) :]}"


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
