"""A store on NFS that machines share: no lock outlives its holder, and no unit is made twice."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from fp4dit.store.store import Store
from tests.helpers.waiting import wait_until
from tests.machines.conftest import Network
from tests.machines.job import COUNT, unit_content
from tests.machines.machine import Machine, Running


def start_job(machine: Machine, key: str, seconds: float) -> Running:
    """Start a job on the shared store."""
    return machine.start_module("tests.machines.job", "/shared", key, str(seconds))


def list_units(jobs: Iterable[Running]) -> list[int]:
    """Return the numbers of the units that the jobs made."""
    numbers = []
    for running in jobs:
        for line in running.output.splitlines():
            if line.startswith("made "):
                numbers.append(int(line.split()[1]))
    return numbers


def check_store(server: Machine, folder: Path, keys: Sequence[str]) -> None:
    """Check that all entries are complete and intact, and that nothing else is left."""
    server.run("tar cf /control/stage.tar -C /export stage")
    with tarfile.open(fileobj=io.BytesIO((server.folder / "stage.tar").read_bytes())) as tar:
        tar.extractall(folder, filter="data")
    for key in keys:
        assert Store(folder).find_damaged_files(out := folder / "stage" / key) == []
        assert [path.read_bytes() for path in sorted(out.glob("*.bin"))] == [
            unit_content(i) for i in range(COUNT)
        ]
    left = {path.name for path in (folder / "stage").iterdir()}
    assert {name for name in left if name not in keys} <= {
        f"{key}{end}" for key in keys for end in ENDS
    }


# The lock of a killed process stays, unlocked, with the note of its holder.
ENDS = {".lock", *(f".{number:02}.lock{end}" for number in range(COUNT) for end in ("", ".json"))}


def test_machines_share_a_stage_and_make_nothing_twice(network: Network, tmp_path: Path):
    server, *others = network("server", "one", "two")
    keys = [f"key{i}" for i in range(10)]
    for key in keys:
        jobs = [start_job(machine, key, 0.2) for machine in others]
        for running in jobs:
            running.wait()
        assert sorted(list_units(jobs)) == list(range(COUNT))
        assert all(list_units([running]) for running in jobs)
    check_store(server, tmp_path, keys)


def test_a_killed_process_and_a_lost_machine_are_replaced(network: Network, tmp_path: Path):
    """One of three processes is killed while the others wait for it; then the machine of the one
    that takes over loses its power.
    """
    server, *others = network("server", "one", "two", "three")
    by_name = {machine.name: machine for machine in others}
    jobs = {machine.name: start_job(machine, "key", 5) for machine in others}
    all_jobs = list(jobs.values())

    def find_holder(units_before: int) -> dict | None:
        """Return the holder of the stage once the others wait for it and there is a new unit."""
        text = server.run("cat /export/stage/key.lock.json || true").partition("}")
        holder = json.loads(text[0] + "}") if text[1] else {"host": None}
        others = [running.output for name, running in jobs.items() if name != holder["host"]]
        if len(others) == len(jobs) or len(list_units(all_jobs)) <= units_before:
            return None
        message = f"waiting for process {holder['pid']} on"
        return holder if all(message in output for output in others) else None

    killed = wait_until(lambda: find_holder(0))
    by_name[killed["host"]].run(f"kill -9 {killed['pid']}")
    del jobs[killed["host"]]
    before = len(list_units(all_jobs))
    gone = wait_until(lambda: find_holder(before))
    by_name[gone["host"]].cut_off()
    del jobs[gone["host"]]
    [last] = jobs.values()
    last.wait()
    assert sorted(list_units(all_jobs)) == list(range(COUNT))
    check_store(server, tmp_path, ["key"])
