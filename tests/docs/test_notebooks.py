"""Each tutorial is also a notebook, with the same text and the same code."""

import importlib.util
import json

import pytest

from tests.docs.test_examples import ROOT, blocks

_SPEC = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "extensions" / "notebooks.py")
notebooks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(notebooks)
PAGES = notebooks.pages()


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


def test_every_tutorial_has_a_notebook_and_every_notebook_a_page():
    assert len(PAGES) == 4
    assert [page.stem for page in PAGES] == sorted(path.stem for path in notebooks.TUTORIALS.glob("*.ipynb"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_notebook_is_made_from_its_page(page):
    text = page.read_text()
    title, _, rest = text.partition("\n\n")
    assert title.startswith("# ")
    assert rest.startswith(notebooks.link_to_notebook(page))
    committed = page.with_suffix(".ipynb").read_text()
    assert committed == notebooks.notebook(page), "run: python docs/extensions/notebooks.py"

    found = json.loads(committed)
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert found["metadata"]["kernelspec"]["name"] == "python3"
    cells = found["cells"]
    code = ["".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code"]
    assert code == blocks(str(page.relative_to(ROOT)), "python")
    prose = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert "```python" not in prose
    assert "This page as a notebook" not in prose
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert not any(cell.get("outputs") for cell in cells)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_notebook_has_the_format_of_jupyter(page):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.reads(page.with_suffix(".ipynb").read_text(), as_version=4))
