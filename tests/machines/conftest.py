"""A network of virtual machines with a store on NFS."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.waiting import wait_until
from tests.machines.machine import Machine, start_machines

# The lock of a lost machine becomes free after a lease, which is 90 s by default.
SERVE = """
mkdir -p /export && mount -t tmpfs export /export && chmod 777 /export
modprobe nfsd && mount -t nfsd nfsd /proc/fs/nfsd
echo 10 > /proc/fs/nfsd/nfsv4leasetime; echo 10 > /proc/fs/nfsd/nfsv4gracetime
exportfs -o rw,no_root_squash,fsid=0,insecure '*:/export'
rpc.mountd -N 3 && rpc.nfsd -N 3 -H 0.0.0.0 4
"""
MOUNT = "mkdir -p /shared && mount -t nfs4 server:/ /shared"

Network = Callable[..., list[Machine]]


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """A function that starts machines of these names.

    The first is an NFS server; the others mount its /export as /shared.
    """
    started: list[Machine] = []

    def start(*names: str) -> list[Machine]:
        started.extend(start_machines(tmp_path, names))
        for machine in started:
            wait_until((machine.folder / "up").exists)
        server, *others = started
        server.run(SERVE)
        for other in others:
            other.run(MOUNT, 100)
        return started

    yield start
    for machine in started:
        machine.cut_off()
