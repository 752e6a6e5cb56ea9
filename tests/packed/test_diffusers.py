"""Stock diffusers saves, loads, casts and offloads packed pipelines."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import fp4dit
import pipelines.inspect
import pipelines.run
from fp4dit.numerics.formats import floating, fp16, integer
from fp4dit.numerics.quantizer import PerChannel, PerGroup, PerInputChannel, PerTensor, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.packed.export import pack_transformer_
from fp4dit.packed.nn import token_quant
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.quantization.apply import quantize_activations_, quantize_weights_
from fp4dit.quantization.fake_quant import FakeQuantize, TimestepFakeQuantize
from fp4dit.quantization.observers import SampleObserver
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.quantization.timestep_ranges import TimestepRangeLinear
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.transforms.low_rank import LowRank
from fp4dit.transforms.smoothing import Smoothing
from fp4dit.utils.errors import UserError
from tests.conftest import Run
from tests.helpers import tiny

FILE = "diffusion_pytorch_model.safetensors"
E2M1 = Quantizer(floating(2, 1), PerGroup(16), AbsMax(fp16))
WEIGHT = tiny.rules_for(E2M1, per_channel_layers=["pos_embed.proj"])
DYNAMIC = [Rule("*", Quantizer(floating(3, 4), PerChannel()))]


def pack_pipeline(
    pipe: DiffusionPipeline, weight: list[Rule], activation: list[Rule]
) -> DiffusionPipeline:
    """Pack a transformer with weights rounded to nearest."""
    dit = pipe.transformer
    rules = assign_rules(find_layers(dit), weight)
    for layer in quantize_weights_(dit, rules).values():
        layer.prepare(torch.randn(3, 4, layer.reduction_size) if layer.transforms else None)
        layer.commit_weight()
    _, inputs = quantize_activations_(dit, activation)
    pack_transformer_(dit, rules, inputs)
    return pipe


def draw_image(pipe: DiffusionPipeline) -> torch.Tensor:
    """Draw an image in two steps, from a fixed seed."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {
        "num_inference_steps": 2,
        "generator": generator,
        "output_type": "pt",
        "use_resolution_binning": False,
    }
    return pipe("a red square", **options).images


@torch.no_grad()
def run_transformer(dit: Any) -> torch.Tensor:
    """Return the output of a PixArt transformer for random inputs of a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    latent, text = (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.randn(2, 7, 32, generator=generator),
    )
    conditions = {"resolution": None, "aspect_ratio": None}
    inputs = {
        "timestep": torch.tensor([700, 700]),
        "added_cond_kwargs": conditions,
        "return_dict": False,
    }
    return dit(latent.to(dit.dtype), encoder_hidden_states=text.to(dit.dtype), **inputs)[0]


@pytest.fixture(scope="module")
def packed_folder(pixart_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a packed pipeline, and return its folder."""
    out = tmp_path_factory.mktemp("packed")
    pack_pipeline(
        PixArtSigmaPipeline.from_pretrained(pixart_folder), WEIGHT, DYNAMIC
    ).save_pretrained(out)
    return out


def test_diffusers_loads_a_saved_pipeline(pixart_folder: Path, packed_folder: Path):
    pipe = pack_pipeline(PixArtSigmaPipeline.from_pretrained(pixart_folder), WEIGHT, DYNAMIC)
    loaded = PixArtSigmaPipeline.from_pretrained(packed_folder)
    assert isinstance(loaded.transformer.transformer_blocks[0].attn1.to_q, PackedLinear)
    assert draw_image(loaded).equal(draw_image(pipe))


