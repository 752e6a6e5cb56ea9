"""Read a transformer in the format of another library as a packed model."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import ModelMixin
from torch import nn

from fp4dit.packed.encoding.layout import Layout, PackedBuffers
from fp4dit.packed.integrations.diffusers import attach_diffusers_config_
from fp4dit.packed.model import describe_model, find_submodule, install_input_quantizers_
from fp4dit.packed.nn.linear import PackedLinear, make_empty_layer
from fp4dit.packed.targets.base import StoredModel, Target
from fp4dit.quantization.rules import Rule
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.transforms.base import Transform
from fp4dit.utils.errors import UserError

# What a damaged file leads to. Each becomes a UserError that names the layer.
DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_model(folder: Path, skeleton: nn.Module, target: Target) -> StoredModel:
    """Read a transformer in a target's format.

    Raises:
        UserError: if it cannot be represented, or is damaged.
    """
    try:
        return target.read(folder, skeleton)
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(
            f"{folder} is damaged, or not a {target.name} checkpoint: {type(error).__name__}, "
            f"{error}"
        ) from error


def restore_model_(skeleton: ModelMixin, stored: StoredModel, target: Target) -> None:
    """Load a stored transformer into a plain model without weights, in place.

    Its layers become packed layers, and `save_pretrained` saves it as a packed model.

    Raises:
        UserError: if a layer cannot be represented exactly. The message names it.
    """
    if not stored.layers:
        raise UserError(f"there is no quantized layer in it: it is not a {target.name} checkpoint")
    state, packed, rules = dict(stored.others), {}, {}
    for name, layer in stored.layers.items():
        try:
            layout, buffers = target.restore(layer)
            fitted = target.restore_transforms(layer)
            rules[name] = Rule("*", None, tuple(spec for spec, _ in fitted))
            packed[name] = make_filled_layer(
                find_layer(skeleton, name), layout, buffers, [transform for _, transform in fitted]
            )
        except KeyError as error:
            raise UserError(
                f"{name} lacks {error.args[0]}: copy all files of the checkpoint"
            ) from error
        except DAMAGE as error:
            raise UserError(f"{name}: {error}") from error
    for name, layer in packed.items():
        skeleton.set_submodule(name, layer)
        for key, value in layer.state_dict().items():
            if key != "bias":
                state[f"{name}.{key}"] = value
    try:
        skeleton.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"the checkpoint is not of {type(skeleton).__name__}: {error}") from error
    description = describe_model(packed, rules, stored.inputs)
    install_input_quantizers_(skeleton, description.inputs, TimestepContext())
    attach_diffusers_config_(skeleton, description)


def find_layer(skeleton: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    """Return the plain layer of this name.

    Raises:
        UserError: if there is none.
    """
    source = find_submodule(skeleton, name)
    if not isinstance(source, nn.Linear | nn.Conv2d):
        raise UserError(
            f"{name} is not a layer of {type(skeleton).__name__}: the checkpoint is of another "
            "model"
        )
    return source


def make_filled_layer(
    source: nn.Linear | nn.Conv2d,
    layout: Layout,
    buffers: PackedBuffers,
    transforms: Sequence[Transform] = (),
) -> PackedLinear:
    """Make a packed layer in place of `source`, whose weight is not read.

    Raises:
        UserError: if the buffers do not have the shapes of such a weight.
    """
    layer = make_empty_layer(source, layout, transforms, "cpu")
    for name, value in buffers.items():
        if value.shape != getattr(layer, name).shape:
            raise UserError(f"a weight of other shape than {list(source.weight.shape)}")
        getattr(layer, name).copy_(value)
    return layer
