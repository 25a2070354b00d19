"""`fovea launch hosts` over a real sshd: ranks of two hosts, a killed one replaced, and what is said of bad hosts."""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.hosts.command import main
from launch.hosts.hostfile import read_hostfile
from launch.slurm.attempts import newest_step
from tests.launch.hosts.sshd import HOSTS, Sshd, lacking, launch, start
from tests.runs import LONG, losses, reached, wait_until, write_config

pytestmark = pytest.mark.processes

PYTHON = str(Path(__file__).parent / "python.sh")


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    if why := lacking():
        if os.environ.get("CI"):
            pytest.fail(f"CI needs an ssh server: {why}")
        pytest.skip(why)
    yield from start(tmp_path_factory.mktemp("sshd"))


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# two\n" + "".join(f"{host} slots=1\n" for host in HOSTS))
    return path


def variables(**more: str) -> list[str]:
    """Flags that pass the variables of python.sh to every host, also for the check."""
    lines = {"REAL_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | more
    return [part for name, value in lines.items() for part in ("--environment", f"export {name}={shlex.quote(value)}")]


def test_a_killed_rank_is_replaced_without_a_trace_and_a_stop_is_final(tmp_path: Path, sshd: Sshd, hostfile: Path):
    config, run = write_config(tmp_path, "mae"), tmp_path / "run"
    overrides = ["optim.total_steps=100000", "optim.warmup_steps=0"]
    fake = ["--python", PYTHON, *variables(FAKE_STEP_SECONDS="0.1")]
    process = launch(sshd, hostfile, config, *overrides, *fake)
    try:
        wait_until(lambda: reached(run) >= 12, process)
        os.kill(sshd.ranks()[1], signal.SIGKILL)
        wait_until(lambda: len(list(run.glob(".attempt-*"))) == 2 and reached(run) >= 15, process)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=LONG)
        assert process.returncode == 85 and (run / "PREEMPTED").exists(), said
        assert "127.0.0.2: its ranks ended with status 247; stopping the others" in said, said
        assert "127.0.0.2: pretrain rank 1 on 127.0.0.2 starts at step 10" in said, said
        assert not sshd.ranks(), "nothing is left on the hosts"
    finally:
        process.kill()
    weights = ""
    for step in range(1, newest_step(run) + 1):
        weights = hashlib.sha256(f"{weights} {step}".encode()).hexdigest()
    assert newest_step(run) == reached(run) >= 15, "saved where it stopped"
    assert (run / "checkpoints" / f"step-{reached(run):08d}" / "weights").read_text() == weights


def test_ranks_end_with_their_launcher(tmp_path: Path, sshd: Sshd, hostfile: Path):
    config, run = write_config(tmp_path, "mae"), tmp_path / "run"
    more = ["--python", PYTHON, *variables(), "optim.total_steps=100000", "optim.warmup_steps=0"]
    process = launch(sshd, hostfile, config, *more)
    wait_until(lambda: reached(run) >= 2, process)
    process.kill()
    process.communicate()
    wait_until(lambda: not sshd.ranks(), sshd.process)  # pyright: ignore[reportArgumentType]
    assert (run / "PREEMPTED").exists(), "they were given the time to save"


def test_a_real_run_of_two_hosts_trains(tmp_path: Path, sshd: Sshd, hostfile: Path):
    config, run = write_config(tmp_path, "mae"), tmp_path / "run"
    engine = ["engine.name=deepspeed", "engine.zero_stage=1", "engine.device=cpu"]
    process = launch(sshd, hostfile, config, *engine, "optim.total_steps=4", "optim.warmup_steps=1")
    said, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0, said
    assert (run / "DONE").exists() and sorted(losses(run)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        ("no key", "127.0.0.2: requires a password"),
        ("nobody listens", "127.0.0.1: not reachable over ssh"),
        ("an unknown host key", "127.0.0.2: its key is not known here; accept it once with `ssh -p"),
        ("another version", "127.0.0.2: torch 0.0.1, the others have"),
        ("no python", "127.0.0.1: cannot start /no/python"),
        ("an unknown first host", "127.0.0.2: cannot resolve no.such.host"),
    ],
)
def test_problems_of_hosts_are_reported_before_a_rank_is_started(
    tmp_path: Path, sshd: Sshd, hostfile: Path, planted: str, said: str, capfd: pytest.CaptureFixture[str]
):
    config, flags, python, more = write_config(tmp_path, "mae"), sshd.flags, PYTHON, []
    environment = variables()
    if planted == "no key":
        flags = ["--ssh-option", f"IdentityFile={tmp_path}/no_key", *flags[:2], *flags[4:]]
    elif planted == "nobody listens":
        flags = ["--ssh-port", "1", *flags[2:]]
    elif planted == "an unknown host key":
        flags = ["--ssh-option", "UserKnownHostsFile=/dev/null", "--ssh-option", "StrictHostKeyChecking=yes", *flags]
    elif planted == "another version":
        hostfile.write_text(hostfile.read_text() + "localhost slots=2\n")
        known = sshd.folder / "known"
        known.write_text(known.read_text() + known.read_text().splitlines()[0].replace(HOSTS[0], "localhost") + "\n")
        info = tmp_path / "planted" / "torch-0.0.1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1\n")
        environment = variables(PLANTED_HOST=HOSTS[1], PLANTED_VERSION=str(info.parent))
    elif planted == "no python":
        python = "/no/python"
    elif planted == "an unknown first host":
        more = ["--master-addr", "no.such.host"]
    status = main([*flags, "--python", python, *environment, *more, str(hostfile), str(config)])
    found = capfd.readouterr().err
    assert status == 4 and said in found, found
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpu01\n", "hosts:1: 'gpu01' is not `NAME slots=N`"),
        ("gpu01 slots=8\ngpu01 slots=4\n", "hosts:2: gpu01 is listed twice"),
        ("-oProxyCommand=x slots=1\n", "hosts:1: "),
        ("# none\n", "no hosts; write"),
    ],
)
def test_a_wrong_line_of_a_hostfile_is_named(tmp_path: Path, text: str, said: str):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_hostfile(tmp_path / "hosts")


def test_a_batch_that_the_hosts_do_not_divide_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "hosts").write_text("a slots=2\nb slots=1\n")
    assert main([str(tmp_path / "hosts"), str(write_config(tmp_path, "mae"))]) == 2
    assert "nearest: 15" in capsys.readouterr().err
