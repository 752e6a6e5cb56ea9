"""Signal to noise of number formats: expected of a distribution, and measured on weights.

`distributions` has symmetric distributions of unit variance whose tails differ; `expected_noise`
integrates the squared error that a scale rule leaves on blocks of independent values of one;
`measured_noise` measures the same on samples and on weights, with the project's own quantizers.
"""

from fp4dit.analysis.distributions import Distribution, GeneralizedNormal, StudentT, Uniform
from fp4dit.analysis.expected_noise import expected_noise, fixed_scale_noise
from fp4dit.analysis.measured_noise import (
    Estimate,
    measure_kurtosis,
    measure_noise,
    measure_signal_to_noise,
    sample_noise,
    to_decibels,
)

__all__ = [
    "Distribution",
    "Estimate",
    "GeneralizedNormal",
    "StudentT",
    "Uniform",
    "expected_noise",
    "fixed_scale_noise",
    "measure_kurtosis",
    "measure_noise",
    "measure_signal_to_noise",
    "sample_noise",
    "to_decibels",
]
