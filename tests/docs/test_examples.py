"""Every Python example of the README and the documentation runs, and says what it claims."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall((ROOT / page).read_text()) if found == language]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


def test_there_are_examples():
    assert {"README.md", "docs/all-of-slimmable.md", "docs/how-to/own-loop.md"} <= set(WITH_PYTHON)


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_examples_run_and_print_the_plans_shown(page, tmp_path, capsys):
    program = tmp_path / "page.py"  # a file, so that classes can be pickled and errors show the line
    program.write_text("\n".join(blocks(page, "python")))
    runpy.run_path(str(program), run_name="__main__")
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    for shown in blocks(page, "text"):
        if shown.startswith("group"):
            assert shown.rstrip() in printed


def test_the_difference_is_that_of_the_two_loops():
    before, after = blocks("docs/how-to/own-loop.md", "python")[:2]
    (difference,) = blocks("docs/how-to/own-loop.md", "diff")
    hunks = difference.split("@@\n")
    for hunk in hunks:
        lines = hunk.splitlines()
        assert "\n".join(line[1:] for line in lines if line[0] in " -") in before
        assert "\n".join(line[1:] for line in lines if line[0] in " +") in after
    rebuilt = before.replace("from torch import nn\n", "from torch import nn\nimport slimmable\n", 1)
    for hunk in hunks:
        old, new = ("".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[0] in kept) for kept in (" -", " +"))
        assert rebuilt.count(old) == 1
        rebuilt = rebuilt.replace(old, new)
    assert rebuilt == after
