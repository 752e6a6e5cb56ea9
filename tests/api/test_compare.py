"""`fp4dit.compare`, `inspect` and `methods`."""

import io
import subprocess
import sys
from inspect import unwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline
from PIL import Image, ImageChops

import fp4dit
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.utils.calls import remove_hooks
from fp4dit.utils.errors import UserError
from tests.helpers import tiny
from tests.helpers.tiny_families import wan

pytestmark = pytest.mark.unchecked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pixart")
    tiny.save(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    pipe: Any = PixArtSigmaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_scores_are_those_of_the_images(pipe: Any):
    comparison = fp4dit.compare(pipe, ["rtn", "mxfp8_rtn"], prompts=tiny.PROMPTS[:2], steps=2)
    assert not any(isinstance(layer, PackedLinear) for layer in pipe.transformer.modules())
    full, *others = comparison.methods
    assert [compared.method for compared in others] == ["rtn", "mxfp8_rtn"]
    for compared, row in zip(others, comparison.to_rows()[1:], strict=True):
        expected = []
        for image, reference in zip(compared.images, full.images, strict=True):
            error = (np.asarray(image) / 255.0 - np.asarray(reference) / 255.0) ** 2
            expected.append(-10 * np.log10(error.mean()))
        assert compared.values["psnr"] == pytest.approx(expected, abs=1e-3)
        assert row["psnr"] == pytest.approx(np.mean(expected), abs=1e-3)
        assert row["psnr_low"] <= row["psnr"] <= row["psnr_high"]
    assert others[1].values["psnr"] > others[0].values["psnr"]  # 8 bits against 4
    text = str(comparison)
    assert text.startswith("method")
    assert "PSNR, dB" in text
    width, height = comparison.draw_grid(tile=32).size
    assert width > 4 * 32
    assert height > 2 * 32
    assert "<img src=" in comparison._repr_mimebundle_()["text/html"]


def test_videos_are_compared_frame_by_frame_and_play_in_step():
    torch.manual_seed(0)
    pipe: Any = wan()
    options = [f"+model.options.{x}" for x in ("height=16", "width=16", "num_frames=5")]
    comparison = fp4dit.compare(
        pipe,
        ["nvfp4_rtn"],
        prompts=tiny.PROMPTS[:2],
        steps=2,
        overrides=options,
        metrics=["psnr", "flicker"],
    )
    full, quantized = comparison.methods
    assert [len(frames) for frames in quantized.frames] == [5, 5]
    psnr, flicker = [], []
    for frames, reference in zip(quantized.frames, full.frames, strict=True):
        errors = np.array(
            [to_array(a) - to_array(b) for a, b in zip(frames, reference, strict=True)]
        )
        psnr.append(np.mean(-10 * np.log10((errors**2).mean((1, 2, 3)))))
        flicker.append(np.sqrt((np.diff(errors, axis=0) ** 2).mean()))
    assert quantized.values["psnr"] == pytest.approx(psnr, abs=1e-3)
    assert quantized.values["flicker"] == pytest.approx(flicker, abs=1e-5)
    assert quantized.images == [frames[0] for frames in quantized.frames]
    buffer = io.BytesIO()
    comparison.save_video(buffer, tile=32)
    with Image.open(buffer) as animation:
        assert getattr(animation, "n_frames", 1) == 5
        animation.seek(3)
        drawn = animation.convert("RGB")
    assert ImageChops.difference(drawn, comparison.draw_grid(tile=32, frame=3)).getbbox() is None
    mean = f"{255 * np.mean(flicker):.2f}"
    assert "Flicker, levels" in str(comparison)
    assert mean in str(comparison)
    assert comparison.to_rows()[1]["flicker"] == pytest.approx(np.mean(flicker), abs=1e-5)


def to_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image) / 255.0


