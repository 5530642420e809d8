"""What becomes of a run when something goes wrong? Faults from outside, tried on tiny runs.

    python -m benchmarks.faults                       # all, about an hour on one core
    python -m benchmarks.faults kill-9 full-disk --tries 3

A fault ends as promised if the program says what happened in one line without a traceback, has the exit code that a
shell expects, leaves no process, lock or half-written file behind, and then goes on to the same numbers, bit for bit,
as a run without a fault. Each try is noted at once in `results/faults.csv`; those that are noted are not repeated. Full
and read-only disks are small file systems in memory, which only root can make on Linux; others skip them.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.measuring import append_rows, environment, markdown, origin, read_rows

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FIELDS = ("fault", "number", "answered", "message")
TINY = ("--num-images", "64", "--batch-size", "16", "--epochs", "2", "--widths", "1", "0.5", "--device", "cpu")
TRIES = {"kill-9": 20, "killed-worker": 10, "full-disk": 10, "interrupted-import": 10}
DEADLINE = 300  # seconds, after which a program counts as hanging


class BrokenError(Exception):
    """A fault that did not end as promised."""


class Program:
    """`slimmable` in a process of its own, with its output."""

    def __init__(self, *arguments: str | Path, **settings: object) -> None:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | settings
        command = [sys.executable, "-m", "slimmable", *map(str, arguments)]
        self.process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)  # type: ignore
        self.output, self.errors = "", ""

    def wait_for(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds, or the program ends."""
        end = time.monotonic() + DEADLINE
        while not holds() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)

    def signal(self, *numbers: int) -> None:
        """Send signals, one after another."""
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.05)

    def workers(self) -> list[int]:
        """Return the processes that it started."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def end(self) -> int:
        """Wait for its end, and return the exit code."""
        self.output, self.errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode

    def ends_well(self, code: int, says: str) -> None:
        """Raise `BrokenError` unless it ends with this code and one line that says this."""
        found = self.end()
        lines = [line for line in (self.errors or "").splitlines() if line and "step/s" not in line]
        last = [line for line in (self.output or "").splitlines() if "interrupted after" in line]
        said = " ".join(lines + last)
        if found != code or says not in said or len(lines + last) != 1 or "Traceback" in said:
            raise BrokenError(f"exit code {found}, {len(lines + last)} lines: {said[-500:]}")


def same_results(folder: Path, whole: Path) -> None:
    """Raise `BrokenError` unless two run folders hold the same numbers and files."""
    if {path.name for path in folder.iterdir()} != {path.name for path in whole.iterdir()}:
        raise BrokenError(f"files {sorted(path.name for path in folder.iterdir())}")
    for name in ("metrics.csv", "losses.csv"):
        if (folder / name).read_text() != (whole / name).read_text():
            raise BrokenError(f"another {name}")
    ours, theirs = (load_file(each / "checkpoint.safetensors") for each in (folder, whole))
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        raise BrokenError("another checkpoint")


def clean(folder: Path) -> None:
    """Raise `BrokenError` if something half-written is left in a folder."""
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")] if folder.exists() else []
    if left:
        raise BrokenError(f"left behind: {left}")


def goes_on(folder: Path, whole: Path) -> None:
    """Continue a run, or start it if there is nothing to continue, and compare it with the one without a fault."""
    resume = ("--resume",) if (folder / "config.json").exists() else ()
    program = Program("pretrain", *TINY, "--workers", "0", "--log-every", "1", "--output", folder, *resume)
    if program.end() != 0:
        raise BrokenError(f"cannot go on: {program.errors[-500:]}")
    same_results(folder, whole)


def pretrain(folder: Path, *more: str, **settings: object) -> Program:
    options = more if "--workers" in more else (*more, "--workers", "0")
    return Program("pretrain", *TINY, "--log-every", "1", "--output", folder, *options, **settings)


def trained(folder: Path) -> Callable[[], bool]:
    """Return a test of whether a run has taken steps."""
    return lambda: (folder / "losses.csv").exists() and (folder / "losses.csv").read_text().count("\n") > 2


@contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """Put a small file system in memory under a folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def kill_9(place: Path, whole: Path, draw: random.Random) -> None:
    program = pretrain(place / "run")
    moment = time.monotonic() + draw.uniform(0, float((whole.parent / "seconds").read_text()))
    program.wait_for(lambda: time.monotonic() > moment)
    program.process.kill()
    program.end()
    goes_on(place / "run", whole)


