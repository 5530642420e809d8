"""Is there a network of functional operations, caches and several outputs that is converted wrongly?

    python -m benchmarks.random_networks.run --minutes 30     # goes on where the seed's last run stopped
    python -m benchmarks.random_networks.run --only 137       # one network, with its traceback
    python -m benchmarks.random_networks.run --quick          # a smoke run of seconds

Network number `n` of a seed is always the same. It is drawn from what the tests draw from, and all of their oracles are
tried on it (`tests/convert/random_networks`). A network for which one does not hold is made as small as it goes and
printed as the code that makes it. `results/seed-N.json` counts, and keeps the counter-examples; `--fresh` starts it
anew, as after a change of the package. The last step writes `results/table.md`.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring import environment, markdown, origin, read_results
from tests.convert.random_networks import Conversion, Layout, Network, check, drawn, smaller

HERE = Path(__file__).parent
SHRINK = 120  # seconds for each counter-example


def failure_of(layout: Layout, conversion: Conversion) -> str | None:
    """Return the kind of what goes wrong with a network, or None if nothing does."""
    try:
        check(layout, conversion)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = str(error).partition("\n")[0]
        return f"{type(error).__name__} in {Path(last.filename).name}, {last.name}: {said[:200]}"
    return None


def smallest(layout: Layout, conversion: Conversion, kind: str) -> tuple[Layout, Conversion]:
    """Return the smallest network found that fails at the same place."""
    end = time.monotonic() + SHRINK
    place = kind.partition(":")[0]

    def fails(layout: Layout, conversion: Conversion) -> bool:
        return time.monotonic() < end and (failure_of(layout, conversion) or "").startswith(place)

    return [(layout, conversion), *smaller(layout, conversion, fails)][-1]


def search(data: dict[str, Any], enough: Callable[[], bool], save: Callable[[], None]) -> None:
    """Try one network after the other, from the number in `data` on, and count in it."""
    while not enough():
        start = time.monotonic()
        number = data["networks"]
        layout, conversion = drawn(data["seed"], number)
        try:
            found = check(layout, conversion)
            data["hidden"] += found.hidden
            data["thinner"] += found.thinner
            data["vacuous"] += found.hidden and not found.thinner
        except Exception:
            kind = failure_of(layout, conversion) or "only once: not again with the same network"
            small = smallest(layout, conversion, kind)
            example = {"number": number, "kind": kind, "network": f"check{small}"}
            data["counterexamples"].append(example)
            print(f"number {number}: {kind}\n    {example['network']}", flush=True)
        steps = Network(layout).layout.steps
        data["steps"] += len(steps)
        data["operations"] = dict(Counter(data["operations"]) + Counter(step.operation for step in steps))
        data["networks"] += 1
        data["seconds"] = round(data["seconds"] + time.monotonic() - start, 3)
        if data["networks"] % 100 == 0:
            save()
            print(f"{data['networks']} networks, {len(data['counterexamples'])} counter-examples", flush=True)
    save()


def table(folder: Path) -> str:
    """Return the results of all seeds as Markdown."""
    found = read_results(folder)
    rows = []
    for data in found:
        steps, minutes = round(data["steps"] / data["networks"], 1), round(data["seconds"] / 60)
        kinds, wrong = len(data["operations"]), len(data["counterexamples"])
        rows.append([data["seed"], data["networks"], steps, kinds, data["thinner"], minutes, wrong])
    header = ["seed", "networks", "steps each", "kinds of steps", "get thinner", "minutes", "counter-examples"]
    return markdown(header, rows) + "".join(f"\n{line}\n" for line in sorted({origin(data) for data in found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="check the network of this number only")
    parser.add_argument("--fresh", action="store_true", help="start the seed anew")
    parser.add_argument("--quick", action="store_true", help="three networks")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.only is not None:
        layout, conversion = drawn(options.seed, options.only)
        print(f"check({Network(layout).layout}, {conversion})")
        check(layout, conversion)
        return
    path = options.out / f"seed-{options.seed}.json"
    counts: dict[str, Any] = dict.fromkeys(("networks", "steps", "hidden", "thinner", "vacuous", "seconds"), 0)
    data = {"seed": options.seed, **counts, "counterexamples": [], "operations": {}}
    if path.exists() and not options.fresh:
        data |= json.loads(path.read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    end, last = time.monotonic() + 60 * options.minutes, data["networks"] + 3

    def enough() -> bool:
        return time.monotonic() > end or (options.quick and data["networks"] >= last)

    def save() -> None:
        path.write_text(json.dumps(data | environment(), indent=1) + "\n")

    search(data, enough, save)
    (options.out / "table.md").write_text(table(options.out))
    print(f"seed {options.seed}: {data['networks']} networks, {len(data['counterexamples'])} counter-examples")
    print((options.out / "table.md").read_text())


if __name__ == "__main__":
    main()
