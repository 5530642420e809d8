"""Switching widths of models, parts and wrappers."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from slimmable._width import AllWidths, at_width, run_widths, set_width, width_of, widths_of
from slimmable._widths import check_widths, width_index
from slimmable.errors import ConversionError, WidthError
from slimmable.layers import SlimConv2d, SlimLinear, SwitchableBatchNorm2d, SwitchableProbe
from slimmable.view.view import install_view

WIDTHS = (1.0, 0.5, 0.25)


def test_widths_are_put_in_order_and_found():
    assert check_widths([0.25, 1, 0.5]) == WIDTHS
    assert [width_index(width, WIDTHS) for width in WIDTHS] == [0, 1, 2]


def net(root: bool = False) -> nn.Sequential:
    model = nn.Sequential(
        SlimConv2d(3, 8, 3, widths=WIDTHS, slim_in=False),
        SwitchableBatchNorm2d(8, widths=WIDTHS),
        nn.ReLU(),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), SlimLinear(8, 5, widths=WIDTHS, slim_out=False)),
    )
    if root:
        install_view(model, WIDTHS, {}, {})
    return model


X = torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential, AllWidths, lambda m: nn.ModuleDict({"a": m})])
def test_set_width_reaches_every_part_through_any_wrapper(wrap):
    model = net()
    wrapper = wrap(model)
    set_width(wrapper, 0.25)
    assert width_of(wrapper) == 0.25
    assert widths_of(wrapper) == WIDTHS
    assert [width_of(part) for part in (model[0], model[1], model[3])] == [0.25] * 3
    assert model[0].weight.shape[0] == 2


def test_parts_of_a_model_that_lost_its_root():
    model = net(root=True)
    body = nn.Sequential(*list(model.children())[:-1])
    set_width(body, 0.5)
    assert body(X).shape[1] == 4
    with pytest.raises(WidthError, match=r"different widths \[1.0, 0.5\]"):
        width_of(model)


def test_at_width_restores_every_part_also_after_an_error():
    model = net()
    set_width(model[0], 0.5)

    def fail():
        with at_width(model, 0.25):
            assert width_of(model) == 0.25
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (width_of(model[0]), width_of(model[1])) == (0.5, 1.0)
    with at_width(model, 0.25), at_width(model, 1.0):
        assert width_of(model) == 1.0


def test_run_widths_equals_one_by_one_and_restores():
    model = net().eval()
    set_width(model, 0.5)
    outputs = run_widths(model, input=X)
    assert width_of(model) == 0.5
    assert list(outputs) == list(WIDTHS)
    again = AllWidths(model)(X)
    for width in WIDTHS:
        set_width(model, width)
        assert torch.equal(outputs[width], model(X))
        assert torch.equal(again[width], outputs[width])
    with pytest.raises(RuntimeError):
        run_widths(model, X[:, :2])
    assert width_of(model) == 0.25


def test_unknown_width_names_the_nearest_and_changes_nothing():
    model = net()
    set_width(model, 0.5)
    for switch in (lambda: set_width(model, 0.3), lambda: at_width(model, 0.3).__enter__()):
        with pytest.raises(WidthError, match=r"0.3 is not one of .* Nearest is 0.25"):
            switch()
        assert width_of(model) == 0.5
    with pytest.raises(WidthError, match=r"A width is a share: 0\.5\?$"):
        set_width(model, 50)


def test_parts_with_other_widths():
    model = nn.Sequential(net(), SlimLinear(5, 5, widths=(1.0, 0.75, 0.5), slim_in=False))
    assert widths_of(model) == (1.0, 0.5)
    set_width(model, 0.5)
    assert model(X).shape == (2, 2)
    with pytest.raises(WidthError, match=r"\(1.0, 0.75, 0.5\)"):
        set_width(model, 0.25)
    assert width_of(model) == 0.5
    assert list(run_widths(model, X)) == [1.0, 0.5]


@pytest.mark.parametrize(
    "call", [lambda m: set_width(m, 0.5), widths_of, width_of, lambda m: run_widths(m, X), lambda m: AllWidths(m)(X)]
)
def test_never_converted(call):
    with pytest.raises(ConversionError, match=r"Linear was never converted .* slimmable.slimify"):
        call(nn.Linear(2, 2))


def test_converted_model_that_gained_layers():
    model = net(root=True)
    set_width(model, 0.5)
    model[3][2] = nn.Linear(4, 5)
    model[2] = nn.BatchNorm2d(8)
    for switch in (lambda: set_width(model, 0.25), lambda: set_width(nn.Sequential(model), 0.25)):
        with pytest.raises(ConversionError, match=r"2 \(BatchNorm2d\), (0\.)?3.2 \(Linear\); call slimmable.slimify"):
            switch()
    assert width_of(model[0]) == 0.5
    model[3][2] = nn.Identity()
    model[2] = nn.ReLU()
    set_width(model, 0.25)


def test_what_is_no_gain_of_layers():
    model = net(root=True)
    fixed = nn.Linear(5, 5)
    install_view(fixed, WIDTHS, {}, {})
    model.append(fixed)
    model.append(SwitchableProbe(10, 3, WIDTHS))
    set_width(nn.Sequential(model, nn.Linear(3, 3)), 0.5)  # a head beside the converted model
    assert width_of(model) == 0.5


def test_deepcopy_has_its_own_width():
    model = net()
    other = copy.deepcopy(model)
    set_width(other, 0.25)
    assert (width_of(model), width_of(other)) == (1.0, 0.25)


def test_no_reference_cycles():
    """Weights are freed with the last reference, not at the next garbage collection."""
    gc.disable()
    try:
        model = net()
        run_widths(model, X)
        alive = weakref.ref(model[1])
        del model
        assert alive() is None
    finally:
        gc.enable()