def killed_worker(place: Path, whole: Path, draw: random.Random) -> None:
    program = pretrain(place / "run", "--workers", "2")
    program.wait_for(lambda: len(program.workers()) >= 2 and (place / "run/losses.csv").exists())
    time.sleep(draw.uniform(0, 0.5))
    workers = program.workers()
    for worker in draw.sample(workers, min(1, len(workers))):
        os.kill(worker, signal.SIGKILL)
    try:
        program.ends_well(2, "--resume")
    except BrokenError:
        if program.process.returncode != 0:  # the worker had done its work
            raise
    clean(place / "run")
    if any(Path(f"/proc/{worker}").exists() for worker in workers):
        raise BrokenError("a worker is left")
    goes_on(place / "run", whole)


def full_disk(place: Path, whole: Path, draw: random.Random) -> None:
    size = sum(path.stat().st_size for path in whole.iterdir())
    with disk(place / "disk", f"size={int(draw.uniform(0.02, 0.95) * size) // 1024}k"):
        folder = place / "disk/run"
        pretrain(folder).ends_well(2, "No space left on device")
        clean(folder)
        subprocess.run(["mount", "-o", "remount,size=256m", place / "disk"], check=True)
        goes_on(folder, whole)


def full_disk_evaluate(place: Path, whole: Path, draw: random.Random) -> None:
    with disk(place / "disk", "size=256m"):
        folder = place / "disk/run"
        shutil.copytree(whole, folder)
        used = sum(-(-path.stat().st_size // 4096) * 4 for path in folder.iterdir())
        subprocess.run(["mount", "-o", f"remount,size={used + 12}k", place / "disk"], check=True)
        command = draw.choice([("evaluate", folder, "--workers", "0"), ("export", folder, "--width", "all")])
        Program(*command).ends_well(2, "No space left on device")
        clean(folder)
        subprocess.run(["mount", "-o", "remount,size=256m", place / "disk"], check=True)
        same_results(folder, whole)


def read_only(place: Path, whole: Path, draw: random.Random) -> None:
    with disk(place / "disk", "size=256m"):
        shutil.copytree(whole, place / "disk/run")
        subprocess.run(["mount", "-o", "remount,ro", place / "disk"], check=True)
        pretrain(place / "disk/new").ends_well(2, "Read-only file system")
        pretrain(place / "disk/run", "--resume").ends_well(2, "Read-only file system")


def removed_folder(place: Path, whole: Path, draw: random.Random) -> None:
    program = pretrain(place / "run", "--epochs", "50")
    program.wait_for(trained(place / "run"))
    shutil.rmtree(place / "run")
    program.ends_well(2, "start the run again")


def signalled(number: int, code: int, times: int = 1) -> Callable[[Path, Path, random.Random], None]:
    def try_it(place: Path, whole: Path, draw: random.Random) -> None:
        program = pretrain(place / "run", "--workers", draw.choice("02"))
        program.wait_for(trained(place / "run"))
        program.signal(*[number] * times)
        program.ends_well(code, "--resume")
        clean(place / "run")
        goes_on(place / "run", whole)

    return try_it


def interrupted_import(place: Path, whole: Path, draw: random.Random) -> None:
    program = pretrain(place / "run")
    program.wait_for(lambda: "site-packages" in Path(f"/proc/{program.process.pid}/maps").read_text())
    time.sleep(draw.uniform(0, 2))
    program.signal(signal.SIGINT)
    program.ends_well(130, "interrupted")
    clean(place / "run")


def terminated_evaluation(place: Path, whole: Path, draw: random.Random) -> None:
    shutil.copytree(whole, place / "run")
    program = Program("evaluate", place / "run", "--workers", "1")
    program.wait_for((place / "run/.lock").exists)
    time.sleep(draw.uniform(0, 1))
    program.signal(signal.SIGTERM)
    program.ends_well(143, "interrupted")
    same_results(place / "run", whole)


def terminated_at_the_end(place: Path, whole: Path, draw: random.Random) -> None:
    program = pretrain(place / "run")
    program.wait_for((place / "run/model.safetensors").exists)
    program.signal(signal.SIGTERM)
    program.ends_well(143, "--resume")
    clean(place / "run")
    goes_on(place / "run", whole)


def closed_terminal(place: Path, whole: Path, draw: random.Random) -> None:
    ours, theirs = pty.openpty()
    pipes = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    program = pretrain(place / "run", preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), **pipes)
    os.close(theirs)
    program.wait_for(trained(place / "run"))
    os.close(ours)
    if program.end() != 129:
        raise BrokenError(f"exit code {program.process.returncode}")
    clean(place / "run")
    goes_on(place / "run", whole)


def closed_output(place: Path, whole: Path, draw: random.Random) -> None:
    program = pretrain(place / "run")
    program.wait_for((place / "run/config.json").exists)
    program.process.stdout.close()  # type: ignore[union-attr]
    program.process.stdout = None
    program.ends_well(2, "--resume")
    clean(place / "run")
    goes_on(place / "run", whole)


def two_runs(place: Path, whole: Path, draw: random.Random) -> None:
    first, second = pretrain(place / "run"), pretrain(place / "run", "--seed", "1")
    codes = [program.end() for program in (first, second)]
    if sorted(codes) != [0, 2]:
        raise BrokenError(f"exit codes {codes}")
    refused = (first, second)[codes.index(2)]
    if "in use by process" not in refused.errors or refused.errors.count("\n") != 1:
        raise BrokenError(refused.errors)
    if codes[0] == 0:
        same_results(place / "run", whole)


def beside_a_live_run(place: Path, whole: Path, draw: random.Random) -> None:
    program = pretrain(place / "run", "--epochs", "1000")
    program.wait_for(trained(place / "run"))
    pretrain(place / "run", "--epochs", "1000", "--resume").ends_well(2, f"in use by process {program.process.pid} on")
    program.process.kill()
    program.end()


def out_of_memory(place: Path, whole: Path, draw: random.Random) -> None:
    more = ("--num-images", "1000000", "--image-size", str(draw.randint(3000, 4000)))
    pretrain(place / "run", *more).ends_well(2, "out of memory")
    if (place / "run").exists():
        raise BrokenError("a folder is left")


FAULTS: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "kill-9": kill_9,
    "killed-worker": killed_worker,
    "full-disk": full_disk,
    "full-disk-evaluate-export": full_disk_evaluate,
    "read-only-disk": read_only,
    "removed-folder": removed_folder,
    "interrupted-import": interrupted_import,
    "sigint": signalled(signal.SIGINT, 130),
    "sigint-twice": signalled(signal.SIGINT, 130, times=2),
    "sigterm": signalled(signal.SIGTERM, 143),
    "sighup": signalled(signal.SIGHUP, 129),
    "closed-terminal": closed_terminal,
    "closed-output": closed_output,
    "sigterm-evaluating": terminated_evaluation,
    "sigterm-at-the-end": terminated_at_the_end,
    "two-runs": two_runs,
    "resumed-beside-a-live-run": beside_a_live_run,
    "out-of-memory": out_of_memory,
}
NEED_ROOT = ("full-disk", "full-disk-evaluate-export", "read-only-disk")


