"""Run stages on a pipeline that is in memory, not in a folder."""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import torch
from diffusers import DiffusionPipeline
from torch import nn

from fp4dit.models.adapter import TransformerAdapter
from fp4dit.models.generic import GenericAdapter
from fp4dit.models.hub_files import TRANSFORMER, find_transformers
from fp4dit.models.pretrained import PretrainedSource
from fp4dit.utils.errors import UserError
from fp4dit.utils.modules import copy_to_meta

# The pipelines that stages can use now, by a name. A stage's config holds plain values, and so the
# name stands for the pipeline there.
_pipelines: WeakValueDictionary[str, DiffusionPipeline] = WeakValueDictionary()


@dataclass(frozen=True)
class LivePipeline:
    """A pipeline in memory, as the source of the stages' model.

    Args:
        digest: Name of the pipeline, which is a part of the identity of all results.
        source: Source of pipelines of its class, which makes the adapter. Its path is not read.

    Example:
        >>> live = LivePipeline.register(pipe, PixArt("", tokens=20))
        >>> live.load().sample(["a red square"], seeds=[0], steps=20, guidance=4.5)
    """

    digest: str
    source: PretrainedSource

    @classmethod
    def register(
        cls, pipe: DiffusionPipeline, source: PretrainedSource, by_content: bool = False
    ) -> "LivePipeline":
        """Make a pipeline known for as long as it is referred to elsewhere.

        Args:
            pipe: The pipeline.
            source: Source of pipelines of its class.
            by_content: Name it by the hash of its transformers, so that another process gives an
                equal pipeline the same name; otherwise by random digits.
        """
        digest = hash_transformers(pipe) if by_content else uuid4().hex[:16]
        _pipelines[digest] = pipe
        return cls(digest, source)

    @property
    def pipe(self) -> Any:
        """The pipeline itself."""
        return _pipelines[self.digest]

    @property
    def transformer(self) -> Any:
        """The transformer that is quantized."""
        return getattr(self.pipe, self.source.component)

    @property
    def draws_from_embeddings(self) -> bool:
        return self.source.draws_from_embeddings

    def load(self) -> TransformerAdapter:
        """Return an adapter of a copy of the transformer; all other components are shared."""
        return self.adapt(copy.deepcopy(self.transformer))

    def adapt(self, transformer: Any) -> TransformerAdapter:
        """Return an adapter of a transformer, with the other components of the pipeline."""
        pipe = replace_transformer(self.pipe, transformer, self.source.component)
        adapter = self.source.make_adapter(transformer, pipe)
        adapter.device = self.pipe.device
        return adapter

    def check(self, prompts: Sequence[str]) -> None:
        """Raise a UserError if the transformer is quantized already."""
        check_not_quantized(self.transformer)

    def check_text_encoder(self) -> None:
        """Do nothing: the text encoder is quantized apart from the stages."""

    def build_on_meta(self) -> TransformerAdapter:
        """Build the transformer alone on the meta device, without weights."""
        original = self.transformer
        # Unlike accelerate's `init_empty_weights`, this changes nothing for other threads.
        skeleton: Any = copy_to_meta(original)
        adapter = self.source.make_adapter(skeleton)
        if isinstance(adapter, GenericAdapter):  # it traces a call of the real transformer
            adapter.load, adapter.sketch = lambda: self.adapt(original), None
        return adapter


def replace_transformer(pipe: Any, transformer: Any, component: str = TRANSFORMER) -> Any:
    """Return a pipeline with another transformer, which shares all other components."""
    clone = copy.copy(pipe)
    # `setattr` would change the configs that the copy shares with the original pipeline.
    clone.__dict__[component] = transformer
    return clone


def copy_transformers(pipe: Any) -> Any:
    """Return a pipeline with copies of its transformers, which shares all other components."""
    clone = copy.copy(pipe)
    for name, transformer in find_transformers(pipe.components).items():
        clone.__dict__[name] = copy.deepcopy(transformer)
    return clone


def hash_transformers(pipe: Any) -> str:
    """Return a hash of the transformers of a pipeline; of a single one, that of its tensors."""
    hashes = [
        hash_module(transformer) for transformer in find_transformers(pipe.components).values()
    ]
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


def hash_module(module: nn.Module) -> str:
    """Return the SHA-256 of a module's tensors with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        if values.numel():
            digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def check_not_quantized(model: Any) -> None:
    """Raise a UserError if a model has quantized weights."""
    if config := getattr(model.config, "quantization_config", None):
        method = getattr(config, "quant_method", "")
        raise UserError(
            f"this {type(model).__name__} is quantized already "
            f"({getattr(method, 'value', method)}): load the original model"
        )
