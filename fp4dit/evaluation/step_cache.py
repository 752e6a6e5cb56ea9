"""Reuse what a transformer computed in earlier denoising steps, by the hooks of diffusers."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    HookRegistry,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_taylorseer_cache,
)
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from fp4dit.utils.errors import UserError

# The attention and feed-forward layers of a block, as classes of diffusers name them.
CACHED_LAYERS = (r".*blocks\.\d+\.(attn\d?|ff|ff_context|ffn|mlp)",)


@runtime_checkable
class StepCache(Protocol):
    """Protocol of caches, which change a transformer in place before it draws.

    Example:
        >>> cache = FirstBlockCache(threshold=0.1)
        >>> cache.apply_(pipe.transformer)
    """

    def apply_(self, transformer: nn.Module) -> None:
        """Hook the cache into a transformer.

        Raises:
            UserError: If the cache does not know the blocks of the transformer.
        """
        ...


@dataclass(frozen=True)
class FirstBlockCache:
    """Skip all blocks but the first where the first one changed little since the last full step.

    What the skipped blocks added to their input then is added again. The change is the mean
    absolute difference of what the first block adds to its input, over all images of a batch,
    relative to its mean absolute value (ParaAttention; a simpler TeaCache, arXiv:2411.19108).

    Args:
        threshold: The largest change for which blocks are skipped.

    Example:
        >>> FirstBlockCache(threshold=0.1).apply_(pipe.transformer)
    """

    threshold: float = 0.1

    def __post_init__(self) -> None:
        if self.threshold <= 0:
            raise UserError(
                f"generation.cache.threshold={self.threshold} skips nothing: give a positive "
                "number, or step_cache=null"
            )

    def apply_(self, transformer: nn.Module) -> None:
        try:
            apply_first_block_cache(transformer, FirstBlockCacheConfig(self.threshold))
        except (ValueError, IndexError) as error:
            raise UserError(
                f"the first-block cache of diffusers does not know the blocks of "
                f"{type(transformer).__name__}: choose step_cache=layer_outputs"
            ) from error


@dataclass(frozen=True)
class LayerOutputCache:
    """Compute attention and feed-forward layers every few steps, and predict them in between.

    Order 0 repeats the last output (FORA, arXiv:2407.01425). Higher orders extrapolate by a Taylor
    series of finite differences (TaylorSeer, arXiv:2503.06923).

    Args:
        interval: The number of steps for which a layer is computed once.
        order: The order of the Taylor series.
        first: The number of steps at the start in which everything is computed.
        layers: Patterns of the names of cached layers, as in `re.fullmatch`.

    Example:
        >>> LayerOutputCache(interval=2, order=0).apply_(pipe.transformer)
    """

    interval: int = 2
    order: int = 0
    first: int = 3
    layers: Sequence[str] = CACHED_LAYERS

    def __post_init__(self) -> None:
        if self.interval < 2 or self.order < 0 or self.first <= self.order:
            raise UserError(
                f"generation.cache has interval={self.interval}, order={self.order} and "
                f"first={self.first}: the interval is at least 2, and there are more first steps "
                "than the order, from which differences are taken"
            )

    def apply_(self, transformer: nn.Module) -> None:
        config = TaylorSeerCacheConfig(
            cache_interval=self.interval,
            disable_cache_before_step=self.first,
            max_order=self.order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=list(self.layers),
        )
        apply_taylorseer_cache(transformer, config)
        if not any(hasattr(module, "_diffusers_hook") for module in transformer.modules()):
            raise UserError(
                f"no layer of {type(transformer).__name__} is named like {list(self.layers)}: name "
                "its attention and feed-forward layers in generation.cache.layers"
            )


@contextmanager
def start_caches(transformers: Sequence[nn.Module], steps: int) -> Iterator[None]:
    """Context manager: let the caches of transformers begin empty, for one run of the sampler.

    Args:
        transformers: The transformers that draw.
        steps: The number of denoising steps.

    Raises:
        UserError: If the branches of guidance are separate calls that diffusers cannot tell apart:
            each would reuse what the other computed.
    """
    with ExitStack() as stack:
        for model in transformers:
            stack.enter_context(_start_cache(model, steps))
        yield


@contextmanager
def _start_cache(transformer: nn.Module, steps: int) -> Iterator[None]:
    num_calls = 0

    def count_call(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > steps and not isinstance(transformer, CacheMixin):
            raise UserError(
                f"the pipeline calls {type(transformer).__name__} more than once in a step, and "
                "diffusers cannot tell these calls apart, so that each would reuse what another "
                "one computed: give step_cache=null, or generation.guidance=1"
            )

    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.invalidate_child_registries_cache()  # diffusers does so in `enable_cache` only
    counter = transformer.register_forward_pre_hook(count_call)
    try:
        # A pipeline whose calls need caches of their own names each call itself.
        with CacheMixin.cache_context(transformer, "call"):  # pyright: ignore[reportArgumentType]
            yield
    finally:
        counter.remove()
        registry.reset_stateful_hooks()
