"""Whole training steps of the published code (MoCo v2, MoCo v3, SimCLR), done by the recipe."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from slimmable import losses, methods
from slimmable.layers import SlimConv2d, SlimLinear, SwitchableBatchNorm1d, SwitchableBatchNorm2d
from slimmable.training import MoCo, SlimRecipe

GOLDEN = Path(__file__).parents[1] / "golden"
WIDTHS = (1.0, 0.75, 0.5, 0.25)
STEPS = load_file(GOLDEN / "slimclr_step.safetensors")
CASES = json.loads((GOLDEN / "slimclr_step.json").read_text())["cases"]


def conv(inputs, outputs, kernel=1, stride=1, **more):
    return SlimConv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, widths=WIDTHS, **more)


class Block(nn.Module):
    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, channels), SwitchableBatchNorm2d(channels, widths=WIDTHS)
        self.conv2, self.bn2 = conv(channels, channels, 3, stride), SwitchableBatchNorm2d(channels, widths=WIDTHS)
        self.conv3, self.bn3 = conv(channels, 4 * channels), SwitchableBatchNorm2d(4 * channels, widths=WIDTHS)
        self.shortcut = nn.Sequential(
            conv(inputs, 4 * channels, stride=stride), SwitchableBatchNorm2d(4 * channels, widths=WIDTHS)
        )

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(y)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16, 7, 2, slim_in=False), SwitchableBatchNorm2d(16, widths=WIDTHS)
        sizes = [(16, 16, 1), (64, 32, 2), (128, 64, 2), (256, 128, 2)]
        self.features = nn.Sequential(*(Block(*size) for size in sizes))
        self.fc = head

    def forward(self, x):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        return self.fc(self.features(x).mean((2, 3)))


def head(framework):
    linear, norm, fixed = SlimLinear, SwitchableBatchNorm1d, {"slim_out": False, "widths": WIDTHS}
    if framework == "mocov2":
        return nn.Sequential(linear(512, 512, widths=WIDTHS), nn.ReLU(), linear(512, 16, **fixed))
    return nn.Sequential(
        linear(512, 64, bias=framework == "simclr", widths=WIDTHS),
        norm(64, widths=WIDTHS),
        nn.ReLU(),
        linear(64, 16, bias=False, **fixed),
        norm(16, affine=framework == "simclr", slim=False, widths=WIDTHS),
    )


def predictor():
    return nn.Sequential(
        SlimLinear(16, 64, bias=False, slim_in=False, widths=WIDTHS),
        SwitchableBatchNorm1d(64, widths=WIDTHS),
        nn.ReLU(),
        SlimLinear(64, 16, bias=False, slim_out=False, widths=WIDTHS),
    )


def our_name(published):
    """`bn1.bn.0.weight` is ours as `bn1.weight`, `bn1.bn.2.weight` as `bn1.narrow.1.weight`."""
    return re.sub(
        r"(?:^|\.)bn\.(\d)\.", lambda m: "." if m[1] == "0" else f".narrow.{int(m[1]) - 1}.", published
    ).lstrip(".")


def ours(tensors, *prefixes):
    return {
        our_name(name.removeprefix(prefix)): tensor
        for prefix in prefixes
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def network(framework):
    published = load_file(GOLDEN / "slimclr_resnet.safetensors")
    published |= {name: tensor for name, tensor in STEPS.items() if name.startswith("sd/")}
    model = ResNet(head(framework)).double()
    model.load_state_dict(ours(published, "sd/backbone/", f"sd/{framework}_slim/"))
    x = published["x"].double()
    return model, (x, 0.8 * x.flip(-1) + 0.1)


def recipe_of(case, model):
    started = case["epoch"] > case["slim_start_epoch"]
    distill = losses.OnlineDistillation(
        "kl", case["Tt"], case["Ts"], "all wider" if case.get("full_distill") else "widest", case["aux"]
    )
    return SlimRecipe(model, distill, slow_start=0.5), 0.75 if started else 0.25


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def assert_published(case, terms, model, key=None):
    name = case["name"]
    close(terms[0].new_tensor(sum(term.item() for term in terms)), STEPS[f"{name}/loss"])
    if case["framework"] != "mocov3":  # there the published list holds the first direction only
        close(torch.stack(terms).detach(), STEPS[f"{name}/losses"][: len(terms)])
    parameters, statistics = dict(model.named_parameters()), dict(model.named_buffers())
    for parameter, gradient in ours(STEPS, f"{name}/grad/").items():
        given = parameters[parameter].grad
        close(torch.zeros_like(gradient) if given is None else given, gradient)
    for buffer, value in ours(STEPS, f"{name}/q_stats/").items():
        close(statistics[buffer], value)
    if key is not None:
        for parameter, value in ours(STEPS, f"{name}/key_param_after/").items():
            close(dict(key.named_parameters())[parameter].detach(), value)
        for buffer, value in ours(STEPS, f"{name}/key_stats/").items():
            close(dict(key.named_buffers())[buffer], value)


def cases_of(framework):
    cases = [case for case in CASES if case.get("framework") == framework]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["name"])


def scaled_copy(model):
    """The published key encoder at the start: every parameter 0.9 times the network's, the same statistics."""
    key = copy.deepcopy(model).requires_grad_(False)
    for parameter in key.parameters():
        parameter.mul_(0.9)
    return key


