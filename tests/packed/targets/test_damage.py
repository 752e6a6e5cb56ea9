"""A damaged checkpoint of another library is refused with one message, or has the same weights."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fp4dit.numerics.block_scales import E8M0Scale
from fp4dit.numerics.formats import floating
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import Target
from fp4dit.packed.targets.compressed_tensors import CompressedTensors
from fp4dit.packed.targets.conversion import build_skeleton
from fp4dit.packed.targets.folders import read_config
from fp4dit.packed.targets.gguf_file import CHECKSUMS
from fp4dit.packed.targets.importing import read_model, restore_model_
from fp4dit.quantization.rules import Rule
from fp4dit.utils.errors import UserError
from tests.faults.conftest import LONG
from tests.packed.targets.cases import CASES, COMFYUI, NUNCHAKU, Case

MXFP4 = Quantizer(floating(2, 1), PerGroup(32), E8M0Scale())
COMPRESSED = Case(
    CompressedTensors(),
    [Rule("pos_embed.proj", None), Rule("*", MXFP4)],
    torch.float32,
    "compressed_tensors",
)
DAMAGED = {name: CASES[name] for name in ("sdnq", "gguf", "bfl", "auto_round", "torchao")}
DAMAGED["compressed_tensors"] = COMPRESSED
DAMAGED["comfyui"] = COMFYUI
DAMAGED |= {f"nunchaku_lite {name}": case for name, case in NUNCHAKU.items()}


def read_weights(target: Target, folder: Path) -> dict[str, torch.Tensor]:
    """Import a transformer, and return all of its weights, packed ones dequantized."""
    if not target.reads(folder):
        raise UserError("this is not a checkpoint of the target")
    config = read_config(folder)
    config.pop("quantization_config", None)
    model: Any = build_skeleton(config)
    stored = read_model(folder, model, target)
    torch.nn.Module.to(model, stored.dtype)
    restore_model_(model, stored, target)
    weights = dict(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            weights[f"{name}.weight"] = module.dequantize(torch.float32)
    return weights


def flip(data: bytearray, random: Random) -> None:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def cut(data: bytearray, random: Random) -> None:
    del data[random.randrange(len(data)) :]


def blank(data: bytearray, random: Random) -> None:
    start = random.randrange(len(data))
    data[start : start + 64] = bytes(len(data[start : start + 64]))


def swap(data: bytearray, random: Random) -> None:
    a, b = (random.randrange(len(data) - 8) for _ in "ab")
    data[a : a + 8], data[b : b + 8] = data[b : b + 8], data[a : a + 8]


DAMAGES: list[Callable[[bytearray, Random], None]] = [flip, flip, cut, blank, swap]


@pytest.fixture(scope="module", params=DAMAGED)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Target, Path]:
    """The folder of a tiny model in a target's format, which tests leave as it is."""
    root = tmp_path_factory.mktemp("exported")
    DAMAGED[request.param].save(root)
    return DAMAGED[request.param].target, root / "theirs"


@contextmanager
def damage(folder: Path, seed: int) -> Iterator[None]:
    """Damage a file of a folder, one of its first bytes if the seed is even, and restore it."""
    random = Random(seed)
    path = random.choice([path for path in sorted(folder.iterdir()) if path.suffix != ".md"])
    intact = path.read_bytes()
    end = len(intact) if seed % 2 else min(len(intact), 4096)  # the head has sizes and names
    head = bytearray(intact[:end])
    random.choice(DAMAGES)(head, random)
    path.write_bytes(bytes(head) + intact[end:])
    yield
    path.write_bytes(intact)


def test_damage_is_refused_or_harmless(exported: tuple[Target, Path]):
    target, folder = exported
    weights, refused = read_weights(target, folder), 0
    for seed in range(100 if LONG else 30):
        with damage(folder, seed):
            try:
                damaged = read_weights(target, folder)
            except UserError:
                refused += 1
                damaged = weights
        assert damaged.keys() == weights.keys(), seed
        assert all(damaged[key].equal(value) for key, value in weights.items()), seed
    assert refused > (80 if LONG else 24)


def test_damage_of_files_without_checksums_gives_one_message(
    exported: tuple[Target, Path], tmp_path: Path
):
    """Files that others wrote have no checksums, so that only what is malformed is noticed."""
    target, theirs = exported
    folder = tmp_path / "unchecked"
    shutil.copytree(theirs, folder)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = {k: v for k, v in (file.metadata() or {}).items() if k != "fp4dit"}
        save_file(load_file(path), path, metadata)
    for path in folder.glob("*.gguf"):
        path.write_bytes(path.read_bytes().replace(CHECKSUMS.encode(), b"sha256.absent"))
    weights, refused = read_weights(target, theirs), 0
    same = read_weights(target, folder)
    assert all(same[key].equal(value) for key, value in weights.items())
    for seed in range(0, 60 if LONG else 24, 2):  # the head
        with damage(folder, seed), suppress(UserError):
            read_weights(target, folder)
            refused -= 1
        refused += 1
    assert refused > (10 if LONG else 4)
