"""Try one program: as published, converted, with the lines of its diff, resumed, and extracted."""

from __future__ import annotations

import copy
import hashlib
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import slimmable
from benchmarks.clients import difference
from benchmarks.clients.client import Client
from benchmarks.clients.programs import Run, State, run

EXACT = 1e-9  # the largest relative difference between an extracted network and the model at its width, in double
RESUMED_AT = 5  # the epoch before which training is interrupted


class WrongError(Exception):
    """Something that does not hold for a program; the message is for the table."""


def measure(client: Client, checkouts: Path) -> dict[str, Any]:
    """Return the record of a client: how many lines change, and for each stage "yes" or what does not hold."""
    path = checkouts / client.source
    hunks = difference.by_file(client.diff, client.file)
    before = {file: (path.parent / file).read_text() for file in hunks}
    converted = {file: difference.apply(hunks[file], text, difference.converts) for file, text in before.items()}
    after = {file: difference.apply(hunks[file], text) for file, text in before.items()}
    changes = [difference.count(before[file], after[file]) for file in hunks]
    record: dict[str, Any] = {
        "name": client.name,
        "program": hashlib.sha256(path.read_bytes()).hexdigest()[:12],
        "added": sum(change.added for change in changes),
        "removed": sum(change.removed for change in changes),
        "indented": sum(change.indented for change in changes),
        "needs": client.needs,
    }
    plain = run(client, {}, checkouts)
    trained: list[Run] = []

    def all_widths() -> None:
        trained.append(run(client, after, checkouts, keep_at=RESUMED_AT))
        check_widths(plain, trained[0])

    def resumed() -> None:
        check_resumed(trained[0], run(client, after, checkouts, resume=(RESUMED_AT, trained[0])))

    record["steps"] = len(plain.losses)
    record["equal at 1.0"] = tried(lambda: check_equal(plain, run(client, converted, checkouts)))
    record["all widths"] = tried(all_widths)
    record["resumed"] = tried(resumed) if trained else "not tried"
    record["extracted"] = tried(lambda: check_extracted(client, trained[0])) if trained else "not tried"
    return record


def tried(stage: Callable[[], None]) -> str:
    """Return "yes", or what does not hold, in one line."""
    try:
        stage()
    except WrongError as found:
        return str(found)
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())[:300]
        return f"{type(error).__name__} in line {line.lineno} of {Path(line.filename).name}: {message}"
    return "yes"


def check_equal(plain: Run, slim: Run) -> None:
    """Nobody switches the converted model: it does what the plain one does, to the last bit."""
    for step, (expected, found) in enumerate(zip(plain.losses, slim.losses, strict=True)):
        if not math.isfinite(expected):
            raise WrongError(f"step {step}: the plain program's own loss is {expected}")
        if not _same(expected, found):
            raise WrongError(f"step {step}: loss {found}, plain {expected}")
    for name, moment in (("first step", "first"), ("last step", "end")):
        if different := _different(getattr(plain, moment), getattr(slim, moment)):
            raise WrongError(f"after the {name}, unlike the plain program: {_some(different)}")


def check_widths(plain: Run, slim: Run) -> None:
    """Every width learns at every step, and what happens once per step happens once.

    In the first step the widest width comes first and meets what the plain program meets. So after its backward pass
    everything that the program keeps (queues, centres, prototypes, momentum encoders, the statistics of the full width)
    must be what it is in the plain program, to the last bit, although narrower widths ran since.
    """
    if len(slim.losses) != len(plain.losses) or len(slim.widths) != len(plain.losses):
        raise WrongError(f"{len(slim.widths)} steps, {len(plain.losses)} in the plain program")
    for step, losses in enumerate(slim.widths):
        if len(losses) < 2 or not all(math.isfinite(loss) for loss in losses.values()):
            raise WrongError(f"step {step}: losses {losses}")
    if not _same(plain.losses[0], slim.losses[0]):
        raise WrongError(f"the first loss of the widest is {slim.losses[0]}, plain {plain.losses[0]}")
    if different := _different(plain.first, slim.first):
        error = max(_relative(slim.first.get(key), plain.first[key]) for key in different)
        raise WrongError(f"changes more than once a step: {_some(different)}, by up to {error:.0e}")
    trained = _different(plain.begin, plain.end, plain.begin.keys() & plain.end.keys())
    still = [key for key in trained if key in slim.begin and not _differs(slim.begin[key], slim.end[key])]
    narrow = [key for key in slim.end if ".narrow." in key and key.endswith((".weight", ".bias"))]
    still += [
        key
        for key in narrow
        if key.partition(".narrow.")[0] + "." + key.rpartition(".")[2] in trained
        and not _differs(slim.begin[key], slim.end[key])
    ]
    if still:
        raise WrongError(f"not trained: {_some(still)}")


def check_resumed(whole: Run, rest: Run) -> None:
    """Training that was interrupted and goes on from its checkpoint is the training that was not."""
    if rest.widths != whole.widths[-len(rest.widths) :] or len(rest.widths) * 2 > len(whole.widths):
        raise WrongError(f"losses {rest.losses[:3]}, uninterrupted {whole.losses[-len(rest.losses) :][:3]}")
    if different := _different(whole.end, rest.end):
        raise WrongError(f"unlike the uninterrupted run: {_some(different)}")


def check_extracted(client: Client, slim: Run) -> None:
    """Each width leaves as a plain network that is smaller and computes the same."""
    name, _, path = client.extracts.partition(".")
    model = copy.deepcopy(slim.names[name].get_submodule(path)).double().eval()
    x = torch.randn(client.images, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes = []
    for width in slimmable.widths_of(model):
        small = slimmable.extract(model, width).eval()
        sizes.append(sum(parameter.numel() for parameter in small.parameters()))
        own = [part for part in small.modules() if type(part).__module__.startswith("slimmable")]
        with torch.no_grad(), slimmable.at_width(model, width):
            found, expected = _tensors(small(x)), _tensors(model(x))
        error = max(_relative(a, b) for a, b in zip(found, expected, strict=True))
        if own or error > EXACT:
            raise WrongError(
                f"at {width}: {error:.0e} off" if not own else f"at {width}: {own[0]} is not a plain module"
            )
    if sorted(set(sizes), reverse=True) != sizes:
        raise WrongError(f"parameters at each width: {sizes}")


def _different(expected: State, found: State, keys: Any = None) -> list[str]:
    return [key for key in (expected if keys is None else keys) if _absent_or_other(expected[key], found.get(key))]


def _absent_or_other(expected: Any, found: Any) -> bool:
    if found is None:
        return isinstance(expected, Tensor)  # numbers may have moved into what replaces a module
    return _differs(expected, found)


def _differs(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return not _same(a, b)


def _same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in _tensors(value)]


def _relative(a: Any, b: Any) -> float:
    """Return how far `a` is from `b`, relative to `b`, or infinity if they cannot be compared."""
    if a is None or isinstance(a, Tensor) != isinstance(b, Tensor) or getattr(a, "shape", 0) != getattr(b, "shape", 0):
        return math.inf
    a, b = (torch.as_tensor(each, dtype=torch.float64) for each in (a, b))
    return float((a - b).norm() / b.norm().clamp_min(1e-300))
