"""Mutants are faults, stay the same when lines move, and are noticed by tests that look at what they change."""

import pytest

pytest.importorskip("libcst")
pytest.importorskip("mutmut")
pytest.importorskip("coverage")

from benchmarks.mutation.__main__ import changed, run_tests
from benchmarks.mutation.covering import Covering
from benchmarks.mutation.mutants import File, sample

CODE = '''"""Doc."""
from typing import Literal

Kind = Literal["a", "b"]

class Shelf:
    def __repr__(self):
        return "shelf" + str(1)

def doubled(number: int = 1) -> int:
    """Return twice the number."""
    if number is None:
        raise ValueError("no number" + str(2))
    print(f"{number + 1}", "a text for people")
    return sum(part for part, _ in zip((number, number), (3, 4), strict=True))
'''


@pytest.fixture
def root(tmp_path):
    (tmp_path / "shelf.py").write_text(CODE)
    return tmp_path


def test_texts_and_types_are_no_faults(root):
    mutants = sample(root, ["shelf.py"], 1, 0)
    assert {mutant.function for mutant in mutants} == {"doubled"}
    lines = CODE.splitlines()
    for mutant in mutants:
        compile(mutant.code, "shelf.py", "exec")
        assert "strict=True" in mutant.code
        assert mutant.before == lines[mutant.lines.start - 1].strip()
        assert len([line for line in mutant.code.splitlines() if line not in lines]) == 1
        assert not mutant.before.startswith(("raise", '"""'))
    assert [mutant.operator for mutant in sample(root, ["shelf.py"], 1, 0)] == [each.operator for each in mutants]
    assert sample(root, ["shelf.py"], len(mutants), 0) == mutants[:1]


def test_a_mutant_is_the_same_when_lines_move(root):
    before = [mutant.key for mutant in File(root, "shelf.py", 3).drawn()]
    (root / "shelf.py").write_text("OTHER = 1\n\n" + CODE)
    after = [mutant.key for mutant in File(root, "shelf.py", 3).drawn() if mutant.function]
    assert after == before
    assert after != [mutant.key for mutant in File(root, "shelf.py", 4).drawn()]


def test_a_test_that_looks_notices(root):
    (root / "test_shelf.py").write_text(
        "from shelf import doubled\n\ndef test_doubled():\n    assert doubled(2) == 4\n"
    )
    (root / "test_blind.py").write_text("from shelf import doubled\n\ndef test_doubled():\n    doubled(2)\n")
    assert run_tests(root, ["test_shelf.py"], 60) == ("unnoticed", "")
    with changed(root / "shelf.py", CODE.replace("(number, number)", "(number, 1)")):
        assert run_tests(root, ["test_shelf.py"], 60) == ("noticed", "FAILED test_shelf.py::test_doubled")
        assert run_tests(root, ["test_blind.py"], 60) == ("unnoticed", "")
    with changed(root / "shelf.py", CODE.replace("    print", "    while True: print")):
        assert run_tests(root, ["test_blind.py"], 5) == ("noticed", "(took too long)")
    assert (root / "shelf.py").read_text() == CODE


def test_fast_tests_of_the_same_room_come_first(root):
    mutant = next(mutant for mutant in File(root, "shelf.py", 0).drawn() if mutant.function)
    covering = Covering(root)
    covering.seconds = {"tests/far": 1.0, "tests/shelf": 2.0, "tests/slow": 9.0}
    covering._lines = {"shelf.py": {mutant.lines.start: set(covering.seconds), 2: {"other"}}}
    object.__setattr__(mutant, "path", "slimmable/shelf.py")
    covering._lines["slimmable/shelf.py"] = covering._lines["shelf.py"]
    assert covering.tests_for(mutant, 5) == ["tests/shelf", "tests/far"]
    assert covering.tests_for(mutant, 0) == ["tests/shelf"]
