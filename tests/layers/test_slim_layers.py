"""Slimmable layers against plain torch layers built from the slices."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from slimmable._convert import extract
from slimmable._width import set_width, width_of
from slimmable._widths import kept_units
from slimmable.errors import ConversionError, WidthError
from slimmable.layers import SlimConv1d, SlimConv2d, SlimConv3d, SlimGroupNorm, SlimLayerNorm, SlimLinear, kept_at

SLIM_CONV = {1: SlimConv1d, 2: SlimConv2d, 3: SlimConv3d}
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
F64 = {"dtype": torch.float64}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # matrix products of a slice and of its copy may add in another order

widths_lists = st.sets(st.floats(0.05, 0.95), min_size=1, max_size=3).map(lambda found: (1.0, *sorted(found)[::-1]))
quick = settings(max_examples=40, deadline=None)


def layers() -> dict[str, nn.Module]:
    widths = (1.0, 0.5, 0.25)
    return {
        "conv1d": SlimConv1d(8, 12, 3, widths=widths),
        "conv2d": SlimConv2d(8, 12, 3, stride=2, groups=2, padding_mode="reflect", padding=1, widths=widths),
        "depthwise": SlimConv2d(8, 8, 3, groups=8, bias=False, widths=widths),
        "conv3d": SlimConv3d(3, 12, (1, 2, 3), widths=widths, slim_in=False),
        "linear": SlimLinear(8, 12, widths=widths, slim_out=False),
        "linear_disjoint": SlimLinear(8, 12, False, widths=widths, overlap=False),
        "layernorm": SlimLayerNorm((2, 8), bias=False, widths=widths),
        "groupnorm": SlimGroupNorm(4, 8, widths=widths),
        "groupnorm_inside": SlimGroupNorm(2, 8, widths=widths),
    }


def input_of(layer: nn.Module) -> torch.Tensor:
    """An input for the active width, from the shapes that the layer reads."""
    if isinstance(layer, nn.Linear):
        return torch.randn(5, layer.weight.shape[1])
    if isinstance(layer, nn.LayerNorm):
        return torch.randn(5, *layer.normalized_shape)
    if isinstance(layer, nn.GroupNorm):
        return torch.randn(5, layer.weight.shape[0], 3)
    return torch.randn(2, layer.weight.shape[1] * layer.groups, *(7 for _ in layer.kernel_size))


def assert_same_with_gradients(slim: nn.Module, plain: nn.Module, x: torch.Tensor, part: tuple) -> None:
    """The narrow layer equals the plain one, and its gradients are the plain ones in `part`, zero elsewhere."""
    x0, x1 = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = slim(x0), plain(x1)
    assert torch.allclose(out, expected, **CLOSE)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    assert torch.allclose(x0.grad, x1.grad, **CLOSE)
    full = dict(slim.named_parameters())
    for name, parameter in plain.named_parameters():
        placed, used = torch.zeros_like(full[name]), torch.zeros_like(full[name], dtype=torch.bool)
        index = part if parameter.ndim > 1 else part[:1]
        where = torch.meshgrid(*index, indexing="ij") if len(index) > 1 else index[0]
        placed[where], used[where] = parameter.grad, True
        assert torch.allclose(full[name].grad, placed, **CLOSE), name
        assert full[name].grad[~used].count_nonzero() == 0, name


def take(layer: nn.Module, plain: nn.Module, part: tuple) -> nn.Module:
    """Fill the plain layer with the slices of the other's full parameters."""
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            full = layer._parameters[name]
            rows = full[part[0]]
            parameter.copy_(rows[:, part[1]] if parameter.ndim > 1 else rows)
    return plain


@quick
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), widths_lists, st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(["zeros", "reflect", "replicate", "circular"]), st.integers(1, 2), st.integers(1, 2), st.data(),
)  # fmt: skip
def test_conv_equals_conv_of_the_slices(rank, ins, outs, widths, bias, slim_in, slim_out, mode, stride, dilation, data):
    settings_ = {"stride": stride, "padding": 1, "dilation": dilation, "bias": bias, "padding_mode": mode, **F64}
    slim = SLIM_CONV[rank](ins, outs, 3, widths=widths, slim_in=slim_in, slim_out=slim_out, **settings_)
    width = data.draw(st.sampled_from(widths))
    rows = torch.arange(kept_units(outs, width) if slim_out else outs)
    columns = torch.arange(kept_units(ins, width) if slim_in else ins)
    plain = take(slim, CONV[rank](len(columns), len(rows), 3, **settings_), (rows, columns))
    set_width(slim, width)
    x = torch.randn(2, len(columns), *[6] * rank, **F64)
    assert_same_with_gradients(slim, plain, x, (rows, columns))
    assert extract(slim, width).in_channels == len(columns)
    assert (slim.in_channels, slim.out_channels) == (ins, outs)


