"""Entries of a store as one tar file, to move them to another machine.

An archive contains plain files called `stage/key/...`. The manifest of an entry comes before its
other files. An imported archive is not trusted: all of its content is checked before anything is
written, and each entry is checked again after it is written.
"""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fp4dit.store.draft import journal_path, lock_path
from fp4dit.store.entries import KEY, StoreEntry
from fp4dit.store.locks import hold_lock
from fp4dit.store.manifest import compute_key, has_valid_digest
from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import atomic_write

MAX_MANIFEST_BYTES = 1 << 26

READ_BYTES = 1 << 20  # the number of bytes that are read at a time

# Called with the number of bytes that were read or written since the last call.
OnBytes = Callable[[int], Any]


class FileRecord(NamedTuple):
    """Size and SHA-256 of a file, as its manifest says.

    Attributes:
        num_bytes: The size of the file.
        sha256: The hash of its content, in hexadecimal digits.
    """

    num_bytes: int
    sha256: str


def ignore_bytes(num_bytes: int) -> None:
    """Ignore the number of bytes; the default of `on_bytes`."""


def export_entries(
    entries: Sequence[StoreEntry], store: Store, out: Path, on_bytes: OnBytes = ignore_bytes
) -> None:
    """Write an archive of finished entries.

    Args:
        entries: The entries.
        store: The store that contains them.
        out: The archive.
        on_bytes: Called after each file with its size.

    Raises:
        UserError: if an entry is damaged.
    """
    for entry in entries:
        if damaged := store.find_damaged_files(entry.path):
            raise UserError(
                f"{entry.name} is damaged: {', '.join(damaged[:3])}. Make it again, or leave it out"
            )
    with atomic_write(out) as part, tarfile.open(part, "w") as tar:
        for entry in entries:
            for name in ["manifest.json", *entry.manifest["files"]]:
                path, member_name = entry.path / name, f"{entry.name}/{name}"
                tar.add(path, member_name, recursive=False, filter=remove_owner)
                on_bytes(path.stat().st_size)


