"""What presets set beside the learning rate, against plain PyTorch in float64: decay, heads, groups, LARS, networks."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

import slimmable
from slimmable.__main__ import main
from slimmable.cli.config import PRESETS, PretrainConfig, configure
from slimmable.cli.data import load_images, make_views
from slimmable.cli.pretrain import Training, make_optimizer
from slimmable.cli.run import new_method
from slimmable.gating import gate, gate_parameters
from tests.cli.test_pretrain import assert_same_results, interrupt_after


def network():
    torch.manual_seed(0)
    inside = (nn.Conv2d(4, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 4, 3, padding=1))
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *inside).double()


def stepped(config, model, oracle, steps=4):
    """Return the parameters after some steps of our optimizer, and of the oracle, on the same gradients."""
    twin = copy.deepcopy(model)
    optimizer, update = make_optimizer(config, model), oracle(twin)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        update()
    return dict(model.named_parameters()), dict(twin.named_parameters())


@pytest.mark.parametrize("preset", ["slimclr-mocov2-imagenet", "mocov2-imagenet", "supervised-imagenet"])
def test_sgd_decays_every_parameter_as_published(preset):
    """MoCo gives SGD all parameters; SlimCLR's scheduler sets the decay of every group anew in each step."""
    config = configure({"weight_decay": 0.1}, preset)

    def oracle(twin):
        return torch.optim.SGD(twin.parameters(), config.lr, momentum=0.9, weight_decay=0.1).step

    ours, theirs = stepped(config, network(), oracle)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_adamw_decays_every_parameter_of_a_vision_transformer():
    config = configure({"weight_decay": 0.1}, "mocov3-vit-imagenet")

    def oracle(twin):
        return torch.optim.AdamW(twin.parameters(), config.lr, weight_decay=0.1).step

    ours, theirs = stepped(config, network(), oracle)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trust", [0.02, 3.0], ids=["by the ratio", "clipped"])
def test_lars_of_gated_networks_is_the_published_one(trust):
    """Wrapped SGD with momentum: the gradients are scaled by min(eta |p| / (|g| + wd |p| + eps) / lr, 1).

    Norms and biases are neither scaled nor decayed. Gates' weights are scaled, and not decayed.
    """
    model = gate(network(), example_inputs=torch.zeros(2, 2, 8, 8, dtype=torch.float64))
    gates = {name for name, each in model.named_parameters() if any(each is one for one in gate_parameters(model))}
    assert any(name.endswith("expand.weight") for name in gates)
    config = configure({"lars_trust": trust, "weight_decay": 0.1}, "gated-vicreg-cifar")
    scales = []

    def oracle(twin):
        sgd = torch.optim.SGD(twin.parameters(), config.lr, momentum=0.9)

        def update():
            for name, parameter in twin.named_parameters():
                if parameter.ndim > 1:
                    decay = 0.0 if name in gates else 0.1
                    size, length = parameter.norm(), parameter.grad.norm()
                    scale = min((trust * size / (length + size * decay + 1e-8)).item() / config.lr, 1.0)
                    scales.append(scale)
                    parameter.grad = (parameter.grad + decay * parameter.detach()) * scale
            sgd.step()

        return update

    ours, theirs = stepped(config, model, oracle)
    assert (max(scales) == 1.0) == (trust == 3.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_lars_of_slimclr_scales_by_the_decayed_gradient_up_to_the_decay():
    """Published: eta |p| / |g + wd p|. timm: eta |p| / (|g| + wd |p|), the same up to about wd |p| / |g|."""
    config = configure({}, "slimclr-simclr-imagenet")
    model = network()

    def oracle(twin):
        sgd = torch.optim.SGD(twin.parameters(), config.lr, momentum=0.9)

        def update():
            for parameter in twin.parameters():
                if parameter.ndim > 1:
                    decayed = parameter.grad + config.weight_decay * parameter.detach()
                    parameter.grad = decayed * 0.001 * parameter.detach().norm() / decayed.norm()
            sgd.step()

        return update

    ours, theirs = stepped(config, model, oracle)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("preset", ["slimclr-mocov2-imagenet", "slimclr-mocov3-imagenet", "slimclr-simclr-imagenet"])
def test_heads_of_slimclr_start_small_and_without_bias(preset):
    given = {"model": "test_resnet", "image_size": 32, "queue_size": 64}
    method = new_method(configure(given, preset), 3, 10)
    heads = [module for module in method.encoder.projector.modules() if isinstance(module, nn.Linear)]
    assert len(heads) == 2
    for head in heads:
        assert float(head.weight.detach().mean()) == pytest.approx(0, abs=3e-4)
        assert float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.05)
        assert head.bias is None or not head.bias.any()
    if preset == "slimclr-mocov3-imagenet":  # published outside the network that is initialised
        for layer in method.online_predictor.modules():
            if isinstance(layer, nn.Linear):  # torch's: uniform up to 1 / sqrt(inputs)
                bound = 1 / math.sqrt(layer.in_features)
                assert float(layer.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)


