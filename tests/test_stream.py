"""The chain of units is the model, and costs as many passes as the design says."""

from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from fp4dit import calls, policy
from fp4dit.calls import Call
from fp4dit.models.pixart import PixArtPipeline
from fp4dit.reconstruction import Reconstruction, load_calls, load_steps, split
from fp4dit.stream import advance, answers, relative_error, rows
from fp4dit.tasks import capture
from fp4dit.tasks.capture import CaptureTask, Chunk, chunked, noise_at_index
from fp4dit.tasks.reconstruct import Rounded
from pipelines.parted import Parts, one_by_one
from tests import tiny


def call(rows: int = 5, resolution: bool = False) -> Call:
    g = torch.Generator().manual_seed(0)
    mask = (torch.arange(7) < torch.tensor([[7], [3], [1], [5], [2]])[:rows]).long()
    conditions = {"resolution": torch.full((rows, 2), 64.0), "aspect_ratio": torch.ones(rows, 1)}
    given = {
        "encoder_hidden_states": torch.randn(rows, 7, tiny.WIDTH, generator=g),
        "timestep": torch.full((rows,), 601),
        "added_cond_kwargs": conditions if resolution else {"resolution": None, "aspect_ratio": None},
        "encoder_attention_mask": mask,
        "return_dict": False,
    }
    return Call((torch.randn(rows, 4, 8, 8, generator=g),), given)


