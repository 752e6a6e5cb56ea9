"""The inspect command prints what a run does to each layer, and what it needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pipelines.inspect
from fp4dit.estimate.footprint import measure_footprint
from fp4dit.estimate.machine import Machine
from fp4dit.estimate.stages import StageCost
from fp4dit.quantization.audit import (
    audit_activation_shapes,
    audit_weights,
    checkpoint_bytes,
    effective_bits,
)
from fp4dit.utils.formatting import format_bytes, format_duration
from pipelines.cli.costs import list_cost_warnings, warn_of_slow_dtype
from pipelines.planning.plan import make_plan
from tests.conftest import ROOT, Compose, Run
from tests.helpers.small_runs import FEW, run_stages

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("model", "line", "block"),
    [
        ("pixart_alpha", "289 of 291", "transformer_blocks.0-27"),
        ("pixart_sigma_512", "285 of 287", "transformer_blocks.0-27"),
        ("hunyuan", "459 of 472", "blocks.21-39"),
    ],
)
@pytest.mark.unchecked
def test_a_published_models_config_is_enough(
    run: Run, capfd, monkeypatch: pytest.MonkeyPatch, model: str, line: str, block: str
):
    monkeypatch.setattr(Machine, "detect", lambda *_: Machine(CPU, 1e12, 1 << 35, 1 << 50, None))
    overrides = [f"model={model}", "prompts=shapes", "activation=none"]
    assert run(*overrides, main=pipelines.inspect.main) == 0
    shown = capfd.readouterr()
    assert f"layers       {line} quantized" in shown.out
    assert f"\n{block}\n" in shown.out
    assert "\nformats " not in shown.out  # there are no weights to forecast from
    assert "warning:" not in shown.err


def test_the_layers_of_a_configured_model_need_neither_diffusers_nor_lightning():
    """It would take seconds to import them."""
    program = """
import sys
from pipelines.cli.main import run_command
from pipelines.inspect import main
run_command(main)
print([name for name in ("diffusers", "lightning", "transformers") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "model=pixart_alpha", "costs=false"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.endswith("\n[]\n"), done.stderr
    assert "289 of 291 quantized" in done.stdout


@pytest.mark.unchecked
def test_everything_is_shown_and_no_stage_runs(
    run: Run, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Machine, "detect", lambda *_: Machine(CPU, 1e11, 8 << 30, 1 << 30, None))
    assert run("activation=int8_tensor_static_minmax", main=pipelines.inspect.main) == 0
    lines = capfd.readouterr().out.splitlines()
    words = [line.split() for line in lines]
    assert [
        "ff.net.0.proj",
        "1024x256",
        "e3m0",
        "4.12",
        "*.ff.net.0.proj",
        "uint8",
        "8.00",
        "*",
    ] in words
    assert ["attn2.k", "uint8", "8.00", "*"] in words
    assert ["transformer_blocks.0-5"] in words
    [forecast] = [line for line in lines if line.startswith("formats ")]
    assert "nf4 (20.2 dB at 4.13 bits) is expected to win in these blocks, 2.7 dB" in forecast
    stages = {line[0]: line[1:] for line in words[-8:]}
    estimated = ["capture", "reconstruct", "activate", "generate", "reference", "score"]
    assert list(stages) == [*estimated, "export", "histograms"]
    assert stages["score"] == ["not", "estimated"]
    assert stages["reconstruct"][-2:] == ["28.0", "MB"]  # of files
    assert not list((tmp_path / "store").glob("*/*"))
    assert run("layers=all", "method=fp16", main=pipelines.inspect.main) == 0
    text = capfd.readouterr().out
    assert all(f"\ntransformer_blocks.{i}\n" in text for i in range(6))
    assert "0 of 67 quantized: 16.00 bits per weight" in text
    assert "checkpoint   14.0 MB; 14.0 MB in 16 bits" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weight=fp4dlt"], "'weight' has no option 'fp4dlt'; did you mean fp4dit"),
        (["model.path=/nowhere"], "there is nothing at '/nowhere'"),
        (
            ["weight.granularity.size=100"],
            "a group of 100 does not divide a row of 256 values",
        ),
        (
            ["calibration.num_prompts=0"],
            "calibration.num_prompts, calibration.num_val_prompts and calibration.batch_size must",
        ),
        (["targets=[scores]"], "no stage is called 'scores'"),
        (["targets=[]"], "targets=[] names no stage: give some of capture, "),
        (["layers=foo"], "layers=foo: choose one of merged, all"),
        (["memory_budget_gb=-1"], "memory_budget_gb=-1: give a number of GB, 0 or more"),
        (
            ["model=pixart_alpha", "model.path=owner/name"],
            "owner/name is not on this machine, and HF_HUB_OFFLINE is set",
        ),
        (
            ["model=generic", "model.path=owner/name", "costs=false"],
            "owner/name is not on this machine, and HF_HUB_OFFLINE is set",
        ),
    ],
)
def test_a_mistake_gets_one_message(run: Run, capfd, arguments: list[str], message: str):
    assert run(*arguments, main=pipelines.inspect.main) == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert "Traceback" not in error