def test_the_start_of_a_head_leaves_the_backbone_as_it_is():
    given = {"model": "test_resnet", "image_size": 32, "method": "simclr"}
    ours, plain = (new_method(configure({**given, **more}), 3, 10) for more in ({"head_std": 0.01}, {}))
    torch.testing.assert_close(ours.backbone.state_dict(), plain.backbone.state_dict(), rtol=0, atol=0)


def test_groups_are_the_gpus_of_the_published_runs():
    """MoCo v2: 256 images on 8 GPUs; SlimCLR: 1024 on 4, supervised 512 on 4; the others synchronise."""
    groups = {preset: (configure({}, preset).key_parts, configure({}, preset).bn_groups) for preset in PRESETS}
    assert groups["mocov2-imagenet"] == (8, 8)
    assert groups["slimclr-mocov2-imagenet"] == (4, 4)
    assert groups.pop("supervised-imagenet")[1] == 4
    assert all(groups[preset][1] == 1 for preset in groups if "mocov2" not in preset)


def small(**settings):
    given = {"num_images": 64, "batch_size": 16, "widths": (1.0, 0.5), "queue_size": 16, "epochs": 2, **settings}
    return PretrainConfig(**{"method": "mocov2", "slow_start": 0.0, **given})


def training(config):
    return Training(config, new_method(config, 1, 10), load_images(config), torch.device("cpu"))


def test_a_run_trains_in_the_groups_that_it_is_given():
    run = training(small(method="simclr", bn_groups=4))
    *views, labels = run.views.__getitems__([(0, 0), (0, 1)])
    assert run.method.bn_groups == 4
    assert len(views) == 2
    assert len(labels) == 2
    grouped = run.take_step()
    assert training(small(method="simclr")).take_step() != grouped
    assert training(small(method="simclr", bn_groups=4)).take_step() == grouped


def test_views_of_each_width_follow_from_the_image_alone():
    shared, own = training(small()), training(small(views_per_width=True))
    for key in ((0, 3), (1, 3), (0, 5), (0, 3)):
        *views, label = own.views.__getitems__([key])
        *usual, expected = shared.views.__getitems__([key])
        assert label == expected
        assert len(views) == 4
        torch.testing.assert_close(views[:2], usual, rtol=0, atol=0)  # the full width's are as without the option
        assert len({tuple(view.flatten().tolist()) for view in views}) == 4
        torch.testing.assert_close(views, own.views.__getitems__([key])[:-1], rtol=0, atol=0)


def test_narrow_widths_are_trained_on_their_own_views(monkeypatch):
    run, seen = training(small(method="simclr", views_per_width=True)), {}
    step = type(run.method).step

    def noted(self, recipe, batch, progress, **more):
        seen.update(views=batch.views, narrow=batch.narrow)
        return step(self, recipe, batch, progress, **more)

    monkeypatch.setattr(type(run.method), "step", noted)
    run.take_step()
    assert list(seen["narrow"]) == [0.5]
    both = [*seen["views"], *seen["narrow"][0.5]]
    assert [view.shape for view in both] == [(16, 1, 24, 24)] * 4
    assert not torch.equal(both[0], both[2])


