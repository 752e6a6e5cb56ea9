"""The export stage packs every preset in the bits that its table counts."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from benchmarks import published
from fp4dit.numerics.quantizer import PerInputChannel
from fp4dit.packed.encoding.layout import Layout
from fp4dit.packed.encoding.qparams import FloatEncoding
from fp4dit.packed.export import count_state_bytes, pack_transformer_
from fp4dit.packed.model import ModelDescription, WeightGroup, insert_packed_layers_
from fp4dit.packed.model_card import CardFacts, render_model_card
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.quantization.apply import (
    find_activation_slots,
    quantize_activations_,
    quantize_weights_,
)
from fp4dit.quantization.audit import LayerAudit, audit_weights
from fp4dit.quantization.fake_quant import FakeQuantize, TimestepFakeQuantize
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.utils.hub import resolve_package_path
from pipelines.config.resolvers import list_options
from pipelines.planning.plan import make_plan
from tests.conftest import ROOT, Compose, Run

# The search of these presets takes 10 s. They pack the same formats as llmfp4_baseline.
SLOW = {"msfp", "lowbit_fp_diff"}
# These presets differ from others only in rounding, which is not tested here.
OTHER_ROUNDING = {"autoround_int4", "autoround_ulp", "rtn_int4", "svdquant_int4_gptq"}
OTHER_ROUNDING |= {"autoround_mxfp4", "autoround_nvfp4", "svdquant_nvfp4_gptq", "rtn_fp4"}
METHODS = sorted(set(list_options("method")) - {"fp16"} - SLOW - OTHER_ROUNDING)
SMALL = [
    "calibration.num_prompts=2",
    "calibration.num_val_prompts=1",
    "calibration.batch_size=1",
    "prompts.count=2",
    "generation.steps=2",
]


@pytest.fixture(scope="module")
def block_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random transformer of one block and width 128, which all groups divide."""
    torch.manual_seed(0)
    config = PixArtTransformer2DModel.load_config(
        resolve_package_path("pkg://fp4dit/worlds/shapes/weights"), subfolder="transformer"
    )
    width = {"num_attention_heads": 2, "cross_attention_dim": 128, "caption_channels": 128}
    folder = tmp_path_factory.mktemp("block")
    PixArtTransformer2DModel.from_config({**config, "num_layers": 1, **width}).save_pretrained(
        folder
    )
    return folder


@torch.no_grad()
def run_transformer(dit: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latent, text = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.randn(2, 5, 128, generator=generator),
    )
    conditions = {"resolution": None, "aspect_ratio": None}
    return dit(
        latent, text, torch.tensor([700, 700]), added_cond_kwargs=conditions, return_dict=False
    )[0]


@dataclass
class QuantizedBlock:
    """A transformer that a preset quantized, its rules, and the audit of its weights."""

    dit: PixArtTransformer2DModel
    weight: dict[str, Rule]
    activation: dict[str, Rule]
    audit: list[LayerAudit]


def quantize_by_preset(composed: Compose, folder: Path, method: str) -> QuantizedBlock:
    """Round to nearest and fit transforms to noise, because only packing is tested."""
    torch.manual_seed(0)
    steps = make_plan(composed(f"method={method}"))
    weight, activation = (
        steps["reconstruct"].instantiate_stage().weight,
        steps["activate"].instantiate_stage().activation,
    )
    dit = PixArtTransformer2DModel.from_pretrained(folder)
    audit = audit_weights(dit, weight)
    rules, context = assign_rules(find_layers(dit), weight), TimestepContext()
    context.attach(dit)
    layers = quantize_weights_(dit, rules, context=context)
    grids, inputs = quantize_activations_(dit, activation)
    for layer in layers.values():
        grid, layer.input_fake_quant = layer.input_fake_quant, torch.nn.Identity()
        layer.prepare(torch.randn(2, 8, layer.reduction_size) if layer.transforms else None)
        layer.commit_weight()
        layer.input_fake_quant = grid
    for name, grid in grids.items():
        if grid.static:
            calibrate(grid, find_activation_slots(dit)[name].width)
    return QuantizedBlock(dit, rules, inputs, audit)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.unchecked
def test_presets_are_bit_exact_after_loading(
    composed: Compose, block_folder: Path, tmp_path: Path, no_kernels: None, method: str
):
    block = quantize_by_preset(composed, block_folder, method)
    before = run_transformer(block.dit)
    pack_transformer_(block.dit, block.weight, block.activation)
    block.dit.save_pretrained(tmp_path)
    again = PixArtTransformer2DModel.from_pretrained(tmp_path)
    assert run_transformer(again).equal(before)
    packed_layers = [layer for layer in again.modules() if isinstance(layer, PackedLinear)]
    packed = sum(
        value.nbytes for layer in packed_layers for value in layer.packed_buffers.values()
    ) + sum(count_state_bytes(layer.transforms) for layer in packed_layers)
    counted = sum(layer.bits * layer.values for layer in block.audit if layer.rule != "-") / 8
    assert packed == pytest.approx(
        counted, rel=1e-3, abs=8 * len(packed_layers)
    )  # factors of scales, and short last groups


def calibrate(grid: FakeQuantize, width: int) -> None:
    if isinstance(grid, TimestepFakeQuantize):
        grid.calibrate_per_timestep({t: torch.randn(5, width) for t in (900.0, 1.0)})
    else:
        channels = grid.quantizer.granularity == PerInputChannel()
        grid.calibrate(torch.randn(1 if channels else 5, width))


