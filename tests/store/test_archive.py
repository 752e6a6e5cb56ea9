"""Entries are the same after export and import, and any other archive is refused unwritten."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fp4dit.store import archive
from fp4dit.store.entries import list_entries
from fp4dit.store.manifest import compute_key, manifest_digest
from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError

STAGES = ["capture", "score"]
MANIFEST = {"config": {"steps": 3}, "needs": {}}
KEY = compute_key({"steps": 3, "needs": {}})


def fill(out: Path) -> None:
    (out / "calls").mkdir()
    (out / "calls" / "0").write_bytes(bytes(range(256)) * 10)
    (out / "notes.json").write_text("{}")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "here")
    store.get_or_make("capture", KEY, fill, MANIFEST)
    return store


@pytest.fixture
def packed(store: Store, tmp_path: Path) -> Path:
    archive.export_entries(list_entries(store.root), store, tmp_path / "all.tar")
    return tmp_path / "all.tar"


def test_an_exported_entry_is_imported_once(store: Store, packed: Path, tmp_path: Path):
    there = Store(tmp_path / "there")
    draft = there.get_path("capture", f"{KEY}.draft")  # of a job that was killed
    (draft / "calls").mkdir(parents=True)
    (draft / "calls" / "other").write_text("")
    assert archive.import_entries(packed, there, STAGES) == {f"capture/{KEY}": True}
    assert archive.import_entries(packed, there, STAGES) == {f"capture/{KEY}": False}
    bytes_of = lambda s: {
        p.relative_to(s.root): p.read_bytes() for p in s.root.rglob("*") if p.is_file()
    }
    assert bytes_of(there) == bytes_of(store)
    assert Store(tmp_path / "there").find_entry("capture", KEY)


def test_a_damaged_entry_is_mended_and_not_exported(store: Store, packed: Path, tmp_path: Path):
    (store.get_path("capture", KEY) / "notes.json").write_text("[]")
    with pytest.raises(UserError, match=r"is damaged: notes.json"):
        archive.export_entries(list_entries(store.root), store, tmp_path / "more.tar")
    assert not (tmp_path / "more.tar").exists()
    assert archive.import_entries(packed, Store(store.root), STAGES) == {f"capture/{KEY}": True}
    assert Store(store.root).find_entry("capture", KEY)


def test_an_import_that_fails_leaves_no_partial_file(packed: Path, tmp_path: Path, monkeypatch):
    there, pieces = Store(tmp_path / "there"), archive.iter_chunks

    def breaks(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
        [whole] = pieces(tar, member)
        yield whole[: len(whole) // 2]
        if there.get_path("capture", f"{KEY}.draft").exists():  # else it is only being checked
            raise OSError("No space left on device")
        yield whole[len(whole) // 2 :]

    monkeypatch.setattr(archive, "iter_chunks", breaks)
    with pytest.raises(OSError, match="No space left"):
        archive.import_entries(packed, there, STAGES)
    assert [
        path for path in there.root.rglob("*") if path.is_file() and "lock" not in path.name
    ] == []


Members = list[tuple[tarfile.TarInfo, bytes]]


def rewrite_archive(path: Path, change: Callable[[Members], Members | None]) -> Path:
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # pyright: ignore
    members = change(members) or members
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def rename_last(name: str) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[-1][0].name = name

    return change


def retype_last(kind: bytes) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[-1][0].type, members[-1][0].linkname = kind, "/etc/passwd"

    return change


def replace_manifest(**values: object) -> Callable[[Members], Members]:
    def change(members: Members) -> Members:
        content = {**json.loads(members[0][1]), **values}
        return [
            (members[0][0], json.dumps({**content, "sha256": manifest_digest(content)}).encode()),
            *members[1:],
        ]

    return change


FILE = {"bytes": 1, "sha256": "0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_last(f"capture/{KEY}/../../../notes.json"), "called stage/key/file"),
        (rename_last(f"/capture/{KEY}/notes.json"), "called stage/key/file"),
        (rename_last(f"capture/{KEY}/./notes.json"), "called stage/key/file"),
        (rename_last(f"capture/{KEY}/notes\\x.json"), "called stage/key/file"),
        (rename_last("capture/notes.json"), "called stage/key/file"),
        (rename_last("capture/../notes.json"), "called stage/key/file"),
        (
            rename_last(f"elsewhere/{KEY}/notes.json"),
            "no stage is called 'elsewhere'; there are capture, score",
        ),
        (rename_last(f"capture/{KEY[::-1]}/notes.json"), "of each entry the manifest comes first"),
        (rename_last(f"capture/{KEY}/new.json"), "not what the manifest of its entry says"),
        (retype_last(tarfile.SYMTYPE), "no plain file"),
        (retype_last(tarfile.LNKTYPE), "no plain file"),
        (retype_last(tarfile.CHRTYPE), "no plain file"),
        (retype_last(tarfile.FIFOTYPE), "no plain file"),
        (retype_last(tarfile.DIRTYPE), "no plain file"),
        (lambda m: m[:-1], "the archive lacks"),
        (lambda m: [*m, m[-1]], "or there twice"),
        (lambda m: m[::-1], "the manifest comes first"),
        (lambda m: [*m[:-1], (m[-1][0], b"[]")], "not what the manifest of its entry says"),
        (lambda m: [*m[:-1], (m[-1][0], b"{} ")], "not what the manifest of its entry says"),
        (
            lambda m: [(m[0][0], m[0][1].replace(b'"steps": 3', b'"steps": 4')), *m[1:]],
            "not the manifest",
        ),
        (
            lambda m: [(m[0][0], m[0][1].replace(b'"created": "2', b'"created": "3')), *m[1:]],
            "not the manifest",
        ),
        (lambda m: [(m[0][0], b"[" * 100_000), *m[1:]], "not the manifest"),
        (lambda m: [(m[0][0], b"[]"), *m[1:]], "not the manifest"),
        (replace_manifest(stage="score"), "not the manifest"),
        (replace_manifest(files={"a": FILE, "a/b": FILE}), "not the manifest"),
        (replace_manifest(files={"manifest.json": FILE}), "not the manifest"),
    ],
)
def test_an_invalid_archive_is_refused_and_not_written(
    packed: Path, tmp_path: Path, change: Callable[[Members], Members | None], message: str
):
    rewrite_archive(packed, change)
    with pytest.raises(UserError, match=message):
        archive.import_entries(packed, Store(tmp_path / "there"), STAGES)
    assert not (tmp_path / "there").exists()


def test_a_changed_byte_is_noticed(packed: Path, tmp_path: Path):
    """Flip a bit of every 97th byte. The archive is refused, or, if the byte is not read, accepted.

    Bytes that are not read are the padding and some fields of tar headers.
    """
    intact, there = packed.read_bytes(), tmp_path / "there"
    for i in range(0, len(intact), 97):
        packed.write_bytes(intact[:i] + bytes([intact[i] ^ 1 << i % 8]) + intact[i + 1 :])
        try:
            archive.import_entries(packed, Store(there / str(i)), STAGES)
        except UserError:
            assert not (there / str(i)).exists()
        else:
            assert Store(there / str(i)).find_entry("capture", KEY)


@pytest.mark.parametrize("length", [0, 100, 512, 3000])
def test_a_truncated_archive_is_refused(packed: Path, tmp_path: Path, length: int):
    packed.write_bytes(packed.read_bytes()[:length])
    with pytest.raises(UserError, match="archive"):
        archive.import_entries(packed, Store(tmp_path / "there"), STAGES)
    assert not (tmp_path / "there").exists()
