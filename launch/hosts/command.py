"""`fovea launch hosts HOSTFILE [pretrain|finetune] CONFIG [key=value ...]`: ranks on several machines, over ssh.

On each host of the file (`NAME slots=N` a line, as DeepSpeed reads it) DeepSpeed's launcher starts the ranks. Run
folder and result are those of `fovea launch local` and `slurm`; the run is restarted when a rank dies.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

from launch.hosts.hostfile import Host, HostsError, Ssh, look, read_hostfile
from launch.hosts.restarts import EXIT_PREEMPTED, StopRequest, keep_running, say
from launch.programs import check_program, chosen_run, device_of
from pretrain.core.configlib import ConfigError
from pretrain.core.machine.children import child_environment
from pretrain.core.machine.command import run_command
from pretrain.core.machine.terminal import safe_output

# Variables of this shell that are passed to the ranks; others by --environment.
CARRIED = (
    "NCCL_",
    "UCX_",
    "GLOO_",
    "TORCH",
    "OMP_",
    "PYTHON",
    "DS_",
    "TRITON_",
    "CUDA_HOME",
    "LD_LIBRARY_PATH",
    "PATH",
)
EXIT_HOSTS = 4


@safe_output()
def main(arguments: list[str]) -> int:
    """Exit status 0: done. 85: stopped on request, and saved. 2: wrong input. 4: hosts cannot be used."""
    chosen = _parser().parse_intermixed_args(arguments)
    try:
        word, config, overrides = chosen_run(chosen.run)
        hosts = read_hostfile(chosen.hostfile)
        run_dir = check_program(word, config, overrides, world_size=sum(host.slots for host in hosts))
    except (ConfigError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    ssh = Ssh(chosen.python, Path.cwd(), chosen.ssh_port, chosen.ssh_option, chosen.environment)
    master = chosen.master_addr or hosts[0].name.rpartition("@")[2]
    on_gpus = device_of(config, overrides) != "cpu"

    def attempt(request: StopRequest) -> int:
        port = look(hosts, ssh, run_dir, master=master, on_gpus=on_gpus)
        return Ranks(hosts, ssh, [word, config, *overrides], address=(master, port)).run(request)

    try:
        return keep_running(run_dir, attempt, max_restarts=chosen.max_restarts)
    except HostsError as error:
        for line in str(error).splitlines():
            say(line)
        return EXIT_HOSTS


@dataclass
class Ranks:
    """One attempt: the ranks of every host, from start to end. address: rank 0's host and a free port there."""

    hosts: Sequence[Host]
    ssh: Ssh
    program: Sequence[str]
    address: tuple[str, int]
    _running: dict[str, subprocess.Popen[str]] = field(default_factory=dict, init=False)

    def run(self, request: StopRequest) -> int:
        """Start them and wait for their end; 0, or the first other status."""
        request.end = self._release
        try:
            for index, host in enumerate(self.hosts):
                self._running[host.name] = self._start(index, host)
            return self._wait()
        finally:
            self._release()

    def _start(self, index: int, host: Host) -> subprocess.Popen[str]:
        world = {host.name: list(range(host.slots)) for host in self.hosts}
        master, port = self.address
        command = [
            *(self.ssh.python, "-u", "-m", "deepspeed.launcher.launch", "--log_level=critical", f"--node_rank={index}"),
            f"--world_info={base64.urlsafe_b64encode(json.dumps(world).encode()).decode()}",
            *(f"--master_addr={master}", f"--master_port={port}", "--no_local_rank", "--no_python"),
            *(self.ssh.python, "-u", "-m", "fovea", *self.program),
        ]
        # As torchrun does: ranks of one machine must not compete for its cores.
        env = {"OMP_NUM_THREADS": "1"} | {k: v for k, v in os.environ.items() if k.startswith(CARRIED)}
        env |= child_environment()
        process = subprocess.Popen(
            self.ssh.command(host, "-m", "fovea", "launch", "onhost", "run"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is for this process only
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps({"command": command, "env": env}) + "\n")
        process.stdin.flush()
        return process

    def _wait(self) -> int:
        ends: SimpleQueue[tuple[str, int]] = SimpleQueue()

        def follow(name: str, process: subprocess.Popen[str]) -> None:
            assert process.stdout is not None
            for line in process.stdout:
                print(f"{name}: {line}", end="", flush=True)
            status = process.wait()
            ends.put((name, status if status >= 0 else 128 - status))

        for item in self._running.items():
            threading.Thread(target=follow, args=item, daemon=True).start()
        failed, preempted = 0, 0
        for _ in self.hosts:
            name, status = ends.get()
            if status == EXIT_PREEMPTED:
                preempted = status
            elif status and not failed:
                failed = status
                say(f"{name}: its ranks ended with status {status}; stopping the others")
                self._release()
        return failed or preempted

    def _release(self) -> None:
        """Close their standard input: each host stops its remaining ranks, which save if they can."""
        for process in self._running.values():
            if process.stdin is not None and not process.stdin.closed:
                process.stdin.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fovea launch hosts", description=__doc__)
    parser.add_argument("hostfile", type=Path, help="`NAME slots=N` a line; rank 0 is on the first")
    parser.add_argument("run", nargs="+", metavar="[pretrain|finetune] CONFIG [key=value ...]")
    parser.add_argument("--max-restarts", type=int, default=3, help="restarts after a process died (default 3)")
    parser.add_argument("--ssh-port", type=int)
    parser.add_argument("--ssh-option", action="append", default=[], metavar="KEY=VALUE", help="as after ssh -o")
    parser.add_argument("--python", default=sys.executable, help="on every host; default: the one of this command")
    parser.add_argument("--environment", action="append", default=[], metavar="LINE", help="shell: module load cuda")
    parser.add_argument("--master-addr", help="the first host's address; default: its name")
    return parser


if __name__ == "__main__":
    sys.exit(run_command("fovea launch hosts", lambda: main(sys.argv[1:])))