@cases_of("mocov2")
def test_moco_v2_step(case):
    model, (x_query, x_key) = network("mocov2")
    moco = MoCo(model, proj_dim=16, queue_size=case["K"], momentum=case["moco_m"]).double()
    moco.key_encoder.network = scaled_copy(model)
    moco.queue.copy_(STEPS["queue0"])
    recipe, progress = recipe_of(case, model)
    terms = []
    for _ in recipe.widths(progress):
        query = model(x_query)
        if recipe.first:
            keys = moco.keys(model, x_key)
        logits = losses.moco_logits(query, keys, moco.queue)
        terms.append(recipe.loss(losses.contrastive_cross_entropy(logits, case["T"]), teach=logits))
        terms[-1].backward()
    moco.enqueue(keys)
    assert_published(case, terms, model, moco.key_encoder.network)
    close(moco.queue, STEPS[f"{case['name']}/queue_after"])
    assert moco.position == case["ptr"]


@cases_of("simclr")
def test_simclr_step(case):
    model, (x0, x1) = network("simclr")
    recipe, progress = recipe_of(case, model)
    terms = []
    for _ in recipe.widths(progress):
        z0, z1 = model(x0), model(x1)
        loss = losses.nt_xent(z0, z1, case["T"])
        terms.append(recipe.loss(loss, teach=losses.nt_xent_logits(z0, z1)))
        terms[-1].backward()
    assert_published(case, terms, model)


@cases_of("mocov3")
def test_moco_v3_step(case):
    base, (x0, x1) = network("mocov3")
    top = predictor().double()
    top.load_state_dict(ours(STEPS, "predictor/"))
    key = scaled_copy(base)
    momentum = 1 - (1 - case["init_m"]) * (1 + math.cos(math.pi * case["epoch"] / case["E"])) / 2
    recipe, progress = recipe_of(case, nn.ModuleList([base, top]))
    terms = []
    for _ in recipe.widths(progress):
        q0, q1 = top(base(x0)), top(base(x1))
        if recipe.first:
            with torch.no_grad():
                for own, other in zip(key.parameters(), base.parameters(), strict=True):
                    own.lerp_(other, 1 - momentum)
                k0, k1 = key(x0), key(x1)
        logits = [losses.moco_v3_logits(q, k, case["T"]) for q, k in ((q0, k1), (q1, k0))]
        contrastive = losses.moco_v3_loss(q0, k1, case["T"]) + losses.moco_v3_loss(q1, k0, case["T"])
        terms.append(recipe.loss(contrastive, teach=logits))
        terms[-1].backward()
    assert_published(case, terms, base, key)
    parameters = dict(top.named_parameters())
    for name, gradient in ours(STEPS, f"{case['name']}/grad_predictor/").items():
        given = parameters[name].grad
        close(torch.zeros_like(gradient) if given is None else given, gradient)


def terms_through_backward(recipe, progress, closure, **modules):
    """The same by `SlimRecipe.backward`, which knows the progress by its own count of steps."""
    terms = []
    recipe.steps, recipe.steps_done = 4, round(4 * progress)
    loss = recipe.backward(closure, backward=lambda term: (terms.append(term), term.backward()), **modules)
    assert loss == recipe.losses[1.0]
    return terms


@cases_of("mocov2")
def test_moco_v2_step_through_backward(case):
    """The key encoder moves inside the closure, and the queue is the criterion's, as in published programs."""
    model, (x_query, x_key) = network("mocov2")
    moco = MoCo(model, proj_dim=16, queue_size=case["K"], momentum=case["moco_m"]).double()
    moco.key_encoder.network = scaled_copy(model)
    moco.queue.copy_(STEPS["queue0"])

    def closure():
        query, keys = model(x_query), moco.keys(model, x_key)
        logits = losses.moco_logits(query, keys, moco.queue.clone())
        moco.enqueue(keys)
        return losses.contrastive_cross_entropy(logits, case["T"]), logits

    terms = terms_through_backward(*recipe_of(case, model), closure, frozen=[moco.key_encoder], once=[moco])
    assert_published(case, terms, model, moco.key_encoder.network)
    close(moco.queue, STEPS[f"{case['name']}/queue_after"])
    assert moco.position == case["ptr"]


