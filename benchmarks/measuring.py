"""What the benchmarks share: timing side by side on a noisy machine, and result files that say how they were made."""

from __future__ import annotations

import contextlib
import csv
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

import slimmable


@dataclass
class Times:
    """What each round took, in ms: by the clock on the wall, and of processor time in all threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = 5,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, Times]:
    """Time the calls in turn, A B C, B C A, C A B, ..., for about `seconds` and at least `least` rounds.

    What disturbs the machine for longer than one round disturbs all of them, so that the ratios within a round are
    steadier than the times. One untimed round comes first. The rounds are a multiple of the number of calls: each
    is first, second, ... equally often. On a GPU `wait` is `torch.cuda.synchronize`: a call is over when its work is.
    """
    names = list(calls)
    times = {name: Times() for name in names}
    for name in names:
        calls[name]()
    wait()
    gc.collect()
    gc.disable()
    try:
        end, rounds = time.perf_counter() + seconds, 0
        while rounds < least or rounds % len(names) or time.perf_counter() < end:
            first = rounds % len(names)
            for name in names[first:] + names[:first]:
                wall, cpu = time.perf_counter(), time.process_time()
                calls[name]()
                wait()
                times[name].cpu.append((time.process_time() - cpu) * 1000)
                times[name].wall.append((time.perf_counter() - wall) * 1000)
            rounds += 1
    finally:
        gc.enable()
    return times


def compare(times: Times, baseline: Times) -> dict[str, float]:
    """Return the median of the ratios within each round, in processor time with a 95 % interval, and on the wall.

    Processor time is what counts on a machine that does other work too: waiting for a core is not in it.
    """
    named = {
        **_ratio(times.cpu, baseline.cpu),
        "wall_ratio": statistics.median(a / b for a, b in zip(times.wall, baseline.wall, strict=True)),
        "baseline_cpu_ms": statistics.median(baseline.cpu),
    }
    return {name: round(value, 4) for name, value in named.items()} | {"rounds": len(times.cpu)}


def ratio_of(compared: Mapping[str, float]) -> str:
    """Return the ratio of `compare`, or of `compare_wall`, with its interval."""
    return f"{compared['ratio']:.3f} ({compared['low']:.3f} – {compared['high']:.3f})"


def compare_wall(times: Times, baseline: Times) -> dict[str, float]:
    """Return the median of the ratios within each round by the clock on the wall, as counts where a GPU works."""
    named = {
        "ms": statistics.median(times.wall),
        "baseline_ms": statistics.median(baseline.wall),
        **_ratio(times.wall, baseline.wall),
    }
    return {name: round(value, 4) for name, value in named.items()} | {"rounds": len(times.wall)}


def _ratio(times: Sequence[float], baseline: Sequence[float]) -> dict[str, float]:
    """Return the median of the ratios with a 95 % interval."""
    ratios = sorted(a / b for a, b in zip(times, baseline, strict=True))
    n = len(ratios)
    half = 0.98 * n**0.5  # 1.96 standard deviations of the rank of the median
    return {
        "ratio": statistics.median(ratios),
        "low": ratios[max(0, int(n / 2 - half))],
        "high": ratios[min(n - 1, int(n / 2 + half))],
    }


def median_cpu_ms(times: Times) -> float:
    """Return the median processor time."""
    return round(statistics.median(times.cpu), 4)


def reset_peak() -> int:
    """Forget the largest memory that this process has had, where the system can, and return what it has now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes() -> int:
    """Return the largest memory that this process has had, in bytes, or 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def environment() -> dict[str, Any]:
    """Return the command, the versions and the machine, with its GPU if it has one."""
    card = {"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "command": " ".join(["python", "-m", _module_name(), *sys.argv[1:]]),
        "versions": {
            "slimmable": slimmable.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            **card,
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 2),
        },
        "dtype": str(torch.get_default_dtype()),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_result(
    folder: Path, name: str, rows: list[dict[str, Any]], variant: str, dtype: str = "float32", **more: Any
) -> Path:
    """Write one result file with the environment and the rows; its name says what else the figures depend on."""
    folder.mkdir(parents=True, exist_ok=True)
    release = ".".join(torch.__version__.split(".")[:2])
    path = folder / f"{name}--{variant}-{dtype}-torch{release}-threads{torch.get_num_threads()}.json"
    path.write_text(json.dumps({"name": name, **environment(), **more, "rows": rows}, indent=1) + "\n")
    return path


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read all result files of a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, fields: Sequence[str], found: Sequence[Mapping[str, Any]]) -> None:
    """Add the rows of one run to a CSV file, all at once, and note beside it how they were made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(found)
    path.with_suffix(".json").write_text(json.dumps(environment(), indent=1) + "\n")


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def origin(result: Mapping[str, Any]) -> str:
    """Say in one line where the numbers of a result come from."""
    machine, versions = result["machine"], result["versions"]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    card = f"{machine['card']}; " if "card" in machine else ""
    return f"{card}{machine['cpu']}, {machine['cores']} cores; {named}; {result['date']}"


def _module_name() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec is not None else sys.argv[0]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
