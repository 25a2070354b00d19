"""Text of unknown origin is shown, not sent: to a terminal, a log, a Markdown card, an HTML page."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
from markdown_it import MarkdownIt

from pretrain.core.text import has_control_characters, html, markdown, shown, shown_lines

HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "a\nb",
    "a\r\nb",
    "bell\x07",
    "c1\x9b31m",
    "\u202ereversed\u2066",
    "two\u2028lines\u2029",
    "caf\udce9",
    "</td><script>alert(1)</script>|x",
    "[x](javascript:alert(1))",
    "![x](https://a.b/c.png)",
    "`code` ``more``",
    "**bold** __bold__ *a* _b_ ~~c~~",
    "# heading",
    "- item",
    "1. item",
    "2) item",
    "=====",
    "<https://a.b> https://a.b www.a.b me@a.b",
    "&lt;b&gt; &#60;",
    "\\[x\\](y)",
    "    indented",
    "> quote",
    "| a | b |",
    "--- | ---",
    "$x$ :smile: @you",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_character_acts_after_it_is_shown(text: str):
    line = shown(text)
    assert not has_control_characters(line) and "\n" not in line
    line.encode("utf-8")
    assert not has_control_characters(shown_lines(text).replace("\n", ""))


def test_bytes_that_are_not_utf_8_are_no_control_characters():
    assert not has_control_characters("caf\udce9") and has_control_characters("\u202ecafe")


def test_escapes_name_the_character_and_plain_text_stays():
    assert shown("\x1b[31m\n\u202e\udce9") == r"\x1b[31m\n\u202e\udce9"
    assert shown_lines("a\n\tb\x1b") == "a\n\tb\\x1b"
    plain = "Ünïcode, 日本語, العربية, עברית, emoji 🐈: a-b_c (1) \\ 100 %"
    assert shown(plain) == shown_lines(plain) == plain


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("around", ["{}", "classes: {}, {}", "- {}", "| a | b |\n|---|---|\n| x | {} |"])
def test_nothing_is_markup_or_a_link_in_markdown(text: str, around: str):
    def kinds(source: str) -> list[str]:
        tokens = MarkdownIt("commonmark").enable("table").parse(source)
        inner = [child for token in tokens for child in token.children or ()]
        return [token.type for token in (*tokens, *inner) if token.type not in ("text", "text_special")]

    assert kinds(around.replace("{}", markdown(text))) == kinds(around.replace("{}", "plain"))


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_shows_the_text_itself(text: str):
    (paragraph,) = [token for token in MarkdownIt("commonmark").parse(markdown(text)) if token.type == "inline"]
    assert "".join(child.content for child in paragraph.children or ()) == shown(text).strip()


class _Texts(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.seen = "", list[Any]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.found += data


@pytest.mark.parametrize("text", [*HOSTILE, "\"' onload=alert(1) x='"])
def test_nothing_is_a_tag_or_an_attribute_in_html(text: str):
    parser = _Texts()
    parser.feed(f'<p title="{html(text)}">{html(text)}</p>')
    assert parser.seen == [("p", [("title", shown(text))])] and parser.found == shown(text)