@pytest.mark.parametrize(
    "save",
    [
        tiny.save_alpha,
        tiny.save_hunyuan,
        tiny.save_dit,
        tiny.save_sd3,
        tiny.save_flux,
        tiny.save_sana,
    ],
)
def test_every_architecture_is_saved_and_loaded(tmp_path: Path, save: Callable[[Path], None]):
    save(tmp_path / "plain")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "plain")
    layers = find_layers(pipe.transformer)
    odd = [name for name, layer in layers.items() if layer.weight[0].numel() % 16]
    weight = tiny.rules_for(
        E2M1,
        per_channel_layers=odd,
        ignore=[name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1],
    )
    pack_pipeline(pipe, weight, DYNAMIC).save_pretrained(tmp_path / "packed")
    again = DiffusionPipeline.from_pretrained(tmp_path / "packed")
    before, after = pipe.transformer.state_dict(), again.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize("main", [pipelines.run.main, pipelines.inspect.main])
def test_packed_models_are_not_quantized_again(
    run: Run, packed_folder: Path, tmp_path: Path, capfd, main: Callable
):
    assert (
        run("model=pixart_sigma", f"model.path={packed_folder}", "prompts=shapes", main=main) == 1
    )
    error = capfd.readouterr().err
    assert f"{packed_folder} is quantized already (its transformer/config.json has a " in error
    assert "quantization_config of fp4dit)" in error
    assert "Traceback" not in error
    assert not (tmp_path / "store" / "capture").exists()


