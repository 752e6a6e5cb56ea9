"""Names of distributions in requirements, as pyproject.toml and metadata have them."""

import re


def normalize_name(requirement: str) -> str:
    """Return the name in a requirement, as packaging normalizes it: `a_b>=1` gives `a-b`."""
    name = re.split(r"[\[<>=;! ]", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()
