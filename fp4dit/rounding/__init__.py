"""Rounding methods: how the weights of a layer or block are rounded to their format.

The methods are round-to-nearest (`rtn`), AdaRound and its scale-aware form (`adaround`), SignRound
(`signround`), GPTQ (`gptq`), scales weighted by an importance matrix (`imatrix`), and the search of
LLM-FP4 (`output_search`). `learned` learns all roundings of a unit together, and `layerwise`
applies another method to one layer after another. `input_steps` has the learning of static inputs'
steps, and `staged` does it after the weights. The files of `conf/rounding` configure these
methods. `reconstruction` applies a method to all units of a model, and `finetune` trains all
weights of a model together.

To add a method: write a module like `rtn.py` with a subclass of `RoundingMethod`, and a file in
`conf/rounding` that names it; give it a tag in `fp4dit/registry.py`.
"""

from fp4dit.rounding.adaround import adaround_scale_aware, adaround_scale_aware_normalized
from fp4dit.rounding.base import RoundingMethod
from fp4dit.rounding.finetune import Finetuning, LatentWeight, WholeModel
from fp4dit.rounding.gptq import GPTQ
from fp4dit.rounding.gptq_columns import activation_order
from fp4dit.rounding.imatrix import ImportanceMatrix
from fp4dit.rounding.input_steps import FixedWeight, InputSteps
from fp4dit.rounding.layerwise import LayerwiseReconstruction
from fp4dit.rounding.learned import LearnedRounding, fused_adam
from fp4dit.rounding.learned_range import (
    round_scale_to_format,
    round_scale_to_power_of_two,
    round_scale_to_tensor_units,
)
from fp4dit.rounding.objectives import RelativeMSE
from fp4dit.rounding.output_search import BiasMultiples, LinearGrid, OutputSearch
from fp4dit.rounding.reconstruction import Reconstruction
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.rounding.signround import (
    SignRound,
    SignSGD,
    linear_decay,
    shift_in_ulp,
)
from fp4dit.rounding.staged import StagedReconstruction
from fp4dit.rounding.timestep_weights import TimestepWeights

__all__ = [
    "GPTQ",
    "BiasMultiples",
    "Finetuning",
    "FixedWeight",
    "ImportanceMatrix",
    "InputSteps",
    "LatentWeight",
    "LayerwiseReconstruction",
    "LearnedRounding",
    "LinearGrid",
    "OutputSearch",
    "Reconstruction",
    "RelativeMSE",
    "RoundToNearest",
    "RoundingMethod",
    "SignRound",
    "SignSGD",
    "StagedReconstruction",
    "TimestepWeights",
    "WholeModel",
    "activation_order",
    "adaround_scale_aware",
    "adaround_scale_aware_normalized",
    "fused_adam",
    "linear_decay",
    "round_scale_to_format",
    "round_scale_to_power_of_two",
    "round_scale_to_tensor_units",
    "shift_in_ulp",
]
