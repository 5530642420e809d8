"""Each tutorial is also a notebook, with the same text and the same code."""

import importlib.util
import json

from tests.docs.test_examples import ROOT

_SPEC = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "extensions" / "notebooks.py")
notebooks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(notebooks)


def test_blocks_of_python_become_code_and_all_else_stays_text(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# T\n\n[This page as a notebook](page.ipynb)\n\nx\n\n```python\na = 1\n\nb\n```\n\n```text\n1\n```\n"
    )
    found = json.loads(notebooks.notebook(page))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in found["cells"]] == [
        ("markdown", "# T\n\nx"),
        ("code", "a = 1\n\nb"),
        ("markdown", "```text\n1\n```"),
    ]
    assert found == json.loads(notebooks.notebook(page))  # the ids too
