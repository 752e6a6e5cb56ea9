"""Packed models as diffusers saves and loads them: `from_pretrained` and `save_pretrained`, by its own extension point.

diffusers finds a quantization method by its name in two dictionaries, and importing this puts it there. There is no
other way in 0.42.
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

from fp4dit.errors import UserError
from fp4dit.grid import Grid
from fp4dit.packed import checkpoint
from fp4dit.packed.config import Config, Method, check_packed
from fp4dit.packed.description import Description, build_, verbatim


class PackedConfig(Config, QuantizationConfigMixin):
    """As diffusers knows it."""


class PackedQuantizer(DiffusersQuantizer):
    """Makes an empty model into a packed one, and lets no cast touch what is loaded into it."""

    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **others: Any) -> None:
        super().__init__(quantization_config, **others)
        check_packed(self.pre_quantized)
        self.dtype = torch.float32
        self.stored: dict[str, checkpoint.Stored] = {}
        self.kept: set[str] = set()

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self.dtype = torch_dtype or self.dtype
        return torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: Sequence[str | Path]) -> list[str]:
        self.stored = checkpoint.verify(map(Path, checkpoint_files), self.quantization_config.to_dict())
        return loaded_keys

    def _process_model_before_weight_loading(self, model: ModelMixin, **_: Any) -> None:
        build_(model, self.quantization_config.description, self.dtype)
        expect_scales(model, self.stored)
        self.kept = verbatim(model)

    def check_if_quantized_param(
        self, model: ModelMixin, param_value: Tensor, param_name: str, state_dict: dict[str, Tensor], **_: Any
    ) -> bool:
        return param_name in self.kept

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
        """`param_value` was cast by now. A copy, so that the file may be written anew while the model is there."""
        owner, _, name = param_name.rpartition(".")
        model.get_submodule(owner).register_buffer(name, state_dict[param_name].to(target_device, copy=True))

    def _process_model_after_weight_loading(self, model: ModelMixin, **_: Any) -> ModelMixin:
        lacking = [name for name, value in model.state_dict().items() if value.is_meta]
        if lacking:
            raise UserError(f"the checkpoint does not hold {lacking[0]}, which its config.json describes")
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        if not safe_serialization:
            raise UserError("a packed model is saved as safetensors: leave safe_serialization as it is")
        return state_dict, checkpoint.metadata(state_dict, self.quantization_config.to_dict())

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def expect_scales(model: torch.nn.Module, stored: dict[str, checkpoint.Stored]) -> None:
    """Give the grids of static activations, in place, empty buffers for what was measured for them."""
    grids = {name: module for name, module in model.named_modules() if isinstance(module, Grid)}
    for name, found in stored.items():
        owner, _, own = name.rpartition(".")
        if owner in grids:
            grids[owner].register_buffer(own, torch.empty(found.shape, dtype=found.dtype, device="meta"))


def attach(model: ModelMixin, description: Description) -> None:
    """So that `save_pretrained` saves a model whose layers are packed as what it is, in place."""
    config = PackedConfig.of(description)
    quantizer = PackedQuantizer(config)
    modified: Any = model
    modified.hf_quantizer, modified.is_quantized, modified.quantization_method = quantizer, True, config.quant_method
    model.register_to_config(quantization_config=config)


auto.AUTO_QUANTIZATION_CONFIG_MAPPING[Method.FP4DIT.value] = PackedConfig
auto.AUTO_QUANTIZER_MAPPING[Method.FP4DIT.value] = PackedQuantizer
