"""The JSON of every preset is read back, and unlisted classes and functions are refused."""

import copy
import json
import os
import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from fp4dit.numerics import block_scales
from fp4dit.numerics.block_scales import (
    CeilRatioExponent,
    E8M0Scale,
    NVFP4Scale,
    floor_ratio_exponent,
)
from fp4dit.numerics.format_selection import FormatSelection, LeastError, PerBlockFormat, RangeRatio
from fp4dit.numerics.formats import floating, fp16, integer, nf4
from fp4dit.numerics.quantizer import PerChannel, PerGroup, PerTensor, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax, RootMeanSquares, StandardDeviations
from fp4dit.numerics.scale_search import MinError, Percentile
from fp4dit.packed.encoding.integrity import VERSION
from fp4dit.packed.encoding.schema import (
    CLASS_TAGS,
    FUNCTION_TAGS,
    from_tagged_json,
    to_tagged_json,
)
from fp4dit.packed.integrations.config import PackedConfigMixin
from fp4dit.packed.model import describe_model
from fp4dit.packed.nn.linear import pack_layer
from fp4dit.quantization.observers import MovingAverageMinMaxObserver, PerChannelMinMaxObserver
from fp4dit.quantization.rules import Rule, make_quant_layer
from fp4dit.registry import KINDS, import_kind
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.transforms.low_rank import LowRank
from fp4dit.transforms.smoothing import MovingAverageMax, Smoothing
from fp4dit.utils.errors import UserError
from pipelines.config.resolvers import list_options
from tests.conftest import Compose

GROUPS = ("weight", "activation", "transform")
OPTIONS_BY_GROUP = [list_options(group) for group in GROUPS]
# Every option of each group, in few combinations.
OPTIONS = list(
    islice(zip(*map(cycle, OPTIONS_BY_GROUP), strict=True), max(map(len, OPTIONS_BY_GROUP)))
)
MXFP4 = Quantizer(floating(2, 1), PerGroup(32), E8M0Scale())
SAMPLES = {
    "layers": {
        "blocks.0.attn": Rule(
            "*", MXFP4, (Smoothing(0.3, MovingAverageMax()), Hadamard(16), LowRank()), (250, 500.5)
        ),
        "blocks.0.ff": Rule(
            "*.ff",
            Quantizer(nf4, PerChannel(), MinError(Percentile(AbsMax(floating(5, 10))))),
        ),
        "blocks.1.ff": Rule(
            "?",
            Quantizer(integer(4), PerTensor(), NVFP4Scale(256.0, None)),
            observer=PerChannelMinMaxObserver(),
            per_timestep=True,
        ),
        "blocks.2.ff": Rule("a", None),
    },
    "scales": [
        E8M0Scale(CeilRatioExponent(7.25 / 6), 4 / 3, (0, -1, 1), StandardDeviations(), 2.5),
        E8M0Scale(floor_ratio_exponent, reach=RootMeanSquares()),
    ],
    "chosen": FormatSelection((floating(2, 1), integer(4)), RangeRatio(), "block"),
}


def round_trip(value: Any) -> Any:
    """Convert a value to JSON text and back."""
    return from_tagged_json(json.loads(json.dumps(to_tagged_json(value), allow_nan=False)))