def test_an_interrupted_run_with_views_and_groups_goes_on_to_the_same_numbers(tiny, tmp_path, monkeypatch):
    options = ("--views-per-width", "--bn-groups", "4", "--head-std", "0.01", "--decay-norms", "--opt", "sgd")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert main(["pretrain", *tiny, *options, "--output", str(whole)]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(6, patch)
        assert main(["pretrain", *tiny, *options, "--output", str(folder)]) == 130
    assert main(["pretrain", "--output", str(folder), "--resume", "--device", "cpu", "--workers", "0"]) == 0
    assert_same_results(folder, whole)


class CifarResNet18(nn.Module):
    """As published, but for the stem's padding, which is 2 there."""

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
            self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
            self.downsample = None
            if stride != 1 or inputs != outputs:
                shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

        def forward(self, x):
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            return (y + (x if self.downsample is None else self.downsample(x))).relu()

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, inputs = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), 64
        for stage, outputs in enumerate((64, 128, 256, 512), start=1):
            blocks = self.Block(inputs, outputs, 1 if stage == 1 else 2), self.Block(outputs, outputs, 1)
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            inputs = outputs

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


def test_the_network_for_cifar_is_resnet_18_with_a_small_stem():
    torch.manual_seed(0)
    ours, theirs = timm.create_model("resnet18_cifar").double(), CifarResNet18().double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 11_168_832
    assert ours.pretrained_cfg["mean"] == (0.4914, 0.4822, 0.4465)
    assert ours.pretrained_cfg["std"] == (0.2470, 0.2435, 0.2616)
    assert timm.create_model("resnet18_cifar", in_chans=1).pretrained_cfg["mean"] == (0.0,)
    assert all((ours.get_submodule(f"layer{stage}.1").bn2.weight == 1).all() for stage in range(1, 5))


def test_the_network_for_cifar_is_saved_and_loaded_by_its_name(tmp_path):
    model = slimmable.slimify(
        timm.create_model("resnet18_cifar", in_chans=1), (1.0, 0.5), example_inputs=torch.zeros(2, 1, 32, 32)
    )
    slimmable.save(model, tmp_path / "model.safetensors")
    loaded = slimmable.load(tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_views_for_gated_networks_are_the_published_ones():
    """A tenth is solarised, in both views alike, and none is blurred."""
    image = torch.full((3, 8, 8), 200, dtype=torch.uint8)  # solarised: 55
    torch.manual_seed(0)
    first, second = make_views("gated", 8, min_crop_scale=1.0, mirror=False)
    for transform in (first, second):
        brightest = torch.stack([transform(image).max() for _ in range(400)])
        assert float((brightest < 0.3).float().mean()) == pytest.approx(0.1, abs=0.05)
        assert "Blur" not in repr(transform)


def test_a_gated_preset_is_the_published_setting_for_any_budget():
    for budget in (None, 0.1, 0.3):
        config = configure({} if budget is None else {"gate_budget": budget}, "gated-vicreg-cifar")
        assert config.gate_budget == (budget or 0.5)
        assert (config.widths, config.epochs, config.model) == ((1.0,), 500, "resnet18_cifar")
    method = new_method(configure({}, "gated-vicreg-cifar"), 3, 10)
    sizes = [tuple(layer.weight.shape) for layer in method.encoder.projector if isinstance(layer, nn.Linear)]
    assert sizes == [(2048, 512), (2048, 2048), (2048, 2048)]
    run = training(small(method="vicreg", widths=(1.0,), gate_budget=0.3, gate_loss_weight=5.0))
    assert (run.gates.budget_weight, run.gates.bound_weight, run.gates.budget) == (5.0, 1.0, 0.3)
    assert run.gates.alpha == pytest.approx(0.02 * 500)  # of the whole training