def test_a_loaded_model_is_saved_unchanged(packed_folder: Path, tmp_path: Path):
    loaded = PixArtSigmaPipeline.from_pretrained(packed_folder)
    loaded.save_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)  # over files that it may have been read from
    before, after = (load_file(place / "transformer" / FILE) for place in (packed_folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    assert draw_image(PixArtSigmaPipeline.from_pretrained(tmp_path)).equal(draw_image(loaded))


def test_an_expanded_model_differs_in_sums_and_is_saved_unchanged(
    pixart_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(token_quant, "find_kernels", lambda: None)
    rows = Quantizer(floating(2, 1), PerChannel(), AbsMax(fp16))
    tokens = [Rule("*", Quantizer(floating(2, 3), PerChannel()))]
    pipe = PixArtSigmaPipeline.from_pretrained(pixart_folder)
    pack_pipeline(pipe, tiny.rules_for(rows), tokens).save_pretrained(tmp_path / "packed")
    pipe = PixArtSigmaPipeline.from_pretrained(tmp_path / "packed")
    before = run_transformer(pipe.transformer)
    assert fp4dit.expand_weights(pipe) > 10
    after = run_transformer(pipe.transformer)
    assert not after.equal(before)
    # A difference in a sum's last digit may move a token to the next value.
    assert (after - before).norm() < 0.05 * before.norm()
    pipe.save_pretrained(tmp_path / "again")
    states = [load_file(tmp_path / name / "transformer" / FILE) for name in ("packed", "again")]
    assert states[0].keys() == states[1].keys()
    assert all(value.equal(states[1][name]) for name, value in states[0].items())


def test_sharded_checkpoints(packed_folder: Path, tmp_path: Path):
    loaded = PixArtSigmaPipeline.from_pretrained(packed_folder)
    loaded.transformer.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = type(loaded.transformer).from_pretrained(tmp_path)
    state, other = loaded.transformer.state_dict(), again.state_dict()
    assert all(other[name].equal(value) for name, value in state.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtype_casts_only_unpacked_tensors(packed_folder: Path, dtype: torch.dtype):
    loaded, cast = (
        PixArtSigmaPipeline.from_pretrained(packed_folder, torch_dtype=t)
        for t in (torch.float32, dtype)
    )
    before, after = loaded.transformer.state_dict(), cast.transformer.state_dict()
    for name, value in before.items():
        if value.dtype == torch.uint8:
            assert after[name].equal(value)
        else:
            assert after[name].equal(value.to(dtype))
    assert cast.transformer.transformer_blocks[0].attn1.to_q.dtype == dtype
    difference = run_transformer(cast.transformer).float() - run_transformer(loaded.transformer)
    assert difference.norm() < 0.05 * run_transformer(loaded.transformer).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("transforms", "activation"),
    [
        ((Hadamard(16),), DYNAMIC),
        ((Smoothing(), LowRank(2)), DYNAMIC),
        ((), []),
    ],
    ids=["rotation", "smoothing and branch", "weights alone"],
)
def test_transforms_are_saved(
    pixart_folder: Path, tmp_path: Path, transforms, activation, dtype: torch.dtype
):
    torch.manual_seed(0)
    weight = tiny.rules_for(E2M1, per_channel_layers=["pos_embed.proj"], transforms=transforms)
    pipe = pack_pipeline(
        PixArtSigmaPipeline.from_pretrained(pixart_folder, torch_dtype=dtype), weight, activation
    )
    pipe.save_pretrained(tmp_path)
    again = PixArtSigmaPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    assert draw_image(again).equal(draw_image(pipe))
    before, after = pipe.transformer.state_dict(), again.transformer.state_dict()
    assert all(
        after[name].dtype == value.dtype and after[name].equal(value)
        for name, value in before.items()
    )


def calibrate_activations(dit: Any, rules: list[Rule]) -> dict[str, FakeQuantize]:
    """Quantize activations, and calibrate static ones with random inputs."""
    grids, _ = quantize_activations_(dit, rules)
    for grid in grids.values():
        width = 32 if grid.quantizer.granularity == PerInputChannel() else 16
        if isinstance(grid, TimestepFakeQuantize):
            grid.calibrate_per_timestep({t: torch.randn(5, width) * t for t in (900.0, 600.0, 1.0)})
        elif grid.static:
            grid.calibrate(torch.randn(5, width))
    return grids


def pack_static(dit: Any, timed: bool) -> Any:
    """Return a packed transformer with static activations."""
    torch.manual_seed(0)
    rules = assign_rules(find_layers(dit), WEIGHT)
    for layer in quantize_weights_(dit, rules).values():
        layer.prepare()
        layer.commit_weight()
    rule = Rule(
        "*", Quantizer(integer(8), PerTensor()), observer=SampleObserver(), per_timestep=timed
    )
    pack_transformer_(dit, rules, dict.fromkeys(calibrate_activations(dit, [rule]), rule))
    return dit


@pytest.mark.parametrize("timed", [False, True])
def test_static_activations_are_saved(pixart_folder: Path, tmp_path: Path, timed: bool):
    dit = pack_static(PixArtSigmaPipeline.from_pretrained(pixart_folder).transformer, timed)
    before = run_transformer(dit)
    dit.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = type(dit).from_pretrained(tmp_path, dtype=dtype)
        scales = {
            name: value
            for name, value in again.state_dict().items()
            if name.endswith("input_fake_quant.scale")
        }
        assert len(scales) == 27
        assert all(value.equal(dit.state_dict()[name]) for name, value in scales.items())
    assert run_transformer(type(dit).from_pretrained(tmp_path)).equal(before)


def test_timestep_ranges_are_saved(pixart_folder: Path, tmp_path: Path):
    torch.manual_seed(0)
    dit = PixArtSigmaPipeline.from_pretrained(pixart_folder).transformer
    weight = tiny.rules_for(
        E2M1,
        per_channel_layers=["pos_embed.proj"],
        timestep_boundaries=[500],
        transforms=[LowRank(2)],
    )
    rules, context = assign_rules(find_layers(dit), weight), TimestepContext()
    context.attach(dit)
    for layer in quantize_weights_(dit, rules, context=context).values():
        if layer.transforms:
            layer.write_weight(torch.randn_like(layer.weight))
        layer.prepare(torch.randn(3, 4, layer.reduction_size) if layer.transforms else None)
        layer.commit_weight()
    _, inputs = quantize_activations_(dit, DYNAMIC)
    pack_transformer_(dit, rules, inputs)
    before = run_transformer(dit)
    dit.save_pretrained(tmp_path)
    again = type(dit).from_pretrained(tmp_path)
    assert isinstance(again.transformer_blocks[0].attn1.to_q, TimestepRangeLinear)
    assert run_transformer(again).equal(before)


def test_importing_fp4dit_is_enough_to_load_and_compile(packed_folder: Path):
    """Load in a process that imports nothing else of fp4dit, and compile without shape checks.

    Checks of shapes cannot be compiled, and compiled calls do without kernels.
    """
    code = (
        "import sys, torch, fp4dit; from diffusers import PixArtSigmaPipeline as P\n"
        "dit = P.from_pretrained(sys.argv[1]).transformer\n"
        "print(type(dit.transformer_blocks[0].attn1.to_q).__name__)\n"
        "from tests.packed.test_diffusers import run_transformer\n"
        "before = run_transformer(dit)\n"
        "compiled = torch.compile(dit, backend='aot_eager', fullgraph=True)\n"
        "print(run_transformer(compiled).equal(before))"
    )
    command = [sys.executable, "-c", code, str(packed_folder)]
    environment = os.environ | {"FP4DIT_KERNEL": "none"}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.stdout.split() == ["PackedLinear", "True"], process.stderr


def test_device_map(packed_folder: Path):
    dit = PixArtSigmaPipeline.from_pretrained(packed_folder).transformer
    mapped = type(dit).from_pretrained(packed_folder / "transformer", device_map={"": "cpu"})
    state = mapped.state_dict()
    assert all(state[name].equal(value) for name, value in dit.state_dict().items())


def iterate_offloaded(packed_folder: Path) -> Iterator[PixArtSigmaPipeline]:
    """Yield pipelines offloaded by each method of diffusers, with the CPU as accelerator."""
    pipe = PixArtSigmaPipeline.from_pretrained(packed_folder)
    pipe.enable_model_cpu_offload(device="cpu")
    yield pipe
    yield PixArtSigmaPipeline.from_pretrained(packed_folder, device_map="balanced")
    pipe = PixArtSigmaPipeline.from_pretrained(packed_folder)
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="leaf_level"
    )
    yield pipe


def test_offloading_changes_nothing(packed_folder: Path):
    before = draw_image(PixArtSigmaPipeline.from_pretrained(packed_folder))
    assert all(draw_image(pipe).equal(before) for pipe in iterate_offloaded(packed_folder))


def test_moves_but_is_not_cast(packed_folder: Path):
    pipe = PixArtSigmaPipeline.from_pretrained(packed_folder)
    pipe.to("cpu")
    dit = pipe.transformer
    with pytest.raises(ValueError, match="unsupported"):
        dit.to(torch.float16)
    assert all(value.is_meta for value in dit.to("meta").state_dict().values())


def test_lora_is_added_but_not_merged(packed_folder: Path):
    pipe = PixArtSigmaPipeline.from_pretrained(packed_folder)
    before = draw_image(pipe)
    torch.manual_seed(0)
    model = get_peft_model(
        pipe.transformer, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=True)
    )
    assert draw_image(pipe).equal(before)  # because LoRA is initialized to zero
    with torch.enable_grad():
        run_transformer.__wrapped__(model).square().mean().backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(grads) == 8
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    with pytest.raises(RuntimeError):
        model.merge_adapter()


def test_a_packed_config_does_not_quantize(pixart_folder: Path, packed_folder: Path):
    config = json.loads((packed_folder / "transformer" / "config.json").read_text())[
        "quantization_config"
    ]
    from fp4dit.packed.integrations.diffusers import DiffusersPackedConfig

    with pytest.raises(UserError, match=r"fp4dit\.QuantizationConfig\(method\)"):
        PixArtSigmaPipeline.from_pretrained(pixart_folder).transformer.from_pretrained(
            pixart_folder / "transformer", quantization_config=DiffusersPackedConfig(**config)
        )


def test_a_changed_checkpoint_is_refused(packed_folder: Path, tmp_path: Path):
    PixArtSigmaPipeline.from_pretrained(packed_folder).save_pretrained(tmp_path)
    path = tmp_path / "transformer" / FILE
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is not what was written"):
        PixArtSigmaPipeline.from_pretrained(tmp_path)


def test_a_config_of_another_version_is_refused(packed_folder: Path, tmp_path: Path):
    PixArtSigmaPipeline.from_pretrained(packed_folder).save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["version"] = 99
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="version 99"):
        PixArtSigmaPipeline.from_pretrained(tmp_path)
