"""Linear layers that train with low-bit products, and their installation in a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from fp4dit.lowbit_training.matmul import LowBitMatmul, MatmulRecipe
from fp4dit.lowbit_training.rng import BackwardRng
from fp4dit.quantization.rules import assign_rules
from fp4dit.utils.safetensors_io import save_tensors


class LowBitLinear(nn.Linear):
    """`nn.Linear` whose products are quantized by a recipe.

    Weight and bias are stored, and learn, in their own precision. The bias is not quantized.
    Operands are padded with zeros to multiples of a block. Under autocast the output has autocast's
    dtype. The state dict is that of `nn.Linear`.

    Args:
        in_features: Number of input channels.
        out_features: Number of output channels.
        bias: Add a bias.
        recipe: Quantizers of the operands.
        seed: Seed of the random numbers of the backward passes.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Example:
        >>> layer = LowBitLinear(64, 32, recipe=MatmulRecipe(quest_quantizer()))
        >>> layer(torch.randn(8, 64)).sum().backward()
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        recipe: MatmulRecipe = MatmulRecipe(),
        seed: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe, self.backward_rng = recipe, BackwardRng(seed)

    # A traced backward pass would draw the same random numbers each time.
    @torch.compiler.disable
    def forward(self, input: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        if not input.numel():
            return super().forward(input)
        device, dtype = input.device.type, torch.promote_types(input.dtype, self.weight.dtype)
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        tokens = input.reshape(input.shape[:-1].numel(), self.in_features)
        y: Tensor = LowBitMatmul.apply(  # pyright: ignore[reportAssignmentType]
            tokens, self.weight, self.recipe, self.backward_rng, dtype
        )
        y = y if self.bias is None else y + self.bias.to(dtype)
        return y.view(*input.shape[:-1], self.out_features)


def make_low_bit(layer: nn.Linear, recipe: MatmulRecipe, seed: int = 0) -> LowBitLinear:
    """Return a low-bit layer that shares the parameters of `layer`."""
    low_bit = LowBitLinear(layer.in_features, layer.out_features, False, recipe, seed, "meta")
    low_bit.weight, low_bit.bias = layer.weight, layer.bias
    return low_bit.train(layer.training)


@dataclass(frozen=True)
class TrainRule:
    """Rule that says how the linear layers of matching names train.

    Args:
        match: Pattern of names with shell wildcards.
        recipe: Quantizers of the operands; None leaves the layers in full precision.
        optional: Permit that no layer matches.

    Example:
        >>> rules = [TrainRule("*.attn.*", None), TrainRule("*", MatmulRecipe())]
        >>> layers = replace_linear_layers_(model, rules)
    """

    match: str
    recipe: MatmulRecipe | None = field(default_factory=MatmulRecipe)
    optional: bool = False


def replace_linear_layers_(
    model: nn.Module, rules: Sequence[TrainRule], seed: int = 0
) -> dict[str, LowBitLinear]:
    """Replace the linear layers that the rules name, in place; the first match wins.

    The parameters stay the same objects, so an existing optimizer continues to train them.

    Returns:
        The new layers by name.

    Raises:
        UserError: If no layer matches a rule.
    """
    # Subclasses of nn.Linear, such as those in nn.MultiheadAttention, are left alone: their weight
    # may be read without a call of the layer.
    linear_layers = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            linear_layers[name] = module
    low_bit_layers = {}
    for name, rule in assign_rules(linear_layers, rules).items():
        if rule.recipe is not None:
            layer_seed = crc32(name.encode(), seed)
            low_bit = make_low_bit(linear_layers[name], rule.recipe, layer_seed)
            low_bit_layers[name] = low_bit
            model.set_submodule(name, low_bit)
    return low_bit_layers


def save_trained_weights(model: nn.Module, path: Path) -> None:
    """Save the weights of a trained model for `load_trained_`."""
    save_tensors(model.state_dict(), path)


def load_trained_(model: nn.Module, path: Path, rules: Sequence[TrainRule]) -> None:
    """Load trained weights, and replace the layers by rules as in the training, in place."""
    model.load_state_dict(load_file(path))
    replace_linear_layers_(model, rules)


def resume_rng_(model: nn.Module, passes: int) -> None:
    """Set the number of backward passes of all low-bit layers, to resume a training."""
    for module in model.modules():
        if isinstance(module, LowBitLinear):
            module.backward_rng.num_passes = passes
