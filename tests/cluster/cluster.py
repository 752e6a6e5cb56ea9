"""A SLURM cluster on one machine: its own daemons, accounting included, and nodes that are namespaces of processes.

What a node runs ends with it, as if its power failed. Files and the network are this machine's.
"""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import until

# A job that is queued again is held until what it was admitted with expires, which are two minutes unless it is said.
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
NODE = "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=64000 Gres=gpu:2\n"
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
    folder: Path
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """What a command of SLURM says; it has to succeed."""
        kw = {"env": self.environment, "capture_output": True, "text": True, "timeout": 60}
        done = subprocess.run(command, **kw)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def cut_off(self, node: str) -> None:
        """As if its power failed."""
        self.nodes[node].kill()
        self.nodes[node].wait()


@contextmanager
def cluster(folder: Path, names: Sequence[str]) -> Iterator[Cluster]:
    """With these nodes, which are up."""
    for name in ("state", "data"):
        (folder / name).mkdir()
    for name in ("gpu0", "gpu1"):
        (folder / name).touch()
    fields = {"folder": folder, "host": socket.gethostname(), "ports": ports(3 + len(names))}
    nodes = "".join(NODE.format(name=name, port=port) for name, port in zip(names, fields["ports"][3:], strict=True))
    for name, text in (("slurm", SLURM + nodes), ("gres", GPUS), ("slurmdbd", ACCOUNTING)):
        (folder / f"{name}.conf").write_text(text.format(**fields))
    (folder / "slurmdbd.conf").chmod(0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    made, running = Cluster(folder), []

    def start(*command: str) -> subprocess.Popen[bytes]:
        name = f"{Path(command[0]).name}-{len(running)}.log"
        with open(folder / name, "w") as log:
            running.append(subprocess.Popen(command, env=made.environment, stdout=log, stderr=log))
        return running[-1]

    try:
        own = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in ("key-file", "socket", "pid-file")]
        start("munged", "--foreground", "--force", *own, f"--seed-file={folder}/munge.seed")
        database(folder, fields["ports"][2], start)
        start("slurmdbd", "-D")
        until(lambda: answers("sacctmgr", "-n", "show", "cluster", env=made.environment))
        start("slurmctld", "-D", "-c")
        until(lambda: answers("scontrol", "ping", env=made.environment))
        for name in names:
            inside = f"hostname {name}; exec slurmd -D -N {name}"
            apart = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "bash", "-c")
            made.nodes[name] = start(*apart, inside)
        until(lambda: made.ask("sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(names)))
        yield made
    finally:
        for process in reversed(running):
            process.kill()
            process.wait()


def database(folder: Path, port: int, start: Callable[..., object]) -> None:
    """MariaDB, for accounting, which is what tells a launcher that a job failed."""
    data, at = f"--datadir={folder}/data", f"--socket={folder}/maria.socket"
    own = ["--user=root", data, "--auth-root-authentication-method=normal", "--skip-test-db"]
    subprocess.run(["mariadb-install-db", *own], check=True, capture_output=True)
    where = (f"--port={port}", "--bind-address=127.0.0.1", "--innodb-buffer-pool-size=64M")
    start("mariadbd", "--no-defaults", "--user=root", data, at, *where)
    client = ["mariadb", "--no-defaults", at]
    until(lambda: answers(*client, "-e", "select 1"))
    give = "create user slurm@'127.0.0.1' identified by 'drill'; grant all on *.* to slurm@'127.0.0.1'"
    subprocess.run([*client, "-e", give], check=True)


def answers(*command: str, env: dict[str, str] | None = None) -> bool:
    return subprocess.run(command, env=env, capture_output=True, timeout=60).returncode == 0


def ports(count: int) -> list[int]:
    """Free ones."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return found
