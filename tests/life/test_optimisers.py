"""Optimizers and parameter groups as training code makes them: a converted model gets those of the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.optim.lars import Lars
from torch import nn

import slimmable
from tests.life.networks import FAMILIES, WIDTHS, converted, images, plain


def settings(groups: list[dict], model: nn.Module) -> dict[str, tuple]:
    """For each parameter's name its weight decay and learning rate."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name_of[id(parameter)]: (group["weight_decay"], group.get("lr_scale"), group.get("lr"))
        for group in groups
        for parameter in group["params"]
    }


def full_name(name: str) -> str:
    """`bn.narrow.0.weight` is one width's own of `bn.weight`."""
    head, narrow, tail = name.partition(".narrow.")
    return f"{head}.{tail.split('.', 1)[1]}" if narrow else name


def by_dimension(model: nn.Module) -> list[dict]:
    skipped = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return param_groups_weight_decay(model, 0.05, skipped)


def by_layer(model: nn.Module) -> list[dict]:
    skipped = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    return param_groups_layer_decay(model, 0.05, skipped, layer_decay=0.5)


def by_name(model: nn.Module) -> list[dict]:
    """solo-learn and many scripts."""
    named = list(model.named_parameters())
    skipped = [any(part in name for part in ("bn", "norm", "bias")) for name, _ in named]
    return [
        {"params": [p for (_, p), skip in zip(named, skipped, strict=True) if skip is wanted], "weight_decay": decay}
        for wanted, decay in ((True, 0.0), (False, 0.05))
    ]


def by_module_type(model: nn.Module) -> list[dict]:
    """lightly: norms and biases by the class of their module."""
    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    plain, rest = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            (plain if isinstance(module, norms) or name == "bias" else rest).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.05}]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rule", [by_dimension, by_layer, by_name, by_module_type])
def test_every_parameter_is_treated_as_in_the_plain_model(name, rule):
    original, slim = plain(name), converted(name)
    expected, got = settings(rule(original), original), settings(rule(slim), slim)
    assert set(got) == {parameter for parameter, _ in slim.named_parameters()}
    assert {full_name(parameter) for parameter in got} == set(expected)
    for parameter, values in got.items():
        assert values == expected[full_name(parameter)], parameter


@pytest.mark.parametrize("name", ["adamw", "lars", "lamb", "lion", "muon", "sgd"])
def test_timms_optimizers_train_every_width(name):
    slim = converted("test_resnet").train()
    optimizer = create_optimizer_v2(slim, opt=name, lr=0.01, weight_decay=0.05, layer_decay=0.75)
    recipe = slimmable.SlimRecipe(slim, slow_start=0.5)
    before = {n: p.clone() for n, p in slim.named_parameters()}
    for progress in (0.1, 0.9):
        optimizer.zero_grad()
        for _ in recipe.widths(progress):
            recipe.loss(slim(images()).square().mean()).backward()
        optimizer.step()
        for n, p in slim.named_parameters():
            assert torch.isfinite(p).all()
            if ".narrow." in n:  # not in the slow start; afterwards all
                assert torch.equal(p, before[n]) is (progress == 0.1), n
    assert not torch.equal(slim.get_parameter(next(iter(before))), before[next(iter(before))])


def test_a_step_of_lars_is_that_of_the_plain_model_at_full_width():
    original, slim = plain("test_resnet").train(), converted("test_resnet").train()
    for model in (original, slim):
        optimizer = Lars(by_dimension(model), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            model(images()).square().mean().backward()
            optimizer.step()
    for name, parameter in original.named_parameters():
        assert torch.equal(slim.get_parameter(name), parameter), name


def test_an_optimizers_state_loads_into_that_of_another_conversion():
    first, second = converted("test_resnet").train(), converted("test_resnet").train()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (first, second)]
    recipe = slimmable.SlimRecipe(first)
    for _ in recipe.widths(1.0):
        recipe.loss(first(images()).square().mean()).backward()
    optimizers[0].step()
    second.load_state_dict(first.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip((first, second), optimizers, strict=True):
        optimizer.zero_grad()
        recipe = slimmable.SlimRecipe(model)
        for _ in recipe.widths(1.0):
            recipe.loss(model(images()).square().mean()).backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert slimmable.widths_of(second) == WIDTHS
