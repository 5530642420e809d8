"""Trying a plan: a model on tensors of the sizes that each width has must run, and give what was planned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from slimmable._nested import output_tensors
from slimmable._widths import kept_of
from slimmable.analysis.channels import SubNetwork
from slimmable.analysis.fake import FakeModel, Shortcuts
from slimmable.analysis.plan import Plan
from slimmable.errors import ConversionError


def first_failure(fake: FakeModel, plan: Plan) -> tuple[str, Exception] | None:
    """Run every narrow width; return the path of the module that fails and the error, if one does."""
    narrow = list(zip(plan.widths, plan.columns, strict=True))[1:]
    with fake.on_meta():  # where most models run too, in less time
        while narrow and _failure(fake, *narrow[0]) is None:
            del narrow[0]
    for width, column in narrow:
        error = _failure(fake, width, column)
        if error is not None:
            return ("" if isinstance(error, ConversionError) else fake.running), error
    return None


def _failure(fake: FakeModel, width: float, column: SubNetwork) -> Exception | None:
    with _shrunk(fake, column):
        try:
            out = fake.run(Shortcuts())  # type: ignore[no-untyped-call]
        except Exception as error:
            return error
    got = [tuple(tensor.shape) for tensor in output_tensors(out)]
    if got != column.output_shapes:
        planned = column.output_shapes
        return ConversionError(f"the outputs at width {width} have shapes {got}, planned were {planned}")
    return None


@contextmanager
def _shrunk(fake: FakeModel, column: SubNetwork) -> Iterator[None]:
    """Give tensors and attributes the sizes of a sub-network."""
    modules = dict(fake.model.named_modules(remove_duplicate=False))
    before: list[tuple[dict[str, Any], str, Any]] = []
    for (path, name), kept in column.tensors.items():
        store = modules[path]._parameters if name in modules[path]._parameters else modules[path]._buffers
        tensor = store[name]
        shape = [kept_of(size, keep) for size, keep in zip(tensor.shape, kept, strict=True)]
        if tensor.shape != tuple(shape):
            before.append((store, name, tensor))
            store[name] = fake.weight(shape, tensor)
    for path, values in column.values.items():
        for name, value in values.items():
            before.append((modules[path].__dict__, name, modules[path].__dict__[name]))
            modules[path].__dict__[name] = value
    try:
        yield
    finally:
        for store, name, whole in before:
            store[name] = whole
        fake.forget()