def test_prompts_are_drawn_or_calibrated_on_but_not_both(pipe: Any):
    options: Any = {"overrides": ["weight.granularity.size=32"], "steps": 1}
    with pytest.warns(UserWarning, match="2 prompts are few") as warned:
        # Without the wrapper that checks shapes, from whose line it would be called.
        comparison = unwrap(fp4dit.compare)(pipe, ["gptq"], prompts=tiny.PROMPTS, **options)
    files = [warning.filename for warning in warned if "few" in str(warning.message)]
    assert files == [__file__]
    assert list(comparison.prompts) == tiny.PROMPTS[:2]
    with pytest.raises(UserError, match="is both calibrated on and drawn"):
        fp4dit.compare(
            pipe, ["gptq"], prompts=tiny.PROMPTS, calibration_prompts=tiny.PROMPTS[1:], **options
        )
    with pytest.raises(UserError, match="there is no psnrr; did you mean psnr"):
        fp4dit.compare(pipe, ["rtn"], prompts=["a fox"], metrics=["psnrr"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rounding.damping=0.1"], "rtn: 'rounding.damping' is not in the configuration"),
        (["+activation.ignore=[proj_out]"], "gptq: a key before .ignore in an override holds"),
        (["+weight.ignore=[proj]"], "rtn: no layer is left for the rule 'proj'"),
    ],
)
def test_an_override_names_the_method_that_refuses_it(pipe: Any, overrides: Any, message: str):
    with pytest.raises(UserError) as error:
        fp4dit.compare(pipe, ["rtn", "gptq"], prompts=tiny.PROMPTS, overrides=overrides)
    assert str(error.value).startswith(message)
    assert "overrides go to all methods" in str(error.value)
    with pytest.raises(UserError, match=r"^method=gptk: there is no such preset"):
        fp4dit.compare(pipe, ["gptk"], prompts=tiny.PROMPTS, overrides=overrides)


@pytest.mark.parametrize(
    ("overrides", "tokens"),
    [([], 20), (["model.tokens=30"], 30), (["model=pixart_sigma"], 300)],
)
def test_prompts_have_as_many_tokens_as_the_tokenizer_takes(
    pipe: Any, overrides: list[str], tokens: int
):
    assert pipe.tokenizer.model_max_length == 20
    counts = set()

    def count_tokens(_: Any, args: Any, kwargs: Any) -> None:
        counts.add(kwargs["encoder_hidden_states"].shape[1])

    with remove_hooks([pipe.transformer.register_forward_pre_hook(count_tokens, with_kwargs=True)]):
        fp4dit.compare(pipe, ["rtn"], prompts=["a star"], overrides=overrides, steps=1)
    assert counts == {tokens}


def test_inspect_says_what_quantize_does(folder: Path):
    pipe: Any = PixArtSigmaPipeline.from_pretrained(folder)
    from_path = fp4dit.inspect(folder, "nvfp4_rtn")
    from_memory = fp4dit.inspect(pipe, "nvfp4_rtn")
    assert str(from_path) == str(from_memory)
    assert "\nformats " in str(from_path)  # the weights of the folder are read
    done = fp4dit.quantize(pipe, "nvfp4_rtn")
    assert done.transformer.list_blocks() == from_path.transformer.list_blocks()
    assert done.bits_weight == from_path.bits_weight
    left = fp4dit.inspect(folder, "nvfp4_rtn", overrides=["+weight.ignore=[proj_out]"]).reasons_left
    assert list(left) == ["transformer.proj_out"]
    assert "in 16 bits" in left["transformer.proj_out"]
    assert "<table>" in from_path._repr_html_()
    with pytest.raises(UserError, match=r"model_index\.json"):
        fp4dit.inspect(folder / "vae", "nvfp4_rtn")


def test_methods_are_listed_without_torch():
    code = (
        "import sys, fp4dit; presets = fp4dit.methods(); print(presets); "
        "assert 'torch' not in sys.modules; assert presets['gptq'].path.is_file()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(fp4dit.methods())
    assert any(line.startswith("gptq  ") and "GPTQ (arXiv:2210.17323)" in line for line in lines)
    assert all(info.description for info in fp4dit.methods().values())


def test_public_names_are_all_there():
    names = {"quantize", "inspect", "methods", "compare", "QuantizationConfig"}
    assert names <= set(fp4dit.__all__)
    for name in fp4dit.__all__:
        assert getattr(fp4dit, name).__doc__
