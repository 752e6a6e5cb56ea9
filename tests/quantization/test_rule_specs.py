"""Rules from the words of configs."""

from typing import Any

import pytest

from fp4dit.numerics.formats import floating, fp16, integer
from fp4dit.numerics.quantizer import PerChannel, PerGroup, PerSplit, PerTensor, PerToken, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.quantization.observers import SampleObserver
from fp4dit.quantization.rule_specs import (
    activation_rules,
    flatten_lists,
    parse_transform,
    weight_rules,
)
from fp4dit.quantization.rules import Rule, assign_rules
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.transforms.smoothing import MovingAverageMax, Smoothing
from fp4dit.utils.errors import UserError

E2M1, E3M0 = floating(2, 1), floating(3, 0)
GROUP = {"per": "group", "size": 32}
FP16 = {"rule": "absmax", "dtype": "fp16"}


def test_weight_rules_are_exceptions_then_the_rest():
    rules = weight_rules(
        "e2m1",
        GROUP,
        FP16,
        per_channel_layers=["a"],
        layers={"second": {"match": "b*", "format": "e3m0"}},
        ignore=["c"],
        transforms=[{"kind": "smoothing"}],
        timestep_boundaries=[500],
    )
    chain = (Smoothing(),)
    assert rules == [
        Rule("c", None),
        Rule("a", Quantizer(E2M1, PerChannel(), AbsMax(fp16)), optional=True),
        Rule("b*", Quantizer(E3M0, PerGroup(32), AbsMax(fp16)), chain, (500,)),
        Rule("*", Quantizer(E2M1, PerGroup(32), AbsMax(fp16)), chain, (500,)),
    ]


def test_activation_rules_are_exceptions_then_the_rest():
    rules = activation_rules(
        "uint8",
        "tensor",
        "minmax",
        layers={"first": {"match": ["x", "y"], "per_timestep": True}},
        ignore="z",
        observer={"kind": "sample", "count": 8},
    )
    quantizer = Quantizer(integer(8, signed=False), PerTensor(), MinMax())
    observer = SampleObserver(8)
    assert rules == [
        Rule("z", None),
        Rule("x", quantizer, observer=observer, per_timestep=True),
        Rule("y", quantizer, observer=observer, per_timestep=True),
        Rule("*", quantizer, observer=observer),
    ]


def test_per_token_layers_come_before_per_head_operands():
    rules = activation_rules("int4", GROUP, "absmax", ["patch"], "*.attn?.[qkv]")
    assert [rule.match for rule in rules] == ["patch", "*.attn?.[qkv]", "*"]
    assert rules[0].quantizer == rules[1].quantizer == Quantizer(integer(4), PerToken(), AbsMax())
    assert rules[0].optional
    assert not rules[2].optional


def test_no_pattern_makes_no_rule():
    rules = weight_rules("e2m1", GROUP, layers={"pre_gelu": {"match": [], "format": "e3m0"}})
    assert [rule.match for rule in rules] == ["*"]
    assert flatten_lists(["a", ["b", []], ""]) == ["a", "b"]


def test_objects_may_stand_for_words():
    rules = weight_rules(E2M1, PerGroup(32), AbsMax(fp16), transforms=[Hadamard()])
    assert rules == weight_rules("e2m1", GROUP, FP16, transforms=[{"kind": "hadamard"}])


def test_an_optional_layer_may_be_missing():
    split = {"per": "split", "parts": 2}
    joined = {"match": "*.joined", "granularity": split, "optional": True}
    rules = weight_rules("e2m1", GROUP, FP16, layers={"joined": joined}, match="blocks.*")
    assigned = assign_rules(["blocks.0.joined", "blocks.0.x", "out"], rules)
    assert assigned["blocks.0.joined"].quantizer == Quantizer(E2M1, PerSplit(2), AbsMax(fp16))
    assert assigned.keys() == {"blocks.0.joined", "blocks.0.x"}
    assert assign_rules(["blocks.0.x"], rules).keys() == {"blocks.0.x"}


def test_a_transform_with_a_statistic():
    statistic = {"kind": "moving_max", "momentum": 0.9}
    transform = parse_transform({"kind": "smoothing", "alpha": 0.3, "statistic": statistic})
    assert transform == Smoothing(0.3, MovingAverageMax(0.9))


BAD = [
    ({"formt": "e2m1"}, r"weight config has no option 'formt'; did you mean format"),
    ({"layers": {"out": {"format": "e3m0"}}}, r"weight\.layers\.out has no `match`"),
    (
        {"layers": {"out": {"match": "o", "formt": "e3m0"}}},
        r"weight\.layers\.out has no option 'formt'; did you mean format",
    ),
    ({"transforms": [{"kind": "hadamar"}]}, r"transform 'hadamar' is not known; .* hadamard"),
    ({"transforms": [{"size": 16}]}, r"has no 'kind'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_name_the_nearest_words(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        weight_rules("e2m1", GROUP, **options)


def test_weights_have_no_tokens_and_activations_no_channels():
    with pytest.raises(UserError, match="granularity 'token' is not known"):
        weight_rules("e2m1", "token")
    with pytest.raises(UserError, match="granularity 'channel' is not known; did you mean input_c"):
        activation_rules("e2m1", "channel")
    with pytest.raises(UserError, match="observer 'sampel' is not known; did you mean sample"):
        activation_rules("e2m1", "tensor", observer="sampel")