@quick
@given(st.integers(2, 4), st.integers(1, 4), st.integers(1, 4), widths_lists, st.data())
def test_grouped_conv_keeps_the_first_channels_of_each_group(groups, ins, outs, widths, data):
    slim = SlimConv2d(groups * ins, groups * outs, 3, groups=groups, widths=widths, slim_in=ins > 1, **F64)
    width = data.draw(st.sampled_from(widths))
    kept_in, kept_out = (kept_units(ins, width) if ins > 1 else 1), kept_units(outs, width)
    rows = torch.cat([torch.arange(kept_out) + group * outs for group in range(groups)])
    columns = torch.arange(kept_in)
    plain = nn.Conv2d(groups * kept_in, groups * kept_out, 3, groups=groups, **F64)
    take(slim, plain, (rows, columns))
    set_width(slim, width)
    assert_same_with_gradients(slim, plain, torch.randn(2, groups * kept_in, 4, 4, **F64), (rows, columns))


@quick
@given(st.integers(2, 9), st.integers(1, 3), widths_lists, st.data())
def test_depthwise_conv_keeps_the_first_groups(channels, multiplier, widths, data):
    slim = SlimConv2d(channels, channels * multiplier, 3, groups=channels, widths=widths, **F64)
    width = data.draw(st.sampled_from(widths))
    kept = kept_units(channels, width)
    rows = torch.arange(kept * multiplier)
    plain = take(slim, nn.Conv2d(kept, kept * multiplier, 3, groups=kept, **F64), (rows, torch.arange(1)))
    set_width(slim, width)
    assert slim.groups == kept
    assert_same_with_gradients(slim, plain, torch.randn(2, kept, 4, 4, **F64), (rows, torch.arange(1)))
    assert extract(slim, width).out_channels == len(rows)


@quick
@given(st.integers(1, 9), st.integers(1, 9), widths_lists, st.booleans(), st.booleans(), st.booleans(), st.data())
def test_linear_equals_linear_of_the_slices(ins, outs, widths, bias, slim_in, slim_out, data):
    slim = SlimLinear(ins, outs, bias, widths=widths, slim_in=slim_in, slim_out=slim_out, **F64)
    width = data.draw(st.sampled_from(widths))
    rows = torch.arange(kept_units(outs, width) if slim_out else outs)
    columns = torch.arange(kept_units(ins, width) if slim_in else ins)
    plain = take(slim, nn.Linear(len(columns), len(rows), bias, **F64), (rows, columns))
    set_width(slim, width)
    assert_same_with_gradients(slim, plain, torch.randn(2, 3, len(columns), **F64), (rows, columns))
    assert (slim.in_features, slim.out_features) == (ins, outs)


@quick
@given(st.integers(4, 16), st.integers(4, 16), st.sampled_from([(1.0, 0.5), (1.0, 0.5, 0.25), (1.0, 0.7, 0.2)]))
def test_disjoint_weights_share_no_gradient(ins, outs, widths):
    slim = SlimLinear(ins, outs, widths=widths, overlap=False, **F64)
    used = torch.zeros(outs, ins, dtype=torch.int)
    for index, width in enumerate(widths[1:], start=1):
        set_width(slim, width)
        rows, columns = (torch.tensor(kept_at(widths, units, 1, overlap=False)[index]) for units in (outs, ins))
        plain = take(slim, nn.Linear(len(columns), len(rows), **F64), (rows, columns))
        slim.zero_grad()
        assert_same_with_gradients(slim, plain, torch.randn(3, len(columns), **F64), (rows, columns))
        used += (slim._parameters["weight"].grad != 0).int()
    assert used.max() == 1


