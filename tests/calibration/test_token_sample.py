"""A sample of tokens estimates the sums over all tokens without bias, and bounds what is kept."""

from dataclasses import replace
from itertools import combinations
from math import comb

import pytest
import torch
from torch import nn

from fp4dit.calibration.activations import ObserveTask
from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.token_sample import TokenSample
from fp4dit.data.columns import SegmentedRows
from fp4dit.models.blocks import Unit
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.rounding.gptq import compute_hessians
from fp4dit.rounding.preparation import sample_inputs
from fp4dit.utils.calls import Call
from fp4dit.utils.errors import UserError
from pipelines.planning.executor import build_stages
from pipelines.planning.plan import make_plan
from tests.calibration.test_activations import (
    STATIC,
    make_states,
    quantize_pipeline,
    run_task,
)
from tests.conftest import Compose
from tests.rounding.test_gptq import make_unit

DRAWS = 4000


def test_a_sample_of_all_tokens_is_exact():
    """With as many tokens as a sequence has, the moments are those of all tokens, bit by bit."""
    module, layers, dataset = make_unit()
    whole = compute_hessians(module, layers, dataset, batch_size=7)
    sampled = replace(dataset, tokens=TokenSample(16))  # the convolution has 8 x 16 / 4 patches
    for a, b in zip(whole[:3], compute_hessians(module, layers, sampled, 7)[:3], strict=True):
        assert a is not None
        assert torch.equal(a, b)


def test_all_subsets_are_equally_likely():
    """Each subset of 2 of 5 tokens is drawn with a probability of 1 / 10, within 5 sigma."""
    counts = dict.fromkeys(combinations(range(5), 2), 0)
    for key in range(DRAWS):
        counts[tuple(TokenSample(2, seed=3).draw(5, key).tolist())] += 1
    expected = DRAWS / comb(5, 2)
    assert max(abs(count - expected) for count in counts.values()) < 5 * (0.9 * expected) ** 0.5


def test_moments_are_unbiased_with_the_variance_of_sampling_without_replacement():
    """The closed forms of the mean and the variance of the Horvitz-Thompson estimator."""
    total, drawn = 12, 3
    x = torch.randn(total, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = x.square()
    estimates = []
    for seed in range(DRAWS):
        sample = TokenSample(drawn, seed)
        estimates.append(sample.factor(total) * squares[sample.draw(total, 0)].sum())
    estimates = torch.stack(estimates)
    variance = total**2 * (1 - drawn / total) * squares.var() / drawn
    assert abs(estimates.mean() - squares.sum()) < 4 * (variance / DRAWS).sqrt()
    assert estimates.var() == pytest.approx(variance.item(), rel=0.15)


def test_hessians_of_a_sample_do_not_depend_on_batches():
    """Layers with one input share its sample, and the sum is scaled to all tokens."""
    module, layers, dataset = make_unit()
    sampled = replace(dataset, tokens=TokenSample(2, seed=5))
    q, k, out, conv, idle = compute_hessians(module, layers, sampled, batch_size=7)
    assert idle is None
    assert torch.equal(q, k)
    again = compute_hessians(module, layers, sampled, batch_size=30)
    for a, b in zip((q, k, out, conv), again, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    x, expected = dataset.inputs["x"], torch.zeros(32, 32)
    for row in range(30):
        tokens = x[row][TokenSample(2, seed=5).draw(6, row)]
        expected += 6 / 2 * tokens.T @ tokens
    torch.testing.assert_close(q, expected, rtol=1e-4, atol=1e-3)
    whole = compute_hessians(module, layers, dataset, batch_size=7)
    assert torch.linalg.norm(q - whole[0]) < 0.5 * torch.linalg.norm(whole[0])


def test_static_scales_see_the_sampled_tokens(pipeline: PixArtAdapter):
    """With all tokens the scales are the same; with one of them the ranges are its own."""
    states = make_states(pipeline)
    activations, rules = quantize_pipeline(pipeline, STATIC)
    name = next(name for name in activations if name.endswith("attn1.to_q"))
    ranges = {}
    for count in (None, 10_000, 1):
        tokens = None if count is None else TokenSample(count)
        task = ObserveTask(pipeline, activations, rules, tokens)
        run_task(task, states)
        ranges[count] = task.gather_observations(name)
    assert torch.equal(ranges[None], ranges[10_000])
    assert ranges[1].min() >= ranges[None].min()
    assert ranges[1].max() <= ranges[None].max()
    assert not torch.equal(ranges[1], ranges[None])


@pytest.mark.parametrize("tokens", [None, TokenSample(3)])
def test_inputs_of_sequences_of_different_lengths_are_joined(tokens: TokenSample | None):
    """Transforms are fitted to as many tokens of each row as the shortest sequence has."""
    linear = nn.Sequential(nn.Linear(4, 4))
    unit = Unit("", ("x",), lambda state: Call((state["x"],), {}), ("y",))
    segments = [torch.randn(3, 7, 4), torch.randn(2, 5, 4)]
    columns = {"x": SegmentedRows(segments)}
    dataset = UnitDataset(unit, columns, columns, torch.arange(5), tokens=tokens)
    inputs = sample_inputs(linear, ["0"], dataset, torch.arange(5))["0"]
    count = 3 if tokens else 5
    assert inputs.shape == (5, count, 4)
    rows = [*segments[0], *segments[1]]
    for row, sampled in zip(rows, inputs, strict=True):
        assert all(any(torch.equal(token, other) for other in row) for token in sampled)
        assert len(sampled.unique(dim=0)) == count  # without replacement


def test_the_option_is_a_part_of_the_identity_and_changes_no_captured_calls(composed: Compose):
    plans = []
    for tokens in ("null", "8"):
        plans.append(make_plan(composed("method=gptq", f"calibration.tokens={tokens}")))
    whole, sampled = plans
    assert whole["capture"].key == sampled["capture"].key
    for name in ("reconstruct", "activate", "generate"):
        assert whole[name].key != sampled[name].key
    stage = build_stages([sampled["reconstruct"]])["reconstruct"]
    assert stage.calibration.token_sample.count == 8
    with pytest.raises(UserError, match=r"calibration\.tokens=0: sample 1 or more tokens"):
        build_stages([make_plan(composed("method=gptq", "calibration.tokens=0"))["reconstruct"]])
