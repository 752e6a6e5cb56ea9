"""Low-bit training: linear layers with quantized forward and backward products, as in Quartet.

`linear` replaces layers by rules, `matmul` computes the three products, `operand_quant` quantizes
their operands, and `triton_ops` and `scaled_mm` do this on GPUs. `specs` parses the rules of
configs. It is based on `numerics`, `transforms` and `quantization.rules`.
"""

from fp4dit.lowbit_training.linear import TrainRule
from fp4dit.lowbit_training.matmul import MatmulRecipe
from fp4dit.lowbit_training.operand_quant import absmax_quantizer, mxfp8_quantizer, quest_quantizer
from fp4dit.lowbit_training.specs import train_rules

__all__ = [
    "MatmulRecipe",
    "TrainRule",
    "absmax_quantizer",
    "mxfp8_quantizer",
    "quest_quantizer",
    "train_rules",
]
