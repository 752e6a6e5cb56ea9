"""Tools to test an adapter: a tiny config of the same architecture, and a check of the units."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fp4dit.models.base import Pipeline
from fp4dit.models.blocks import Unit, flatten_outputs
from fp4dit.utils.calls import Call, remove_hooks
from fp4dit.utils.errors import UserError

ADAPTER_HINT = "Write an adapter for this model: docs/guides/your-model.md shows one."

NUM_BLOCKS, NUM_HEADS, HEAD_DIM, LATENT_SIZE = 4, 2, 24, 8

# The width can be divided by 3, as the embeddings of PixArt's size conditions need.
WIDTH = NUM_HEADS * HEAD_DIM

# The largest value of a config entry, by the end of its name.
LIMITS = {
    "layers": NUM_BLOCKS,
    "heads": NUM_HEADS,
    "head_dim": HEAD_DIM,
    "sample_size": LATENT_SIZE,
    "max_size": LATENT_SIZE,
    "dim": WIDTH,
    "dim_t5": WIDTH,
    "channels": WIDTH,
    "hidden_size": WIDTH,
}


def make_tiny_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Shrink a transformer's config to a tiny model of the same architecture.

    The model has at most four blocks in each list, two heads of 24 values, a width of 48 and
    latents of 8 x 8. The names of the entries tell what they mean, as diffusers names them.

    Example:
        >>> make_tiny_config({"num_layers": 28, "num_attention_heads": 16, "_name_or_path": "a"})
        {'num_layers': 4, 'num_attention_heads': 2}
    """
    # Entries that begin with an underscore are notes of diffusers, such as the list of defaults
    # that nobody set.
    names = [name for name in config if not name.startswith("_")]
    return {name: shrink_value(name, config[name]) for name in names}


def shrink_value(name: str, value: Any) -> Any:
    """Return the value of a config entry in the tiny model."""
    if name == "axes_dims_rope":  # three parts of a head
        return (HEAD_DIM // 3,) * 3
    if name in ("in_channels", "out_channels"):
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for suffix, limit in LIMITS.items():
        if name.endswith(suffix):
            return min(value, limit)
    return value


class UnitVerifier:
    """Forward hooks that run each unit alone after it ran in the model, and compare the outputs.

    Args:
        pipeline: The pipeline whose adapter is verified.
        call: The call of the transformer that the hooks are used in.

    Example:
        >>> verifier = UnitVerifier(adapter, call)
        >>> with remove_hooks([verifier.register_hook(unit) for unit in adapter.units()]):
        ...     output = call(adapter.transformer)
    """

    def __init__(self, pipeline: Pipeline, call: Call) -> None:
        self.transformer = pipeline.transformer
        self.state = dict(pipeline.initial_state(call))
        self.is_running_alone = False

    def register_hook(self, unit: Unit) -> RemovableHandle:
        """Register the hook of a unit."""

        def hook(module: nn.Module, _args: tuple, output: Any) -> None:
            # The unit alone calls the same module, and with it this hook.
            if not self.is_running_alone:
                self.is_running_alone = True
                self.compare(unit, module, output)
                self.is_running_alone = False

        return self.transformer.get_submodule(unit.module).register_forward_hook(hook)

    def compare(self, unit: Unit, module: nn.Module, output: Any) -> None:
        """Run a unit alone, compare its output with that in the model, and add it to the state.

        Raises:
            UserError: if the outputs differ in a bit.
        """
        inputs = {name: self.state[name] for name in unit.inputs if name in self.state}
        outputs = flatten_outputs(unit.make_call(inputs)(module))
        if not all(map(torch.equal, outputs, flatten_outputs(output))):
            raise UserError(
                f"{unit.module} of {type(self.transformer).__name__}, called alone, gives another "
                f"output than in the model. {ADAPTER_HINT}"
            )
        self.state.update(zip(unit.outputs, outputs, strict=True))


@torch.no_grad()
def verify_adapter(pipeline: Pipeline, call: Call) -> None:
    """Verify that the units of an adapter, one after another, compute the same as the model.

    Args:
        pipeline: The pipeline whose adapter is verified.
        call: A call of the transformer. It runs once, with every unit a second time.

    Raises:
        UserError: if the output of a unit is not bit-exact, with the name of the first such unit.

    Example:
        >>> verify_adapter(adapter, Call((latent,), {"timestep": timestep}))
    """
    verifier = UnitVerifier(pipeline, call)
    with remove_hooks([verifier.register_hook(unit) for unit in pipeline.units()]):
        call(pipeline.transformer)
