"""Copies, teachers and files: what scripts do with the weights of a backbone."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import slimmable
from tests.life.networks import FAMILIES, WIDTHS, converted, images, plain, shapes

ROOT = Path(__file__).parents[2]


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": through_a_file,
}


def outputs(model: nn.Module, x: Tensor) -> dict[float, Tensor]:
    with torch.no_grad():
        return slimmable.run_widths(model, x)


def assert_same_outputs(first: nn.Module, second: nn.Module, x: Tensor) -> None:
    expected = outputs(first, x)
    for width, y in outputs(second, x).items():
        assert torch.equal(y, expected[width])


def train_a_little(model: nn.Module) -> None:
    """Take one step at each width, so that the widths' statistics and weights differ."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for width in WIDTHS:
        with slimmable.at_width(model.train(), width):
            model(images(4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


# -- copies
@pytest.mark.parametrize("name", ["test_resnet", *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES[1:])])
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_has_the_weights_and_the_width_and_is_its_own(name, duplicate):
    slim = converted(name).eval()
    slimmable.set_width(slim, 0.5)
    twin = duplicate(slim)
    assert slimmable.width_of(twin) == 0.5
    assert list(twin.state_dict()) == list(slim.state_dict())
    assert_same_outputs(slim, twin, images())
    slimmable.set_width(twin, 0.25)
    assert slimmable.width_of(slim) == 0.5
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(p.any() for n, p in slim.named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copied_part_keeps_the_weights_and_has_a_width_of_its_own(duplicate):
    slim = converted("test_resnet").eval()
    slimmable.set_width(slim, 0.5)
    x = torch.randn(2, slim.layer1[0].conv1.in_channels // 2, 8, 8)
    part = duplicate(slim.layer1)
    assert torch.equal(part(x), slim.layer1(x))
    slimmable.set_width(slim, 0.25)
    assert slimmable.width_of(part) == 0.5
    assert torch.equal(duplicate(slim.bn1).narrow[1].weight, slim.bn1.narrow[1].weight)


def test_a_copy_is_independent_after_a_backward_pass_too():
    slim = converted("test_resnet")
    with slimmable.at_width(slim, 0.5):
        slim(images()).sum().backward()
    assert_same_outputs(slim.eval(), copy.deepcopy(slim), images())


def test_a_saved_model_opens_in_another_process(tmp_path):
    slim = converted("test_resnet").eval()
    slimmable.set_width(slim, 0.5)
    torch.save({"model": slim, "images": images(), "outputs": outputs(slim, images())}, tmp_path / "model.pt")
    program = f"""
import torch, sys
saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
import slimmable
assert slimmable.width_of(saved["model"]) == 0.5
with torch.no_grad():
    found = slimmable.run_widths(saved["model"], saved["images"])
for width, output in saved["outputs"].items():
    torch.testing.assert_close(found[width], output)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


# -- teachers
def test_a_momentum_update_by_position_reaches_every_width():
    """solo-learn, moco and lightly zip the parameters of two models that were built alike."""
    student, teacher = converted("test_resnet"), slimmable.slimify(plain("test_resnet"), WIDTHS)
    assert [n for n, _ in student.named_parameters()] == [n for n, _ in teacher.named_parameters()]
    train_a_little(student)
    before = copy.deepcopy(teacher)
    with torch.no_grad():
        for theirs, own in zip(student.parameters(), teacher.parameters(), strict=True):
            own.mul_(0.75).add_(theirs, alpha=0.25)
    for name, own in teacher.named_parameters():
        expected = torch.lerp(before.get_parameter(name), student.get_parameter(name), 0.25)
        torch.testing.assert_close(own, expected, msg=name)
    slimmable.set_width(teacher, 0.25)
    assert slimmable.width_of(student) == 1.0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_students_state_loads_into_a_teacher_that_was_converted_on_its_own(name):
    """DINO: `teacher.load_state_dict(student.state_dict())`, and the teacher has no gradient."""
    student, teacher = converted(name), slimmable.slimify(plain(name, num_classes=10), WIDTHS)
    train_a_little(student)
    teacher.load_state_dict(student.state_dict())
    for parameter in teacher.parameters():
        parameter.requires_grad = False
    assert_same_outputs(student.eval(), teacher.eval(), images())
    assert not outputs(teacher, images())[0.5].requires_grad


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"exclude_buffers": True}])
def test_timms_average_has_every_width(options):
    slim = converted("test_resnet")
    average = ModelEmaV3(slim, decay=0.75, **options)
    before = {name: tensor.clone() for name, tensor in slim.state_dict().items()}
    train_a_little(slim)
    average.update(slim)
    buffers = {name for name, _ in slim.named_buffers()}
    for name, now in slim.state_dict().items():
        expected = torch.lerp(before[name], now, 0.25) if now.is_floating_point() else now
        if name in buffers and options.get("exclude_buffers"):
            expected = now
        torch.testing.assert_close(average.module.state_dict()[name], expected, msg=name)
    slimmable.set_width(average.module, 0.25)
    assert slimmable.width_of(slim) == 1.0
    assert shapes(average.module, images()) == [(2, 10)] * 3


def test_torchs_average_has_every_width():
    slim = converted("test_resnet").eval()
    average = torch.optim.swa_utils.AveragedModel(slim, use_buffers=True)
    average.update_parameters(slim)
    assert_same_outputs(slim, average.module, images())


# -- checkpoints
@pytest.mark.parametrize("name", FAMILIES)
def test_plain_weights_go_in_and_come_out_unchanged(name):
    trained = plain(name)
    with torch.no_grad():
        for tensor in trained.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    expected = trained.state_dict()
    slim = converted(name)
    slim.load_state_dict(expected)
    for norm in (m for m in slim.modules() if hasattr(m, "narrow")):  # prefix groups: the first channels
        for narrow in norm.narrow:
            for key in ("weight", "bias", "running_mean", "running_var"):
                full = getattr(norm.full, key)
                assert torch.equal(getattr(narrow, key), full[: len(getattr(narrow, key))])
    ways_back = {
        "extraction": slimmable.extract(slim, 1.0).state_dict(),
        "plain keys": {key: tensor for key, tensor in slim.state_dict().items() if ".narrow." not in key},
        "in one call": slimmable.full_state_dict(slim),
    }
    for state in ways_back.values():
        assert list(state) == list(expected)
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    plain(name).load_state_dict(ways_back["plain keys"])


def test_what_a_checkpoint_lacks_or_has_too_much_is_reported_under_plain_names():
    slim = converted("test_resnet")
    state = plain("test_resnet").state_dict()
    del state["bn1.weight"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r'(?s)Missing.*"bn1\.weight".*Unexpected.*"extra"'):
        slim.load_state_dict(state)
    report = slim.load_state_dict(state, strict=False)
    assert "bn1.weight" in report.missing_keys
    assert report.unexpected_keys == ["extra"]


def test_a_converted_checkpoint_loads_into_another_conversion_with_every_width():
    slim = converted("test_resnet")
    train_a_little(slim)
    file = io.BytesIO()
    torch.save(slim.state_dict(), file)
    file.seek(0)
    again = converted("test_resnet")
    again.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert_same_outputs(slim, again.eval(), images())
    assert not torch.equal(again.bn1.narrow[0].running_mean, again.bn1.full.running_mean[:8])


class Locked(nn.Module):
    """Holds a lock, which no copy can have of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.lock = nn.Linear(4, 8), nn.Linear(8, 2), threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.last(self.first(x))


def test_what_cannot_be_copied_is_shared():
    model = Locked()
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=torch.zeros(2, 4))
    small = slimmable.extract(slim, 0.5)
    assert slim.lock is model.lock is small.lock
    assert small(torch.zeros(2, 4)).shape == (2, 2)