def with_tuples(value: Any) -> Any:
    """Return a value with tuples in place of the lists of a config, which are unequal to tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(with_tuples, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: with_tuples(getattr(value, f.name)) for f in fields(value)}
        )
    return value


@pytest.mark.parametrize("names", OPTIONS, ids="+".join)
def test_every_preset_is_read_back(composed: Compose, names: tuple[str, ...]):
    cfg = composed(*(f"{group}={name}" for group, name in zip(GROUPS, names, strict=True)))
    # The weight rules contain the transforms.
    for group, name in zip(GROUPS[:2], names[:2], strict=True):
        rules = with_tuples(
            instantiate(OmegaConf.to_container(cfg[group], resolve=True), _convert_="all")
        )
        assert round_trip(rules) == rules
        assert (rules == ()) == (name == "none")


def test_other_rules_are_read_back():
    rules = round_trip(SAMPLES)
    assert rules == {**SAMPLES, "scales": tuple(SAMPLES["scales"])}
    assert rules["layers"]["blocks.0.attn"].quantizer.scale.reach is block_scales.max_magnitude


# The JSON of a layer in a checkpoint. Tags and fields never change within a version: if this test
# fails, the file format has changed, and VERSION has to be raised.
E2M1_JSON = {
    "kind": "number_format",
    "name": "e2m1",
    "bits": 4,
    "mantissa": 1,
    "min_exponent": 0,
    "max": 6.0,
    "min": -6.0,
}
E4M3_JSON = {
    "kind": "number_format",
    "name": "e4m3",
    "bits": 8,
    "mantissa": 3,
    "min_exponent": -6,
    "max": 480.0,
    "min": -480.0,
}
WEIGHTS_JSON = {
    "kind": "packed_weights",
    "layers": ["blocks.0.attn.to_q"],
    "layout": {
        "kind": "packed_layout",
        "formats": [E2M1_JSON],
        "granularity": {"kind": "per_group", "size": 128},
        "encodings": {"scale": {"kind": "encoding_float", "num_bytes": 2}},
    },
    "transforms": [{"kind": "hadamard", "size": 64, "seed": 0, "signs": True}],
    "timestep_boundaries": [],
}
INPUTS_JSON = {
    "kind": "packed_inputs",
    "names": ["blocks.0.attn.to_q"],
    "rule": {
        "kind": "rule",
        "match": "*",
        "quantizer": {
            "kind": "quantizer",
            "format": E4M3_JSON,
            "granularity": {"kind": "per_tensor"},
            "scale": {"kind": "minmax", "dtype": None},
        },
        "transforms": [],
        "timestep_boundaries": [],
        "observer": {"kind": "moving_range", "momentum": 0.95},
        "per_timestep": False,
        "optional": False,
        "before_norm": False,
        "attention": None,
    },
}
BUFFERS = {"codes": (8, 128), "scale": (32,)}


def test_the_json_of_a_packed_layer_is_pinned():
    """FP4DiT's E2M1 in groups of 128, with a Hadamard transform and a static input."""
    name = "blocks.0.attn.to_q"
    quantizer = Quantizer(floating(2, 1), PerGroup(128), AbsMax(fp16))
    weight_rule = Rule("*", quantizer, (Hadamard(64),))
    input_quantizer = Quantizer(floating(4, 3), PerTensor(), MinMax())
    input_rule = Rule("*", input_quantizer, observer=MovingAverageMinMaxObserver())
    layer = make_quant_layer(nn.Linear(256, 8), quantizer, weight_rule.transforms)
    layer.prepare(torch.randn(4, 256)).commit_weight()
    packed = pack_layer(layer)
    description = describe_model({name: packed}, {name: weight_rule}, {name: input_rule})
    assert PackedConfigMixin.from_description(description).to_dict() == {
        "quant_method": "fp4dit",
        "version": 2,
        "weights": [WEIGHTS_JSON],
        "inputs": [INPUTS_JSON],
    }
    assert VERSION == 2
    assert {key: tuple(value.shape) for key, value in packed.packed_buffers.items()} == BUFFERS


def test_a_checkpoint_from_before_a_field_is_read():
    older = copy.deepcopy(INPUTS_JSON)
    del older["rule"]["attention"]
    assert from_tagged_json(older) == from_tagged_json(INPUTS_JSON)


def test_functions_have_tags():
    assert to_tagged_json(MXFP4)["scale"] == {
        "kind": "e8m0",
        "round": {"function": "round_even"},
        "factor": 1.0,
        "shifts": [0],
        "reach": {"function": "largest_value"},
        "p": 2.0,
    }


