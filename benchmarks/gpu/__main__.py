"""How does the package run on a GPU? Its CUDA tests, what training and inference cost, and what works there.

    python -m benchmarks.gpu                        # everything, 8 minutes on one GPU
    python -m benchmarks.gpu --device cpu --tiny    # a smoke run of what works without a GPU

Each part runs in a process of its own, so that one that fails, hangs or breaks the device does not stop the others. The
result file is written anew after each part. Ends with 0 if all parts ran without a failure, otherwise with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import PARTS, ROOT
from benchmarks.measuring import markdown, origin, read_results, write_result

HERE = Path(__file__).parent
LEAST = 15  # seconds, below which no part is started


def command_of(part: str, device: str, tiny: bool) -> list[str]:
    """Return the command that runs one part."""
    options = ["--device", device, *(["--tiny"] if tiny else [])]
    return [sys.executable, "-m", "benchmarks.gpu.parts", part, *options]


def run_part(part: str, command: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run one part and return what it found, also if it fails or must be ended."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    state = ""
    try:
        told, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        state = f"cut off after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
    if state:
        told, errors = process.communicate()
    rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    ends = [row.pop("error") for row in rows if "error" in row] + errors.strip().splitlines()[-1:]
    if not state:
        state = "works" if not process.returncode else f"failed: {next(iter(ends), f'ended with {process.returncode}')}"
    found: dict[str, Any] = {"part": part, "state": state, "seconds": round(time.perf_counter() - begin, 1)}
    found["rows"] = [row for row in rows if row]
    if state != "works":
        found["errors"] = errors.splitlines()[-40:]
    return found


def table(folder: Path) -> str:
    """Return the results of a folder as Markdown."""
    texts = []
    for result in read_results(folder):
        lines = []
        for part in result["rows"]:
            for row in part["rows"]:
                figures = [f"{name.replace('_', ' ')} {value}" for name, value in row.items() if name != "what"]
                lines.append((part["part"], row["what"], ", ".join(figures)))
            if part["state"] != "works" or not part["rows"]:
                lines.append((part["part"], "", f"**{part['state']}**".replace("|", "/")))
        source = f"{origin(result)}; commit {result['commit']}"
        texts.append(markdown(("part", "what", "found"), lines) + f"\n{source}\n")
    return "\n".join(texts)


def commit_of(folder: Path) -> str:
    """Return the commit of a checkout, marked if files were changed."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts one after the other, and write the result and the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a smoke run")
    parser.add_argument("--minutes", type=float, default=8, help="for all parts; those that do not fit are left out")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--commit", help="of the code, for the result file; by default what git says")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result file")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device: nothing was measured. --device cpu --tiny tries the parts that need none.")
        return 0
    end = time.perf_counter() + 60 * given.minutes
    card = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    variant = re.sub(r"\W+", "-", card.lower()) + ("-tiny" if given.tiny else "")
    commit = given.commit or commit_of(ROOT)
    found: list[dict[str, Any]] = []
    for part in given.only:
        left = end - time.perf_counter()
        if left < LEAST:
            found.append({"part": part, "state": "left out: the time was up", "seconds": 0.0, "rows": []})
        else:
            most = PARTS[part][1] if given.device == "cuda" else left
            found.append(run_part(part, command_of(part, given.device, given.tiny), min(most, left)))
        print(f"{part}: {found[-1]['state']}, {found[-1]['seconds']} s", flush=True)
        if "errors" in found[-1]:
            print("\n".join(found[-1]["errors"]), file=sys.stderr, flush=True)
        write_result(given.out, "gpu", found, variant, dtype="bfloat16", commit=commit)
        (given.out / "table.md").write_text(table(given.out))
    print(f"\n{table(given.out)}")
    return int(any(part["state"] != "works" for part in found))


if __name__ == "__main__":
    sys.exit(main())
