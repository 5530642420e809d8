"""BatchNorm calibration against the intended published numbers and the definition, and what it must leave alone."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import slimmable
from slimmable._inputs import Inputs
from slimmable._width import at_width, set_width, width_of
from slimmable.errors import ConversionError, DataError, UsageError, WidthError
from slimmable.layers import SlimLinear, SwitchableBatchNorm1d, SwitchableNorm
from slimmable.training import calibrate_bn

WIDTHS = (1.0, 0.5, 0.25)


class Sliced(nn.Module):
    """A switchable norm that sees as many channels of its input as it has at the active width."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x[:, : self.norm.num_features])


def test_published_calibration():
    golden = load_file(Path(__file__).parents[1] / "golden" / "usnets.safetensors")
    widths, kept = (1.0, 0.75, 0.5, 0.35, 0.25), (24, 24, 16, 8, 8)
    model = Sliced(SwitchableNorm(nn.BatchNorm2d(24, dtype=torch.float64), widths, kept))
    calibrate_bn(model, [golden[f"bn/x{i}"] for i in range(3)])
    for width in widths:
        with at_width(model, width):
            for name in ("running_mean", "running_var"):
                torch.testing.assert_close(
                    getattr(model.norm, name), golden[f"calib/{width:g}/{name}"], rtol=1e-12, atol=1e-12
                )


def network(shared=False):
    torch.manual_seed(0)
    return nn.Sequential(
        SlimLinear(3, 8, widths=WIDTHS, slim_in=False),
        SwitchableBatchNorm1d(8, widths=WIDTHS),
        nn.ReLU(),
        nn.Dropout(0.5),
        SlimLinear(8, 4, widths=WIDTHS, slim_out=False),
        nn.BatchNorm1d(4) if shared else nn.Identity(),
    ).double()


def batches(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, generator=generator, dtype=torch.float64) for size in sizes]


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name or "tracked" in name}


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(2, 6), min_size=1, max_size=4),
    st.lists(st.sampled_from(WIDTHS), min_size=1, unique=True),
    st.integers(0, 1000),
)
def test_statistics_are_means_over_batches_and_other_widths_are_untouched(sizes, widths, seed):
    model = network()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(3)  # whatever was there before must not matter
    untouched = copy.deepcopy(model)
    data = batches(*sizes, seed=seed)
    calibrate_bn(model, data, widths)
    for width in WIDTHS:
        set_width(model, width)
        set_width(untouched, width)
        norm = model[1]
        if width in widths:
            inputs = [model[0](x) for x in data]
            mean = torch.stack([x.mean(0) for x in inputs]).mean(0)
            var = torch.stack([x.var(0) for x in inputs]).mean(0)
            torch.testing.assert_close((norm.running_mean, norm.running_var), (mean.detach(), var.detach()))
            assert norm.num_batches_tracked == len(data)
        else:
            before = untouched[1]
            assert torch.equal(norm.running_mean, before.running_mean)
            assert torch.equal(norm.running_var, before.running_var)
            assert norm.num_batches_tracked == before.num_batches_tracked


def test_a_norm_that_widths_share_gets_the_average_over_them():
    model = network(shared=True)
    data = batches(4, 4)
    calibrate_bn(model, data)
    reference = copy.deepcopy(model).eval()
    means = []
    for width in WIDTHS:
        with at_width(reference, width):
            for x in data:
                reference[1].train()
                means.append(reference[:5](x).mean(0))
    torch.testing.assert_close(model[5].running_mean, torch.stack(means).mean(0).detach())
    assert model[5].num_batches_tracked == len(means)


def settings_of(model):
    return (
        [module.training for module in model.modules()],
        [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm1d)],
        width_of(model),
        [parameter.grad for parameter in model.parameters()],
        [len(module._forward_pre_hooks) for module in model.modules()],
    )


def mixed_settings():
    model = network(shared=True)
    model[5].eval()
    model[5].momentum = 0.3
    set_width(model, 0.5)
    return model


def test_settings_are_put_back():
    model = mixed_settings()
    before = settings_of(model)
    calibrate_bn(model, batches(4), [0.25])
    assert settings_of(model) == before


def failing_loader():
    yield from batches(4)
    raise KeyError("broken file")


def test_after_an_error_all_is_as_before():
    model = mixed_settings()
    before, values = settings_of(model), statistics(model)
    with pytest.raises(KeyError):
        calibrate_bn(model, failing_loader())
    assert settings_of(model) == before
    torch.testing.assert_close(statistics(model), values, rtol=0, atol=0)


