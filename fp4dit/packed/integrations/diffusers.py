"""Integration with diffusers: `from_pretrained` and `save_pretrained` of packed models.

diffusers finds a quantization method by its name in two dictionaries. Importing this module adds
fp4dit to them; diffusers 0.42 has no other extension point.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor

from fp4dit.packed.encoding import integrity
from fp4dit.packed.integrations.config import (
    OnLoadConfigMixin,
    PackedConfigMixin,
    QuantMethod,
    require_one_device,
    require_prequantized,
)
from fp4dit.packed.model import ModelDescription, insert_packed_layers_, uncastable_state_keys
from fp4dit.packed.nn.gelu import use_gelu_kernel_
from fp4dit.packed.quantize import quantize_and_pack_
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.utils.errors import UserError


class DiffusersPackedConfig(PackedConfigMixin, QuantizationConfigMixin):
    """Quantization config of a packed model in diffusers."""


class DiffusersPackedQuantizer(DiffusersQuantizer):
    """Quantizer that diffusers calls to load and save packed models.

    It prepares an empty model, and loads packed tensors without casting them.

    Example:
        >>> import fp4dit
        >>> model = AutoModel.from_pretrained("path/of/a/packed/transformer")
    """

    quantization_config: DiffusersPackedConfig
    use_keep_in_fp32_modules = True  # as without a quantizer; diffusers reads this attribute

    def __init__(self, quantization_config: DiffusersPackedConfig, **others: Any) -> None:
        super().__init__(quantization_config, **others)
        require_prequantized(self.pre_quantized)
        self.dtype = torch.float32
        self.stored: dict[str, integrity.StoredTensor] = {}
        self.uncastable_keys: set[str] = set()

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self.dtype = torch_dtype or self.dtype
        return torch_dtype

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: Sequence[str | Path]
    ) -> list[str]:
        self.stored = integrity.verify_files(
            map(Path, checkpoint_files), self.quantization_config.to_dict()
        )
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: ModelMixin, keep_in_fp32_modules: Sequence[str] = (), **_: Any
    ) -> None:
        layers = insert_packed_layers_(model, self.quantization_config.description, self.dtype)
        for name, layer in layers.items():
            if not set(keep_in_fp32_modules).isdisjoint(name.split(".")):
                layer.dtype = torch.float32
        register_static_scales_(model, self.stored)
        self.uncastable_keys = uncastable_state_keys(model)

    def check_if_quantized_param(
        self,
        model: ModelMixin,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Tensor],
        **_: Any,
    ) -> bool:
        return param_name in self.uncastable_keys

    def create_quantized_param(
        self,
        model: ModelMixin,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str,
        state_dict: dict[str, Tensor],
        *others: Any,
        **options: Any,
    ) -> None:
        """Load a tensor from `state_dict`, because `param_value` is already cast.

        The tensor is copied, so that the file may be overwritten while the model is in use.
        """
        owner, _, name = param_name.rpartition(".")
        value = state_dict[param_name].to(target_device, copy=True)
        model.get_submodule(owner).register_buffer(name, value)

    def _process_model_after_weight_loading(self, model: ModelMixin, **_: Any) -> ModelMixin:
        for name, value in model.state_dict().items():
            if value.is_meta:
                raise UserError(
                    f"the checkpoint does not hold {name}, which its config.json describes"
                )
        use_gelu_kernel_(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        if not safe_serialization:
            raise UserError(
                "a packed model is saved as safetensors: leave safe_serialization as it is"
            )
        return state_dict, integrity.build_metadata(state_dict, self.quantization_config.to_dict())

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class DiffusersOnLoadQuantizer(DiffusersPackedQuantizer):
    """Quantizer that diffusers calls to quantize a model after its weights are loaded.

    The rules are checked before that. Afterwards the model is packed and can be saved.

    Example:
        >>> config = fp4dit.QuantizationConfig("nvfp4_4over6")
        >>> model = AutoModel.from_pretrained("path/of/a/transformer", quantization_config=config)
    """

    quantization_config: Any  # an `OnLoadConfigMixin`, and a packed config after loading

    def __init__(self, quantization_config: OnLoadConfigMixin, **others: Any) -> None:
        DiffusersQuantizer.__init__(self, quantization_config, **others)  # pyright: ignore

    def validate_environment(self, device_map: Any = None, **_: Any) -> None:
        require_one_device(device_map)

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        return torch_dtype

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: Sequence[str | Path]
    ) -> list[str]:
        return loaded_keys

    def _process_model_before_weight_loading(self, model: ModelMixin, **_: Any) -> None:
        self.assigned = self.quantization_config.assign_rules(model)

    def check_if_quantized_param(self, *_: Any, **__: Any) -> bool:
        return False

    def _process_model_after_weight_loading(self, model: ModelMixin, **_: Any) -> ModelMixin:
        attach_diffusers_config_(model, quantize_and_pack_(model, self.assigned))
        # diffusers then makes this object the model's quantizer, which saves the model.
        self.quantization_config = model.config["quantization_config"]
        return model


def register_static_scales_(
    model: torch.nn.Module, stored: dict[str, integrity.StoredTensor]
) -> None:
    """Register empty buffers for the stored qparams of static activations, in place."""
    quantizers = {}
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize):
            quantizers[name] = module
    for name, tensor in stored.items():
        owner, _, buffer = name.rpartition(".")
        if owner in quantizers:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            quantizers[owner].register_buffer(buffer, empty)


def attach_diffusers_config_(model: ModelMixin, description: ModelDescription) -> None:
    """Attach a quantization config to a packed model, so that `save_pretrained` saves it.

    From then on the model is as it will be when it is loaded.
    """
    use_gelu_kernel_(model)
    config = DiffusersPackedConfig.from_description(description)
    target: Any = model
    target.hf_quantizer = DiffusersPackedQuantizer(config)
    target.is_quantized = True
    target.quantization_method = config.quant_method
    model.register_to_config(quantization_config=config)


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.FP4DIT.value] = DiffusersPackedConfig

auto.AUTO_QUANTIZER_MAPPING[QuantMethod.FP4DIT.value] = DiffusersPackedQuantizer

auto.AUTO_QUANTIZER_MAPPING[QuantMethod.ON_LOAD.value] = DiffusersOnLoadQuantizer
