"""Entries that travel arrive as they were; whatever else an archive may hold is refused before anything is written."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fp4dit import archive
from fp4dit.errors import UserError
from fp4dit.store import Store, fingerprint, sealed
from fp4dit.stored import contents

STAGES = ["capture", "score"]
MANIFEST = {"config": {"steps": 3}, "needs": {}}
KEY = fingerprint({"steps": 3, "needs": {}})


def fill(out: Path) -> None:
    (out / "calls").mkdir()
    (out / "calls" / "0").write_bytes(bytes(range(256)) * 10)
    (out / "notes.json").write_text("{}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "here")
    store.get("capture", KEY, fill, MANIFEST)
    return store


@pytest.fixture
def packed(store: Store, tmp_path: Path) -> Path:
    archive.export(contents(store.root), store, tmp_path / "all.tar")
    return tmp_path / "all.tar"


def test_what_is_exported_arrives_and_is_only_added_once(store: Store, packed: Path, tmp_path: Path):
    there = Store(tmp_path / "there")
    draft = there.path("capture", f"{KEY}.draft")  # of a job that was killed
    (draft / "calls").mkdir(parents=True)
    (draft / "calls" / "other").write_text("")
    assert archive.load(packed, there, STAGES) == {f"capture/{KEY}": True}
    assert archive.load(packed, there, STAGES) == {f"capture/{KEY}": False}
    bytes_of = lambda s: {p.relative_to(s.root): p.read_bytes() for p in s.root.rglob("*") if p.is_file()}
    assert bytes_of(there) == bytes_of(store)
    assert Store(tmp_path / "there").find("capture", KEY)


def test_a_damaged_entry_is_mended_and_not_exported(store: Store, packed: Path, tmp_path: Path):
    (store.path("capture", KEY) / "notes.json").write_text("[]")
    with pytest.raises(UserError, match=r"is damaged: notes.json"):
        archive.export(contents(store.root), store, tmp_path / "more.tar")
    assert not (tmp_path / "more.tar").exists()
    assert archive.load(packed, Store(store.root), STAGES) == {f"capture/{KEY}": True}
    assert Store(store.root).find("capture", KEY)


def test_an_import_that_breaks_off_leaves_no_half_of_a_file(packed: Path, tmp_path: Path, monkeypatch):
    there, pieces = Store(tmp_path / "there"), archive.pieces

    def breaks(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
        [whole] = pieces(tar, member)
        yield whole[: len(whole) // 2]
        if there.path("capture", f"{KEY}.draft").exists():  # else it is only being checked
            raise OSError("No space left on device")
        yield whole[len(whole) // 2 :]

    monkeypatch.setattr(archive, "pieces", breaks)
    with pytest.raises(OSError, match="No space left"):
        archive.load(packed, there, STAGES)
    assert [path for path in there.root.rglob("*") if path.is_file() and "lock" not in path.name] == []


Members = list[tuple[tarfile.TarInfo, bytes]]


def rewritten(path: Path, change: Callable[[Members], Members | None]) -> Path:
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # pyright: ignore
    members = change(members) or members
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def renamed(name: str) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[-1][0].name = name

    return change


def of_type(kind: bytes) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[-1][0].type, members[-1][0].linkname = kind, "/etc/passwd"

    return change


def manifest(**values: object) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        told = {**json.loads(members[0][1]), **values}
        return [(members[0][0], json.dumps({**told, "sha256": sealed(told)}).encode()), *members[1:]]

    return change


FILE = {"bytes": 1, "sha256": "0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed(f"capture/{KEY}/../../../notes.json"), "called stage/key/file"),
        (renamed(f"/capture/{KEY}/notes.json"), "called stage/key/file"),
        (renamed(f"capture/{KEY}/./notes.json"), "called stage/key/file"),
        (renamed(f"capture/{KEY}/notes\\x.json"), "called stage/key/file"),
        (renamed("capture/notes.json"), "called stage/key/file"),
        (renamed("capture/../notes.json"), "called stage/key/file"),
        (renamed(f"elsewhere/{KEY}/notes.json"), "no stage is called 'elsewhere'; there are capture, score"),
        (renamed(f"capture/{KEY[::-1]}/notes.json"), "of each entry the manifest comes first"),
        (renamed(f"capture/{KEY}/new.json"), "not what the manifest of its entry says"),
        (of_type(tarfile.SYMTYPE), "no plain file"),
        (of_type(tarfile.LNKTYPE), "no plain file"),
        (of_type(tarfile.CHRTYPE), "no plain file"),
        (of_type(tarfile.FIFOTYPE), "no plain file"),
        (of_type(tarfile.DIRTYPE), "no plain file"),
        (lambda m: m[:-1], "the archive lacks"),
        (lambda m: [*m, m[-1]], "or there twice"),
        (lambda m: m[::-1], "the manifest comes first"),
        (lambda m: [*m[:-1], (m[-1][0], b"[]")], "not what the manifest of its entry says"),
        (lambda m: [*m[:-1], (m[-1][0], b"{} ")], "not what the manifest of its entry says"),
        (lambda m: [(m[0][0], m[0][1].replace(b'"steps": 3', b'"steps": 4')), *m[1:]], "not the manifest"),
        (lambda m: [(m[0][0], m[0][1].replace(b'"created": "2', b'"created": "3')), *m[1:]], "not the manifest"),
        (lambda m: [(m[0][0], b"[" * 100_000), *m[1:]], "not the manifest"),
        (lambda m: [(m[0][0], b"[]"), *m[1:]], "not the manifest"),
        (manifest(stage="score"), "not the manifest"),
        (manifest(files={"a": FILE, "a/b": FILE}), "not the manifest"),
        (manifest(files={"manifest.json": FILE}), "not the manifest"),
    ],
)
def test_what_is_no_entry_is_refused_and_nothing_written(
    packed: Path, tmp_path: Path, change: Callable[[Members], Members | None], message: str
):
    rewritten(packed, change)
    with pytest.raises(UserError, match=message):
        archive.load(packed, Store(tmp_path / "there"), STAGES)
    assert not (tmp_path / "there").exists()


def test_no_byte_of_an_archive_can_change_unseen(packed: Path, tmp_path: Path):
    """Every 97th of them has a bit flipped: refused, or, in the padding and in what we do not read, of no effect."""
    intact, there = packed.read_bytes(), tmp_path / "there"
    for i in range(0, len(intact), 97):
        packed.write_bytes(intact[:i] + bytes([intact[i] ^ 1 << i % 8]) + intact[i + 1 :])
        try:
            archive.load(packed, Store(there / str(i)), STAGES)
        except UserError:
            assert not (there / str(i)).exists()
        else:
            assert Store(there / str(i)).find("capture", KEY)


@pytest.mark.parametrize("length", [0, 100, 512, 3000])
def test_a_truncated_archive_is_refused(packed: Path, tmp_path: Path, length: int):
    packed.write_bytes(packed.read_bytes()[:length])
    with pytest.raises(UserError, match="archive"):
        archive.load(packed, Store(tmp_path / "there"), STAGES)
    assert not (tmp_path / "there").exists()
