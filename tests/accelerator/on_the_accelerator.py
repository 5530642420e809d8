"""Tests that run on the accelerator, which has no float64; `test_accelerator.py` starts them."""

import inspect

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import slimmable
from slimmable import deploy, evaluation, gating, methods
from slimmable.errors import UsageError
from slimmable.training import GradientDiagnostics

WIDTHS = (1.0, 0.75, 0.5, 0.25)
HERE = "pretend"
OPERATIONS = torch.ops.accelerator


def network(**options):
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=4, **options)


def images(count=8):
    return torch.rand(count, 3, 48, 48, generator=torch.Generator().manual_seed(1), device="cpu")


LABELS = torch.arange(8) % 4


def on_cpu(tensor):
    return tensor.detach().cpu()


def test_the_device_is_as_strict_as_a_gpu():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device=HERE) + torch.ones(2)
    with pytest.raises(TypeError, match="no float64"):
        torch.ones(2, device=HERE).double()
    before = OPERATIONS.reads()
    torch.ones(2, device=HERE).sum().item()
    assert OPERATIONS.reads() == before + 1


# -- conversion and training
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_a_step_on_the_device_is_that_on_the_cpu(name):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=4, **({"img_size": 48} if "vit" in name else {}))
    gradients = {}
    for device in ("cpu", HERE):
        model = slimmable.slimify(plain).to(device)
        recipe = slimmable.SlimRecipe(model, slimmable.OnlineDistillation())
        x, y = images().to(device), LABELS.to(device)
        recipe.backward(lambda model=model, x=x, y=y: F.cross_entropy(model(x), y))
        gradients[device] = [on_cpu(parameter.grad) for parameter in model.parameters()]
        small = slimmable.extract(model.eval(), 0.5)
        with torch.no_grad(), slimmable.at_width(model, 0.5):
            torch.testing.assert_close(small(x), model(x))
    for ours, theirs in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_step_waits_for_nothing():
    model = slimmable.slimify(network()).to(HERE)
    recipe = slimmable.SlimRecipe(model, slimmable.OnlineDistillation())
    x, y = images().to(HERE), LABELS.to(HERE)
    before = OPERATIONS.reads()
    recipe.backward(lambda: F.cross_entropy(model(x), y))
    assert OPERATIONS.reads() == before


@pytest.mark.parametrize("name", ["SimCLR", "MoCoV2", "VICReg", "BarlowTwins"])
def test_a_step_of_a_method_waits_once(name):
    """To see whether its loss is finite."""
    kind = getattr(methods, name)
    backbone = timm.create_model("test_resnet", num_classes=0)
    encoder = methods.Encoder(backbone, kind.projector(backbone.num_features, hidden_dim=32, proj_dim=32))
    encoder = slimmable.slimify(encoder, WIDTHS, example_inputs=images()).to(HERE)
    sizes = {"proj_dim": 32, "queue_size": 32}
    method = kind(encoder, **{key: sizes[key] for key in sizes if key in inspect.signature(kind).parameters})
    recipe, views = slimmable.SlimRecipe(method.online), [images().to(HERE), images().flip(3).to(HERE)]
    for step in range(2):
        before = OPERATIONS.reads()
        method.step(recipe, methods.Batch(views), progress=step / 2)
        assert OPERATIONS.reads() == before + 1


def test_every_width_draws_the_same_numbers_on_the_device():
    model = slimmable.slimify(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), example_inputs=torch.ones(2, 8)
    )
    drawn = []
    model[0].register_forward_hook(lambda *_: drawn.append(on_cpu(torch.rand(4, device=HERE))))
    recipe = slimmable.SlimRecipe(model.to(HERE))
    recipe.backward(lambda: model(torch.ones(2, 8, device=HERE)).square().mean())
    assert len(drawn) == 4
    assert all(torch.equal(each, drawn[0]) for each in drawn)
    assert not torch.equal(on_cpu(torch.rand(4, device=HERE)), drawn[0])


def test_an_optimizer_that_steps_in_the_device_s_thread_is_noticed():
    model = slimmable.slimify(network()).to(HERE)
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], 0.1)
        parameter.register_post_accumulate_grad_hook(lambda _, own=optimizer: own.step())
    recipe = slimmable.SlimRecipe(model)
    with pytest.raises(UsageError, match="SGD steps inside backward"):
        recipe.backward(lambda: model(images().to(HERE)).square().mean())


