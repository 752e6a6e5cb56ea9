"""What stages are expected to take, against the operations that they do."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fp4dit.estimate import SHARE, Estimator
from fp4dit.footprint import footprint
from fp4dit.machine import Machine, quantizing
from fp4dit.models.pixart import PixArt, PixArtPipeline
from fp4dit.policy import Rule
from fp4dit.rounding import ulp
from fp4dit.tasks.reconstruct import Fit, Layerwise, Rounded
from fp4dit.tasks.search import Linear, OutputSearch, Weighed
from fp4dit.tasks.second_order import SecondOrder
from tests import tiny
from tests.test_reconstruct import calls, reconstruct

CPU = torch.device("cpu")
SLOW = Machine(CPU, 1 / SHARE, 1, 1, None)  # one operation takes a second
SEARCH = OutputSearch(Linear(count=60), rounds=1, tokens=64)


@pytest.mark.parametrize(
    "fit",
    [
        Rounded(),
        tiny.learnt(ulp, steps=6),
        SecondOrder(),
        Weighed(),
        SEARCH,
        Layerwise(Rounded()),
    ],
    ids=["rounded", "learnt", "second order", "weighed", "search", "layerwise"],
)
@pytest.mark.unchecked
def test_reconstruction_takes_the_operations_that_are_estimated(
    pipeline: PixArtPipeline, pixart_folder: Path, tmp_path: Path, fit: Fit
):
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # the CPU's own kernel is not counted
        reconstruct(pipeline, tmp_path / "units", fit)
    own = footprint(PixArt(str(pixart_folder), tokens=calls(pipeline)["text"].shape[1]).skeleton(), tiny.rules())
    estimator = Estimator(own, SLOW, 0.0, torch.float32)
    estimated = estimator.reconstruction(12, 4, 8, fit, (), "").seconds
    least = 2 * 16 * own.flops
    assert counter.get_total_flops() == least if isinstance(fit, Rounded) else counter.get_total_flops() > 1.3 * least
    assert 0.8 < estimated / counter.get_total_flops() < 1.1


class TestEstimator:
    @pytest.fixture
    def estimator(self, source: PixArt) -> Estimator:
        return Estimator(footprint(source.skeleton(), tiny.rules()), SLOW, 0.0, torch.float32)

    def test_guidance_asks_twice(self, estimator: Estimator):
        once, twice = (estimator.sampling(3, 5, guidance, 2, [], 7, "").seconds for guidance in (1.0, 4.5))
        assert (once, twice) == (15 * estimator.footprint.flops, 30 * estimator.footprint.flops)

    def test_quantizing_takes_time_for_every_value(self, estimator: Estimator, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("fp4dit.estimate.quantizing", lambda rule, shape, *_: 1.0 if rule.match == "*" else 3.0)
        token = tiny.rules()[0].quantizer
        values = {name: shape.numel() for name, shape in estimator.footprint.seen.items()}
        keys = sum(count for name, count in values.items() if name.endswith(".k"))
        rules = [Rule("*.v", None), Rule("*.k", token), Rule("*", token)]
        others = sum(count for name, count in values.items() if name[-2:] not in (".k", ".v"))
        assert estimator.quantizing(rules) == others + 3 * keys

    def test_what_exceeds_the_budget_lies_in_files(self, source: PixArt):
        own = footprint(source.skeleton(), tiny.rules())
        known = own.parameters + 100 * sum(own.given.values())
        for budget, memory, disk in ((0.0, 0, 1), (1e9, 1, 0)):
            estimator = Estimator(own, SLOW, budget, torch.float32)
            made = 100 * estimator.both_streams()
            cost = estimator.reconstruction(90, 10, 1, Rounded(), (), "")
            assert cost.disk == own.parameters + disk * made
            assert cost.host == own.widest + (known + made if memory else own.parameters)
            assert cost.data == known - own.parameters + made

    def test_a_gpu_computes_in_memory_of_its_own(self, source: PixArt):
        own = footprint(source.skeleton(), tiny.rules())
        estimator = Estimator(own, Machine(CPU, 1.0, 1, 1, 1), 0.0, torch.float32)
        cost = estimator.sampling(3, 5, 1.0, 2, [], 7, "")
        assert (cost.device, cost.host) == (own.parameters + 2 * own.widest, own.parameters)


def test_speeds_are_of_this_machine(tmp_path: Path):
    machine = Machine.here(CPU, torch.float32, tmp_path / "not" / "there")
    assert 1e8 < machine.speed < 1e14
    assert machine.host > 1e9
    assert 0 < machine.disk < 1e16
    assert machine.own is None
    assert 1e-12 < quantizing(Rule("*", tiny.rules()[0].quantizer), torch.Size([4, 64]), CPU, torch.float32) < 1e-3
