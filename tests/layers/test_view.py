"""The width view on modules that it knows nothing about."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from slimmable._convert import extract
from slimmable._width import set_width
from slimmable.errors import ConversionError
from slimmable.view.state import take
from slimmable.view.view import (
    full_tensor,
    install_view,
    is_slim,
    remove_view,
    state_of,
)

WIDTHS = (1.0, 0.5, 0.25)


class Scaled(nn.Module):
    """A class of somebody else: a parameter, a buffer, a plain tensor, plain values, its own way of printing."""

    def __init__(self, rows: int = 6, columns: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns, dtype=torch.float64))
        self.register_parameter("bias", None)
        self.register_buffer("gain", torch.rand(rows, dtype=torch.float64))
        self.offset = torch.randn(rows, dtype=torch.float64)
        self.rows = rows
        self.shape = (rows, columns)

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight.shape == self.shape
        return F.linear(x, self.weight, self.bias)[..., : self.rows] * self.gain + self.offset

    def __repr__(self) -> str:
        return f"Scaled<{self.rows}>"


def scaled(rows=(None, 3, (0, 4)), columns=(None, (1, 2, 5), 2)) -> Scaled:
    module = Scaled()
    each = [(6, 8)[axis] for axis in range(2)]
    counts = [
        tuple(each[axis] if k is None else k if isinstance(k, int) else len(k) for axis, k in enumerate(kept))
        for kept in zip(rows, columns, strict=True)
    ]
    install_view(
        module,
        WIDTHS,
        {
            "weight": list(zip(rows, columns, strict=True)),
            "bias": [(kept,) for kept in rows],
            "gain": [(kept,) for kept in rows],
            "offset": [(kept,) for kept in rows],
        },
        {"rows": [count[0] for count in counts], "shape": counts},
    )
    return module


def indices(kept, size):
    return torch.arange(size)[: (size if kept is None else kept)] if not isinstance(kept, tuple) else torch.tensor(kept)


def units(size: int):
    some = st.sets(st.integers(0, size - 1), min_size=1).map(lambda found: tuple(sorted(found)))
    return st.one_of(st.none(), st.integers(1, size), some)


@settings(max_examples=40, deadline=None)
@given(st.tuples(units(6), units(6)), st.tuples(units(8), units(8)), st.integers(0, 2**16))
def test_slices_and_gradients_are_those_of_indexing(rows, columns, seed):
    torch.manual_seed(seed)
    module = scaled((None, *rows), (None, *columns))
    for index, width in enumerate(WIDTHS):
        set_width(module, width)
        row, column = indices((None, *rows)[index], 6), indices((None, *columns)[index], 8)
        full = module._parameters["weight"]
        assert torch.equal(module.weight, full[row][:, column])
        x = torch.randn(3, len(column), dtype=torch.float64)
        expected = x @ full.detach()[row][:, column].T * module._buffers["gain"][row] + module.__dict__["offset"][row]
        out = module(x)
        assert torch.allclose(out, expected, rtol=1e-14, atol=1e-14)
        full.grad = None
        out.sum().backward()
        touched = torch.zeros(6, 8, dtype=torch.bool)
        touched[row.unsqueeze(1), column] = True
        assert torch.equal(full.grad != 0, touched)


def test_full_width_reads_the_very_same_parameter():
    module = scaled()
    assert module.weight is module._parameters["weight"]
    assert module.gain is module._buffers["gain"]
    assert module.bias is None
    set_width(module, 0.25)
    assert module.bias is None


def test_parameters_and_state_dict_stay_full_at_every_width():
    plain, module = Scaled(), scaled()
    set_width(module, 0.25)
    assert list(module.state_dict()) == list(plain.state_dict()) == ["weight", "gain"]
    assert [(name, p.shape) for name, p in module.named_parameters()] == [("weight", (6, 8))]
    module.load_state_dict(plain.state_dict())
    assert torch.equal(module._parameters["weight"], plain.weight)
    assert torch.equal(module.weight, plain.weight[[0, 4]][:, :2])


def test_contiguous_indices_are_slices_that_share_memory():
    module = scaled((None, (2, 3, 4), 2), (None, None, (0, 1)))
    set_width(module, 0.5)
    assert module.weight._base is module._parameters["weight"]
    assert not [name for name, _ in module.named_buffers() if name.startswith("_slim")]


def test_indices_outlive_moves_that_drop_contents():
    module = scaled()
    module.to("meta").to_empty(device="cpu")
    module.load_state_dict(Scaled().state_dict())
    set_width(module, 0.25)
    assert torch.equal(module.weight, module._parameters["weight"][[0, 4]][:, :2])


def test_class_and_print():
    module = scaled()
    assert isinstance(module, Scaled)
    assert type(module).__name__ == "Scaled"
    assert type(module) is not Scaled
    set_width(module, 0.5)
    assert repr(module) == "Scaled<6>"
    linear = nn.Linear(4, 4)
    install_view(linear, WIDTHS, {"weight": [(None, None), (2, None), (1, None)]}, {"out_features": (4, 2, 1)})
    set_width(linear, 0.25)
    plain = repr(nn.Linear(4, 4))
    assert repr(linear) == plain[:-1] + ", widths=(1.0, 0.5, 0.25), width=0.25)"
    assert linear.out_features == 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_at_a_narrow_width(protocol):
    module = scaled()
    set_width(module, 0.5)
    again = pickle.loads(pickle.dumps(module, protocol))
    assert type(again) is type(module)
    assert again(torch.ones(1, 3, dtype=torch.float64)).equal(module(torch.ones(1, 3, dtype=torch.float64)))


def test_torch_save_of_the_whole_module():
    module, file = scaled(), io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    set_width(again, 0.25)
    assert state_of(module).index == 0
    assert torch.equal(again.weight, module.weight[[0, 4]][:, :2])


def test_deepcopy_has_its_own_width_and_weights():
    model = nn.Sequential(scaled(), nn.ReLU())
    part = copy.deepcopy(model[0])
    set_width(part, 0.5)
    assert state_of(model[0]).index == 0
    with torch.no_grad():
        part._parameters["weight"].zero_()
    assert model[0].weight.abs().min() > 0


def test_remove_view_is_the_inverse():
    module, plain = scaled(), Scaled()
    keys = set(plain.__dict__)
    weight = module.weight
    set_width(module, 0.25)
    remove_view(module)
    assert type(module) is Scaled
    assert set(module.__dict__) == keys
    assert module.weight is weight
    assert (module.rows, module.shape) == (6, (6, 8))
    assert list(dict(module.named_buffers())) == ["gain"]


def test_narrow_parts_for_extraction():
    module = scaled()
    column = state_of(module).columns[2]
    tensors = {name: take(full_tensor(module, name), cut) for name, cut in column.cuts.items()}
    assert set(tensors) == {"weight", "gain", "offset"}
    assert torch.equal(tensors["offset"], module.offset[[0, 4]])
    assert column.values == {"rows": 2, "shape": (2, 2)}
    assert state_of(module).index == 0


def test_sizes_are_for_extraction_only():
    linear = nn.Linear(4, 4)
    cuts = [(None, None), (None, 2), (None, 1)]
    install_view(linear, WIDTHS, {"weight": cuts}, {})
    set_width(linear, 0.5)
    assert linear.in_features == 4
    assert extract(linear, 0.5).in_features == 2


def test_class_attribute_becomes_the_modules_own():
    class Fixed(nn.Module):
        size = 4

    module = Fixed()
    install_view(module, WIDTHS, {}, {"size": (4, 2, 1)})
    assert module.size == 4
    set_width(module, 0.25)
    assert module.size == 1
    assert Fixed.size == 4


def test_marked_only_keeps_its_class():
    module = nn.ReLU()
    install_view(module, WIDTHS, {}, {})
    assert is_slim(module)
    assert type(module) is nn.ReLU
    remove_view(module)
    assert not is_slim(module)


def test_assignment_reaches_the_full_width():
    module = scaled()
    set_width(module, 0.5)
    module.rows = 5
    assert module.rows == 3
    module.weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.float64))
    assert module.weight.shape == (3, 3)
    set_width(module, 1.0)
    assert module.rows == 5
    assert module.weight.abs().sum() == 0
    del module.weight, module.rows
    assert not hasattr(module, "weight")
    assert not hasattr(module, "rows")
    with pytest.raises(AttributeError, match="rows"):
        del module.rows
    del module.offset
    with pytest.raises(AttributeError, match="offset"):
        del module.offset


def test_an_assigned_value_stays_when_the_view_goes():
    module = scaled()
    module.rows = 5
    remove_view(module)
    assert module.rows == 5


@pytest.mark.parametrize("before", [False, True])
def test_a_quantisation_config_is_kept_from_before_and_refused_afterwards(before):
    linear = nn.Linear(4, 4)
    if before:
        linear.qconfig = "int8"
    install_view(linear, WIDTHS, {"weight": [(None, None), (None, 2), (None, 1)]}, {})
    assert hasattr(linear, "qconfig") is before
    assert not before or linear.qconfig == "int8"
    with pytest.raises(ConversionError, match="does not know the classes"):
        linear.qconfig = "int4"


def test_functional_call_slices_the_given_tensors():
    module = scaled()
    set_width(module, 0.25)
    weight = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(1, 2, dtype=torch.float64)
    out = functional_call(module, {"weight": weight}, x)
    expected = x @ weight[[0, 4]][:, :2].T * module.gain + module.offset
    assert torch.allclose(out, expected, rtol=1e-14)


def test_weight_norm_goes_on_working():
    linear = nn.Linear(4, 4)
    install_view(linear, WIDTHS, {"weight": [(None, None), (2, None), (1, None)]}, {})
    full = linear.weight.detach().clone()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(linear)
    linear.weight_g.data.mul_(2)
    set_width(linear, 0.5)
    linear.bias = None
    assert torch.allclose(linear(torch.eye(4)).T, 2 * full[:2])


def test_wrong_plans_change_nothing():
    cases = [
        ({"weight": [(None, None), (None, 5), (None, 2)]}, "axis 1 has size 4, cannot keep 5"),
        ({"weight": [(None, None), (None, (0, 4)), (None, 2)]}, r"cannot keep \(0, 4\)"),
        ({"gain": [(None,), (2,), (1,)]}, "no tensor 'gain'"),
    ]
    for tensors, message in cases:
        linear = nn.Linear(4, 4)
        keys = set(linear.__dict__)
        with pytest.raises(ConversionError, match=message):
            install_view(linear, WIDTHS, tensors, {})
        assert type(linear) is nn.Linear
        assert set(linear.__dict__) == keys
        assert not linear._buffers
    install_view(linear, WIDTHS, {}, {})
    with pytest.raises(ConversionError, match="remove it first"):
        install_view(linear, WIDTHS, {}, {})


@pytest.mark.parametrize("kept", [4, (0, 2, 3, 5), (1, 2, 3, 4)])
def test_a_buffer_that_is_assigned_at_a_narrow_width_changes_what_that_keeps(kept):
    module = nn.Module()
    module.register_buffer("centre", torch.arange(6.0))
    install_view(module, (1.0, 0.5), {"centre": [(None,), (kept,)]}, {})
    indices = list(range(kept)) if isinstance(kept, int) else list(kept)
    set_width(module, 0.5)
    module.centre = module.centre * 10
    assert module.centre.tolist() == [10.0 * i for i in indices]
    with pytest.raises(ConversionError, match="centre of a Module has shape"):
        module.centre = torch.zeros(3)
    set_width(module, 1.0)
    assert module.centre.tolist() == [10.0 * i if i in indices else i for i in range(6)]


def test_generated_classes_are_in_no_registry():
    known = []

    class Registered(nn.Linear):
        def __init_subclass__(cls, *, key, **kwargs):
            super().__init_subclass__(**kwargs)
            known.append(key)

    layer = Registered(4, 4)
    install_view(layer, (1.0, 0.5), {"weight": [(None, None), (None, 2)]}, {})
    assert isinstance(layer, Registered)
    assert known == []
