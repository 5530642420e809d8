"""Switchable norms: separate statistics, torch's names, converters, checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from timm.layers import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm as timm_convert_sync_batchnorm
from torch import nn
from torch.autograd.function import Function
from torch.func import functional_call

from slimmable._width import at_width, set_width, width_of
from slimmable.errors import ConversionError, WidthError
from slimmable.layers import (
    SwitchableBatchNorm,
    SwitchableBatchNorm1d,
    SwitchableBatchNorm2d,
    SwitchableBatchNorm3d,
    SwitchableNorm,
)
from slimmable.view.norms import _Linked

WIDTHS = (1.0, 0.5, 0.25)
KEPT = (None, 4, (1, 6))
PLAIN_KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
F64 = {"dtype": torch.float64}


def random_norm(kind: type[nn.Module] = nn.BatchNorm2d, **options: object) -> nn.Module:
    norm = kind(8, **options)
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


def switched(kind: type[nn.Module] = nn.BatchNorm2d, **options: object) -> SwitchableNorm:
    return SwitchableNorm(random_norm(kind, **options), WIDTHS, KEPT)


def x_at(index: int, **options: object) -> torch.Tensor:
    return torch.randn(3, (8, 4, 2)[index], 5, 5, **options)


@settings(max_examples=30, deadline=None)
@given(
    st.booleans(), st.booleans(), st.sampled_from([None, 0.1, 0.3]), st.sampled_from([1e-5, 1e-2]), st.booleans(),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
)  # fmt: skip
def test_each_width_is_an_independent_norm(affine, track, momentum, eps, training, order):
    options = {"affine": affine, "track_running_stats": track, "momentum": momentum, "eps": eps, **F64}
    norm = switched(**options).train(training)
    alone = []
    for index, kept in enumerate(KEPT):
        channels = torch.arange(8)[: kept or 8] if not isinstance(kept, tuple) else torch.tensor(kept)
        plain = nn.BatchNorm2d(len(channels), **options)
        state = {key: t if t.shape != (8,) else t[channels] for key, t in norm.full.state_dict().items()}
        plain.load_state_dict(state)
        alone.append(plain.train(training))
        assert str(norm.module_at(index)) == str(plain)
    for index in order:
        set_width(norm, WIDTHS[index])
        x = x_at(index, **F64)
        x0, x1 = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = norm(x0), alone[index](x1)
        assert torch.allclose(out, expected, rtol=1e-12, atol=1e-12)
        out.square().sum().backward()
        expected.square().sum().backward()
        assert torch.allclose(x0.grad, x1.grad, rtol=1e-12, atol=1e-12)
    for index, plain in enumerate(alone):
        for key, tensor in plain.state_dict(keep_vars=True).items():
            mine = norm.module_at(index).state_dict(keep_vars=True)[key]
            assert torch.allclose(mine, tensor, rtol=1e-12)
            assert (mine.grad is None) == (tensor.grad is None)
            assert tensor.grad is None or torch.allclose(mine.grad, tensor.grad, rtol=1e-12, atol=1e-12)


def test_names_are_torchs_and_narrow():
    norm = switched()
    narrow = [f"narrow.{index}.{key}" for index in range(2) for key in PLAIN_KEYS]
    assert list(norm.state_dict()) == PLAIN_KEYS + narrow
    model = nn.Sequential(nn.Identity(), norm)
    expected = [f"1.{key}" for key in PLAIN_KEYS + narrow]
    assert list(model.state_dict()) == expected
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert set(named) == set(expected)
    assert named["1.weight"] is norm.full.weight
    assert named["1.narrow.1.running_var"] is norm.module_at(2).running_var
    assert len(list(model.parameters())) == 6
    assert len([p for module in model.modules() for p in module.parameters(recurse=False)]) == 6
    assert list(norm._parameters) == ["weight", "bias"]
    assert norm._parameters["weight"] is norm.full.weight
    assert dict(model.named_modules())["1"] is norm
    assert {type(module).__name__ for module in model.modules()} >= {"BatchNorm2d", "SwitchableNorm"}
    assert model.get_parameter("1.weight") is norm.full.weight
    assert model.get_submodule("1.narrow.0") is norm.module_at(1)
    assert list(model.state_dict()._metadata) == list(copy.deepcopy(model).state_dict()._metadata)


def test_state_dict_round_trip_changes_nothing():
    model, other = nn.Sequential(switched()), nn.Sequential(switched())
    model[0].full.num_batches_tracked.fill_(5)
    assert str(other.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor)
    bare = switched()
    bare.load_state_dict(model[0].state_dict())
    assert torch.equal(bare.module_at(2).weight, model[0].module_at(2).weight)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_plain_checkpoint_fills_every_width(kind, assign):
    plain = nn.Sequential(nn.Identity(), random_norm(kind))
    model = nn.Sequential(nn.Identity(), switched(kind))
    model.load_state_dict(plain.state_dict(), assign=assign)
    for index, channels in enumerate((slice(8), slice(4), [1, 6])):
        for key, tensor in plain[1].state_dict().items():
            expected = tensor[channels] if tensor.ndim else tensor
            assert torch.equal(model[1].module_at(index).state_dict()[key], expected)
    with torch.no_grad():
        model[1].module_at(1).weight.zero_()
    assert plain[1].weight.count_nonzero() == 8
    assert model[1].full.weight.count_nonzero() == 8


def test_strict_errors_name_what_the_state_dict_names():
    model = nn.Sequential(nn.Identity(), switched())
    state = model.state_dict()
    state["1.extra"] = state.pop("1.bias")
    state["1.running_mean"] = torch.zeros(3)
    del state["1.narrow.0.weight"]
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict(state)
    text = str(raised.value)
    assert 'Missing key(s) in state_dict: "1.bias", "1.narrow.0.weight".' in text
    assert 'Unexpected key(s) in state_dict: "1.extra".' in text
    assert "size mismatch for 1.running_mean" in text
    assert "full" not in text
    result = model.load_state_dict({k: v for k, v in state.items() if k != "1.running_mean"}, strict=False)
    assert set(result.missing_keys) == {"1.bias", "1.narrow.0.weight", "1.running_mean"}
    assert result.unexpected_keys == ["1.extra"]


@pytest.mark.parametrize("strict", [False, True])
def test_norms_of_other_widths_are_not_taken_for_ones_own(strict):
    widths = {2: (1.0, 0.5), 3: WIDTHS, 4: (1.0, 0.75, 0.5, 0.25)}
    models = {n: nn.Sequential(SwitchableBatchNorm(8, widths=w, slim=False)) for n, w in widths.items()}
    for model in models.values():
        nn.init.uniform_(model[0].module_at(1).weight)
    for mine, other in ((3, 4), (4, 2), (4, 3)):
        with pytest.raises(RuntimeError, match=r"0\.narrow has norms of the widths \(.*\), not \(1.0, "):
            models[mine].load_state_dict(models[other].state_dict(), strict)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.narrow\.1"):
        models[2].load_state_dict(models[3].state_dict())
    found = models[3].load_state_dict(models[2].state_dict(), strict=False)  # those of 0.5 are at the same place
    assert torch.equal(models[3][0].module_at(1).weight, models[2][0].module_at(1).weight)
    assert {name.rpartition(".")[0] for name in found.missing_keys} == {"0.narrow.1"}
    buffer = io.BytesIO()
    torch.save(models[4].state_dict(), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()))
    with pytest.raises(RuntimeError, match=r"0\.narrow has norms of the widths"):
        models[3].load_state_dict(state, strict)
    for name in [name for name in state if ".narrow." in name]:
        del state[name]
    models[3].load_state_dict(state, strict)  # the full norm fills the narrower ones
    assert torch.equal(models[3][0].module_at(2).weight, models[4][0].full.weight)


def test_a_missing_counter_is_reported_as_by_torch():
    for model in (nn.Sequential(random_norm()), nn.Sequential(switched())):
        state = model.state_dict()
        del state["0.num_batches_tracked"]
        assert model.load_state_dict(state, strict=False).missing_keys == ["0.num_batches_tracked"]


def test_sync_converters_replace_every_inner_norm():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), switched())
    keys = list(model.state_dict())
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, timm_convert_sync_batchnorm):
        synced = convert(copy.deepcopy(model))
        assert type(synced[1]) is SwitchableNorm
        assert {type(synced[1].module_at(index)) for index in range(3)} == {nn.SyncBatchNorm}
        assert list(synced.state_dict()) == keys
        synced.load_state_dict(model.state_dict())
        synced.eval()
        for index, width in enumerate(WIDTHS):
            with at_width(synced[1], width):
                assert torch.equal(synced[1](x := x_at(index)), model[1].module_at(index).eval()(x))
    synced = timm_convert_sync_batchnorm(nn.Sequential(switched(BatchNormAct2d)))
    assert {type(synced[0].module_at(index)) for index in range(3)} == {SyncBatchNormAct}


def test_norm_with_activation_keeps_it_at_every_width():
    norm = switched(BatchNormAct2d, act_layer=nn.SiLU)
    for index, width in enumerate(WIDTHS):
        set_width(norm, width)
        x = x_at(index)
        inner = norm.module_at(index)
        expected = nn.functional.silu(nn.functional.batch_norm(x, None, None, inner.weight, inner.bias, True))
        assert torch.allclose(norm(x), expected, atol=1e-6)
        assert isinstance(norm.act, nn.SiLU)
    prelu = switched(BatchNormAct2d, act_layer=nn.PReLU, act_kwargs={"num_parameters": 8})
    assert [prelu.module_at(index).act.weight.shape[0] for index in range(3)] == [8, 4, 2]


def test_attributes_are_those_of_the_active_norm():
    norm = switched()
    assert norm.weight is norm.full.weight
    set_width(norm, 0.5)
    assert norm.weight is norm.module_at(1).weight
    assert (norm.num_features, norm.eps) == (4, 1e-5)
    norm.eps = 0.1
    assert [norm.module_at(index).eps for index in range(3)] == [0.1] * 3
    norm.weight = nn.Parameter(torch.zeros(4))
    assert norm.module_at(1).weight.count_nonzero() == 0
    assert norm.full.weight.count_nonzero() == 8
    norm.note = "own"
    assert not hasattr(norm.full, "note")
    with pytest.raises(AttributeError, match="nothing"):
        _ = norm.nothing


@pytest.mark.parametrize("index", range(3))
def test_functional_call_replaces_by_name_at_every_width(index):
    model = nn.Sequential(switched(**F64)).eval()
    set_width(model, WIDTHS[index])
    norm = model[0].module_at(index)
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    prefix = "0." if index == 0 else f"0.narrow.{index - 1}."
    tensors[f"{prefix}weight"] *= 2
    x = x_at(index, **F64)
    before = model(x)
    bias = norm.bias.view(1, -1, 1, 1)
    assert torch.allclose(functional_call(model, tensors, x), 2 * before - bias, rtol=1e-12)
    assert torch.equal(model(x), before)
    assert isinstance(model[0].full.weight, nn.Parameter)
    assert model[0].weight is norm.weight


def test_settings_are_copied():
    full = random_norm(nn.BatchNorm2d, momentum=0.3, eps=1e-3, dtype=torch.float16).eval()
    full.weight.requires_grad_(False)
    norm = SwitchableNorm(full, WIDTHS, KEPT)
    assert norm.full is full
    assert norm.to_plain() is full
    for index in (1, 2):
        narrow = norm.module_at(index)
        assert (narrow.momentum, narrow.eps, narrow.training) == (0.3, 1e-3, False)
        assert narrow.weight.dtype == torch.float16
        assert not narrow.weight.requires_grad
        assert narrow.bias.requires_grad
    assert not norm.training
    assert all(module.training for module in norm.train().modules())


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
@pytest.mark.parametrize("shared_affine", [False, True])
@pytest.mark.parametrize("kept", [KEPT, (None, None, 8)])
def test_no_width_shares_memory_with_another(kept, shared_affine, kind):
    norm = SwitchableNorm(random_norm(kind), WIDTHS, kept, shared_affine=shared_affine)
    tensors = list(norm.state_dict(keep_vars=True).values())
    assert len(tensors) == 11 if shared_affine else 15
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)  # no part of anything larger
    before = {name: tensor.clone() for name, tensor in norm.full.state_dict().items()}
    for index in (1, 2):
        with at_width(norm, WIDTHS[index]):
            norm(torch.randn(3, norm.num_features, 5, 5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.full.state_dict().items())


def test_copies_are_independent():
    norm = switched()
    set_width(norm, 0.5)
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert width_of(again) == 0.5
        set_width(again, 1.0)
        again(x_at(0))
        with torch.no_grad():
            functional_call(again, {"weight": torch.zeros(8)}, x_at(0))
        again.load_state_dict(norm.state_dict())
        assert torch.equal(again.full.running_mean, norm.full.running_mean)
        again.module_at(1).running_mean.zero_()
        again.full.weight.data.zero_()
    assert norm.full.weight.count_nonzero() == 8
    assert norm.module_at(1).running_mean.count_nonzero() == 4
    assert width_of(norm) == 0.5


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_torch_constructors(rank):
    kind = {1: SwitchableBatchNorm1d, 2: SwitchableBatchNorm2d, 3: SwitchableBatchNorm3d}[rank]
    plain = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank]
    norm = kind(10, 1e-3, 0.2, widths=WIDTHS)
    for width, channels in zip(WIDTHS, (10, 5, 2), strict=True):
        set_width(norm, width)
        assert norm(torch.randn(4, channels, *[3] * rank)).shape[1] == channels
        assert type(norm.module_at(WIDTHS.index(width))) is plain
        full = repr(plain(10, 1e-3, 0.2))
        assert repr(norm) == f"Switchable{full[:-1]}, widths=(1.0, 0.5, 0.25), width={width})"
    again = kind.from_plain(norm.to_plain(), WIDTHS)
    assert type(again) is kind
    assert again.to_plain() is norm.full
    same = kind(10, widths=WIDTHS, slim=False, affine=False, track_running_stats=False)
    assert [same.module_at(index).num_features for index in range(3)] == [10, 10, 10]


def test_alias_and_errors():
    assert SwitchableBatchNorm is SwitchableBatchNorm2d
    with pytest.raises(WidthError, match="full width"):
        SwitchableBatchNorm(8, widths=(0.5,))
    with pytest.raises(ConversionError, match="got Linear"):
        SwitchableBatchNorm.from_plain(nn.Linear(2, 2), WIDTHS)
    with pytest.raises(ConversionError, match="number of channels"):
        SwitchableNorm(nn.LayerNorm(8), WIDTHS, KEPT)
    with pytest.raises(ConversionError, match="one entry for each"):
        SwitchableNorm(nn.BatchNorm2d(8), WIDTHS, KEPT[:2])
    with pytest.raises(AttributeError, match="no attribute 'momentum'"):  # before its constructor
        _ = SwitchableBatchNorm.__new__(SwitchableBatchNorm).momentum


def test_a_norm_in_two_places_is_listed_as_torch_lists_modules():
    norm = SwitchableBatchNorm(8, widths=WIDTHS)
    both = nn.ModuleList([norm, norm])
    places = [path for path, module in both.named_modules() if module is norm]
    assert places == ["0"]
    places = [path for path, module in both.named_modules(remove_duplicate=False) if module is norm]
    assert places == ["0", "1"]


def test_a_norm_that_borrows_its_gain_has_one_width():
    shared = SwitchableNorm(nn.BatchNorm2d(8), WIDTHS, KEPT, shared_affine=True)
    assert repr(shared.module_at(1)).endswith("widths=(1.0,), width=1.0)")


class Stop(Function):
    """Gives no gradient back, which is something else than zeros."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("zeros", [False, True])
def test_the_link_to_idle_parameters_makes_no_gradient_of_none(zeros):
    x, idle = torch.ones(2, requires_grad=True), nn.Parameter(torch.ones(3))
    Stop.apply(_Linked.apply(x, zeros, idle)).sum().backward()
    assert x.grad is None
    _Linked.apply(x, zeros, idle).sum().backward()
    assert x.grad.tolist() == [1, 1]
    assert idle.grad is None if not zeros else idle.grad.tolist() == [0, 0, 0]
