"""docs/configuration.md, every key of both configurations, written from the schemas."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from finetune.config import FinetuneConfig
from pretrain.config import PretrainConfig
from pretrain.core.configlib import Config, sections_in

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
HEAD = """# Every key of a configuration

Each can stand in the YAML, or behind it as `section.key=value`; `section.key=null` takes one out. A run writes all of
them, with their values, to `RUN/config.yaml`. Written by `python -m launch.pages.configuration` from the schemas that
check them; a test compares.
"""


def page() -> str:
    """The whole page."""
    known: set[type[Config]] = set()
    parts = [HEAD]
    for word, model in (("pretrain", PretrainConfig), ("finetune", FinetuneConfig)):
        parts.append(f"\n## fovea {word}\n\n" + _table(_rows(model)))
        parts += [part for name, field in model.model_fields.items() for part in _section(name, field, known)]
    return "".join(parts)


def _section(name: str, field: FieldInfo, known: set[type[Config]]) -> Iterator[str]:
    """The parts of one section: one for each of its kinds, and what pretraining has too only once."""
    kinds = list(sections_in(field.annotation))
    for kind in kinds:
        tag = f".name={kind.model_fields['name'].default}" if len(kinds) > 1 else ""
        title = f"\n### {name}{tag}\n\n{_sentence(kind)}\n"
        if not field.is_required() and field.get_default() is None:
            title += "Without this section: none.\n"
        base = next((base for base in kind.__mro__ if base in known), None)
        own = [row for row in _rows(kind, deep=True) if base is None or row not in list(_rows(base, deep=True))]
        if base is not None:
            title += f"Keys of `{name}` above{', and:' if own else '.'}\n"
        known.add(kind)
        yield title + ("\n" + _table(own) if own else "")


def _sentence(kind: type[Config]) -> str:
    return " ".join(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0].split())


def _rows(model: type[Config], prefix: str = "", *, deep: bool = False) -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of each value; of sections inside it too, where that is asked."""
    for name, field in model.model_fields.items():
        kinds = list(sections_in(field.annotation))
        if name == "name" and len(list(_choices(field.annotation))) == 0 and field.annotation is not str:
            continue  # the title says it
        if not kinds:
            yield f"{prefix}{name}", _default(field), _meaning(field)
        elif deep:
            for kind in kinds:
                tag = f" ({kind.model_fields['name'].default})" if len(kinds) > 1 else ""
                rows = _rows(kind, deep=True)
                yield from ((f"{prefix}{name}.{key}{tag}", default, meaning) for key, default, meaning in rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "to be given"
    return "" if (value := field.get_default(call_default_factory=True)) is None else f"`{_text(value)}`"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


def _meaning(field: FieldInfo) -> str:
    choices = ", ".join(f"`{_text(choice)}`" for choice in _choices(field.annotation))
    return "; ".join(part for part in (choices, field.description or "") if part).replace("|", "\\|")


def _choices(annotation: Any) -> Iterator[Any]:
    """What a Literal allows, where it is a choice."""
    if get_origin(annotation) is Literal:
        if len(get_args(annotation)) > 1:
            yield from get_args(annotation)
        return
    for argument in get_args(annotation):
        yield from _choices(argument)


def _table(rows: Iterator[tuple[str, str, str]] | list[tuple[str, str, str]]) -> str:
    lines = ["| key | default | meaning |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| `{key}` | {default} | {meaning} |" for key, default, meaning in rows)]) + "\n"


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
