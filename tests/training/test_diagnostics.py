"""Gradient diagnostics equal the published statistic, and plain PyTorch in float64 for the rest."""

import copy
import csv
import json
import math
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib.figure
import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn

import slimmable
from benchmarks.diagnostics.plot import plot_imbalance
from slimmable.errors import UsageError, WidthError
from slimmable.layers import SlimLinear, SwitchableBatchNorm1d
from slimmable.training import GradientDiagnostics, SlimRecipe
from slimmable.training.diagnostics import shared_parameters
from slimmable.view.state import put, take
from tests.layers.test_slimclr_parity import TENSORS, build

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = load_file(GOLDEN / "slimclr_gradnorm.safetensors")
MANIFEST = json.loads((GOLDEN / "slimclr_gradnorm.json").read_text())
STEP = load_file(GOLDEN / "slimclr_step.safetensors")
WIDTHS = (1.0, 0.75, 0.5, 0.25)


# -- the published statistic
def run_published(head):
    net = build(head, torch.float32).train()
    if head == "mocov2_slim":
        net.fc[0].load_state_dict({"weight": STEP["sd/mocov2_slim/fc.0.weight"].float(), "bias": net.fc[0].bias})
    diagnostics = GradientDiagnostics(net)
    for width in WIDTHS:
        slimmable.set_width(net, width)
        out = net(TENSORS["x"])
        supervised = head.startswith("supervised")
        loss = nn.functional.cross_entropy(out, PUBLISHED["labels"]) if supervised else out.square().mean()
        loss.backward()
        diagnostics.after_backward(width)
    diagnostics.after_step()
    return net, diagnostics


@pytest.mark.parametrize("case", MANIFEST["cases"], ids=lambda case: case["fc"])
def test_the_published_norms(case):
    net, diagnostics = run_published(case["fc"])
    parameters, ours = dict(net.named_parameters()), diagnostics.layers[0]
    norms = torch.zeros(4, len(MANIFEST["layers"][case["fc"]]), dtype=torch.float64)
    for index, width in enumerate(WIDTHS):
        for column, name in enumerate(MANIFEST["layers"][case["fc"]]):
            if name.startswith(("fc.linears", "fc.0")):  # published: cut once more, and not cut along the rows
                gradient = parameters[name].grad
                norms[index, column] = gradient[:, : int(width * gradient.shape[1])].norm()
            else:
                norms[index, column] = ours[f"grad_norm/w{width}"][diagnostics.layer_names.index(name)]
    assert torch.allclose(norms, PUBLISHED[f"{case['fc']}/norms"], rtol=1e-4)
    assert norms.mean(1).tolist() == pytest.approx(case["mean"], rel=1e-4)


def test_the_published_mean_is_the_mean_over_layers():
    row = run_published("supervised")[1].rows[0]
    assert [row[f"grad_norm/w{width}"] for width in WIDTHS] == pytest.approx(MANIFEST["cases"][0]["mean"], rel=1e-4)


# -- plain PyTorch in float64
def mlp(sizes, widths, norm=False):
    layers = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        ends = {"slim_in": index > 0, "slim_out": index < len(sizes) - 2}
        layers += [SlimLinear(inputs, outputs, widths=widths, **ends)]
        if ends["slim_out"]:
            layers += [SwitchableBatchNorm1d(outputs, widths=widths)] if norm else []
            layers += [nn.Tanh()]
    return nn.Sequential(*layers).double()


def plain_loss(parameters, x, kept, scale):
    """The MLP on slices, `kept` hidden units a layer; parameters are weight, bias, weight, bias, ..."""
    pairs = list(zip(parameters[::2], parameters[1::2], strict=True))
    inputs = x.shape[1]
    for index, (weight, bias) in enumerate(pairs):
        outputs = kept[index] if index < len(pairs) - 1 else len(bias)
        x = nn.functional.linear(x, weight[:outputs, :inputs], bias[:outputs])
        x = x.tanh() if index < len(pairs) - 1 else x
        inputs = outputs
    return scale * x.square().mean()


