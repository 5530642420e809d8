"""A step of two processes with half of the batch each is the step of one with all of it, for every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slimmable.training import average_gradients
from tests.methods.networks import MAKE, batch_of, gradients_of, make, recipe_of
from tests.two_processes import run_in_two

PROGRESS = (0.2, 0.8, 0.9)  # of the steps; the first lies in the slow start


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
        # the key encoder of MoCo sees other images in each process, so its statistics differ, as published
        buffers = {
            label: tensor.clone() for label, tensor in method.named_buffers() if "moco.key_encoder." not in label
        }
        found.append({"losses": losses, "gradients": gradients_of(method), "buffers": buffers})
        optimizer.step()
    return found


def work(rank: int) -> dict[str, Any]:
    share = slice(4 * rank, 4 * rank + 4)
    return {name: train(name, share) for name in MAKE}


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list[dict[str, Any]]:
    return run_in_two(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", MAKE)
def test_two_processes_train_as_one(name, processes):
    expected = train(name, slice(None))
    for found in processes:
        for step, whole in zip(found[name], expected, strict=True):
            assert step["losses"] == pytest.approx(whole["losses"], rel=1e-8)
            for kind in ("gradients", "buffers"):
                assert step[kind].keys() == whole[kind].keys()
                for label, tensor in whole[kind].items():
                    if tensor is None:
                        assert step[kind][label] is None, label
                    else:
                        torch.testing.assert_close(step[kind][label], tensor, rtol=1e-8, atol=1e-10, msg=label)
