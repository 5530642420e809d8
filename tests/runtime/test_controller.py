"""A controller keeps a deadline under loads that rise and fall, at nearly the widest width that does."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from slimmable.errors import SlimmableError
from slimmable.runtime import WidthController

TIMES = {1.0: 7.6, 0.75: 4.4, 0.5: 2.2, 0.25: 1.0}
WIDTHS = tuple(TIMES)
DEADLINE = 10.0
CALLS = 1200


class Machine:
    """Runs networks on a simulated clock, slower under load."""

    def __init__(self, load: Callable[[float], float], noise: Callable[[random.Random], float]) -> None:
        self.seconds, self.done, self.load, self.noise, self.random = 0.0, 0, load, noise, random.Random(0)

    def now(self) -> float:
        return self.load(self.done / CALLS)

    def run(self, width: float) -> float:
        """Return the ratio of the time to the one in the table."""
        ratio = self.now() * self.noise(self.random)
        self.seconds += TIMES[width] * ratio / 1000
        self.done += 1
        return ratio


LOADS = {
    "waves": lambda share: 2.5 - 1.5 * math.cos(6 * math.pi * share),
    "ramp": lambda share: 1 + 4 * (1 - abs(2 * share - 1)),
    "steps": lambda share: (1, 2, 4, 2, 1, 3)[min(5, int(6 * share))],
}
NOISES = {
    "none": lambda random: 1.0,
    "some": lambda random: random.lognormvariate(0, 0.05),
    "much": lambda random: random.lognormvariate(0, 0.15),
    "late": lambda random: 1 + 0.1 * random.expovariate(1),
}


def widest(ratio: float) -> int:
    return next((at for at, width in enumerate(WIDTHS) if TIMES[width] * ratio <= DEADLINE), len(WIDTHS) - 1)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("load", LOADS)
def test_the_deadline_is_kept_at_nearly_the_best_width(load, noise, monkeypatch):
    machine = Machine(LOADS[load], NOISES[noise])
    monkeypatch.setattr(time, "perf_counter", lambda: machine.seconds)
    controller = WidthController(TIMES, deadline_ms=DEADLINE)
    ratios, below, taken = [], [], []
    for _ in range(CALLS):
        best = widest(machine.now())
        start = machine.seconds
        with controller.call() as width:
            ratios.append(machine.run(width))
        taken.append(1000 * (machine.seconds - start))
        below.append(WIDTHS.index(width) - best)
    assert sum(ms <= DEADLINE for ms in taken) >= 0.95 * CALLS
    window = 20 if load == "steps" else 0  # calls until a sudden fall of the load is believed in
    settled = [each for at, each in enumerate(below) if at % (CALLS // 6) >= window]
    assert sum(each <= 1 for each in settled) >= 0.98 * len(settled)
    kept = {width: sum(ms * ratio <= DEADLINE for ratio in ratios) for width, ms in TIMES.items()}
    fixed = next(at for at, width in enumerate(WIDTHS) if kept[width] >= 0.95 * CALLS or width == WIDTHS[-1])
    ran_at = [at + widest(machine.load(call / CALLS)) for call, at in enumerate(below)]
    assert sum(ran_at) / CALLS < fixed  # wider, on average, than the widest that always keeps it
    assert max(ran_at) <= fixed + 1


ratio = st.floats(0.1, 20)


@given(st.lists(ratio, max_size=60), st.integers(1, 30))
def test_a_call_misses_only_if_it_is_slower_than_all_in_the_window(ratios, window):
    controller = WidthController(TIMES, deadline_ms=DEADLINE, quantile=0.999, window=window)
    for at, now in enumerate(ratios):
        width = controller.width
        seen = ratios[max(0, at - window) : at] or [1.0]
        if TIMES[width] * now > DEADLINE:
            assert now > max(seen) or width == 0.25
        controller.record(width, TIMES[width] * now)


@given(st.lists(ratio, min_size=1, max_size=40), st.sampled_from(WIDTHS))
def test_a_longer_deadline_never_gives_a_narrower_width_and_the_unit_does_not_matter(ratios, ran_at):
    short, long, seconds = (
        WidthController({width: ms * unit for width, ms in TIMES.items()}, deadline_ms=deadline * unit)
        for deadline, unit in ((DEADLINE, 1), (1.5 * DEADLINE, 1), (DEADLINE, 1 / 1024))
    )
    for now in ratios:
        short.record(ran_at, TIMES[ran_at] * now)
        long.record(ran_at, TIMES[ran_at] * now)
        seconds.record(ran_at, TIMES[ran_at] * now / 1024)
        assert long.width >= short.width == seconds.width


@given(ratio)
def test_one_call_tells_of_the_load_and_no_quicker_one_narrows_again(load):
    controller = WidthController(TIMES, deadline_ms=DEADLINE)
    controller.record(1.0, 7.6 * load)
    expected = WIDTHS[widest(7.6 * load / 7.6)]
    for _ in range(19):
        assert controller.width == expected
        controller.record(expected, TIMES[expected] * min(load, 10 / TIMES[expected]))


def test_one_slow_call_narrows_and_a_window_of_quick_ones_widens():
    controller = WidthController(TIMES, deadline_ms=DEADLINE)
    controller.record(1.0, 30)  # 4 times too slow: 0.5 would take 8.7 ms
    widths = []
    for _ in range(21):
        widths.append(controller.width)
        controller.record(controller.width, TIMES[controller.width])
    assert widths == [0.5] * 20 + [1.0]


def test_a_long_window_overlooks_rare_slow_calls():
    controller = WidthController(TIMES, deadline_ms=DEADLINE, window=60)
    for call in range(300):
        controller.record(1.0, 7.6 * (5 if call % 50 == 49 else 1))
        assert controller.width == 1.0


def test_a_table_may_come_from_profile_and_a_width_may_be_slow():
    rows = [SimpleNamespace(width=width, latency_ms=ms) for width, ms in ((1.0, 8.0), (0.75, 9.0), (0.5, 4.0))]
    controller = WidthController(SimpleNamespace(rows=rows), deadline_ms=10)
    assert controller.width == 1.0
    controller.record(1.0, 12.0)
    assert controller.width == 0.5
    controller.record(0.5, 40.0)  # nothing fits: the fastest
    assert controller.width == 0.5


def test_a_call_that_fails_is_not_recorded(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", iter([0.0, 9.0]).__next__)
    controller = WidthController(TIMES, deadline_ms=DEADLINE)
    with pytest.raises(KeyError), controller.call():
        raise KeyError
    assert controller.width == 1.0


def test_a_profile_without_times_is_refused():
    rows = [SimpleNamespace(width=1.0, latency_ms=None)]
    with pytest.raises(SlimmableError, match=r"latencies must be a positive number for each width, got \{1.0: None"):
        WidthController(SimpleNamespace(rows=rows), deadline_ms=1)
