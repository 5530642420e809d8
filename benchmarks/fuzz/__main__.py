"""Is there a file that a reader neither reads right nor refuses by name, or that costs time or memory for nothing?

    python -m benchmarks.fuzz --minutes 10            # goes on where the seed's last run stopped
    python -m benchmarks.fuzz --readers load          # only these
    python -m benchmarks.fuzz --only load:137         # one input, with its traceback
    python -m benchmarks.fuzz --quick                 # a smoke run of seconds

Each module of this folder with `READERS` adds readers. A reader is a function of random numbers and an empty folder,
which makes one input in that folder and returns the call that reads it, and in words what was made. The call either
returns (and checks itself, with `assert`, that what it read is right), or raises a `SlimmableError`; anything else is
a fault, and so is what takes more than a minute or a GiB, or leaves something outside the folder. An input is the same
whenever reader, seed and number are. `results/seed-N.json` counts, and keeps the faults; `--fresh` starts it anew. The
last step writes `results/table.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from benchmarks.measuring import environment, markdown, origin, peak_bytes, read_results, reset_peak
from slimmable.errors import SlimmableError

HERE = Path(__file__).parent
SECONDS = 60  # for one input
BYTES = 2**30  # more than before, while one input is read

Reader = Callable[[random.Random, Path], "tuple[Callable[[], object], str]"]


class Hangs(BaseException):
    """An input that takes too long; no `except Exception` catches it."""


@dataclass(frozen=True)
class Outcome:
    """What became of one input: "answered", "refused" or "fault", what it was, what was said, and what it cost."""

    kind: str
    description: str
    said: str
    seconds: float
    bytes: int


def all_readers() -> dict[str, Reader]:
    """Return the readers of all modules beside this one."""
    names = [each.name for each in iter_modules([str(HERE)]) if each.name != "__main__"]
    modules = [import_module(f"benchmarks.fuzz.{name}") for name in names]
    return {name: reader for each in modules for name, reader in getattr(each, "READERS", {}).items()}


def attempt(name: str, reader: Reader, seed: int, number: int) -> Outcome:
    """Make the input of this number and read it."""
    with tempfile.TemporaryDirectory() as outside, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(outside) / "input"
        folder.mkdir()
        call, description = reader(random.Random(f"{name} {seed} {number}"), folder)
        before, start = reset_peak(), time.monotonic()
        kind, said = "answered", ""
        try:
            with _limited(SECONDS), _silent():
                call()
        except SlimmableError as error:
            kind, said = "refused", f"{type(error).__name__}: {error}"
        except (Exception, SystemExit, Hangs):
            kind, said = "fault", traceback.format_exc(limit=-6).encode("ascii", "backslashreplace").decode()
        seconds, grown = time.monotonic() - start, max(0, peak_bytes() - before)
        if grown > BYTES:
            kind, said = "fault", f"took {grown / 2**20:.0f} MiB; {said}"
        strays = [str(path) for path in Path(outside).iterdir() if path != folder]
        if strays or any(folder.rglob("ran")):
            kind, said = "fault", f"code ran, or something was written outside the folder: {strays}; {said}"
    return Outcome(kind, description, said, seconds, grown)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hangs(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def search(data: dict[str, Any], readers: dict[str, Reader], enough: Callable[[], bool]) -> None:
    """Try one input after the other, always of the reader that has had the least time, and count in `data`."""
    known = data["readers"]
    for name in readers:
        zero = {"tried": 0, "answered": 0, "refused": 0, "fault": 0, "seconds": 0.0, "longest": 0.0, "most_mib": 0}
        known.setdefault(name, zero)
    while not enough():
        name = min(readers, key=lambda each: known[each]["seconds"])
        counts, start = known[name], time.monotonic()
        number = counts["tried"]
        found = attempt(name, readers[name], data["seed"], number)
        counts["tried"] += 1
        counts[found.kind] += 1
        counts["longest"] = round(max(counts["longest"], found.seconds), 2)
        counts["most_mib"] = max(counts["most_mib"], found.bytes >> 20)
        counts["seconds"] = round(counts["seconds"] + time.monotonic() - start, 3)
        if found.kind == "fault":
            data["faults"].append({"input": f"{name}:{number}", "what": found.description, "said": found.said})
            print(ascii(f"{name}:{number} ({found.description})"), found.said, sep="\n", flush=True)


def table(folder: Path) -> str:
    """Return the results of all seeds as Markdown."""
    found = read_results(folder)
    rows = [
        [
            data["seed"],
            name,
            *(counts[each] for each in ("tried", "answered", "refused", "fault", "longest", "most_mib")),
        ]
        for data in found
        for name, counts in sorted(data["readers"].items())
    ]
    header = ["seed", "reader", "tried", "answered", "refused", "faults", "longest (s)", "most memory (MiB)"]
    return markdown(header, rows) + "".join(f"\n{line}\n" for line in sorted({origin(data) for data in found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+", metavar="NAME", help="by default all")
    parser.add_argument("--only", metavar="NAME:NUMBER", help="read the input of this number only")
    parser.add_argument("--fresh", action="store_true", help="start the seed anew")
    parser.add_argument("--quick", action="store_true", help="ten inputs")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    readers = all_readers()
    if options.only is not None:
        name, number = options.only.split(":")
        print(attempt(name, readers[name], options.seed, int(number)))
        return
    path = options.out / f"seed-{options.seed}.json"
    data: dict[str, Any] = {"seed": options.seed, "readers": {}, "faults": []}
    if path.exists() and not options.fresh:
        data |= json.loads(path.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    end, last = time.monotonic() + 60 * options.minutes, 10 + sum(each["tried"] for each in data["readers"].values())

    def enough() -> bool:
        tried = sum(each["tried"] for each in data["readers"].values())
        return time.monotonic() > end or (options.quick and tried >= last)

    try:
        search(data, {name: readers[name] for name in options.readers or readers}, enough)
    finally:
        path.write_text(json.dumps({**data, **environment()}, indent=1) + "\n")
        (options.out / "table.md").write_text(table(options.out))
    print(table(options.out))
    raise SystemExit(1 if data["faults"] else 0)


if __name__ == "__main__":
    main()
