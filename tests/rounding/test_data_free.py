"""Test which presets need calibration calls, and that the others do not read inputs."""

import pytest
import torch
from torch import nn

from fp4dit.numerics.formats import floating, fp16, integer
from fp4dit.numerics.quantizer import PerGroup, PerTensor, PerToken, Quantizer
from fp4dit.numerics.rounding import RoundingFunction, StochasticRounding
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.quantization.layers import make_quant_layer
from fp4dit.quantization.observers import SampleObserver
from fp4dit.quantization.rule_specs import TRANSFORMS, parse_transform
from fp4dit.quantization.rules import Rule
from fp4dit.rounding.data_free import explain_data_need
from fp4dit.rounding.gptq import GPTQ
from fp4dit.rounding.imatrix import ImportanceMatrix
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.transforms.base import TransformSpec
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.transforms.low_rank import LowRank
from fp4dit.transforms.smoothing import Smoothing
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import list_options, register_resolvers
from pipelines.planning.instantiate import instantiate_node

E2M1 = Quantizer(floating(2, 1), PerGroup(16), AbsMax(fp16))
INT8 = Quantizer(integer(8), PerToken())
DATA_FREE = {
    "afpq",
    "ams_fp4_25",
    "ams_fp5_33",
    "convrot_int4",
    "loraq_int4",
    "mxfp4_rtn",
    "mxfp4_rtn_floor",
    "mxfp6_rtn",
    "mxfp6_rtn_floor",
    "mxfp8_rtn",
    "mxfp8_rtn_floor",
    "nvfp4_4over6",
    "nvfp4_rtn",
    "nvint4_hadamard",
    "rtn",
    "rtn_fp4",
    "svd_refined_int4",
}


def test_presets_that_need_no_data():
    register_resolvers()
    data_free = set()
    for method in list_options("method"):
        config = compose_config("run", [f"method={method}"])
        groups = ("weight", "activation", "rounding")
        parts = [instantiate_node(group, config[group]) for group in groups]
        if explain_data_need(*parts) is None:
            data_free.add(method)
    assert data_free == DATA_FREE


def describe_transformed(*transforms: TransformSpec) -> str | None:
    return explain_data_need([Rule("*", E2M1, transforms)], [Rule("*", INT8)], RoundToNearest())


def test_reasons():
    static = Rule("*", Quantizer(integer(8), PerTensor()), observer=SampleObserver())
    assert describe_transformed() is None
    assert describe_transformed(Hadamard(16)) is None
    assert describe_transformed(Hadamard(16), Smoothing()) == (
        "Smoothing is fitted to the inputs of the layers"
    )
    assert describe_transformed(LowRank()) == "LowRank is fitted to the inputs of the layers"
    assert describe_transformed(lambda out, k: Hadamard()(out, k)) is not None
    for method in (GPTQ(), ImportanceMatrix()):
        reason = explain_data_need([Rule("*", E2M1)], [], method)
        assert reason is not None
        assert f"rounded by {type(method).__name__}" in reason
    reason = explain_data_need([Rule("*", E2M1)], [Rule("*", INT8), static], RoundToNearest())
    assert reason == "the activation rule '*' has static scales, which are calibrated"


def test_rules_that_quantize_nothing_need_nothing():
    unused = Rule("*", None, [Smoothing()], observer=SampleObserver())
    assert explain_data_need([unused], [unused], RoundToNearest()) is None


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_specs_and_transforms_agree_on_inputs(kind: str):
    spec = parse_transform({"kind": kind})
    layer = make_quant_layer(nn.Linear(64, 32), E2M1, [spec])
    needs_inputs = spec(32, 64).needs_inputs
    assert (describe_transformed(spec) is not None) == needs_inputs
    assert layer.needs_calibration_inputs == needs_inputs


def test_a_rotated_layer_is_prepared_without_inputs():
    torch.manual_seed(0)
    source, x = nn.Linear(64, 32), torch.randn(3, 4, 64)
    expected = source(x)
    layer = make_quant_layer(source, E2M1, [Hadamard(16), Hadamard(64)]).prepare()
    torch.testing.assert_close(layer(x), expected)  # the weight is rotated, and not rounded yet


@pytest.mark.parametrize("rounding", [None, StochasticRounding(seed=3)])
def test_rounding_of_each_weight_alone(rounding: RoundingFunction | None):
    method = RoundToNearest(rounding) if rounding else RoundToNearest()
    assert method.elementwise_rounding is method.rounding
    assert explain_data_need([Rule("*", E2M1)], [], method) is None