@cases_of("simclr")
def test_simclr_step_through_backward_teaches_the_similarities_of_both_views(case):
    model, (x0, x1) = network("simclr")
    recipe, progress = recipe_of(case, model)
    terms = terms_through_backward(recipe, progress, lambda: losses.nt_xent(model(x0), model(x1), case["T"]))
    assert_published(case, terms, model)


@cases_of("mocov3")
def test_moco_v3_step_through_backward(case):
    base, (x0, x1) = network("mocov3")
    top = predictor().double()
    top.load_state_dict(ours(STEPS, "predictor/"))
    key = scaled_copy(base)
    momentum = 1 - (1 - case["init_m"]) * (1 + math.cos(math.pi * case["epoch"] / case["E"])) / 2

    def closure():
        q0, q1 = top(base(x0)), top(base(x1))
        with torch.no_grad():
            for own, other in zip(key.parameters(), base.parameters(), strict=True):
                own.lerp_(other, 1 - momentum)
            k0, k1 = key(x0), key(x1)
        logits = [losses.moco_v3_logits(q, k, case["T"]) for q, k in ((q0, k1), (q1, k0))]
        return losses.moco_v3_loss(q0, k1, case["T"]) + losses.moco_v3_loss(q1, k0, case["T"]), logits

    recipe, progress = recipe_of(case, nn.ModuleList([base, top]))
    assert_published(case, terms_through_backward(recipe, progress, closure, frozen=[key]), base, key)


def assert_published_step(case, method, losses_of_step, key=None):
    """After `Method.step`: gradients, statistics and momentum encoder are the published ones."""
    name = case["name"]
    parameters, statistics = dict(method.encoder.named_parameters()), dict(method.encoder.named_buffers())
    for parameter, gradient in ours(STEPS, f"{name}/grad/").items():
        given = parameters[parameter].grad
        close(torch.zeros_like(gradient) if given is None else given, gradient)
    for buffer, value in ours(STEPS, f"{name}/q_stats/").items():
        close(statistics[buffer], value)
    for prefix, found in () if key is None else (("key_param_after", "parameters"), ("key_stats", "buffers")):
        held = dict(getattr(key, f"named_{found}")())
        for tensor, value in ours(STEPS, f"{name}/{prefix}/").items():
            close(held[tensor].detach(), value)
    assert list(losses_of_step) == (list(WIDTHS) if case["epoch"] > case["slim_start_epoch"] else [1.0])


@cases_of("mocov2")
def test_moco_v2_takes_the_published_step(case):
    model, views = network("mocov2")
    method = methods.MoCoV2(model, proj_dim=16, queue_size=case["K"], momentum=case["moco_m"], temperature=case["T"])
    method.moco.double().queue.copy_(STEPS["queue0"])
    method.moco.key_encoder.network = scaled_copy(model)
    recipe, progress = recipe_of(case, method.online)
    found = method.step(recipe, methods.Batch(views), progress)
    assert_published_step(case, method, found, method.moco.key_encoder.network)
    close(method.moco.queue, STEPS[f"{case['name']}/queue_after"])


@cases_of("simclr")
def test_simclr_takes_the_published_step(case):
    model, views = network("simclr")
    method = methods.SimCLR(model, temperature=case["T"])
    recipe, progress = recipe_of(case, method.online)
    assert_published_step(case, method, method.step(recipe, methods.Batch(views), progress))


@cases_of("mocov3")
def test_moco_v3_takes_the_published_step(case):
    model, views = network("mocov3")
    top = predictor().double()
    top.load_state_dict(ours(STEPS, "predictor/"))
    method = methods.MoCoV3(model, top, momentum=case["init_m"], temperature=case["T"])
    method.momentum_encoder.network = scaled_copy(model)
    recipe, _ = recipe_of(case, method.online)
    recipe.slow_start = case["slim_start_epoch"] / case["E"]
    found = method.step(recipe, methods.Batch(views), case["epoch"] / case["E"])
    assert_published_step(case, method, found, method.momentum_encoder.network)
    parameters = dict(top.named_parameters())
    for name, gradient in ours(STEPS, f"{case['name']}/grad_predictor/").items():
        given = parameters[name].grad
        close(torch.zeros_like(gradient) if given is None else given, gradient)
