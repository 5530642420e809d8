"""In these tests, a rule of an operation that fails is an error. Elsewhere it costs savings, and the plan says so."""

import pytest

from slimmable.analysis import _rules_arithmetic


@pytest.fixture(autouse=True)
def _rules_do_not_fail(monkeypatch):
    unknown = _rules_arithmetic.unknown

    def strict(ctx, args, kwargs, out, why="has no rule"):
        assert not why.startswith("its rule fails"), f"{ctx.where}: {why}"
        unknown(ctx, args, kwargs, out, why)

    monkeypatch.setattr(_rules_arithmetic, "unknown", strict)
