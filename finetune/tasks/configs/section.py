"""The base of the configurations of the tasks. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pretrain.core.configlib import Config


class TaskSection(Config):
    """Base of the tasks' configurations.

    formats    values of `DataSource.format` that this task reads, in addition to "auto"
    keys       keys of `DataSource` that it reads, in addition to `images` ("annotations", "masks", ...)
    """

    formats: ClassVar[frozenset[str]] = frozenset()
    keys: ClassVar[frozenset[str]] = frozenset({"classes"})

    def problems(self, config: Any) -> list[str]:
        """Problems of a `FinetuneConfig` with this task: "task.key: value, reason, remedy"."""
        return []

    def channel_problems(self, channels: int, *, deep: bool) -> list[str]:
        """Problems with images of `channels`, which are float32 (of `data.range`) where they are `deep`."""
        return []

    def class_problems(self, classes: Sequence[str]) -> list[str]:
        """Problems of the classes of the training set."""
        return []

    def source_problems(self, key: str, source: Any) -> list[str]:
        """Problems of one `DataSource`, by its key in the configuration ("data.train")."""
        found = []
        if source.format != "auto" and source.format not in self.formats:
            name = getattr(self, "name", "this task")
            found.append(
                f"{key}.format: {source.format} is not read by {name}; one of {', '.join(sorted(self.formats))}"
            )
        for name in ("annotations", "masks", "mask_names", "image_names", "depth", "classes"):
            if getattr(source, name) is not None and name not in self.keys:
                found.append(f"{key}.{name}: given, but task {getattr(self, 'name', '')} does not read it; remove it")
        return found
