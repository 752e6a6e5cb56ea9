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

from fp4dit.errors import UserError
from fp4dit.formats import floating, fp16
from fp4dit.hadamard import Hadamard
from fp4dit.models.dit import DiT
from fp4dit.models.pixart import PixArt
from fp4dit.packed.export import hidden_states, in_blocks, largest_encoder, pack_text_encoder_, quantize_text_encoder_
from fp4dit.packed.layer import PackedLinear
from fp4dit.packed.text import PackedTextConfig
from fp4dit.policy import Rule, everywhere
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import AbsMax
from pipelines.plan import plan
from tests import tiny
from tests.conftest import Compose
from tests.test_hub import draw

E2M1 = Quantizer(floating(2, 1), Granularity("group", 32), AbsMax(fp16))
RULES = everywhere(E2M1)
TWO = ("text_encoder", "text_encoder_2")
IDS = torch.tensor([[1, 5, 3, 8], [2, 2, 9, 4]])


@pytest.fixture(scope="module")
def folder(pixart_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    pipe = DiffusionPipeline.from_pretrained(pixart_folder)
    quantize_text_encoder_(pipe, RULES)
    pipe.save_pretrained(out)
    return out


@torch.no_grad()
def states(encoder: Any) -> torch.Tensor:
    return encoder(IDS).last_hidden_state


def encoder_of(folder: Path, **options: Any) -> T5EncoderModel:
    return T5EncoderModel.from_pretrained(folder / "text_encoder", **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    state, found = one.state_dict(), other.state_dict()
    return state.keys() == found.keys() and all(found[name].equal(value) for name, value in state.items())


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
def test_hidden_states_are_those_that_were_saved(save: Callable[[Path], None], dtype: torch.dtype, tmp_path: Path):
    """T5, BERT, CLIP and Gemma; compared with the original whose weights are what the packed ones stand for."""
    save(tmp_path / "plain")
    pipe, other = (DiffusionPipeline.from_pretrained(tmp_path / "plain", dtype=dtype) for _ in range(2))
    name, encoder = largest_encoder(pipe)
    quantize_text_encoder_(pipe, RULES)
    pipe.save_pretrained(tmp_path / "packed")
    again = DiffusionPipeline.from_pretrained(tmp_path / "packed", dtype=dtype)
    reference = other.components[name]
    for layer in in_blocks(reference):
        weight = reference.get_submodule(layer).weight
        weight.data = again.components[name].get_submodule(layer).dense(weight.dtype)
    expected = hidden_states(other, name, tiny.PROMPTS)
    assert expected.isfinite().all()
    assert hidden_states(pipe, name, tiny.PROMPTS).equal(expected)
    assert hidden_states(again, name, tiny.PROMPTS).equal(expected)
    assert same(encoder, again.components[name])


def test_a_whole_pipeline_draws_as_it_did(pixart_folder: Path, folder: Path):
    pipe = DiffusionPipeline.from_pretrained(pixart_folder)
    before = draw(pipe)
    quantize_text_encoder_(pipe, RULES)
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(loaded.text_encoder.encoder.block[0].layer[1].DenseReluDense.wo, PackedLinear)
    assert draw(loaded).equal(draw(pipe))
    assert not draw(loaded).equal(before)


def test_importing_fp4dit_is_enough(folder: Path):
    """Before transformers and without diffusers; this file imports them the other way round."""
    code = (
        "import fp4dit; from transformers import T5EncoderModel as T; "
        f"print(type(T.from_pretrained({str(folder / 'text_encoder')!r}).encoder.block[0].layer[0].SelfAttention.q))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "PackedLinear" in done.stdout, done.stderr


def test_embeddings_stay_tied_and_what_is_kept_in_fp32_stays_so(folder: Path):
    encoder = encoder_of(folder, dtype=torch.float16)
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    block: Any = encoder.encoder.block[0]
    assert encoder.dtype == torch.float16
    assert block.layer[1].DenseReluDense.wo.weight.dtype == torch.float32
    assert block.layer[1].DenseReluDense.wi.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_cast_touches_what_is_packed(folder: Path, dtype: torch.dtype):
    encoder = encoder_of(folder)
    before, cast = encoder.state_dict(), [encoder_of(folder, dtype=dtype), encoder_of(folder).to(dtype)]
    for model in cast:
        for name, value in model.state_dict().items():
            packed = before[name].dtype == torch.uint8
            assert value.equal(before[name] if packed else before[name].to(dtype))
        difference = states(model).float() - states(encoder)
        assert difference.norm() < 0.02 * states(encoder).norm()


def test_sharded_and_saved_again(folder: Path, tmp_path: Path):
    encoder = encoder_of(folder)
    encoder.save_pretrained(tmp_path, max_shard_size="2KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = T5EncoderModel.from_pretrained(tmp_path)
    assert same(encoder, again)
    again.save_pretrained(tmp_path)  # over files that it may have been read from
    again.save_pretrained(tmp_path)
    assert same(encoder, T5EncoderModel.from_pretrained(tmp_path))
    assert states(again).equal(states(encoder))


def test_a_device_map(folder: Path):
    assert states(encoder_of(folder, device_map={"": "cpu"})).equal(states(encoder_of(folder)))


def copied(folder: Path, out: Path) -> Path:
    """The text encoder's files, to be changed; the one with the tensors."""
    encoder_of(folder).save_pretrained(out)
    return out / "model.safetensors"


def test_a_changed_byte_is_refused(folder: Path, tmp_path: Path):
    path = copied(folder, tmp_path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is not what was written"):
        T5EncoderModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("change", "message"), [({"version": 99}, "version 99"), ({"weights": []}, "is not what was")])
def test_a_changed_config_is_refused(folder: Path, tmp_path: Path, change: dict[str, Any], message: str):
    path = copied(folder, tmp_path).with_name("config.json")
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        T5EncoderModel.from_pretrained(tmp_path)


def test_it_is_not_quantized_while_it_is_loaded(pixart_folder: Path, folder: Path):
    config = json.loads((folder / "text_encoder" / "config.json").read_text())["quantization_config"]
    with pytest.raises(UserError, match=r"targets=\[export\]"):
        encoder_of(pixart_folder, quantization_config=PackedTextConfig(**config))


def test_size(pixart_folder: Path, folder: Path):
    pipe = DiffusionPipeline.from_pretrained(pixart_folder)
    report = pack_text_encoder_(pipe, RULES, tiny.PROMPTS)
    layers = [layer for layer in pipe.text_encoder.modules() if isinstance(layer, PackedLinear)]
    packed, values = (
        sum(sum(v.nbytes for v in own.held.values()) for own in layers),
        sum(e.values for e in report.layers),
    )
    assert len(layers) == len(report.layers) == 6
    assert packed / (2 * values) == (4 + 16 / 32) / 16 < 0.3
    parameters = sum(p.numel() for p in pipe.text_encoder.parameters())
    assert report.bytes == packed + 4 * parameters
    assert report.bytes16 == 2 * (parameters + values)
    header = 20_000  # with the hashes
    assert report.bytes < (folder / "text_encoder" / "model.safetensors").stat().st_size < report.bytes + header
    assert (report.name, report.kind, report.prompts) == ("text_encoder", "T5EncoderModel", len(tiny.PROMPTS))
    assert 0.02 < report.error < 0.3


def test_the_largest_is_chosen_and_the_others_stay(tmp_path: Path):
    tiny.save_flux(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    sizes = {name: sum(p.numel() for p in pipe.components[name].parameters()) for name in TWO}
    before = {name: hidden_states(pipe, name, tiny.PROMPTS) for name in TWO}
    report = pack_text_encoder_(pipe, RULES, tiny.PROMPTS)
    assert report.name == max(TWO, key=sizes.__getitem__)
    for name in TWO:
        assert hidden_states(pipe, name, tiny.PROMPTS).equal(before[name]) == (name != report.name)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("*.wq", E2M1), *RULES], "no layer is left for the rule '\\*.wq'"),
        (everywhere(E2M1, transforms=[Hadamard(16)]), "is not calibrated"),
        (everywhere(E2M1, ranges=[500]), "is not calibrated"),
        (everywhere(Quantizer(floating(2, 1), Granularity("group", 48))), "encoder.block.0.layer.0.SelfAttention.q"),
        ([Rule("*", None)], "no layer of the text encoder is quantized"),
    ],
)
def test_rules_that_cannot_be_followed_change_nothing(pixart_folder: Path, rules: list[Rule], message: str):
    pipe = DiffusionPipeline.from_pretrained(pixart_folder)
    with pytest.raises(UserError, match=message):
        quantize_text_encoder_(pipe, rules)
    assert same(pipe.text_encoder, DiffusionPipeline.from_pretrained(pixart_folder).text_encoder)
    assert type(pipe.text_encoder.encoder.block[0].layer[0].SelfAttention.q) is nn.Linear


def test_the_stage_refuses_before_any_work(composed: Compose, tmp_path: Path):
    file = tmp_path / "a.safetensors"
    file.touch()
    config = composed("text_encoder=e2m1", f"+model.embeddings={file}", "targets=[export]")
    with pytest.raises(UserError, match=r"model\.embeddings"):
        plan(config)["export"].make().check()


def test_without_a_text_encoder(pixart_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"model\.embeddings"):
        PixArt(str(pixart_folder), embeddings="a.safetensors").check_text_encoder()
    tiny.save_dit(tmp_path)
    with pytest.raises(UserError, match="no text encoder"):
        DiT(str(tmp_path)).check_text_encoder()
    with pytest.raises(UserError, match="no text encoder"):
        quantize_text_encoder_(DiffusionPipeline.from_pretrained(tmp_path), RULES)
    PixArt(str(pixart_folder)).check_text_encoder()
    DiT("org/on-the-hub").check_text_encoder()
