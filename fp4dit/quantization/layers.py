"""Quantized linear and convolution layers, simulated in full precision."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fp4dit.numerics.quantizer import Quantizer
from fp4dit.numerics.rounding import RoundingFunction, round_to_nearest
from fp4dit.quantization.convolution import ConvolutionMixin
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.learnable_rounding import LearnableRounding, RoundingFactory
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.transforms.base import Transform, TransformSpec


class QuantLinearBase(nn.Module):
    """Base of quantized linear layers: the path of the input up to the matrix product.

    The input goes through `transforms`, then through `input_fake_quant`. Subclasses add the weight.

    Attributes:
        transforms: Transforms of the input, in order.
        input_fake_quant: `FakeQuantize` of the input, or the identity.

    Example:
        >>> layer = QuantLayer(nn.Linear(64, 32), quantizer, [LowRank(rank=4)])
        >>> transformed, bypass = layer.apply_transforms(torch.randn(8, 64))
    """

    transforms: nn.ModuleList
    input_fake_quant: nn.Module

    @property
    def transform_chain(self) -> list[Transform]:
        """The transforms as a list with a type for its elements."""
        return list(self.transforms)  # pyright: ignore[reportReturnType]

    def share_context(self, context: TimestepContext) -> None:
        """Give the context of the model to the transforms that read the timestep."""
        for transform in self.transform_chain:
            if transform.needs_timestep:
                transform.context = context  # pyright: ignore[reportArgumentType]

    @property
    def reduction_size(self) -> int:
        """Number of values that one output sums over: the size of a row of the weight matrix."""
        raise NotImplementedError

    def apply_transforms(
        self, x: Float[Tensor, "*b k"]
    ) -> tuple[Float[Tensor, "*b k"], Float[Tensor, "*b o"] | None]:
        """Return the transformed input, and the sum of the transforms' bypasses.

        The sum is None if no transform has a bypass. It is added to the output of the layer in high
        precision.
        """
        bypass = None
        for transform in self.transform_chain:
            branch = transform.compute_bypass(x)
            if branch is not None:
                bypass = branch if bypass is None else bypass + branch
            x = transform.transform_input(x)
        return x, bypass


class QuantLayer(QuantLinearBase):
    """Quantized linear layer that wraps the original one.

    Lifecycle:

    1. `prepare` fits the transforms, writes the transformed weight, and calibrates its qparams.
    2. `start_learning` (optional) attaches a learnable rounding. `forward` then uses the hard
       weight, or, between `use_soft_weight` and setting `soft_weight` to None, the soft one.
    3. `commit_weight` writes the hard weight: the learned one, or the rounded one if no rounding is
       learned.

    The weight matrix has a row for each output channel, and groups are parts of a row. The rows of
    a convolution are its flattened kernels. Transforms and qparams apply to the weight matrix.

    Args:
        source: Original layer. Its weight is overwritten.
        quantizer: Quantizer of the weight.
        transforms: Specs of the transforms, in order.

    Example:
        >>> layer = QuantLayer(nn.Linear(64, 32), Quantizer(floating(2, 1), PerChannel()))
        >>> layer.prepare()
        >>> layer.commit_weight()
        >>> y = layer(torch.randn(8, 64))
    """

    def __init__(
        self,
        source: nn.Linear | nn.Conv2d,
        quantizer: Quantizer,
        transforms: Sequence[TransformSpec] = (),
    ) -> None:
        super().__init__()
        self.source = source.requires_grad_(False)
        self.transforms = nn.ModuleList(spec(*self.weight_matrix.shape) for spec in transforms)
        self.weight_fake_quant = FakeQuantize(quantizer)
        self.input_fake_quant: nn.Module = nn.Identity()
        self.learnable_rounding: LearnableRounding | None = None
        self.soft_weight: Tensor | None = None  # weight of the current training step

    @property
    def weight(self) -> Tensor:
        return self.source.weight

    @property
    def bias(self) -> Tensor | None:
        return self.source.bias

    @property
    def weight_matrix(self) -> Float[Tensor, "o k"]:
        """Weight with one row per output channel."""
        return self.source.weight.flatten(1)

    @property
    def reduction_size(self) -> int:
        return self.weight_matrix.shape[1]

    @property
    def needs_calibration_inputs(self) -> bool:
        """True if `prepare` needs a sample of inputs."""
        is_fitted = any(transform.needs_inputs for transform in self.transform_chain)
        return is_fitted or self.static_input_fake_quant is not None

    @property
    def static_input_fake_quant(self) -> FakeQuantize | None:
        """The input's `FakeQuantize` if it is static, else None."""
        module = self.input_fake_quant
        return module if isinstance(module, FakeQuantize) and module.static else None

    def fake_quantize_input(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return `x` fake-quantized.

        A static quantizer takes its qparams from `x` itself, because it is calibrated only after
        the transforms are fitted.
        """
        if self.static_input_fake_quant is None:
            return self.input_fake_quant(x)
        return self.static_input_fake_quant.quantizer.resolve_format(x)(x)

    @torch.no_grad()
    def prepare(self, x: Float[Tensor, "n ..."] | None = None) -> "QuantLayer":
        """Fit the transforms, and calibrate the weight and a static input.

        Args:
            x: Sample of inputs, with one calibration call per row; None if
                `needs_calibration_inputs` is False.
        """
        x = None if x is None else self.to_tokens(x)
        for transform in self.transform_chain:
            weight = self.weight_matrix.float()
            if transform.needs_inputs or transform.needs_weight:
                quantizer = self.weight_fake_quant.quantizer.resolve_format(weight)
                transform.fit_weight(weight, quantizer)
                if transform.needs_inputs:
                    assert x is not None, f"{type(transform).__name__} is fitted to inputs"
                    transform.fit(weight, x.float(), quantizer, self.fake_quantize_input)
            self.write_weight(transform.transform_weight(weight))
            x = None if x is None else transform.transform_input(x)
        self.weight_fake_quant.calibrate(self.weight_matrix)
        if x is not None and self.static_input_fake_quant is not None:
            self.static_input_fake_quant.calibrate(x)
        return self

    def transform_weight(self, weight: Float[Tensor, "o k"]) -> Float[Tensor, "o k"]:
        """Apply the fitted transforms to an original weight."""
        weight = weight.float()
        for transform in self.transform_chain:
            weight = transform.transform_weight(weight)
        return weight

    def to_tokens(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n t k"]:
        """Return the input as tokens: vectors of the `reduction_size` values of one output."""
        return x.reshape(len(x), -1, x.shape[-1])

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        x, bypass = self.prepare_input(x)
        return self.multiply(x) if bypass is None else self.multiply(x) + bypass

    def prepare_input(
        self, x: Float[Tensor, "*b k"]
    ) -> tuple[Float[Tensor, "*b k"], Float[Tensor, "*b o"] | None]:
        """Return the input of the product, transformed and fake-quantized, and the bypass."""
        x, bypass = self.apply_transforms(x)
        return self.input_fake_quant(x), bypass

    def multiply(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        """Return the product of a prepared input and the current weight."""
        return F.linear(x, self.current_weight(), self.bias)

    def current_weight(self) -> Float[Tensor, "o k"]:
        """Return the weight that `forward` uses, in the dtype of the product."""
        if self.learnable_rounding is None:
            return self.weight_matrix
        weight = (
            self.learnable_rounding.hard_weight() if self.soft_weight is None else self.soft_weight
        )
        return weight.view_as(self.weight_matrix).to(self.multiply_dtype)

    @property
    def multiply_dtype(self) -> torch.dtype:
        """Dtype of the product: that of autocast if it is enabled, else that of the weight."""
        device = self.weight.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.weight.dtype

    def use_soft_weight(self, beta: float | None) -> Float[Tensor, ""] | float:
        """Use the soft weight of this training step until `soft_weight` is set to None.

        Args:
            beta: Exponent of the rounding loss, or None for no such loss.

        Returns:
            The rounding loss of the layer.
        """
        assert self.learnable_rounding is not None, "call start_learning first"
        self.soft_weight, rounding_loss = self.learnable_rounding.soft_weight(
            beta, self.multiply_dtype
        )
        return rounding_loss

    def start_learning(self, factory: RoundingFactory) -> LearnableRounding:
        """Attach a learnable rounding, made by `factory`, and return it."""
        fake_quant = self.weight_fake_quant
        blocks = fake_quant.quantizer.granularity.split(self.weight_matrix).float()
        assert fake_quant.qparams is not None, "prepare the layer first"
        self.learnable_rounding = factory(blocks, fake_quant.format, fake_quant.qparams)
        return self.learnable_rounding

    @torch.no_grad()
    def write_weight(self, weight: Float[Tensor, "..."]) -> None:
        """Overwrite the weight of the source."""
        self.source.weight.copy_(weight.view_as(self.source.weight))

    @torch.no_grad()
    def commit_weight(self, rounding: RoundingFunction = round_to_nearest) -> None:
        """Write the hard weight, learned or rounded. A second call changes nothing.

        Args:
            rounding: Rounding of a weight without a learnable rounding.
        """
        if self.learnable_rounding is None:
            hard = self.weight_fake_quant(self.weight_matrix, rounding)
        else:
            hard = self.learnable_rounding.hard_weight()
            if self.learnable_rounding.learned_qparams is not None:
                self.weight_fake_quant.set_qparams(self.learnable_rounding.learned_qparams)
        self.write_weight(hard)
        self.learnable_rounding = None


class QuantConv(ConvolutionMixin, QuantLayer):
    """Quantized 2-d convolution, computed as a matrix product. See `QuantLayer`.

    Example:
        >>> quantizer = Quantizer(floating(2, 1), PerChannel())
        >>> layer = QuantConv(nn.Conv2d(4, 32, 2, stride=2), quantizer)
        >>> layer.prepare().commit_weight()
        >>> layer(torch.randn(8, 4, 16, 16)).shape
        torch.Size([8, 32, 8, 8])
    """

    source: nn.Conv2d

    @property
    def geometry(self) -> nn.Conv2d:
        return self.source


def make_quant_layer(
    source: nn.Module, quantizer: Quantizer, transforms: Sequence[TransformSpec] = ()
) -> QuantLayer:
    """Return a quantized layer that wraps `source`.

    Raises:
        ValueError: If there is no quantized layer for `source`. See `check_quantizable`.
    """
    check_quantizable(source)
    layer_class = QuantConv if isinstance(source, nn.Conv2d) else QuantLayer
    return layer_class(source, quantizer, transforms)  # pyright: ignore[reportArgumentType]


def check_quantizable(source: nn.Module) -> None:
    """Raise an error if there is no quantized layer for `source`.

    Raises:
        ValueError: For a convolution with groups, or with a padding that is not explicit zeros.
    """
    if isinstance(source, nn.Conv2d) and (
        source.groups != 1 or source.padding_mode != "zeros" or isinstance(source.padding, str)
    ):
        raise ValueError(
            "a convolution can be quantized only without groups and with explicit zero padding: "
            "+weight.ignore=[...] leaves others as they are"
        )
