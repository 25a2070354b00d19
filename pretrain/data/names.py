"""What a file name in an annotation means: one rule for COCO files, lists of images, masks and ids of images.

Annotations name files as another machine did: with its folders, separators, Unicode form (macOS composes differently),
URL escapes, or as they were before `fovea data write` made keys of them. A name means the file that has it; else the
only one that has it after the smallest of these changes. Two candidates are never decided between.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from pretrain.data.shards.image_files import SUFFIXES

Parts = tuple[str, ...]
Form = Callable[[str], str]
# of a file to a name: less the folders alike; number of the form; suffix, 0: the same, 1: the same but for case, 2: any
Fit = tuple[int, int, int]
_SUFFIX = re.compile(r"\.[A-Za-z][A-Za-z0-9]{1,4}")  # of a file; in "scan_1.0" and "x.rf.0a1b2c3d4e" it is none
_DOT = "%2E"


def sample_keys(names: Sequence[str]) -> list[str]:
    """A webdataset key for each file name, unique: its path without the suffix, as far as a key allows.

    Dots of the last part, where a key would end, become `_`, as do characters that cannot be printed; a backslash
    separates folders, and a first part `__like_this__` loses an underscore. A name whose key another file has is
    written completely, suffix included, with %2E for each dot.
    """
    plain = {name: _key(name) for name in names}
    # those that keep their name choose first: a_b.jpg is a_b even if there is an a.b.jpg
    order = sorted(set(names), key=lambda name: (plain[name] != _split_any(name)[0], name))
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for name in order:
        key, count = plain[name], 1
        if key in taken:
            folder, slash, last = name.replace("\\", "/").rpartition("/")
            key = full = _key(f"{folder}{slash}{last.replace('%', '%25').replace('.', _DOT)}.x")
            while key in taken:
                count += 1
                key = f"{full}~{count}"
        taken.add(key)
        keys[name] = key
    return [keys[name] for name in names]


def _key(name: str) -> str:
    *folders, last = _parts(name)
    if folders and re.fullmatch("__.*__", folders[0]):  # readers would skip it
        folders[0] = folders[0][1:]
    return "/".join("".join(map(_printable, part)) for part in (*folders, _split_any(last)[0].replace(".", "_")))


def _printable(character: str) -> str:
    return character if character.isprintable() else "_"


def _composed(part: str) -> str:
    return unicodedata.normalize("NFC", part)


def _unescaped(part: str) -> str:
    return _composed(unquote(part, errors="surrogateescape"))


def _written(part: str) -> str:
    """As in a key of `sample_keys`."""
    return "".join(map(_printable, _unescaped(part).replace(".", "_")))


def _loose(part: str) -> str:
    """Without case, and as in keys of version 0.1, which had `_` for every run of other characters."""
    return re.sub(r"[\W_]+", "_", re.sub(r"~\d+$", "", _composed(_unescaped(part).casefold())))


FORMS: tuple[Form, ...] = (str, _composed, _unescaped, _written, _loose)  # each changes more than the one before


class Names:
    """Finds files by the names that annotations give them.

    Args:
        names: of files, in a folder or tar; or key and extension of samples.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(names)
        self._paths = [_parts(_original(name)) for name in self._names]
        self._deepest = max((len(path) - 1 for path in self._paths), default=0)  # folders above a file
        self._literal = {"/".join(path): name for path, name in zip(self._paths, self._names, strict=True)}
        self._literal |= {name: name for name in self._names}
        self._indices: dict[Form, dict[tuple[str | None, str], list[int]]] = {}

    def match(self, wanted: Sequence[str]) -> list[str | None]:
        """The file of each name, or None.

        Folders may be missing in front of either name, and the suffix may differ, as after a conversion. A file that
        another name means is no candidate for a name that must be changed to fit.
        """
        found = [self._literal.get(name) or self._literal.get("/".join(_parts(name))) for name in wanted]
        fits = {place: self._fits(wanted[place]) for place, name in enumerate(found) if name is None}
        for rank in range(len(FORMS)):  # the least changed names choose first
            taken = {name for name in found if name is not None}
            best = {place: _best(some, taken) for place, some in fits.items() if found[place] is None}
            chosen = {place: alike[0][1] for place, alike in best.items() if len(alike) == 1 and alike[0][0][1] == rank}
            claims = Counter(chosen.values())
            for place, name in chosen.items():
                if rank == 0 or claims[name] == 1:  # two names that are one file unchanged are the caller's matter
                    found[place] = name
        return found

    def why_not(self, wanted: str) -> str:
        """Why `match` has no file for a name, to follow it in a sentence."""
        alike = [name for _, name in _best(self._fits(wanted), ())]
        if len(alike) > 1:
            return f"could be {len(alike)} files ({', '.join(sorted(alike)[:3])}); name its folder too"
        if alike:
            return f"is not there; {alike[0]}, with almost this name, is another image"
        return "is not among the images"

    def _fits(self, wanted: str) -> list[tuple[Fit, str]]:
        """The files that a name can mean, up to the least change that leaves all of its folders."""
        fits: list[tuple[Fit, str]] = []
        *folders, last = _parts(wanted) or ("",)
        stem, suffix = _split(last)
        for rank, form in enumerate(FORMS):
            changed = tuple(map(form, folders))
            index = self._index(form)
            for folder in (changed[-1], "") if changed else (None,):
                for number in index.get((folder, form(stem)), ()):
                    *above, file = self._paths[number]
                    if _ends_alike(tuple(map(form, above)), changed):
                        other = _split(file)[1]
                        suffixes = 0 if other == suffix else 1 if other.lower() == suffix.lower() else 2
                        fits.append(((-min(len(above), len(changed)), rank, suffixes), self._names[number]))
            if any(fit[0] == -min(len(changed), self._deepest) for fit, _ in fits):
                break
        return fits

    def _index(self, form: Form) -> Mapping[tuple[str | None, str], Sequence[int]]:
        """Numbers of files by their last folder ("" for none; None: any) and stem, both in a form."""
        if form not in self._indices:
            index = self._indices[form] = {}
            for number, path in enumerate(self._paths):
                stem = form(_split(path[-1])[0])
                for folder in (form(path[-2]) if len(path) > 1 else "", None):
                    index.setdefault((folder, stem), []).append(number)
        return self._indices[form]


