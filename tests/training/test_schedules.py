"""The published schedules: momentum, learning rate, the key encoder's update and the queue."""

import json
import math
from pathlib import Path

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from slimmable.errors import UsageError
from slimmable.training import MoCo, cosine_momentum

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "slimclr_schedules.json").read_text())
MOMENTUM = GOLDEN["mocov3_momentum"]
ROWS = "rows [step, lr group(lr_mult 1, decay_mult 1), lr group(lr_mult .5, decay_mult 0), wd, wd]"


@pytest.mark.parametrize(
    ("epoch", "epochs", "start", "expected"),
    [(epoch, MOMENTUM["E"], MOMENTUM["m0"], value) for epoch, value in MOMENTUM["values"]]
    + [(epoch, 100, 0.996, value) for epoch, value in MOMENTUM["m0_0.996_E100"]],
)
def test_momentum_is_the_published_one(epoch, epochs, start, expected):
    assert cosine_momentum(epoch / epochs, start) == pytest.approx(expected, rel=0, abs=1e-15)


@pytest.mark.parametrize("arguments", [(-0.1,), (1.1,), (math.nan,), ("a",), (0.5, 1.5), (0.5, -1.0), (True,)])
def test_momentum_refuses_what_is_no_share(arguments):
    with pytest.raises(UsageError, match=r"must be a number in \[0, 1\]"):
        cosine_momentum(*arguments)


def rates(case, steps):
    """The learning rates of both parameter groups by timm's scheduler, at each of the steps."""
    settings = case["kwargs"]
    warmup = settings.get("slow_start_iters", 0)
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": factor * settings["init_lr"]} for p, factor in zip(parameters, (1, 0.5), strict=True)]
    )
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=settings["all_iters"] - warmup,
        warmup_t=warmup,
        warmup_lr_init=1e-8,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    found = []
    for step in steps:
        schedule.step_update(step)
        found.append([group["lr"] for group in optimizer.param_groups])
    return found


@pytest.mark.parametrize("name", ["cos_warmup", "cos_no_warmup", "cos_slim_start"])
def test_timms_cosine_is_the_published_learning_rate(name):
    """But for the floor: the published rate never falls below 1e-8, timm's falls to 0; timm's warm-up starts from 1e-8.

    `cos_slim_start` is the published jump of the peak rate when narrow widths join in, which is left out here.
    """
    case = GOLDEN["lr"][name]
    change, peak = case["change(step,new init_lr)"] or (math.inf, None)
    found = rates(case, [row[0] for row in case[ROWS]])
    for (step, *published, _, _), ours in zip(case[ROWS], found, strict=True):
        factor = peak / case["kwargs"]["init_lr"] if step >= change else 1
        assert [factor * rate for rate in ours] == pytest.approx(published, rel=1e-12, abs=1.0001e-8)


def test_momentum_update_is_the_published_one():
    case = GOLDEN["momentum_update"]
    network = nn.Sequential(nn.Linear(3, 2, bias=False), nn.BatchNorm1d(2)).double()
    moco = MoCo(network, proj_dim=2, queue_size=4, momentum=case["m"]).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor(case["q"]))
        moco.key_encoder.network[0].weight.copy_(torch.tensor(case["k_before"]))
    network[1].running_mean.fill_(5.0)
    moco.key_encoder.network.eval()
    moco.keys(network, torch.ones(4, 3, dtype=torch.float64))
    torch.testing.assert_close(moco.key_encoder.network[0].weight.tolist(), case["k_after"], rtol=1e-6, atol=1e-7)
    assert moco.key_encoder.network[1].running_mean.tolist() == [0.0, 0.0]


def test_queue_is_the_published_one():
    case = GOLDEN["queue"]
    moco = MoCo(nn.Linear(1, 1), proj_dim=case["dim"], queue_size=case["K"])
    for step in case["history"]:
        moco.enqueue(torch.tensor(step["keys(N=4,dim=4)"]))
        assert int(moco.position) == step["ptr_after"]
        if all(all(row) for row in step["queue_after(dim,K)"]):  # full: before, the published one held zeros
            assert moco.queue.tolist() == step["queue_after(dim,K)"]
