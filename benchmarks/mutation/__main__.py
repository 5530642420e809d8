"""Do the tests see a fault? Changes one place of the package at a time, and counts the changes that no test notices.

    python -m benchmarks.mutation cover tests/losses slimmable/losses    # which tests run which lines; again for others
    python -m benchmarks.mutation run                                    # goes on where it stopped
    python -m benchmarks.mutation run --again                            # those once more that no test noticed
    python -m benchmarks.mutation show                                   # the unnoticed ones that nobody explained
    python -m benchmarks.mutation try slimmable/losses --every 1         # every line; nothing is kept

The changes are drawn by a seed, over all lines of the files, mostly by the operators of `mutmut` (see `mutants`). Each
is made in a copy of the working tree, in a process forked from one that has torch and pytest loaded, and shown to those
tests that run the changed lines, up to `--seconds` of them (see `covering`). A test that fails, or takes much longer,
has noticed it. `results/equivalent.csv` explains by hand the changes that change nothing. Needs `mutmut`, `libcst` and
`pytest-cov`.
"""

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.mutation.covering import ROOT, Covering, cover
from benchmarks.mutation.mutants import Mutant, sample

RESULTS = Path(__file__).parent / "results"
FIELDS = ("file", "function", "before", "after", "operator", "state", "line", "tests", "seconds", "noticed_by")
FILES = (
    "slimmable/losses", "slimmable/layers", "slimmable/training", "slimmable/view", "slimmable/analysis",
    "slimmable/gating", "slimmable/files", "slimmable/cli/run.py", "slimmable/_width.py", "slimmable/_convert.py",
)  # fmt: skip
LOADED = ("torch", "timm", "numpy", "safetensors.torch", "hypothesis", "torchvision")
EVERY = 7
FAST = (
    "-x", "-q", "--tb=line", "--assert=plain", "-p", "_hypothesis_pytestplugin", "--hypothesis-seed=0",
    "-p", "no:cacheprovider", "-p", "no:unraisableexception",
)  # fmt: skip
Row = dict[str, str]


def copied(folder: Path) -> None:
    """Copy the working tree, with what is not committed, and compile it once."""
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file() and not name.endswith((".csv", ".png")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "slimmable", "tests"], cwd=folder, check=False)


@contextmanager
def changed(file: Path, code: str) -> Iterator[None]:
    """Put other code into a file, and take it out again."""
    before = file.read_text()
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
        compiled.unlink()  # it is found by size and second, which may be the same
    file.write_text(code)
    try:
        yield
    finally:
        file.write_text(before)


