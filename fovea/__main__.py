"""The `fovea` command, also `python -m fovea`: check that Python finds Fovea's own packages, then run `launch.cli`.

`launch`, `pretrain` and `finetune` are common names: ROS 2 has a `launch`, and many folders hold a `pretrain.py`. Files
of the current folder are never imported; a package that hides one of ours from elsewhere is named.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("launch", "pretrain", "finetune")
HOME = Path(__file__).resolve().parent.parent


def leave_out_current_folder() -> None:
    """Remove the current folder from the path of modules, unless it is Fovea's own."""
    with suppress(OSError):  # the folder was removed, so nothing is found in it
        here = Path.cwd().resolve()
        if here != HOME:
            sys.path[:] = [place for place in sys.path if place and Path(place).resolve() != here]


def shadowed() -> str | None:
    """A sentence about a package that is hidden by another one; None if there is none."""
    for name in PACKAGES:
        place = _location(name)
        if place is None:
            return f"Fovea's package {name!r} is not at {HOME / name}: the installation is incomplete"
        if place not in (HOME / name, HOME / name / "__init__.py"):
            return (
                f"{place} hides Fovea's package {name!r} ({HOME / name}): rename it, or remove its folder from "
                "PYTHONPATH"
            )
    return None


def _location(name: str) -> Path | None:
    """The file or folder that `import name` loads."""
    spec = find_spec(name)
    if spec is None:
        return None
    return Path(spec.origin or next(iter(spec.submodule_search_locations or ()))).resolve()


def main() -> int:
    """Run the command of `sys.argv`; exit status 2 if another package hides one of Fovea's."""
    leave_out_current_folder()
    problem = shadowed()
    if problem is not None:
        problem = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in problem)
        print(f"fovea: {problem}", file=sys.stderr)
        return 2
    from pretrain.core.machine.children import child_environment

    os.environ.update(child_environment())  # also for the children of libraries
    from launch.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
