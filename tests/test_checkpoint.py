"""Packed files that are damaged, cut off, swapped or changed are refused, and nothing large is made of their claims."""

import json
import random
import resource
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp4dit.errors import UserError
from fp4dit.packed.checkpoint import VERSION, metadata, verify

CONFIG = {"weights": [{"layers": ["a"], "format": "e2m1"}], "version": VERSION}
STATE = {
    "a.codes": torch.arange(64, dtype=torch.uint8).view(8, 8),
    "a.scale": torch.arange(16, dtype=torch.uint8),
    "a.bias": torch.linspace(-1, 1, 8),
    "norm": torch.linspace(0, 1, 8).half(),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(STATE, path, metadata(STATE, CONFIG))
    return path


def header(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewritten(path: Path, change) -> Path:
    """With another header, which `change` makes in place."""
    found, rest = header(path.read_bytes())
    change(found)
    text = json.dumps(found).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return path


def test_what_was_written_is_what_is_found(file: Path):
    found = verify([file], CONFIG)
    assert {name: (own.dtype, own.shape) for name, own in found.items()} == {
        name: (value.dtype, tuple(value.shape)) for name, value in STATE.items()
    }


def test_two_files_are_one_checkpoint(tmp_path: Path):
    for name, keys in (("1", ["a.codes", "a.scale"]), ("2", ["a.bias", "norm"])):
        save_file({key: STATE[key] for key in keys}, tmp_path / name, metadata(STATE, CONFIG))
    assert verify([tmp_path / "1", tmp_path / "2"], CONFIG).keys() == STATE.keys()
    with pytest.raises(UserError, match=r"lacks (a\.bias|norm)"):
        verify([tmp_path / "1"], CONFIG)


def test_a_changed_byte_is_found_and_named(file: Path):
    data = bytearray(file.read_bytes())
    start = header(bytes(data))[0]["a.scale"]["data_offsets"][0]
    data[len(data) - len(header(bytes(data))[1]) + start] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.scale of the checkpoint is not what was written"):
        verify([file], CONFIG)


def test_another_config_is_refused(file: Path):
    with pytest.raises(UserError, match="quantization_config"):
        verify([file], CONFIG | {"weights": [{"layers": ["a"], "format": "e1m2"}]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["norm"].update(dtype="BF16"), "norm of the checkpoint is not what was written"),
        (lambda h: h["a.codes"].update(shape=[4, 16]), r"a\.codes of the checkpoint is not what was written"),
        (lambda h: h["a.codes"].update(shape=[2**40, 2**40]), r"a\.codes in .* does not fit the file"),
        (lambda h: h["a.codes"].update(data_offsets=[0, 2**60]), r"a\.codes in .* does not fit the file"),
        (lambda h: h["a.codes"].update(data_offsets=[-64, 0]), r"a\.codes in .* does not fit the file"),
        (lambda h: h["a.codes"].update(dtype="F3"), r"a\.codes in .* is damaged"),
        (lambda h: h["a.codes"].update(shape="large"), r"a\.codes in .* is damaged|does not fit"),
        (lambda h: h.pop("norm"), "lacks norm"),
        (lambda h: h.update(more=h["norm"]), "more of the checkpoint is not what was written"),
        (lambda h: h.pop("__metadata__"), "does not say that fp4dit wrote it"),
    ],
)
def test_a_header_that_claims_something_else(file: Path, change, message: str):
    with pytest.raises(UserError, match=message):
        verify([rewritten(file, change)], CONFIG)


def test_another_version_is_refused_by_its_number(file: Path):
    def later(found: dict) -> None:
        said = json.loads(found["__metadata__"]["fp4dit"]) | {"version": 7}
        found["__metadata__"]["fp4dit"] = json.dumps(said)

    with pytest.raises(UserError, match=f"version 7, and this fp4dit reads version {VERSION}"):
        verify([rewritten(file, later)], CONFIG)


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_a_file_cut_off_is_refused(file: Path, length: int):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match="cut off"):
        verify([file], CONFIG)


def test_a_name_that_stands_twice_is_refused(file: Path):
    data = file.read_bytes()
    found, rest = header(data)
    text = json.dumps(found)[:-1] + ', "norm": ' + json.dumps(found["a.scale"]) + "}"
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + rest)
    with pytest.raises(UserError, match="stands twice"):
        verify([file], CONFIG)


def test_no_file_changed_at_random_is_taken_for_what_was_written(file: Path):
    """10,000 of them: refused, or equal in every tensor to what was written."""
    before, chance = file.read_bytes(), random.Random(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = 0
    for _ in range(10_000):
        file.write_bytes(mutated(before, chance))
        try:
            verify([file], CONFIG)
        except UserError:
            continue
        taken += 1
        for name, value in load_file(file).items():
            assert value.equal(STATE[name])
    assert taken < 1_000  # such as a changed blank in the header
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # kB


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A byte changed, bytes cut out or put in, the end cut off, or a number in the header made another."""
    changed = bytearray(data)
    at, kind = chance.randrange(len(data)), chance.randrange(5)
    if kind == 0:
        changed[at] = chance.choice([b for b in range(256) if b != data[at]])
    elif kind == 1:
        del changed[at : at + chance.randint(1, 40)]
    elif kind == 2:
        changed[at:at] = chance.randbytes(chance.randint(1, 40))
    elif kind == 3:
        del changed[at:]
    else:
        digits = [i for i, byte in enumerate(data[: len(data) - 128]) if chr(byte).isdigit()]
        changed[chance.choice(digits)] = ord(str(chance.randrange(10)))
    return bytes(changed)
