from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import until
from tests.machines.machine import Machine, machines

# The lock of a machine that is gone is free after a lease, which is 90 s unless it is said.
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
    """Starts machines of these names. All but the first see its /export as /shared."""
    made: list[Machine] = []

    def start(*names: str) -> list[Machine]:
        made.extend(machines(tmp_path, names))
        for machine in made:
            until((machine.folder / "up").exists, 600)
        server, *others = made
        server.run(SERVE)
        for other in others:
            other.run(MOUNT, 100)
        return made

    yield start
    for machine in made:
        machine.cut_off()
