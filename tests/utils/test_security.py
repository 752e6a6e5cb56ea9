"""Each line of docs/internals/security.md that no other test named there checks."""

import json
import re
import shutil
import tomllib
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from packaging.requirements import Requirement
from safetensors.torch import load_file

import pipelines.store
from fp4dit.data.prompts import load_prompts
from fp4dit.models.pixart import PixArt
from fp4dit.packed.encoding import schema
from fp4dit.quantization.rules import Rule
from fp4dit.store.archive import export_entries, import_entries
from fp4dit.store.entries import list_entries
from fp4dit.store.manifest import compute_key
from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from pipelines.runtime.trainer import Runtime
from pipelines.stages.generate import Generate, Generation
from pipelines.store import convert_words
from tests.conftest import ROOT, TOY, Run
from tests.helpers.small_runs import CPU

SECRET = "0123456789abcdef0123456789abcdef01234567"  # of the form of a key of W&B
MODELS = ("transformer", "vae", "text_encoder")
ran: list[str] = []


def run_me(*_: Any, **__: Any) -> None:
    ran.append("code")


class Explosive:
    """Runs `run_me` where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return run_me, ()


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place))


def edited(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("part", MODELS)
def test_a_pickle_is_refused_before_anything_is_loaded(
    pixart_folder: Path, tmp_path: Path, part: str
):
    folder = copied(pixart_folder, tmp_path / "model")
    [weights] = (folder / part).glob("*.safetensors")
    weights.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save({"weight": Explosive()}, folder / part / name)
    for look in (PixArt(str(folder)).build_on_meta, PixArt(str(folder)).load):
        with pytest.raises(
            UserError, match=rf"{part}/{name} is a pickle, .* give \+model.pickle=true"
        ):
            look()
    with pytest.raises(
        Exception, match=r"(?i)weights_only|pickle"
    ):  # even then nothing but tensors is let in
        PixArt(str(folder), pickle=True).load()
    assert ran == []


def test_pickled_tensors_are_read_where_the_flag_allows_it(pixart_folder: Path, tmp_path: Path):
    folder = copied(pixart_folder, tmp_path / "model")
    [weights] = (folder / "transformer").glob("*.safetensors")
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    given = PixArt(str(folder)).load().transformer.state_dict()  # the safetensors are beside it
    weights.unlink()
    found = PixArt(str(folder), pickle=True).load().transformer.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in given.items())


def test_code_that_comes_with_a_model_is_not_run(pixart_folder: Path, tmp_path: Path, monkeypatch):
    """Neither as a pipeline or part of its own, nor by a name in a config that would import it."""
    folder = copied(pixart_folder, tmp_path / "model")
    for place in (
        "pipeline.py",
        "evil_part.py",
        "scheduler/evil_part.py",
        "transformer/modeling.py",
    ):
        (folder / place).write_text(
            "from tests.utils.test_security import run_me\nrun_me()\nclass Evil: pass\n"
        )
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    edited(folder / "transformer/config.json", auto_map={"AutoModel": "modeling.Evil"})
    PixArt(str(folder)).load()
    edited(folder / "model_index.json", scheduler=["evil_part", "Evil"])
    with pytest.raises(ValueError, match="evil_part"):
        PixArt(str(folder)).load()
    assert ran == []


@pytest.mark.parametrize(
    "kind", ["loaders", "utils.logging", "__builtins__", "DiffusionPipeline", "DDIMScheduler"]
)
def test_a_transformer_is_a_model_of_diffusers(pixart_folder: Path, tmp_path: Path, kind: str):
    folder = copied(pixart_folder, tmp_path / "model")
    edited(folder / "transformer/config.json", _class_name=kind)
    with pytest.raises(UserError, match=f"holds a {kind}, which is not a model of diffusers"):
        PixArt(str(folder)).build_on_meta()


@pytest.mark.parametrize("key", ["_target_", "__reduce__", "py/object", "!!python/object"])
def test_checkpoints_make_only_listed_kinds(key: str):
    called = {key: "tests.utils.test_security.run_me"}
    for place in ({"kind": "rule", **called}, called, {"kind": "tests.utils.test_security.run_me"}):
        with pytest.raises(UserError, match="quantization_config"):
            schema.from_tagged_json(place, Rule)
    assert ran == []


def test_a_store_from_elsewhere_is_data(tmp_path: Path, run: Run, monkeypatch):
    """Listing, checking, explaining and running never instantiate what a manifest names."""
    monkeypatch.setattr("pipelines.results.gc.list_configured_runs", lambda _: {"toy": [TOY]})
    config = {"_target_": "tests.utils.test_security.run_me", "version": 1}
    key = compute_key({**config, "needs": {}})
    theirs = Store(tmp_path / "theirs")
    theirs.get_or_make(
        "capture",
        key,
        lambda out: (out / "a.txt").write_text("a") and None,
        {"needs": {}, "config": config},
    )
    export_entries(list(list_entries(theirs.root)), theirs, tmp_path / "all.tar")
    assert import_entries(tmp_path / "all.tar", Store(tmp_path / "store"), ["capture"]) == {
        f"capture/{key}": True
    }
    for words in (["ls"], ["verify"], ["gc"], ["explain", "toy_rows/Default"]):
        assert run(*convert_words([*words, TOY[1]]), main=pipelines.store.main) == 0
    assert run(*TOY, "dry_run=true") == 0
    assert ran == []
    instantiate(config)
    assert ran.pop() == "code"  # the trap works


def test_a_secret_in_the_environment_reaches_no_file(tmp_path: Path, run: Run, monkeypatch, capfd):
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    assert run(*TOY, "logger=wandb") == 0
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "given", [SECRET, f"https://user:{SECRET}@host/model", "'${oc.env:HF_TOKEN}'"]
)
def test_a_secret_in_the_configuration_is_refused(
    tmp_path: Path, run: Run, monkeypatch, capfd, given: str
):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    assert run(*TOY, f"model.path={given}") == 1
    out, error = capfd.readouterr()
    assert "HF_TOKEN is in the configuration, which is stored and shown" in error
    assert SECRET not in out + error
    assert [
        path
        for path in tmp_path.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ] == []


def test_no_prompt_names_a_file(pixart_folder: Path, tmp_path: Path):
    """Images are numbered, whatever their prompts are."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("../../escaped\n/tmp/escaped\n")
    read, out = partial(load_prompts, path=str(prompts)), tmp_path / "store" / "generate" / "key"
    out.mkdir(parents=True)
    generate = Generate(PixArt(str(pixart_folder)), [], [], Generation(1, 1.0, 2, 0), read, 2)
    generate.run({}, out, Runtime(CPU, "none"))
    names = {path.name.removesuffix(".sha256") for path in (out / "images").iterdir()}
    assert names == {"00000.png", "00001.png"}
    assert [path for path in tmp_path.rglob("*escaped*")] == []


def test_every_bound_of_a_requirement_has_its_reason():
    """Bounds stand in pyproject.toml, and the Makefile forces some on other packages."""
    page = (ROOT / "docs/internals/security.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = chain.from_iterable(project["project"]["optional-dependencies"].values())
    required = [*project["build-system"]["requires"], *project["project"]["dependencies"], *extras]
    bounded = [text for text in required if Requirement(text).specifier]
    forced = re.findall(r"--no-deps (\S+==[\d.]+)", (ROOT / "Makefile").read_text())
    assert len(bounded) >= 5
    assert len(forced) == 1
    assert [text for text in [*bounded, *forced] if f"`{text}`" not in page] == []
    assert f"Python below {project['project']['requires-python'].partition('<')[2]}" in page