def chain(pipeline: PixArtPipeline, state: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    for unit in pipeline.units():
        module = pipeline.dit.get_submodule(unit.module)
        state = state | advance(module, unit, state, size, "cpu")
    return state


def unpatchify(dit: PixArtTransformer2DModel, hidden: Tensor) -> Tensor:
    size, patch = 8 // dit.config.patch_size, dit.config.patch_size
    grid = hidden.reshape(-1, size, size, patch, patch, dit.out_channels)
    return torch.einsum("nhwpqc->nchpwq", grid).reshape(len(hidden), -1, 8, 8)


def forward(dit: nn.Module, call: Call) -> dict[str, Tensor]:
    """What each module answers while the model answers a call, as far as it is one tensor."""
    seen: dict[str, Tensor] = {}
    note = lambda name: lambda _m, _a, out: seen.update({name: out}) if isinstance(out, Tensor) else None
    handles = [module.register_forward_hook(note(name)) for name, module in dit.named_modules()]
    call(dit)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("resolution", [False, True], ids=["sigma", "alpha-1024"])
@torch.no_grad()
def test_the_chain_of_units_is_the_models_own_forward(pipeline: PixArtPipeline, resolution: bool):
    if resolution:
        config = dict(pipeline.dit.config) | {"use_additional_conditions": True, "attention_head_dim": 24}
        config |= {"cross_attention_dim": 48}  # three embeddings share the width
        pipeline.dit = PixArtTransformer2DModel.from_config(config).eval()
    given = call(resolution=resolution)
    expected = given(pipeline.dit)[0]
    state = chain(pipeline, pipeline.begin(given), size=5)
    assert torch.equal(unpatchify(pipeline.dit, state["hidden"]), expected)


@torch.no_grad()
def test_the_chain_holds_with_quantized_weights_and_activations(pipeline: PixArtPipeline):
    made = policy.quantize_weights_(pipeline.dit, policy.assign(policy.layers(pipeline.dit), tiny.rules()))
    for layer in made.values():
        layer.freeze()
    token = policy.Rule("*", tiny.rules()[0].quantizer)
    policy.quantize_activations_(pipeline.dit, [token])
    given = call()
    state = chain(pipeline, pipeline.begin(given), size=5)
    assert torch.equal(unpatchify(pipeline.dit, state["hidden"]), given(pipeline.dit)[0])


@torch.no_grad()
def test_masked_text_does_not_matter_and_the_rest_does(pipeline: PixArtPipeline):
    state = pipeline.begin(call())
    shown = state["bias"][:, 0, :, None] == 0
    hidden = lambda text: chain(pipeline, state | {"text": text}, size=5)["hidden"]
    plain = hidden(state["text"])
    assert torch.equal(hidden(torch.where(shown, state["text"], 7.0)), plain)
    assert not torch.equal(hidden(torch.where(shown, 7.0, state["text"])), plain)


@torch.no_grad()
def test_advancing_in_parts_covers_every_row_in_order(pipeline: PixArtPipeline):
    state, unit = pipeline.begin(call()), pipeline.units()[0]
    module = pipeline.dit.pos_embed
    parts = tiny.count(module)
    torch.testing.assert_close(
        advance(module, unit, state, 2, "cpu")["hidden"], answers(unit.call(state)(module))[0], rtol=1e-5, atol=1e-6
    )
    assert parts == [2, 2, 1, 5]


def test_relative_error_by_hand():
    target, answer = {"a": torch.tensor([[3.0], [4.0], [9.0]])}, {"a": torch.tensor([[3.0], [5.0], [0.0]])}
    assert relative_error(answer, target, torch.tensor([0, 1])) == 1 / 25
    assert rows(target, torch.tensor([2]))["a"].item() == 9


@pytest.fixture
def captured(pipeline: PixArtPipeline, tmp_path: Path) -> tuple[Path, list[int]]:
    """A folder with the calls of 4 prompts along 3 steps, and the rows that one block saw on the way."""
    seen = tiny.count(pipeline.dit.transformer_blocks[0])
    task = CaptureTask(pipeline, tmp_path, steps=3, guidance=4.5)
    tiny.trainer()().predict(task, tiny.one_by_one(chunked(tiny.PROMPTS, 2, seed=5)))
    return tmp_path, seen


def test_the_timesteps_kept_are_spread_from_the_first_to_the_last(pipeline, tmp_path):
    every, some = tmp_path / "every", tmp_path / "some"
    for folder, kept in ((every, None), (some, 3)):
        folder.mkdir()
        CaptureTask(pipeline, folder, 5, 4.5, kept=kept).predict_step(Chunk(0, tiny.PROMPTS[:1], [5]))
    whole, part = (load_calls(folder) for folder in (every, some))
    steps = whole["timestep"][:].unique(sorted=True).flip(0)  # a sampler counts downwards
    assert part["timestep"][:].unique(sorted=True).flip(0).tolist() == steps[[0, 2, 4]].tolist()
    places = torch.isin(whole["timestep"][:], steps[[0, 2, 4]]).nonzero().flatten()
    assert torch.equal(part["latent"][:], whole["latent"][:][places])


def test_capture_costs_one_pass_per_sample(captured: tuple[Path, list[int]]):
    folder, seen = captured
    samples = len(load_calls(folder)["prompt"])
    assert samples == 4 * 3 * 2  # prompts, steps, with and without the text
    assert sum(seen) == samples


def test_reconstruction_costs_two_passes_per_sample(captured: tuple[Path, list[int]], pipeline: PixArtPipeline):
    folder, seen = captured
    seen.clear()
    state, out = load_calls(folder), folder / "units"
    out.mkdir()
    rules = policy.assign(policy.layers(pipeline.dit), tiny.rules())
    trained, held_out = split(state, 3)
    Reconstruction(pipeline, rules, Rounded(), trained, held_out, 8, out).run(state, tiny.trainer)
    assert sum(seen) == 2 * len(state["prompt"])


def test_captured_calls_are_the_samplers_own(pipeline: PixArtPipeline, tmp_path: Path):
    with calls.listen(pipeline.dit) as heard:
        pipeline.sample(tiny.PROMPTS[:2], [5, 6], 3, 4.5)
    tiny.trainer()().predict(
        CaptureTask(pipeline, tmp_path, 3, 4.5), tiny.one_by_one(chunked(tiny.PROMPTS[:2], 2, seed=5))
    )
    state = load_calls(tmp_path)
    assert torch.equal(state["latent"], torch.cat([c.args[0] for c in heard]))
    assert torch.equal(state["timestep"], torch.cat([c.kwargs["timestep"] for c in heard]))
    assert state["prompt"].tolist() == [0, 1, 0, 1] * 3
    assert state["timestep"].unique().numel() == 3
    lengths = (state["bias"][:, 0] == 0).sum(1)[:4].tolist()
    words = [len(prompt.split()) + 1 for prompt in tiny.PROMPTS[:2]]  # and the end mark
    assert lengths == [1, 1, *words]  # without the text first, each by its own mask


def test_the_released_codes_calls_are_noise_at_the_steps_index(pipeline: PixArtPipeline, tmp_path: Path):
    task = CaptureTask(pipeline, tmp_path, 3, 4.5, noise_at_index)
    tiny.trainer()().predict(task, tiny.one_by_one(chunked(tiny.PROMPTS[:2], 2, seed=5)))
    state = load_calls(tmp_path)
    latent = state["latent"].unflatten(0, (3, 2, 2))  # steps, with and without the text, prompts
    assert state["timestep"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert not state["bias"].any()
    assert torch.equal(latent[:, 0], latent[:, 1])
    assert len(latent[:, 0].flatten(0, 1).unique(dim=0)) == 3 * 2
    assert torch.equal(latent[0, 0, 1], torch.randn(latent.shape[3:], generator=torch.Generator().manual_seed(6)))
    assert abs(latent.std().item() - 1) < 0.05


def test_capture_resumes_at_the_chunk(captured: tuple[Path, list[int]], pipeline: PixArtPipeline):
    folder, seen = captured
    files = sorted(folder.glob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    assert [file.name for file in files] == ["00000.safetensors", "00002.safetensors"]
    files[1].unlink()
    seen.clear()
    chunks = chunked(tiny.PROMPTS, 2, seed=5)
    parts = Parts(chunks, [capture.files(folder, chunk) for chunk in chunks], folder, "", patient=True)
    tiny.trainer()().predict(CaptureTask(pipeline, folder, 3, 4.5), one_by_one(parts))
    assert sum(seen) == 2 * 3 * 2
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize("trained", [1, 2, 3])
def test_no_call_is_lost_when_a_chunk_holds_prompts_of_both_kinds(captured: tuple[Path, list[int]], trained: int):
    ours, others = load_steps(captured[0], trained)
    assert sum(len(step["prompt"]) for step in ours) == trained * 3 * 2
    assert sum(len(step["prompt"]) for step in others) == (4 - trained) * 3 * 2
    assert all(step["prompt"].max() < trained for step in ours)
    assert all(step["prompt"].min() >= trained for step in others)
    whole = load_calls(captured[0])
    assert torch.equal(torch.cat([step["latent"] for step in ours]), whole["latent"][whole["prompt"] < trained])


@pytest.mark.parametrize("trained", [1, 3])
def test_rows_are_split_by_prompt(trained: int):
    first, rest = split({"prompt": torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])}, trained)
    assert sorted([*first.tolist(), *rest.tolist()]) == list(range(8))
    assert len(first) == 2 * trained