def run_tests(folder: Path, tests: Sequence[str], seconds: float) -> tuple[str, str]:
    """Run tests in a forked process, and return what came out, and which test failed."""
    said = folder / "said.txt"
    child = os.fork()
    if not child:
        os.setsid()
        os.chdir(folder)
        os.environ["PYTHONPATH"] = sys.path[0] = str(folder)
        sys.stdout = sys.stderr = said.open("w")
        for descriptor in (1, 2):
            os.dup2(sys.stdout.fileno(), descriptor)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        code = 3
        try:
            code = pytest.main([*FAST, *tests])
        finally:
            sys.stdout.flush()
            os._exit(code)
    end = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)  # with the processes that tests started
            os.waitpid(child, 0)
            return "noticed", "(took too long)"
        time.sleep(0.02)
    if not status:
        return "unnoticed", ""
    failed = [line for line in said.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "noticed", (failed or ["(no test could run)"])[0].split(" - ")[0]


def tried(mutants: Sequence[Mutant], seconds: float) -> Iterator[Row]:
    """Show each mutant to its tests. A room's first tests must pass without a change."""
    for name in LOADED:
        __import__(name)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    covering, controlled = Covering(), set()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copied(folder)
        for mutant in mutants:
            start, tests = time.monotonic(), covering.tests_for(mutant, seconds)
            limit = 60 + 5 * sum(covering.seconds.get(test, 60) for test in tests)
            state, test = ("unnoticed", "(no test runs it)") if not tests else ("", "")
            room = mutant.path.split("/")[1]
            if tests and room not in controlled:
                controlled.add(room)
                if (control := run_tests(folder, tests, 10 * limit))[0] == "noticed":
                    raise SystemExit(f"a test of {mutant.path} fails without a change: {control[1]}")
            if tests:
                with changed(folder / mutant.path, mutant.code):
                    state, test = run_tests(folder, tests, limit)
            seconds_taken = f"{time.monotonic() - start:.1f}"
            line = str(mutant.lines.start)
            values = (*mutant.key, mutant.operator, state, line, str(len(tests)), seconds_taken, test)
            yield dict(zip(FIELDS, values, strict=True))


def read(path: Path) -> dict[tuple[str, ...], Row]:
    """Return the rows of a file by the change that they are about; later rows count."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {tuple(row[field] for field in FIELDS[:4]): row for row in csv.DictReader(file)}


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a table of changes anew."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def run(mutants: Sequence[Mutant], seconds: float, again: bool) -> None:
    """Try what has no result yet, or what nothing noticed, and write the results after each."""
    path = RESULTS / "mutants.csv"
    results = read(path)
    explained = read(RESULTS / "equivalent.csv")
    open_ = [
        mutant for mutant in mutants
        if mutant.key not in results
        or (again and results[mutant.key]["state"] == "unnoticed" and mutant.key not in explained)
    ]  # fmt: skip
    for number, row in enumerate(tried(open_, seconds), start=1):
        results[tuple(row[field] for field in FIELDS[:4])] = row
        write(path, list(results.values()))
        print(f"{number} of {len(open_)}: {row['file']}:{row['line']} {row['state']} {row['seconds']} s", flush=True)
    files, keys = {mutant.path for mutant in mutants}, {mutant.key for mutant in mutants}
    # others are no longer drawn, as of code that has changed
    kept = [row for key, row in results.items() if key in keys or row["file"] not in files]
    kept.sort(key=lambda row: (row["file"], int(row["line"])))
    write(path, kept)
    tabulate(kept)


def tabulate(rows: Sequence[Row]) -> None:
    """Write the table of results by folder, with where they come from."""
    from benchmarks.measuring import environment, markdown, origin  # imports the package, which no fork may have

    made = environment()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    explained = read(RESULTS / "equivalent.csv")
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        count = counts.setdefault("/".join(row["file"].split("/")[1:2]), Counter())
        equivalent = row["state"] == "unnoticed" and tuple(row[field] for field in FIELDS[:4]) in explained
        count["equivalent" if equivalent else row["state"]] += 1
    counts["all"] = sum(counts.values(), Counter())
    states = ("noticed", "equivalent", "unnoticed")
    table = markdown(
        ("code", "changes", "noticed", "change nothing", "unnoticed", "noticed of those that change something"),
        [
            (name, count.total(), *(count[state] for state in states),
             f"{count['noticed'] / max(1, count.total() - count['equivalent']):.1%}")
            for name, count in counts.items()
        ],
    )  # fmt: skip
    (RESULTS / "table.md").write_text(f"{table}\n{origin(made)}; commit {commit.stdout.strip()}.\n")


def show() -> None:
    """Print what nothing noticed and nobody explained, and write the table anew."""
    explained = read(RESULTS / "equivalent.csv")
    for key, row in read(RESULTS / "mutants.csv").items():
        if row["state"] == "unnoticed" and key not in explained:
            print(f"{row['file']}:{row['line']} {row['function']}, {row['tests']} tests\n- {key[2]}\n+ {key[3]}\n")
    tabulate(list(read(RESULTS / "mutants.csv").values()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and do what it says."""
    parser = argparse.ArgumentParser(prog="benchmarks.mutation", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    parts = {name: commands.add_parser(name) for name in ("cover", "run", "show", "try")}
    parts["cover"].add_argument("tests", nargs="+", help="files, folders and options of pytest")
    parts["try"].add_argument("files", nargs="+")
    parts["run"].add_argument("files", nargs="*", default=FILES, help="files and folders (default: the core)")
    parts["run"].add_argument("--again", action="store_true", help="try those again that nothing noticed")
    for part in (parts["run"], parts["try"]):
        part.add_argument("--every", type=int, default=EVERY, help=f"one line of so many (default: {EVERY})")
        part.add_argument("--seconds", type=float, default=12, help="of tests for each mutant (default: 12)")
        part.add_argument("--seed", type=int, default=0)
    parsed, options = parser.parse_known_args(arguments)
    if options and parsed.command != "cover":
        parser.error(f"unknown options: {' '.join(options)}")
    if parsed.command == "cover":
        cover([*parsed.tests, *options])
    elif parsed.command == "show":
        show()
    elif parsed.command == "run":
        run(sample(ROOT, parsed.files, parsed.every, parsed.seed), parsed.seconds, parsed.again)
    else:
        for row in tried(sample(ROOT, parsed.files, parsed.every, parsed.seed), parsed.seconds):
            print(
                f"{row['state']} {row['file']}:{row['line']} {row['noticed_by']}\n- {row['before']}\n+ {row['after']}"
            )


if __name__ == "__main__":
    main()
