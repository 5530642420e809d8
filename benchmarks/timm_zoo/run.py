"""Convert every model of timm, and write down what came of it; see docs/zoo.md.

python -m benchmarks.timm_zoo.run --stage fake
"""

from __future__ import annotations

import argparse
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

import timm
import torch

from benchmarks.timm_zoo import fake, gates, real, records
from benchmarks.timm_zoo.guard import guarded

STAGES = {"fake": fake.measure, "real": real.measure, "gates": gates.measure}
HUGE = ("*giant*", "*gigantic*", "*enormous*", "*huge*", "*7b*", "*_6b*", "*xxlarge*", "*large*", "*x48*", "*x32d*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--names", default="*", help="patterns of model names, separated by commas")
    parser.add_argument("--max-parameters", type=float, default=150e6, help="of a model in the stage real")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--again", action="store_true", help="also those that have a line, not only the failed ones")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a model")
    parser.add_argument("--memory", type=float, default=8, help="GiB a model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records.note_versions()
    names = chosen(arguments.stage, arguments.names, arguments.max_parameters, arguments.again)
    print(f"{len(names)} models", flush=True)
    commit = records.commit()

    def one(name: str) -> None:
        start = time.monotonic()
        row = guarded(STAGES[arguments.stage], name, arguments.timeout, arguments.memory)
        row = {"name": name, "module": fake.module_of(name), "commit": commit, **row}
        records.append(arguments.stage, row)
        shown = {key: row[key] for key in records.COLUMNS[arguments.stage][4:] if row.get(key) not in ("", None)}
        print(f"{time.monotonic() - start:6.1f} s  {name}  {shown}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, names))
    records.tidy(arguments.stage)


def chosen(stage: str, patterns: str, most: float, again: bool) -> list[str]:
    """Return the names still to be done, in an order that soon shows something of every family, big ones last."""
    done = {name for name, row in records.read(stage).items() if not row["error"]}
    theirs = [n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith("timm.")]
    names = [n for n in theirs if any(fnmatchcase(n, p) for p in patterns.split(","))]
    if not again:
        names = [name for name in names if name not in done]
    if stage == "real":
        size = {name: float(row["parameters"] or "inf") for name, row in records.read("fake").items()}
        names = [name for name in names if size.get(name, float("inf")) <= most]
    return sorted(names, key=lambda name: (any(fnmatchcase(name, p) for p in HUGE), zlib.crc32(name.encode())))


if __name__ == "__main__":
    main()
