"""NaN and infinity raise an error with the layer and the timestep that they come from."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fp4dit.calibration.capture import CaptureTask, PromptBatch
from fp4dit.calibration.measure import MeasureTask
from fp4dit.models.nan_guard import all_finite, nan_guard
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.quantization.apply import quantize_activations_, quantize_weights_
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.rounding.reconstruction import Reconstruction
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.utils.errors import UserError
from tests.calibration.test_propagate import make_call
from tests.helpers import tiny

NAN = float("nan")


def put_nan(pipeline: PixArtAdapter, name: str) -> None:
    pipeline.transformer.get_parameter(name).view(-1)[0] = NAN


@pytest.mark.parametrize("layer", ["pos_embed.proj", "transformer_blocks.1.attn2.to_k", "proj_out"])
def test_capture_names_the_layer_and_the_timestep(
    pipeline: PixArtAdapter, tmp_path: Path, layer: str
):
    put_nan(pipeline, f"{layer}.bias")
    task = CaptureTask(pipeline, tmp_path, steps=2, guidance=4.5)
    message = rf"^the output of {layer} holds NaN.* at timestep 999,"
    option = rf"\+weight\.ignore=\['{layer}\*'\]$"
    with pytest.raises(UserError, match=f"{message}.*{option}"):
        task.predict_step(PromptBatch(0, tiny.PROMPTS[:1], [0]))
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_late_timestep_is_named(pipeline: PixArtAdapter):
    """Activations may exceed the range of the dtype in the second call only."""
    block = pipeline.transformer.transformer_blocks[1].ff
    num_calls = 0

    def fail_later(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        nonlocal num_calls
        num_calls += 1
        return output * NAN if num_calls > 1 else None

    block.register_forward_hook(fail_later)
    first, second = make_call(), make_call()
    second.kwargs["timestep"] = torch.full((5,), 42)
    with nan_guard(pipeline.transformer):
        first(pipeline.transformer)
        message = r"^the output of transformer_blocks\.1.* at timestep 42,"
        with pytest.raises(UserError, match=message):
            second(pipeline.transformer)


@torch.no_grad()
def test_a_quantized_layer_is_named_and_not_the_next_one(pipeline: PixArtAdapter):
    rules = assign_rules(find_layers(pipeline.transformer), tiny.rules())
    layers = quantize_weights_(pipeline.transformer, rules)
    layers["transformer_blocks.0.attn1.to_v"].source.bias[3] = NAN
    with (
        nan_guard(pipeline.transformer),
        pytest.raises(UserError, match=r"^the output of transformer_blocks\.0\.attn1\.to_v holds"),
    ):
        make_call()(pipeline.transformer)


@torch.no_grad()
def test_a_parameter_outside_layers_is_named_by_its_block(pipeline: PixArtAdapter):
    put_nan(pipeline, "transformer_blocks.1.scale_shift_table")
    with (
        nan_guard(pipeline.transformer),
        pytest.raises(UserError, match=r"^the output of transformer_blocks\.1\."),
    ):
        make_call()(pipeline.transformer)


@torch.no_grad()
def test_a_finite_model_is_not_changed(pipeline: PixArtAdapter):
    expected = make_call()(pipeline.transformer)[0]
    with nan_guard(pipeline.transformer):
        assert torch.equal(make_call()(pipeline.transformer)[0], expected)
    assert not pipeline.transformer._forward_hooks


def test_nested_outputs_are_checked(pipeline: PixArtAdapter):
    bad = torch.tensor([1.0, float("inf")])
    assert all_finite((torch.ones(2), None, "text"))
    assert not all_finite((torch.ones(2), bad))
    assert not all_finite({"sample": bad})
    pipeline.transformer.proj_out.bias.fill_(NAN)
    call = make_call()
    call.kwargs["return_dict"] = True
    with (
        nan_guard(pipeline.transformer),
        pytest.raises(UserError, match=r"^the output of proj_out"),
    ):
        call(pipeline.transformer)


def test_reconstruction_names_the_unit_and_the_timestep(pipeline: PixArtAdapter, tmp_path: Path):
    state = pipeline.initial_state(make_call()) | {"prompt": torch.arange(5)}
    state["timestep"] = torch.tensor([900, 700, 500, 300, 100])
    state["text"][3] = NAN
    rules = assign_rules(find_layers(pipeline.transformer), tiny.rules())
    reconstruction = Reconstruction(
        pipeline, rules, RoundToNearest(), torch.arange(4), torch.tensor([4]), 8, tmp_path
    )
    message = r"^the output of caption_projection holds NaN.* at timestep 300,"
    with pytest.raises(UserError, match=message):
        reconstruction.run(state, tiny.trainer)


def test_measuring_names_the_activation_and_the_timestep(pipeline: PixArtAdapter):
    quantize_weights_(
        pipeline.transformer,
        assign_rules(find_layers(pipeline.transformer), tiny.rules()),
    )
    activations, _ = quantize_activations_(
        pipeline.transformer, [Rule("*", tiny.rules()[0].quantizer)]
    )
    state = pipeline.initial_state(make_call())
    state["text"][0] = NAN
    message = r"caption_projection\.linear_1 holds NaN or infinity at timestep 601"
    with pytest.raises(UserError, match=message):
        MeasureTask(pipeline, activations).test_step(state)
