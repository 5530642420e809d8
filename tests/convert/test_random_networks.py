"""Random networks: every oracle holds for any composition of blocks and of steps, widths and rounding."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import slimmable
from tests.convert import oracles
from tests.convert.random_networks import Found, check, conversions, layouts


class Block(nn.Module):
    """One of the ways in which networks join channels."""

    def __init__(self, kind: str, inner: int, outer: int):
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(inner, inner if kind == "residual" else outer, 3, padding=1, bias=False)
        made = self.first.out_channels
        self.norm, self.act = nn.BatchNorm2d(made), nn.ReLU()
        self.depthwise = nn.Conv2d(made, made, 3, padding=1, groups=made) if kind == "depthwise" else nn.Identity()
        self.second = nn.Conv2d(made // 2 if kind == "halves" else made, outer, 1)
        self.outer = outer

    @property
    def channels(self) -> int:
        if self.kind == "concatenation":
            return self.first.in_channels + self.first.out_channels
        return self.first.out_channels if self.kind == "residual" else self.outer

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.act(self.norm(self.first(x))))
        if self.kind == "concatenation":
            return torch.cat([x, y], 1)
        if self.kind == "residual":
            return x + y
        if self.kind == "halves":
            left, right = y.chunk(2, 1)
            y = left * right
        return self.second(y)


class Network(nn.Module):
    def __init__(self, blocks: list[tuple[str, int]]):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()]
        channels = 6
        for kind, outer in blocks:
            layers.append(Block(kind, channels, outer))
            channels = layers[-1].channels
        self.body, self.head = nn.Sequential(*layers), nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


kinds = st.sampled_from(["plain", "residual", "concatenation", "depthwise", "halves"])
blocks = st.lists(st.tuples(kinds, st.integers(1, 10).map(lambda n: 2 * n)), min_size=1, max_size=4)
narrow = st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True)


@settings(max_examples=10, deadline=None)
@given(blocks, narrow, st.integers(1, 4))
def test_random_networks(layout, percents, round_to):
    torch.manual_seed(0)
    model = oracles.randomise(Network(layout).double().eval())
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    widths = (1.0, *(percent / 100 for percent in percents))
    arguments = {"example_inputs": x, "round_to": round_to}
    slim, plan = slimmable.slimify(model, widths, **arguments), slimmable.plan(model, widths, **arguments)
    oracles.full_width_is_the_original(model, slim, x)
    oracles.every_width_is_its_extraction(slim, x, limit=1e-12)
    oracles.permuting_units_changes_nothing(model, plan, x, limit=1e-10)
    oracles.zeroing_what_is_dropped_is_the_narrow_network(model, slim, plan, x, limit=1e-10)
    for group in plan.groups:
        assert min(group.kept) >= min(round_to, group.units)


def test_networks_of_functional_operations():
    """Caches, several outputs, modules called again: see `random_networks`. For more than these few, see `benchmarks`.

    Nothing is checked by networks in which nothing gets thinner, so these are counted.
    """
    found: list[Found] = []

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(layouts, conversions)
    def run(layout, conversion):
        found.append(check(layout, conversion))

    run()
    hidden = [each.thinner for each in found if each.hidden]
    assert len(hidden) > 0.4 * len(found)
    assert sum(hidden) > 0.9 * len(hidden)
    assert sum(each.thinner for each in found) > 0.7 * len(found)
