"""The base of the configurations of the tasks. No torch here."""

from __future__ import annotations

from typing import Any, ClassVar

from pretrain.core.configlib import Config


class TaskSection(Config):
    """Base of the tasks' configurations.

    formats    of `DataSource.format`, which this task reads, beside "auto"
    keys       of `DataSource`, which this task reads beside `images` ("annotations", "masks", "depth", "classes")
    """

    formats: ClassVar[frozenset[str]] = frozenset()
    keys: ClassVar[frozenset[str]] = frozenset({"classes"})

    def problems(self, config: Any) -> list[str]:
        """What cannot work in a `FinetuneConfig` with this task: "task.key: what, the value, the way out"."""
        return []

    def source_problems(self, key: str, source: Any) -> list[str]:
        """What is wrong with one `DataSource`, by its key in the configuration ("data.train")."""
        found = []
        if source.format != "auto" and source.format not in self.formats:
            name = getattr(self, "name", "this task")
            found.append(
                f"{key}.format: {source.format} is not read by {name}; one of {', '.join(sorted(self.formats))}"
            )
        for name in ("annotations", "masks", "depth", "classes"):
            if getattr(source, name) is not None and name not in self.keys:
                found.append(f"{key}.{name}: given, but task {getattr(self, 'name', '')} does not read it; remove it")
        return found
