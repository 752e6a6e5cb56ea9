"""Test the estimates of stages against the operations that they execute."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fp4dit.estimate.footprint import measure_footprint
from fp4dit.estimate.machine import Machine, measure_quantize_seconds
from fp4dit.estimate.stages import MODEL_SPEED_SHARE, Estimator
from fp4dit.models.pixart import PixArt, PixArtAdapter
from fp4dit.quantization.rules import Rule
from fp4dit.rounding.adaround import adaround_scale_aware
from fp4dit.rounding.base import RoundingMethod
from fp4dit.rounding.gptq import GPTQ
from fp4dit.rounding.imatrix import ImportanceMatrix
from fp4dit.rounding.layerwise import LayerwiseReconstruction
from fp4dit.rounding.output_search import LinearGrid, OutputSearch
from fp4dit.rounding.rtn import RoundToNearest
from tests.helpers import tiny
from tests.rounding.test_reconstruction import make_calls, reconstruct_pipeline

CPU = torch.device("cpu")
SLOW = Machine(CPU, 1 / MODEL_SPEED_SHARE, 1, 1, None)  # one operation takes a second
SEARCH = OutputSearch(LinearGrid(count=60), rounds=1, tokens=64)


@pytest.mark.parametrize(
    "method",
    [
        RoundToNearest(),
        tiny.learned_rounding(adaround_scale_aware, steps=6),
        GPTQ(),
        ImportanceMatrix(),
        SEARCH,
        LayerwiseReconstruction(RoundToNearest()),
    ],
    ids=["rtn", "learned", "gptq", "imatrix", "search", "layerwise"],
)
@pytest.mark.unchecked
def test_the_operations_of_a_reconstruction_are_estimated(
    pipeline: PixArtAdapter, pixart_folder: Path, tmp_path: Path, method: RoundingMethod
):
    # FlopCounterMode does not count the fused attention kernel of CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        reconstruct_pipeline(pipeline, tmp_path / "units", method)
    source = PixArt(str(pixart_folder), tokens=make_calls(pipeline)["text"].shape[1])
    footprint = measure_footprint(source.build_on_meta(), tiny.rules())
    estimator = Estimator(footprint, SLOW, 0.0, torch.float32)
    estimated = estimator.estimate_reconstruction(12, 4, 8, method, (), "").seconds
    actual, propagation = counter.get_total_flops(), 2 * 16 * footprint.flops
    if isinstance(method, RoundToNearest):
        assert actual == propagation
    else:
        assert actual > 1.3 * propagation
    assert 0.8 < estimated / actual < 1.1


class TestEstimator:
    @pytest.fixture
    def estimator(self, source: PixArt) -> Estimator:
        footprint = measure_footprint(source.build_on_meta(), tiny.rules())
        return Estimator(footprint, SLOW, 0.0, torch.float32)

    def test_guidance_doubles_the_passes(self, estimator: Estimator):
        for guidance, passes in ((1.0, 15), (4.5, 30)):
            cost = estimator.estimate_sampling(3, 5, guidance, 2, [], 7, "")
            assert cost.seconds == passes * estimator.footprint.flops

    def test_quantizing_takes_time_for_every_value(
        self, estimator: Estimator, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(
            "fp4dit.estimate.stages.measure_quantize_seconds",
            lambda rule, shape, *_: 1.0 if rule.match == "*" else 3.0,
        )
        token = tiny.rules()[0].quantizer
        keys = others = 0
        for name, shape in estimator.footprint.activation_shapes.items():
            if name.endswith(".k"):
                keys += shape.numel()
            elif not name.endswith(".v"):
                others += shape.numel()
        rules = [Rule("*.v", None), Rule("*.k", token), Rule("*", token)]
        assert estimator.estimate_quantize_seconds(rules) == others + 3 * keys

    def test_data_beyond_the_budget_lies_in_files(self, source: PixArt):
        footprint = measure_footprint(source.build_on_meta(), tiny.rules())
        captured_bytes = 100 * sum(footprint.input_bytes.values())
        for budget in (0.0, 1e9):
            estimator = Estimator(footprint, SLOW, budget, torch.float32)
            stream_bytes = 100 * estimator.count_stream_bytes()
            cost = estimator.estimate_reconstruction(90, 10, 1, RoundToNearest(), (), "")
            assert cost.data_bytes == captured_bytes + stream_bytes
            host_bytes = footprint.peak_bytes + footprint.parameter_bytes
            disk_bytes = footprint.parameter_bytes
            if budget:
                host_bytes += cost.data_bytes
            else:
                disk_bytes += stream_bytes
            assert (cost.host_bytes, cost.disk_bytes) == (host_bytes, disk_bytes)

    def test_a_gpu_has_separate_memory(self, source: PixArt):
        footprint = measure_footprint(source.build_on_meta(), tiny.rules())
        estimator = Estimator(footprint, Machine(CPU, 1.0, 1, 1, 1), 0.0, torch.float32)
        cost = estimator.estimate_sampling(3, 5, 1.0, 2, [], 7, "")
        assert cost.device_bytes == footprint.parameter_bytes + 2 * footprint.peak_bytes
        assert cost.host_bytes == footprint.parameter_bytes


def test_the_machine_is_measured(tmp_path: Path):
    machine = Machine.detect(CPU, torch.float32, tmp_path / "not" / "there")
    assert 1e8 < machine.flops_per_second < 1e14
    assert machine.host_bytes > 1e9
    assert 0 < machine.disk_bytes < 1e16
    assert machine.device_bytes is None
    rule = Rule("*", tiny.rules()[0].quantizer)
    seconds = measure_quantize_seconds(rule, torch.Size([4, 64]), CPU, torch.float32)
    assert 1e-12 < seconds < 1e-3
