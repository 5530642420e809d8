"""What training code does to a backbone, done to a converted one."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import nn
from torch._dynamo.testing import CompileCounter

import slimmable
from tests.convert import oracles

WIDTHS = (1.0, 0.5, 0.25)
NAMES = ("test_resnet", "test_vit", "test_efficientnet")


def converted(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    slim = slimmable.slimify(timm.create_model(name, num_classes=10), WIDTHS)
    return slim, torch.randn(4, *slim.pretrained_cfg["input_size"])


@pytest.mark.parametrize("name", NAMES)
def test_compiling_makes_one_graph_a_width_and_none_after_a_switch_back(name):
    slim, x = converted(name)
    slim.eval()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(slim, backend=counter, fullgraph=True)
    with torch.no_grad():
        for width in (*WIDTHS, *WIDTHS):
            slimmable.set_width(slim, width)
            torch.testing.assert_close(compiled(x), slim(x))
    assert counter.frame_count == len(WIDTHS)


@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_step_trains_the_kept_part_and_leaves_the_rest(name):
    slim, x = converted(name)
    plan = slimmable.plan(slimmable.extract(slim, 1.0), WIDTHS)
    statistics = {n: b.clone() for n, b in slim.named_buffers() if ".narrow.1." not in n}
    with slimmable.at_width(slim, 0.25):
        slim.train()(x).square().sum().backward()
    for (path, tensor), per_width in plan.tensors.items():
        module = slim.get_submodule(path)
        parameter = module._parameters.get(tensor) if "full" not in module._modules else None
        if parameter is None:
            continue
        assert parameter.grad is not None, f"{path}.{tensor}"
        for axis, kept in enumerate(per_width[-1]):
            if isinstance(kept, int):
                assert not parameter.grad.narrow(axis, kept, parameter.shape[axis] - kept).any()
    assert all(torch.equal(statistics[n], b) for n, b in slim.named_buffers() if n in statistics)


@pytest.mark.parametrize(
    ("name", "convert"),
    [  # torch's converter drops the activation inside timm's norms, also in a plain model
        ("test_resnet", nn.SyncBatchNorm.convert_sync_batchnorm),
        ("test_resnet", convert_sync_batchnorm),
        ("test_efficientnet", convert_sync_batchnorm),
    ],
)
def test_synchronised_norms_replace_those_of_every_width(name, convert):
    slim, x = converted(name)
    slim.eval()
    expected = slimmable.run_widths(slim, x)
    slim = convert(slim)
    assert not any(type(module) is nn.BatchNorm2d for module in slim.modules())
    for width, y in slimmable.run_widths(slim.eval(), x).items():
        torch.testing.assert_close(y, expected[width])


def test_an_average_of_the_weights_has_every_width():
    slim, x = converted("test_resnet")
    average = ModelEmaV3(slim, decay=0.5)
    with torch.no_grad():
        for parameter in slim.parameters():
            parameter.add_(0.1)
    average.update(slim)
    for name, tensor in average.module.named_parameters():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, slim.get_parameter(name) - 0.05, msg=name)
    slimmable.set_width(average.module, 0.25)
    assert slimmable.width_of(slim) == 1.0
    assert average.module(x).shape == (4, 10)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision_and_channels_last(name):
    slim, x = converted(name)
    slim = slim.eval().to(memory_format=torch.channels_last)
    for width, y in slimmable.run_widths(slim, x.to(memory_format=torch.channels_last)).items():
        with slimmable.at_width(slim, width), torch.autocast("cpu", torch.bfloat16):
            assert oracles.difference(slim(x).float(), y) < 0.05


def test_a_checkpointed_block_is_recomputed_at_the_width_of_its_forward():
    slim, x = converted("test_vit")
    gradients = []
    for checkpointing in (False, True):
        slim.zero_grad()
        slim.set_grad_checkpointing(checkpointing)
        for width in WIDTHS:  # one backward a width, as the recipe does
            with slimmable.at_width(slim, width):
                slim.train()(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in slim.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


def test_features_and_intermediates_get_thinner():
    features = slimmable.slimify(
        timm.create_model("test_resnet", features_only=True), WIDTHS, example_inputs=torch.zeros(2, 3, 64, 64)
    )
    shapes = [[y.shape[1] for y in maps] for maps in slimmable.run_widths(features, torch.zeros(2, 3, 64, 64)).values()]
    assert [[full // 2 for full in shapes[0]], [full // 4 for full in shapes[0]]] == shapes[1:]
    slim, x = converted("test_vit")
    with slimmable.at_width(slim, 0.5):
        final, maps = slim.forward_intermediates(x)
    assert {y.shape[1] for y in maps} == {final.shape[-1]} == {slim.num_features // 2}


def test_weight_decay_groups_are_those_of_the_plain_model():
    from timm.optim import param_groups_weight_decay

    plain = timm.create_model("test_resnet", num_classes=10)
    slim, _ = converted("test_resnet")
    sizes = [sorted(p.shape for p in group["params"]) for group in param_groups_weight_decay(plain)]
    full = {id(p) for name, p in slim.named_parameters() if ".narrow." not in name}
    groups = param_groups_weight_decay(slim)
    assert [sorted(p.shape for p in group["params"] if id(p) in full) for group in groups] == sizes
    decayed = next(group["params"] for group in groups if group["weight_decay"])
    assert all(id(p) in full for p in decayed)