def expected_row(model, x, widths, hidden, scales):
    """Every column by autograd on slices and boolean masks: over layers, and of all parameters as one vector."""
    parameters = list(model.parameters())
    own, masks = {}, {}
    for width, scale in zip(widths, scales, strict=True):
        kept = [max(1, round(width * units)) for units in hidden]
        own[width] = torch.autograd.grad(plain_loss(parameters, x, kept, scale), parameters)
        masks[width] = []
        for index, parameter in enumerate(parameters):
            mask = torch.zeros_like(parameter, dtype=torch.bool)
            layer = index // 2
            rows = kept[layer] if layer < len(hidden) else parameter.shape[0]
            columns = kept[layer - 1] if layer > 0 else None
            mask[(slice(rows), slice(columns))[: parameter.ndim]] = True
            masks[width].append(mask)
    total = [sum(each) for each in zip(*own.values(), strict=True)]

    def columns(which):
        def vector(tensors, mask=None):
            parts = [tensors[i] if mask is None else tensors[i][mask[i]] for i in which]
            return torch.cat([part.flatten() for part in parts])

        found = {}
        for width in widths:
            small = vector(total, masks[width]).norm()
            found[f"grad_norm/w{width}"] = small
            found[f"own_norm/w{width}"] = vector(own[width]).norm()
            if width < 1:
                found[f"grad_ratio/w{width}"] = vector(total).norm() / small
                found[f"rest_ratio/w{width}"] = vector(total, [~mask for mask in masks[width]]).norm() / small
                found[f"own_ratio/w{width}"] = vector(own[1.0]).norm() / vector(own[width]).norm()
        for wide, narrow in combinations(widths, 2):
            shared = [a & b for a, b in zip(masks[wide], masks[narrow], strict=True)]
            a, b = vector(own[wide], shared), vector(own[narrow], shared)
            found[f"grad_cosine/w{wide}_w{narrow}"] = nn.functional.cosine_similarity(a, b, dim=0, eps=0)
        return found

    layers = [columns([index]) for index in range(0, len(parameters), 2)]
    row = {f"{name.replace('/', '_total/')}": value.item() for name, value in columns(range(len(parameters))).items()}
    return row | {name: sum(layer[name].item() for layer in layers) / len(layers) for name in layers[0]}, layers


def run_step(model, diagnostics, x, scales, progress=1.0, recipe=None):
    """One step as a user writes it, the loss of each width scaled."""
    recipe = recipe or SlimRecipe(model, loss_weights="ones", slow_start=0.5)
    model.zero_grad()
    for width in recipe.widths(progress):
        recipe.loss(scales.get(width, 1.0) * model(x).square().mean()).backward()
        diagnostics.after_backward(width)
    diagnostics.after_step()


@settings(max_examples=25)
@given(
    widths=st.sets(st.sampled_from([0.8, 0.5, 0.3, 0.1]), min_size=1, max_size=3),
    hidden=st.lists(st.integers(2, 9), min_size=1, max_size=3),
    seed=st.integers(0, 100),
)
def test_every_column_equals_plain_pytorch(widths, hidden, seed):
    torch.manual_seed(seed)
    widths = (1.0, *sorted(widths, reverse=True))
    model, x = mlp([3, *hidden, 2], widths), torch.randn(5, 3, dtype=torch.float64)
    scales = (torch.rand(len(widths)) + 0.5).tolist()
    diagnostics = GradientDiagnostics(model)
    run_step(model, diagnostics, x, dict(zip(widths, scales, strict=True)))
    expected, layers = expected_row(model, x, widths, hidden, scales)
    [row] = diagnostics.rows
    assert row == pytest.approx({"step": 0, **expected}, rel=1e-6, abs=1e-9)
    for name, values in diagnostics.layers[0].items():
        assert values.dtype == torch.float32
        assert values.tolist() == pytest.approx([layer[name].item() for layer in layers], rel=1e-5, abs=1e-6)


# -- which block each width reads
def converted(universal=False):
    torch.manual_seed(0)
    return slimmable.slimify(timm.create_model("test_resnet"), (1.0, 0.5, 0.25), universal=universal)


