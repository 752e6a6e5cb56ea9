"""Integration with transformers: `from_pretrained` and `save_pretrained` of packed text encoders.

Importing this module registers fp4dit with transformers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import build_glob_alternation, revert_weight_conversion
from transformers.modeling_utils import PreTrainedModel, remove_tied_weights_from_state_dict
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fp4dit.packed.encoding import integrity
from fp4dit.packed.integrations.config import (
    OnLoadConfigMixin,
    PackedConfigMixin,
    QuantMethod,
    require_one_device,
    require_prequantized,
)
from fp4dit.packed.model import ModelDescription, insert_packed_layers_
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.quantize import quantize_and_pack_
from fp4dit.utils.errors import UserError


class TransformersPackedConfig(PackedConfigMixin, QuantizationConfigMixin):
    """Quantization config of a packed model in transformers."""


class TransformersPackedQuantizer(HfQuantizer):
    """Quantizer that transformers calls to load and save packed models.

    It prepares an empty model. transformers does not cast the bytes that are loaded into it.

    Example:
        >>> import fp4dit
        >>> encoder = AutoModel.from_pretrained("path/of/a/packed/text_encoder")
    """

    quantization_config: TransformersPackedConfig

    def __init__(self, quantization_config: TransformersPackedConfig, **others: Any) -> None:
        super().__init__(quantization_config, **others)
        require_prequantized(self.pre_quantized)
        self.dtype = torch.float32
        self.stored: dict[str, integrity.StoredTensor] = {}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        self.stored = integrity.verify_files(
            map(Path, checkpoint_files or ()), self.quantization_config.to_dict()
        )
        with use_default_tensors():
            layers = insert_packed_layers_(model, self.quantization_config.description, self.dtype)
        for name, layer in layers.items():
            layer.dtype = find_layer_dtype(model, name, self.dtype)
        mark_initialized_(model, layers)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        missing = sorted(list_saved_tensors(model).keys() - self.stored.keys())
        if missing:
            raise UserError(
                f"the checkpoint does not hold {missing[0]}, which its config.json describes"
            )
        for layer in model.modules():
            if isinstance(layer, PackedLinear):  # transformers empties buffers not in the file
                table = layer.layout.build_lookup_table()
                layer.table = table.to(layer.codes.device)  # pyright: ignore
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        return None, integrity.build_metadata(
            list_saved_tensors(model), self.quantization_config.to_dict()
        )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class TransformersOnLoadQuantizer(HfQuantizer):
    """Quantizer that transformers calls to quantize a model after its weights are loaded.

    The rules are checked before that. Afterwards the model is packed, and has a
    `TransformersPackedQuantizer`, which can save it.

    Example:
        >>> config = fp4dit.QuantizationConfig("nvfp4_4over6")
        >>> encoder = T5EncoderModel.from_pretrained("a/text_encoder", quantization_config=config)
    """

    quantization_config: Any  # an `OnLoadConfigMixin`

    def __init__(self, quantization_config: OnLoadConfigMixin, **others: Any) -> None:
        super().__init__(quantization_config, **others)  # pyright: ignore[reportArgumentType]

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        require_one_device(device_map)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        with use_default_tensors():
            self.assigned = self.quantization_config.assign_rules(model)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        require_one_device(getattr(model, "hf_device_map", None))
        attach_transformers_config_(model, quantize_and_pack_(model, self.assigned))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


@contextmanager
def use_default_tensors() -> Iterator[None]:
    """Context manager: create tensors on the CPU and in fp32.

    While transformers loads a model, the default is the meta device and the model's dtype.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def find_layer_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that transformers loads a layer's weight in.

    Some layers, such as T5's `wo`, stay in fp32.
    """
    plan = model._get_dtype_plan(dtype)
    stays_fp32 = plan and build_glob_alternation(list(plan))[0].search(f"{name}.weight")
    return torch.float32 if stays_fp32 else dtype


def mark_initialized_(model: nn.Module, layers: Mapping[str, PackedLinear]) -> None:
    """Mark packed layers and the modules around them as initialized, in place.

    transformers would otherwise initialize the weight of T5's `wo` when it initializes the
    feed-forward module around it.
    """
    parents = {model.get_submodule(name.rpartition(".")[0]) for name in layers}
    without_buffers = [module for module in parents if not list(module.buffers(recurse=False))]
    for module in (*layers.values(), *without_buffers):
        module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]


def list_saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that `save_pretrained` writes, by their names in the file.

    Tied weights occur once, and names are those of the original checkpoint.
    """
    ignored = model._keys_to_ignore_on_save or ()
    state = {name: value for name, value in model.state_dict().items() if name not in ignored}
    return dict(revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model)))


def attach_transformers_config_(model: PreTrainedModel, description: ModelDescription) -> None:
    """Attach a quantization config to a packed model, so that `save_pretrained` saves it."""
    config = TransformersPackedConfig.from_description(description)
    target: Any = model
    target.hf_quantizer = TransformersPackedQuantizer(config)
    target.is_quantized = True
    target.quantization_method = config.quant_method
    model.config.quantization_config = config


register_quantization_config(QuantMethod.FP4DIT.value)(TransformersPackedConfig)

register_quantizer(QuantMethod.FP4DIT.value)(TransformersPackedQuantizer)

register_quantizer(QuantMethod.ON_LOAD.value)(TransformersOnLoadQuantizer)
