"""What a test of an adapter needs: the same architecture with small numbers, and whether its units are the model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fp4dit.calls import Call, removed
from fp4dit.errors import UserError
from fp4dit.models.base import Pipeline
from fp4dit.stream import Unit, answers

HELP = "Write an adapter for this model: docs/your_model.md shows one."
BLOCKS, HEADS, HEAD, SIDE = 4, 2, 24, 8
WIDTH = HEADS * HEAD  # which the three embeddings of PixArt's size conditions can share


def make_tiny(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformer's config with four blocks in each list, two heads of 24 values, latents of 8 x 8, and nothing wider
    than 48. What a number is for is read from its name, as diffusers gives them."""
    # Names that begin so are diffusers' own notes, such as which values are defaults and need not be read.
    return {name: small(name, value) for name, value in config.items() if not name.startswith("_")}


def small(name: str, value: Any) -> Any:
    if name == "axes_dims_rope":  # parts of a head
        return (HEAD // 3,) * 3
    if isinstance(value, bool) or not isinstance(value, int) or name in ("in_channels", "out_channels"):
        return value
    limits = {"layers": BLOCKS, "heads": HEADS, "head_dim": HEAD, "sample_size": SIDE, "max_size": SIDE}
    limits |= dict.fromkeys(("dim", "dim_t5", "channels", "hidden_size"), WIDTH)
    return next((min(value, limit) for end, limit in limits.items() if name.endswith(end)), value)


@torch.no_grad()
def verify(pipeline: Pipeline, call: Call) -> None:
    """Runs a call of the transformer, and makes that of each unit from what the units before it answered.

    Raises:
        UserError: that names the first unit which does not answer to the bit as it does in the model.
    """
    state, busy = {**pipeline.begin(call)}, False

    def after(unit: Unit, module: nn.Module, output: Any) -> None:
        nonlocal busy
        if busy:
            return
        busy = True  # for this runs the module again
        mine = answers(unit.call({name: state[name] for name in unit.reads if name in state})(module))
        if not all(map(torch.equal, mine, answers(output))):
            dit = type(pipeline.dit).__name__
            raise UserError(f"{unit.module} of {dit}, called alone, answers otherwise than in the model. {HELP}")
        state.update(zip(unit.answer, mine, strict=True))
        busy = False

    units = pipeline.units()
    hook = lambda unit: lambda module, _args, output: after(unit, module, output)
    with removed([pipeline.dit.get_submodule(unit.module).register_forward_hook(hook(unit)) for unit in units]):
        call(pipeline.dit)
