"""Published results: each entry has a source, and errors name the nearest entries."""

import pytest
import yaml

from fp4dit.tables.published import find_published, load_published
from fp4dit.utils.errors import UserError
from tests.conftest import ROOT


def test_every_entry_has_a_source_and_numbers():
    entries = load_published()
    for name, entry in entries.items():
        for row, numbers in entry["rows"].items():
            result = find_published(entries, f"{name}/{row}")
            assert result.source.startswith(entry["paper"])
            assert "model " in result.source
            assert ("notes on the paper" in result.source) == entry.get("secondary", False)
            assert result.values.keys() == numbers.keys()
            assert None not in result.values.values()


def test_an_entry_is_in_one_file():
    files = (ROOT / "fp4dit" / "tables" / "papers").glob("*.yaml")
    names = [name for file in files for name in yaml.safe_load(file.read_text())]
    assert sorted(names) == sorted(load_published())


def test_factors_convert_to_our_units():
    clip = find_published(load_published(), "vidit_q/fp16").values["clip_b32"]
    assert clip == pytest.approx(25.8)


def test_an_unknown_row_is_refused():
    message = "'svdquant/fp15' is not in fp4dit/tables/papers; there are svdquant/fp16"
    with pytest.raises(UserError, match=message):
        find_published(load_published(), "svdquant/fp15")
