"""Symmetric distributions of unit variance whose tails differ, for models of weights.

SciPy is imported where it is used, because its import is slow and the core works without it.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

Values = Float[np.ndarray, "*n"]


class Distribution(ABC):
    """Base of distributions that are symmetric about 0 and have unit variance.

    Example:
        >>> StudentT(6.0).kurtosis
        3.0
    """

    @property
    @abstractmethod
    def kurtosis(self) -> float:
        """Excess kurtosis: 0 for a normal distribution, inf where it does not exist."""

    @abstractmethod
    def half_moment(self, order: int, x: Values) -> Values:
        """Return the integral of t^order times the density over 0 < t < x.

        Args:
            order: 0, 1 or 2.
            x: Upper ends of the integrals, not negative.
        """

    @abstractmethod
    def magnitude_quantile(self, above: Values) -> Values:
        """Return the magnitudes that values exceed with the given probabilities.

        Probabilities of being below would lose the digits of the tail.
        """

    @abstractmethod
    def sample(self, shape: tuple[int, ...], rng: np.random.Generator) -> Float[np.ndarray, "..."]:
        """Draw independent values."""

    def moment(self, order: int, x: Values) -> Values:
        """Return the integral of t^order times the density over 0 < t < x, for x of any sign."""
        value = self.half_moment(order, np.abs(x))
        return value if order % 2 else np.sign(x) * value

    def quantile(self, below: Values, above: Values) -> Values:
        """Return the values whose probabilities of being below and above are given."""
        tail = self.magnitude_quantile(np.minimum(1.0, 2 * np.minimum(below, above)))
        return np.where(below < above, -tail, tail)


@dataclass(frozen=True)
class GeneralizedNormal(Distribution):
    """The density is proportional to exp(-|x / a|^shape), with the `a` of unit variance.

    A shape of 2 is a normal distribution and a shape of 1 is Laplace's. Smaller shapes have heavier
    tails, though all moments exist. (Subbotin 1923)

    Attributes:
        shape: The exponent of the density.

    Example:
        >>> round(GeneralizedNormal(1.0).kurtosis, 6)
        3.0
    """

    shape: float

    @property
    def width(self) -> float:
        """The `a` of the density."""
        return math.exp((math.lgamma(1 / self.shape) - math.lgamma(3 / self.shape)) / 2)

    @property
    def kurtosis(self) -> float:
        first, third, fifth = (math.lgamma(k / self.shape) for k in (1, 3, 5))
        return math.exp(fifth + first - 2 * third) - 3

    def half_moment(self, order: int, x: Values) -> Values:
        from scipy.special import gammainc

        k = (order + 1) / self.shape
        whole = 0.5 * self.width**order * math.exp(math.lgamma(k) - math.lgamma(1 / self.shape))
        return whole * gammainc(k, (x / self.width) ** self.shape)

    def magnitude_quantile(self, above: Values) -> Values:
        from scipy.special import gammainccinv

        return self.width * gammainccinv(1 / self.shape, above) ** (1 / self.shape)

    def sample(self, shape: tuple[int, ...], rng: np.random.Generator) -> Float[np.ndarray, "..."]:
        magnitude = rng.gamma(1 / self.shape, size=shape) ** (1 / self.shape)
        return self.width * magnitude * rng.choice((-1.0, 1.0), size=shape)


@dataclass(frozen=True)
class StudentT(Distribution):
    """Student's t distribution, scaled to unit variance.

    Attributes:
        df: Degrees of freedom, more than 2. The fewer, the heavier the tails; up to 4, the kurtosis
            is infinite.

    Raises:
        ValueError: if there are no more than 2 degrees of freedom, because the variance is then
            infinite.

    Example:
        >>> StudentT(5.0).kurtosis
        6.0
    """

    df: float

    def __post_init__(self) -> None:
        if not self.df > 2:
            raise ValueError(
                f"Student's t with {self.df} degrees of freedom has no finite variance: give more "
                "than 2 degrees"
            )

    @property
    def width(self) -> float:
        """The factor that makes the variance 1."""
        return math.sqrt((self.df - 2) / self.df)

    @property
    def kurtosis(self) -> float:
        return 6 / (self.df - 4) if self.df > 4 else math.inf

    def half_moment(self, order: int, x: Values) -> Values:
        from scipy.special import betainc, betaln

        t = np.asarray(x / self.width)
        a, b = (order + 1) / 2, (self.df - order) / 2
        scale = (self.width * math.sqrt(self.df)) ** order
        whole = 0.5 * scale * np.exp(betaln(a, b) - betaln(0.5, self.df / 2))
        return whole * betainc(a, b, t**2 / (self.df + t**2))

    def magnitude_quantile(self, above: Values) -> Values:
        from scipy.special import betaincinv

        # The share v = df / (df + t^2) keeps the digits of the tail, where t^2 / (df + t^2) is 1.
        v = betaincinv(self.df / 2, 0.5, above)
        return self.width * np.sqrt(self.df * (1 - v) / v)

    def sample(self, shape: tuple[int, ...], rng: np.random.Generator) -> Float[np.ndarray, "..."]:
        return self.width * rng.standard_t(self.df, size=shape)


@dataclass(frozen=True)
class Uniform(Distribution):
    """The uniform distribution from -sqrt(3) to sqrt(3).

    Example:
        >>> Uniform().kurtosis
        -1.2
    """

    @property
    def kurtosis(self) -> float:
        return -1.2

    def half_moment(self, order: int, x: Values) -> Values:
        reach = math.sqrt(3)
        return np.minimum(x, reach) ** (order + 1) / (order + 1) / (2 * reach)

    def magnitude_quantile(self, above: Values) -> Values:
        return math.sqrt(3) * (1 - above)

    def sample(self, shape: tuple[int, ...], rng: np.random.Generator) -> Float[np.ndarray, "..."]:
        return rng.uniform(-math.sqrt(3), math.sqrt(3), size=shape)
