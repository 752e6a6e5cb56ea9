"""What a pipeline's `encode_prompt` returned, kept in a file: drawing without text encoders.

Every pipeline encodes prompts in its own way: in one tensor or several, in lists, with masks, with
a second call for guidance. So the results are kept by the arguments of the calls, and are those of
the text encoders to the bit. As prompts of a batch are padded to the longest one, the file is for
the batches of one run.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fp4dit.data.embeddings import INSTRUCTIONS
from fp4dit.models.hub_files import find_transformers
from fp4dit.models.templates import hash_content
from fp4dit.utils import pytree_io
from fp4dit.utils.calls import remove_hooks
from fp4dit.utils.errors import UserError

ENCODE = "encode_prompt"

# Arguments on which the values of the result do not depend.
PLACES = ("self", "device")

BATCHES = (
    "the batches of the run, which calibration.batch_size and generation.batch_size choose, "
    "its guidance, and the options of the pipeline"
)


class EncodingDone(Exception):
    """Raised when a pipeline has encoded its prompts, and calls its transformer."""


@dataclass(frozen=True)
class PromptMemory:
    """Results of `encode_prompt` in a file, as `remember_prompts` writes it.

    Args:
        path: The file.

    Example:
        >>> memory = PromptMemory("texts.safetensors")
        >>> memory.replace_encoder_(pipe)  # which then draws the batches of the file
    """

    path: str

    @cached_property
    def content(self) -> Mapping[str, Any]:
        """The texts that the file was made for, and the results by the arguments.

        Raises:
            UserError: if there is no file, or if it does not hold results.
        """
        if not Path(self.path).is_file():
            raise UserError(f"there is no file of embeddings at {self.path}: {INSTRUCTIONS}")
        try:
            content = pytree_io.load_tree(Path(self.path))
            return {"texts": set(content["texts"]), "results": content["results"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is not a file of embeddings: {INSTRUCTIONS}") from error

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Check that the file was made for all of these prompts.

        Raises:
            UserError: if prompts are missing. It names the first one.
        """
        missing = [prompt for prompt in prompts if prompt not in self.content["texts"]]
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise UserError(
                f"{self.path} has no embedding of the prompt {missing[0]!r}{more}: {INSTRUCTIONS}"
            )

    def replace_encoder_(self, pipe: Any) -> None:
        """Let a pipeline read the results of `encode_prompt` from the file."""

        def read(*args: Any, **kwargs: Any) -> Any:
            key = describe_call(pipe, args, kwargs)
            if key not in self.content["results"]:
                raise UserError(
                    f"{self.path} has no embedding of this batch of prompts. It is for {BATCHES}: "
                    "make it again with the options of the run"
                )
            device = kwargs.get("device") or pipe._execution_device
            return move_tensors(self.content["results"][key], device)

        pipe.__dict__[ENCODE] = read


@dataclass
class PromptRecorder:
    """Records what `encode_prompt` of a pipeline returns.

    Args:
        pipe: The pipeline.

    Raises:
        UserError: if the pipeline has no such method.

    Example:
        >>> recorder = PromptRecorder(pipe)
        >>> recorder.record(lambda: pipe("a red square"))  # stops at the transformer
    """

    pipe: Any
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not hasattr(self.pipe, ENCODE):
            raise UserError(
                f"{type(self.pipe).__name__} has no method {ENCODE}, whose results could be kept: "
                "run it with its text encoder"
            )

    def record(self, draw: Callable[[], Any]) -> None:
        """Record all calls until the pipeline first calls a transformer."""
        original = getattr(self.pipe, ENCODE)

        def encode(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            key = describe_call(self.pipe, args, kwargs)
            self.results[key] = move_tensors(result, "cpu")
            return result

        def stop(*_: Any) -> None:
            raise EncodingDone

        with ExitStack() as stack:
            for transformer in find_transformers(self.pipe.components).values():
                stack.enter_context(remove_hooks([transformer.register_forward_pre_hook(stop)]))
            self.pipe.__dict__[ENCODE] = encode
            stack.callback(self.pipe.__dict__.pop, ENCODE)
            try:
                draw()
            except EncodingDone:
                return


def remember_prompts(
    adapter: Any, batches: Iterable[tuple[Sequence[str], int, float]], path: Path
) -> int:
    """Encode the prompts of batches, and save what the pipeline encoded.

    Args:
        adapter: The adapter with the pipeline.
        batches: The prompts, the number of steps, and the guidance of each batch.
        path: The file to write.

    Returns:
        The number of different texts.
    """
    recorder, texts = PromptRecorder(adapter.pipe), {}
    for prompts, steps, guidance in batches:
        seeds = range(len(prompts))
        recorder.record(lambda: adapter.sample(prompts, seeds, steps, guidance))  # noqa: B023
        texts |= dict.fromkeys(prompts)
    pytree_io.save_tree({"texts": list(texts), "results": recorder.results}, path)
    return len(texts)


def describe_call(pipe: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return a hash of the arguments of a call of `encode_prompt`, without its device."""
    bound = signature(getattr(type(pipe), ENCODE)).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    arguments = {}
    for name, value in bound.arguments.items():
        if name not in PLACES:
            arguments[name] = tree_map(describe_leaf, value)
    return hashlib.sha256(repr(sorted(arguments.items())).encode()).hexdigest()[:32]


def describe_leaf(value: Any) -> Any:
    """Return the hash of a tensor; anything else is returned unchanged."""
    return hash_content(value) if isinstance(value, Tensor) else value


def move_tensors(value: Any, device: torch.device | str) -> Any:
    """Return a nested value with copies of its tensors on a device.

    Tensors of a file may begin at any address, on which the last bits of products depend. Those of
    a copy do not.
    """

    def move(leaf: Any) -> Any:
        return leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf

    return tree_map(move, value)
