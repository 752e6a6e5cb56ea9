"""Packed pipelines as stock diffusers saves and loads them."""

import json
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

import pipelines.inspect
import pipelines.run
from fp4dit import policy
from fp4dit.clock import Clock
from fp4dit.errors import UserError
from fp4dit.formats import floating, fp16, integer
from fp4dit.grid import Grid, TimedGrid
from fp4dit.hadamard import Hadamard
from fp4dit.observers import Sample
from fp4dit.packed.export import pack_transformer_
from fp4dit.packed.layer import PackedLinear
from fp4dit.policy import Rule, everywhere
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.ranges import Ranges
from fp4dit.scales import AbsMax
from fp4dit.transforms import Balance, LowRank
from tests import tiny
from tests.conftest import Run

FILE = "diffusion_pytorch_model.safetensors"
E2M1 = Quantizer(floating(2, 1), Granularity("group", 16), AbsMax(fp16))
WEIGHT = everywhere(E2M1, by_row=["pos_embed.proj"])
ONLINE = [Rule("*", Quantizer(floating(3, 4), Granularity("row")))]


def quantized(pipe: DiffusionPipeline, weight: list[Rule], activation: list[Rule]) -> DiffusionPipeline:
    """The transformer packed, its weights to nearest."""
    dit = pipe.transformer
    rules = policy.assign(policy.layers(dit), weight)
    for layer in policy.quantize_weights_(dit, rules).values():
        layer.prepare(torch.randn(3, 4, layer.width) if layer.transforms else None)
        layer.freeze()
    _, inputs = policy.quantize_activations_(dit, activation)
    pack_transformer_(dit, rules, inputs)
    return pipe


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "generator": generator, "output_type": "pt", "use_resolution_binning": False}
    return pipe("a red square", **options).images


@torch.no_grad()
def answer(dit: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latent, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
    conditions = {"resolution": None, "aspect_ratio": None}
    given = {"timestep": torch.tensor([700, 700]), "added_cond_kwargs": conditions, "return_dict": False}
    return dit(latent.to(dit.dtype), encoder_hidden_states=text.to(dit.dtype), **given)[0]


@pytest.fixture(scope="module")
def folder(pixart_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    quantized(PixArtSigmaPipeline.from_pretrained(pixart_folder), WEIGHT, ONLINE).save_pretrained(out)
    return out


def test_stock_diffusers_loads_what_was_saved(pixart_folder: Path, folder: Path):
    pipe = quantized(PixArtSigmaPipeline.from_pretrained(pixart_folder), WEIGHT, ONLINE)
    loaded = PixArtSigmaPipeline.from_pretrained(folder)
    assert isinstance(loaded.transformer.transformer_blocks[0].attn1.to_q, PackedLinear)
    assert draw(loaded).equal(draw(pipe))


@pytest.mark.parametrize(
    "save", [tiny.save_alpha, tiny.save_hunyuan, tiny.save_dit, tiny.save_sd3, tiny.save_flux, tiny.save_sana]
)
def test_every_model_of_ours_is_saved_and_loaded(tmp_path: Path, save: Callable[[Path], None]):
    save(tmp_path / "plain")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "plain")
    layers = policy.layers(pipe.transformer)
    odd = [name for name, layer in layers.items() if layer.weight[0].numel() % 16]
    weight = everywhere(
        E2M1, by_row=odd, leave=[name for name, layer in layers.items() if getattr(layer, "groups", 1) > 1]
    )
    quantized(pipe, weight, ONLINE).save_pretrained(tmp_path / "packed")
    again = DiffusionPipeline.from_pretrained(tmp_path / "packed")
    before, after = pipe.transformer.state_dict(), again.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) for name, value in before.items())


@pytest.mark.parametrize("main", [pipelines.run.main, pipelines.inspect.main])
def test_what_was_packed_is_not_quantized_again(run: Run, folder: Path, tmp_path: Path, capfd, main: Callable):
    assert run("model=pixart_sigma", f"model.path={folder}", "prompts=shapes", main=main) == 1
    error = capfd.readouterr().err
    assert f"{folder} is quantized already (its transformer/config.json has a quantization_config of fp4dit)" in error
    assert "Traceback" not in error
    assert not (tmp_path / "store" / "capture").exists()


