"""Sentences of the page about FP4 and INT4, with the numbers that were computed.

What they say beside the numbers is tested in tests/benchmarks/test_bench_formats.py.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from benchmarks.format_curves import GENERALIZED, ROW, STUDENT, TENSOR, Curve, Ratios
from benchmarks.format_layers import LayerNoise

E2M1_ABOVE_ZERO_POINT = ("e2m1", "uint4")

Curves = Mapping[str, Curve]


def write_answer(curves: Curves, normal: Ratios) -> Iterator[str]:
    """Yield what the page says first, as the items of a list.

    Args:
        curves: The curve of each family.
        normal: The ratios for normal values.
    """
    yield from write_zero_point(curves, normal)
    third, fourth = (curves[f].find_crossing("e2m1", "int4", 16) for f in (GENERALIZED, STUDENT))
    yield (
        "- **Without a zero point INT4 is behind E2M1 from groups of 64 on**, already for normal "
        f"values. In groups of 16 it is ahead up to a kurtosis of {third:.1f} or {fourth:.1f}. "
        "E1M2 has the values of symmetric INT4 up to a factor, and thus the same errors."
    )
    yield (
        "- **E3M0 is behind E2M1 in groups of up to 128, whatever the tails**, by "
        f"{normal['e2m1', 128] - normal['e3m0', 128]:.1f} dB for normal values in groups of 128 "
        f"and by {-find_lead(curves, ('e3m0', 'e2m1'), 128):.1f} dB at the least. It is for a "
        "scale of a tensor with long tails."
    )
    yield (
        "- **NF4, whose levels are uneven, is ahead of them all for normal values in groups of 128 "
        f"and more**, by {normal['nf4', 128] - normal['uint4', 128]:.1f} dB of INT4 with a zero "
        "point in groups of 128. No hardware multiplies it."
    )
    yield (
        "- **Under the scales of NVFP4, INT4 has "
        f"{normal['nvint4', 16] - normal['nvfp4', 16]:.1f} dB more than E2M1 for normal values**, "
        "and fewer for long tails. The better of both for each block (IF4) has "
        f"{normal['if4', 16] - normal['nvfp4', 16]:.1f} dB more than E2M1 for normal values."
    )


def write_zero_point(curves: Curves, normal: Ratios) -> Iterator[str]:
    """Yield the items about E2M1 and INT4 with a zero point."""

    def gap(size: int) -> float:
        return normal["uint4", size] - normal["e2m1", size]

    least = [-find_lead(curves, E2M1_ABOVE_ZERO_POINT, size) for size in (16, 32)]
    largest = {size: find_lead(curves, E2M1_ABOVE_ZERO_POINT, size) for size in (128, ROW)}
    first, second = (curves[f].find_crossing("e2m1", "uint4", 128) for f in (GENERALIZED, STUDENT))
    yield (
        "- **In groups of 16 or 32, INT4 with a zero point has less error than E2M1**, whatever "
        f"tails: by {gap(16):.1f} and {gap(32):.1f} dB for normal values, and by {least[0]:.1f} "
        f"and {least[1]:.1f} dB at the least."
    )
    yield (
        "- **In groups of 128, INT4 with a zero point is better by "
        f"{gap(128):.1f} dB for normal values, and E2M1 is better for longer tails**, from an "
        f"kurtosis of {first:.1f} (generalised normal) or {second:.1f} (Student's t) within a "
        f"group on. E2M1 is never ahead by more than {largest[128]:.1f} dB."
    )
    yield (
        "- **With one scale for a row or a tensor, E2M1 is better**, already for normal values, by "
        f"{-gap(ROW):.1f} and {-gap(TENSOR):.1f} dB, and by up to {largest[ROW]:.1f} dB for rows "
        "with longer tails."
    )


def find_lead(curves: Curves, formats: tuple[str, str], size: int) -> float:
    """Return the most dB by which the first format is ahead of the second one, for any tails."""
    points = [curve.differences(*formats, size) for curve in curves.values()]
    return max(lead for curve in points for _, lead in curve)


def write_paper(curves: Curves, models: Mapping[str, Sequence[LayerNoise]]) -> Iterator[str]:
    """Yield paragraphs about the difference between FP4DiT's paper and this project's results."""
    crossings = [curve.find_crossing(*E2M1_ABOVE_ZERO_POINT, 128) for curve in curves.values()]
    numbers = sorted(crossing for crossing in crossings if crossing is not None)
    yield (
        "What is certain: in groups of 128 the sign of the difference between E2M1 and INT4 with a "
        "zero point depends on the tails within a group. It changes at an excess kurtosis of about "
        f"{numbers[0]:.1f}, and E2M1 is ahead by no more than "
        f"{find_lead(curves, E2M1_ABOVE_ZERO_POINT, 128):.1f} dB for any tails that were computed. "
        "E3M0, which the paper puts before the GELU, has more error than E2M1 in groups of 128 for "
        "all of these tails, so the error of the weights is no reason for it."
    )
    for name, layers in models.items():
        below = [m.kurtosis[128] < numbers[0] for m in layers]
        ahead = [m.ratios["uint4", 128] > m.ratios["e2m1", 128] for m in layers]
        mean = np.mean([m.ratios["uint4", 128] - m.ratios["e2m1", 128] for m in layers])
        yield (
            f"Of the {len(layers)} layers of {name}, {sum(below)} are below that kurtosis. INT4 "
            f"with a zero point has less error than E2M1 in {sum(ahead)} of the {len(layers)}, and "
            f"{mean:.1f} dB more of signal to noise on average."
        )
    yield (
        "What is possible: the weights of the paper's models may have longer tails within a group. "
        "They are not at hand, and their kurtosis was **not measured**; the command below places "
        "them as soon as they are. Even then the weights would be a reason for no more than the "
        "difference above."
    )
    yield (
        "What may add to it: the paper's rows differ in more than the format of the weights. Its "
        "baselines are whole methods, with INT8 or INT6 activations of which some are static, "
        "where its own rows have E3M4 or E2M3 with a scale for each token. Roundings are learned "
        "in different numbers of steps. Scores such as HPSv2 do not measure the distance from the "
        "images of full precision. [Our ablation](../results/ablations.md#formats) changes the "
        "format of the weights alone. Which of these decides in the paper cannot be told from here."
    )


def describe_rotation(turned: Sequence[tuple[LayerNoise, LayerNoise]]) -> str:
    """Return a paragraph about who is ahead before and after a rotation."""
    parts = []
    for size, name in ((128, "groups of 128"), (ROW, "rows")):
        before, after = (
            sum(layer.ratios["uint4", size] > layer.ratios["e2m1", size] for layer in layers)
            for layers in zip(*turned, strict=True)
        )
        parts.append(f"in {before} layers before and in {after} after the rotation with {name}")
    lengths = sorted({m.shape[1] for m, _ in turned})
    lightest = min((m for m, _ in turned), key=lambda m: m.kurtosis[128])
    loss = next(r for m, r in turned if m is lightest).ratios["uint4", 128]
    change = loss - lightest.ratios["uint4", 128]
    return (
        f"INT4 with a zero point has less error than E2M1 {' and '.join(parts)}, which have "
        f"{' or '.join(f'{n:,}' for n in lengths)} values. Rows keep their norms, and tensors thus "
        "some of their tails. The rotation takes "
        f"away what light tails gain: `{lightest.name}`, whose kurtosis is "
        f"{lightest.kurtosis[128]:.2f} in groups of 128, changes by {change:+.1f} dB there."
    )
