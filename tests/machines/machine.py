"""Virtual machines that share nothing but a network, to test a store on NFS.

Each has Debian's kernel. Its root is an overlay over this machine's root: its writes are private,
and are lost with it. qemu emulates the processor, so the machines run wherever qemu does, but torch
takes minutes to import.
"""

import itertools
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from tests.helpers.waiting import wait_until

ROOT = Path(__file__).parents[2]
KERNEL = ROOT / "outputs" / "machines"  # `make test-machines` unpacks it here
MODULES = ("virtio_pci", "virtio_net", "9p", "9pnet_virtio", "overlay")
SHARE = "trans=virtio,version=9p2000.L,msize=512000"

INIT = f"""#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sysfs /sys; $b mount -t devtmpfs dev /dev
for module in $($b cat /modules/order); do $b insmod /modules/$module; done
$b mount -t 9p -o ro,{SHARE},cache=loose host /host
$b mount -t tmpfs own /own; $b mkdir /own/files /own/work
$b mount -t overlay -o lowerdir=/host,upperdir=/own/files,workdir=/own/work root /root
$b mkdir /root/control; $b mount -t 9p -o {SHARE},cache=none control /root/control
for folder in proc sys dev; do $b mount --move /$folder /root/$folder; done
exec $b switch_root /root /bin/bash /control/boot
"""

BOOT = """
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
export PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
hostname {name}
ln -sfn {kernel}/lib/modules /lib/modules
ip link set lo up; ip link set eth0 up; ip address add 10.0.0.{number}/24 dev eth0
printf '127.0.0.1 localhost\\n{hosts}' > /etc/hosts
cd {root}
touch /control/up
while sleep 0.2; do
    for script in /control/*.sh; do
        [ -e "$script" ] || continue
        run="${{script%.sh}}"
        mv "$script" "$run"
        (bash "$run" > "$run.output" 2>&1; echo $? > "$run.ended"; mv "$run.ended" "$run.code") &
    done
done
"""


def build_initrd(path: Path) -> Path:
    """Build the initial RAM disk, with which the kernel mounts its root."""
    [version] = os.listdir(KERNEL / "lib" / "modules")
    subprocess.run(["depmod", "-b", KERNEL, version], check=True)
    tree = path.with_suffix("")
    for name in ("bin", "modules", "proc", "sys", "dev", "host", "own", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin")
    (tree / "init").write_text(INIT)
    (tree / "init").chmod(0o755)
    command = ["modprobe", "-d", KERNEL, "-S", version, "--show-depends", "-a", *MODULES]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    order = dict.fromkeys(
        line.split()[1] for line in listed.splitlines() if line.startswith("insmod ")
    )
    for module in order:
        shutil.copy(module, tree / "modules")
    (tree / "modules" / "order").write_text("\n".join(Path(module).name for module in order))
    subprocess.run(f"find . | cpio -o -H newc --quiet > {path}", shell=True, cwd=tree, check=True)
    return path


@dataclass
class Machine:
    """A running virtual machine.

    Attributes:
        name: Host name.
        number: Last part of its address, 10.0.0.`number`.
        folder: Folder of the scripts for it, and of their output.
        process: The emulator.
    """

    name: str
    number: int
    folder: Path
    process: subprocess.Popen[bytes]
    count: itertools.count = field(default_factory=itertools.count)

    def start(self, script: str) -> "Running":
        """Start a script on the machine."""
        running = Running(self, self.folder / f"{next(self.count):03}")
        (self.folder / "given").write_text(script)
        (self.folder / "given").rename(running.path.with_suffix(".sh"))
        return running

    def run(self, script: str) -> str:
        """Run a script, which must succeed, and return its output."""
        return self.start(script).wait()

    def start_module(self, module: str, *arguments: str) -> "Running":
        """Start `python -m module`."""
        return self.start(" ".join(map(quote, [sys.executable, "-m", module, *arguments])))

    def cut_off(self) -> None:
        """Stop the machine as a power failure does."""
        self.process.kill()
        self.process.wait()


@dataclass
class Running:
    """A script that a machine runs."""

    machine: Machine
    path: Path

    @property
    def output(self) -> str:
        """The output so far."""
        path = self.path.with_suffix(".output")
        return path.read_text() if path.exists() else ""

    @property
    def code(self) -> int | None:
        """The exit code, or None while the script runs."""
        path = self.path.with_suffix(".code")
        return int(path.read_text()) if path.exists() else None

    def has_ended(self) -> bool:
        """Return True if the script or its machine has ended."""
        return self.code is not None or self.machine.process.poll() is not None

    def wait(self) -> str:
        """Wait for the script, which must succeed, and return its output."""
        wait_until(self.has_ended)
        assert self.code == 0, f"{self.machine.name}: {self.path.read_text()}\n{self.output}"
        return self.output


def start_machines(folder: Path, names: Sequence[str]) -> list[Machine]:
    """Start machines on one network, and return before they have booted."""
    image, [kernel] = build_initrd(folder / "tree.cpio"), (KERNEL / "boot").glob("vmlinuz-*")
    hosts = "".join(f"10.0.0.{number} {name}\\n" for number, name in enumerate(names, 1))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    started = []
    for number, name in enumerate(names, 1):
        control = folder / name
        control.mkdir()
        (control / "boot").write_text(
            BOOT.format(name=name, kernel=KERNEL, number=number, hosts=hosts, root=ROOT)
        )
        command = [
            *("qemu-system-x86_64", "-accel", "tcg", "-cpu", "max"),
            *("-m", "3G", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{control / 'console'}", "-kernel", kernel, "-initrd", image),
            *("-append", "console=ttyS0 quiet panic=-1"),
            *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
            *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
            *("-fsdev", f"local,id=control,path={control},security_model=none"),
            *("-device", "virtio-9p-pci,fsdev=control,mount_tag=control"),
            *("-netdev", f"socket,id=net,mcast=230.0.0.1:{port},localaddr=127.0.0.1"),
            *("-device", f"virtio-net-pci,netdev=net,mac=52:54:00:00:00:{number:02x},romfile="),
        ]
        started.append(Machine(name, number, control, subprocess.Popen(command)))
    return started
