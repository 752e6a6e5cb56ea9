"""One store on NFS, as machines of a cluster have it: no lock outlives who held it, and nothing is made twice."""

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from fp4dit.store import Store
from tests.conftest import until
from tests.machines.conftest import Network
from tests.machines.job import COUNT, content
from tests.machines.machine import Machine, Running


def job(machine: Machine, key: str, seconds: float) -> Running:
    return machine.python("tests.machines.job", "/shared", key, str(seconds))


def made(jobs: Iterable[Running]) -> list[int]:
    return [int(line.split()[1]) for one in jobs for line in one.said.splitlines() if line.startswith("made ")]


def check(server: Machine, folder: Path, keys: Sequence[str]) -> None:
    """That all is there, whole, and nothing else, whatever happened."""
    server.run("tar cf /control/stage.tar -C /export stage")
    with tarfile.open(fileobj=io.BytesIO((server.folder / "stage.tar").read_bytes())) as tar:
        tar.extractall(folder, filter="data")
    for key in keys:
        assert Store(folder).damaged(out := folder / "stage" / key) == []
        assert [path.read_bytes() for path in sorted(out.glob("*.bin"))] == [content(i) for i in range(COUNT)]
    left = {path.name for path in (folder / "stage").iterdir()}
    assert {name for name in left if name not in keys} <= {f"{key}{end}" for key in keys for end in ENDS}


# Of who was killed the lock stays, which is nobody's, and the note of who held it.
ENDS = {".lock", *(f".{number:02}.lock{end}" for number in range(COUNT) for end in ("", ".json"))}


def test_machines_share_a_stage_and_make_nothing_twice(network: Network, tmp_path: Path):
    server, *others = network("server", "one", "two")
    keys = [f"key{i}" for i in range(10)]
    for key in keys:
        jobs = [job(machine, key, 0.2) for machine in others]
        for running in jobs:
            running.wait()
        assert sorted(made(jobs)) == list(range(COUNT))
        assert all(made([running]) for running in jobs)
    check(server, tmp_path, keys)


def test_a_process_that_is_killed_and_a_machine_that_is_gone_are_replaced(network: Network, tmp_path: Path):
    """One of three is killed while the others wait for it; then the machine of who goes on loses its power."""
    server, *others = network("server", "one", "two", "three")
    by_name = {machine.name: machine for machine in others}
    jobs = {machine.name: job(machine, "key", 5) for machine in others}
    begun = list(jobs.values())

    def holder(made_before: int) -> dict | None:
        """Who makes the stage, once all others say that they wait for it and there is one unit more."""
        found = server.run("cat /export/stage/key.lock.json || true").partition("}")
        who = json.loads(found[0] + "}") if found[1] else {"host": None}
        others = [running.said for name, running in jobs.items() if name != who["host"]]
        waited = len(others) < len(jobs) and all(f"waiting for process {who['pid']} on" in said for said in others)
        return who if waited and len(made(begun)) > made_before else None

    killed = until(lambda: holder(0), 600)
    by_name[killed["host"]].run(f"kill -9 {killed['pid']}")
    del jobs[killed["host"]]
    before = len(made(begun))
    gone = until(lambda: holder(before), 600)
    by_name[gone["host"]].cut_off()
    del jobs[gone["host"]]
    [last] = jobs.values()
    last.wait()
    assert sorted(made(begun)) == list(range(COUNT))
    check(server, tmp_path, ["key"])
