"""Damaged, truncated and changed checkpoints are refused without large allocations."""

import json
import random
import resource
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp4dit.packed.encoding.integrity import VERSION, build_metadata, verify_files
from fp4dit.utils.errors import UserError

CONFIG = {"weights": [{"layers": ["a"], "format": "e2m1"}], "version": VERSION}
STATE = {
    "a.codes": torch.arange(64, dtype=torch.uint8).view(8, 8),
    "a.scale": torch.arange(16, dtype=torch.uint8),
    "a.bias": torch.linspace(-1, 1, 8),
    "norm": torch.linspace(0, 1, 8).half(),
}


@pytest.fixture
def stored_file(tmp_path: Path) -> Path:
    """Write the checkpoint to a file, and return its path."""
    path = tmp_path / "model.safetensors"
    save_file(STATE, path, build_metadata(STATE, CONFIG))
    return path


def split_header(data: bytes) -> tuple[dict, bytes]:
    """Return the header of a safetensors file, and the bytes of its tensors."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite_header(path: Path, edit) -> Path:
    """Change the header of a file by a function."""
    header, rest = split_header(path.read_bytes())
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    return path


def test_verified_tensors_are_those_written(stored_file: Path):
    tensors = verify_files([stored_file], CONFIG)
    assert tensors.keys() == STATE.keys()
    for name, value in STATE.items():
        assert (tensors[name].dtype, tensors[name].shape) == (value.dtype, tuple(value.shape))


def test_two_files_are_one_checkpoint(tmp_path: Path):
    for name, keys in (("1", ["a.codes", "a.scale"]), ("2", ["a.bias", "norm"])):
        save_file({key: STATE[key] for key in keys}, tmp_path / name, build_metadata(STATE, CONFIG))
    assert verify_files([tmp_path / "1", tmp_path / "2"], CONFIG).keys() == STATE.keys()
    with pytest.raises(UserError, match=r"lacks (a\.bias|norm)"):
        verify_files([tmp_path / "1"], CONFIG)


def test_changed_bytes_are_refused(stored_file: Path):
    data = bytearray(stored_file.read_bytes())
    start = split_header(bytes(data))[0]["a.scale"]["data_offsets"][0]
    data[len(data) - len(split_header(bytes(data))[1]) + start] ^= 1
    stored_file.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.scale of the checkpoint is not what was written"):
        verify_files([stored_file], CONFIG)


def test_changed_configs_are_refused(stored_file: Path):
    with pytest.raises(UserError, match="quantization_config"):
        verify_files([stored_file], CONFIG | {"weights": [{"layers": ["a"], "format": "e1m2"}]})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda h: h["norm"].update(dtype="BF16"),
            "norm of the checkpoint is not what was written",
        ),
        (
            lambda h: h["a.codes"].update(shape=[4, 16]),
            r"a\.codes of the checkpoint is not what was written",
        ),
        (
            lambda h: h["a.codes"].update(shape=[2**40, 2**40]),
            r"a\.codes in .* does not fit the file",
        ),
        (
            lambda h: h["a.codes"].update(data_offsets=[0, 2**60]),
            r"a\.codes in .* does not fit the file",
        ),
        (
            lambda h: h["a.codes"].update(data_offsets=[-64, 0]),
            r"a\.codes in .* does not fit the file",
        ),
        (lambda h: h["a.codes"].update(dtype="F3"), r"a\.codes in .* is damaged"),
        (lambda h: h["a.codes"].update(shape="large"), r"a\.codes in .* is damaged|does not fit"),
        (lambda h: h.pop("norm"), "lacks norm"),
        (lambda h: h.update(more=h["norm"]), "more of the checkpoint is not what was written"),
        (lambda h: h.pop("__metadata__"), "does not say that fp4dit wrote it"),
    ],
)
def test_changed_headers_are_refused(stored_file: Path, edit, message: str):
    with pytest.raises(UserError, match=message):
        verify_files([rewrite_header(stored_file, edit)], CONFIG)


def test_other_versions_are_refused(stored_file: Path):
    def raise_version(header: dict) -> None:
        metadata = json.loads(header["__metadata__"]["fp4dit"]) | {"version": 7}
        header["__metadata__"]["fp4dit"] = json.dumps(metadata)

    with pytest.raises(UserError, match=f"version 7, and this fp4dit reads version {VERSION}"):
        verify_files([rewrite_header(stored_file, raise_version)], CONFIG)


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_truncated_files_are_refused(stored_file: Path, length: int):
    stored_file.write_bytes(stored_file.read_bytes()[:length])
    with pytest.raises(UserError, match="cut off"):
        verify_files([stored_file], CONFIG)


def test_repeated_names_are_refused(stored_file: Path):
    data = stored_file.read_bytes()
    header, rest = split_header(data)
    text = json.dumps(header)[:-1] + ', "norm": ' + json.dumps(header["a.scale"]) + "}"
    stored_file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + rest)
    with pytest.raises(UserError, match="is repeated"):
        verify_files([stored_file], CONFIG)


def test_random_changes_are_refused(stored_file: Path):
    """Change a file 10,000 times: it is refused, or all tensors are equal."""
    before, rng = stored_file.read_bytes(), random.Random(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_accepted = 0
    for _ in range(10_000):
        stored_file.write_bytes(mutate_bytes(before, rng))
        try:
            verify_files([stored_file], CONFIG)
        except UserError:
            continue
        num_accepted += 1
        for name, value in load_file(stored_file).items():
            assert value.equal(STATE[name])
    assert num_accepted < 1_000  # such as a changed blank in the header
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # kB


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change a byte, remove or insert bytes, truncate, or change a number in the header."""
    changed = bytearray(data)
    position, kind = rng.randrange(len(data)), rng.randrange(5)
    if kind == 0:
        changed[position] = rng.choice([b for b in range(256) if b != data[position]])
    elif kind == 1:
        del changed[position : position + rng.randint(1, 40)]
    elif kind == 2:
        changed[position:position] = rng.randbytes(rng.randint(1, 40))
    elif kind == 3:
        del changed[position:]
    else:
        digits = [i for i, byte in enumerate(data[: len(data) - 128]) if chr(byte).isdigit()]
        changed[rng.choice(digits)] = ord(str(rng.randrange(10)))
    return bytes(changed)