@pytest.mark.parametrize(("network", "universal"), [("test_resnet", False), ("test_resnet", True), ("test_vit", False)])
def test_blocks_are_what_extract_keeps(network, universal):
    model = slimmable.slimify(timm.create_model(network), (1.0, 0.5, 0.25), universal=universal)
    shared = shared_parameters(model, (1.0, 0.5, 0.25))
    for width in (1.0, 0.5, 0.25):
        small = dict(slimmable.extract(model, width).named_parameters())
        switched = {name for name in small if f"{name.rpartition('.')[0]}.narrow.0" in dict(model.named_modules())}
        assert shared.keys() == (small.keys() if universal else small.keys() - switched)
        assert universal or bool(switched) == (network == "test_resnet")
        for name, (parameter, blocks) in shared.items():
            block = blocks[width]
            assert torch.equal(take(parameter, block), small[name])
            spread = put(torch.zeros_like(parameter), block, torch.ones_like(small[name]))
            assert spread.shape == parameter.shape
            assert spread.sum() == small[name].numel()
            assert torch.equal(take(spread, block), torch.ones_like(small[name]))


def test_widths_without_overlap_have_no_direction_to_compare():
    model = nn.Sequential(
        SlimLinear(4, 8, widths=(1.0, 0.5, 0.25), slim_in=False, overlap=False, bias=False),
        SlimLinear(8, 2, widths=(1.0, 0.5, 0.25), slim_out=False, overlap=False, bias=False),
    ).double()
    diagnostics = GradientDiagnostics(model)
    run_step(model, diagnostics, torch.randn(3, 4, dtype=torch.float64), {})
    row = diagnostics.rows[0]
    assert math.isnan(row["grad_cosine_total/w0.5_w0.25"])
    assert abs(row["grad_cosine_total/w1.0_w0.25"]) <= 1


# -- in a training
def test_a_slow_start_has_ratios_but_nothing_of_the_narrow_widths():
    torch.manual_seed(0)
    model = mlp([3, 8, 8, 2], (1.0, 0.5), norm=True)
    diagnostics = GradientDiagnostics(model, every=1)
    for progress in (0.1, 0.9):
        run_step(model, diagnostics, torch.randn(5, 3, dtype=torch.float64), {}, progress)
    slow, later = diagnostics.rows
    assert list(slow) == list(later)
    absent = {
        f"{kind}/{widths}"
        for kind, widths in (("own_norm", "w0.5"), ("own_ratio", "w0.5"), ("grad_cosine", "w1.0_w0.5"))
    }
    absent |= {name.replace("/", "_total/") for name in absent}
    assert {name for name, value in slow.items() if math.isnan(value)} == absent
    assert slow["own_norm_total/w1.0"] == pytest.approx(slow["grad_norm_total/w1.0"])
    assert not any(map(math.isnan, later.values()))


def test_a_common_scale_changes_norms_only():
    torch.manual_seed(0)
    model, x = mlp([3, 8, 2], (1.0, 0.5)), torch.randn(5, 3, dtype=torch.float64)
    diagnostics = GradientDiagnostics(model, every=1)
    run_step(model, diagnostics, x, {})
    run_step(model, diagnostics, x, {1.0: 1024.0, 0.5: 1024.0})
    plain, scaled = diagnostics.rows
    for name in plain.keys() - {"step"}:
        assert scaled[name] == pytest.approx(plain[name] * (1024 if "norm" in name else 1), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype):
    torch.manual_seed(0)
    model, x = mlp([3, 16, 16, 2], (1.0, 0.5)), torch.randn(5, 3, dtype=torch.float64)
    half, exact = copy.deepcopy(model).to(dtype), GradientDiagnostics(model)
    rough = GradientDiagnostics(half)
    run_step(model, exact, x, {})
    run_step(half, rough, x.to(dtype), {})
    for name in exact.rows[0].keys() - {"step"}:
        assert rough.rows[0][name] == pytest.approx(exact.rows[0][name], rel=0.1, abs=0.02)


def test_only_sampled_steps_hold_gradients_and_make_rows():
    model, x = mlp([3, 8, 2], (1.0, 0.5)), torch.randn(5, 3, dtype=torch.float64)
    diagnostics = GradientDiagnostics(model, every=3)
    for step in range(7):
        run_step(model, diagnostics, x, {})
        assert not diagnostics._own
        assert not diagnostics._before
        assert diagnostics.step == step + 1
    assert [row["step"] for row in diagnostics.rows] == [0, 3, 6]


