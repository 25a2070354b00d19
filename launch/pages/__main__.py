"""`python -m launch.pages`: write the generated pages of docs/; with --check, only name those that are out of date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from launch.pages import attention, backbones, configuration, optimizers, weights

DOCS = Path(__file__).parents[2] / "docs"
# File in docs/ -> function from its current text to the new one: a page may be generated in part.
PAGES: dict[str, Callable[[str], str]] = {
    "attention.md": attention.page,
    "backbones.md": backbones.page,
    "configuration.md": configuration.page,
    "optimizers.md": optimizers.page,
    "weights.md": weights.page,
}


def outdated(docs: Path = DOCS) -> dict[Path, str]:
    """Outdated pages -> their new text."""
    texts = {docs / name: (docs / name).read_text(encoding="utf-8") for name in PAGES}
    return {path: new for path, old in texts.items() if (new := PAGES[path.name](old)) != old}


def main(arguments: list[str] | None = None, docs: Path = DOCS) -> int:
    """Exit status 1 where --check finds an outdated page."""
    parser = argparse.ArgumentParser(prog="python -m launch.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is out of date")
    chosen = parser.parse_args(arguments)
    pages = outdated(docs)
    for path, text in pages.items():
        if chosen.check:
            print(f"{path} is out of date; run python -m launch.pages", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return 1 if chosen.check and pages else 0


if __name__ == "__main__":
    sys.exit(main())
