"""Sentences about a table are true of its numbers."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_rel

from fp4dit.tables.rows import ScoredRow, TableColumn
from fp4dit.tables.sentences import summarize_table
from fp4dit.tables.table import Table

PSNR = TableColumn(
    "psnr", "PSNR, dB", 1, per_image=True, better="higher", compares_to_reference=True
)
LPIPS = TableColumn("lpips", "LPIPS", 3, per_image=True, better="lower")
IMAGES = [{"prompt": f"prompt {i}", "seed": i} for i in range(64)]
BASE = np.random.default_rng(0).normal(35, 4, len(IMAGES))
FULL = ScoredRow("Full", {"psnr": None, "checkpoint_bytes": 14_000_000}, reference=True)


def make_row(label: str, shift: float, size: int = 3_700_000, spread: float = 0) -> ScoredRow:
    """Make a row whose images differ from `BASE` by a shift, more and less by turns."""
    values = BASE + shift + spread * np.resize([1, -1], len(BASE))
    numbers = {"psnr": float(values.mean()), "checkpoint_bytes": size}
    return ScoredRow(label, numbers, per_image={"psnr": values.tolist()}, images=IMAGES)


GOOD, EQUAL = make_row("Good, static", 0), make_row("Equal", -0.05, spread=1)
BAD = make_row("Bad", -6, 4_200_000)


def test_three_sentences_say_what_a_table_says():
    quality, differences, sizes = summarize_table(Table([FULL, BAD, GOOD, EQUAL], [PSNR]))
    assert quality == (
        f"By PSNR against full precision, the best is “Good, static” with "
        f"{GOOD.values['psnr']:.1f} dB, and the worst is “Bad” with {BAD.values['psnr']:.1f} dB."
    )
    assert ttest_rel(*(row.per_image["psnr"] for row in (GOOD, EQUAL))).pvalue > 0.05  # pyright: ignore
    assert differences == (
        "“Equal” cannot be told from “Good, static”, and one other is significantly worse (image "
        "by image, at 5 % after Holm's correction)."
    )
    assert sizes == (
        "The packed transformer takes 3.7 MB to 4.2 MB, where 16 bits take 14.0 MB: 26 to 30 %."
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        ([FULL], []),
        ([FULL, ScoredRow("Missing", {})], []),
        ([GOOD], ["By PSNR against full precision, “Good, static” has ", "takes 3.7 MB."]),
        ([FULL, GOOD, BAD], ["the best is ", "Than “Good, static”, one other is sign", "26 to 30"]),
        (
            [FULL, GOOD, EQUAL],
            ["the best", "“Equal” cannot be told from “Good, static” (", ": 26 %."],
        ),
        ([GOOD, replace(BAD, images=[])], ["the best is", "takes 3.7 MB to 4.2 MB."]),
        (
            [GOOD, replace(GOOD, label="Twin")],
            ["all 2 rows have", "“Twin” cannot be told", "3.7 MB."],
        ),
    ],
)
def test_sentences_without_numbers_are_left_out(rows: list[ScoredRow], expected: list[str]):
    sentences = summarize_table(Table(rows, [PSNR]))
    assert len(sentences) == len(expected)
    assert all(part in text for part, text in zip(expected, sentences, strict=True))


def test_a_metric_may_be_better_if_lower():
    rows = []
    for label, value in (("A", 0.3), ("B", 0.1)):
        numbers = {"lpips": value, "checkpoint_bytes": None}
        rows.append(ScoredRow(label, numbers, per_image={"lpips": [value] * 64}, images=IMAGES))
    first, second = summarize_table(Table(rows, [LPIPS]))
    assert first == "By LPIPS, the best is “B” with 0.100, and the worst is “A” with 0.300."
    assert second.startswith("Than “B”, one other is significantly worse")


@given(st.lists(st.tuples(st.floats(-9, 9), st.integers(1, 10**8)), min_size=2, max_size=5))
def test_sentences_agree_with_the_numbers(numbers: list[tuple[float, int]]):
    rows = [make_row(f"R{i}", shift, size) for i, (shift, size) in enumerate(numbers)]
    quality, differences, _ = summarize_table(Table(rows, [PSNR]))
    means = {row.label: float(row.values["psnr"] or 0) for row in rows}
    if match := re.fullmatch(
        r".*best is (.*) with (.*) dB, and .*worst is (.*) with (.*) dB\.", quality
    ):
        for labels, shown, extreme in ((*match.groups()[:2], max), (*match.groups()[2:], min)):
            assert shown == f"{extreme(means.values()):.1f}"
            assert all(f"{means[label]:.1f}" == shown for label in re.findall(r"R\d", labels))
    named = set(re.findall(r"R\d", differences))
    assert max(means, key=means.__getitem__) in named
