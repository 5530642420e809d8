"""Drawing random networks and making those that fail smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

from hypothesis import strategies as st

from tests.convert.random_networks.network import AGAIN, CONTAINERS, Layout, Network, Output, Step
from tests.convert.random_networks.parts import BINARY, UNARY


class Conversion(NamedTuple):
    """How a network is converted and switched; `setting` picks a layer and its width, in percent."""

    percents: tuple[int, ...]
    round_to: int
    universal: bool
    setting: tuple[int, int]

    def __repr__(self) -> str:
        return f"Conversion{tuple(self)}"


STEMS = ("conv", "conv, norm, relu", "linear", "functional conv", "functional linear", "attention", "mlp", "experts")
NAMES = sorted([*UNARY, *BINARY, *AGAIN, *STEMS, *AGAIN, *BINARY])  # these three more often
BACK, UNITS, VARIANTS = (0, 0, 0, 0, 1, 1, 2, 3, 5), (8, 12, 6, 16, 4, 9, 10, 24, 5, 7), tuple(range(6))
KINDS, INPUTS = ("scores", "dense", "embedding", "features"), ("image", "tokens", "vector", "image 2", "ids")
STEPS, OUTPUTS, WIDTHS = (3, 14), (0, 3), (1, 2)  # at least and at most
ROUND_TO, PERCENTS, LAYERS = (1, 1, 1, 2, 4), tuple(range(1, 100)), tuple(range(20))


one_of = st.sampled_from


def _some(each: st.SearchStrategy[Any], most: tuple[int, int], unique: bool = False) -> st.SearchStrategy[Any]:
    return st.lists(each, min_size=most[0], max_size=most[1], unique=unique).map(tuple)


def _steps(names: Sequence[str], most: tuple[int, int]) -> st.SearchStrategy[Any]:
    return _some(st.builds(Step, one_of(names), one_of(BACK), one_of(UNITS), one_of(VARIANTS)), most)


layouts = st.builds(
    Layout,
    _some(one_of(INPUTS), (1, 3), unique=True),
    st.builds(tuple.__add__, _steps(STEMS, (1, 3)), _steps(NAMES, STEPS)),
    _some(st.builds(Output, one_of(KINDS), one_of(BACK), one_of(VARIANTS)), OUTPUTS),
    one_of(sorted(CONTAINERS)),
)
conversions = st.builds(
    Conversion,
    _some(one_of(PERCENTS), WIDTHS, unique=True),
    one_of(ROUND_TO),
    st.booleans(),
    st.tuples(one_of(LAYERS), one_of(PERCENTS)),
)


def drawn(seed: int, number: int) -> tuple[Layout, Conversion]:
    """Draw a network by its number, from what the strategies draw from, for runs that can be resumed."""
    random = Random(f"{seed} {number}")
    pick = random.choice

    def some(values: Sequence[Any], most: tuple[int, int]) -> tuple[Any, ...]:
        return tuple(random.sample(values, random.randint(*most)))

    names = [pick(STEMS) for _ in range(random.randint(1, 3))] + [pick(NAMES) for _ in range(random.randint(*STEPS))]
    steps = [Step(name, pick(BACK), pick(UNITS), pick(VARIANTS)) for name in names]
    outputs = [Output(pick(KINDS), pick(BACK), pick(VARIANTS)) for _ in range(random.randint(*OUTPUTS))]
    layout = Layout(some(INPUTS, (1, 3)), tuple(steps), tuple(outputs), pick(sorted(CONTAINERS)))
    setting = pick(LAYERS), pick(PERCENTS)
    return layout, Conversion(some(PERCENTS, WIDTHS), pick(ROUND_TO), pick((False, True)), setting)


def smaller(
    layout: Layout, conversion: Conversion, fails: Callable[[Layout, Conversion], bool]
) -> Iterator[tuple[Layout, Conversion]]:
    """Yield smaller and smaller networks that still fail."""
    changed = True
    while changed:
        changed = False
        for layout_, conversion_ in _candidates(layout, conversion):
            if fails(layout_, conversion_):
                layout, conversion, changed = Network(layout_).layout, conversion_, True
                yield layout, conversion
                break


def _candidates(layout: Layout, conversion: Conversion) -> Iterator[tuple[Layout, Conversion]]:
    for field in ("steps", "outputs", "inputs"):
        values = getattr(layout, field)
        for i in range(len(values)):
            if field != "inputs" or len(values) > 1:
                yield layout._replace(**{field: values[:i] + values[i + 1 :]}), conversion
    for i in range(len(conversion.percents) - 1):
        yield layout, conversion._replace(percents=conversion.percents[:i] + conversion.percents[i + 1 :])
    if conversion.round_to > 1:
        yield layout, conversion._replace(round_to=1)
    if conversion.universal:
        yield layout, conversion._replace(universal=False)
    if conversion.percents != (50,):
        yield layout, conversion._replace(percents=(50,))
    if layout.container != "one":
        yield layout._replace(container="one"), conversion