def remove_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Replace the owner and permissions of a member, which do not apply on another machine."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def import_entries(
    archive: Path, store: Store, stages: Collection[str], on_bytes: OnBytes = ignore_bytes
) -> dict[str, bool]:
    """Add the entries of an archive to a store. Entries that the store has already are skipped.

    Args:
        archive: The archive.
        store: The store.
        stages: The names that stages may have.
        on_bytes: Called after each file that was checked, with its size.

    Returns:
        Whether each entry is new, by its name.

    Raises:
        UserError: if the archive contains anything but intact entries of these stages. In that
            case nothing was written.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            entries = check_archive(tar, stages, on_bytes)
            added = {}
            for name, members in entries.items():
                added[name] = extract_entry(tar, name, members, store)
            return added
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{archive} cannot be read as an archive that `export` writes: {error}"
        ) from error


def check_archive(
    tar: tarfile.TarFile, stages: Collection[str], on_bytes: OnBytes
) -> dict[str, list[tarfile.TarInfo]]:
    """Check every byte of an archive against its manifests, and return the members of each entry.

    Raises:
        UserError: if a member is not what its manifest says, or a file is missing.
    """
    entries: dict[str, list[tarfile.TarInfo]] = {}
    missing: dict[str, dict[str, FileRecord]] = {}
    for member in tar:
        name, file = parse_member_name(member, stages)
        if name not in entries:
            if file != "manifest.json":
                raise archive_error(member, "of each entry the manifest comes first")
            entries[name], missing[name] = [], read_manifest_files(tar, member)
        elif not matches_record(tar, member, missing[name].pop(file, None)):
            raise archive_error(
                member, "it is not what the manifest of its entry says, or there twice"
            )
        entries[name].append(member)
        on_bytes(member.size)
    for name, files in missing.items():
        if files:
            raise UserError(f"the archive lacks {name}/{next(iter(files))}")
    if not entries:
        raise UserError("the archive is empty")
    return entries


def parse_member_name(member: tarfile.TarInfo, stages: Collection[str]) -> tuple[str, str]:
    """Return the name of a member's entry and that of its file inside the entry.

    Raises:
        UserError: if the member is not a plain file inside an entry of one of the stages.
    """
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise archive_error(member, "it is no plain file")
    parts = member.name.split("/")
    if not is_safe_name(member.name) or len(parts) < 3 or not KEY.fullmatch(parts[1]):
        raise archive_error(member, "a member must be called stage/key/file")
    if parts[0] not in stages:
        raise archive_error(
            member, f"no stage is called {parts[0]!r}; there are {', '.join(sorted(stages))}"
        )
    return f"{parts[0]}/{parts[1]}", "/".join(parts[2:])


def is_safe_name(name: str) -> bool:
    """Return whether a relative path stays inside its folder, on any operating system."""
    if str(PurePosixPath(name)) != name:
        return False
    return not {"..", "."} & set(name.split("/")) and not set(name) & set("\\:\0")


def read_manifest_files(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, FileRecord]:
    """Return the files that a manifest lists.

    Raises:
        UserError: if the member is not a manifest, or the key of its entry is not the hash of the
            identity that it contains.
    """
    stage, key, _ = member.name.split("/")
    try:
        if member.size > MAX_MANIFEST_BYTES:
            raise ValueError
        manifest = json.loads(read_member(tar, member))
        identity = {**manifest["config"], "needs": manifest["needs"]}
        if manifest["stage"] != stage or compute_key(identity) != key:
            raise ValueError
        if not has_valid_digest(manifest):
            raise ValueError
        files, folders = {}, set()
        for name, record in manifest["files"].items():
            files[name] = FileRecord(int(record["bytes"]), str(record["sha256"]))
            folders |= {str(parent) for parent in PurePosixPath(name).parents}
        # A file must not have the path of a folder, nor that of the manifest.
        if folders & files.keys() or "manifest.json" in files:
            raise ValueError
        return files
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise archive_error(member, "it is not the manifest of this entry") from error


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Return the bytes of a member, which is a plain file."""
    return b"".join(iter_chunks(tar, member))


def matches_record(
    tar: tarfile.TarFile, member: tarfile.TarInfo, record: FileRecord | None
) -> bool:
    """Return whether a member has the size and the checksum of its record."""
    if record is None or member.size != record.num_bytes:
        return False
    digest = hashlib.sha256()
    for chunk in iter_chunks(tar, member):
        digest.update(chunk)
    return digest.hexdigest() == record.sha256


def iter_chunks(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    """Yield the bytes of a member in chunks."""
    file = tar.extractfile(member)
    assert file is not None
    while chunk := file.read(READ_BYTES):
        yield chunk


def extract_entry(
    tar: tarfile.TarFile, name: str, members: Sequence[tarfile.TarInfo], store: Store
) -> bool:
    """Write an entry to the store, and return whether it is new.

    Raises:
        UserError: if the disk does not return what was written.
    """
    stage, key = name.split("/")
    out = store.get_path(stage, key)
    out.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(lock_path(out), name, store.job):
        if store.find_entry(stage, key):
            return False
        draft = store.open_draft(out)
        shutil.rmtree(draft)  # it may hold files of a job that was killed
        for member in members:
            path = draft.joinpath(*member.name.split("/")[2:])
            with atomic_write(path) as part, part.open("wb") as file:
                file.writelines(iter_chunks(tar, member))
        if damaged := store.find_damaged_files(draft):
            raise UserError(f"{name}/{damaged[0]} is not what was written: is the disk sound?")
        draft.rename(out)
        journal_path(draft).unlink(missing_ok=True)
    return True


def archive_error(member: tarfile.TarInfo, reason: str) -> UserError:
    """Return the error for an archive that is refused because of one member."""
    return UserError(f"the archive is refused, and nothing was written: {member.name!r}: {reason}")