def test_norms_that_do_not_run_are_untouched():
    model = network()
    model.spare = nn.BatchNorm1d(4)
    model.forward = lambda x: model[1](model[0](x))
    model.spare.running_mean += 7
    calibrate_bn(model, batches(4))
    assert model.spare.running_mean.eq(7).all()
    assert model.spare.num_batches_tracked == 0


def test_batches_with_labels():
    plain, labelled = network(), network()
    data = batches(4, 4)
    calibrate_bn(plain, data)
    calibrate_bn(labelled, [(data[0], "label"), [data[1], "label"]])
    torch.testing.assert_close(statistics(labelled), statistics(plain), rtol=0, atol=0)


def test_a_model_without_batch_norm_needs_nothing():
    calibrate_bn(SlimLinear(3, 4, widths=WIDTHS), failing_loader())


@pytest.mark.parametrize(
    ("loader", "widths", "error", "words"),
    [
        ([], None, DataError, ["loader is empty"]),
        ([{"image": torch.ones(4, 3)}], None, DataError, ["dict", "must be tensors, begin with one"]),
        ([()], None, DataError, ["got .* .tuple"]),
        (batches(4), [0.3], WidthError, ["0.3", "Nearest is 0.25"]),
    ],
)
def test_errors_say_what_does_not_fit_and_change_nothing(loader, widths, error, words):
    model = mixed_settings()
    before, values = settings_of(model), statistics(model)
    for word in words:
        with pytest.raises(error, match=word):
            calibrate_bn(model, loader, widths)
    assert settings_of(model) == before
    torch.testing.assert_close(statistics(model), values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("loader", "widths", "error"),
    [([], [0.75], DataError), (batches(4), [0.75, {"0": 0.7}, "x"], WidthError), (batches(4), [0.75, 0.1], WidthError)],
)
@pytest.mark.parametrize("active", [1.0, 0.5, 0.6])
def test_after_an_error_no_width_is_new(loader, widths, error, active):
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).double()
    example = torch.zeros(2, 3, dtype=torch.float64)
    model = slimmable.slimify(net, (1.0, 0.5), example_inputs=example, universal=True)
    slimmable.set_width(model, active)
    names, output = list(model.state_dict()), model.eval()(example)
    with pytest.raises(error):
        calibrate_bn(model, loader, widths)
    assert slimmable.widths_of(model) == (1.0, 0.5)
    assert slimmable.width_of(model) == active
    assert list(model.state_dict()) == names
    assert torch.equal(model(example), output)


@pytest.mark.parametrize("widths", [[0.6], [0.75], [0.6, 0.1], [1.0]])
def test_a_width_that_is_not_the_models_own_keeps_its_statistics_until_another_is_set(widths):
    model, x = small_network(universal=True)
    set_width(model, 0.6)
    model.train()(x)
    norm, learned = model[1].module_at(-1), str(model[1].module_at(-1).state_dict())
    set_width(model, 0.6)
    with pytest.raises((DataError, WidthError)):
        calibrate_bn(model, [x * torch.nan], widths)
    with at_width(model, 0.6):
        assert str(model[1].module_at(-1).state_dict()) == learned
    assert model[1].module_at(-1) is norm
    assert width_of(model) == 0.6
    calibrate_bn(model, [x], widths=[0.6])  # which it can still become
    assert model[1].module_at(3) is norm
    assert str(norm.state_dict()) != learned


def test_a_model_that_was_never_converted():
    with pytest.raises(ConversionError):
        calibrate_bn(nn.BatchNorm1d(3), batches(4))


