"""The annotation files that a user gives: one, or those below a folder. Nothing in them is executed or expanded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from finetune.data.examples import DataProblems
from pretrain.core.files import open_file
from pretrain.data.shards.image_files import walk

T = TypeVar("T")
MOST_BYTES = 1 << 30  # of one annotation file: a larger one would not fit into memory several times
_DEEPEST = 100  # levels of XML


@dataclass(frozen=True)
class Source:
    """A file, or a folder with annotation files.

    attribute  VIA: the attribute that holds the class
    """

    path: Path
    attribute: str | None = None

    @cached_property
    def files(self) -> list[Path]:
        """The file itself, or all files below the folder, sorted; hidden ones are left out."""
        if self.path.is_dir():
            return sorted(Path(entry.path) for entry in walk(self.path) if entry.is_file())
        return [self.path]

    @property
    def folder(self) -> Path:
        """The folder, or that of the file."""
        return self.path if self.path.is_dir() else self.path.parent

    def of(self, *suffixes: str) -> Iterator[Path]:
        """Its files with one of the suffixes."""
        return (path for path in self.files if path.suffix.lower() in suffixes)

    def name(self, path: Path) -> str:
        """The name of a file for messages: below the folder."""
        return path.relative_to(self.folder).as_posix()


def readable(
    source: Source, paths: Iterable[Path], read: Callable[[Path], T], findings: DataProblems
) -> Iterator[tuple[str, T]]:
    """(name, content) of each file; one whose `read` raises ValueError is a finding, with one lost label."""
    for path in paths:
        try:
            content = read(path)
        except ValueError as error:
            findings.labels += 1
            findings.add("unreadable annotation file", source.name(path), "", str(error), lost=1)
        else:
            yield source.name(path), content


def read_text(path: Path) -> str:
    """ValueError if it cannot be read, is too large or not UTF-8."""
    try:
        return read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error


def read_json(path: Path) -> Any:
    """ValueError if it cannot be read or is no JSON."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply") from error


def read_xml(path: Path) -> Element:
    """The root of an XML file.

    Raises:
        ValueError: it cannot be read, is no XML, is nested without end, or has a document type, whose entities could
            name other files or expand without end; annotation tools write none.
    """
    builder, depth = TreeBuilder(), 0
    parser = expat.ParserCreate()

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"{path}: nested too deeply")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def refuse(*_: Any) -> None:
        raise ValueError(f"{path}: has a document type (DOCTYPE), which no annotation needs; remove it")

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(read(path), True)
    except (expat.ExpatError, LookupError) as error:  # LookupError: an encoding that does not exist
        raise ValueError(f"{path}: not XML: {error}") from error
    return builder.close()


def read(path: Path) -> bytes:
    """ValueError if it cannot be read or is too large."""
    try:
        with open_file(path) as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path}: larger than {MOST_BYTES >> 20} MiB; export it in parts")
    return data
