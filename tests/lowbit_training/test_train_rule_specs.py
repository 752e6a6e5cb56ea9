"""Rules of low-bit training from the words of configs."""

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fp4dit.lowbit_training.linear import TrainRule
from fp4dit.lowbit_training.matmul import MatmulRecipe
from fp4dit.lowbit_training.operand_quant import absmax_quantizer, mxfp8_quantizer, quest_quantizer
from fp4dit.lowbit_training.specs import train_rules
from fp4dit.utils.errors import UserError
from tests.conftest import Compose


def test_words_stand_for_operand_quantizers():
    recipe = MatmulRecipe(quest_quantizer(), absmax_quantizer())
    assert train_rules("quest", "absmax") == [TrainRule("transformer_blocks.*", recipe)]
    stochastic = {"quantizer": "absmax", "stochastic": True}
    recipe = MatmulRecipe(mxfp8_quantizer(), absmax_quantizer(stochastic=True))
    assert train_rules("mxfp8", stochastic, match="*") == [TrainRule("*", recipe)]
    assert train_rules(absmax_quantizer(), None)[0].recipe == MatmulRecipe(absmax_quantizer(), None)


def test_the_preset_of_quartet_is_its_released_forward_pass(composed: Compose):
    """In its kernel s = 2^floor(log2(2.92 std / 6 + 1e-8)), and the mask is |x / s| < 6."""
    options = OmegaConf.to_container(composed("lowbit_linear=quartet").lowbit_linear)
    [rule] = instantiate(options)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    blocks = x.view(-1, 32)
    deviation = blocks.std(1, correction=0, keepdim=True)
    scale = (2.92247856 / 6 * deviation + 1e-8).log2().floor().exp2()
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    index = ((blocks / scale).abs()[..., None] - levels).abs().argmin(-1)
    operand = rule.recipe.forward(x)
    assert torch.equal(operand.values, (levels[index] * blocks.sign() * scale).view_as(x))
    assert torch.equal(operand.unclipped, ((blocks / scale).abs() < 6).view_as(x))
    assert 0 < (~operand.unclipped).sum() < 100
    assert rule.recipe.backward == absmax_quantizer(stochastic=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("qest", "operand quantizer 'qest' is not known; did you mean quest"),
        ({"quantizer": "mxfp8", "stochastic": True}, "'mxfp8' has no options"),
        ({"quantizer": "absmax", "stochastik": True}, "did you mean stochastic"),
        ({"quantizer": "quest", "exponent": "belw"}, "did you mean below"),
    ],
)
def test_bad_words_name_the_nearest_ones(spec: Any, message: str):
    with pytest.raises(UserError, match=message):
        train_rules(spec, "absmax")
