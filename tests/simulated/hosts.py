"""Hosts simulated on one machine: namespaces of network, processes, mounts, names and IPC, on a bridge of their own.

Each host has its own address, its own process tree, its own /tmp, /run, /dev/shm and homes, and sshd. The
interpreter and the project are bound into it; nothing else of the temporary folders or of root's home is.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

NEEDS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "rsync")
PROJECT = Path(__file__).resolve().parents[2]
OWN = ("/tmp", "/run", "/dev/shm", "/root", "/home")

SCRIPT = """
set -e
mount -t tmpfs tmpfs /mnt
i=0
for path in {kept}; do i=$((i + 1)); mkdir /mnt/$i; mount --rbind "$path" /mnt/$i; done
for path in {own}; do mount -t tmpfs tmpfs $path; done
i=0
for path in {kept}; do i=$((i + 1)); mkdir -p "$path"; mount --rbind /mnt/$i "$path"; done
hostname {name}
mkdir -p -m 700 /root/.ssh /run/sshd
cp {keys}/id_ed25519 {keys}/id_ed25519.pub /root/.ssh/
cp {keys}/id_ed25519.pub /root/.ssh/authorized_keys
exec {sshd} -D -e -f /dev/null -h {keys}/id_ed25519 -o UsePAM=no -o StrictModes=no -o PermitRootLogin=yes
"""


def missing() -> str | None:
    """Why hosts cannot be simulated here; None if they can."""
    if os.geteuid() != 0:
        return "simulated hosts need root"
    absent = [tool for tool in NEEDS if shutil.which(tool) is None]
    if absent:
        return f"simulated hosts need {', '.join(absent)} (Debian: iproute2, util-linux, openssh-server, rsync)"
    tried = subprocess.run(
        ["unshare", "-m", "-p", "-f", "-u", "-i", "-n", "--mount-proc", "true"], capture_output=True, text=True
    )
    return f"namespaces are not permitted here: {tried.stderr.strip()}" if tried.returncode else None


class Hosts:
    """Hosts ``names``, the first at 10.77.0.1, the second at 10.77.0.2, and so on.

    Args:
        names: Their names.
        folder: For keys and logs; all of the hosts see it.
    """

    def __init__(self, names: list[str], folder: Path) -> None:
        self.names, self.folder = names, folder
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
        self._space = f"distmeta{os.getpid()}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._inside: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "id_ed25519")], check=True
            )
            self._ip(f"netns add {self._space}")
            self._ip(f"-n {self._space} link add bridge type bridge")
            self._ip(f"-n {self._space} link set bridge up")
            for number, name in enumerate(self.names, 1):
                self._start(number, name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, number: int, name: str) -> None:
        space = f"{self._space}{number}"
        self._ip(f"netns add {space}")
        self._ip(f"link add eth0 netns {space} type veth peer name port{number} netns {self._space}")
        self._ip(f"-n {self._space} link set port{number} master bridge up")
        self._ip(f"-n {space} address add {self.addresses[name]}/24 dev eth0")
        for device in ("lo", "eth0"):
            self._ip(f"-n {space} link set {device} up")
        kept = dict.fromkeys(str(Path(p).resolve()) for p in (PROJECT, sys.prefix, sys.base_prefix, self.folder))
        script = SCRIPT.format(
            kept=" ".join(map(shlex.quote, kept)), own=" ".join(OWN), name=name, keys=shlex.quote(str(self.folder)),
            sshd=shutil.which("sshd"),
        )  # fmt: skip
        command = ["ip", "netns", "exec", space, "unshare", "-m", "-p", "-f", "-u", "-i", "--mount-proc"]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen([*command, "sh", "-c", script], stdout=log, stderr=log)
        self._processes[name] = process
        deadline = time.monotonic() + 30
        while "Server listening" not in (self.folder / f"{name}.log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        self._inside[name] = int(children[0])

    def popen(self, name: str, command: str, **environment: str) -> subprocess.Popen[str]:
        """Starts a shell command on a host, in the project's folder, with the interpreter's programs on its path."""
        inside = ["nsenter", "-t", str(self._inside[name]), "-m", "-p", "-u", "-i", "-n", f"--wd={PROJECT}"]
        own = {"HOME": "/root", "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "LC_ALL": "C.UTF-8", "USER": "root"}
        return subprocess.Popen(
            [*inside, "sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=own | environment,
        )  # fmt: skip

    def run(self, name: str, command: str, timeout: float = 120, **environment: str) -> str:
        """Runs a shell command on a host; returns all that it prints."""
        process = self.popen(name, command, **environment)
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"{command!r} on {name} has not ended: {process.communicate()[0]}") from None
        assert process.returncode == 0, f"{command!r} on {name} has exited with {process.returncode}: {said}"
        return said

    def link(self, name: str, state: str) -> None:
        """Pulls the cable of a host (``down``) or puts it back (``up``)."""
        self._ip(f"-n {self._space} link set port{self.names.index(name) + 1} {state}")

    def __exit__(self, *exception: object) -> None:
        for process in self._processes.values():
            process.kill()  # unshare; with it the first process of the host, and so all of them
        for pid in self._inside.values():
            subprocess.run(["kill", "-9", str(pid)], capture_output=True)
        for process in self._processes.values():
            process.wait()
        for number in range(len(self.names), -1, -1):
            subprocess.run(["ip", "netns", "del", f"{self._space}{number or ''}"], capture_output=True)

    def _ip(self, arguments: str) -> None:
        subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)