def test_importing_fp4dit_is_enough(folder: Path):
    """In a process that has seen nothing else of us."""
    code = (
        "import fp4dit; from diffusers import PixArtSigmaPipeline as P; "
        f"print(type(P.from_pretrained({str(folder)!r}).transformer.transformer_blocks[0].attn1.to_q).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "PackedLinear", done.stderr


def test_it_is_saved_again_as_it_is(folder: Path, tmp_path: Path):
    loaded = PixArtSigmaPipeline.from_pretrained(folder)
    loaded.save_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)  # over files that it may have been read from
    before, after = (load_file(place / "transformer" / FILE) for place in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    assert draw(PixArtSigmaPipeline.from_pretrained(tmp_path)).equal(draw(loaded))


def test_sharded(folder: Path, tmp_path: Path):
    loaded = PixArtSigmaPipeline.from_pretrained(folder)
    loaded.transformer.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = type(loaded.transformer).from_pretrained(tmp_path)
    state, other = loaded.transformer.state_dict(), again.state_dict()
    assert all(other[name].equal(value) for name, value in state.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_dtype_asked_for_casts_all_but_what_is_packed(folder: Path, dtype: torch.dtype):
    loaded, cast = (PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=t) for t in (torch.float32, dtype))
    before, after = loaded.transformer.state_dict(), cast.transformer.state_dict()
    for name, value in before.items():
        if value.dtype == torch.uint8:
            assert after[name].equal(value)
        else:
            assert after[name].equal(value.to(dtype))
    assert cast.transformer.transformer_blocks[0].attn1.to_q.dtype == dtype
    difference = answer(cast.transformer).float() - answer(loaded.transformer)
    assert difference.norm() < 0.05 * answer(loaded.transformer).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("transforms", "activation"),
    [
        ((Hadamard(16),), ONLINE),
        ((Balance(), LowRank(2)), ONLINE),
        ((), []),
    ],
    ids=["rotation", "balance and branch", "weights alone"],
)
def test_transforms_come_along(pixart_folder: Path, tmp_path: Path, transforms, activation, dtype: torch.dtype):
    torch.manual_seed(0)
    weight = everywhere(E2M1, by_row=["pos_embed.proj"], transforms=transforms)
    pipe = quantized(PixArtSigmaPipeline.from_pretrained(pixart_folder, torch_dtype=dtype), weight, activation)
    pipe.save_pretrained(tmp_path)
    again = PixArtSigmaPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    assert draw(again).equal(draw(pipe))
    before, after = pipe.transformer.state_dict(), again.transformer.state_dict()
    assert all(after[name].dtype == value.dtype and after[name].equal(value) for name, value in before.items())


def measured(dit: Any, rules: list[Rule]) -> dict[str, Grid]:
    """The activations' grids, static ones measured on something."""
    grids, _ = policy.quantize_activations_(dit, rules)
    for grid in grids.values():
        width = 32 if grid.quantizer.granularity.unit == "channel" else 16
        if isinstance(grid, TimedGrid):
            grid.measure_at({t: torch.randn(5, width) * t for t in (900.0, 600.0, 1.0)})
        elif grid.static:
            grid.measure(torch.randn(5, width))
    return grids


def static(dit: Any, timed: bool) -> Any:
    """Packed, with static activations."""
    torch.manual_seed(0)
    rules = policy.assign(policy.layers(dit), WEIGHT)
    for layer in policy.quantize_weights_(dit, rules).values():
        layer.prepare()
        layer.freeze()
    rule = Rule("*", Quantizer(integer(8), Granularity("tensor")), observe=Sample(), timed=timed)
    pack_transformer_(dit, rules, dict.fromkeys(measured(dit, [rule]), rule))
    return dit


@pytest.mark.parametrize("timed", [False, True])
def test_static_activations_come_along(pixart_folder: Path, tmp_path: Path, timed: bool):
    dit = static(PixArtSigmaPipeline.from_pretrained(pixart_folder).transformer, timed)
    before = answer(dit)
    dit.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = type(dit).from_pretrained(tmp_path, dtype=dtype)
        scales = {name: value for name, value in again.state_dict().items() if name.endswith("activation.scale")}
        assert len(scales) == 27
        assert all(value.equal(dit.state_dict()[name]) for name, value in scales.items())
    assert answer(type(dit).from_pretrained(tmp_path)).equal(before)


