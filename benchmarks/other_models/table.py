"""Write the table of the sweep over other libraries, `results/table.md`: every model, and each that does not hold.

python -m benchmarks.other_models.table
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.measuring import markdown
from benchmarks.other_models import records
from benchmarks.other_models.measure import as_expected
from benchmarks.timm_zoo.fake import LIMIT
from benchmarks.timm_zoo.table import ORACLES, broken

Record = dict[str, Any]


def main() -> None:
    found = list(records.read().values())
    text = page(found, json.loads((records.FOLDER / "versions.json").read_text()))
    (records.FOLDER / "table.md").write_text(text)
    print(text)


def page(found: Sequence[Record], versions: dict[str, str]) -> str:
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    ran = [record for record in found if not record["error"]]
    tried = [record for record in ran if "full" in record]
    cheap = [record for record in ran if record["at_half"] <= LIMIT]
    right = [record for record in ran if not any(wrong_outputs(record))]
    whole = [record for record in found if not any(faults(record))]
    sums = (
        f"With {named}: {len(ran)} of {len(found)} models convert and run at widths 1, 0.75, 0.5 and 0.25; all checks "
        f"with numbers hold for {len([r for r in tried if not broken(r)])} of the {len(tried)} that were tried with "
        f"numbers; the outputs of {len(right)} are as they should be; {len(cheap)} need at most {LIMIT} of the "
        f"multiply-adds at 0.5. All of this holds for {len(whole)}, and for the following it does not.\n"
    )
    header = ["model", "what does not hold"]
    lines = [[record["name"], "; ".join(faults(record))] for record in found if any(faults(record))]
    return "\n".join([sums, markdown(header, lines), *libraries(found)])


def faults(record: Record) -> Iterator[str]:
    """Yield what does not hold of a model."""
    if record["error"]:
        yield record["error"].replace("|", "\\|")[:200]
        return
    if broken(record):
        yield broken(record)
    yield from wrong_outputs(record)
    if record["at_half"] > LIMIT:
        yield f"{record['at_half']:.3f} of the multiply-adds at 0.5: {reason(record)}"


def wrong_outputs(record: Record) -> Iterator[str]:
    for output in record["outputs"]:
        if not as_expected(output):
            name = output["name"] or "the output"
            yield f"{name} should be {output['expected']}, but goes from {output['full']} to {output['half']}"


def reason(record: Record) -> str:
    pinned = f"full stay {record['pinned']}" if record["pinned"] else ""
    return "; ".join(part for part in (record["cause"], pinned) if part).replace("|", "\\|")


def libraries(found: Sequence[Record]) -> Iterator[str]:
    """Yield a table for each library."""
    header = ["model", "family", "class", "outputs at 0.5", "at 0.5", "worst", "holds"]
    for library in dict.fromkeys(record["name"].partition("/")[0] for record in found):
        yield f"## {library}\n"
        lines = []
        for record in found:
            if record["name"].startswith(f"{library}/"):
                ran = not record["error"]
                lines.append(
                    [
                        record["name"].partition("/")[2],
                        record["family"],
                        record["class"] if ran else "",
                        shown(record) if ran else "",
                        f"{record['at_half']:.3f}" if ran else "",
                        worst(record),
                        "no" if any(faults(record)) else "yes",
                    ]
                )
        yield markdown(header, lines)


def shown(record: Record) -> str:
    """Say how many outputs are full and how many slim, and name them where there are few."""
    kinds: dict[str, list[str]] = {}
    for output in record["outputs"]:
        kinds.setdefault("full" if output["full"] == output["half"] else "slim", []).append(output["name"])
    return ", ".join(
        f"{kind}: {', '.join(names) if len(names) <= 3 and names != [''] else len(names)}"
        for kind, names in kinds.items()
    )


def worst(record: Record) -> str:
    found = [float(record[name]) for name in ORACLES if record.get(name)]
    return f"{np.max(found):.0e}" if found else ""


if __name__ == "__main__":
    main()
