"""Differences between two identities."""

import json

from pipelines.results.differences import ABSENT, format_value, iter_differences


def test_differences_are_dotted_fields():
    old = {"a": {"b": 1, "c": [1, {"d": 2}]}, "e": {}, "f": 1}
    new = {"a": {"b": 1, "c": [1, {"d": 3}, 4]}, "e": None, "f": 1.0}
    differences = {name: values for name, *values in iter_differences(old, new)}
    assert differences == {"a.c.1.d": [2, 3], "a.c.2": [ABSENT, 4], "e": [{}, None], "f": [1, 1.0]}
    values = [ABSENT, None, "e2m1", True, {"a": 1}]
    assert list(map(format_value, values)) == ["absent", "null", "e2m1", "true", '{"a": 1}']
    assert len(format_value(json.loads("[" + "1," * 100 + "1]"))) == 100
