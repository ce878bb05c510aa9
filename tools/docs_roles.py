"""For mkdocstrings, which reads docstrings as Markdown: their roles become code, and their examples code blocks."""

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")
EXAMPLE = re.compile(r"^>>> .*(?:\n(?:>>>|\.\.\.) .*)*", re.MULTILINE)


def markdown(text: str) -> str:
    """A docstring as Markdown; what a role names keeps its last part."""
    text = ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", text)
    return EXAMPLE.sub(lambda lines: f"```python\n{re.sub(r'^(>>>|[.]{3}) ', '', lines[0], flags=re.MULTILINE)}\n```", text)


class Roles(griffe.Extension):
    """Every docstring, once it was read."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """``obj`` was read from the source."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
