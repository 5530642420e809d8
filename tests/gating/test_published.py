"""Gates, budgets and whole passes against what the published code computed (`tests/golden/gating`)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slimmable
from slimmable.gating import ChannelGate, annealed, bound_loss, budget_loss, gate_plan, hard_mask, open_fractions
from slimmable.losses import vicreg_loss
from tests.gating.published import BLOCKS, Network, golden, manifest, network, our_name

GOLDEN, MANIFEST = golden(), manifest()
IMAGES = [GOLDEN[f"net/x{view}"].double() for view in (1, 2)]
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Replayed:
    """Stands in for `torch.rand_like`: hands out the published noise, call by call."""

    def __init__(self, *uniforms):
        self.uniforms = list(uniforms)

    def __call__(self, like):
        uniform = self.uniforms.pop(0).flatten(1)
        assert uniform.shape == like.shape
        return uniform


def published_gate():
    gate = ChannelGate(16, 24, temperature=0.66667, open_at_zero=True, bias=False).double()
    names = {"atten_c.0": "reduce", "atten_c.1": "norm", "atten_c.3": "expand"}
    state = {"threshold": gate.threshold}
    for name, tensor in GOLDEN.items():
        if name.startswith("mask_c/sd/"):
            part, own = name.removeprefix("mask_c/sd/").rsplit(".", 1)
            state[f"{names[part]}.{own}"] = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
    gate.load_state_dict(state)
    return gate


def test_gate_in_training(monkeypatch):
    gate = published_gate()
    x = GOLDEN["mask_c/x"].clone().requires_grad_()
    monkeypatch.setattr(torch, "rand_like", Replayed(GOLDEN["mask_c/train/uniform"]))
    mask = gate(x.mean((2, 3)))
    torch.testing.assert_close(mask, GOLDEN["mask_c/train/mask"].flatten(1), rtol=0, atol=0)
    torch.testing.assert_close(mask.sum(1), GOLDEN["mask_c/train/norm"], **CLOSE)
    (mask * GOLDEN["mask_c/R"].flatten(1)).sum().backward()
    torch.testing.assert_close(x.grad, GOLDEN["mask_c/train/grad_x"], **CLOSE)
    for theirs, ours in {
        "atten_c.0.weight": gate.reduce.weight,
        "atten_c.1.weight": gate.norm.weight,
        "atten_c.1.bias": gate.norm.bias,
        "atten_c.3.weight": gate.expand.weight,
    }.items():
        torch.testing.assert_close(ours.grad, GOLDEN[f"mask_c/train/grad/{theirs}"].reshape(ours.shape), **CLOSE)
    torch.testing.assert_close(gate.norm.running_mean, GOLDEN["mask_c/train/running_mean_after"], **CLOSE)
    torch.testing.assert_close(gate.norm.running_var, GOLDEN["mask_c/train/running_var_after"], **CLOSE)
    assert gate.macs == MANIFEST["mask_c"]["get_flops"]


def test_straight_through_gradient_of_the_logits():
    logits = GOLDEN["mask_c/train/logits"].clone().requires_grad_()
    mask = hard_mask(logits, GOLDEN["mask_c/train/uniform"], 0.66667)
    (mask * GOLDEN["mask_c/R"]).sum().backward()
    torch.testing.assert_close(logits.grad, GOLDEN["mask_c/train/grad_logits"], **CLOSE)


def test_units_open_at_a_half():
    even = torch.tensor([0.5, 0.5])  # whose noise is zero
    assert hard_mask(torch.tensor([0.0, -0.1]), even).tolist() == [1, 0]


def test_gate_in_eval():
    gate = published_gate()
    pooled = GOLDEN["mask_c/x"].mean((2, 3))
    gate.eval()
    torch.testing.assert_close(gate.logits(pooled), GOLDEN["mask_c/eval/logits"].flatten(1), **CLOSE)
    assert torch.equal(gate(pooled), GOLDEN["mask_c/eval/mask"].flatten(1).double())


@pytest.mark.parametrize("key", ["values", "T_ini=10", "up"])
def test_annealing(key):
    settings = {"values": {}, "T_ini=10": {"first_epoch": 10}, "up": {"start": 0.2, "end": 1.0, "alpha": 0.05}}[key]
    for epoch, value in MANIFEST["exp_annealing"][key]:
        assert annealed(epoch, **settings) == pytest.approx(value, rel=1e-12)


def published_masks(prefix, count=8):
    return [GOLDEN[f"{prefix}/mask{number}"].flatten(1).clone().requires_grad_() for number in range(count)]


def ratio(masks):
    """The share of multiply-adds, by our own model of costs."""
    found = gate_plan(Network().double(), example_inputs=torch.zeros(2, 3, 32, 32, dtype=torch.float64))
    assert [gate.maker for gate in found.gates] == [f"{block}.conv1" for block in BLOCKS]
    counts = found.plan.channels.units
    by_group = {gate.group: mask for gate, mask in zip(found.gates, masks, strict=True)}
    gates = sum(ChannelGate(len(gate.channels), gate.units).macs for gate in found.gates)
    real = sum(found.macs.by_layer(by_group, counts).values())
    return (real + gates) / found.macs.total(counts)


@pytest.mark.parametrize("case", [case for case in MANIFEST["cases"] if case["kind"] == "reg"], ids=str)
def test_budget_and_bound_losses(case):
    target, p = case["target"], case["p"]
    masks = published_masks("reg")
    rloss = budget_loss(ratio(masks), target, case["lbda"])
    assert rloss.item() == pytest.approx(case["rloss"], rel=1e-10)
    gradients = torch.autograd.grad(rloss, masks)
    for gradient, expected in zip(gradients, GOLDEN[f"reg/t{target:g}/rloss_grad"], strict=True):
        torch.testing.assert_close(gradient, expected.expand_as(gradient), **CLOSE)

    bloss = bound_loss(open_fractions(masks, closed_gradient=False), target, p, case["gamma"])
    assert bloss.item() == pytest.approx(case["bloss"], rel=1e-10, abs=1e-15)
    published = torch.autograd.grad(bloss, masks)
    ours = torch.autograd.grad(bound_loss(open_fractions(masks), target, p, case["gamma"]), masks)
    for mask, theirs, own, expected in zip(
        masks, published, ours, GOLDEN[f"reg/t{target:g}_p{p:g}/bloss_grad"], strict=True
    ):
        torch.testing.assert_close(theirs, mask.detach() * expected, **CLOSE)
        torch.testing.assert_close(own, expected.expand_as(own), **CLOSE)  # closed units too


@pytest.mark.parametrize("number", range(3))
def test_multiply_adds_of_blocks(number):
    table = MANIFEST["flops_tables"][number]
    small = bool(table["kwargs"].get("cifar"))
    size = 32 if small else table["kwargs"]["h"]
    net = Network((64, 128, 256, 512), small_images=small)
    found = gate_plan(net, example_inputs=torch.zeros(1, 3, size, size))
    dense = found.macs.by_layer({}, found.plan.channels.units)
    assert dense["conv1"] == table["stem"]
    assert sum(dense.values()) == table["total_full_with_stem"]
    for gate, row in zip(found.gates, table["blocks"], strict=True):
        five = torch.cat([torch.ones(5), torch.zeros(gate.units - 5)]).double()[None]
        real = found.macs.by_layer({gate.group: five}, found.plan.channels.units)
        inside = [path for path in dense if path.startswith(f"{row['block']}.")]
        assert sum(dense[path] for path in inside) == row["full"]
        assert float(sum(real[path] for path in inside)) == row["real_for_mask_sum_5"]
        assert ChannelGate(len(gate.channels), gate.units).macs == row["mask"]


@pytest.mark.parametrize("tag", ["separate_bn", "shared_bn"])
def test_step(tag, monkeypatch):
    case = next(case for case in MANIFEST["cases"] if case.get("tag") == tag)
    model = network(GOLDEN, separate_norms=tag == "separate_bn").train()
    monkeypatch.setattr(torch, "rand_like", Replayed(*(GOLDEN[f"net/uniform{i}"] for i in range(8))))
    with slimmable.gating.gated(model) as run:
        first = model(IMAGES[0])
    second = model(IMAGES[1])
    at = f"net/{tag}/train"
    for mask, number in zip(run.masks().values(), range(8), strict=True):
        assert torch.equal(mask, GOLDEN[f"{at}/mask{number}"].flatten(1))
    torch.testing.assert_close(first, GOLDEN[f"{at}/feats_gated"], **CLOSE)
    torch.testing.assert_close(second, GOLDEN[f"{at}/feats_second"], **CLOSE)
    layers = run.layer_macs()
    for number, block in enumerate(BLOCKS):
        inside = [path for path in layers if path.startswith(f"{block}.") and not path.endswith("channel_gate")]
        real = torch.stack([layers[path] for path in inside]).sum(0)
        torch.testing.assert_close(real, GOLDEN[f"{at}/flops_block_real"][:, number], **CLOSE)
        assert (layers[f"{block}.conv1.channel_gate"] == GOLDEN[f"{at}/flops_mask"][0, number]).all()

    rloss = budget_loss(run.share(), case["den_target"], case["lbda"])
    shares = open_fractions(run.masks().values(), closed_gradient=False)
    bloss = bound_loss(shares, case["den_target"], case["p"], case["gamma"])
    total = vicreg_loss(first, second) + rloss + bloss
    assert rloss.item() == pytest.approx(case["rloss"], rel=1e-10)
    assert bloss.item() == pytest.approx(case["bloss"], rel=1e-10)
    assert total.item() == pytest.approx(case["total"], rel=1e-10)
    total.backward()
    parameters = dict(model.named_parameters())
    for name, expected in GOLDEN.items():
        if name.startswith(f"{at}/grad/"):
            gradient = parameters[our_name(name.removeprefix(f"{at}/grad/"))].grad
            torch.testing.assert_close(gradient, expected.reshape(gradient.shape), **CLOSE)
    buffers = dict(model.named_buffers())
    for name, expected in GOLDEN.items():
        if name.startswith(f"{at}/stats/"):
            torch.testing.assert_close(buffers[our_name(name.removeprefix(f"{at}/stats/"))], expected, **CLOSE)
    for name, batches in case["num_batches_tracked_after_step"].items():
        assert buffers[our_name(name)] == batches


@pytest.mark.parametrize("tag", ["separate_bn", "shared_bn"])
@pytest.mark.filterwarnings("ignore:the gates of this model were never trained")
def test_both_passes_in_eval(tag):
    model = network(GOLDEN, separate_norms=tag == "separate_bn").eval()
    with slimmable.gating.gated(model) as run:
        gated = model(IMAGES[0])
    at = f"net/{tag}/eval"
    for mask, number in zip(run.masks().values(), range(8), strict=True):
        assert torch.equal(mask, GOLDEN[f"{at}/mask{number}"].flatten(1).double())
    torch.testing.assert_close(gated, GOLDEN[f"{at}/feats_gated"], **CLOSE)
    with slimmable.gating.dense(model):
        torch.testing.assert_close(model(IMAGES[1]), GOLDEN[f"{at}/feats_dense"], **CLOSE)
    assert budget_loss(run.share(), 0.3).item() == pytest.approx(
        GOLDEN[f"{at}/rloss"].item(), rel=1e-6
    )  # float32 there


def test_a_dead_gate_opens_nothing_unless_asked_to():
    gate = ChannelGate(8, 6).eval()
    nn.init.constant_(gate.norm.bias, -100.0)  # cuts all hidden units off
    assert gate(torch.randn(3, 8)).sum() == 0
    gate.open_at_zero = True
    assert gate(torch.randn(3, 8)).sum() == 18
