"""Numbers that are none are told by layer and timestep, before they spoil a result."""

from pathlib import Path

import pytest
import torch

from fp4dit import policy
from fp4dit.errors import UserError
from fp4dit.health import finite, guarded
from fp4dit.models.pixart import PixArtPipeline
from fp4dit.reconstruction import Reconstruction
from fp4dit.tasks.activate import Measure
from fp4dit.tasks.capture import CaptureTask, Chunk
from fp4dit.tasks.reconstruct import Rounded
from tests import tiny
from tests.test_stream import call

NAN = float("nan")


def damage(pipeline: PixArtPipeline, name: str) -> None:
    pipeline.dit.get_parameter(name).view(-1)[0] = NAN


@pytest.mark.parametrize("layer", ["pos_embed.proj", "transformer_blocks.1.attn2.to_k", "proj_out"])
def test_capture_names_the_layer_and_the_timestep(pipeline: PixArtPipeline, tmp_path: Path, layer: str):
    damage(pipeline, f"{layer}.bias")
    task = CaptureTask(pipeline, tmp_path, steps=2, guidance=4.5)
    with pytest.raises(UserError, match=rf"^{layer} answers with NaN.* at timestep 999\."):
        task.predict_step(Chunk(0, tiny.PROMPTS[:1], [0]))
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_late_timestep_is_named(pipeline: PixArtPipeline):
    """Activations that outgrow the dtype only now and then."""
    block = pipeline.dit.transformer_blocks[1].ff
    seen: list[int] = []
    block.register_forward_hook(lambda _m, _a, out: out * NAN if (seen.append(1), len(seen) > 1)[1] else None)
    first, second = call(), call()
    second.kwargs["timestep"] = torch.full((5,), 42)
    with guarded(pipeline.dit):
        first(pipeline.dit)
        with pytest.raises(UserError, match=r"^transformer_blocks\.1.* at timestep 42\."):
            second(pipeline.dit)


@torch.no_grad()
def test_a_quantized_layer_is_named_itself_not_the_one_after(pipeline: PixArtPipeline):
    rules = policy.assign(policy.layers(pipeline.dit), tiny.rules())
    made = policy.quantize_weights_(pipeline.dit, rules)
    made["transformer_blocks.0.attn1.to_v"].source.bias[3] = NAN
    with guarded(pipeline.dit), pytest.raises(UserError, match=r"^transformer_blocks\.0\.attn1\.to_v answers"):
        call()(pipeline.dit)


@torch.no_grad()
def test_parameters_that_belong_to_no_layer_are_named_by_their_block(pipeline: PixArtPipeline):
    damage(pipeline, "transformer_blocks.1.scale_shift_table")
    with guarded(pipeline.dit), pytest.raises(UserError, match=r"^transformer_blocks\.1\."):
        call()(pipeline.dit)


@torch.no_grad()
def test_nothing_is_said_and_nothing_changed_while_all_is_well(pipeline: PixArtPipeline):
    expected = call()(pipeline.dit)[0]
    with guarded(pipeline.dit):
        assert torch.equal(call()(pipeline.dit)[0], expected)
    assert not pipeline.dit._forward_hooks


def test_outputs_of_any_kind_are_looked_into(pipeline: PixArtPipeline):
    bad = torch.tensor([1.0, float("inf")])
    assert finite((torch.ones(2), None, "text"))
    assert not finite((torch.ones(2), bad))
    assert not finite({"sample": bad})
    pipeline.dit.proj_out.bias.fill_(NAN)
    given = call()
    given.kwargs["return_dict"] = True
    with guarded(pipeline.dit), pytest.raises(UserError, match=r"^proj_out"):
        given(pipeline.dit)


def test_reconstruction_names_the_unit_and_the_timestep(pipeline: PixArtPipeline, tmp_path: Path):
    state = pipeline.begin(call()) | {"prompt": torch.arange(5)}
    state["timestep"] = torch.tensor([900, 700, 500, 300, 100])
    state["text"][3] = NAN
    rules = policy.assign(policy.layers(pipeline.dit), tiny.rules())
    work = Reconstruction(pipeline, rules, Rounded(), torch.arange(4), torch.tensor([4]), 8, tmp_path)
    with pytest.raises(UserError, match=r"^caption_projection answers with NaN.* at timestep 300\."):
        work.run(state, tiny.trainer)


def test_measuring_names_the_activation_and_the_timestep(pipeline: PixArtPipeline):
    policy.quantize_weights_(pipeline.dit, policy.assign(policy.layers(pipeline.dit), tiny.rules()))
    activations, _ = policy.quantize_activations_(pipeline.dit, [policy.Rule("*", tiny.rules()[0].quantizer)])
    state = pipeline.begin(call())
    state["text"][0] = NAN
    with pytest.raises(UserError, match=r"caption_projection\.linear_1 holds NaN or infinity at timestep 601"):
        Measure(pipeline, activations).test_step(state)
