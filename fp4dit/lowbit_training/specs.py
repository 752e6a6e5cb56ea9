"""Rules of low-bit training from plain words: what the files of conf/lowbit_linear call.

_target_: fp4dit.lowbit_training.specs.train_rules
forward: quest
backward: {quantizer: absmax, stochastic: true}
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from fp4dit.lowbit_training.linear import TrainRule
from fp4dit.lowbit_training.matmul import MatmulRecipe
from fp4dit.lowbit_training.operand_quant import OperandQuantizer
from fp4dit.numerics.spec_parser import check_options, suggest_words
from fp4dit.numerics.specs import parse_exponent_rule, parse_reach
from fp4dit.registry import import_kind
from fp4dit.utils.errors import UserError

# The words of configs, and the tags of `fp4dit/registry.py` that they stand for.
OPERAND_QUANTIZERS = {
    "absmax": "operand_absmax",
    "mxfp8": "operand_mxfp8",
    "quest": "operand_quest",
}

# Options of operand quantizers that are specs themselves.
OPTION_PARSERS: dict[str, Callable[[Any], Any]] = {
    "exponent": parse_exponent_rule,
    "reach": parse_reach,
}


def train_rules(
    forward: Any, backward: Any, match: str = "transformer_blocks.*"
) -> list[TrainRule]:
    """Return the rules of a training in which linear layers multiply in few bits.

    Args:
        forward: The quantizer of both operands of forward products, such as "quest".
        backward: The quantizer of the operands of backward products, such as
            {"quantizer": "absmax", "stochastic": True}; None computes them in full precision.
        match: A pattern of the names of layers.

    Raises:
        UserError: if a word or an option is unknown.

    Example:
        >>> [rule.match for rule in train_rules("quest", "absmax")]
        ['transformer_blocks.*']
    """
    recipe = MatmulRecipe(
        forward=parse_operand_quantizer(forward),
        backward=None if backward is None else parse_operand_quantizer(backward),
    )
    return [TrainRule(match, recipe)]


def parse_operand_quantizer(spec: Any) -> OperandQuantizer:
    """Return the operand quantizer that a word, or a mapping of it and its options, stands for.

    Raises:
        UserError: if the word or an option is unknown.
    """
    if not isinstance(spec, str | Mapping):
        return spec
    options = {"quantizer": spec} if isinstance(spec, str) else dict(spec)
    word = options.pop("quantizer", None)
    if word not in OPERAND_QUANTIZERS:
        advice = suggest_words(str(word), OPERAND_QUANTIZERS)
        raise UserError(f"operand quantizer {word!r} is not known; {advice}")
    make_quantizer: Callable[..., OperandQuantizer] = import_kind(OPERAND_QUANTIZERS[word])
    check_options(options, signature(make_quantizer).parameters, f"operand quantizer {word!r}")
    values = {}
    for name, value in options.items():
        values[name] = OPTION_PARSERS[name](value) if name in OPTION_PARSERS else value
    return make_quantizer(**values)
