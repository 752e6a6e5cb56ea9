"""Nested values in safetensors: what comes back is what went in, or an error."""

import json
import resource
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from fp4dit.utils import pytree_io

INF = float("inf")


def same(a: Any, b: Any) -> bool:
    """Return whether two trees have the same types, values and bits of tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(
    "value",
    [
        {},
        None,
        torch.amp.GradScaler("cpu").state_dict(),
        {
            "a": {0: [True, 1, 1.0, 0.1, 1e-300, None, "x"], "0": (1, (2, []))},
            "dict": {"tensor": {"float": INF}},
        },
        [-INF, {"least": INF}],
        torch.randn(3, 4).T,
        [
            torch.ones(2, dtype=kind)
            for kind in (torch.bfloat16, torch.float16, torch.bool, torch.uint8, torch.int64)
        ],
        (torch.tensor(3.0), torch.empty(0), torch.tensor(float("nan")).view(torch.int32)),
    ],
)
def test_a_loaded_tree_is_the_saved_one(value: Any, tmp_path: Path):
    pytree_io.save_tree(value, tmp_path / "kept")
    assert same(pytree_io.load_tree(tmp_path / "kept"), value)


def test_the_state_of_a_training_is_loaded_unchanged(tmp_path: Path):
    """Tied weights, an ordered dict, an optimizer that counts its parameters, and a schedule."""
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.8, 0.9))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model["b"](model["a"](torch.ones(2, 3))).sum().backward()
    optimizer.step()
    schedule.step()
    state = OrderedDict(
        model=model.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict()
    )
    pytree_io.save_tree(state, tmp_path / "kept")
    assert same(pytree_io.load_tree(tmp_path / "kept"), dict(state))


def test_anyone_can_read_it(tmp_path: Path):
    pytree_io.save_tree({"step": 3, "state": {0: {"mean": torch.arange(3)}}}, tmp_path / "kept")
    with safe_open(tmp_path / "kept", "pt") as file:
        assert torch.equal(file.get_tensor("/state/0/mean"), torch.arange(3))
        assert json.loads(file.metadata()["tree"])["dict"][0] == ["step", 3]


@pytest.mark.parametrize(
    "value", [{"f": len}, [object()], {(1, 2): 3}, {"dtype": torch.float32}, {1.5: 1}]
)
def test_a_value_that_needs_pickle_is_refused(value: Any, tmp_path: Path):
    with pytest.raises(TypeError):
        pytree_io.save_tree(value, tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_damage_is_noticed_wherever_it_is(tmp_path: Path):
    path = tmp_path / "kept"
    pytree_io.save_tree({"curve": [0.5, 0.25], "v": torch.arange(8.0)}, path)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        with pytest.raises(ValueError):  # noqa: PT011  # said by whoever notices
            pytree_io.load_tree(path)
        path.write_bytes(whole[:i])
        with pytest.raises(ValueError):  # noqa: PT011
            pytree_io.load_tree(path)
    path.write_bytes(whole)
    pytree_io.load_tree(path)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Context manager: refuse to write files beyond a size, like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path):
    pytree_io.save_tree(torch.zeros(3), tmp_path / "kept")
    with largest_file(1000), pytest.raises(OSError):  # noqa: PT011
        pytree_io.save_tree(torch.zeros(1000), tmp_path / "kept")
    assert torch.equal(pytree_io.load_tree(tmp_path / "kept"), torch.zeros(3))
    assert len(list(tmp_path.iterdir())) == 1