@pytest.mark.parametrize("multiplier", [1, 2])
def test_disjoint_depthwise_keeps_other_groups(multiplier):
    widths = (1.0, 0.5, 0.25)
    slim = SlimConv2d(8, 8 * multiplier, 1, groups=8, widths=widths, overlap=False, **F64)
    for width, kept in zip(widths, (range(8), range(2, 6), range(2)), strict=True):
        set_width(slim, width)
        rows = torch.arange(kept.start * multiplier, kept.stop * multiplier)
        plain = take(slim, nn.Conv2d(len(kept), len(rows), 1, groups=len(kept), **F64), (rows, torch.arange(1)))
        slim.zero_grad()
        assert_same_with_gradients(slim, plain, torch.randn(2, len(kept), 3, 3, **F64), (rows, torch.arange(1)))


@quick
@given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 9), widths_lists, st.booleans(), st.data())
def test_layernorm_equals_layernorm_of_the_slices(outer, last, widths, bias, data):
    slim = SlimLayerNorm((*outer, last), bias=bias, widths=widths, **F64)
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.normal_()
    width = data.draw(st.sampled_from(widths))
    kept = kept_units(last, width)
    plain = nn.LayerNorm((*outer, kept), bias=bias, **F64)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(slim._parameters[name][..., :kept])
    set_width(slim, width)
    x = torch.randn(3, *outer, kept, **F64)
    out = slim(x)
    assert torch.allclose(out, plain(x), **CLOSE)
    out.square().sum().backward()
    assert slim._parameters["weight"].grad[..., kept:].count_nonzero() == 0


def groupnorm_case(groups, size, width, whole):
    if whole:
        return round(groups * width), torch.arange(round(groups * width) * size)
    kept = kept_units(size, width)
    return groups, torch.cat([torch.arange(kept) + group * size for group in range(groups)])


@pytest.mark.parametrize(
    ("groups", "size", "widths", "whole"),
    [(4, 3, (1.0, 0.75, 0.5, 0.25), True), (10, 2, (1.0, 0.7, 0.3), True), (2, 6, (1.0, 0.5, 0.25), False),
     (1, 8, (1.0, 0.5), False), (6, 1, (1.0, 0.5), True), (3, 4, (1.0, 0.5), False)],
)  # fmt: skip
def test_groupnorm_keeps_whole_groups_where_it_can(groups, size, widths, whole):
    slim = SlimGroupNorm(groups, groups * size, widths=widths, **F64)
    with torch.no_grad():
        slim.weight.normal_()
        slim.bias.normal_()
    for width in widths:
        kept_groups, rows = groupnorm_case(groups, size, width, whole)
        plain = take(slim, nn.GroupNorm(kept_groups, len(rows), **F64), (rows,))
        set_width(slim, width)
        slim.zero_grad()
        assert_same_with_gradients(slim, plain, torch.randn(2, len(rows), 5, **F64), (rows,))
        small = extract(slim, width)
        assert (small.num_groups, small.num_channels) == (kept_groups, len(rows))


@pytest.mark.parametrize("name", layers())
def test_full_width_is_bit_equal_to_the_plain_layer(name):
    layer = layers()[name]
    plain, x = layer.to_plain(), input_of(layer)
    assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("name", layers())
def test_round_trip_shares_parameters_and_keeps_settings(name):
    layer = layers()[name].eval()
    set_width(layer, 0.5)
    plain = layer.to_plain()
    assert type(plain) is type(layer)._slim_plain
    assert not plain.training
    assert width_of(layer) == 0.5
    assert plain.__dict__.keys() == type(plain)(**_constructor(plain)).__dict__.keys()
    again = type(layer)._slim_base.from_plain(plain, (1.0, 0.25))
    assert [id(p) for p in again.parameters()] == [id(p) for p in plain.parameters()]
    assert [id(p) for p in again.parameters()] == [id(p) for p in layer.parameters()]
    assert not again.training
    assert width_of(again) == 1.0
    assert "_slim" not in plain.__dict__
    with pytest.raises(ConversionError, match="is made from torch's"):
        type(layer)._slim_base.from_plain(_subclass_of(plain), (1.0, 0.5))


