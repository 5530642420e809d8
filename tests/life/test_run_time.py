"""Compilation, precision, memory formats, synchronised norms and devices."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import slimmable
from tests.convert import oracles
from tests.life.networks import FAMILIES, WIDTHS, converted, images

OTHERS = sorted(set(timm.list_models("test_*")) - set(FAMILIES))


# -- torch.compile
@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_compiling_makes_one_graph_a_width_and_none_after_a_switch_back(name):
    slim = converted(name).eval()
    x = images(size=slim.pretrained_cfg["input_size"][-1])
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(slim, backend=counter, fullgraph=True)
    with torch.no_grad():
        for width in (*WIDTHS, *WIDTHS):
            slimmable.set_width(slim, width)
            torch.testing.assert_close(compiled(x), slim(x))
    assert counter.frame_count == len(WIDTHS)


@pytest.mark.slow
def test_a_compiled_training_step_has_the_gradients_of_the_plain_one():
    slim, x = converted("test_resnet").train(), images()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(slim, backend=counter, fullgraph=True)
    gradients = []
    for model in (slim, compiled, compiled):
        slim.zero_grad()
        recipe = slimmable.SlimRecipe(model)
        for _ in recipe.widths(1.0):
            recipe.loss(model(x).square().mean()).backward()
        gradients.append([p.grad.clone() for p in slim.parameters()])
    assert counter.frame_count == len(WIDTHS)
    for plain, first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(second, plain, rtol=1e-4, atol=1e-5)


# -- one step
@pytest.mark.parametrize("name", FAMILIES)
def test_a_narrow_step_trains_the_kept_part_and_leaves_the_rest(name):
    slim, x = converted(name), images(4)
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


# -- norms of several processes
def with_lightning(model: nn.Module) -> nn.Module:
    """What `Trainer(sync_batchnorm=True)` does to the model."""
    plugins = pytest.importorskip("lightning.pytorch.plugins.layer_sync", reason="lightning is not installed")
    return plugins.TorchSyncBatchNorm().apply(model)


@pytest.mark.parametrize(
    ("name", "convert"),
    [  # torch's converter drops the activation inside timm's norms, also in a plain model
        ("test_resnet", nn.SyncBatchNorm.convert_sync_batchnorm),
        ("test_resnet", with_lightning),
        ("test_resnet", convert_sync_batchnorm),
        ("test_efficientnet", convert_sync_batchnorm),
    ],
)
def test_synchronised_norms_replace_those_of_every_width(name, convert):
    slim, x = converted(name).eval(), images()
    expected = slimmable.run_widths(slim, x)
    keys = list(slim.state_dict())
    slim = convert(slim)
    assert not any(type(module) is nn.BatchNorm2d for module in slim.modules())
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in slim.modules()) % len(WIDTHS) == 0
    assert list(slim.state_dict()) == keys
    for width, y in slimmable.run_widths(slim.eval(), x).items():
        torch.testing.assert_close(y, expected[width])


# -- precision and layout
@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_precision_and_channels_last(name):
    slim, x = converted(name).eval().to(memory_format=torch.channels_last), images()
    for width, y in slimmable.run_widths(slim, x.to(memory_format=torch.channels_last)).items():
        torch.testing.assert_close(y, slimmable.run_widths(slim, x)[width], rtol=1e-3, atol=1e-3)
        with slimmable.at_width(slim, width), torch.autocast("cpu", torch.bfloat16):
            assert oracles.difference(slim(x).float(), y) < 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_in_mixed_precision_points_where_the_exact_one_does(name):
    slim, x = converted(name).train(), images(4)
    recipe = slimmable.SlimRecipe(slim)
    gradients = []
    for enabled in (False, True):
        slim.zero_grad()
        for _ in recipe.widths(1.0):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = slim(x)
                loss = recipe.loss((y.float() - 1).square().mean())
            loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in slim.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in slim.parameters()]))
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.98


def test_a_model_in_half_precision_runs_at_every_width():
    slim, x = converted("test_vit").eval(), images()
    expected = slimmable.run_widths(slim, x)
    for width, y in slimmable.run_widths(slim.to(torch.bfloat16), x.bfloat16()).items():
        assert y.dtype == torch.bfloat16
        assert oracles.difference(y.float(), expected[width]) < 0.05


# -- devices
@pytest.mark.cuda
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_moves_to_the_device_and_trains_there(name):
    slim, x = converted(name).double(), images().double()
    slimmable.set_width(slim, 0.5)
    moved = converted(name).double().cuda()
    recipe, other = slimmable.SlimRecipe(slim.train()), slimmable.SlimRecipe(moved.train())
    for _ in recipe.widths(1.0):
        recipe.loss(slim(x).square().mean()).backward()
    for _ in other.widths(1.0):
        other.loss(moved(x.cuda()).square().mean()).backward()
    assert all(tensor.is_cuda for tensor in (*moved.parameters(), *moved.buffers()))
    for (key, parameter), there in zip(slim.named_parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(there.grad.cpu(), parameter.grad, rtol=1e-6, atol=1e-9, msg=key)
    small = slimmable.extract(moved.eval(), 0.5)
    with torch.no_grad(), slimmable.at_width(moved, 0.5):
        torch.testing.assert_close(small(x.cuda()), moved(x.cuda()))


@pytest.mark.cuda
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_on_a_device_recomputes_at_the_width_of_the_forward(reentrant):
    """The backward pass has a thread of its own there."""
    from tests.life.test_checkpointing import Network, summed_loss

    gradients = []
    for use in (None, reentrant):
        slim = slimmable.slimify(Network(), WIDTHS, example_inputs=torch.zeros(2, 8)).double().cuda()
        slim.use_reentrant = use
        summed_loss(slim, torch.ones(4, 8, dtype=torch.float64, device="cuda", requires_grad=True)).backward()
        gradients.append([p.grad for p in slim.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