class Summed(nn.Module):
    """Takes a dict and a keyword."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, batch, *, shift):
        return self.net(batch["x"] + shift)


def test_batches_of_other_arguments_than_one_tensor():
    data, shift = batches(4, 5), torch.ones(3, dtype=torch.float64)
    model, plain = Summed(), network()
    calibrate_bn(model, [Inputs({"x": x}, shift=shift) for x in data])
    calibrate_bn(plain, [x + shift for x in data])
    for name, expected in statistics(plain).items():
        torch.testing.assert_close(statistics(model)[f"net.{name}"], expected)


def small_network(universal=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.extend([nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)])
    x = torch.randn(16, 3, 8, 8) * 3 + 1
    return slimmable.slimify(net, WIDTHS, example_inputs=x, universal=universal), x


WAYS = {
    "itself": lambda model: model,
    "average": AveragedModel,
    "average of buffers": lambda model: AveragedModel(model, use_buffers=True),
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "converted": nn.SyncBatchNorm.convert_sync_batchnorm,
    "gated": lambda model: slimmable.gating.gate(model, example_inputs=torch.zeros(2, 3, 8, 8)),
}


@pytest.mark.parametrize("universal", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", WIDTHS[:2])
def test_the_statistics_of_one_width_alone_are_not_reset(width, way, universal):
    model, x = small_network(universal)
    calibrate_bn(model, [x])
    model = WAYS[way](model).eval()
    set_width(model, width)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"update_bn.*slimmable\.calibrate_bn\(model, loader\)"):
        update_bn([x], model)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if way == "converted":
        return  # SyncBatchNorm trains on GPUs only
    calibrate_bn(model, [2 * x])
    norms = [module for module in model.modules() if isinstance(module, SwitchableNorm)]
    assert len(norms) == 2
    assert all(norm.module_at(index).num_batches_tracked == 1 for norm in norms for index in range(3))


def test_a_norm_that_leaves_its_container_or_starts_anew_is_as_torch_made_it():
    model, x = small_network()
    calibrate_bn(model, [x])
    for width in WIDTHS:
        small = slimmable.extract(model, width)
        assert vars(small[1]).keys() == vars(nn.BatchNorm2d(8)).keys()
        update_bn([2 * x], small)
        assert small[1].num_batches_tracked == 1
        assert not torch.equal(small[1].running_mean, model[1].module_at(WIDTHS.index(width)).running_mean)
    with torch.no_grad():
        for norm in (model[1].full, model[1].module_at(1)):
            norm.weight.fill_(3)
            norm.reset_parameters()  # as when a model is made on the meta device and then given memory
            assert torch.equal(norm.weight, torch.ones(len(norm.weight)))
            assert norm.running_mean.count_nonzero() == norm.num_batches_tracked == 0
            with pytest.raises(UsageError, match="update_bn"):
                norm.reset_running_stats()
    assert vars(model[1].to_plain()).keys() == vars(nn.BatchNorm2d(8)).keys()


@pytest.mark.parametrize("universal", [False, True])
def test_in_inference_mode_the_statistics_are_the_same_and_can_be_trained_on(universal):
    model, x = small_network(universal)
    widths = [1.0, 0.6, 0.5] if universal else [1.0, {"0": 0.6}, 0.5]
    other = copy.deepcopy(model)
    calibrate_bn(other, [x, 2 * x], widths)
    with torch.inference_mode():
        calibrate_bn(model, [x, 2 * x], widths)
    assert str(model.state_dict()) == str(other.state_dict())
    assert not any(tensor.is_inference() for tensor in model.state_dict(keep_vars=True).values())
    with torch.inference_mode():
        set_width(model, 0.7 if universal else {"0": 0.7})
    for width in (width_of(model), *widths):
        set_width(model, width)
        model.train()(x).sum().backward()
    assert model[1].full.weight.grad.isfinite().all()


def test_a_model_made_in_inference_mode_is_calibrated_in_it_or_not_at_all():
    model, x = small_network()
    with torch.inference_mode():
        model = copy.deepcopy(model)
        calibrate_bn(model, [x])
    before = str(model.state_dict())
    with pytest.raises(UsageError, match=r"made in torch\.inference_mode"):
        calibrate_bn(model, [2 * x])
    assert str(model.state_dict()) == before
    assert int(model[1].module_at(1).num_batches_tracked) == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_under_autocast_the_statistics_are_those_of_the_plain_network(width):
    model, x = small_network()
    small = slimmable.extract(model, width)
    with torch.autocast("cpu", torch.bfloat16):
        calibrate_bn(model, [x, 2 * x])
        update_bn([x, 2 * x], small)
    mine = model[1].module_at(WIDTHS.index(width))
    assert torch.equal(mine.running_mean, small[1].running_mean)
    assert torch.equal(mine.running_var, small[1].running_var)
    assert mine.running_mean.dtype == torch.float32
    with at_width(model, width), torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert model[0].weight.grad is not None


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_is_for_those_who_call_it(monkeypatch):
    """A search calibrates each sub-network, under a bar of its own, or without one."""
    x = torch.randn(8, 3)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model = slimmable.slimify(net, (1.0, 0.25), example_inputs=x, universal=True)
    screens = []
    for call in (
        lambda: calibrate_bn(model, [x]),
        lambda: slimmable.search(model, lambda part: 0.0, 0.5, step=0.5, calibrate=[x], progress=False),
    ):
        screens.append(Terminal())
        monkeypatch.setattr("sys.stderr", screens[-1])
        call()
    assert "calibrate_bn" in screens[0].getvalue()
    assert screens[1].getvalue() == ""
