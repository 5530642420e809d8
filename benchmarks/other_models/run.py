"""Convert models of other libraries than timm, and write down what came of it; see docs/zoo.md.

python -m benchmarks.other_models.run
"""

from __future__ import annotations

import argparse
import time
from fnmatch import fnmatchcase

import torch

from benchmarks.other_models import records
from benchmarks.other_models.measure import measure
from benchmarks.other_models.models import listed
from benchmarks.timm_zoo.guard import guarded
from benchmarks.timm_zoo.records import commit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="patterns such as transformers/*, separated by commas")
    parser.add_argument("--again", action="store_true", help="also those that have a record, not only the failed ones")
    parser.add_argument("--timeout", type=float, default=300, help="seconds a model")
    parser.add_argument("--memory", type=float, default=10, help="GiB a model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    entries, versions = listed()
    done = {} if arguments.again else {key for key, record in records.read().items() if not record["error"]}
    records.note_versions(versions)
    names = [key for key in entries if any(fnmatchcase(key, p) for p in arguments.only.split(",")) and key not in done]
    print(f"{len(names)} models", flush=True)
    at = commit()
    for key in names:
        start, entry = time.monotonic(), entries[key]
        record = guarded(lambda name: measure(entries[name]), key, arguments.timeout, arguments.memory)
        record = {"name": key, "family": entry.family, "commit": at, "error": "", **record}
        records.append(record)
        print(f"{time.monotonic() - start:6.1f} s  {key}  {record['error'] or record}", flush=True)
    records.tidy()


if __name__ == "__main__":
    main()