def test_a_batch_in_parts_counts_like_the_whole():
    torch.manual_seed(0)
    model, x = mlp([3, 8, 2], (1.0, 0.5)), torch.randn(6, 3, dtype=torch.float64)
    diagnostics = GradientDiagnostics(model, every=1)
    run_step(model, diagnostics, x, {})
    model.zero_grad(set_to_none=False)
    for part in x.split(2):
        for width in (1.0, 0.5):
            with slimmable.at_width(model, width):
                (model(part).square().mean() / 3).backward()
            diagnostics.after_backward(width)
    diagnostics.after_step()
    whole, parts = diagnostics.rows
    assert parts == pytest.approx(whole | {"step": 1})


def test_several_models_and_parameters_that_are_frozen_or_of_no_width():
    torch.manual_seed(0)
    models = nn.ModuleList(
        [mlp([3, 8, 4], (1.0, 0.5), norm=True), mlp([4, 8, 2], (1.0, 0.5)), nn.Linear(2, 2).double()]
    )
    models[1][0].requires_grad_(False)
    diagnostics, x = GradientDiagnostics(models), torch.randn(5, 3, dtype=torch.float64)
    for width in (1.0, 0.5):
        slimmable.set_width(models, width)
        models[2](models[1](models[0](x))).square().mean().backward()
        diagnostics.after_backward(width)
    diagnostics.after_step()
    assert diagnostics.layer_names == ("0.0.weight", "0.3.weight", "1.0.weight", "1.2.weight", "2.weight")
    ratios = diagnostics.layers[0]["grad_ratio/w0.5"].tolist()
    assert math.isnan(ratios[2])
    assert ratios[4] == 1
    assert diagnostics.layers[0]["rest_ratio/w0.5"][4] == 0
    expected = [ratio for ratio in ratios if not math.isnan(ratio)]
    assert diagnostics.rows[0]["grad_ratio/w0.5"] == pytest.approx(sum(expected) / 4)


def test_wrappers_give_the_same_values(tmp_path):
    torch.manual_seed(0)
    model, x = mlp([3, 8, 2], (1.0, 0.5)), torch.randn(5, 3, dtype=torch.float64)
    plain = GradientDiagnostics(model)
    run_step(model, plain, x, {})
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        diagnostics = GradientDiagnostics(wrapped)
        with wrapped.no_sync():
            run_step(wrapped, diagnostics, x, {})
    finally:
        torch.distributed.destroy_process_group()
    assert diagnostics.rows == plain.rows
    assert diagnostics.layer_names == tuple(f"module.{name}" for name in plain.layer_names)


def test_widths_drawn_in_a_step_count_in_the_total_only():
    model = converted(universal=True)
    recipe = SlimRecipe(model, loss_weights="ones", random_widths=2)
    diagnostics = GradientDiagnostics(model)
    run_step(model, diagnostics, torch.randn(4, 3, 32, 32), {}, recipe=recipe)
    row = diagnostics.rows[0]
    assert {name.rpartition("/")[2] for name in row} <= {
        "step", "w1.0", "w0.5", "w0.25", "w1.0_w0.5", "w1.0_w0.25", "w0.5_w0.25"
    }  # fmt: skip
    squares = [parameter.grad.double().square().sum() for parameter in model.parameters() if parameter.grad is not None]
    assert row["grad_norm_total/w1.0"] == pytest.approx(sum(squares).sqrt().item(), rel=1e-4)
    assert math.isnan(row["own_norm/w0.5"])
    assert row["own_norm/w0.25"] > 0


