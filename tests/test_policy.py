"""Rules, what is refused, and the audit."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fp4dit import policy
from fp4dit.ams import SharedMantissa
from fp4dit.choice import Choice, LeastError
from fp4dit.errors import UserError
from fp4dit.formats import floating, fp16, integer
from fp4dit.grid import Grid
from fp4dit.hadamard import Hadamard
from fp4dit.layer import QuantConv, QuantLayer
from fp4dit.models.pixart import PixArt, PixArtPipeline
from fp4dit.observers import ChannelRange, MovingRange, Sample
from fp4dit.policy import Rule, everywhere
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.reconstruction import check
from fp4dit.rounding import Stochastic, logit, ulp
from fp4dit.scales import AbsMax, MinMax, PreShift
from fp4dit.signround import SignRound, in_format
from fp4dit.tasks.reconstruct import Fit, Layerwise, Rounded
from fp4dit.tasks.search import OutputSearch, Weighed
from fp4dit.transforms import Balance, LowRank, TransformSpec
from tests import tiny

E2M1, E3M0 = floating(2, 1), floating(3, 0)
GROUP = Quantizer(E2M1, Granularity("group", 32), AbsMax(fp16))
ROW = Quantizer(E3M0, Granularity("row"), AbsMax(fp16))
TOKEN = Quantizer(integer(8), Granularity("row"))
TENSOR = Quantizer(integer(8, signed=False), Granularity("tensor"), MinMax())
PATCH = Rule("pos_embed.proj", ROW)


def test_first_match_wins():
    rules = [Rule("a.x", ROW), Rule("a.*", None), Rule("*", GROUP)]
    chosen = policy.assign(["a.x", "a.y", "b.x"], rules)
    assert chosen == dict(zip(["a.x", "a.y", "b.x"], rules, strict=True))
    assert policy.assign(["a", "b"], [Rule("a", ROW)]).keys() == {"a"}


@pytest.mark.parametrize(
    "idle",
    [[Rule("blocks.*", ROW)], [Rule("*", GROUP), Rule("a.x", ROW)], [Rule("a.*", None), Rule("a.x", ROW)]],
    ids=["no such name", "hidden by *", "hidden by an exception"],
)
def test_an_idle_rule_is_an_error_that_shows_names(idle: list[Rule]):
    with pytest.raises(UserError, match=rf"rule {re.escape(repr(idle[-1].match))}.*'a\.x', 'b\.x'"):
        policy.assign(["a.x", "b.x"], idle)


def test_nothing_quantized_is_an_error(source: PixArt):
    for rules in ([], [Rule("*", None)]):
        with pytest.raises(UserError, match="no layer is quantized"):
            policy.check_weights(source.skeleton().dit, rules)


def test_a_group_that_does_not_divide_names_the_layer_and_the_rule(source: PixArt):
    with pytest.raises(UserError, match=r"pos_embed\.proj \(rule '\*'\): a group of 32 does not divide a row of 16"):
        policy.check_weights(source.skeleton().dit, [Rule("*", GROUP)])


def test_audit_of_the_skeleton_in_closed_form(source: PixArt):
    """Nothing is loaded, and the audit is that of the model itself."""
    rules = [PATCH, Rule("*.ff.net.0.proj", ROW), Rule("proj_out", None), Rule("*", GROUP)]
    skeleton = source.skeleton().dit
    assert all(p.is_meta for p in skeleton.parameters())
    audit = {e.name: e for e in policy.check_weights(skeleton, rules)}
    assert audit.keys() == policy.layers(skeleton).keys()
    assert len(audit) == 1 + 3 + 2 + 2 * 10 + 1  # patch, adaLN, caption, (2 x 4 attention + 2 FFN) a block, out
    patch, ff, out = audit["pos_embed.proj"], audit["transformer_blocks.1.ff.net.0.proj"], audit["proj_out"]
    query = audit["transformer_blocks.0.attn1.to_q"]
    assert (patch.bits, patch.values, patch.format) == (4 + 16 / 16, 32 * 16, "e3m0")
    assert (ff.bits, ff.values, ff.rule) == (4 + 16 / 32, 32 * 128, "*.ff.net.0.proj")
    assert (query.bits, query.values, query.format) == (4 + 16 / 32, 32 * 32, "e2m1")
    assert (out.bits, out.values, out.format) == (16, 32 * 32, "fp16")
    assert policy.check_weights(source.load().dit, rules) == list(audit.values())


def test_effective_bits_and_checkpoint_size_in_closed_form():
    model = nn.Sequential(nn.Linear(32, 10), nn.Linear(10, 4, bias=False), nn.LayerNorm(4))
    audit = policy.check_weights(model, [Rule("0", GROUP)])
    assert policy.effective_bits(audit) == (320 * 4.5 + 40 * 16) / 360
    assert policy.checkpoint_bytes(model, audit) == (320 * 4.5 + 40 * 16 + (10 + 8) * 16) / 8
    policy.quantize_weights_(model, policy.assign(policy.layers(model), [Rule("0", GROUP)]))
    assert policy.checkpoint_bytes(model, audit) == (320 * 4.5 + 40 * 16 + (10 + 8) * 16) / 8


def test_quantizing_wraps_what_the_audit_names(pipeline: PixArtPipeline):
    rules = [PATCH, Rule("proj_out", None), Rule("*", GROUP)]
    expected = [e.name for e in policy.check_weights(pipeline.dit, rules) if e.format != "fp16"]
    made = policy.quantize_weights_(pipeline.dit, policy.assign(policy.layers(pipeline.dit), rules))
    wrapped = [name for name, module in pipeline.dit.named_modules() if isinstance(module, QuantLayer)]
    assert wrapped == list(made) == expected
    assert isinstance(pipeline.dit.pos_embed.proj, QuantConv)
    assert type(pipeline.dit.proj_out) is nn.Linear
    assert policy.layers(pipeline.dit).keys() == policy.layers(tiny.transformer()).keys()


def test_a_damaged_weight_names_its_layer(pipeline: PixArtPipeline):
    pipeline.dit.transformer_blocks[1].attn2.to_k.weight[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"transformer_blocks\.1\.attn2\.to_k holds NaN"):
        policy.quantize_weights_(pipeline.dit, policy.assign(policy.layers(pipeline.dit), tiny.rules()))


@pytest.fixture
def quantized(pipeline: PixArtPipeline) -> nn.Module:
    policy.quantize_weights_(pipeline.dit, policy.assign(policy.layers(pipeline.dit), tiny.rules()))
    return pipeline.dit


def test_activations_of_layers_and_attention_operands(quantized: nn.Module):
    made, rules = policy.quantize_activations_(
        quantized, [Rule("*.attn2.?", None), Rule("*.attn1.v", TENSOR, observe=Sample(8)), Rule("*", TOKEN)]
    )
    assert len(made) == 27 + 2 * 3
    assert made.keys() == rules.keys()
    assert {name for name, m in made.items() if m.quantizer == TENSOR} == {
        f"transformer_blocks.{i}.attn1.v" for i in (0, 1)
    }
    assert isinstance(quantized.get_submodule("transformer_blocks.0.attn1.processor.q"), Grid)
    assert isinstance(quantized.get_submodule("transformer_blocks.0.attn2.processor.q"), nn.Identity)
    assert all(quantized.get_submodule(n).activation is m for n, m in made.items() if n[-2:] not in (".q", ".k", ".v"))


def test_no_activation_rules_change_no_bit(quantized: nn.Module):
    given = {"encoder_hidden_states": torch.randn(2, 6, 32), "timestep": torch.tensor([3, 3]), "return_dict": False}
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        before = quantized(x, **given)[0]
        assert policy.quantize_activations_(quantized, []) == ({}, {})
        assert torch.equal(quantized(x, **given)[0], before)


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        ([Rule("*", TOKEN, observe=Sample(8))], r"'\*' is static.*unit: tensor"),
        ([Rule("*", TENSOR, timed=True)], r"'\*' is timed, so it must be static: give it an observer"),
        (
            [Rule("*", Quantizer(E2M1, Granularity("channel")), observe=ChannelRange())],
            r"'\*' asks for scales per channel \(unit: channel\), and AbsMax.* does not make them.*PreShift",
        ),
        (
            [Rule("*", Quantizer(E2M1, Granularity("channel"), PreShift(3)), observe=MovingRange())],
            r"'\*' asks for scales per channel .* MovingRange.* notes: observe with ChannelRange",
        ),
        (
            [Rule("*", Quantizer(SharedMantissa(floating(2, 2), 3), Granularity("row")))],
            r"pos_embed\.proj \(rule '\*'\): groups of 3 values do not divide a row or block of 16",
        ),
        ([Rule("*", None)], "no activation is quantized"),
        ([Rule("transformer_blocks.9.*", TOKEN)], r"no layer is left for the rule 'transformer_blocks\.9\.\*'"),
        (
            [Rule("*", Quantizer(E2M1, Granularity("group", 32)))],
            r"pos_embed\.proj \(rule '\*'\): a group of 32 does not divide a row of 16",
        ),
    ],
    ids=[
        "static token-wise",
        "timed online",
        "channels by rows",
        "channels of no channels",
        "sharing",
        "nothing",
        "idle",
        "dividing",
    ],
)
def test_bad_activation_rules_are_found_on_the_skeleton(source: PixArt, activations: list[Rule], message: str):
    with pytest.raises(UserError, match=message):
        policy.check_activations(source.skeleton().dit, tiny.rules(), activations)


def test_scales_per_channel_pass_with_what_makes_them(source: PixArt):
    shifted = Quantizer(Choice([E2M1, E3M0], LeastError()), Granularity("channel"), PreShift(3))
    rules = [Rule("*", shifted, observe=ChannelRange())]
    assert policy.check_activations(source.skeleton().dit, tiny.rules(), rules) is None


@pytest.mark.parametrize("quantizer", [TOKEN, Quantizer(E2M1, Granularity("group", 16)), TENSOR], ids=str)
def test_good_activation_rules_pass_on_the_skeleton(source: PixArt, quantizer: Quantizer):
    skeleton: Callable[[], nn.Module] = lambda: source.skeleton().dit
    assert policy.check_activations(skeleton(), tiny.rules(), [Rule("*", quantizer)]) is None


def test_exceptions_that_one_model_has_and_another_has_not():
    rules = everywhere(GROUP, by_row=["patches"], by_part={"*.joined": 2}, match="blocks.*")
    chosen = policy.assign(["blocks.0.joined", "blocks.0.x", "out"], rules)
    assert chosen["blocks.0.joined"].quantizer == Quantizer(E2M1, Granularity("part", parts=2), AbsMax(fp16))
    assert chosen.keys() == {"blocks.0.joined", "blocks.0.x"}
    assert policy.assign(["blocks.0.x"], rules).keys() == {"blocks.0.x"}


def test_everywhere_is_one_quantizer_but_for_those_named():
    chain = [Balance()]
    rules = everywhere(GROUP, by_row=["a"], formats={"b*": E3M0}, leave=["c"], transforms=chain)
    chosen = policy.assign(["a", "b1", "c", "d"], rules)
    assert chosen["a"] == Rule("a", Quantizer(E2M1, Granularity("row"), AbsMax(fp16)), optional=True)
    assert chosen["b1"] == Rule("b*", Quantizer(E3M0, GROUP.granularity, AbsMax(fp16)), chain)
    assert chosen["c"] == Rule("c", None)
    assert chosen["d"] == Rule("*", GROUP, chain)
    observed = everywhere(TENSOR, by_row=["a"], observe=Sample(8), timed=True)
    assert all(rule.observe == Sample(8) and rule.timed for rule in observed)


def test_the_audit_counts_what_transforms_keep(source: PixArt):
    """16 bits for each number of a branch and each divisor; a rotation is made from its seed."""
    rules = everywhere(GROUP, by_row=["pos_embed.proj"], transforms=[Balance(), Hadamard(), LowRank(2)])
    audit = {e.name: e for e in policy.check_weights(source.skeleton().dit, rules)}
    ff = audit["transformer_blocks.1.ff.net.0.proj"]
    out, k = 128, 32
    assert ff.bits == pytest.approx(4 + 16 / 32 + 16 * (k + 2 * (out + k)) / (out * k))
    assert audit["pos_embed.proj"].bits == 4 + 16 / 16


SHARED = SharedMantissa(floating(2, 2), 4)
BAD_WEIGHTS = {
    "rotation": (GROUP, [Hadamard(24)], r"attn1.*no Hadamard rotation of size 24 fits rows of 32 values: use one of"),
    "sharing": (
        Quantizer(SharedMantissa(floating(2, 2), 3), Granularity("row")),
        [],
        r"groups of 3 values do not divide",
    ),
    "grouping": (Quantizer(E2M1, Granularity("group", 48)), [], r"a group of 48 does not divide a row of 32"),
}


@pytest.mark.parametrize(("quantizer", "chain", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_weights_that_cannot_be_are_found_on_the_skeleton(
    source: PixArt, quantizer: Quantizer, chain: list[TransformSpec], message: str
):
    rules = [PATCH, Rule("*attn1*", quantizer, chain), Rule("*", GROUP)]
    with pytest.raises(UserError, match=message):
        policy.check_weights(source.skeleton().dit, rules)


def test_what_cannot_be_quantized_is_named_with_the_remedy():
    model = nn.ModuleDict({"mix": nn.Linear(32, 32), "depth": nn.Conv2d(32, 32, 3, padding=1, groups=32)})
    message = r"^depth \(rule '\*'\): of convolutions, only those without groups .* \+weight\.leave=\[\.\.\.\] leaves"
    with pytest.raises(UserError, match=message):
        policy.check_weights(model, [Rule("*", ROW)])
    entries = policy.check_weights(model, [Rule("depth", None), Rule("*", ROW)])
    assert [(entry.name, entry.format) for entry in entries] == [("mix", ROW.format.name), ("depth", "fp16")]


def test_a_name_by_row_that_no_layer_has_is_a_warning(source: PixArt, caplog: pytest.LogCaptureFixture):
    skeleton = source.skeleton().dit
    check(skeleton, everywhere(ROW, by_row=["pos_embed.proj", "*.atn1.to_q"]), Rounded())
    assert [record.getMessage() for record in caplog.records] == [
        "no layer of this model is called *.atn1.to_q, which by_row or by_part names"
    ]


def test_one_format_of_a_choice_cannot_cost_more_than_another():
    with pytest.raises(ValueError, match=r"same number of bits: e2m1 has 4, e2m3 has 6"):
        Choice([E2M1, floating(2, 3)], LeastError())


def learns(learner: Callable) -> Fit:
    return tiny.learnt(learner, steps=1)


BLOCKWISE = Choice([E2M1, E3M0], LeastError(), per="block")
BAD_FITS = {
    "learnt": (SHARED, learns(ulp), r"this rounding .* e2m2_share4 shares a bit .*: choose rounding=nearest"),
    "layer by layer": (SHARED, Layerwise(learns(logit)), r"this rounding .* e2m2_share4 shares"),
    "weighed, then learnt": (SHARED, Weighed(learns(logit)), r"this rounding .* e2m2_share4 shares"),
    "at random": (SHARED, Rounded(Stochastic()), r"e2m2_share4 shares a bit"),
    "searched": (
        BLOCKWISE,
        OutputSearch(),
        r"one format for a layer, and e2m1\|e3m0 is chosen per block: choose per tens",
    ),
}


@pytest.mark.parametrize(("fmt", "fit", "message"), BAD_FITS.values(), ids=BAD_FITS.keys())
def test_a_format_that_a_fit_cannot_round_in_is_found_on_the_skeleton(
    source: PixArt, fmt: SharedMantissa, fit: Fit, message: str
):
    with pytest.raises(ValueError, match=message):
        check(source.skeleton().dit, [PATCH, Rule("*", Quantizer(fmt, Granularity("row")))], fit)


GOOD_FITS = {
    "shared, nearest": (SHARED, Rounded()),
    "shared, shifted": (SHARED, learns(SignRound)),
    "blockwise, learnt": (BLOCKWISE, learns(ulp)),
    "unsigned, at random": (integer(4, signed=False), Rounded(Stochastic())),
    "drawn in": (E2M1, learns(lambda *given: SignRound(*given, store=in_format))),
    "anything": (E2M1, lambda *_: []),
}


@pytest.mark.parametrize(("fmt", "fit"), GOOD_FITS.values(), ids=GOOD_FITS.keys())
def test_fits_that_can_round_pass_on_the_skeleton(source: PixArt, fmt: SharedMantissa, fit: Fit):
    assert check(source.skeleton().dit, [PATCH, Rule("*", Quantizer(fmt, Granularity("row")))], fit) is None


def test_timed_activations_and_learnt_weights_clash(source: PixArt):
    timed = [Rule("*", TENSOR, observe=Sample(8), timed=True)]
    assert policy.check_activations(source.skeleton().dit, tiny.rules(), timed) is None
    with pytest.raises(UserError, match=r"'\*' is timed, and weights are learnt at all timesteps.*joint=null"):
        check(source.skeleton().dit, tiny.rules(), Rounded(), timed)
