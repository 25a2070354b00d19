"""Full and failing disks, low limits of memory and descriptors, surroundings that differ."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch.lab.trial import Command, Trial
from launch.lab.verdicts import BrokenPromiseError

_DISK, _MACHINE, _FILES = 5, 6, 7


def full_disk(trial: Trial) -> None:
    """A file system that is too small for the run."""
    disk = trial.folder / "disk"
    disk.mkdir()
    size = trial.rng.randint(100, 1500)
    _mount(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)])
    try:
        command = trial.start("pretrain", trial.config, f"run_dir={disk / 'run'}")
        if command.wait() != 0:
            trial.refused(command, str(disk), statuses=(_DISK,))
        _mount(["mount", "-o", "remount,size=64m", str(disk)])
        trial.done(trial.start("pretrain", trial.config, f"run_dir={disk / 'run'}"))
        trial.ended_as_undisturbed(disk / "run")
    finally:
        unmount_below(trial.folder)


def can_mount() -> bool:
    """Whether this user may mount a file system."""
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


def unmount_below(folder: Path) -> None:
    """Unmount the file systems in `folder`."""
    for line in Path("/proc/self/mounts").read_text("utf-8").splitlines():
        place = Path(line.split()[1])
        if folder in place.parents:
            _mount(["umount", "-l", str(place)])


def _mount(words: Sequence[str]) -> None:
    subprocess.run(words, check=True, capture_output=True)


def file_size(trial: Trial) -> None:
    """RLIMIT_FSIZE, as a quota."""
    limit = trial.rng.randint(1, 400) * 1024
    _ends_or_says(trial, trial.start("pretrain", trial.config, limits={"RLIMIT_FSIZE": limit}), (_DISK,))
    trial.resumes()


def no_space(trial: Trial) -> None:
    _calls_fail(trial, (errno.ENOSPC, errno.EDQUOT, errno.EROFS), (_DISK,))


def failing_disk(trial: Trial) -> None:
    _calls_fail(trial, (errno.EIO, errno.ESTALE), (1, 3, _FILES))


def _calls_fail(trial: Trial, codes: Sequence[int], statuses: Sequence[int]) -> None:
    call = trial.rng.choice(("write", "fsync", "rename"))
    number = trial.rng.randint(1, {"write": 60, "fsync": 40, "rename": 8}[call])
    fault = ["fail", call, number, trial.rng.choice(codes), str(trial.run_dir)]
    _ends_or_says(trial, trial.start("pretrain", trial.config, plants=[fault]), statuses)
    trial.resumes()


def descriptors(trial: Trial) -> None:
    limit = trial.rng.randint(12, 64)
    workers = f"data.num_workers={trial.rng.randint(0, 1)}"
    command = trial.start("pretrain", trial.config, workers, limits={"RLIMIT_NOFILE": limit})
    _ends_or_says(trial, command, (_MACHINE,))
    trial.resumes(workers)


def memory(trial: Trial) -> None:
    used = int(Path(f"/proc/{trial.start('pretrain', '--help').process.pid}/statm").read_text().split()[0]) * 4096
    limit = used + trial.rng.randint(0, 200) * 2**20
    _ends_or_says(trial, trial.start("pretrain", trial.config, limits={"RLIMIT_AS": limit}), (_MACHINE,))
    trial.resumes()


def shared_memory(trial: Trial) -> None:
    shm = ["shared_memory", trial.rng.choice((4, 16, 64, 256))]
    _ends_or_says(trial, trial.start("pretrain", trial.config, "data.num_workers=1", plants=[shm]), (_MACHINE,))
    trial.resumes("data.num_workers=1")


def _ends_or_says(trial: Trial, command: Command, statuses: Sequence[int]) -> None:
    """The run ends as the undisturbed one, or with a sentence and one of the statuses."""
    status = command.wait()
    if status == 0:
        trial.ended_as_undisturbed()
    elif status not in statuses:
        raise BrokenPromiseError(f"status {status}, not one of {list(statuses)}: {command.last}")


def empty_variables(trial: Trial) -> None:
    """Variables of SLURM and torchrun that are set and empty."""
    names = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_NODEID", "RANK", "WORLD_SIZE")
    chosen = trial.rng.sample(names, trial.rng.randint(1, len(names)))
    trial.done(trial.start("pretrain", trial.config, environment=dict.fromkeys(chosen, "")))
    trial.ended_as_undisturbed()


def one_rank_of_mpirun(trial: Trial) -> None:
    names = trial.rng.choice((("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE")))
    local = {"OMPI_COMM_WORLD_LOCAL_RANK": "0"} if names[0].startswith("OMPI") else {"MPI_LOCALRANKID": "0"}
    environment = {names[0]: "0", names[1]: "1", **local}
    trial.done(trial.start("pretrain", trial.config, environment=environment))
    trial.ended_as_undisturbed()


def long_tmpdir(trial: Trial) -> None:
    folder = trial.folder / ("t" * trial.rng.randint(60, 200))
    folder.mkdir()
    trial.done(trial.start("pretrain", trial.config, "data.num_workers=1", environment={"TMPDIR": str(folder)}))
    trial.ended_as_undisturbed()


def home(trial: Trial) -> None:
    """`~` in run_dir is the home."""
    trial.done(trial.start("pretrain", trial.config, "run_dir=~/run", environment={"HOME": str(trial.folder)}))
    trial.ended_as_undisturbed()
    if (trial.folder / "~").exists():
        raise BrokenPromiseError("a folder named ~ was made")