def table() -> str:
    """Return the noted tries as a Markdown table."""
    rows = read_rows(RESULTS / "faults.csv")
    counts = []
    for fault in FAULTS:
        own = [row for row in rows if row["fault"] == fault]
        counts.append([fault.replace("-", " "), len(own), sum(row["answered"] == "True" for row in own)])
    return markdown(["fault", "tried", "answered"], counts) + f"\n{origin(environment())}\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"any of {', '.join(FAULTS)}; all by default")
    parser.add_argument(
        "--tries", type=int, help="for each fault; by default 3, and 10 or 20 for those that matter most"
    )
    given = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's setting would pass to the programs
    noted = {(row["fault"], row["number"]) for row in read_rows(RESULTS / "faults.csv")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.monotonic()
        if pretrain(folder / "whole").end() != 0:
            raise SystemExit("a run without a fault fails")
        (folder / "seconds").write_text(str(time.monotonic() - begin))
        for fault in given.faults or FAULTS:
            if fault in NEED_ROOT and (not hasattr(os, "geteuid") or os.geteuid() != 0):
                print(f"{fault}: skipped, only root can make a small file system")
                continue
            for number in range(given.tries or TRIES.get(fault, 3)):
                if (fault, str(number)) in noted:
                    continue
                place, message = folder / f"{fault}-{number}", ""
                place.mkdir()
                try:
                    FAULTS[fault](place, folder / "whole", random.Random(f"{fault} {number}"))
                except BrokenError as error:
                    message = str(error)
                except subprocess.TimeoutExpired as error:
                    message = str(error)
                row = {"fault": fault, "number": number, "answered": not message, "message": message}
                append_rows(RESULTS / "faults.csv", FIELDS, [row])
                print(fault, number, message or "as promised", flush=True)
                shutil.rmtree(place, ignore_errors=True)
    (RESULTS / "table.md").write_text(table())
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
