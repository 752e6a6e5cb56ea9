"""`fp4dit.quantize` on pipelines in memory, compared with the stages of the command line."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline
from hydra import initialize
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import fp4dit
from fp4dit.api.compare import draw_frames
from fp4dit.api.presets import compose_for_pipeline, compose_preset
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.utils.errors import UserError
from tests.helpers import tiny
from tests.helpers.small_runs import run_stages

pytestmark = pytest.mark.unchecked

OPTIONS = ["model=pixart_sigma", "model.tokens=20", "calibration.batch_size=2"]
GROUPS = "weight.granularity.size=32"
CALIBRATION = [f"a {color} star" for color in ("red", "green", "blue", "black", "white")]
DRAWN = ["a red square", "two black circles"]

SMALL = [
    "calibration.num_prompts=4",
    "calibration.num_val_prompts=1",
    "generation.steps=2",
    "prompts.count=2",
]

# Presets that need every kind of data, or none, with the overrides that fit a tiny model.
METHODS = {
    "fp4dit": [GROUPS, "rounding.steps=3"],
    "fp4dit_ft": [GROUPS, "rounding.steps=3", "finetune.steps=2"],
    "gptq": [GROUPS],
    "q_diffusion": ["rounding.weights.steps=3", "rounding.inputs.steps=2"],
    "svdquant_int4": [
        *("weight.granularity.size=16", "activation.granularity.size=16"),
        "transform=smooth_low_rank_k32",
    ],
    "nvfp4_4over6": [],
    "rtn": [],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixart")
    tiny.save(folder)
    return folder


@pytest.fixture
def pipe(folder: Path) -> Any:
    return load_pipeline(folder)


def load_pipeline(folder: Path) -> Any:
    pipe: Any = PixArtSigmaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: DiffusionPipeline, method: str, overrides: Sequence[str]) -> list[np.ndarray]:
    preset = compose_for_pipeline(pipe, method, overrides, steps=2)
    return [np.asarray(image) for [image] in draw_frames(pipe, preset, DRAWN)]


@pytest.mark.parametrize("method", METHODS)
def test_weights_and_images_equal_those_of_the_stages(
    method: str, folder: Path, pipe: Any, tmp_path: Path
):
    overrides = [*OPTIONS, *METHODS[method]]
    for name, prompts in {"calibration": CALIBRATION, "evaluation": DRAWN}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(prompts))
    folders = run_stages(
        tmp_path / "outputs",
        f"method={method}",
        *overrides,
        f"model.path={folder}",
        "model.dtype=float32",
        "prompts=file",
        f"prompts.calibration.path={tmp_path}/calibration.json",
        f"prompts.evaluation.path={tmp_path}/evaluation.json",
        small=SMALL,
        targets=["generate"],
    )
    report = fp4dit.quantize(pipe, method, prompts=CALIBRATION, overrides=overrides, steps=2)
    paths = sorted((folders["generate"] / "images").glob("*.png"))
    for image, path in zip(draw(pipe, method, overrides), paths, strict=True):
        assert (image == np.asarray(Image.open(path))).all()
    audit = json.loads((folders["reconstruct"] / "audit.json").read_text())
    assert report.bits_weight == audit["bits_weight"]
    assert report.transformer.num_quantized == len(
        [layer for layer in pipe.transformer.modules() if isinstance(layer, PackedLinear)]
    )
    assert report.bytes < report.bytes16
    activations = json.loads((folders["activate"] / "audit.json").read_text())
    if report.block_errors:
        weights = folders.get("finetune", folders["reconstruct"])
        blocks = json.loads((weights / "blocks.json").read_text())
        assert report.block_errors == {block["unit"]: block["error"] for block in blocks}
        assert report.bits_activation == pytest.approx(activations["bits_activation"], rel=0.05)


def test_a_saved_pipeline_loads_again(pipe: Any, tmp_path: Path):
    """In another process, too: see tests/packed/test_quantization_config.py."""
    report = fp4dit.quantize(
        pipe,
        "nvfp4_rtn",
        components=["transformer", "text_encoder"],
        overrides=["text_encoder=nvfp4"],
    )
    assert {*report.components} == {"transformer", "text_encoder"}
    pipe.save_pretrained(tmp_path / "packed")
    again = PixArtSigmaPipeline.from_pretrained(tmp_path / "packed")
    before, after = (
        run(
            DRAWN[0],
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(0),
            use_resolution_binning=False,
            output_type="np",
        ).images
        for run in (pipe, again)
    )
    assert (before == after).all()


def test_a_killed_call_resumes(pipe: Any, folder: Path, tmp_path: Path, monkeypatch):
    """The second call finds the first one's results by the weights of the transformer."""
    options: Any = {"prompts": CALIBRATION, "overrides": [*OPTIONS, GROUPS], "steps": 1}
    from fp4dit.api import calibrated

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def read_times() -> list[int]:
        made = sorted(tmp_path.glob("store/*/*/manifest.json"))
        return [path.stat().st_mtime_ns for path in made]

    with monkeypatch.context() as patch:
        patch.setattr(calibrated, "load_and_pack_", stop)
        with pytest.raises(KeyboardInterrupt):
            fp4dit.quantize(pipe, "gptq", work_dir=tmp_path, **options)
    times = read_times()
    assert len(times) == 3
    fp4dit.quantize(load_pipeline(folder), "gptq", work_dir=tmp_path, **options)
    assert read_times() == times


