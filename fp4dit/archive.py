"""Entries of a store as one tar file, to move them to another machine.

An archive holds plain files called `stage/key/...`, of each entry the manifest first. Who reads one trusts nothing in
it: all of it is checked before anything is written, and again after.
"""

import hashlib
import json
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fp4dit.errors import UserError
from fp4dit.locks import locked
from fp4dit.store import Store, fingerprint, journal, lock, sealed, whole
from fp4dit.stored import KEY, Stored

LARGEST = 1 << 26  # bytes of a manifest
Seen = Callable[[int], Any]  # told how many bytes were dealt with


def export(entries: Sequence[Stored], store: Store, out: Path, seen: Seen = lambda _: None) -> None:
    """Writes an archive of finished entries.

    Raises:
        UserError: if one of them is damaged.
    """
    for entry in entries:
        if damaged := store.damaged(entry.path):
            raise UserError(f"{entry.name} is damaged: {', '.join(damaged[:3])}. Make it again, or leave it out")
    with whole(out) as part, tarfile.open(part, "w") as tar:
        for entry in entries:
            for name in ["manifest.json", *entry.manifest["files"]]:
                tar.add(entry.path / name, f"{entry.name}/{name}", recursive=False, filter=plain)
                seen((entry.path / name).stat().st_size)


def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and rights, which mean nothing elsewhere."""
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member


def load(archive: Path, store: Store, stages: Collection[str], seen: Seen = lambda _: None) -> dict[str, bool]:
    """Puts an archive's entries into the store, each whether it was new; what is there and intact stays as it is.

    Raises:
        UserError: if the archive holds anything but intact entries of these stages. Then nothing was written.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            found = checked(tar, stages, seen)
            return {name: put(tar, name, members, store) for name, members in found.items()}
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive} cannot be read as an archive that `export` writes: {error}") from error


def checked(tar: tarfile.TarFile, stages: Collection[str], seen: Seen) -> dict[str, list[tarfile.TarInfo]]:
    """The members of each entry, all of whose bytes are what its manifest says."""
    found: dict[str, list[tarfile.TarInfo]] = {}
    expected: dict[str, dict[str, Any]] = {}
    for member in tar:
        name, file = split(member, stages)
        if name not in found:
            if file != "manifest.json":
                raise refused(member, "of each entry the manifest comes first")
            found[name], expected[name] = [], files(tar, member)
        elif not fits(tar, member, expected[name].pop(file, None)):
            raise refused(member, "it is not what the manifest of its entry says, or there twice")
        found[name].append(member)
        seen(member.size)
    for name, missing in expected.items():
        if missing:
            raise UserError(f"the archive lacks {name}/{next(iter(missing))}")
    if not found:
        raise UserError("the archive is empty")
    return found


def split(member: tarfile.TarInfo, stages: Collection[str]) -> tuple[str, str]:
    """The entry and the file that a member is, if that is a file inside an entry."""
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise refused(member, "it is no plain file")
    parts = member.name.split("/")
    if not safe(member.name) or len(parts) < 3 or not KEY.fullmatch(parts[1]):
        raise refused(member, "a member is called stage/key/file")
    if parts[0] not in stages:
        raise refused(member, f"no stage is called {parts[0]!r}; there are {', '.join(sorted(stages))}")
    return f"{parts[0]}/{parts[1]}", "/".join(parts[2:])


def safe(name: str) -> bool:
    """Whether the name leads from a folder to one inside it, here and wherever else the files may go."""
    return str(PurePosixPath(name)) == name and not {"..", "."} & set(name.split("/")) and not set(name) & set("\\:\0")


def files(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any]:
    """What the manifest says of files. Its entry's key has to be the fingerprint of the rest of it."""
    stage, key, _ = member.name.split("/")
    try:
        if member.size > LARGEST:
            raise ValueError
        manifest = json.loads(content(tar, member))
        identity = {**manifest["config"], "needs": manifest["needs"]}
        if manifest["stage"] != stage or fingerprint(identity) != key:
            raise ValueError
        if manifest.get("sha256", sealed(manifest)) != sealed(manifest):
            raise ValueError
        found = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        above = {str(parent) for name in found for parent in PurePosixPath(name).parents}
        if above & found.keys() or "manifest.json" in found:  # a file where a folder is, or in place of this one
            raise ValueError
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refused(member, "it is not the manifest of this entry") from error


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def fits(tar: tarfile.TarFile, member: tarfile.TarInfo, expected: tuple[int, str] | None) -> bool:
    if expected is None or member.size != expected[0]:
        return False
    digest = hashlib.sha256()
    for piece in pieces(tar, member):
        digest.update(piece)
    return digest.hexdigest() == expected[1]


def pieces(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    file = tar.extractfile(member)
    assert file is not None
    while piece := file.read(1 << 20):
        yield piece


def put(tar: tarfile.TarFile, name: str, members: Sequence[tarfile.TarInfo], store: Store) -> bool:
    stage, key = name.split("/")
    out = store.path(stage, key)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(lock(out), name, store.job):
        if store.find(stage, key):
            return False
        draft = store.draft(out)
        shutil.rmtree(draft)  # of a job that was killed, and had not come as far
        for member in members:
            place = draft.joinpath(*member.name.split("/")[2:])
            with whole(place) as part, part.open("wb") as file:
                file.writelines(pieces(tar, member))
        if damaged := store.damaged(draft):
            raise UserError(f"{name}/{damaged[0]} is not what was written: is the disk sound?")
        draft.rename(out)
        journal(draft).unlink(missing_ok=True)
    return True


def refused(member: tarfile.TarInfo, why: str) -> UserError:
    return UserError(f"the archive is refused, and nothing was written: {member.name!r}: {why}")