@pytest.mark.unchecked
def test_diffusers_loads_an_exported_folder(
    run: Run, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    few = [*SMALL, "method=rtn_fp4", "targets=[export]", "progress=none"]
    assert run(*few, "+export.at_least.psnr=99") == 1
    assert "psnr is" in capsys.readouterr().err
    assert run(*few, "+export.at_least.fid=1") == 1
    assert "fid, which is not scored" in capsys.readouterr().err
    assert run(*few, "+export.at_least.psnr=99", "export.force=true") == 0
    folder = next(tmp_path.glob("store/export/*/pipeline"))
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    assert isinstance(pipe.transformer.proj_out, PackedLinear)
    drawn = next(tmp_path.glob("store/generate/*/images.json"))
    pipe.set_progress_bar_config(disable=True)
    entries = json.loads(drawn.read_text())
    images = pipe(
        [entry["prompt"] for entry in entries],
        generator=[torch.Generator().manual_seed(entry["seed"]) for entry in entries],
        num_inference_steps=2,
        guidance_scale=4.5,
        max_sequence_length=pipe.tokenizer.model_max_length,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="pt",
    ).images
    for i, image in enumerate(images):
        with Image.open(drawn.parent / "images" / f"{i:05}.png") as simulated:
            assert to_pil_image(image).tobytes() == simulated.tobytes()
    written = json.loads((folder.parent / "export.json").read_text())
    assert written["bytes"] < 0.29 * written["bytes16"]
    text = "".join(
        path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".md")
    )
    assert str(tmp_path) not in text
    assert "python -m pipelines.run" in (folder / "README.md").read_text()
    assert "Nothing else of the pipeline is quantized" in (folder / "README.md").read_text()
    draw_in_few_steps(monkeypatch)
    check_snippets(folder, drawn.parent / "images")
    check_with_text_encoder(run, few, tmp_path)


def draw_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pipeline draw in two steps where the code does not say in how many."""
    draw = PixArtSigmaPipeline.__call__
    monkeypatch.setattr(
        PixArtSigmaPipeline,
        "__call__",
        lambda pipe, *args, **options: draw(pipe, *args, **{"num_inference_steps": 2, **options}),
    )


def check_snippets(folder: Path, images: Path) -> None:
    """Check that the code in the card and in the documentation draws an image.

    The card's call draws the first scored image, except for rounding errors, because it is drawn
    alone.
    """
    guide, reference = "guides/export-and-load.md", "reference/checkpoint.md"
    for page in (folder / "README.md", ROOT / "docs" / guide, ROOT / "docs" / reference):
        namespace: dict[str, Any] = {}
        code = next(
            code
            for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
            if "pipe(" in code
        )
        exec(re.sub(r'(from_pretrained\(\s*")[^"]*', rf"\g<1>{folder}", code), namespace)
        assert namespace["image"].size == (64, 64)
        if page.parent == folder:
            drawn, first, second = (
                np.asarray(image, float)
                for image in (
                    namespace["image"],
                    *map(Image.open, (images / "00000.png", images / "00001.png")),
                )
            )
            assert np.abs(drawn - first).mean() < 3 < 30 < np.abs(drawn - second).mean()


def check_with_text_encoder(run: Run, few: list[str], tmp_path: Path) -> None:
    """Export with a quantized text encoder, after the same stages."""
    before = set(tmp_path.glob("store/export/*/pipeline"))
    assert run(*few, "text_encoder=e2m1_g64") == 0
    (folder,) = set(tmp_path.glob("store/export/*/pipeline")) - before
    written = json.loads((folder.parent / "export.json").read_text())["text_encoder"]
    assert written["bytes"] < written["bytes16"]  # although unpacked tensors have 32 bits here
    assert 0.01 < written["error"] < 0.5
    card = (folder / "README.md").read_text()
    assert f"changes its hidden states on 2 prompts by {written['error']:.2%}" in card
    assert "| `*` | e2m1 | 18 | 4.25 |" in card
    encoder = PixArtSigmaPipeline.from_pretrained(folder).text_encoder
    assert sum(isinstance(layer, PackedLinear) for layer in encoder.modules()) == 18


def test_card_without_a_text_encoder_has_no_call():
    scores = {"metrics": {}, "about": {}, "n": 1}
    text = render_model_card(
        CardFacts("a", "PixArtSigmaPipeline", None, [], [], scores, 1, 2, None, "command", {})
    )
    assert "pipe(" not in text
    assert "It has no text encoder: give `from_pretrained` the original's" in text


@pytest.mark.parametrize("model", ["pixart_alpha", "pixart_sigma", "hunyuan"])
def test_size_of_published_transformers(composed: Compose, model: str):
    """Check that a packed transformer takes less than 0.29 of its bytes in 16 bits."""
    with torch.device("meta"):
        dit = published.build_random_transformer(model).half()
    rules = assign_rules(
        find_layers(dit),
        make_plan(composed("method=fp4dit"))["reconstruct"].instantiate_stage().weight,
    )
    whole = count_state_bytes(dit)
    groups = {}
    for name, rule in rules.items():
        groups.setdefault(rule.quantizer, []).append(name)
    scales = {"scale": FloatEncoding(2)}
    weights = [
        WeightGroup(names, Layout((q.format,), q.granularity, scales), (), ())
        for q, names in groups.items()
    ]
    insert_packed_layers_(dit, ModelDescription(weights, ()), torch.float16)
    assert count_state_bytes(dit) < 0.29 * whole
