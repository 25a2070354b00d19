"""A real sshd on this machine, reached as the hosts 127.0.0.1 and 127.0.0.2."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.runs import LONG, ROOT, children

HOSTS = ("127.0.0.1", "127.0.0.2")
CONFIG = """
Port {port}
ListenAddress 0.0.0.0
HostKey {folder}/host_key
PidFile {folder}/pid
AuthorizedKeysFile {folder}/authorized
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 100
"""


def lacking() -> str:
    """Why there can be no sshd here; empty when there can."""
    if gone := [name for name in ("ssh", "ssh-keygen") if shutil.which(name) is None]:
        return f"{', '.join(gone)} not found; apt-get install openssh-client"
    if not Path(server()).exists():
        return "sshd not found; apt-get install openssh-server"
    return ""


def server() -> str:
    return shutil.which("sshd") or "/usr/sbin/sshd"  # it requires its full path


@dataclass
class Sshd:
    """A server of one's own keys, known to a client that knows nothing else."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def flags(self) -> list[str]:
        options = (f"IdentityFile={self.folder}/key", f"UserKnownHostsFile={self.folder}/known", "IdentitiesOnly=yes")
        return ["--ssh-port", str(self.port), *(part for option in options for part in ("--ssh-option", option))]

    def ranks(self) -> list[int]:
        """Processes of ranks, in order of rank, whoever started them."""
        family = [self.process.pid]
        for pid in family:
            family += children(pid)
        found = {}
        for pid in family:
            with suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                ranks = [text[5:] for text in variables if text.startswith("RANK=")]
                if ranks and (b"trainer.py" in command or b"-m\0fovea" in command):
                    found[int(ranks[0])] = pid
        return [found[rank] for rank in sorted(found)]


def start(folder: Path) -> Iterator[Sshd]:
    """Run one until the generator is left."""
    for name in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "key.pub", folder / "authorized")
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    key = (folder / "host_key.pub").read_text()
    (folder / "known").write_text("".join(f"[{host}]:{port} {key}" for host in HOSTS))
    (folder / "sshd_config").write_text(CONFIG.format(port=port, folder=folder))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it leaves its privileges
    log = (folder / "log").open("wb")
    process = subprocess.Popen([server(), "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    try:
        end = time.monotonic() + LONG
        while "listening" not in (folder / "log").read_text():
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.05)
        yield Sshd(folder, port, process)
    finally:
        family = [process.pid]
        for pid in family:
            family += children(pid)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def launch(sshd: Sshd, hostfile: Path, config: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fovea", "launch", "hosts", *sshd.flags, str(hostfile), str(config), *more]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
