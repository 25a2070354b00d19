"""Inputs that try to be executed, to reach the terminal, or to make a command wait for ever."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from launch.lab.bench import photo, tar_of
from launch.lab.trial import LONGEST, Trial
from launch.lab.verdicts import SILENT, BrokenPromiseError
from pretrain.core.machine.children import child_environment
from pretrain.core.text import has_control_characters

_NAMES = ("\x1b[2J{}", "{}\x07", "\u202e{}", "two\nlines {}", "\x9b31m{}", "$(touch {canary}){}", "`touch {canary}`{}")
_DRY = ("--nodes", "1", "--ranks-per-node", "1", "--dry-run", "--no-preflight")


def _name(trial: Trial, text: str) -> str:
    """A name that a terminal or a shell would act on."""
    return trial.rng.choice(_NAMES).replace("{canary}", "canary").replace("{}", text)


def yaml_tags(trial: Trial) -> None:
    """A configuration with tags of Python objects."""
    tag = trial.rng.choice(("apply:os.system", "apply:subprocess.getoutput", "new:os.system", "apply:builtins.exec"))
    key = trial.rng.choice(("run_dir", "model", "data", "optim"))
    argument = f"touch {trial.canary}" if "exec" not in tag else f"open({str(trial.canary)!r}, 'w')"
    lines = [line for line in trial.bench.pretraining().splitlines() if not line.startswith(f"{key}:")]
    text = "\n".join([*lines, f"{key}: !!python/object/{tag} [{argument!r}]", ""])
    trial.refused(trial.start("pretrain", trial.write("config.yaml", text)), "config.yaml")


def yaml_damage(trial: Trial) -> None:
    """A configuration with random bytes in it: refused, or the same run as without them."""
    text = bytearray(trial.bench.pretraining().encode())
    for _ in range(trial.rng.randint(1, 3)):
        text.insert(trial.rng.randrange(len(text)), trial.rng.randrange(256))
    command = trial.start("pretrain", "--check", trial.write("config.yaml", bytes(text)))
    if command.wait() != 0:
        trial.refused(command, "config.yaml")


def misspelt_key(trial: Trial) -> None:
    """A key with a letter too many or too few is refused, with the nearest one."""
    key = trial.rng.choice(("total_steps", "warmup_steps", "global_batch_size", "clip_grad"))
    at = trial.rng.randrange(1, len(key) - 1)
    wrong = key[:at] + trial.rng.choice(("", key[at] * 2)) + key[at + 1 :]
    trial.refused(trial.start("pretrain", trial.config, f"optim.{wrong}=3"), wrong, key)


def control_characters(trial: Trial) -> None:
    """Control characters in run_dir: refused, also by the batch script."""
    name = trial.rng.choice(("a\nb", "a\rb", "\x1b[31m", "a\u2028b", "x\n#SBATCH --nodes=99", "x\ntouch canary"))
    trial.refused(trial.start("pretrain", "--check", trial.config, f"run_dir={name}"), "run_dir")
    words = ("fovea", "launch", "slurm", "pretrain", trial.config, f"run_dir={name}", *_DRY)
    trial.refused(trial.start(*words), "run_dir")


def shell_in_a_path(trial: Trial) -> None:
    """Shell syntax in run_dir is a name: the run writes there, and the batch script quotes it."""
    name = trial.rng.choice(("$(touch canary)", "`touch canary`", "a; touch canary", "a' && touch canary '", 'a" b'))
    trial.done(trial.start("pretrain", trial.config, f"run_dir={name}", "optim.total_steps=3"))
    if not (trial.folder / name / "DONE").exists():
        raise BrokenPromiseError(f"{name!r} has no marker DONE", SILENT)
    words = ("fovea", "launch", "slurm", "pretrain", trial.config, f"run_dir={name}", *_DRY)
    script = trial.start(*words)
    trial.done(script)
    subprocess.run(["bash", "-n"], input=script.said, text=True, check=True, capture_output=True)


def commands_as_shards(trial: Trial) -> None:
    """Addresses that other readers execute or fetch."""
    words = (
        f"pipe:touch {trial.canary}",
        f"|touch {trial.canary}",
        "file:///etc/passwd",
        "http://169.254.169.254/a.tar",
    )
    shards = trial.rng.choice((*words, f"a.tar::pipe:touch {trial.canary}"))
    trial.refused(trial.start("pretrain", trial.config, f"data.shards=[{shards!r}]"), "data.shards")


class _Reducer:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, (f"touch {self.path}",)


def pickled_weights(trial: Trial) -> None:
    """A checkpoint of another project whose pickle runs a command."""
    content = {"model": {"a": _Reducer(trial.canary)}, "epoch": 3}
    data = pickle.dumps(content, protocol=trial.rng.choice((2, 4)))
    if trial.rng.random() < 0.7:  # as torch.save writes it
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
        data = file.getvalue()
    path = trial.write(trial.rng.choice(("weights.pth", "weights.pt", "weights.ckpt", "weights.bin")), data)
    command = trial.start("pretrain", trial.config, f"init.official={path}", "init.fresh_heads=true")
    trial.refused(command, path.name)


def pickled_members(trial: Trial) -> None:
    """Members of a shard that other readers unpickle: counted as no image, or the sample is bad."""
    import numpy as np

    array = io.BytesIO()
    np.save(array, np.array([_Reducer(trial.canary)], dtype=object), allow_pickle=True)
    members = [(f"{i:06d}.jpg", photo(i)) for i in range(15)]
    extension = trial.rng.choice(("npy", "pyd", "pickle", "pth"))
    content = array.getvalue() if extension == "npy" else pickle.dumps(_Reducer(trial.canary))
    key = "zzz" if extension == "npy" else "000000"
    trial.write("shards/train-000000.tar", tar_of([*members[:1], (f"{key}.{extension}", content), *members[1:]]))
    trial.done(trial.start("fovea", "data", "index", trial.folder / "shards", "--workers", "1"))
    config = trial.write("config.yaml", trial.bench.pretraining(trial.folder / "shards"))
    command = trial.start("pretrain", config, "data.block_shards=1")
    if (status := command.wait()) not in (0, 1, 2):
        raise BrokenPromiseError(f"status {status}: {command.last}")


def links_in_a_tar(trial: Trial) -> None:
    """Links, devices and paths that lead outside: refused, and nothing is written outside."""
    entry = tarfile.TarInfo(trial.rng.choice(("000000.jpg", "../000000.jpg", "/etc/000000.jpg")))
    entry.type = trial.rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE))
    entry.linkname = "/etc/passwd"
    trial.write("shards/train-000000.tar", tar_of([entry, ("000001.jpg", photo(1))]))
    before = sorted(trial.folder.iterdir())
    command = trial.start("fovea", "data", "index", trial.folder / "shards", "--workers", "1")
    if command.wait() != 0:
        trial.refused(command, "train-000000.tar")
    elif "1 samples" not in command.said:
        raise BrokenPromiseError(f"a link became a sample: {command.last}", SILENT)
    if [path for path in trial.folder.iterdir() if path not in before and not path.name.startswith("output")]:
        raise BrokenPromiseError("a file was written outside the shards")


def hostile_names(trial: Trial) -> None:
    """Names of photos and classes that a terminal or a shell acts on are shown, not sent."""
    for number in range(4):
        name = _name(trial, f"{number}.png").replace("/", "_")
        trial.write(f"photos/{_name(trial, 'class').replace('/', '_')}/{name}", photo(number, image_format="PNG"))
    trial.write(f"photos/{_name(trial, 'class')}/broken.png", b"no image")
    words = ("fovea", "data", "write", trial.folder / "photos", trial.folder / "shards", "--workers", "1")
    trial.done(trial.start(*words))
    skipped = (trial.folder / "shards" / "skipped.txt").read_text("utf-8")
    if has_control_characters(skipped.replace("\n", "").replace("\t", "")):
        raise BrokenPromiseError("skipped.txt holds a control character")
    trial.done(trial.start("fovea", "data", "show", trial.folder / "shards"))


def special_files(trial: Trial) -> None:
    """Pipes and devices among the photos are skipped, and nothing waits for them."""
    trial.write("photos/a.png", photo(1, image_format="PNG"))
    special = trial.folder / "photos" / "b.png"
    kind = trial.rng.choice(("fifo", "/dev/zero", "/dev/random", "loop", "folder"))
    if kind == "fifo":
        os.mkfifo(special)
    elif kind == "folder":
        special.mkdir()
    else:
        special.symlink_to(special.name if kind == "loop" else kind)
    words = ("fovea", "data", "write", trial.folder / "photos", trial.folder / "shards", "--workers", "1")
    command = trial.start(*words)
    trial.done(command)
    if "1 images in" not in command.said:
        raise BrokenPromiseError(f"not 1 image: {command.last}", SILENT)


def modules_in_the_folder(trial: Trial) -> None:
    """Files of the current folder that have the names of modules are not run by a command of its own."""
    name = trial.rng.choice(("pretrain", "finetune", "launch", "torch", "yaml", "json", "sitecustomize", "numpy"))
    trial.write(f"{name}.py", f"open({str(trial.canary)!r}, 'w').close()\n")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fovea", "pretrain", "--check", str(trial.config)],
        cwd=trial.folder,
        env=os.environ | child_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST,
    )
    if done.returncode != 0:
        raise BrokenPromiseError(f"status {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
