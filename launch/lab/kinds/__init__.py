"""The kinds of faults: a table. What each kind injects, what must hold then, and the function of a trial. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from launch.lab.kinds import hostile, kills, labels, limits, shards, weights
from launch.lab.trial import Trial


class Kind(NamedTuple):
    """possible: whether this user and machine can inject it."""

    fault: str
    promise: str
    trial: Callable[[Trial], None]
    possible: Callable[[], bool] = lambda: True


_SAME = "the same command again ends with bitwise the weights of an undisturbed run"
_SENTENCE = "a sentence with the exit status of its kind; afterwards the same command ends bitwise as undisturbed"
_REFUSED = "refused by name, status 2"
_NOT_RUN = "refused, and never executed"

KINDS: dict[str, Kind] = {
    "kill": Kind("SIGKILL at a random moment", _SAME, kills.any_moment),
    "kills": Kind("SIGKILL at three random moments", _SAME, kills.several_times),
    "kill-call": Kind(
        "SIGKILL at a chosen call of open, write (after half of it), fsync, rename, mkdir, unlink or rmdir",
        f"what has the name of a checkpoint is complete; {_SAME}",
        kills.at_a_call,
    ),
    "power": Kind(
        "the same, and what was not fsynced is lost",
        f"what has the name of a checkpoint is complete; {_SAME}",
        kills.power_failure,
    ),
    "kill-rank": Kind(
        "one of two ranks (ZeRO-1) dies while it writes its part of a checkpoint",
        "no incomplete checkpoint; the same command ends the run",
        kills.one_of_two_ranks,
    ),
    "kill-worker": Kind("SIGKILL to the data workers", _SENTENCE, kills.a_worker),
    "sigterm": Kind("SIGTERM at a random step", f"saved, status 85; {_SAME}", kills.terminated),
    "sigint": Kind("SIGINT at a random step", f"saved, status 85; {_SAME}", kills.interrupted),
    "suspend": Kind("SIGSTOP, then SIGCONT", "ends bitwise as undisturbed", kills.suspended),
    "twice": Kind(
        "the same run started twice", "the second is refused, the first ends undisturbed", kills.started_twice
    ),
    "clock": Kind("a clock that leaps by seconds to years, and a kill", _SAME, kills.clock_leaps),
    "full-disk": Kind("a file system of 0.1 to 1.5 MB", _SENTENCE, limits.full_disk, limits.can_mount),
    "file-size": Kind("a limit of the size of files", _SENTENCE, limits.file_size),
    "no-space": Kind("writes, fsyncs or renames fail: no space, quota, read-only", _SENTENCE, limits.no_space),
    "failing-disk": Kind("writes, fsyncs or renames fail: EIO, ESTALE", _SENTENCE, limits.failing_disk),
    "descriptors": Kind("12 to 64 open files", _SENTENCE, limits.descriptors),
    "memory": Kind("a limit of address space", _SENTENCE, limits.memory),
    "shm": Kind("a /dev/shm of 4 to 256 kB, with a data worker", _SENTENCE, limits.shared_memory, limits.can_mount),
    "empty-variables": Kind("variables of SLURM and torchrun that are empty", "as undisturbed", limits.empty_variables),
    "mpirun": Kind("variables of one rank of mpirun", "as undisturbed", limits.one_rank_of_mpirun),
    "tmpdir": Kind("a long TMPDIR", "as undisturbed", limits.long_tmpdir),
    "home": Kind("~ in run_dir", "the home; as undisturbed", limits.home),
    "photo-bit": Kind(
        "a flipped bit in a photo of a shard", "replaced and listed, found by verify", shards.bit_in_a_photo
    ),
    "header-bit": Kind(
        "a flipped bit in a tar header", "no effect or refused; found by verify", shards.bit_in_a_header
    ),
    "index-bit": Kind("a flipped bit in the index of a shard", _REFUSED, shards.bit_in_an_index),
    "catalog-bit": Kind(
        "a flipped bit in dataset.json", "refused by name, or as undisturbed", shards.bit_in_the_catalog
    ),
    "shard-cut": Kind("a shard that ends early", f"{_REFUSED}; found by verify", shards.cut),
    "shard-missing": Kind("a missing shard", f"{_REFUSED}; found by verify", shards.missing),
    "shards-change": Kind(
        "shards removed or overwritten in mid-run",
        "named, or as undisturbed where they are still open",
        shards.changed_in_mid_run,
    ),
    "index-at-once": Kind("six `fovea data index` at once", "no row is lost", shards.indexed_at_once),
    "checkpoint": Kind(
        "the newest checkpoint damaged", "named; ends bitwise as undisturbed", weights.newest_checkpoint
    ),
    "checkpoints": Kind("all checkpoints damaged", "status 3, never step 0 again", weights.all_checkpoints),
    "renamed": Kind("a checkpoint under another step's name", "not used", weights.renamed_checkpoint),
    "lost": Kind("checkpoints removed, the log kept", "refused, the log is kept", weights.lost_checkpoints),
    "log": Kind("damaged lines in metrics.jsonl", "dropped and counted; as undisturbed", weights.damaged_log),
    "release": Kind("a damaged file of a release", "named by verify; refused, status 2", weights.damaged_release),
    "nan": Kind("NaN or infinite weights in a release whose hashes fit", _REFUSED, weights.nan_release),
    "yaml-tags": Kind("Python objects in a configuration", _NOT_RUN, hostile.yaml_tags),
    "yaml-damage": Kind("random bytes in a configuration", "refused by name, or valid", hostile.yaml_damage),
    "misspelt": Kind("a misspelt key", "refused with the nearest key", hostile.misspelt_key),
    "control": Kind("control characters in run_dir", _REFUSED, hostile.control_characters),
    "shell": Kind("shell syntax in run_dir", "a name, never executed", hostile.shell_in_a_path),
    "pipe": Kind("commands and addresses as shards", _NOT_RUN, hostile.commands_as_shards),
    "pickle": Kind("a pickle with a command as weights", _NOT_RUN, hostile.pickled_weights),
    "pickle-member": Kind("pickles as members of a shard", "never executed", hostile.pickled_members),
    "links": Kind(
        "links, devices and outward paths in a tar", "no sample; nothing written outside", hostile.links_in_a_tar
    ),
    "names": Kind("names that act on terminals and shells", "shown, not sent; never executed", hostile.hostile_names),
    "special": Kind("pipes and devices as photos", "skipped, no waiting", hostile.special_files),
    "modules": Kind(
        "pretrain.py, torch.py, ... in the current folder", "never executed", hostile.modules_in_the_folder
    ),
    "boxes": Kind("impossible boxes", "named", labels.boxes_outside),
    "unknown-ids": Kind("objects of unknown classes or images", "named", labels.unknown_ids),
    "sides": Kind("width and height that are not the photo's", "named", labels.exchanged_sides),
    "photo-missing": Kind("a photo that is missing", "named", labels.missing_photo),
    "text-ids": Kind("ids as text, repeated or missing", "understood, or refused by name", labels.ids_as_text),
    "csv": Kind("labels in a csv that are no classes", _REFUSED, labels.wrong_labels),
    "not-json": Kind("annotations that are cut or of another type", _REFUSED, labels.not_json),
}
# One protection of each commit, reader or loader -> kinds that must fail without it.
GUARDED_BY: dict[str, tuple[str, ...]] = {
    "fsync": ("power",),
    "rename": ("kill-call",),
    "barrier": ("kill-rank",),
    "crc": ("photo-bit",),
    "finite": ("nan",),
    "manifest": ("checkpoint", "release"),
}
