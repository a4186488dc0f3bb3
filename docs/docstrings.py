"""An extension of griffe: what docstrings say in reStructuredText, in Markdown."""

from __future__ import annotations

import re
import textwrap

import griffe

DISPLAY = re.compile(r"^( *)\.\. math:: *(.*(?:\n\1 +.+)*)", re.M)


def _display(match: re.Match[str]) -> str:
    first, _, rest = match[2].partition("\n")
    formula = " ".join(f"{first}\n{textwrap.dedent(rest)}".split())
    return f"{match[1]}$$\n{match[1]}{formula}\n{match[1]}$$\n"


def markdown(text: str) -> str:
    text = DISPLAY.sub(_display, text)
    text = re.sub(r":math:`([^`]+)`", lambda m: f"${' '.join(m[1].split())}$", text)

    def reference(match: re.Match[str]) -> str:
        name = match[1] if match[1].startswith("gfl_kernels.") else f"gfl_kernels.{match[1]}"
        return f"[`{match[1].removeprefix('gfl_kernels.')}`][{name}]"

    text = re.sub(r":(?:func|class|mod):`([^`]+)`", reference, text)
    return text.replace("``", "`")


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
