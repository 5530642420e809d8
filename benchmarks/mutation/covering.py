"""Which tests run which lines, and how long each takes: so a mutant is shown to those tests only that can see it."""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
from coverage import CoverageData

from benchmarks.mutation.mutants import Mutant

ROOT = Path(__file__).parents[2]
CACHE = Path(__file__).parent / "cache"
NAME = "SLIMMABLE_MUTATION_TIMES"  # the environment variable with the path of the file of times

ELSEWHERE = {  # files that tests run in processes of their own, where nothing is recorded
    "slimmable/training/batchnorm.py": ("tests/training/test_processes.py",),
    "slimmable/view/norms.py": ("tests/life/test_distributed.py",),
}


class Times:
    """A plugin of pytest that writes how long each test took that passed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up a test's phases."""
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write the times."""
        passed = {test: round(time, 3) for test, time in self.seconds.items() if test not in self.failed}
        Path(os.environ[NAME]).write_text(json.dumps(passed))


def cover(tests: Sequence[str]) -> None:
    """Run tests, and keep which lines each of them ran. What was kept of other tests stays."""
    CACHE.mkdir(exist_ok=True)
    name = f"{time.time_ns()}"
    command = [sys.executable, "-m", __name__, *tests]
    environment = os.environ | {"COVERAGE_FILE": str(CACHE / f"{name}.cov"), NAME: str(CACHE / f"{name}.json")}
    subprocess.run(command, cwd=ROOT, env=environment, check=False)


class Covering:
    """What `cover` found, for all tests."""

    def __init__(self, folder: Path = CACHE):
        self.seconds: dict[str, float] = {}
        self._data: list[tuple[CoverageData, dict[str, str]]] = []
        for times in sorted(folder.glob("*.json")):
            self.seconds |= json.loads(times.read_text())
            data = CoverageData(str(times.with_suffix(".cov")))
            data.read()
            files = {"slimmable/" + file.rpartition("/slimmable/")[2]: file for file in data.measured_files()}
            self._data.append((data, files))
        self._lines: dict[str, dict[int, set[str]]] = {}

    def tests_of_lines(self, path: str) -> dict[int, set[str]]:
        """Return the tests that run each line of a file."""
        if path not in self._lines:
            found: dict[int, set[str]] = defaultdict(set)
            for data, files in self._data:
                for line, contexts in data.contexts_by_lineno(files[path]).items() if path in files else ():
                    found[line] |= {context.partition("|")[0] for context in contexts} & self.seconds.keys()
            self._lines[path] = found
        return self._lines[path]

    def tests_for(self, mutant: Mutant, seconds: float) -> list[str]:
        """Return the fitting tests, of a total time, those first that are fast and of the same folder as the code.

        They are the tests that run the changed lines; where none does (a default is made when the module is read),
        those of the function around, or of the file.
        """
        by_line = self.tests_of_lines(mutant.path)
        everywhere = range(1, max(by_line, default=0) + 1)
        spans = (mutant.lines, mutant.scope, everywhere)
        fitting = next(
            filter(None, ({test for line in span for test in by_line.get(line, ())} for span in spans)), set()
        )
        room = mutant.path.split("/")[1].removesuffix(".py")

        def costs(test: str) -> float:
            return self.seconds[test] * (1 if room.strip("_") in test else 3) + 0.01

        chosen, spent = [], 0.0
        for test in sorted(fitting, key=costs):
            if spent and spent + self.seconds[test] > seconds:
                break
            chosen.append(test)
            spent += self.seconds[test] + 0.01
        return [*chosen, *ELSEWHERE.get(mutant.path, ())]


if __name__ == "__main__":
    options = ["-p", "no:cacheprovider", "--cov=slimmable", "--cov-context=test", "--cov-report="]
    sys.exit(pytest.main([*options, *sys.argv[1:]], plugins=[Times()]))