def respelled(wanted: Iterable[str], there: Iterable[str]) -> dict[str, str]:
    """Pairs of two sets of keys (paths without a suffix) that are one key after the smallest change."""
    left, right, pairs = set(wanted), set(there), {}
    for form in FORMS:
        of_left, of_right = _grouped(left, form), _grouped(right, form)
        found = {of_left[key][0]: of_right[key][0] for key in of_left.keys() & of_right.keys()
                 if len(of_left[key]) == len(of_right[key]) == 1}  # fmt: skip
        pairs |= found
        left, right = left - found.keys(), right - set(found.values())
    return pairs


def find_files(folder: Path, wanted: Sequence[str]) -> list[str | None]:
    """The file of each name in a list that is in `folder`: relative to it, or absolute; None if there is none.

    Only the folders that the names mention are read.
    """
    tidy = [_below(folder, Path(name)) if name else name for name in wanted]
    found = [name if os.path.isfile(folder / name) else None for name in tidy]  # noqa: PTH113
    missing = [name for name, file in zip(wanted, found, strict=True) if file is None]
    if not missing:
        return found
    parents = {_parts(name)[:-1] for name in missing}
    tails = {parent[start:] for parent in parents for start in range(len(parent) + 1)}
    places = {place for tail in tails if (place := _descend(folder, tail)) is not None}
    places |= {Path(name).parent for name in missing if Path(name).is_absolute()}
    images = {
        _below(folder, Path(entry.path))
        for place in places
        for entry in _entries(place)
        if _split(entry.name)[1].lower() in SUFFIXES and Path(entry.path).is_file()
    }
    listed = [name for name in found if name is not None]
    matched = iter(Names(images | set(listed)).match([*listed, *missing])[len(listed) :])
    return [next(matched) if file is None else file for file in found]


def _descend(folder: Path, parts: Parts) -> Path | None:
    """The folder below `folder` that `parts` mean."""
    for part in parts:
        below = folder / part
        if not os.path.isdir(below):  # noqa: PTH112 - False for a name that no file system takes
            alike = [entry.path for entry in _entries(folder) if _loose(entry.name) == _loose(part)]
            alike = [path for path in alike if Path(path).is_dir()]
            if len(alike) != 1:
                return None
            below = Path(alike[0])
        folder = below
    return folder


def _below(folder: Path, path: Path) -> str:
    """A path relative to `folder` if it is below it; a/b of ./a/b and a//b."""
    for base in (folder, folder.absolute()):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return path.as_posix()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _parts(name: str) -> Parts:
    """Folders and file of a path of any system: C:\\a\\b.jpg, file:///a/b.jpg, ../a/b.jpg and /a/b.jpg are a, b.jpg."""
    if name.startswith("file:"):
        name = unquote(name.removeprefix("file:"))
    name = re.sub(r"^[A-Za-z]:(?=[\\/])", "", name.strip()).replace("\\", "/")
    return tuple(part for part in name.split("/") if part not in ("", ".", ".."))


def _original(name: str) -> str:
    """The name that `sample_keys` wrote completely into a key, or `name`."""
    stem, _ = _split(name)
    full = unquote(stem) if _DOT in stem else ""
    return full if _split(full)[1].lower() in SUFFIXES else name


def _split(name: str) -> tuple[str, str]:
    stem, suffix = _split_any(name)
    return (stem, suffix) if _SUFFIX.fullmatch(suffix) else (name, "")


def _split_any(name: str) -> tuple[str, str]:
    return os.path.splitext(name)  # noqa: PTH122 - names in a tar are no paths


def _best(fits: Sequence[tuple[Fit, str]], taken: Collection[str]) -> list[tuple[Fit, str]]:
    """Those that fit best; files that are `taken` fit unchanged names only."""
    free = [(fit, name) for fit, name in fits if fit[1] == 0 or name not in taken]
    best = min(free)[0] if free else None
    return [(fit, name) for fit, name in free if fit == best]


def _ends_alike(a: Parts, b: Parts) -> bool:
    """Whether one of two paths ends with the other."""
    shorter = min(len(a), len(b))
    return a[len(a) - shorter :] == b[len(b) - shorter :]


def _grouped(keys: Iterable[str], form: Form) -> dict[Parts, list[str]]:
    groups: dict[Parts, list[str]] = {}
    for key in sorted(keys):
        groups.setdefault(tuple(map(form, _parts(key))), []).append(key)
    return groups