def test_tags_name_frozen_dataclasses_and_functions():
    """No tag stands for a tensor, a module or two things, and no field hides a tag."""
    kinds = [import_kind(tag) for tag in CLASS_TAGS]
    assert len(set(kinds)) == len(kinds)
    for kind in kinds:
        assert kind.__dataclass_params__.frozen
        assert kind.__dataclass_params__.eq
        assert not {"kind", "function"} & {field.name for field in fields(kind)}
    assert all(callable(import_kind(tag)) for tag in FUNCTION_TAGS)
    assert not set(CLASS_TAGS) & set(FUNCTION_TAGS)
    assert {"gptq", "pixart", "per_block_format"} <= KINDS.keys() - set(CLASS_TAGS)


def change_json(*keys: str | int, value: Any) -> Any:
    """Return the JSON of SAMPLES with one value changed."""
    changed = to_tagged_json(SAMPLES)
    *path, last = keys
    node = changed
    for key in path:
        node = node[key]
    node[last] = value
    return changed


FORMAT = ("layers", "blocks.0.attn", "quantizer", "format")
SCALE = ("layers", "blocks.0.attn", "quantizer", "scale")
SMOOTHING = ("layers", "blocks.0.attn", "transforms", 0)
NF4 = ("layers", "blocks.0.ff", "quantizer", "format")
UNKNOWN = "which fp4dit does not know: install the fp4dit that wrote it"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (
            (*FORMAT, "bits"),
            "four",
            "layers.blocks.0.attn.quantizer.format.bits must be int, not 'four'",
        ),
        (
            (*FORMAT, "bits"),
            True,
            "layers.blocks.0.attn.quantizer.format.bits must be int, not True",
        ),
        ((*FORMAT, "bits"), 4.0, "format.bits must be int, not 4.0"),
        (
            (*FORMAT, "bits"),
            2**53 + 1,
            "format.bits is 9007199254740993: only finite numbers up to 2^53",
        ),
        ((*FORMAT, "max"), True, "format.max must be float, not True"),
        ((*FORMAT, "max"), float("nan"), "format.max is nan: only finite numbers"),
        ((*FORMAT, "max"), float("-inf"), "format.max is -inf: only finite numbers"),
        (
            (*FORMAT, "width"),
            4,
            "layers.blocks.0.attn.quantizer.format.width is no field of number_format",
        ),
        ((*FORMAT, "kind"), "system", f"quantizer.format.kind is 'system', {UNKNOWN}"),
        ((*FORMAT, "kind"), "fp4dit.numerics.formats.NumberFormat", UNKNOWN),
        ((*FORMAT, "kind"), "NumberFormat", UNKNOWN),
        ((*FORMAT, "kind"), "per_block_format", UNKNOWN),
        ((*FORMAT, "kind"), "gptq", UNKNOWN),
        ((*FORMAT, "kind"), "round_even", UNKNOWN),
        ((*FORMAT, "kind"), ["number_format"], UNKNOWN),
        (FORMAT, [], r"quantizer.format must be Format | FormatSelection, not []"),
        (FORMAT, {}, r"quantizer.format must be Format | FormatSelection, not {}"),
        (FORMAT, to_tagged_json(AbsMax()), "quantizer.format must be Format | FormatSelection"),
        ((*SCALE, "round"), {"function": "open"}, f"scale.round.function is 'open', {UNKNOWN}"),
        (
            (*SCALE, "round"),
            {"function": "round_even", "x": 1},
            "scale.round.x has no place beside the name of a function",
        ),
        ((*SCALE, "round"), {"function": "largest_value"}, "scale.round must be Callable"),
        ((*SCALE, "round"), to_tagged_json(AbsMax()), "scale.round must be Callable"),
        ((*SCALE, "reach"), {"function": "round_even"}, "scale.reach must be Callable"),
        ((*SCALE, "reach"), "largest_value", "scale.reach must be Callable"),
        ((*SCALE, "shifts"), 0, "scale.shifts must be Sequence[int], not 0"),
        ((*SCALE, "shifts"), [0, "1"], "scale.shifts must be Sequence[int], not [0, '1']"),
        ((*SCALE, "shifts"), [0, True], "scale.shifts must be Sequence[int]"),
        (SCALE, {"function": "round_even"}, "quantizer.scale must be ScaleRule"),
        (
            (*SMOOTHING, "statistic"),
            to_tagged_json(LeastError()),
            "transforms[0].statistic must be ChannelStatistic",
        ),
        (
            (*SMOOTHING, "statistic"),
            to_tagged_json(Hadamard()),
            "transforms[0].statistic must be ChannelStatistic",
        ),
        (
            SMOOTHING,
            to_tagged_json(MovingAverageMax()),
            "blocks.0.attn.transforms must be Sequence[TransformSpec]",
        ),
        ((*SMOOTHING, "alpha"), None, "transforms[0].alpha must be float, not None"),
        (
            (*NF4, "levels"),
            [1.0, 0.0],
            "blocks.0.ff.quantizer.format: the levels of nf4 are not a codebook of 4 bits",
        ),
        ((*NF4, "levels"), "0123", "format.levels must be tuple[float, ...], not '0123'"),
        (
            ("chosen", "per"),
            "row",
            "chosen.per must be Literal['tensor', 'block', 'majority'], not 'row'",
        ),
        (
            ("chosen", "formats", 1, "bits"),
            5,
            "quantization_config.chosen: choose between formats of the same number",
        ),
        (
            ("scales", 0, "factor"),
            "1",
            "quantization_config.scales[0].factor must be float, not '1'",
        ),
        (("layers", "x"), {1}, "quantization_config.layers.x is {1}"),
    ],
)
def test_errors_contain_the_path(keys: tuple[str | int, ...], value: Any, message: str):
    with pytest.raises(UserError) as error:
        from_tagged_json(change_json(*keys, value=value))
    assert message in str(error.value)
    assert str(error.value).startswith("quantization_config.")


