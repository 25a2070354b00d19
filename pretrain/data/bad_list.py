"""The list of a run's bad samples: a file of lines, and a sentence for each new one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from pretrain.data.substitute import BadRecord


class BadList:
    """One rank's list, kept over the starts of a run."""

    def __init__(self, run_dir: Path, *, rank: int, say: Callable[[str], None]):
        self._path, self._say = run_dir / f"bad_samples.rank{rank}.jsonl", say

    def known(self) -> set[tuple[str, str]]:
        """(shard, key) of the samples listed by earlier starts; a last line cut short by a kill is cut off the file."""
        if not self._path.exists():
            return set()
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:  # or the next record would stand on the same line
            os.truncate(self._path, len(whole))
        records = [json.loads(line) for line in whole.splitlines()]
        return {(record["shard"], record["key"]) for record in records}

    def add(self, record: BadRecord) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        where = f"{record['shard']}/{record['key']}"
        self._say(f"bad sample {where}: {record['reason']}; used {record['substitute']} instead")
