"""Two nodes of a cluster on this machine, each with its own network where the kernel lets us, and torchrun on both.

    done = torchrun_on_two_nodes("launch/distill.py", "recipe=quickstart", processes_per_node=2)

The nodes are network namespaces joined by a pair of virtual interfaces, as two machines are by a cable: what one of
them calls localhost is not the other's. That takes root; without, both agents stand on the machine's own network.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from support.door import ROOT, environment
from support.patience import LOOK_SECONDS, Patience, end


@dataclass(frozen=True)
class Node:
    address: str
    interface: str
    enter: tuple[str, ...] = ()
    """What a command on this node begins with."""


@dataclass(frozen=True)
class Agent:
    """What a node's torchrun came to."""

    code: int
    screen: str


def torchrun_on_two_nodes(
    *command: str, processes_per_node: int, variables: dict[str, str] | None = None
) -> list[Agent]:
    """Run a script under one torchrun a node, as `srun --nodes=2 --ntasks-per-node=1 torchrun ...` does."""
    with two_nodes() as nodes, contextlib.ExitStack() as stack:
        port = "29400" if nodes[0].enter else str(_free_port())
        agents = []
        for number, node in enumerate(nodes):
            launcher = ["--nnodes=2", f"--nproc-per-node={processes_per_node}", "--rdzv-backend=c10d", "--rdzv-id=two"]
            launcher += [f"--rdzv-endpoint={nodes[0].address}:{port}", f"--local-addr={node.address}"]
            launcher.append(f"--rdzv-conf=is_host={int(number == 0)}")  # no name service says so here
            process = subprocess.Popen(
                [*node.enter, sys.executable, "-m", "torch.distributed.run", *launcher, *command],
                env=environment() | {"GLOO_SOCKET_IFNAME": node.interface} | (variables or {}),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            stack.callback(end, process)
            agents.append(process)
        patience = Patience([agent.pid for agent in agents])
        screens = []
        for agent in agents:
            while True:
                try:
                    screens.append(agent.communicate(timeout=LOOK_SECONDS)[0])
                    break
                except subprocess.TimeoutExpired:
                    assert not patience.over(), f"the nodes hang: {command}"
        return [Agent(agent.returncode, screen) for agent, screen in zip(agents, screens, strict=True)]


@contextlib.contextmanager
def two_nodes() -> Iterator[list[Node]]:
    names = [f"minitron{os.getpid()}-{number}" for number in range(2)]
    interfaces = [f"mn{os.getpid()}-{number}" for number in range(2)]
    addresses = ["10.231.7.1", "10.231.7.2"]
    with contextlib.ExitStack() as stack:
        if not _joined(names, interfaces, addresses, stack):
            yield [Node("127.0.0.1", "lo")] * 2
            return
        yield [
            Node(address, interface, ("ip", "netns", "exec", name))
            for name, interface, address in zip(names, interfaces, addresses, strict=True)
        ]


def _joined(names: list[str], interfaces: list[str], addresses: list[str], stack: contextlib.ExitStack) -> bool:
    """Whether the two networks stand; `stack` takes them away."""
    if shutil.which("ip") is None:
        return False
    for name in names:
        if not _ip("netns", "add", name):
            return False
        stack.callback(_ip, "netns", "del", name)
    ends = [["netns", name, "name", interface] for name, interface in zip(names, interfaces, strict=True)]
    if not _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1]):
        return False
    return all(
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
        and _ip("-n", name, "link", "set", interface, "up")
        and _ip("-n", name, "link", "set", "lo", "up")
        for name, interface, address in zip(names, interfaces, addresses, strict=True)
    )


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True).returncode == 0


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
