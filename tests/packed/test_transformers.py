"""Packed text encoders as stock transformers and diffusers save and load them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import T5EncoderModel

from fp4dit.models.dit_xl import DiT
from fp4dit.models.pixart import PixArt
from fp4dit.numerics.formats import floating, fp16
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.packed.export import (
    compute_hidden_states,
    find_largest_encoder,
    pack_text_encoder_,
    quantize_text_encoder_,
)
from fp4dit.packed.integrations.transformers import TransformersPackedConfig
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.quantize import list_block_layers
from fp4dit.quantization.rules import Rule
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.utils.errors import UserError
from pipelines.planning.plan import make_plan
from tests.conftest import Compose
from tests.helpers import tiny
from tests.packed.test_diffusers import draw_image

E2M1 = Quantizer(floating(2, 1), PerGroup(32), AbsMax(fp16))
RULES = tiny.rules_for(E2M1)
TWO = ("text_encoder", "text_encoder_2")
IDS = torch.tensor([[1, 5, 3, 8], [2, 2, 9, 4]])


@pytest.fixture(scope="module")
def packed_folder(pixart_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    pipe = DiffusionPipeline.from_pretrained(pixart_folder)
    quantize_text_encoder_(pipe, RULES)
    pipe.save_pretrained(out)
    return out


@torch.no_grad()
def run_encoder(encoder: Any) -> torch.Tensor:
    return encoder(IDS).last_hidden_state


def load_encoder(packed_folder: Path, **options: Any) -> T5EncoderModel:
    return T5EncoderModel.from_pretrained(packed_folder / "text_encoder", **options)


def have_equal_states(one: nn.Module, other: nn.Module) -> bool:
    state, other_state = one.state_dict(), other.state_dict()
    return state.keys() == other_state.keys() and all(
        other_state[name].equal(value) for name, value in state.items()
    )


@pytest.mark.parametrize(
    ("save", "dtype"),
    [
        (tiny.save, torch.float32),
        (tiny.save, torch.bfloat16),
        (tiny.save, torch.float16),
        (tiny.save_hunyuan, torch.bfloat16),
        (tiny.save_sd3, torch.float32),
        (tiny.save_sana, torch.bfloat16),
    ],
)
def test_hidden_states_are_bit_exact_after_loading(
    save: Callable[[Path], None], dtype: torch.dtype, tmp_path: Path
):
    """Compare T5, BERT, CLIP and Gemma with the originals, with dequantized weights."""
    save(tmp_path / "plain")
    pipe, other = (
        DiffusionPipeline.from_pretrained(tmp_path / "plain", dtype=dtype) for _ in range(2)
    )
    name, encoder = find_largest_encoder(pipe)
    quantize_text_encoder_(pipe, RULES)
    pipe.save_pretrained(tmp_path / "packed")
    again = DiffusionPipeline.from_pretrained(tmp_path / "packed", dtype=dtype)
    reference = other.components[name]
    for layer in list_block_layers(reference):
        weight = reference.get_submodule(layer).weight
        weight.data = again.components[name].get_submodule(layer).dequantize(weight.dtype)
    expected = compute_hidden_states(other, name, tiny.PROMPTS)
    assert expected.isfinite().all()
    assert compute_hidden_states(pipe, name, tiny.PROMPTS).equal(expected)
    assert compute_hidden_states(again, name, tiny.PROMPTS).equal(expected)
    assert have_equal_states(encoder, again.components[name])


def test_a_pipeline_draws_the_same_images(pixart_folder: Path, packed_folder: Path):
    pipe = DiffusionPipeline.from_pretrained(pixart_folder)
    before = draw_image(pipe)
    quantize_text_encoder_(pipe, RULES)
    loaded = DiffusionPipeline.from_pretrained(packed_folder)
    assert isinstance(loaded.text_encoder.encoder.block[0].layer[1].DenseReluDense.wo, PackedLinear)
    assert draw_image(loaded).equal(draw_image(pipe))
    assert not draw_image(loaded).equal(before)


def test_importing_fp4dit_is_enough(packed_folder: Path):
    """Import fp4dit before transformers; this file imports it after."""
    code = (
        "import fp4dit; from transformers import T5EncoderModel as T; "
        f"encoder = T.from_pretrained({str(packed_folder / 'text_encoder')!r}).encoder; "
        "print(type(encoder.block[0].layer[0].SelfAttention.q))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "PackedLinear" in process.stdout, process.stderr


def test_ties_and_fp32_layers_are_kept(packed_folder: Path):
    encoder = load_encoder(packed_folder, dtype=torch.float16)
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    block: Any = encoder.encoder.block[0]
    assert encoder.dtype == torch.float16
    assert block.layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert block.layer[1].DenseReluDense.wi.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_do_not_change_packed_tensors(packed_folder: Path, dtype: torch.dtype):
    encoder = load_encoder(packed_folder)
    before, cast = (
        encoder.state_dict(),
        [load_encoder(packed_folder, dtype=dtype), load_encoder(packed_folder).to(dtype)],
    )
    for model in cast:
        for name, value in model.state_dict().items():
            packed = before[name].dtype == torch.uint8
            assert value.equal(before[name] if packed else before[name].to(dtype))
        difference = run_encoder(model).float() - run_encoder(encoder)
        assert difference.norm() < 0.02 * run_encoder(encoder).norm()


def test_sharded_and_saved_again(packed_folder: Path, tmp_path: Path):
    encoder = load_encoder(packed_folder)
    encoder.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = T5EncoderModel.from_pretrained(tmp_path)
    assert have_equal_states(encoder, again)
    again.save_pretrained(tmp_path)  # over files that it may have been read from
    again.save_pretrained(tmp_path)
    assert have_equal_states(encoder, T5EncoderModel.from_pretrained(tmp_path))
    assert run_encoder(again).equal(run_encoder(encoder))


def test_device_map(packed_folder: Path):
    assert run_encoder(load_encoder(packed_folder, device_map={"": "cpu"})).equal(
        run_encoder(load_encoder(packed_folder))
    )


def copy_encoder(packed_folder: Path, out: Path) -> Path:
    """Copy the files of the text encoder, and return the path of its tensors."""
    load_encoder(packed_folder).save_pretrained(out)
    return out / "model.safetensors"


def test_changed_bytes_are_refused(packed_folder: Path, tmp_path: Path):
    path = copy_encoder(packed_folder, tmp_path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is not what was written"):
        T5EncoderModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"), [({"version": 99}, "version 99"), ({"weights": []}, "is not what was")]
)
def test_changed_configs_are_refused(
    packed_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
):
    path = copy_encoder(packed_folder, tmp_path).with_name("config.json")
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        T5EncoderModel.from_pretrained(tmp_path)


def test_a_packed_config_does_not_quantize(pixart_folder: Path, packed_folder: Path):
    config = json.loads((packed_folder / "text_encoder" / "config.json").read_text())[
        "quantization_config"
    ]
    with pytest.raises(UserError, match=r"fp4dit\.QuantizationConfig\(method\)"):
        load_encoder(pixart_folder, quantization_config=TransformersPackedConfig(**config))


def test_report_of_sizes(pixart_folder: Path, packed_folder: Path):
    pipe = DiffusionPipeline.from_pretrained(pixart_folder)
    report = pack_text_encoder_(pipe, RULES, tiny.PROMPTS)
    layers = [layer for layer in pipe.text_encoder.modules() if isinstance(layer, PackedLinear)]
    packed, values = (
        sum(sum(v.nbytes for v in own.packed_buffers.values()) for own in layers),
        sum(e.values for e in report.layers),
    )
    assert len(layers) == len(report.layers) == 6
    assert packed / (2 * values) == (4 + 16 / 32) / 16 < 0.3
    parameters = sum(p.numel() for p in pipe.text_encoder.parameters())
    assert report.bytes == packed + 4 * parameters
    assert report.bytes16 == 2 * (parameters + values)
    header = 20_000  # with the hashes
    assert (
        report.bytes
        < (packed_folder / "text_encoder" / "model.safetensors").stat().st_size
        < report.bytes + header
    )
    assert (report.name, report.kind, report.prompts) == (
        "text_encoder",
        "T5EncoderModel",
        len(tiny.PROMPTS),
    )
    assert 0.02 < report.error < 0.3


def test_the_largest_encoder_is_packed(tmp_path: Path):
    tiny.save_flux(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    sizes = {name: sum(p.numel() for p in pipe.components[name].parameters()) for name in TWO}
    before = {name: compute_hidden_states(pipe, name, tiny.PROMPTS) for name in TWO}
    report = pack_text_encoder_(pipe, RULES, tiny.PROMPTS)
    assert report.name == max(TWO, key=sizes.__getitem__)
    for name in TWO:
        assert compute_hidden_states(pipe, name, tiny.PROMPTS).equal(before[name]) == (
            name != report.name
        )


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("*.wq", E2M1), *RULES], "no layer is left for the rule '\\*.wq'"),
        (tiny.rules_for(E2M1, transforms=[Hadamard(16)]), "is not calibrated"),
        (tiny.rules_for(E2M1, timestep_boundaries=[500]), "is not calibrated"),
        (
            tiny.rules_for(Quantizer(floating(2, 1), PerGroup(48))),
            "encoder.block.0.layer.0.SelfAttention.q",
        ),
        ([Rule("*", None)], "no layer of the text encoder is quantized"),
    ],
)
def test_refused_rules_change_nothing(pixart_folder: Path, rules: list[Rule], message: str):
    pipe = DiffusionPipeline.from_pretrained(pixart_folder)
    with pytest.raises(UserError, match=message):
        quantize_text_encoder_(pipe, rules)
    assert have_equal_states(
        pipe.text_encoder, DiffusionPipeline.from_pretrained(pixart_folder).text_encoder
    )
    assert type(pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q) is nn.Linear


def test_the_stage_refuses_before_it_runs(composed: Compose, tmp_path: Path):
    file = tmp_path / "a.safetensors"
    file.touch()
    config = composed("text_encoder=e2m1_g64", f"+model.embeddings={file}", "targets=[export]")
    with pytest.raises(UserError, match=r"model\.embeddings"):
        make_plan(config)["export"].instantiate_stage().check()


def test_pipelines_without_a_text_encoder(pixart_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"model\.embeddings"):
        PixArt(str(pixart_folder), embeddings="a.safetensors").check_text_encoder()
    tiny.save_dit(tmp_path)
    with pytest.raises(UserError, match="no text encoder"):
        DiT(str(tmp_path)).check_text_encoder()
    with pytest.raises(UserError, match="no text encoder"):
        quantize_text_encoder_(DiffusionPipeline.from_pretrained(tmp_path), RULES)
    PixArt(str(pixart_folder)).check_text_encoder()
    DiT("org/on-the-hub").check_text_encoder()
