"""`python -m finetune`: refused by name until it exists."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Say what to use instead; exit status 2."""
    print(
        "fovea finetune is not in this version. A release loads with "
        "timm.create_model('local-dir:OUT', pretrained=True) into any fine-tuning code.",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
