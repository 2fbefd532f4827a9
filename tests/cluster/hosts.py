"""Hosts of our own on this machine: network namespaces joined by a switch, with names, addresses and processes apart.

A host's processes share a process namespace: when its first one is killed, all of them are gone, as when a machine
loses power. Its own mount namespace lets it see other files under the same path.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
PORT = 29400


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@dataclass
class Host:
    """One host, named `host-a`, `host-b`, ..., at 10.77.0.1, .2, ..."""

    network: Network
    number: int
    folder: Path  # for its /etc/hosts and what its processes print
    process: subprocess.Popen[bytes] | None = None
    names: dict[str, str] = field(default_factory=dict)  # its /etc/hosts: addresses by name
    mounts: dict[Path, Path] = field(default_factory=dict)  # what it sees in place of a folder
    started: int = 0

    @property
    def name(self) -> str:
        return f"host-{'abc'[self.number]}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number + 1}"

    @property
    def namespace(self) -> str:
        return self.network.namespace(self.name)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}-{self.started}.log"

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def start(self, words: Sequence[str]) -> None:
        """Starts a program, which sees this host alone."""
        self.started += 1
        hosts = self.folder / f"{self.name}.hosts"
        names = {"localhost": "127.0.0.1", **self.names}
        hosts.write_text("".join(f"{address} {name}\n" for name, address in names.items()))
        # Without a name server, questions about names are answered at once.
        mounts = {Path("/etc/hosts"): hosts, Path("/etc/resolv.conf"): Path("/dev/null"), **self.mounts}
        script = "".join(f"mount --bind '{real}' '{seen}' && " for seen, real in mounts.items())
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "--pid", "--fork"]
        enter += ["--kill-child", "--mount-proc", "sh", "-c", f'{script} hostname {self.name} && exec "$@"', "sh"]
        own = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "SLOW_STEPS": str(self.network.slow_steps)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*enter, *words],
                env={**os.environ, **own},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def torchrun(self, nodes: str, *words: str, options: Sequence[str] = (), meet_at: str | None = None) -> None:
        """Starts torchrun with one rank of `torchmae`; the hosts meet at the first one."""
        run = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", "--nproc-per-node=1"]
        run += ["--rdzv-backend=c10d", f"--rdzv-endpoint={meet_at or self.network.hosts[0].address}:{PORT}", *options]
        self.start([*run, str(HERE / "job.py"), *words])

    def kill(self) -> None:
        """SIGKILL of every process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def wait(self, seconds: float) -> int:
        """The exit status, within so many seconds."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {seconds:g} s\n{self.network.stacks()}") from None

    def processes(self) -> list[str]:
        return ip("netns", "pids", self.namespace).split()


class Network:
    """Hosts and the switch between them."""

    def __init__(self, count: int, folder: Path) -> None:
        self.slow_steps = folder / "slow-steps"  # if it exists, a step takes so many seconds
        self.hosts = [Host(self, number, folder) for number in range(count)]
        names = {host.name: host.address for host in self.hosts}
        for host in self.hosts:
            host.names = dict(names)

    def namespace(self, name: str) -> str:
        return f"torchmae-{os.getpid()}-{name}"

    def plug(self, host: Host, connected: bool) -> None:
        """Pulls the host's cable out of the switch, or puts it back."""
        ip("-n", self.namespace("switch"), "link", "set", host.name, "up" if connected else "down")

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        """Returns once a condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.said()
            time.sleep(0.05)

    def said(self) -> str:
        return "\n".join(f"{host.name}:\n{host.said()}" for host in self.hosts)

    def stacks(self) -> str:
        """What each host printed, and where its processes are: ends them, the first process of a host last."""
        for process in sorted((int(number) for host in self.hosts for number in host.processes()), reverse=True):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGABRT)
            time.sleep(0.2)
        return self.said()


@contextmanager
def network(count: int, folder: Path, *, slow: bool = False) -> Iterator[Network]:
    """Hosts joined by a switch; `slow`: two, by a line that delays and loses packets."""
    made = Network(count, folder)
    switch = made.namespace("switch")
    with ExitStack() as stack:

        def add(namespace: str) -> None:
            ip("netns", "add", namespace)
            stack.callback(ip, "netns", "del", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")

        add(switch)
        if not slow:
            ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", switch, "link", "set", "bridge", "up")
        for host in made.hosts:
            add(host.namespace)
            stack.callback(host.kill)
            ip("-n", switch, "link", "add", host.name, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.namespace, "link", "set", "eth0", "up")
            if not slow:
                ip("-n", switch, "link", "set", host.name, "master", "bridge")
            made.plug(host, True)
        if slow:
            line = [sys.executable, str(HERE / "forward.py"), *(host.name for host in made.hosts)]
            forwarder = subprocess.Popen(["ip", "netns", "exec", switch, *line])
            stack.callback(forwarder.wait)
            stack.callback(forwarder.kill)
        yield made
