"""Test the propagation of units against the model, and the number of passes that it takes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from fp4dit.calibration import capture
from fp4dit.calibration.capture import CaptureTask, PromptBatch, batch_prompts, noise_at_index
from fp4dit.calibration.captured_calls import load_calls, load_steps, split_rows
from fp4dit.calibration.propagate import compute_relative_error, propagate_unit
from fp4dit.models.blocks import flatten_outputs, select_rows
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.quantization.apply import quantize_activations_, quantize_weights_
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.rounding.reconstruction import Reconstruction
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.utils import calls
from fp4dit.utils.calls import Call
from pipelines.stages.sharded import ShardQueue, load_one_by_one
from tests.helpers import tiny


def make_call(rows: int = 5, resolution: bool = False) -> Call:
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(7) < torch.tensor([[7], [3], [1], [5], [2]])[:rows]).long()
    """Return a call of a tiny PixArt, with masks of different lengths."""
    conditions = {"resolution": None, "aspect_ratio": None}
    if resolution:
        conditions = {
            "resolution": torch.full((rows, 2), 64.0),
            "aspect_ratio": torch.ones(rows, 1),
        }
    kwargs = {
        "encoder_hidden_states": torch.randn(rows, 7, tiny.WIDTH, generator=g),
        "timestep": torch.full((rows,), 601),
        "added_cond_kwargs": conditions,
        "encoder_attention_mask": mask,
        "return_dict": False,
    }
    return Call((torch.randn(rows, 4, 8, 8, generator=g),), kwargs)


def propagate_all_units(
    pipeline: PixArtAdapter, state: dict[str, Tensor], size: int
) -> dict[str, Tensor]:
    for unit in pipeline.units():
        module = pipeline.transformer.get_submodule(unit.module)
        state = state | propagate_unit(module, unit, state, size, "cpu")
    return state


def unpatchify_output(dit: PixArtTransformer2DModel, hidden: Tensor) -> Tensor:
    size, patch = 8 // dit.config.patch_size, dit.config.patch_size
    grid = hidden.reshape(-1, size, size, patch, patch, dit.out_channels)
    return torch.einsum("nhwpqc->nchpwq", grid).reshape(len(hidden), -1, 8, 8)


def record_outputs(dit: nn.Module, call: Call) -> dict[str, Tensor]:
    """Return the outputs of all modules during a call; outputs of several tensors are left out."""
    outputs: dict[str, Tensor] = {}

    def hook(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[name] = output

    hooks = []
    for name, module in dit.named_modules():
        hooks.append(module.register_forward_hook(partial(hook, name)))
    with calls.remove_hooks(hooks):
        call(dit)
    return outputs


@pytest.mark.parametrize("resolution", [False, True], ids=["sigma", "alpha-1024"])
@torch.no_grad()
def test_the_units_compute_the_output_of_the_model(pipeline: PixArtAdapter, resolution: bool):
    if resolution:
        config = dict(pipeline.transformer.config) | {
            "use_additional_conditions": True,
            "attention_head_dim": 24,
        }
        config |= {"cross_attention_dim": 48}  # three embeddings share the width
        pipeline.transformer = PixArtTransformer2DModel.from_config(config).eval()
    call = make_call(resolution=resolution)
    expected = call(pipeline.transformer)[0]
    state = propagate_all_units(pipeline, pipeline.initial_state(call), size=5)
    assert torch.equal(unpatchify_output(pipeline.transformer, state["hidden"]), expected)


@torch.no_grad()
def test_the_units_compute_the_output_of_a_quantized_model(pipeline: PixArtAdapter):
    layers = quantize_weights_(
        pipeline.transformer,
        assign_rules(find_layers(pipeline.transformer), tiny.rules()),
    )
    for layer in layers.values():
        layer.commit_weight()
    token = Rule("*", tiny.rules()[0].quantizer)
    quantize_activations_(pipeline.transformer, [token])
    call = make_call()
    state = propagate_all_units(pipeline, pipeline.initial_state(call), size=5)
    assert torch.equal(
        unpatchify_output(pipeline.transformer, state["hidden"]), call(pipeline.transformer)[0]
    )


@torch.no_grad()
def test_masked_text_does_not_change_the_output(pipeline: PixArtAdapter):
    state = pipeline.initial_state(make_call())
    is_visible = state["bias"][:, 0, :, None] == 0

    def compute_hidden(text: Tensor) -> Tensor:
        return propagate_all_units(pipeline, state | {"text": text}, size=5)["hidden"]

    plain = compute_hidden(state["text"])
    assert torch.equal(compute_hidden(torch.where(is_visible, state["text"], 7.0)), plain)
    assert not torch.equal(compute_hidden(torch.where(is_visible, 7.0, state["text"])), plain)


@torch.no_grad()
def test_batches_cover_every_row_in_order(pipeline: PixArtAdapter):
    state, unit = pipeline.initial_state(make_call()), pipeline.units()[0]
    module = pipeline.transformer.pos_embed
    batch_sizes = tiny.count(module)
    torch.testing.assert_close(
        propagate_unit(module, unit, state, 2, "cpu")["hidden"],
        flatten_outputs(unit.make_call(state)(module))[0],
        rtol=1e-5,
        atol=1e-6,
    )
    assert batch_sizes == [2, 2, 1, 5]


def test_relative_error_by_hand():
    target = {"a": torch.tensor([[3.0], [4.0], [9.0]])}
    output = {"a": torch.tensor([[3.0], [5.0], [0.0]])}
    assert compute_relative_error(output, target, torch.tensor([0, 1])) == 1 / 25
    assert select_rows(target, torch.tensor([2]))["a"].item() == 9


@pytest.fixture
def captured(pipeline: PixArtAdapter, tmp_path: Path) -> tuple[Path, list[int]]:
    """Capture 4 prompts along 3 steps, and return the folder and the batch sizes of a block."""
    batch_sizes = tiny.count(pipeline.transformer.transformer_blocks[0])
    task = CaptureTask(pipeline, tmp_path, steps=3, guidance=4.5)
    tiny.trainer()().predict(task, tiny.load_one_by_one(batch_prompts(tiny.PROMPTS, 2, seed=5)))
    return tmp_path, batch_sizes


def test_captured_steps_are_evenly_spread(pipeline, tmp_path):
    all_folder, some_folder = tmp_path / "all", tmp_path / "some"
    for folder, num_kept in ((all_folder, None), (some_folder, 3)):
        folder.mkdir()
        CaptureTask(pipeline, folder, 5, 4.5, num_kept=num_kept).predict_step(
            PromptBatch(0, tiny.PROMPTS[:1], [5])
        )
    whole, part = load_calls(all_folder), load_calls(some_folder)
    steps = whole["timestep"][:].unique(sorted=True).flip(0)  # a sampler counts downwards
    assert part["timestep"][:].unique(sorted=True).flip(0).tolist() == steps[[0, 2, 4]].tolist()
    places = torch.isin(whole["timestep"][:], steps[[0, 2, 4]]).nonzero().flatten()
    assert torch.equal(part["latent"][:], whole["latent"][:][places])


def test_capture_costs_one_pass_per_sample(captured: tuple[Path, list[int]]):
    folder, batch_sizes = captured
    num_samples = len(load_calls(folder)["prompt"])
    assert num_samples == 4 * 3 * 2  # prompts, steps, with and without the text
    assert sum(batch_sizes) == num_samples


def test_reconstruction_costs_two_passes_per_sample(
    captured: tuple[Path, list[int]], pipeline: PixArtAdapter
):
    folder, batch_sizes = captured
    batch_sizes.clear()
    state, out = load_calls(folder), folder / "units"
    out.mkdir()
    rules = assign_rules(find_layers(pipeline.transformer), tiny.rules())
    train_rows, val_rows = split_rows(state, 3)
    Reconstruction(pipeline, rules, RoundToNearest(), train_rows, val_rows, 8, out).run(
        state, tiny.trainer
    )
    assert sum(batch_sizes) == 2 * len(state["prompt"])


def test_captured_calls_are_those_of_the_sampler(pipeline: PixArtAdapter, tmp_path: Path):
    with calls.record_calls(pipeline.transformer) as recorded:
        pipeline.sample(tiny.PROMPTS[:2], [5, 6], 3, 4.5)
    tiny.trainer()().predict(
        CaptureTask(pipeline, tmp_path, 3, 4.5),
        tiny.load_one_by_one(batch_prompts(tiny.PROMPTS[:2], 2, seed=5)),
    )
    state = load_calls(tmp_path)
    assert torch.equal(state["latent"], torch.cat([call.args[0] for call in recorded]))
    timesteps = [call.kwargs["timestep"] for call in recorded]
    assert torch.equal(state["timestep"], torch.cat(timesteps))
    assert state["prompt"].tolist() == [0, 1, 0, 1] * 3
    assert state["timestep"].unique().numel() == 3
    lengths = (state["bias"][:, 0] == 0).sum(1)[:4].tolist()
    # The rows without text come first. Each prompt ends with an end token.
    words = [len(prompt.split()) + 1 for prompt in tiny.PROMPTS[:2]]
    assert lengths == [1, 1, *words]


def test_noise_at_index_replaces_latents_and_timesteps(pipeline: PixArtAdapter, tmp_path: Path):
    task = CaptureTask(pipeline, tmp_path, 3, 4.5, noise_at_index)
    tiny.trainer()().predict(task, tiny.load_one_by_one(batch_prompts(tiny.PROMPTS[:2], 2, seed=5)))
    state = load_calls(tmp_path)
    latent = state["latent"].unflatten(0, (3, 2, 2))  # steps, with and without the text, prompts
    assert state["timestep"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert not state["bias"].any()
    assert torch.equal(latent[:, 0], latent[:, 1])
    assert len(latent[:, 0].flatten(0, 1).unique(dim=0)) == 3 * 2
    assert torch.equal(
        latent[0, 0, 1], torch.randn(latent.shape[3:], generator=torch.Generator().manual_seed(6))
    )
    assert abs(latent.std().item() - 1) < 0.05


def test_capture_resumes_at_the_batch(captured: tuple[Path, list[int]], pipeline: PixArtAdapter):
    folder, batch_sizes = captured
    files = sorted(folder.glob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    assert [file.name for file in files] == ["00000.safetensors", "00002.safetensors"]
    files[1].unlink()
    batch_sizes.clear()
    batches = batch_prompts(tiny.PROMPTS, 2, seed=5)
    queue = ShardQueue(
        batches,
        [capture.list_capture_files(folder, batch) for batch in batches],
        folder,
        "",
        wait_for_others=True,
    )
    tiny.trainer()().predict(CaptureTask(pipeline, folder, 3, 4.5), load_one_by_one(queue))
    assert sum(batch_sizes) == 2 * 3 * 2
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("num_prompts", [1, 2, 3])
def test_a_batch_may_have_training_and_validation_prompts(
    captured: tuple[Path, list[int]], num_prompts: int
):
    train_steps, val_steps = load_steps(captured[0], num_prompts)
    assert sum(len(step["prompt"]) for step in train_steps) == num_prompts * 3 * 2
    assert sum(len(step["prompt"]) for step in val_steps) == (4 - num_prompts) * 3 * 2
    assert all(step["prompt"].max() < num_prompts for step in train_steps)
    assert all(step["prompt"].min() >= num_prompts for step in val_steps)
    whole = load_calls(captured[0])
    train_latents = torch.cat([step["latent"] for step in train_steps])
    assert torch.equal(train_latents, whole["latent"][whole["prompt"] < num_prompts])


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_rows_are_split_by_prompt(num_prompts: int):
    prompts = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    first, rest = split_rows({"prompt": prompts}, num_prompts)
    assert sorted([*first.tolist(), *rest.tolist()]) == list(range(8))
    assert len(first) == 2 * num_prompts