def test_help_names_its_own_option(run: Run, capfd):
    assert run("--help", main=pipelines.inspect.main) == 0
    text = capfd.readouterr().out
    assert "[layers=all]" in text
    assert "python -m pipelines.inspect" in text


@pytest.fixture(scope="module")
def shared_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that share the stages before activations."""
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.parametrize("activation", ["e3m4_token", "int8_tensor_static_minmax", "mxfp4"])
@pytest.mark.unchecked
def test_bits_are_those_that_the_run_reports(
    composed: Compose, run: Run, shared_outputs: Path, capfd, activation: str
):
    overrides = [
        *FEW,
        "rounding=nearest",
        f"activation={activation}",
        "prompts.count=1",
        "metrics=paired",
        f"outputs={shared_outputs}",
    ]
    stage = make_plan(composed(*overrides))["generate"].instantiate_stage()
    paths = run_stages(shared_outputs, *overrides, small=[])
    audits = [
        json.loads((paths[stage] / "audit.json").read_text())
        for stage in ("reconstruct", "activate")
    ]
    audit = audit_weights(stage.model.build_on_meta().transformer, stage.weight)
    entries = audit_activation_shapes(
        measure_footprint(stage.model.build_on_meta(), stage.weight).activation_shapes,
        stage.activation,
    )
    assert effective_bits(audit) == audits[0]["bits_weight"]
    assert (
        checkpoint_bytes(stage.model.build_on_meta().transformer, audit)
        == audits[0]["checkpoint_bytes"]
    )
    assert effective_bits(entries) == pytest.approx(audits[1]["bits_activation"], rel=1e-12)
    assert {e.name: e.bits for e in entries} == {e["name"]: e["bits"] for e in audits[1]["layers"]}
    assert run(*overrides, main=pipelines.inspect.main, outputs=False) == 0
    assert capfd.readouterr().out.count("in the store, or not needed") == 8


@pytest.mark.parametrize(
    ("host", "disk", "gpu_memory", "budget", "expected"),
    [
        (100, 1000, 100, 5, []),
        (
            100,
            1,
            None,
            5,
            ["7.0 GB of disk are needed, and 1.0 GB are left at outputs=o"],
        ),
        (
            3,
            1000,
            None,
            2,
            ["6.0 GB of host memory, and there are 3.0 GB: give a smaller rounding.batch_size or"],
        ),
        (
            100,
            1000,
            1,
            5,
            ["5.0 GB of GPU memory, and there are 1.0 GB: give a smaller rounding.batch_size"],
        ),
        (
            100,
            1000,
            None,
            1,
            ["of the 4.0 GB of calibration data of x, the part above memory_budget_gb=1"],
        ),
        (100, 1000, None, 1000, ["memory_budget_gb=1000 is more than the 100.0 GB of memory"]),
    ],
)
def test_costs_that_do_not_fit_are_warned_of(
    host: int, disk: int, gpu_memory: int | None, budget: int, expected: list[str]
):
    """Sizes are in GB."""
    machine = Machine(CPU, 1.0, host * 10**9, disk * 10**9, gpu_memory and gpu_memory * 10**9)
    cost = StageCost(1.0, 5 * 10**9, 6 * 10**9, 7 * 10**9, "rounding.batch_size", 4 * 10**9)
    warnings = list(list_cost_warnings({"x": cost}, machine, budget * 1e9, "o"))
    assert len(warnings) == len(expected)
    assert all(part in text for part, text in zip(expected, warnings, strict=True))


@pytest.mark.parametrize(
    ("speed", "dtype", "warned"),
    [(1e3, torch.bfloat16, True), (1e3, torch.float32, False), (1e18, torch.bfloat16, False)],
)
def test_dtypes_that_the_machine_emulates(speed: float, dtype: torch.dtype, warned: bool):
    warnings = list(warn_of_slow_dtype(Machine(CPU, speed, 1, 1, None), dtype))
    assert ["model.dtype=float32" in text for text in warnings] == [True] * warned


@pytest.mark.unchecked
def test_warnings_come_on_stderr(run: Run, capfd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Machine, "detect", lambda *_: Machine(CPU, 1e11, 10**7, 10**6, None))
    assert (
        run(
            "trainer=gpu" if not torch.cuda.is_available() else "trainer=cpu",
            main=pipelines.inspect.main,
        )
        == 0
    )
    error = capfd.readouterr().err.splitlines()
    assert sum("1.0 MB are left" in line for line in error) == 1
    assert sum("memory_budget_gb=4 is more than the 10.0 MB" in line for line in error) == 1
    assert sum("Estimated for the CPU" in line for line in error) == (not torch.cuda.is_available())


def test_quantities_are_readable():
    assert [format_duration(seconds) for seconds in (5, 119, 120, 7200, 200_000)] == [
        "5 s",
        "119 s",
        "2 min",
        "2 h",
        "2 days",
    ]
    assert [format_bytes(count) for count in (0, 3e5, 2.5e9)] == ["", "0.3 MB", "2.5 GB"]