def test_missing_fields_are_named():
    json_object = to_tagged_json(MXFP4)
    del json_object["format"]["bits"]
    with pytest.raises(UserError, match=r"^config\.format\.bits is missing$"):
        from_tagged_json(json_object, path="config")


def test_the_expected_type_is_checked():
    assert from_tagged_json(to_tagged_json(MXFP4), Quantizer) == MXFP4
    with pytest.raises(UserError, match=r"^quantization_config must be Rule, not"):
        from_tagged_json(to_tagged_json(MXFP4), Rule)


def test_integers_become_floats():
    """Some writers of JSON write 2.0 as 2, but the levels of a codebook must be floats."""
    book = from_tagged_json(
        {"kind": "codebook", "name": "ternary", "bits": 2, "levels": [-1, 0, 1.0]}
    )
    assert [type(level) for level in book.levels] == [float, float, float]


@pytest.mark.parametrize("depth", [21, 100_000])
def test_deep_nesting_is_refused(depth: int):
    nested: list[Any] = []
    for _ in range(depth - 1):
        nested = [nested]
    with pytest.raises(UserError, match=r"^quantization_config is nested more than 20 levels deep"):
        from_tagged_json(nested)


def test_twenty_levels_are_allowed():
    assert from_tagged_json(json.loads("[" * 19 + "1" + "]" * 19))


def test_many_values_are_refused():
    assert len(from_tagged_json([0] * 99_999)) == 99_999
    with pytest.raises(UserError, match=r"^quantization_config holds more than 100000 values"):
        from_tagged_json([[0] * 60_000, [0] * 60_000])


def test_formats_of_too_many_values_are_refused():
    """The format would have 2^40 values."""
    with pytest.raises(UserError, match="4 bits do not hold its values"):
        from_tagged_json(to_tagged_json(floating(2, 1)) | {"mantissa": 40})


