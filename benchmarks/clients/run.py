"""Run the published programs of others, with the few lines that train all widths; see docs/how-to/clients.md.

python -m benchmarks.clients.run --programs FOLDER
"""

from __future__ import annotations

import argparse
import time
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from benchmarks.clients import facebook, lightly, records
from benchmarks.clients.measure import measure
from benchmarks.measuring import environment
from benchmarks.timm_zoo.guard import guarded

CLIENTS = {client.name: client for client in [*lightly.CLIENTS, *facebook.CLIENTS]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, required=True, help="folder with a checkout of each repository")
    parser.add_argument("--only", default="*", help="patterns such as lightly/*, separated by commas")
    parser.add_argument("--again", action="store_true", help="also those for which everything held")
    parser.add_argument("--out", type=Path, default=records.FOLDER, help="folder of the results")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a program")
    parser.add_argument("--memory", type=float, default=10, help="GiB a program")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    earlier = [] if arguments.again else records.read(arguments.out)
    done = {record["name"] for record in earlier if records.holds(record)}
    for name in CLIENTS:
        if name in done or not any(fnmatchcase(name, pattern) for pattern in arguments.only.split(",")):
            continue
        if not (arguments.programs / CLIENTS[name].source).exists():
            print(f"{name}: no {arguments.programs / CLIENTS[name].source}", flush=True)
            continue
        start = time.monotonic()
        found = guarded(
            lambda name: measure(CLIENTS[name], arguments.programs), name, arguments.timeout, arguments.memory
        )
        record = {"name": name, **found, **environment()}
        records.write(record, arguments.out)
        shown = record.get("error") or {stage: record[stage] for stage in records.STAGES}
        print(f"{time.monotonic() - start:6.1f} s  {name}  {shown}", flush=True)
    (arguments.out / "table.md").write_text(records.table(records.read(arguments.out)))


if __name__ == "__main__":
    main()
