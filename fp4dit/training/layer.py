"""A linear layer that is trained in few bits, and how it takes the place of plain ones."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from fp4dit.policy import assign
from fp4dit.tensors import save_tensors
from fp4dit.training.draws import Draws
from fp4dit.training.product import LowBitProduct, Recipe


class Fp4TrainLinear(nn.Linear):
    """`nn.Linear` whose products are made by a `recipe`. Weight and bias are kept, and learn, in their own precision.

    Sizes need be no multiples of a block: operands are filled up with zeros. Under autocast the output has autocast's
    type. The bias is not quantized. Its state dict is that of `nn.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        recipe: Recipe = Recipe(),
        seed: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe, self.draws = recipe, Draws(seed)

    @torch.compiler.disable  # a traced backward pass would draw the same numbers for ever
    def forward(self, input: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        if not input.numel():
            return super().forward(input)
        kind, dtype = input.device.type, torch.promote_types(input.dtype, self.weight.dtype)
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        tokens = input.reshape(input.shape[:-1].numel(), self.in_features)
        y: Tensor = LowBitProduct.apply(tokens, self.weight, self.recipe, self.draws, dtype)  # pyright: ignore[reportAssignmentType]
        y = y if self.bias is None else y + self.bias.to(dtype)
        return y.view(*input.shape[:-1], self.out_features)


def train_in_few_bits(layer: nn.Linear, recipe: Recipe, seed: int = 0) -> Fp4TrainLinear:
    """A layer with the very parameters of this one."""
    made = Fp4TrainLinear(layer.in_features, layer.out_features, False, recipe, seed, "meta")
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)


@dataclass(frozen=True)
class TrainRule:
    """Linear layers with names like `match` (shell wildcards) train by `recipe`; None leaves them as they are.

    A rule that is `optional` may match nothing.
    """

    match: str
    recipe: Recipe | None = field(default_factory=Recipe)
    optional: bool = False


def train_in_few_bits_(model: nn.Module, rules: Sequence[TrainRule], seed: int = 0) -> dict[str, Fp4TrainLinear]:
    """Replace the linear layers that the rules name, in place; the first match wins. Parameters stay the same objects,
    so that an optimizer which has them goes on.

    Raises:
        UserError: if a rule gets no layer.
    """
    # Only plain ones: what calls itself a linear layer and is more, as those of nn.MultiheadAttention, may read the
    # weight without calling the layer.
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    made = {}
    for name, rule in assign(found, rules).items():
        if rule.recipe is not None:
            made[name] = train_in_few_bits(found[name], rule.recipe, crc32(name.encode(), seed))
            model.set_submodule(name, made[name])
    return made


def save_weights(model: nn.Module, path: Path) -> None:
    """As `load_trained_` reads them."""
    save_tensors(model.state_dict(), path)


def load_trained_(model: nn.Module, path: Path, rules: Sequence[TrainRule]) -> None:
    """What a training by these rules left: its weights, and layers that compute with them as they did there."""
    model.load_state_dict(load_file(path))
    train_in_few_bits_(model, rules)


def resume_(model: nn.Module, passes: int) -> None:
    """Let the layers draw as after so many backward passes, which is where a training that was killed goes on."""
    for module in model.modules():
        if isinstance(module, Fp4TrainLinear):
            module.draws.passes = passes
