"""A page as a real browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
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


def laid_out(page: str, folder: Path, *, width: int, count: str) -> tuple[int, int]:
    """How wide the content of a page is in a window of `width`, and how many elements of the selector `count` are
    within it and have a size.
    """
    measure = """frame.onload = () => {
      const inner = frame.contentDocument, seen = [...inner.querySelectorAll(frame.dataset.count)];
      const boxes = seen.map(one => one.getBoundingClientRect());
      const inside = boxes.filter(box => box.width && box.height && box.left >= 0 && box.right <= frame.clientWidth);
      document.body.dataset.found = inner.documentElement.scrollWidth + " " + inside.length;
    };"""
    frame = f'<iframe id="frame" width="{width}" height="900" style="border:0" data-count="{escape(count)}"></iframe>'
    text = json.dumps(page).replace("</", "<\\/")
    script = f"<script>{measure} frame.srcdoc = {text};</script>"
    path = folder / "framed.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{frame}{script}", encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-extensions"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=2400,1000", "--virtual-time-budget=2000"]
    done = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=LONG)
    found = re.search(r'data-found="(\d+) (\d+)"', done.stdout)
    assert found is not None, done.stderr
    return int(found[1]), int(found[2])
