"""From a quantized pipeline to one whose transformer is packed."""

from collections.abc import Mapping

from diffusers import ModelMixin
from torch import nn

from fp4dit.packed.description import described
from fp4dit.packed.hub import attach
from fp4dit.packed.layer import pack_
from fp4dit.policy import Rule


def pack_transformer_(dit: ModelMixin, weight: Mapping[str, Rule], activation: Mapping[str, Rule]) -> None:
    """Pack a transformer that these rules quantized, by layer and by activation, in place; it saves itself as that.

    Raises:
        UserError: if a weight cannot be packed.
    """
    attach(dit, described(pack_(dit), weight, activation))


def size(module: nn.Module) -> int:
    """Bytes of all that is saved of it."""
    return sum(value.nbytes for value in module.state_dict().values())
