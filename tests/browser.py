"""A page as a real browser shows it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from tests.runs import LONG

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def screenshot(uri: str, folder: Path, *, size: tuple[int, int] = (1200, 2600)) -> np.ndarray:
    """int [height, width, 3] of a page that needs nothing but itself; its profile is kept in `folder`."""
    shot = folder / "shot.png"
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--disable-extensions", f"--user-data-dir={folder / 'profile'}", f"--screenshot={shot}"]
    done = subprocess.run(
        [*command, f"--window-size={size[0]},{size[1]}", uri], capture_output=True, text=True, timeout=LONG
    )
    assert shot.exists(), done.stderr
    assert "Refused" not in done.stderr and "Content Security" not in done.stderr
    return np.asarray(Image.open(shot).convert("RGB")).astype(int)
