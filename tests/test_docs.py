"""Every Python example of README.md and the documentation runs, in order, page by page.

A fragment that cannot run, for it is a part of another program, has a line above it that says so:
<!-- not run: why -->
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if page.exists()]
BLOCK = re.compile(
    r"^(?P<left_out><!-- not run: [^\n]+ -->\n)?```python\n(?P<code>.*?)^```$", re.M | re.S
)


def examples(page):
    """(number of the line before it, code) of each fenced block that can run."""
    text = page.read_text()
    found = [m for m in BLOCK.finditer(text) if not m["left_out"]]
    return [(text.count("\n", 0, m.start("code")), m["code"]) for m in found]


def readme_names():
    """What the examples of README.md take for granted, as it describes them."""
    sizes = ((8, 10), (4, 5), (2, 3), (1, 2), (1, 1))
    cells = [h * w for h, w in sizes]
    labels = [torch.full((2, n), 80) for n in cells]
    labels[0][:, 7] = 3
    return {
        "logits": torch.randn(60, 80, requires_grad=True),
        "labels": torch.randint(0, 81, (60,)),
        "ious": torch.rand(60),
        "num_pos": 7,
        "cls_scores": [torch.randn(2, 80, *size, requires_grad=True) for size in sizes],
        "bbox_preds": [torch.randn(2, 4 * 17, *size, requires_grad=True) for size in sizes],
        "points": [torch.rand(n, 2) * 64 for n in cells],
        "bbox_targets": [torch.tensor([1.0, 2.0, 40.0, 50.0]).expand(2, n, 4) for n in cells],
        "_head": {"labels": labels},  # the head's example calls another thing "labels"
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page):
    names = readme_names() if page.name == "README.md" else {}
    for line, code in examples(page):
        if page.name == "README.md" and "gfl_loss(" in code:
            names |= names["_head"]
        # Blank lines before it: a traceback then names the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_examples_are_found():
    if len(PAGES) < 2:
        pytest.skip("the documentation is not here")
    assert {page.name: len(examples(page)) for page in PAGES}["index.md"] >= 4
    for page in PAGES:
        text = page.read_text()
        left_out = text.count("<!-- not run: ")
        assert text.count("```python") == len(examples(page)) + left_out, page


def test_only_marked_fragments_are_left_out(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na\n```\n\n<!-- not run: needs a model -->\n```python\nb(...)\n```\n"
        "<!-- not run: -->\n```python\nc\n```\n"
    )
    assert examples(page) == [(1, "a\n"), (10, "c\n")]
