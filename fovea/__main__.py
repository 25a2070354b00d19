"""The `fovea` command, also `python -m fovea`: check that Python finds Fovea's own packages, then run `launch.cli`.

`launch`, `pretrain` and `finetune` are common names: ROS 2 has a `launch`, and many folders hold a `pretrain.py`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("launch", "pretrain", "finetune")
HOME = Path(__file__).resolve().parent.parent


def shadowed() -> str | None:
    """A sentence about a package that is hidden by another one, here or in the child processes; None if there is none.

    Children are started with -m or -c, so they search the current folder first, unlike an installed command.
    """
    search = sys.path[:]
    if not sys.flags.safe_path:
        sys.path.insert(0, "")
    try:
        found = {name: _location(name) for name in PACKAGES}
    finally:
        sys.path[:] = search
    for name, place in found.items():
        if place is None:
            return f"Fovea's package {name!r} is not at {HOME / name}: the installation is incomplete"
        if place not in (HOME / name, HOME / name / "__init__.py"):
            return (
                f"{place} hides Fovea's package {name!r} ({HOME / name}): rename it, start from another folder, or "
                "remove its folder from PYTHONPATH"
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
    problem = shadowed()
    if problem is not None:
        print(f"fovea: {problem}", file=sys.stderr)
        return 2
    from launch.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
