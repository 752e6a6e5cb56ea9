"""Rules, what is refused, and the audit."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fp4dit.models.pixart import PixArt, PixArtAdapter
from fp4dit.numerics.format_selection import FormatSelection, LeastError
from fp4dit.numerics.formats import floating, fp16, integer
from fp4dit.numerics.quantizer import (
    PerChannel,
    PerGroup,
    PerInputChannel,
    PerTensor,
    PerToken,
    Quantizer,
)
from fp4dit.numerics.rounding import StochasticRounding
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.numerics.scale_search import PreShift
from fp4dit.numerics.shared_mantissa import SharedMantissa
from fp4dit.quantization.apply import check_activations, quantize_activations_, quantize_weights_
from fp4dit.quantization.audit import audit_weights, checkpoint_bytes, effective_bits
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantConv, QuantLayer
from fp4dit.quantization.observers import (
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    SampleObserver,
)
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.rounding.adaround import adaround, adaround_scale_aware
from fp4dit.rounding.base import RoundingMethod
from fp4dit.rounding.imatrix import ImportanceMatrix
from fp4dit.rounding.layerwise import LayerwiseReconstruction
from fp4dit.rounding.learned_range import round_scale_to_format
from fp4dit.rounding.output_search import OutputSearch
from fp4dit.rounding.reconstruction import check_reconstruction
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.rounding.signround import SignRound
from fp4dit.transforms.base import TransformSpec
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.transforms.low_rank import LowRank
from fp4dit.transforms.smoothing import Smoothing
from fp4dit.utils.errors import UserError
from tests.helpers import tiny

E2M1, E3M0 = floating(2, 1), floating(3, 0)
GROUP = Quantizer(E2M1, PerGroup(32), AbsMax(fp16))
ROW = Quantizer(E3M0, PerChannel(), AbsMax(fp16))
TOKEN = Quantizer(integer(8), PerToken())
TENSOR = Quantizer(integer(8, signed=False), PerTensor(), MinMax())
PATCH = Rule("pos_embed.proj", ROW)


def test_first_match_wins():
    rules = [Rule("a.x", ROW), Rule("a.*", None), Rule("*", GROUP)]
    chosen = assign_rules(["a.x", "a.y", "b.x"], rules)
    assert chosen == dict(zip(["a.x", "a.y", "b.x"], rules, strict=True))
    assert assign_rules(["a", "b"], [Rule("a", ROW)]).keys() == {"a"}


@pytest.mark.parametrize(
    "idle",
    [
        [Rule("blocks.*", ROW)],
        [Rule("*", GROUP), Rule("a.x", ROW)],
        [Rule("a.*", None), Rule("a.x", ROW)],
    ],
    ids=["no such name", "hidden by *", "hidden by an exception"],
)
def test_an_idle_rule_is_an_error_that_shows_names(idle: list[Rule]):
    with pytest.raises(UserError, match=rf"rule {re.escape(repr(idle[-1].match))}.*'a\.x', 'b\.x'"):
        assign_rules(["a.x", "b.x"], idle)


def test_nothing_quantized_is_an_error(source: PixArt):
    for rules in ([], [Rule("*", None)]):
        with pytest.raises(UserError, match="no layer is quantized"):
            audit_weights(source.build_on_meta().transformer, rules)


def test_a_group_that_does_not_divide_names_layer_and_rule(source: PixArt):
    with pytest.raises(
        UserError, match=r"pos_embed\.proj \(rule '\*'\): a group of 32 does not divide a row of 16"
    ):
        audit_weights(source.build_on_meta().transformer, [Rule("*", GROUP)])


def test_audit_of_the_skeleton_in_closed_form(source: PixArt):
    """Nothing is loaded, and the audit is that of the model itself."""
    rules = [PATCH, Rule("*.ff.net.0.proj", ROW), Rule("proj_out", None), Rule("*", GROUP)]
    skeleton = source.build_on_meta().transformer
    assert all(p.is_meta for p in skeleton.parameters())
    audit = {e.name: e for e in audit_weights(skeleton, rules)}
    assert audit.keys() == find_layers(skeleton).keys()
    assert (
        len(audit) == 1 + 3 + 2 + 2 * 10 + 1
    )  # patch, adaLN, caption, (2 x 4 attention + 2 FFN) a block, out
    patch, ff, out = (
        audit["pos_embed.proj"],
        audit["transformer_blocks.1.ff.net.0.proj"],
        audit["proj_out"],
    )
    query = audit["transformer_blocks.0.attn1.to_q"]
    assert (patch.bits, patch.values, patch.format) == (4 + 16 / 16, 32 * 16, "e3m0")
    assert (ff.bits, ff.values, ff.rule) == (4 + 16 / 32, 32 * 128, "*.ff.net.0.proj")
    assert (query.bits, query.values, query.format) == (4 + 16 / 32, 32 * 32, "e2m1")
    assert (out.bits, out.values, out.format) == (16, 32 * 32, "fp16")
    assert audit_weights(source.load().transformer, rules) == list(audit.values())


def test_effective_bits_and_checkpoint_size_in_closed_form():
    model = nn.Sequential(nn.Linear(32, 10), nn.Linear(10, 4, bias=False), nn.LayerNorm(4))
    audit = audit_weights(model, [Rule("0", GROUP)])
    assert effective_bits(audit) == (320 * 4.5 + 40 * 16) / 360
    assert checkpoint_bytes(model, audit) == (320 * 4.5 + 40 * 16 + (10 + 8) * 16) / 8
    quantize_weights_(model, assign_rules(find_layers(model), [Rule("0", GROUP)]))
    assert checkpoint_bytes(model, audit) == (320 * 4.5 + 40 * 16 + (10 + 8) * 16) / 8


def test_quantizing_wraps_what_the_audit_names(pipeline: PixArtAdapter):
    rules = [PATCH, Rule("proj_out", None), Rule("*", GROUP)]
    expected = [e.name for e in audit_weights(pipeline.transformer, rules) if e.format != "fp16"]
    layers = quantize_weights_(
        pipeline.transformer, assign_rules(find_layers(pipeline.transformer), rules)
    )
    wrapped = [
        name
        for name, module in pipeline.transformer.named_modules()
        if isinstance(module, QuantLayer)
    ]
    assert wrapped == list(layers) == expected
    assert isinstance(pipeline.transformer.pos_embed.proj, QuantConv)
    assert type(pipeline.transformer.proj_out) is nn.Linear
    assert find_layers(pipeline.transformer).keys() == find_layers(tiny.transformer()).keys()


def test_a_damaged_weight_names_its_layer(pipeline: PixArtAdapter):
    pipeline.transformer.transformer_blocks[1].attn2.to_k.weight[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"transformer_blocks\.1\.attn2\.to_k holds NaN"):
        quantize_weights_(
            pipeline.transformer, assign_rules(find_layers(pipeline.transformer), tiny.rules())
        )


@pytest.fixture
def quantized(pipeline: PixArtAdapter) -> nn.Module:
    quantize_weights_(
        pipeline.transformer, assign_rules(find_layers(pipeline.transformer), tiny.rules())
    )
    return pipeline.transformer


def test_activations_of_layers_and_attention_operands(quantized: nn.Module):
    quantizers, rules = quantize_activations_(
        quantized,
        [
            Rule("*.attn2.?", None),
            Rule("*.attn1.v", TENSOR, observer=SampleObserver(8)),
            Rule("*", TOKEN),
        ],
    )
    assert len(quantizers) == 27 + 2 * 3
    assert quantizers.keys() == rules.keys()
    assert {name for name, m in quantizers.items() if m.quantizer == TENSOR} == {
        f"transformer_blocks.{i}.attn1.v" for i in (0, 1)
    }
    assert isinstance(
        quantized.get_submodule("transformer_blocks.0.attn1.processor.q"), FakeQuantize
    )
    assert isinstance(
        quantized.get_submodule("transformer_blocks.0.attn2.processor.q"), nn.Identity
    )
    assert all(
        quantized.get_submodule(n).input_fake_quant is m
        for n, m in quantizers.items()
        if n[-2:] not in (".q", ".k", ".v")
    )


def test_no_activation_rules_change_no_bit(quantized: nn.Module):
    arguments = {
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "timestep": torch.tensor([3, 3]),
        "return_dict": False,
    }
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        before = quantized(x, **arguments)[0]
        assert quantize_activations_(quantized, []) == ({}, {})
        assert torch.equal(quantized(x, **arguments)[0], before)


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        ([Rule("*", TOKEN, observer=SampleObserver(8))], r"'\*' is static.*granularity: tensor"),
        (
            [Rule("*", TENSOR, per_timestep=True)],
            r"'\*' has scales per timestep, so it must be static: give it an observer",
        ),
        (
            [Rule("*", Quantizer(E2M1, PerInputChannel()), observer=PerChannelMinMaxObserver())],
            r"'\*' asks for scales per input channel, and AbsMax.* does not .*pre_shift",
        ),
        (
            [
                Rule(
                    "*",
                    Quantizer(E2M1, PerInputChannel(), PreShift(3)),
                    observer=MovingAverageMinMaxObserver(),
                )
            ],
            r"'\*' asks for scales per input channel.* records: use observer: {kind: channel_r",
        ),
        (
            [Rule("*", Quantizer(SharedMantissa(floating(2, 2), 3, "error"), PerChannel()))],
            r"pos_embed\.proj \(rule '\*'\): groups of 3 values do not divide a row or block of 16",
        ),
        ([Rule("*", None)], "no activation is quantized"),
        (
            [Rule("transformer_blocks.9.*", TOKEN)],
            r"no layer is left for the rule 'transformer_blocks\.9\.\*'",
        ),
        (
            [Rule("*", Quantizer(E2M1, PerGroup(32)))],
            r"pos_embed\.proj \(rule '\*'\): a group of 32 does not divide a row of 16",
        ),
    ],
    ids=[
        "static token-wise",
        "per timestep, dynamic",
        "channels by rows",
        "channels of no channels",
        "sharing",
        "nothing",
        "idle",
        "dividing",
    ],
)
def test_bad_activation_rules_are_found_on_the_skeleton(
    source: PixArt, activations: list[Rule], message: str
):
    with pytest.raises(UserError, match=message):
        check_activations(source.build_on_meta().transformer, tiny.rules(), activations)


def test_scales_per_channel_pass_with_what_makes_them(source: PixArt):
    shifted = Quantizer(FormatSelection([E2M1, E3M0], LeastError()), PerInputChannel(), PreShift(3))
    rules = [Rule("*", shifted, observer=PerChannelMinMaxObserver())]
    assert check_activations(source.build_on_meta().transformer, tiny.rules(), rules) is None


@pytest.mark.parametrize("quantizer", [TOKEN, Quantizer(E2M1, PerGroup(16)), TENSOR], ids=str)
def test_good_activation_rules_pass_on_the_skeleton(source: PixArt, quantizer: Quantizer):
    skeleton: Callable[[], nn.Module] = lambda: source.build_on_meta().transformer
    assert check_activations(skeleton(), tiny.rules(), [Rule("*", quantizer)]) is None


def test_the_audit_counts_what_transforms_keep(source: PixArt):
    """16 bits for each number of a branch and each divisor; a rotation is made from its seed."""
    rules = tiny.rules_for(
        GROUP,
        per_channel_layers=["pos_embed.proj"],
        transforms=[Smoothing(), Hadamard(), LowRank(2)],
    )
    audit = {e.name: e for e in audit_weights(source.build_on_meta().transformer, rules)}
    ff = audit["transformer_blocks.1.ff.net.0.proj"]
    out, k = 128, 32
    assert ff.bits == pytest.approx(4 + 16 / 32 + 16 * (k + 2 * (out + k)) / (out * k))
    assert audit["pos_embed.proj"].bits == 4 + 16 / 16


SHARED = SharedMantissa(floating(2, 2), 4)
BAD_WEIGHTS = {
    "rotation": (
        GROUP,
        [Hadamard(24)],
        r"attn1.*no Hadamard rotation of size 24 fits rows of 32 values: use one of",
    ),
    "sharing": (
        Quantizer(SharedMantissa(floating(2, 2), 3, "error"), PerChannel()),
        [],
        r"groups of 3 values do not divide",
    ),
    "grouping": (
        Quantizer(E2M1, PerGroup(48)),
        [],
        r"a group of 48 does not divide a row of 32",
    ),
}


@pytest.mark.parametrize(
    ("quantizer", "chain", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys()
)
def test_weights_that_cannot_be_are_found_on_the_skeleton(
    source: PixArt, quantizer: Quantizer, chain: list[TransformSpec], message: str
):
    rules = [PATCH, Rule("*attn1*", quantizer, chain), Rule("*", GROUP)]
    with pytest.raises(UserError, match=message):
        audit_weights(source.build_on_meta().transformer, rules)


def test_what_cannot_be_quantized_is_named_with_the_remedy():
    model = nn.ModuleDict(
        {"mix": nn.Linear(32, 32), "depth": nn.Conv2d(32, 32, 3, padding=1, groups=32)}
    )
    message = r"^depth \(rule '\*'\): a convolution can .* \+weight\.ignore=\[\.\.\.\] leaves"
    with pytest.raises(UserError, match=message):
        audit_weights(model, [Rule("*", ROW)])
    entries = audit_weights(model, [Rule("depth", None), Rule("*", ROW)])
    assert [(entry.name, entry.format) for entry in entries] == [
        ("mix", ROW.format.name),
        ("depth", "fp16"),
    ]


def test_an_optional_rule_without_layers_is_a_warning(
    source: PixArt, caplog: pytest.LogCaptureFixture
):
    skeleton = source.build_on_meta().transformer
    check_reconstruction(
        skeleton,
        tiny.rules_for(
            ROW, per_channel_layers=["pos_embed.proj", "*.atn1.to_q"], ignore=["pos_embed.proj"]
        ),
        RoundToNearest(),
    )
    assert [record.getMessage() for record in caplog.records] == [
        "no layer of this model is called *.atn1.to_q, which an optional rule names"
    ]


def test_one_format_of_a_choice_cannot_cost_more_than_another():
    with pytest.raises(ValueError, match=r"same number of bits: e2m1 has 4, e2m3 has 6"):
        FormatSelection([E2M1, floating(2, 3)], LeastError())


def learns(learner: Callable) -> RoundingMethod:
    return tiny.learned_rounding(learner, steps=1)


BLOCKWISE = FormatSelection([E2M1, E3M0], LeastError(), per="block")
BAD_FITS = {
    "learned": (
        SHARED,
        learns(adaround_scale_aware),
        r"this rounding .* e2m2_share4 shares a bit .*: choose rounding=nearest",
    ),
    "layer by layer": (
        SHARED,
        LayerwiseReconstruction(learns(adaround)),
        r"this rounding .* e2m2_share4 shares",
    ),
    "weighed, then learned": (
        SHARED,
        ImportanceMatrix(learns(adaround)),
        r"this rounding .* e2m2_share4 shares",
    ),
    "at random": (SHARED, RoundToNearest(StochasticRounding()), r"e2m2_share4 shares a bit"),
    "searched": (
        BLOCKWISE,
        OutputSearch(),
        r"one format for a layer, and e2m1\|e3m0 is selected per block: select it per tens",
    ),
}


@pytest.mark.parametrize(("fmt", "fit", "message"), BAD_FITS.values(), ids=BAD_FITS.keys())
def test_a_format_that_a_method_cannot_round_is_found_early(
    source: PixArt, fmt: SharedMantissa, fit: RoundingMethod, message: str
):
    with pytest.raises(ValueError, match=message):
        check_reconstruction(
            source.build_on_meta().transformer,
            [PATCH, Rule("*", Quantizer(fmt, PerChannel()))],
            fit,
        )


GOOD_FITS = {
    "shared, nearest": (SHARED, RoundToNearest()),
    "shared, shifted": (SHARED, learns(SignRound)),
    "blockwise, learned": (BLOCKWISE, learns(adaround_scale_aware)),
    "unsigned, at random": (integer(4, signed=False), RoundToNearest(StochasticRounding())),
    "drawn in": (
        E2M1,
        learns(lambda *arguments: SignRound(*arguments, scale_rounding=round_scale_to_format)),
    ),
}


@pytest.mark.parametrize(("fmt", "fit"), GOOD_FITS.values(), ids=GOOD_FITS.keys())
def test_fits_that_can_round_pass_on_the_skeleton(
    source: PixArt, fmt: SharedMantissa, fit: RoundingMethod
):
    assert (
        check_reconstruction(
            source.build_on_meta().transformer,
            [PATCH, Rule("*", Quantizer(fmt, PerChannel()))],
            fit,
        )
        is None
    )


def test_timed_activations_and_learnt_weights_clash(source: PixArt):
    timed = [Rule("*", TENSOR, observer=SampleObserver(8), per_timestep=True)]
    assert check_activations(source.build_on_meta().transformer, tiny.rules(), timed) is None
    with pytest.raises(
        UserError,
        match=r"'\*' has scales per timestep, .*quantize_inputs_while_rounding=null",
    ):
        check_reconstruction(
            source.build_on_meta().transformer, tiny.rules(), RoundToNearest(), timed
        )
