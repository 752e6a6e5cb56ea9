"""Clips of tokens against an enumeration of all shares, by range of timesteps."""

import pytest
import torch
from torch import Tensor, nn

from fp4dit.numerics.formats import integer
from fp4dit.numerics.quantizer import PerChannel, PerToken, Quantizer
from fp4dit.packed.nn.linear import pack_layer
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.transforms.token_clip import TokenClip, TokenClipSearch, clip_tokens

INT4 = Quantizer(integer(4), PerToken())
SPEC = TokenClipSearch(range_ends=[499], lowest=0.4, candidates=7)
K, OUT = 512, 24


def draw(seed: int, normal: bool = True) -> Tensor:
    """Return inputs of four calls, normal or uniform, which are to be clipped less."""
    generator = torch.Generator().manual_seed(seed)
    if normal:
        return torch.randn(4, 32, K, generator=generator)
    return torch.rand(4, 32, K, generator=generator) - 0.5


def make_clip(timestep: Tensor) -> tuple[TokenClip, TimestepContext]:
    clip, context = SPEC(OUT, K), TimestepContext()
    clip.context = context
    context.update(timestep)
    return clip, context


def find_best_share(weight: Tensor, x: Tensor) -> float:
    """Return the share with the least error of the output, by numpy-like formulas alone."""
    errors = {}
    for share in torch.linspace(1, 0.4, 7).tolist():
        limit = share * x.abs().amax(-1, keepdim=True)
        step = limit / 7
        x_hat = (x.clamp(-limit, limit) / step).round() * step
        errors[share] = ((x_hat - x) @ weight.mT).square().sum().item()
    return min(errors, key=lambda share: errors[share])


def test_each_range_has_the_best_share():
    torch.manual_seed(0)
    weight = torch.randn(OUT, K)
    x = torch.cat([draw(1, normal=False), draw(2)])[torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])]
    timestep = torch.tensor([900.0, 100.0] * 4)  # the first range is normal
    clip, _ = make_clip(timestep)
    clip.fit(weight, x, INT4, INT4)
    expected = [
        find_best_share(weight, x[timestep < 500]),
        find_best_share(weight, x[timestep > 500]),
    ]
    torch.testing.assert_close(clip.share.float(), torch.tensor(expected), rtol=1e-3, atol=0)
    assert clip.share[0] < clip.share[1]
    assert clip.storage_bits() == 16 * 2


def test_rows_are_clipped_by_their_timestep():
    clip, context = make_clip(torch.tensor([100.0, 900.0]))
    clip.share.copy_(torch.tensor([0.5, 1.0]))
    x = draw(1)
    half = clip_tokens(x, torch.tensor(0.5))
    # Two vectors for each row of the batch.
    assert torch.equal(clip.transform_input(x), torch.cat([half[:2], x[2:]]))
    context.update(torch.tensor([100.0]))
    assert torch.equal(clip.transform_input(x), half)
    context.update(torch.tensor([900.0]))
    assert torch.equal(clip.transform_input(x[0, 0]), x[0, 0])
    assert torch.equal(half.abs().amax(-1), 0.5 * x.abs().amax(-1))


def test_inputs_that_are_not_quantized_are_not_clipped():
    clip, _ = make_clip(torch.tensor([100.0] * 4))
    clip.fit(torch.randn(OUT, K), draw(1), INT4, lambda x: x)
    assert clip.share.tolist() == [1, 1]


def test_a_layer_errs_less_and_is_packed():
    torch.manual_seed(0)
    source, x = nn.Linear(K, OUT), draw(3)
    expected, errors = source(x), {}
    for name, chain in (("plain", []), ("clipped", [SPEC])):
        layer = QuantLayer(nn.Linear(K, OUT), Quantizer(integer(8), PerChannel()), chain)
        layer.source.load_state_dict(source.state_dict())
        layer.input_fake_quant = FakeQuantize(INT4)
        context = TimestepContext()
        layer.share_context(context)
        context.update(torch.full((4,), 900.0))
        layer.prepare(x).commit_weight()
        errors[name] = (layer(x) - expected).norm().item()
        packed = pack_layer(layer)
        torch.testing.assert_close(packed(x), layer(x))
    assert errors["clipped"] < 0.95 * errors["plain"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TokenClipSearch(lowest=0.0), "lowest=0.0 is to be above 0"),
        (TokenClipSearch(candidates=0), "candidates=0 at least 1"),
        (TokenClipSearch(range_ends=[500, 500]), "have to ascend"),
    ],
)
def test_bad_searches_are_refused(spec: TokenClipSearch, message: str):
    with pytest.raises(ValueError, match=message):
        spec(OUT, K)
