"""Rules of low-bit training from the words of configs."""

from typing import Any

import pytest

from fp4dit.lowbit_training.linear import TrainRule
from fp4dit.lowbit_training.matmul import MatmulRecipe
from fp4dit.lowbit_training.operand_quant import absmax_quantizer, mxfp8_quantizer, quest_quantizer
from fp4dit.lowbit_training.specs import train_rules
from fp4dit.utils.errors import UserError


def test_words_stand_for_operand_quantizers():
    recipe = MatmulRecipe(quest_quantizer(), absmax_quantizer())
    assert train_rules("quest", "absmax") == [TrainRule("transformer_blocks.*", recipe)]
    stochastic = {"quantizer": "absmax", "stochastic": True}
    recipe = MatmulRecipe(mxfp8_quantizer(), absmax_quantizer(stochastic=True))
    assert train_rules("mxfp8", stochastic, match="*") == [TrainRule("*", recipe)]
    assert train_rules(absmax_quantizer(), None)[0].recipe == MatmulRecipe(absmax_quantizer(), None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("qest", "operand quantizer 'qest' is not known; did you mean quest"),
        ({"quantizer": "mxfp8", "stochastic": True}, "'mxfp8' has no options"),
        ({"quantizer": "absmax", "stochastik": True}, "did you mean stochastic"),
    ],
)
def test_bad_words_name_the_nearest_ones(spec: Any, message: str):
    with pytest.raises(UserError, match=message):
        train_rules(spec, "absmax")
