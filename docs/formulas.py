"""A hook of mkdocs: formulas become MathML while the site is built; no page needs a script."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<kind>[(\[])(?P<body>.*?)\\[)\]]</(?P=tag)>', re.S
)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["kind"] == "[" else "inline"
    return convert(html.unescape(match["body"]).strip(), display=display)


def on_page_content(html: str, **_) -> str:
    return FORMULA.sub(_mathml, html)
