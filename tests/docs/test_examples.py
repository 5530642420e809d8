"""Every Python example of the README and the documentation runs, and says what it claims."""

import importlib.util
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall((ROOT / page).read_text()) if found == language]


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
TUTORIALS = [page for page in PAGES if page.startswith("docs/tutorials/")]  # test_tutorials.py runs them
NEEDED = {  # page -> modules; skipped without them
    "docs/how-to/hf-trainer.md": ["accelerate", "transformers"],
    "docs/how-to/int8.md": ["torchao"],
    "docs/how-to/lightly.md": ["lightly"],
    "docs/how-to/lightning.md": ["lightning"],
    "docs/how-to/solo-learn.md": ["lightning", "omegaconf"],
    "docs/how-to/timm-train.md": ["timm.task"],
    "docs/tutorials/model-to-phone.md": ["onnx", "onnxscript", "onnxruntime"],
}
STAND_INS = Path(__file__).parent / "stand_ins"  # of packages that cannot be installed beside the current torch


def needs(page: str) -> None:
    for module in NEEDED.get(page, []):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of its own for what the programs write, and the stand-ins where a package is not installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(STAND_INS)])


def run(program: str, folder: Path) -> dict[str, object]:
    """Run a page's program and return its names; from a file, so that classes can be pickled, errors show the line."""
    path = folder / "page.py"
    path.write_text(program)
    return runpy.run_path(str(path), run_name="__main__")


def test_there_are_examples():
    assert {"README.md", "docs/all-of-slimmable.md", "docs/how-to/own-loop.md"} <= set(WITH_PYTHON)


@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if page not in TUTORIALS])
def test_examples_run_and_print_the_plans_shown(page, tmp_path, capsys):
    needs(page)
    run("\n".join(blocks(page, "python")), tmp_path)
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    for shown in blocks(page, "text"):
        if shown.startswith("group"):
            assert shown.rstrip() in printed


WITH_DIFF = [page for page in WITH_PYTHON if blocks(page, "diff")]


def side(hunk: str, kept: str) -> str:
    """The lines of one side of a hunk: of the program before (" -") or after (" +")."""
    return "".join(f"{line[1:]}\n" for line in hunk.splitlines() if line[0] in kept)


def undo(difference: str, after: str) -> str:
    """Return the program to which `difference` was applied; its hunks stand in order, each in one place."""
    start, before = 0, ""
    for hunk in difference.split("@@\n"):
        new = side(hunk, " +")
        assert after.count(new, start) == 1, f"not once behind the hunk before it:\n{new}"
        place = after.index(new, start)
        before += after[start:place] + side(hunk, " -")
        start = place + len(new)
    return before + after[start:]


PUBLISHED = {path.read_text() for path in ROOT.glob("benchmarks/clients/**/*.diff")}  # run there, on the real programs


def programs_and_diffs(page: str) -> list[tuple[str, str]]:
    """The Python programs of a page, and the diffs behind which one stands."""
    shown = [found for found in BLOCK.findall((ROOT / page).read_text()) if found[0] in ("python", "diff")]
    behind = [*shown[1:], ("", "")]
    return [
        found
        for found, (_, program) in zip(shown, behind, strict=True)
        if found[0] == "python" or not (found[1] in PUBLISHED and not _is_after(found[1], program))
    ]


def _is_after(difference: str, program: str) -> bool:
    return all(side(hunk, " +") in program for hunk in difference.split("@@\n"))


def afters(page: str) -> list[str]:
    """The programs that stand behind the diffs of a page."""
    shown = programs_and_diffs(page)
    return [shown[place + 1][1] for place, (language, _) in enumerate(shown) if language == "diff"]


@pytest.mark.parametrize("page", WITH_DIFF)
def test_the_differences_are_those_of_the_programs(page, tmp_path):
    """Behind each diff stands the program after it; before the first one that before it, and the others' run too.

    Diffs for published programs stand alone, if they are those that the benchmark of clients runs.
    """
    needs(page)
    shown = programs_and_diffs(page)
    for place, (language, difference) in enumerate(shown):
        if language != "diff":
            continue
        after = shown[place + 1][1]
        if "+import slimmable" not in difference.splitlines():  # said in words
            after = after.replace("import slimmable\n", "", 1)
        before = undo(difference, after)
        assert "slimmable" not in before
        if "diff" not in [found for found, _ in shown[:place]]:
            assert before == shown[place - 1][1]
        else:
            run(before, tmp_path)