def test_layers_of_each_range_of_timesteps_come_along(pixart_folder: Path, tmp_path: Path):
    torch.manual_seed(0)
    dit = PixArtSigmaPipeline.from_pretrained(pixart_folder).transformer
    weight = everywhere(E2M1, by_row=["pos_embed.proj"], ranges=[500], transforms=[LowRank(2)])
    rules, clock = policy.assign(policy.layers(dit), weight), Clock()
    clock.follow(dit)
    for layer in policy.quantize_weights_(dit, rules, clock=clock).values():
        if layer.transforms:
            layer.write(torch.randn_like(layer.weight))
        layer.prepare(torch.randn(3, 4, layer.width) if layer.transforms else None)
        layer.freeze()
    _, inputs = policy.quantize_activations_(dit, ONLINE)
    pack_transformer_(dit, rules, inputs)
    before = answer(dit)
    dit.save_pretrained(tmp_path)
    again = type(dit).from_pretrained(tmp_path)
    assert isinstance(again.transformer_blocks[0].attn1.to_q, Ranges)
    assert answer(again).equal(before)


def test_it_compiles_as_one_graph_and_answers_the_same(folder: Path):
    """In a process without the checks of shapes, which cannot be compiled."""
    code = (
        "import sys, torch, fp4dit; from diffusers import PixArtTransformer2DModel as M; "
        "from tests.test_hub import answer\n"
        "for dit in map(M.from_pretrained, sys.argv[1:]):\n"
        "    before = answer(dit)\n"
        "    print(answer(torch.compile(dit, backend='aot_eager', fullgraph=True)).equal(before))"
    )
    command = [sys.executable, "-c", code, str(folder / "transformer")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"], done.stderr


def test_a_device_map(folder: Path):
    dit = PixArtSigmaPipeline.from_pretrained(folder).transformer
    mapped = type(dit).from_pretrained(folder / "transformer", device_map={"": "cpu"})
    state = mapped.state_dict()
    assert all(state[name].equal(value) for name, value in dit.state_dict().items())


def offloaded(folder: Path) -> Iterator[PixArtSigmaPipeline]:
    """As each way of diffusers to save memory leaves the pipeline. The CPU stands in for the device that computes."""
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    pipe.enable_model_cpu_offload(device="cpu")
    yield pipe
    yield PixArtSigmaPipeline.from_pretrained(folder, device_map="balanced")
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    yield pipe


def test_offload_changes_nothing(folder: Path):
    before = draw(PixArtSigmaPipeline.from_pretrained(folder))
    assert all(draw(pipe).equal(before) for pipe in offloaded(folder))


def test_it_moves_but_is_not_cast(folder: Path):
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    pipe.to("cpu")
    dit = pipe.transformer
    with pytest.raises(ValueError, match="unsupported"):
        dit.to(torch.float16)
    assert all(value.is_meta for value in dit.to("meta").state_dict().values())


def test_lora_through_peft_is_added_and_trained_but_not_merged(folder: Path):
    pipe = PixArtSigmaPipeline.from_pretrained(folder)
    before = draw(pipe)
    torch.manual_seed(0)
    model = get_peft_model(pipe.transformer, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=True))
    assert draw(pipe).equal(before)  # LoRA starts as nothing
    with torch.enable_grad():
        answer.__wrapped__(model).square().mean().backward()
    grads = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(grads) == 8
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    with pytest.raises(RuntimeError):
        model.merge_adapter()


def test_it_is_not_quantized_while_it_is_loaded(pixart_folder: Path, folder: Path):
    config = json.loads((folder / "transformer" / "config.json").read_text())["quantization_config"]
    from fp4dit.packed.hub import PackedConfig

    with pytest.raises(UserError, match=r"targets=\[export\]"):
        PixArtSigmaPipeline.from_pretrained(pixart_folder).transformer.from_pretrained(
            pixart_folder / "transformer", quantization_config=PackedConfig(**config)
        )


def test_a_changed_checkpoint_is_refused(folder: Path, tmp_path: Path):
    PixArtSigmaPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    path = tmp_path / "transformer" / FILE
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is not what was written"):
        PixArtSigmaPipeline.from_pretrained(tmp_path)


def test_a_config_of_another_version_is_refused(folder: Path, tmp_path: Path):
    PixArtSigmaPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["version"] = 99
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="version 99"):
        PixArtSigmaPipeline.from_pretrained(tmp_path)
