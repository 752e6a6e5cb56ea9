"""Commands on a pipeline: what they refuse before they load it, and what they leave behind."""

import csv
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from fp4dit.packed.nn.linear import PackedLinear
from pipelines.cli.main import INTERRUPTED
from pipelines.cli.model_choice import find_model_overrides
from pipelines.cli.program import main
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import CONF
from pipelines.stages import Capture, Reconstruct
from tests.helpers import tiny

pytestmark = pytest.mark.unchecked

Program = Callable[..., int]

TOKENS = "model.tokens=20"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Program:
    """A function that runs `fp4dit` in this process, and returns its exit code."""

    def call(*arguments: str) -> int:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["fp4dit", *arguments])
        try:
            main()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
                return 1
            return stop.code or 0
        return 0

    return call


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """A file of prompts."""
    (tmp_path / "prompts.txt").write_text("\n".join(tiny.PROMPTS[:4]))
    return str(tmp_path / "prompts.txt")


@pytest.fixture
def sigma(tmp_path: Path) -> Path:
    """A tiny PixArt-Sigma."""
    tiny.save(tmp_path / "sigma")
    return tmp_path / "sigma"


def test_a_quantized_pipeline_is_saved_and_loads(
    program: Program, sigma: Path, tmp_path: Path, capfd
):
    out = tmp_path / "new" / "packed"
    arguments = ["quantize", str(sigma), "--method", "nvfp4_rtn", "--out", str(out)]
    assert program(*arguments, "--device", "cpu", TOKENS) == 0
    text = capfd.readouterr().out
    assert "bits per weight" in text
    assert f"from_pretrained('{out}', dtype=torch.float16)" in text
    pipe = DiffusionPipeline.from_pretrained(out)
    transformer: Any = pipe.transformer  # pyright: ignore
    assert isinstance(transformer.caption_projection.linear_1, PackedLinear)
    assert [path.name for path in out.parent.iterdir()] == ["packed"]  # no work folder is left


def test_a_stopped_command_goes_on_where_it_was(
    program: Program,
    sigma: Path,
    prompts: str,
    tmp_path: Path,
    capfd,
    monkeypatch: pytest.MonkeyPatch,
):
    out = tmp_path / "packed"
    arguments = ["quantize", str(sigma), "--method", "gptq", "--prompts", prompts]
    arguments += ["--out", str(out), "--steps", "2", "--device", "cpu", TOKENS]
    arguments += ["weight.granularity.size=8"]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Reconstruct, "run", stop)
        assert program(*arguments) == INTERRUPTED
    signal.signal(signal.SIGINT, handler)
    assert "the same command resumes it" in capfd.readouterr().err
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(Capture, "run", stop)
        assert program(*arguments) == 0
    assert "block error" in capfd.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "prompts.txt", "sigma"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--out": "{folder}/sigma"}, "/sigma exists already: give a new folder with --out"),
        ({"--method": "gptk"}, "method=gptk: there is no such preset; did you mean gptq"),
        ({"--method": "gptq"}, "gptq needs prompts, because "),
        ({"--prompts": "{folder}/none.txt"}, "there is no file of prompts at "),
        ({"--prompts": "{folder}/sigma/model_index.json"}, "model_index.json must be a list"),
        ({"PATH": "{folder}/other"}, "other: this is no folder, no hub id"),
        ({"PATH": "{folder}"}, "is not a diffusers pipeline: the folder has no model_index.json"),
        ({"PATH": "owner/name"}, "owner/name is not on this machine, and HF_HUB_OFFLINE is set"),
        ({"--component": "vae"}, "this PixArtSigmaPipeline has no vae that can be quantized"),
    ],
)
def test_a_mistake_is_refused(
    program: Program, sigma: Path, tmp_path: Path, capfd, changed: dict[str, str], message: str
):
    options = {"PATH": str(sigma), "--method": "rtn", "--out": str(tmp_path / "out")}
    options |= {name: text.format(folder=tmp_path) for name, text in changed.items()}
    arguments = ["quantize", options.pop("PATH"), TOKENS]
    for name, text in options.items():
        arguments += [name, text]
    assert program(*arguments, "--device", "cpu") == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_refused(program: Program, sigma: Path, tmp_path: Path, capfd):
    weights = next((sigma / "transformer").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    arguments = ["quantize", str(sigma), "--method", "rtn", "--out", str(tmp_path / "out")]
    assert program(*arguments) == 1
    assert "is a pickle, which can run code when it is loaded" in capfd.readouterr().err


def test_methods_are_compared(program: Program, sigma: Path, prompts: str, tmp_path: Path, capfd):
    out = tmp_path / "out"
    arguments = ["compare", str(sigma), "--methods", "rtn", "mxfp8_rtn", "--prompts", prompts]
    arguments += ["--out", str(out), "--steps", "2", "--device", "cpu"]
    assert program(*arguments, TOKENS) == 0
    text = capfd.readouterr().out
    assert text.startswith("method")
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    assert [row["method"] for row in rows] == ["full precision", "rtn", "mxfp8_rtn"]
    assert f"{float(rows[1]['psnr']):.1f}" in text
    with Image.open(out / "comparison.png") as picture:
        assert picture.width > picture.height / 2
    assert program(*arguments, "rounding.rounding=x", "--methods", "rtn", "gptq") == 1
    assert "error: rtn: 'rounding.rounding' is not in " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("hunyuan_v1_2", ["model=hunyuan_v1_2"]),
        ("PixArt-alpha/PixArt-Sigma-XL-2-2K-MS", ["model=pixart_sigma_2k"]),
        (
            "{folder}/sigma",
            ["model=pixart_sigma", "model.path='{folder}/sigma'", "model.tokens=20"],
        ),
    ],
)
def test_a_model_is_found_by_name_id_or_folder(
    sigma: Path, tmp_path: Path, model: str, overrides: list[str]
):
    expected = [text.format(folder=tmp_path) for text in overrides]
    assert find_model_overrides(model.format(folder=tmp_path)) == expected


def test_quotes_in_a_folder_survive(tmp_path: Path):
    folder = tmp_path / "it's, a=b"
    tiny.save_flux(folder)
    overrides = find_model_overrides(str(folder))
    assert overrides[0] == "model=flux1_dev"
    assert compose_config("run", overrides).model.path == str(folder)


def test_a_method_is_inspected(
    program: Program, sigma: Path, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert program("inspect", str(sigma), "--method", "nvfp4_rtn") == 0
    text = capfd.readouterr().out
    assert "transformer_blocks.0-1" in text
    assert "e2m1" in text
    assert "GFLOP/s" not in text
    assert program("inspect", "shapes", "--all", "--costs", "trainer=cpu") == 0
    text = capfd.readouterr().out
    assert "transformer_blocks.5" in text
    assert "GFLOP/s" in text
    assert list(tmp_path.iterdir()) == [sigma]  # nothing was written


def test_a_method_may_be_a_file(program: Program, tmp_path: Path, capfd):
    method = tmp_path / "mine.yaml"
    method.write_text((CONF / "method" / "mxfp4_rtn.yaml").read_text())
    assert program("inspect", "shapes", "--method", str(method)) == 0
    from_file = capfd.readouterr().out
    assert program("inspect", "shapes", "--method", "mxfp4_rtn") == 0
    assert capfd.readouterr().out == from_file