def test_a_failure_leaves_the_pipeline_as_it_was(pipe: Any, monkeypatch):
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    torch.use_deterministic_algorithms(False)
    from fp4dit.rounding.gptq import GPTQ

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(GPTQ, "round_unit", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        fp4dit.quantize(pipe, "gptq", prompts=CALIBRATION, overrides=[*OPTIONS, GROUPS], steps=1)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    assert not torch.are_deterministic_algorithms_enabled()


def test_it_works_in_threads_and_inside_a_hydra_application(folder: Path):
    GlobalHydra.instance().clear()
    with initialize(version_base=None, config_path=None):
        pipes = [load_pipeline(folder) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            reports = list(pool.map(lambda pipe: fp4dit.quantize(pipe, "nvfp4_rtn", seed=1), pipes))
        assert GlobalHydra.instance().is_initialized()
    states = [pipe.transformer.state_dict() for pipe in pipes]
    assert all(states[1][name].equal(value) for name, value in states[0].items())
    assert reports[0].bits_weight == reports[1].bits_weight


def test_a_method_from_a_file(pipe: Any, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults:\n  - override /weight: e2m1_channel\n")
    with pytest.raises(UserError, match="its first line must be"):
        fp4dit.inspect(pipe, str(path))
    path.write_text(
        "# @package _global_\ndefaults:\n  - override /weight: e2m1_channel\n"
        "  - override /rounding: nearest\n  - override /activation: none\n"
    )
    report = fp4dit.quantize(pipe, str(path))
    assert {layer.format for layer in report.transformer.weights} == {"e2m1", "fp16"}
    assert report.bits_activation == 16.0


ROUNDING = """
from dataclasses import dataclass
from fp4dit.rounding import RoundingMethod

@dataclass(frozen=True)
class Forgetful(RoundingMethod):
    def round_unit(self, module, layers, dataset, trainers):
        for layer in layers:
            layer.commit_weight()
"""


@pytest.mark.parametrize(
    ("line", "target", "message"),
    [
        ("", "Forgetful", "Forgetful.round_unit has returned None: it must return the learning"),
        ("", "Forgetfull", "has no Forgetfull; did you mean Forgetful?"),
        ("", "Forgetful.GPTQ", "own_rounding.Forgetful has no GPTQ; correct the path"),
        ("override /weight: e2m1_chanel", "Forgetful", "mine.yaml: weight=e2m1_chanel: 'weight' "),
        ("override /wieght: x", "Forgetful", "mine.yaml: there is no group 'wieght'; did you mean"),
        (
            "override weight: x",
            "Forgetful",
            "mine.yaml: there is no group 'method/weight'; write /",
        ),
    ],
)
def test_a_mistake_in_ones_own_method_gets_one_line(
    pipe: Any, tmp_path: Path, monkeypatch, line: str, target: str, message: str
):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_rounding.py").write_text(ROUNDING)
    path, defaults = tmp_path / "mine.yaml", ["rtn", "override /activation: none", line]
    lines = ["# @package _global_", "defaults:", *(f"  - {item}" for item in defaults if item)]
    path.write_text("\n".join([*lines, f"rounding: {{_target_: own_rounding.{target}}}"]))
    with pytest.raises(UserError) as error:
        fp4dit.quantize(pipe, str(path), prompts=CALIBRATION, overrides=OPTIONS[:2], steps=1)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_target_is_explained():
    paths = {
        "own_roundin.Mine": "own_roundin: correct the path, or put own_roundin.py where Python",
        "../x": "give the path by which Python imports the class",
    }
    for target, message in paths.items():
        with pytest.raises(UserError) as error:
            compose_preset("rtn", [f"rounding._target_={target}"]).rounding  # noqa: B018
        assert str(error.value).startswith(f"rounding._target_={target}: ")
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gptx", {}, "there is no such preset; did you mean gptq"),
        ("none.yaml", {}, "there is no such file"),
        ("fp16", {}, "does not quantize a trained model"),
        ("gptq", {}, r"gptq needs prompts, because .*GPTQ.*32 to 128 are sensible"),
        ("gptq", {"prompts": "a fox"}, "give a list of texts"),
        ("gptq", {"prompts": ["a fox"]}, "give at least 2"),
        ("rtn", {"overrides": ["weight.formt=e2m1"]}, "did you mean weight.format"),
        ("rtn", {"overrides": "weight.format=e2m1"}, "give a list"),
        ("rtn", {"overrides": ["method=gptq"]}, "as the argument `method`"),
        ("rtn", {"overrides": ["weight.format=e9m9"]}, "e9m9"),
        ("rtn", {"components": ["unet"]}, "it has text_encoder, transformer"),
        ("rtn", {"components": "transformer"}, "give a tuple"),
    ],
)
def test_a_mistake_gets_one_message(pipe: Any, method: str, options: Any, message: str):
    if method == "gptq":
        options = {"overrides": [GROUPS], **options}
    with pytest.raises(UserError, match=message):
        fp4dit.quantize(pipe, method, **options)
    assert not any(isinstance(layer, PackedLinear) for layer in pipe.transformer.modules())


def test_a_quantized_pipeline_is_refused(pipe: Any):
    fp4dit.quantize(pipe, "rtn")
    with pytest.raises(UserError, match=r"is quantized already \(fp4dit\)"):
        fp4dit.quantize(pipe, "rtn")


def test_few_prompts_are_a_warning(pipe: Any):
    quantize = unwrap(fp4dit.quantize)  # without the wrapper that checks shapes
    with pytest.warns(UserWarning, match="5 prompts are few") as warned:
        quantize(pipe, "gptq", prompts=CALIBRATION, overrides=[*OPTIONS, GROUPS], steps=1)
    files = [warning.filename for warning in warned if "few" in str(warning.message)]
    assert files == [__file__]