def _constructor(plain: nn.Module) -> dict[str, object]:
    if isinstance(plain, nn.Linear):
        return {"in_features": 2, "out_features": 2}
    if isinstance(plain, nn.LayerNorm):
        return {"normalized_shape": 2}
    if isinstance(plain, nn.GroupNorm):
        return {"num_groups": 1, "num_channels": 2}
    return {"in_channels": 2, "out_channels": 2, "kernel_size": 1}


def _subclass_of(plain: nn.Module) -> nn.Module:
    other = copy.copy(plain)
    other.__class__ = type("Fancy", (type(plain),), {})
    return other


@pytest.mark.parametrize("name", layers())
def test_twins_go_separate_ways_after_the_split(name):
    layer = layers()[name]
    set_width(layer, 0.25)
    x = input_of(layer)
    expected = layer(x)
    plain = layer.to_plain()
    plain.weight = nn.Parameter(torch.zeros_like(plain.weight))
    plain.register_forward_hook(lambda *_: 0)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", layers())
def test_state_dict_has_torchs_names_and_loads_both_ways(name):
    layer = layers()[name]
    plain = copy.deepcopy(layer.to_plain())
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    assert list(layer.state_dict()) == list(plain.state_dict())
    set_width(layer, 0.25)
    layer.load_state_dict(plain.state_dict())
    set_width(layer, 1.0)
    x = input_of(layer)
    assert torch.equal(layer(x), plain(x))
    plain.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("name", layers())
def test_deepcopy_and_pickle_at_a_narrow_width(name):
    layer = layers()[name]
    set_width(layer, 0.5)
    x = input_of(layer)
    expected = layer(x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is type(layer)
        assert torch.equal(again(x), expected)
        set_width(again, 0.25)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
    assert width_of(layer) == 0.5
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("name", layers())
def test_print_is_torchs_plus_the_widths(name):
    layer = layers()[name]
    full = repr(layer.to_plain())
    for width in (1.0, 0.25):
        set_width(layer, width)
        assert repr(layer) == f"Slim{full[:-1]}, widths=(1.0, 0.5, 0.25), width={width})"


@pytest.mark.parametrize("name", layers())
def test_dtype_and_device_arguments(name):
    layer = layers()[name]
    moved = copy.deepcopy(layer).to("meta")
    set_width(moved, 0.25)
    set_width(layer, 0.25)
    x = input_of(layer)
    out = moved.to(torch.bfloat16)(x.to("meta", torch.bfloat16))
    assert out.shape == layer(x).shape
    assert out.dtype == torch.bfloat16
    linear = SlimLinear(4, 4, device="meta", dtype=torch.float16, widths=(1.0, 0.5))
    assert (linear.weight.device.type, linear.weight.dtype) == ("meta", torch.float16)


def test_user_subclass_of_a_slim_layer():
    net = _Biased(6, 6, widths=(1.0, 0.5))
    set_width(net, 0.5)
    again = pickle.loads(pickle.dumps(net))
    x = torch.randn(2, 3)
    assert torch.equal(again(x), net(x))
    assert torch.allclose(net(x), x @ net.weight.T + net.bias + 1)
    with pytest.raises(ConversionError, match="no torch twin"):  # which would lose the forward
        net.to_plain()


class _Biased(SlimLinear):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("widths", [(), (0.5,), (1.0, 1.0), (1.0, 0), (1.0, float("nan")), (1.0, "a"), 1.0])
def test_bad_widths(widths):
    makers = [
        lambda: SlimConv2d(4, 4, 1, widths=widths),
        lambda: SlimLinear(4, 4, widths=widths),
        lambda: SlimLayerNorm(4, widths=widths),
        lambda: SlimGroupNorm(2, 4, widths=widths),
    ]
    for make in makers:
        with pytest.raises(WidthError):
            make()


@quick
@given(st.integers(1, 40), widths_lists)
def test_disjoint_ranges(units, widths):
    try:
        full, *narrow = kept_at(widths, units, 1, overlap=False)
    except WidthError:
        assert sum(widths[1:]) > 1 or sum(kept_units(units, width) for width in widths[1:]) > units
        return
    assert full is None
    narrow = [kept or range(units) for kept in narrow]  # None are all of them
    assert [len(kept) for kept in narrow] == [kept_units(units, width) for width in widths[1:]]
    listed = [unit for kept in reversed(narrow) for unit in kept]
    assert listed == list(range(len(listed)))
