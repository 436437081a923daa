"""A griffe extension: brackets in docstrings, as in ``[row][stage]``, are indices and not links of Markdown."""

from typing import Any

import griffe


class PlainDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("][", r"]\[")
