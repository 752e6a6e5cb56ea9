"""Packed text encoders as transformers saves and loads them: `from_pretrained` and `save_pretrained`, by its own
extension point. Importing this is what registers them there."""

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

from fp4dit.errors import UserError
from fp4dit.packed import checkpoint
from fp4dit.packed.config import Config, Method, check_packed
from fp4dit.packed.description import Description, build_
from fp4dit.packed.layer import PackedLinear


class PackedTextConfig(Config, QuantizationConfigMixin):
    """As transformers knows it."""


class PackedTextQuantizer(HfQuantizer):
    """Makes an empty model into a packed one. What is loaded into it are bytes, which transformers does not cast."""

    quantization_config: PackedTextConfig

    def __init__(self, quantization_config: PackedTextConfig, **others: Any) -> None:
        super().__init__(quantization_config, **others)
        check_packed(self.pre_quantized)
        self.dtype = torch.float32
        self.stored: dict[str, checkpoint.Stored] = {}

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        self.stored = checkpoint.verify(map(Path, checkpoint_files or ()), self.quantization_config.to_dict())
        with ordinary_tensors():
            layers = build_(model, self.quantization_config.description, self.dtype)
        for name, layer in layers.items():
            layer.dtype = kept_dtype(model, name, self.dtype)
        spare(model, layers)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        lacking = sorted(written(model).keys() - self.stored.keys())
        if lacking:
            raise UserError(f"the checkpoint does not hold {lacking[0]}, which its config.json describes")
        for layer in model.modules():
            if isinstance(layer, PackedLinear):  # transformers empties what is not in the file
                layer.table = layer.layout.table().to(layer.codes.device)  # pyright: ignore
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        return None, checkpoint.metadata(written(model), self.quantization_config.to_dict())

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """While a model is loaded, transformers makes all tensors on the meta device and in the model's dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def kept_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """What transformers loads this layer's weight in, for it keeps some, as T5's `wo`, in fp32."""
    plan = model._get_dtype_plan(dtype)
    kept = plan and build_glob_alternation(list(plan))[0].search(f"{name}.weight")
    return torch.float32 if kept else dtype


def spare(model: nn.Module, layers: Mapping[str, PackedLinear]) -> None:
    """Tell transformers, in place, that there is nothing to initialize in packed layers, nor in what holds them: it
    would draw the weight of T5's `wo` anew, when it comes to the feed-forward."""
    holders = {model.get_submodule(name.rpartition(".")[0]) for name in layers}
    for module in (*layers.values(), *(holder for holder in holders if not list(holder.buffers(recurse=False)))):
        module._is_hf_initialized = True  # pyright: ignore[reportArgumentType]


def written(model: PreTrainedModel) -> dict[str, Tensor]:
    """What `save_pretrained` writes, by the names it has in the file: tied weights once, and as they were loaded."""
    ignored = model._keys_to_ignore_on_save or ()
    state = {name: value for name, value in model.state_dict().items() if name not in ignored}
    return dict(revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model)))


def attach(model: PreTrainedModel, description: Description) -> None:
    """So that `save_pretrained` saves a model whose layers are packed as what it is, in place."""
    config = PackedTextConfig.of(description)
    modified: Any = model
    modified.hf_quantizer, modified.is_quantized = PackedTextQuantizer(config), True
    modified.quantization_method = config.quant_method
    model.config.quantization_config = config


register_quantization_config(Method.FP4DIT.value)(PackedTextConfig)
register_quantizer(Method.FP4DIT.value)(PackedTextQuantizer)
