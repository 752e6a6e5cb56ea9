"""Quantization as JSON: there and back for every preset, and nothing but what is listed for every other text."""

import copy
import json
import os
import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import cycle, islice
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fp4dit import blockscales
from fp4dit.blockscales import E8M0, NVFP4, Ceiling, below
from fp4dit.choice import Choice, LeastError, Mixed, RangeRatio
from fp4dit.errors import UserError
from fp4dit.formats import floating, integer, nf4
from fp4dit.hadamard import Hadamard
from fp4dit.observers import ChannelRange
from fp4dit.packed.spec import FUNCTIONS, KINDS, MODULES, describe, made, own
from fp4dit.policy import Rule
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import AbsMax, Deviations, MinError, Percentile, RootMeanSquares
from fp4dit.transforms import Balance, LowRank, MovingMax
from pipelines.resolvers import options
from tests.conftest import Compose

GROUPS = ("weight", "activation", "transform")
EVERY = [options(group) for group in GROUPS]
OPTIONS = list(islice(zip(*map(cycle, EVERY), strict=True), max(map(len, EVERY))))  # all of each group, few composed
MXFP4 = Quantizer(floating(2, 1), Granularity("group", 32), E8M0())
MANY = {
    "layers": {
        "blocks.0.attn": Rule("*", MXFP4, (Balance(0.3, MovingMax()), Hadamard(16), LowRank()), (250, 500.5)),
        "blocks.0.ff": Rule("*.ff", Quantizer(nf4, Granularity("row"), MinError(Percentile(AbsMax(floating(5, 10)))))),
        "blocks.1.ff": Rule(
            "?", Quantizer(integer(4), Granularity("tensor"), NVFP4(256.0, None)), observe=ChannelRange(), timed=True
        ),
        "blocks.2.ff": Rule("a", None),
    },
    "scales": [E8M0(Ceiling(7.25 / 6), 4 / 3, (0, -1, 1), Deviations(), 2.5), E8M0(below, reach=RootMeanSquares())],
    "chosen": Choice((floating(2, 1), integer(4)), RangeRatio(), "block"),
}


def through(value: Any) -> Any:
    return made(json.loads(json.dumps(describe(value), allow_nan=False)))


def with_tuples(value: Any) -> Any:
    """In place of lists, which a config gives; the library does not care, but they are unequal to tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(with_tuples, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: with_tuples(getattr(value, f.name)) for f in fields(value)})
    return value


@pytest.mark.parametrize("names", OPTIONS, ids="+".join)
def test_every_preset_comes_back(composed: Compose, names: tuple[str, ...]):
    cfg = composed(*(f"{group}={name}" for group, name in zip(GROUPS, names, strict=True)))
    for group, name in zip(GROUPS, names, strict=True):
        rules = with_tuples(instantiate(OmegaConf.to_container(cfg[group], resolve=True), _convert_="all"))
        assert through(rules) == rules
        assert (rules == ()) == (name == "none")


def test_what_no_preset_has_comes_back_too():
    rules = through(MANY)
    assert rules == {**MANY, "scales": tuple(MANY["scales"])}
    assert rules["layers"]["blocks.0.attn"].quantizer.scale.reach is blockscales.largest


def test_a_person_can_read_it():
    assert describe(MXFP4) == {
        "kind": "Quantizer",
        "format": {
            "kind": "NumberFormat",
            "name": "e2m1",
            "bits": 4,
            "mantissa": 1,
            "min_exponent": 0,
            "max": 6.0,
            "min": -6.0,
        },
        "granularity": {"kind": "Granularity", "unit": "group", "group": 32, "parts": 0},
        "scale": {
            "kind": "E8M0",
            "rule": {"function": "even"},
            "factor": 1.0,
            "shifts": [0],
            "reach": {"function": "largest"},
            "p": 2.0,
        },
    }


def test_a_name_stands_for_one_thing_and_fields_do_not_hide_it():
    """What may be made holds no tensor and no module, and no name is taken twice."""
    assert len(KINDS) == 1 + sum(len(own(module)) for module in MODULES)
    for kind in KINDS.values():
        assert not {"kind", "function"} & {f.name for f in fields(kind)}
    assert not {"Mixed", "Place", "Entry", "Transform", "Format", "UserError", "Scale"} & set(KINDS)
    assert set(FUNCTIONS) == {"below", "ceil", "even", "floor", "largest", "nearest"}


def at(*keys: str | int, value: Any) -> Any:
    """MANY's JSON with one value changed."""
    changed = describe(MANY)
    *way, last = keys
    inner = changed
    for key in way:
        inner = inner[key]
    inner[last] = value
    return changed


