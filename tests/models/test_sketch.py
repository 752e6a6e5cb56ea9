"""Calls that a pipeline makes without weights are those that it makes with weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fp4dit.models.generic import Generic
from fp4dit.models.known_content import KnownContent, fill_masks
from fp4dit.utils.errors import UserError
from tests.helpers.tiny_families import TINY_FAMILIES

# The shapes of conf/model, with as many tokens as the options of the replicas say.
SHAPES: dict[str, dict[str, list[int | str]]] = {
    "flux": {
        "prompt_embeds": [16, "joint_attention_dim"],
        "pooled_prompt_embeds": ["pooled_projection_dim"],
    },
    "ltx": {"prompt_embeds": [16, "caption_channels"], "prompt_attention_mask": [16]},
    "wan_2_2": {"prompt_embeds": [16, "text_dim"]},
}


def describe(value: Any) -> Any:
    """Return the shape of a tensor, and anything else unchanged."""
    return tuple(value.shape) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.unchecked
def test_a_call_has_the_arguments_and_shapes_of_a_real_one(name: str, tmp_path: Path):
    """The sizes of latents are those of the autoencoder in the folder."""
    family = TINY_FAMILIES[name]
    family.save(tmp_path)
    choice = {"options": family.options, "transformer": "transformer"}
    loaded: Any = Generic(str(tmp_path), **choice).load()
    real = loaded.record_first_calls()
    adapter: Any = Generic(str(tmp_path), **choice, prompt_shapes=SHAPES[name]).build_on_meta()
    adapter.load = lambda: pytest.fail("weights are loaded")
    for call, expected in zip(adapter.record_first_calls(), real, strict=True):
        arguments = tree_map(describe, call.bind_arguments(adapter.transformer))
        assert arguments == tree_map(describe, expected.bind_arguments(adapter.transformer))
    assert adapter.units()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"prompt_embedding": [16]},
            "FluxPipeline has no such argument; there are .*prompt_embeds",
        ),
        ({"prompt_embeds": [16, "width"]}, "has no entry width; there are .*joint_attention_dim"),
    ],
)
def test_a_wrong_shape_is_refused_with_the_names_that_there_are(shapes: dict, message: str):
    source = Generic("black-forest-labs/FLUX.1-dev", prompt_shapes=shapes)
    with pytest.raises(UserError, match=message):
        source.build_on_meta().meta_call(1)


def test_shapes_that_depend_on_a_mask_are_those_of_a_full_one():
    """What is read of a mask is what the same mask on the CPU says."""
    mask, x = torch.ones(2, 5, dtype=torch.bool), torch.rand(2, 5, 3)
    twin = mask.to("meta")
    with KnownContent((twin, mask)):
        assert twin.sum(1).tolist() == mask.sum(1).tolist()
        assert bool(twin.all())
        assert x.to("meta")[twin].shape == x[mask].shape
        assert (~twin).nonzero().shape == (~mask).nonzero().shape
    with pytest.raises(RuntimeError):
        twin.sum(1).tolist()  # outside of the statement nothing is known


class Selection(nn.Module):
    """Module that reads the values of a mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x[:, : max(mask.sum(1).tolist())]


def test_a_module_reads_its_masks_however_often_that_is_arranged():
    module = Selection()
    for _ in range(2):
        fill_masks(module)
    mask = torch.ones(2, 4, dtype=torch.int64, device="meta")
    assert module(torch.rand(2, 6, device="meta"), mask).shape == (2, 4)