def test_many_bits_allocate_nothing():
    """An array of 2**bits values would take all memory."""
    assert (
        from_tagged_json(
            {"kind": "codebook", "name": "wide", "bits": 2**53, "levels": [0.0, 1.0]}
        ).bits
        == 2**53
    )
    with pytest.raises(UserError, match="not a codebook"):
        from_tagged_json({"kind": "codebook", "name": "wide", "bits": 2**53, "levels": [1.0, 0.0]})


@pytest.mark.parametrize(
    "value",
    [
        float("inf"),
        StandardDeviations(float("nan")),
        2**53 + 1,
        os.system,
        floating,
        lambda reach, fmt: reach,
        Quantizer,
        {1: "a"},
        {"kind": "number_format"},
        {"function": "round_even"},
        {"a"},
        b"bytes",
        PerBlockFormat,
    ],
)
def test_unlisted_values_are_not_written(value: Any):
    with pytest.raises(UserError, match=r"^a checkpoint cannot say what"):
        to_tagged_json([value])


def test_subclasses_are_not_written():
    AbsMaxAlike = type("AbsMax", (AbsMax,), {})
    with pytest.raises(UserError, match="a checkpoint cannot say what"):
        to_tagged_json(AbsMaxAlike())


def iterate_containers(value: Any) -> Iterator[Any]:
    """Yield all objects and arrays of JSON, itself included."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from iterate_containers(item)


NAMES = ["kind", "function", "x", "bits", "dtype", "round", *CLASS_TAGS, *FUNCTION_TAGS]
LEAVES = [
    0,
    1,
    -1,
    2,
    1.5,
    1e300,
    2**60,
    True,
    False,
    None,
    "",
    "row",
    float("nan"),
    [],
    {},
    *NAMES,
]


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Change one to three things: replace a value, or remove, add or rename a key."""
    value = copy.deepcopy(value)
    containers = list(iterate_containers(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        container = rng.choice([container for container in containers if container])
        key = rng.choice(list(container) if isinstance(container, dict) else range(len(container)))
        new = copy.deepcopy(
            rng.choice(
                [rng.choice(containers), rng.choice(LEAVES), {"function": rng.choice(NAMES)}]
            )
        )
        operation = rng.choice(["set", "set", "number", "number", "drop", "add", "rename"])
        if operation == "number" and type(container[key]) in (int, float):
            container[key] = rng.choice([int, float])(rng.uniform(-9, 9))
        elif operation in ("set", "number"):
            container[key] = new
        elif operation == "drop":
            del container[key]
        elif isinstance(container, list):
            container.insert(key, new)
        else:
            container[rng.choice(NAMES)] = container.pop(key) if operation == "rename" else new
    return value


def normalize_json(value: Any) -> str:
    """Return JSON in which 1 equals 1.0, but not true, and null stands for what is missing."""

    def drop_nulls(members: dict[str, Any]) -> dict[str, Any]:
        return {key: item for key, item in members.items() if item is not None}

    plain = json.loads(json.dumps(value), parse_int=float, object_hook=drop_nulls)
    return json.dumps(plain, sort_keys=True)


def reread_json(value: Any) -> Any:
    """Read and write JSON, or return None if it is refused."""
    try:
        return to_tagged_json(from_tagged_json(value))
    except UserError:
        return None


def test_mutations_are_read_exactly_or_refused():
    """Valid mutations are read back completely, and all others raise UserError."""
    rng = random.Random(0)
    samples = (MXFP4, *SAMPLES["layers"].values(), *SAMPLES["scales"], SAMPLES["chosen"])
    valid = [to_tagged_json(value) for value in samples]
    accepted = set()
    for _ in range(2000):
        changed = mutate_json(rng, rng.choice(valid))
        reread = reread_json(changed)
        if reread is not None:
            assert normalize_json(reread) == normalize_json(changed)
            accepted.add(normalize_json(changed))
    assert 100 < len(accepted - set(map(normalize_json, valid))) < 1000
