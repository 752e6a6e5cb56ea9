"""The package gguf and diffusers get the same weights from what is stored in GGUF."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fp4dit.numerics.formats import floating, fp16, integer
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.packed.targets.base import StoredLayer
from fp4dit.packed.targets.gguf import GGUF
from fp4dit.packed.targets.gguf_file import GGUFTensor, read_gguf, write_gguf
from fp4dit.packed.targets.grid import pack_grid
from fp4dit.utils.errors import UserError
from tests.helpers.packing import make_packed_layer
from tests.packed.targets.layers import BF16, make_layers, store

FORMATS = [integer(4), integer(8), integer(4, signed=False), floating(2, 1)]


def test_random_layers_are_exact_or_refused():
    gguf = pytest.importorskip("gguf", reason="the extra `dev` installs gguf")
    utils = pytest.importorskip("diffusers.quantizers.gguf.utils")
    outcomes: Counter[str] = Counter()
    for layer, shape in make_layers(150, FORMATS):
        stored = store(GGUF(), layer, shape)
        outcomes["refused" if stored is None else stored.settings["type"]] += 1
        if stored is None:
            continue
        kind = gguf.GGMLQuantizationType[stored.settings["type"]]
        weight, data = layer.dequantize(layer.dtype), stored.tensors["weight"]
        theirs = torch.from_numpy(gguf.dequantize(data.numpy(), kind))
        assert theirs.to(layer.dtype).equal(weight)
        parameter = utils.GGUFParameter(data, quant_type=kind)
        assert utils.dequantize_gguf_tensor(parameter).to(layer.dtype).equal(weight)
        layout, buffers = pack_grid(GGUF().decode(stored))
        back = layout.dequantize(buffers, layer.in_features, layout.build_lookup_table())
        assert back.to(layer.dtype).equal(weight)
    assert outcomes["Q4_0"] > 3
    assert outcomes["Q8_0"] > 3


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_layers_that_gguf_quantized_are_read(kind: str):
    """Integers reach -8, which the symmetric format of packed layers lacks; scales may be < 0."""
    gguf = pytest.importorskip("gguf", reason="the extra `dev` installs gguf")
    torch.manual_seed(0)
    code = gguf.GGMLQuantizationType[kind]
    data = gguf.quantize(torch.randn(24, 128).numpy(), code)
    stored = StoredLayer((24, 128), {"weight": torch.from_numpy(data)}, {"type": kind})
    layout, buffers = GGUF().restore(stored)
    ours = layout.dequantize(buffers, 128, layout.build_lookup_table())
    assert ours.equal(torch.from_numpy(gguf.dequantize(data, code)))


@pytest.mark.parametrize(
    ("quantizer", "reason"),
    [
        (Quantizer(floating(2, 1), PerGroup(32), AbsMax(fp16)), "e2m1, and not int4: use weight"),
        (Quantizer(integer(4), PerGroup(16), AbsMax(fp16)), "use weight.granularity.size=32"),
        (Quantizer(integer(4), PerGroup(32), AbsMax()), "not numbers of fp16: use weight.scale"),
        (
            Quantizer(integer(4), PerGroup(32), AbsMax(fp16)),
            "export_format.dtype=float16, or weight.scale.dtype=bf16",
        ),
    ],
)
def test_refusals_name_an_override(quantizer: Quantizer, reason: str):
    with pytest.raises(UserError, match=reason):
        GGUF().store(make_packed_layer(quantizer), (24, 128), torch.float32)


def test_the_named_overrides_fit():
    bf16 = Quantizer(integer(4), PerGroup(32), AbsMax(BF16))
    assert GGUF().store(make_packed_layer(bf16), (24, 128), torch.float32)
    half = make_packed_layer(Quantizer(integer(4), PerGroup(32), AbsMax(fp16)), torch.float16)
    assert GGUF().store(half, (24, 128), torch.float16)


def test_files_are_those_of_the_package(tmp_path: Path):
    """The package reads what is written here, and what it writes is read here."""
    gguf = pytest.importorskip("gguf", reason="the extra `dev` installs gguf")
    tensors = {
        "a.weight": GGUFTensor("Q4_0", torch.randint(0, 255, (3, 36), dtype=torch.uint8)),
        "b": GGUFTensor("F32", torch.randn(2, 3, 4, 5)),
        "c": GGUFTensor("F16", torch.randn(7).half()),
    }
    write_gguf(tensors, {}, tmp_path / "ours.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "ours.gguf").tensors:
        assert tensor.tensor_type.name == tensors[tensor.name].kind
        assert np.array_equal(tensor.data, tensors[tensor.name].data.numpy())
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "flux")
    writer.add_array("some.list", ["a", "b"])
    writer.add_float32("some.number", 0.5)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[tensor.kind] if tensor.kind == "Q4_0" else None
        writer.add_tensor(name, tensor.data.numpy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_gguf(tmp_path / "theirs.gguf", {})
    assert all(read[name].data.equal(tensor.data) for name, tensor in tensors.items())