FORMAT = ("layers", "blocks.0.attn", "quantizer", "format")
SCALE = ("layers", "blocks.0.attn", "quantizer", "scale")
BALANCE = ("layers", "blocks.0.attn", "transforms", 0)
NF4 = ("layers", "blocks.0.ff", "quantizer", "format")
UNKNOWN = "which is none of fp4dit's: install the fp4dit that wrote it"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ((*FORMAT, "bits"), "four", "layers.blocks.0.attn.quantizer.format.bits must be int, not 'four'"),
        ((*FORMAT, "bits"), True, "layers.blocks.0.attn.quantizer.format.bits must be int, not True"),
        ((*FORMAT, "bits"), 4.0, "format.bits must be int, not 4.0"),
        ((*FORMAT, "bits"), 2**53 + 1, "format.bits is 9007199254740993: only finite numbers up to 2^53"),
        ((*FORMAT, "max"), True, "format.max must be float, not True"),
        ((*FORMAT, "max"), float("nan"), "format.max is nan: only finite numbers"),
        ((*FORMAT, "max"), float("-inf"), "format.max is -inf: only finite numbers"),
        ((*FORMAT, "width"), 4, "layers.blocks.0.attn.quantizer.format.width is no field of NumberFormat"),
        ((*FORMAT, "kind"), "system", f"quantizer.format.kind is 'system', {UNKNOWN}"),
        ((*FORMAT, "kind"), "fp4dit.formats.NumberFormat", UNKNOWN),
        ((*FORMAT, "kind"), "Format", UNKNOWN),
        ((*FORMAT, "kind"), "UserError", UNKNOWN),
        ((*FORMAT, "kind"), "Mixed", UNKNOWN),
        ((*FORMAT, "kind"), ["NumberFormat"], UNKNOWN),
        (FORMAT, [], r"quantizer.format must be Format | Choice, not []"),
        (FORMAT, {}, r"quantizer.format must be Format | Choice, not {}"),
        (FORMAT, describe(AbsMax()), "quantizer.format must be Format | Choice"),
        ((*SCALE, "rule"), {"function": "open"}, f"scale.rule.function is 'open', {UNKNOWN}"),
        ((*SCALE, "rule"), {"function": "even", "x": 1}, "scale.rule.x has no place beside the name of a function"),
        ((*SCALE, "rule"), {"function": "largest"}, "scale.rule must be Callable"),
        ((*SCALE, "rule"), describe(AbsMax()), "scale.rule must be Callable"),
        ((*SCALE, "reach"), {"function": "even"}, "scale.reach must be Callable"),
        ((*SCALE, "reach"), "largest", "scale.reach must be Callable"),
        ((*SCALE, "shifts"), 0, "scale.shifts must be Sequence[int], not 0"),
        ((*SCALE, "shifts"), [0, "1"], "scale.shifts must be Sequence[int], not [0, '1']"),
        ((*SCALE, "shifts"), [0, True], "scale.shifts must be Sequence[int]"),
        (SCALE, {"function": "even"}, "quantizer.scale must be ScaleRule"),
        ((*BALANCE, "of"), describe(LeastError()), "transforms[0].of must be ChannelStatistic"),
        ((*BALANCE, "of"), describe(Hadamard()), "transforms[0].of must be ChannelStatistic"),
        (BALANCE, describe(MovingMax()), "blocks.0.attn.transforms must be Sequence[TransformSpec]"),
        ((*BALANCE, "alpha"), None, "transforms[0].alpha must be float, not None"),
        ((*NF4, "levels"), [1.0, 0.0], "blocks.0.ff.quantizer.format: the levels of nf4 are no codebook of 4 bits"),
        ((*NF4, "levels"), "0123", "format.levels must be tuple[float, ...], not '0123'"),
        (("chosen", "per"), "row", "chosen.per must be Literal['tensor', 'block', 'majority'], not 'row'"),
        (("chosen", "formats", 1, "bits"), 5, "quantization_config.chosen: choose between formats of the same number"),
        (("scales", 0, "factor"), "1", "quantization_config.scales[0].factor must be float, not '1'"),
        (("layers", "x"), {1}, "quantization_config.layers.x is {1}"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(keys: tuple[str | int, ...], value: Any, message: str):
    with pytest.raises(UserError) as error:
        made(at(*keys, value=value))
    assert message in str(error.value)
    assert str(error.value).startswith("quantization_config.")


def test_a_missing_field_is_named():
    described = describe(MXFP4)
    del described["format"]["bits"]
    with pytest.raises(UserError, match=r"^config\.format\.bits is missing$"):
        made(described, path="config")


def test_the_whole_is_of_the_type_that_is_expected():
    assert made(describe(MXFP4), Quantizer) == MXFP4
    with pytest.raises(UserError, match=r"^quantization_config must be Rule, not"):
        made(describe(MXFP4), Rule)


def test_whole_numbers_where_floats_belong_become_floats():
    """Other writers of JSON write 2.0 as 2, and codes of a codebook must not be integers."""
    book = made({"kind": "Codebook", "name": "ternary", "bits": 2, "levels": [-1, 0, 1.0]})
    assert [type(level) for level in book.levels] == [float, float, float]


@pytest.mark.parametrize("depth", [21, 100_000])
def test_what_is_too_deep_is_an_error(depth: int):
    nested: list[Any] = []
    for _ in range(depth - 1):
        nested = [nested]
    with pytest.raises(UserError, match=r"^quantization_config is nested more than 20 levels deep"):
        made(nested)


def test_twenty_levels_are_not_too_deep():
    assert made(json.loads("[" * 19 + "1" + "]" * 19))


def test_what_is_too_large_is_an_error():
    assert len(made([0] * 99_999)) == 99_999
    with pytest.raises(UserError, match=r"^quantization_config holds more than 100000 values"):
        made([[0] * 60_000, [0] * 60_000])


def test_a_format_whose_values_do_not_fit_its_bits_is_refused_at_once():
    """Its values would be 2^40."""
    with pytest.raises(UserError, match="4 bits do not hold its values"):
        made(describe(floating(2, 1)) | {"mantissa": 40})


def test_many_bits_cost_no_time():
    """2**bits would take all memory."""
    assert made({"kind": "Codebook", "name": "wide", "bits": 2**53, "levels": [0.0, 1.0]}).bits == 2**53
    with pytest.raises(UserError, match="no codebook"):
        made({"kind": "Codebook", "name": "wide", "bits": 2**53, "levels": [1.0, 0.0]})


@pytest.mark.parametrize(
    "value",
    [
        float("inf"),
        Deviations(float("nan")),
        2**53 + 1,
        os.system,
        floating,
        lambda reach, fmt: reach,
        Quantizer,
        {1: "a"},
        {"kind": "NumberFormat"},
        {"function": "even"},
        {"a"},
        b"bytes",
        Mixed,
    ],
)
def test_what_could_not_be_made_again_is_not_written(value: Any):
    with pytest.raises(UserError, match=r"^a checkpoint cannot say what"):
        describe([value])


def test_a_class_of_the_same_name_is_not_fp4dits():
    AbsMaxAlike = type("AbsMax", (AbsMax,), {})
    with pytest.raises(UserError, match="a checkpoint cannot say what"):
        describe(AbsMaxAlike())


def inner(value: Any) -> Iterator[Any]:
    """The objects and arrays of JSON, itself included."""
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from inner(item)


NAMES = ["kind", "function", "x", "bits", "store", "rule", *KINDS, *FUNCTIONS]
LEAVES = [0, 1, -1, 2, 1.5, 1e300, 2**60, True, False, None, "", "row", float("nan"), [], {}, *NAMES]


def mutated(rng: random.Random, value: Any) -> Any:
    """With one to three changes: a value is another from anywhere or another number, or a key goes, comes or moves."""
    value = copy.deepcopy(value)
    parts = list(inner(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        part = rng.choice([part for part in parts if part])
        key = rng.choice(list(part) if isinstance(part, dict) else range(len(part)))
        new = copy.deepcopy(rng.choice([rng.choice(parts), rng.choice(LEAVES), {"function": rng.choice(NAMES)}]))
        how = rng.choice(["set", "set", "number", "number", "drop", "add", "rename"])
        if how == "number" and type(part[key]) in (int, float):
            part[key] = rng.choice([int, float])(rng.uniform(-9, 9))
        elif how in ("set", "number"):
            part[key] = new
        elif how == "drop":
            del part[key]
        elif isinstance(part, list):
            part.insert(key, new)
        else:
            part[rng.choice(NAMES)] = part.pop(key) if how == "rename" else new
    return value


def exact(value: Any) -> str:
    """JSON in which 1 is 1.0, as in JSON it is, and true is neither."""
    return json.dumps(json.loads(json.dumps(value), parse_int=float), sort_keys=True)


def remade(value: Any) -> Any:
    """None if it is refused."""
    try:
        return describe(made(value))
    except UserError:
        return None


def test_whatever_is_made_is_all_that_was_said():
    """Of mutations, those that are still valid come back whole, and all others are refused as a user's mistake."""
    rng = random.Random(0)
    valid = [describe(value) for value in (MXFP4, *MANY["layers"].values(), *MANY["scales"], MANY["chosen"])]
    pairs = [(changed, remade(changed)) for changed in (mutated(rng, rng.choice(valid)) for _ in range(2000))]
    kept = [(changed, found) for changed, found in pairs if found is not None]
    assert all(exact(found) == exact(changed) for changed, found in kept)
    assert 100 < len({exact(changed) for changed, _ in kept} - set(map(exact, valid))) < 1000
