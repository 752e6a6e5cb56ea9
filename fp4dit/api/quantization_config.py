"""A quantization config for `from_pretrained` of diffusers and of transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import ModelMixin
from diffusers.quantizers import auto
from diffusers.quantizers.quantization_config import (
    QuantizationConfigMixin as DiffusersConfigMixin,
)
from torch import nn
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import (
    QuantizationConfigMixin as TransformersConfigMixin,
)

from fp4dit.api.families import find_model_option
from fp4dit.api.presets import Preset, compose_preset
from fp4dit.api.quantize import check_quantizes
from fp4dit.packed.integrations.config import OnLoadConfigMixin, QuantMethod
from fp4dit.packed.quantize import (
    AssignedRules,
    assign_text_encoder_rules,
    assign_transformer_rules,
)
from fp4dit.utils.errors import UserError


class QuantizationConfig(OnLoadConfigMixin, DiffusersConfigMixin, TransformersConfigMixin):
    """Quantize a model to a preset while it is loaded, without data.

    It works for transformers of diffusers and for text encoders of transformers, alone or inside
    diffusers' `PipelineQuantizationConfig`. The model is loaded in its dtype first, and then packed
    layer by layer, on the device it is loaded to: `device_map="cuda"` makes this a GPU.
    `save_pretrained` saves a packed model, which needs no config to be loaded.

    The weights and activations of a transformer are quantized as by `fp4dit.quantize`, to the bit.
    The weights of text encoders are rounded to nearest, by the option `text_encoder`.

    Args:
        method: Name of a preset (see `fp4dit.methods`), or the path of a YAML file with one.
        overrides: Overrides of the preset, as on the command line:
            `["weight.granularity.size=64", "text_encoder=nvfp4"]`.

    Raises:
        UserError: if there is no such preset, if an override is not valid, or if the preset needs
            data. `fp4dit.quantize` is for such presets.

    Example:
        >>> config = fp4dit.QuantizationConfig("nvfp4_4over6")
        >>> transformer = AutoModel.from_pretrained("my/transformer", quantization_config=config)
        >>> mapping = {"transformer": config, "text_encoder": config}
        >>> pipe = DiffusionPipeline.from_pretrained(
        ...     "my/model", quantization_config=PipelineQuantizationConfig(quant_mapping=mapping)
        ... )
    """

    def __init__(self, method: str, overrides: Sequence[str] = ()) -> None:
        check_data_free(compose_preset(method, overrides))
        self.quant_method = QuantMethod.ON_LOAD  # pyright: ignore[reportAttributeAccessIssue]
        self.method, self.overrides = method, tuple(overrides)

    def assign_rules(self, model: nn.Module) -> AssignedRules:
        """Return the rules that quantize a model. The quantizers of both libraries call this.

        Args:
            model: A transformer of diffusers, or a text encoder of transformers, without weights.

        Raises:
            UserError: if the preset does not fit the model.
        """
        preset = compose_preset(
            self.method, self.overrides, find_model_option(type(model).__name__)
        )
        check_data_free(preset)
        if isinstance(model, ModelMixin):
            rounding = preset.rounding.elementwise_rounding
            assert rounding is not None, "the preset needs no data"
            preset = preset.fit(model)
            return assign_transformer_rules(model, preset.weight, preset.activation, rounding)
        return assign_text_encoder_rules(model, preset.text_encoder)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON."""
        return {
            "quant_method": self.quant_method.value,
            "method": self.method,
            "overrides": list(self.overrides),
        }

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], *_: Any, **__: Any) -> "QuantizationConfig":
        """Make a config from the JSON of `to_dict`."""
        return cls(config_dict["method"], config_dict.get("overrides", ()))

    def __repr__(self) -> str:
        overrides = f", {list(self.overrides)}" if self.overrides else ""
        return f"{type(self).__name__}({self.method!r}{overrides})"


def check_data_free(preset: Preset) -> None:
    """Check that a preset quantizes a model, and needs no data.

    Raises:
        UserError: if not. It names the function to call instead.
    """
    check_quantizes(preset)
    if preset.data_need:
        raise UserError(
            f"{preset.method} cannot be applied while a model is loaded, because "
            f"{preset.data_need}: load the pipeline without it, and call "
            f"fp4dit.quantize(pipe, {preset.method!r}, prompts=[...])"
        )


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.ON_LOAD.value] = QuantizationConfig

register_quantization_config(QuantMethod.ON_LOAD.value)(QuantizationConfig)
