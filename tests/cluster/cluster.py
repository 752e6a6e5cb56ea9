"""A SLURM cluster on one machine, with its daemons and accounting.

Nodes are process namespaces: the processes of a node end with it, as in a power failure. Files and
the network are those of this machine.
"""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.waiting import PATIENCE, wait_until

# A requeued job is held until its credential expires, which takes two minutes by default.
SLURM = """
ClusterName=drill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=3
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[1]}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
"""
NODE = (
    "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} "
    "CPUs=8 RealMemory=64000 Gres=gpu:2\n"
)
GPUS = "Name=gpu File={folder}/gpu[0-1]\n"
ACCOUNTING = """
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports[2]}
StorageUser=slurm
StoragePass=drill
"""


@dataclass
class Cluster:
    """A running cluster, with the daemon of each node."""

    folder: Path
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str) -> str:
        """Run a command of SLURM, which must succeed, and return its output."""
        kw = {"env": self.environment, "capture_output": True, "text": True, "timeout": PATIENCE}
        done = subprocess.run(command, **kw)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def cut_off(self, node: str) -> None:
        """Stop a node as a power failure does."""
        self.nodes[node].kill()
        self.nodes[node].wait()


@contextmanager
def start_cluster(folder: Path, names: Sequence[str]) -> Iterator[Cluster]:
    """Start a cluster, and yield it once all nodes are idle."""
    for name in ("state", "data"):
        (folder / name).mkdir()
    for name in ("gpu0", "gpu1"):
        (folder / name).touch()
    ports = find_free_ports(3 + len(names))
    fields = {"folder": folder, "host": socket.gethostname(), "ports": ports}
    nodes = ""
    for name, port in zip(names, ports[3:], strict=True):
        nodes += NODE.format(name=name, port=port)
    for name, text in (("slurm", SLURM + nodes), ("gres", GPUS), ("slurmdbd", ACCOUNTING)):
        (folder / f"{name}.conf").write_text(text.format(**fields))
    (folder / "slurmdbd.conf").chmod(0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    slurm, running = Cluster(folder), []

    def start(*command: str) -> subprocess.Popen[bytes]:
        name = f"{Path(command[0]).name}-{len(running)}.log"
        with open(folder / name, "w") as log:
            running.append(subprocess.Popen(command, env=slurm.environment, stdout=log, stderr=log))
        return running[-1]

    try:
        options = [
            f"--{name}={folder}/munge.{name.partition('-')[0]}"
            for name in ("key-file", "socket", "pid-file")
        ]
        start("munged", "--foreground", "--force", *options, f"--seed-file={folder}/munge.seed")
        start_database(folder, ports[2], start)
        start("slurmdbd", "-D")
        wait_until(lambda: succeeds("sacctmgr", "-n", "show", "cluster", env=slurm.environment))
        start("slurmctld", "-D", "-c")
        wait_until(lambda: succeeds("scontrol", "ping", env=slurm.environment))
        for name in names:
            inside = f"hostname {name}; exec slurmd -D -N {name}"
            namespace = ["--pid", "--fork", "--kill-child", "--mount-proc", "--uts"]
            slurm.nodes[name] = start("unshare", *namespace, "bash", "-c", inside)
        wait_until(lambda: slurm.run("sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(names)))
        yield slurm
    finally:
        for process in reversed(running):
            process.kill()
            process.wait()


def start_database(folder: Path, port: int, start: Callable[..., object]) -> None:
    """Start MariaDB for the accounting, from which a launcher learns that a job failed."""
    data, at = f"--datadir={folder}/data", f"--socket={folder}/maria.socket"
    options = ["--user=root", data, "--auth-root-authentication-method=normal", "--skip-test-db"]
    subprocess.run(["mariadb-install-db", *options], check=True, capture_output=True)
    where = (f"--port={port}", "--bind-address=127.0.0.1", "--innodb-buffer-pool-size=64M")
    start("mariadbd", "--no-defaults", "--user=root", data, at, *where)
    client = ["mariadb", "--no-defaults", at]
    wait_until(lambda: succeeds(*client, "-e", "select 1"))
    statement = (
        "create user slurm@'127.0.0.1' identified by 'drill'; grant all on *.* to slurm@'127.0.0.1'"
    )
    subprocess.run([*client, "-e", statement], check=True)


def succeeds(*command: str, env: dict[str, str] | None = None) -> bool:
    """Return True if a command succeeds."""
    return subprocess.run(command, env=env, capture_output=True, timeout=PATIENCE).returncode == 0


def find_free_ports(count: int) -> list[int]:
    """Return the numbers of free ports."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    numbers = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return numbers
