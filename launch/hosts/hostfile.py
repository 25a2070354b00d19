"""The hosts of a run: read from a hostfile, reached over ssh, and checked before ranks are started on them."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import statistics
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.core.machine.children import child_environment

_CHECK_SECONDS = 120


@dataclass(frozen=True)
class Host:
    """One line of a hostfile. name: for ssh, also user@host. slots: ranks, one per GPU."""

    name: str
    slots: int


@dataclass(frozen=True)
class Ssh:
    """How a command is run on a host. lines: shell lines before it. options: of `ssh -o`."""

    python: str
    folder: Path
    port: int | None = None
    options: Sequence[str] = ()
    lines: Sequence[str] = ()

    def command(self, host: Host, *arguments: str) -> list[str]:
        """The local command that runs `python ARGUMENTS` on the host, in the same folder, with our standard input."""
        python = shlex.join([self.python, *arguments])
        export = [f"export {name}={shlex.quote(value)}" for name, value in child_environment().items()]
        script = [f"cd {shlex.quote(str(self.folder))}", *export, *self.lines, f"exec {python}"]
        options = ["BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=15", "ServerAliveCountMax=4"]
        given = [part for option in (*self.options, *options) for part in ("-o", option)]
        port = ["-p", str(self.port)] if self.port else []
        return ["ssh", "-T", *port, *given, host.name, f"exec bash -c {shlex.quote(' && '.join(script))}"]


class HostsError(RuntimeError):
    """Hosts cannot be used; one line for each, with a remedy."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))


def read_hostfile(path: Path) -> list[Host]:
    """DeepSpeed's format: `NAME slots=N` a line, `#` starts a comment.

    Raises:
        ValueError: there is no such file, or a line is wrong; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such hostfile; write a line `NAME slots=N` for each host")
    hosts: list[Host] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if not match or text.startswith("-"):
            raise ValueError(f"{path}:{number}: {line.strip()!r} is not `NAME slots=N`, for instance `gpu01 slots=8`")
        if any(host.name == match[1] for host in hosts):
            raise ValueError(f"{path}:{number}: {match[1]} is listed twice; give it one line with all its slots")
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise ValueError(f"{path}: no hosts; write a line `NAME slots=N` for each")
    return hosts


def look(hosts: Sequence[Host], ssh: Ssh, run_dir: Path, *, master: str, on_gpus: bool) -> int:
    """Check all hosts at the same time; return a port that is free on the first.

    Raises:
        HostsError: hosts that cannot be reached, or on which the run would fail or differ.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    sign = run_dir / f".hosts-{secrets.token_hex(4)}"
    sign.touch()
    request = json.dumps({"sign": str(sign), "master": master}) + "\n"
    try:
        with ThreadPoolExecutor(min(64, len(hosts))) as pool:
            answers = list(pool.map(lambda host: _ask(host, ssh, request), hosts))
    finally:
        sign.unlink()
    problems = [answer for answer in answers if isinstance(answer, str)]
    found = [(host, answer) for host, answer in zip(hosts, answers, strict=True) if isinstance(answer, dict)]
    for host, answer in found:
        if not answer["sees_run"]:
            problems.append(f"{host.name}: does not see {run_dir} of this machine; set run_dir on a shared file system")
        if answer["master_error"]:
            problems.append(
                f"{host.name}: cannot resolve {master} ({answer['master_error']}); give the address of "
                f"{hosts[0].name} with --master-addr"
            )
        if on_gpus and 0 < answer["gpus"] < host.slots:
            problems.append(f"{host.name}: slots={host.slots}, but it has {answer['gpus']} GPUs; write that number")
    problems += _different([(host.name, answer["versions"]) for host, answer in found])
    if problems:
        raise HostsError(problems)
    return found[0][1]["port"]


def _different(versions: Sequence[tuple[str, dict[str, str]]]) -> list[str]:
    """The hosts whose versions differ from the majority."""
    problems = []
    for package in versions[0][1] if versions else ():
        usual = statistics.mode(found[package] for _, found in versions)
        odd = [(name, found[package]) for name, found in versions if found[package] != usual]
        problems += [
            f"{name}: {package} {version}, the others have {usual}; install the same on all" for name, version in odd
        ]
    return problems


def _ask(host: Host, ssh: Ssh, request: str) -> dict[str, Any] | str:
    """The host's answer, or why there is none."""
    command = ssh.command(host, "-m", "fovea", "launch", "onhost", "check")
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=_CHECK_SECONDS)
    except FileNotFoundError:
        return f"{host.name}: this machine has no ssh; install an ssh client"
    except subprocess.TimeoutExpired:
        return f"{host.name}: no answer within {_CHECK_SECONDS} s; is its file system mounted? (ssh {host.name})"
    for line in done.stdout.splitlines():  # a login script may have printed something before
        if done.returncode == 0 and line.startswith('{"name"'):
            return json.loads(line)
    return f"{host.name}: {_reason(host, ssh, done)}"


def _reason(host: Host, ssh: Ssh, done: subprocess.CompletedProcess[str]) -> str:
    """Why ssh or the command failed, and a remedy."""
    said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "").strip()
    by_hand = shlex.join(["ssh", *(["-p", str(ssh.port)] if ssh.port else []), host.name])
    if "Host key verification failed" in done.stderr or "IDENTIFICATION HAS CHANGED" in done.stderr:
        return f"its key is not known here; accept it once with `{by_hand}` ({said})"
    if "Permission denied" in said:
        copy = by_hand.replace("ssh", "ssh-copy-id", 1)
        return f"requires a password ({said}); `{copy}` installs your key"
    if done.returncode == 255:
        return (
            f"not reachable over ssh ({said or 'no message'}); try `{by_hand} true`, another --ssh-port, or remove it"
        )
    if "No module named" in said:
        return f"fovea is not installed for {ssh.python} ({said}); install it there, or give another with --python"
    if done.returncode in (126, 127):
        return f"cannot start {ssh.python} ({said}); the same path is needed on all hosts, or --python PATH"
    return f"the check ended with status {done.returncode} ({said})"