def test_diagnostics():
    model = slimmable.slimify(network()).to(HERE)
    diagnostics, recipe = GradientDiagnostics(model, every=1), slimmable.SlimRecipe(model)
    for width in recipe.widths(progress=1.0):
        recipe.loss(model(images().to(HERE)).square().mean()).backward()
        diagnostics.after_backward(width)
    diagnostics.after_step()
    [row] = diagnostics.rows
    assert row["grad_cosine_total/w1.0_w0.5"] > 0


# -- what follows training
def test_statistics_repair_search_and_time():
    x = images().to(HERE)
    model = slimmable.slimify(network(), (1.0, 0.5), universal=True, importance="magnitude").to(HERE)
    slimmable.calibrate_bn(model, [x], widths=[0.6])
    [found] = slimmable.search(
        model, lambda net: net(x).mean().item(), budget=0.5, step=0.5, calibrate=[x], progress=False
    )
    assert found.macs > 0
    repaired = slimmable.repair(network().to(HERE).eval(), [x], 0.5)
    expected = slimmable.repair(network().eval(), [images()], 0.5)
    torch.testing.assert_close(on_cpu(repaired(x)), on_cpu(expected(images())), rtol=1e-3, atol=1e-4)
    before = OPERATIONS.waits()
    slimmable.profile(model, example_inputs=x, repeats=2)
    assert OPERATIONS.waits() == before + 3 * len(slimmable.widths_of(model))  # a first forward, and two
    with pytest.raises(UsageError, match="times the CPU"):
        deploy.LatencyTable.measure(model, x)


def test_evaluation_is_that_on_the_cpu():
    draw = torch.Generator().manual_seed(0)
    features = {width: torch.randn(64, int(16 * width), generator=draw) for width in WIDTHS}
    labels = torch.arange(64) % 4
    probes = ("knn", "linear", "slimmable", "ridge")
    there = {width: part.to(HERE) for width, part in features.items()}
    expected = evaluation.evaluate_features(features, labels, features, labels, probes=probes)
    found = evaluation.evaluate_features(there, labels, there, labels, probes=probes)
    for width in WIDTHS:
        assert found[width].knn == expected[width].knn
        assert found[width].ridge == expected[width].ridge
        assert abs(found[width].linear - expected[width].linear) < 0.05
    whole = there[1.0]
    assert evaluation.knn_accuracy(whole, labels, whole, labels) == expected[1.0].knn  # labels may be on the CPU


def test_torch_s_default_device_may_be_any():
    with torch.device(HERE):
        kept = evaluation.label_fraction(LABELS, 0.5)
        features = {1.0: torch.randn(8, 6), 0.5: torch.randn(8, 3)}
        evaluation.train_probe(features, LABELS.to(HERE), epochs=1, batch_size=4)
        gated = gating.gate(network(), example_inputs=images().to(HERE))
        with gating.gated(gated, (3, 48, 48)) as run:
            gated(images().to(HERE))
        assert run.dense_macs() > 0
        slimmable.repair(network().eval(), [images().to(HERE)], 0.5)
    assert kept.device.type == "cpu"


def test_saved_and_loaded(tmp_path):
    model, x = slimmable.slimify(network()).to(HERE).eval(), images().to(HERE)
    slimmable.save(model, tmp_path / "model.safetensors")
    loaded = slimmable.load(tmp_path / "model.safetensors", network().to(HERE))
    with torch.no_grad(), slimmable.at_width(model, 0.5), slimmable.at_width(loaded, 0.5):
        assert torch.equal(on_cpu(loaded(x)), on_cpu(model(x)))


def test_gates():
    model = gating.gate(network()).to(HERE)
    x = images().to(HERE)
    with gating.gated(model, (3, 48, 48)) as run:
        loss = model(x).square().mean() + gating.budget_loss(run.share(), 0.5)
    loss.backward()
    assert run.macs().dtype == torch.float32
    assert all(0 < share <= 1.1 for share in run.share().tolist())
    assert all(gate.grad is not None for gate in gating.gate_parameters(model))
    activity = gating.gate_activity(model, [x])
    assert all(0 <= part <= 1 for opened in activity.values() for part in opened.tolist())


@pytest.mark.parametrize(
    "options", [{"method": "simclr", "diagnostics": True}, {"method": "vicreg", "gate_budget": 0.5}]
)
def test_pretrain(tmp_path, options):
    few = {"num_images": 32, "batch_size": 16, "epochs": 1, "image_size": 20, "workers": 0, "quiet": True}
    slimmable.pretrain(device="pretend", output=tmp_path / "run", **few, **options)
    assert (tmp_path / "run/metrics.csv").exists()
