"""The README and the pages name what exists: commands, files, options, public names and parameters."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slimmable
from slimmable.cli.commands import make_parser
from tests.docs.test_examples import BLOCK, PUBLISHED

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in sorted((ROOT / "docs").glob("**/*.md"))}
FACES = (slimmable, slimmable.errors, slimmable.gating, slimmable.layers, slimmable.losses)
PUBLIC = {name: getattr(face, name) for face in FACES for name in face.__all__}
ON_THE_PAGE = [
    *(slimmable.__all__ + slimmable.errors.__all__),
    *(name for name in slimmable.layers.__all__ if not name.endswith(("Container", "Norm")) or "Slim" in name),
    *("GateBudget", "dense", "extract_gated", "gate", "gate_plan", "gated"),
]


def test_files_that_say_the_version_agree():
    form = re.compile(r"^ *(?:__)?version(?:__)?(?: *=|:) [\"{]?([\d.]+)", re.MULTILINE)
    for name in ("pyproject.toml", "slimmable/__init__.py", "CITATION.cff", "docs/cite.md"):
        assert form.findall((ROOT / name).read_text()) == [slimmable.__version__], name


def test_the_readme_fits_two_screens():
    assert len(README.splitlines()) <= 100


def test_code_fits_its_box():
    """On a screen of 1366 pixels a box shows 100 columns; diffs that are published are shown as they are."""
    readme = re.sub(r"^## Run it\n.*?(?=^## )", "", README, flags=re.MULTILINE | re.DOTALL)
    texts = [("README.md", readme), *((path.name, text) for path, text in PAGES.items())]
    code = [(name, block) for name, text in texts for _, block in BLOCK.findall(text) if block not in PUBLISHED]
    code += [(path.name, path.read_text()) for path in (ROOT / "docs" / "examples").iterdir()]
    assert len(code) > 100
    assert [(name, line) for name, block in code for line in block.splitlines() if len(line) > 100] == []


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_check_script_finds_the_one_test_command_of_the_readme():
    commands = [line for line in README.splitlines() if re.match(r"python3 -m venv .*pytest", line)]
    assert len(commands) == 1
    assert "grep -E '^python3 -m venv .*pytest' README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_extra_that_is_named_exists():
    declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    named = re.findall(r'pip install (?:-e )?"\.\[([\w,]+)\]"', "\n".join([README, *PAGES.values()]))
    assert named
    assert {extra for extras in named for extra in extras.split(",")} <= declared


def test_every_public_name_is_in_the_reference_and_on_the_page_with_everything():
    directives = re.findall(r"^::: ([\w.]+)", "\n".join(PAGES.values()), re.MULTILINE)
    page = PAGES[ROOT / "docs" / "all-of-slimmable.md"]
    packages = {path.rsplit(".", 1)[0] for path in directives} | set(directives)
    for name in ON_THE_PAGE:
        module = PUBLIC[name].__module__
        assert any(module == path or module.startswith(f"{path}.") for path in packages), f"{module} has no directive"
        listed = name in page or re.sub(r"[123]d$", "1d/2d/3d", name) in page or name in ("SwitchableBatchNorm",)
        assert listed or name.endswith("Error"), f"{name} is not on the page"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_documented_parameters_exist(name):
    value = PUBLIC[name]
    text = inspect.getdoc(value) or ""
    assert text, f"{name} has no docstring"
    if name.endswith("Error"):
        return
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", f"{text}\n", re.MULTILINE)
    documented = re.findall(r"^    (\w[\w, ]*):", section.group(1), re.MULTILINE) if section else []
    parameters = set(inspect.signature(value).parameters)
    assert {part for names in documented for part in names.split(", ")} <= parameters


def test_every_option_of_the_command_line_page_exists():
    page = PAGES[ROOT / "docs" / "reference" / "command-line.md"]
    (commands,) = (action for action in make_parser()._actions if action.dest == "command")
    known = {option for parser in commands.choices.values() for option in parser._option_string_actions}
    assert set(re.findall(r"`(--[\w-]+)", page)) <= known
    assert set(re.findall(r"^\| `(\w+)(?: \w+)*(?: --.*)?` \|", page, re.MULTILINE)) >= set(commands.choices)


def test_importing_the_package_imports_little_beside_torch():
    def loaded(package):
        code = f"import sys, {package}; print(*{{name.split('.')[0] for name in sys.modules}})"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        return set(run.stdout.split())

    new = loaded("slimmable") - loaded("torch")
    assert "slimmable" in new
    assert not {"timm", "torchvision", "sklearn", "matplotlib", "tqdm", "safetensors", "onnx"} & new
