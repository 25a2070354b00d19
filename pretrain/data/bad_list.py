"""The list of a run's bad samples: a file of lines, and a sentence for each new one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from pretrain.data.substitute import BadRecord


class BadList:
    """One rank's list, kept over the starts of a run."""

    def __init__(self, run_dir: Path, *, rank: int, say: Callable[[str], None]):
        self._path, self._say = run_dir / f"bad_samples.rank{rank}.jsonl", say

    def known(self) -> set[tuple[str, str]]:
        """(shard, key) of the samples listed by earlier starts; a last line cut short by a kill is left out."""
        if not self._path.exists():
            return set()
        lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return {(record["shard"], record["key"]) for record in records}

    def add(self, record: BadRecord) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        where = f"{record['shard']}/{record['key']}"
        self._say(f"bad sample {where}: {record['reason']}; used {record['substitute']} instead")
