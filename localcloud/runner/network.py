"""One address and one veth pair for each pod; all that passes between pods is routed by the machine.

There is no bridge: on one, the answer to a Service's address would pass from pod to pod without kube-proxy's rules
seeing it. Nothing survives a kill either: a pair vanishes with the namespace that holds its other end.
"""

from __future__ import annotations

import hashlib
import ipaddress
import subprocess
import threading
from pathlib import Path

CIDR = "192.168.128.0/17"  # of the cluster's 192.168.0.0/16; KWOK's pods take theirs from the beginning of it
FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


class NetworkError(RuntimeError):
    """`ip` refused; the text is its own."""


class Network:
    """A context manager: hands out the addresses of `cidr` (the first is the gateway's) and wires pods up.

    While it is entered, IPv4 forwarding is on in the network namespace that it runs in.
    """

    def __init__(self, cidr: str = CIDR) -> None:
        self._hosts = ipaddress.ip_network(cidr)
        self.gateway = str(self._hosts[1])
        self._taken: dict[str, str] = {}
        self._next = 2
        self._lock = threading.Lock()

    def __enter__(self) -> Network:
        self._forwarded = FORWARD.read_text().strip()
        FORWARD.write_text("1")
        return self

    def __exit__(self, *_: object) -> None:
        FORWARD.write_text(self._forwarded)

    def attach(self, uid: str, pid: int) -> str:
        """Give the network namespace of process `pid` its loopback, its `eth0` and an address, which is returned."""
        with self._lock:
            address = self._free()
            self._taken[uid] = address
        name = _interface(uid)
        try:
            _ip(
                f"link add {name} type veth peer name eth0 netns {pid}",
                f"addr add {self.gateway}/32 dev {name}",
                f"link set {name} up",
                f"route add {address}/32 dev {name} src {self.gateway}",
            )
            _ip(
                "link set lo up",
                f"addr add {address}/32 dev eth0",
                "link set eth0 up",
                f"route add {self.gateway}/32 dev eth0 scope link",
                f"route add default via {self.gateway} dev eth0",
                namespace_of=pid,
            )
        except NetworkError:
            self.detach(uid)
            raise
        return address

    def detach(self, uid: str) -> None:
        """Free the pod's address; its interface goes at once, its namespace when its last process does."""
        with self._lock:
            if self._taken.pop(uid, None) is None:
                return
        subprocess.run(["ip", "link", "delete", _interface(uid)], capture_output=True, check=False)

    def _free(self) -> str:
        """The next one in turn: an address is not used again soon, when others still remember who had it."""
        taken = set(self._taken.values())
        for _ in range(self._hosts.num_addresses):
            address = str(self._hosts[self._next])
            self._next = self._next + 1 if self._next < self._hosts.num_addresses - 2 else 2
            if address not in taken:
                return address
        raise NetworkError(f"{self._hosts}: no address is free")


def _interface(uid: str) -> str:
    return "pod" + hashlib.sha256(uid.encode()).hexdigest()[:10]  # the kernel takes 15 characters


def _ip(*lines: str, namespace_of: int | None = None) -> None:
    enter = [] if namespace_of is None else ["nsenter", f"--net=/proc/{namespace_of}/ns/net"]
    done = subprocess.run([*enter, "ip", "-batch", "-"], input="\n".join(lines), capture_output=True, text=True)
    if done.returncode != 0:
        raise NetworkError(f"ip: {done.stderr.strip()}")
