"""Extension of Griffe: read the section `Example:` of a docstring as its section `Examples:`."""

import re
from typing import Any

import griffe


class RenameExampleSections(griffe.Extension):
    """Griffe recognizes prompts and their results only in sections of that name."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = text
