"""Fill in a batch script of `SLURM/`: its #SBATCH lines, its settings, and the lines of a site's environment."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import files
from pathlib import Path

from pretrain.core.text import has_control_characters

_CHECKOUT = Path(__file__).parents[2] / "SLURM"
_ENVIRONMENT = "# Modules and variables of your site:"
_SPECIAL = r"[\s'\"\\#]"


def folder() -> Path:
    """The folder of the batch scripts: in the checkout, or in the installation.

    Raises:
        ValueError: the installation lacks them.
    """
    if _CHECKOUT.is_dir():
        return _CHECKOUT
    for file in files("fovea") or ():
        if file.parts[-2:] == ("SLURM", "pretrain.sbatch"):
            return Path(str(file.locate())).resolve().parent
    raise ValueError("this installation has no batch scripts; get SLURM/ of the repository and use --template")


def read_template(program: str, path: Path | None = None) -> str:
    """The text of `SLURM/PROGRAM.sbatch`, or of the user's own copy.

    Raises:
        ValueError: there is no such file.
    """
    path = path or folder() / f"{program}.sbatch"
    if not path.is_file():
        raise ValueError(f"no batch script {path}; take one from SLURM/ of the repository and give it with --template")
    return path.read_text(encoding="utf-8")


def render(
    template: str,
    *,
    options: Mapping[str, str | None],
    settings: Mapping[str, str | Sequence[str]],
    environment: Sequence[str] = (),
) -> str:
    """`template` with its values replaced; every other line, also comments, is unchanged.

    Args:
        options: of sbatch, without dashes: {"nodes": "8"}; "" is an option without value, None removes the line.
        settings: the script's variables; a sequence becomes an array.
        environment: lines of shell for modules and variables.

    Raises:
        ValueError: the template lacks a setting or the line for the environment, or a value has a control character,
            which could end its line and start a command.
    """
    given = {**{f"--{name}": value or "" for name, value in options.items()}, **settings}
    for name, value in given.items():
        for text in [value] if isinstance(value, str) else value:
            if has_control_characters(text):
                raise ValueError(f"{name}: control character in {text!r}; remove it")
    lines, left = [], dict(options)
    for line in template.splitlines():
        match = re.match(r"#SBATCH --([\w-]+)", line)
        if match and match[1] in left:
            lines += _option(match[1], left.pop(match[1]))
        else:
            lines.append(line)
    new = [line for name, value in left.items() for line in _option(name, value)]
    last = max((i for i, line in enumerate(lines) if line.startswith("#SBATCH ")), default=0)
    lines[last + 1 : last + 1] = new
    for name, value in settings.items():
        at = [i for i, line in enumerate(lines) if re.match(rf"{name}=", line)]
        if not at:
            raise ValueError(f"the batch script has no line {name}=...; take a fresh copy of SLURM/")
        lines[at[0]] = f"{name}={_shell(value)}"
    if environment:
        if _ENVIRONMENT not in lines:
            raise ValueError(f"the batch script has no line {_ENVIRONMENT!r}; take a fresh copy of SLURM/")
        at_environment = lines.index(_ENVIRONMENT) + 1
        lines[at_environment:at_environment] = environment
    return "\n".join(lines) + "\n"


def read_options(script: str) -> dict[str, str]:
    """The #SBATCH options of a script, without dashes; "" for one without value."""
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:[= ](.*))?$", script, re.MULTILINE)
    return {name: "".join(shlex.split(value, comments=True)[:1]) for name, value in lines}


def _option(name: str, value: str | None) -> list[str]:
    if value is None:
        return []
    if not value:
        return [f"#SBATCH --{name}"]
    # sbatch splits such a line as a shell does.
    return [f"#SBATCH --{name}={shlex.quote(value) if re.search(_SPECIAL, value) else value}"]


def _shell(value: str | Sequence[str]) -> str:
    return shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"