def test_resuming_goes_on_as_without_a_stop():
    torch.manual_seed(0)
    model, x = mlp([3, 8, 2], (1.0, 0.5)), torch.randn(5, 3, dtype=torch.float64)
    whole, first, second = (GradientDiagnostics(model, every=2) for _ in range(3))
    for step in range(5):
        run_step(model, whole, x * (step + 1), {})
    for step in range(3):
        run_step(model, first, x * (step + 1), {})
    second.step, second.rows, second.layers = first.step, list(first.rows), list(first.layers)
    for step in range(3, 5):
        run_step(model, second, x * (step + 1), {})
    assert second.rows == whole.rows
    assert [row["step"] for row in second.rows] == [0, 2, 4]
    for ours, expected in zip(second.layers, whole.layers, strict=True):
        assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_csv(tmp_path):
    model = mlp([3, 8, 2], (1.0, 0.5))
    diagnostics = GradientDiagnostics(model, every=1)
    diagnostics.to_csv(tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == "step\n"
    for progress in (0.1, 0.9):
        run_step(model, diagnostics, torch.randn(5, 3, dtype=torch.float64), {}, progress)
    diagnostics.to_csv(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert rows[1] == diagnostics.rows[1]
    assert rows[0] == pytest.approx(diagnostics.rows[0], nan_ok=True)


def test_the_gradients_stay_as_they_are():
    torch.manual_seed(0)
    model, x = mlp([3, 8, 2], (1.0, 0.5)), torch.randn(5, 3, dtype=torch.float64)
    run_step(model, GradientDiagnostics(model), x, {})
    watched = [parameter.grad.clone() for parameter in model.parameters()]
    idle = GradientDiagnostics(model, every=2)
    idle.step = 1
    run_step(model, idle, x, {})
    assert all(torch.equal(a, parameter.grad) for a, parameter in zip(watched, model.parameters(), strict=True))


# -- wrong calls
@pytest.mark.parametrize("every", [0, -1, 2.0, True, "50"])
def test_every_must_be_a_number_of_steps(every):
    with pytest.raises(UsageError, match="every must be a 64-bit integer of at least 1"):
        GradientDiagnostics(mlp([3, 8, 2], (1.0, 0.5)), every)


def test_wrong_calls_say_what_to_do():
    model = mlp([3, 8, 2], (1.0, 0.5))
    diagnostics = GradientDiagnostics(model, every=1)
    with pytest.raises(UsageError, match="step 0 is sampled, but after_backward was not called"):
        diagnostics.after_step()
    assert (diagnostics.step, diagnostics.rows) == (0, [])
    with pytest.raises(WidthError, match=r"width 0\.3 is not one of this model's widths"):
        diagnostics.after_backward(0.3)
    model(torch.zeros(2, 3, dtype=torch.float64)).sum().backward()
    diagnostics.after_backward(1.0)
    model.zero_grad()
    with pytest.raises(UsageError, match="no shared parameter has a gradient"):
        diagnostics.after_step()
    assert diagnostics.step == 0


# -- the figure
def drawn(rows, tmp_path, monkeypatch):
    """Return the lines of each panel, as label or colour -> y values."""
    figures = []
    original = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *a, **k: (figures.append(self), original(self, *a, **k))
    )
    plot_imbalance(rows, tmp_path / "figure.png", title="digits")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    return [[list(line.get_ydata()) for line in axes.get_lines()] for axes in figures[0].axes]


def test_the_figure_draws_every_width(tmp_path, monkeypatch):
    model = mlp([3, 8, 8, 2], WIDTHS)
    diagnostics = GradientDiagnostics(model, every=1)
    for progress in (0.1, 0.8, 0.9):
        run_step(model, diagnostics, torch.randn(5, 3, dtype=torch.float64), {}, progress)
    rows = diagnostics.rows
    ratios, cosines = drawn(rows, tmp_path, monkeypatch)
    for width in WIDTHS[1:]:
        assert [row[f"rest_ratio/w{width}"] for row in rows] in ratios
        assert [row[f"grad_ratio/w{width}"] for row in rows] in ratios
        assert any(line[1:] == [row[f"grad_cosine/w1.0_w{width}"] for row in rows[1:]] for line in cosines)
    assert (len(ratios), len(cosines)) == (7, 4)  # with the lines at 1 and 0


@pytest.mark.parametrize("rows", [[], [{"step": 0, "grad_norm/w1.0": 1.0}]])
def test_a_figure_of_nothing_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="not those of GradientDiagnostics"):
        plot_imbalance(rows, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
