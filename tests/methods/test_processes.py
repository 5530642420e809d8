"""A step of two processes with half of the batch each is the step of one with all of it, for every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slimmable.methods import Batch, Method
from slimmable.training import average_gradients
from tests.methods.networks import MAKE, batch_of, gradients_of, make, own_views, recipe_of
from tests.two_processes import run_in_two

PROGRESS = (0.2, 0.8, 0.9)  # of the steps; the first lies in the slow start


def shared_buffers(method: Method) -> dict[str, torch.Tensor]:
    """Return all but those of MoCo's key encoder, which sees other images in each process, as published."""
    return {label: buffer.clone() for label, buffer in method.named_buffers() if "moco.key_encoder." not in label}


def train(name: str, share: slice) -> list[dict[str, Any]]:
    """Take three steps; return what each one found and changed."""
    method = make(name)
    recipe = recipe_of(method)
    optimizer = torch.optim.SGD(method.online.parameters(), lr=0.01)
    found = []
    for number, progress in enumerate(PROGRESS):
        batch = batch_of(method, number, share)
        torch.manual_seed(100 + number)  # of the shuffled keys
        optimizer.zero_grad()
        losses = method.step(recipe, batch, progress)
        average_gradients(method.online)
        found.append({"losses": losses, "gradients": gradients_of(method), "buffers": shared_buffers(method)})
        optimizer.step()
    return found


def train_once(method: Method, batch: Batch) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    losses = method.step(recipe_of(method), batch, 0.9)
    average_gradients(method.online)
    return [{"losses": losses, "gradients": gradients_of(method), "buffers": shared_buffers(method)}]


def train_with_groups(name: str, share: slice) -> list[dict[str, Any]]:
    method = make(name)
    method.bn_groups = 4
    return train_once(method, batch_of(method, share=share))


def train_with_own_views(name: str, share: slice) -> list[dict[str, Any]]:
    method = make(name)
    return train_once(method, own_views(method, share))


TRAINED = {"steps": train, "groups of BatchNorm": train_with_groups, "views of each width": train_with_own_views}


def work(rank: int) -> dict[tuple[str, str], Any]:
    share = slice(4 * rank, 4 * rank + 4)
    return {(kind, name): run(name, share) for kind, run in TRAINED.items() for name in MAKE}


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict[str, Any]]:
    return run_in_two(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("kind", TRAINED)
def test_two_processes_train_as_one(kind, name, processes):
    expected = TRAINED[kind](name, slice(None))
    for found in processes:
        for step, whole in zip(found[kind, name], expected, strict=True):
            assert step["losses"] == pytest.approx(whole["losses"], rel=1e-8)
            for what in ("gradients", "buffers"):
                assert step[what].keys() == whole[what].keys()
                for label, tensor in whole[what].items():
                    if tensor is None:
                        assert step[what][label] is None, label
                    else:
                        torch.testing.assert_close(step[what][label], tensor, rtol=1e-8, atol=1e-10, msg=label)
