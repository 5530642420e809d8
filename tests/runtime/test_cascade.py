"""A cascade gives each image the scores of the first width that is sure of it, and calibration chooses what pays."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from torch import nn

import slimmable
from slimmable.errors import CheckpointError, DataError, UsageError, WidthError
from slimmable.runtime import Cascade, Session, calibrate_cascade
from tests.runtime.files import MACS, SCALES, WIDTHS, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    nn.init.normal_(net[-1].weight)
    return slimmable.slimify(net, (1.0, 0.5, 0.25), example_inputs=torch.zeros(2, 4))


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    return Session(write(tmp_path_factory.mktemp("files") / "all.onnx", widths=WIDTHS, macs=MACS))


def images(count=40):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(1))


SURE = {
    "probability": lambda scores: scores.softmax(-1).max(),
    "margin": lambda scores: -scores.softmax(-1).sort(descending=True).values[:2].diff()[0],
}


def one_by_one(model, x, thresholds, confidence, costs):
    """The definition, image by image."""
    found = []
    for image in x.split(1):
        spent = 0
        for width, threshold in [*zip((0.25, 0.5), thresholds, strict=True), (1.0, -math.inf)]:
            if threshold == math.inf:
                continue
            with slimmable.at_width(model, width), torch.no_grad():
                scores = model(image)[0]
            spent += costs[width]
            if SURE[confidence](scores) >= threshold:
                break
        found.append((scores, width, spent))
    scores, widths, spent = zip(*found, strict=True)
    return torch.stack(scores), list(widths), sum(spent) / len(spent)


threshold = st.sampled_from([-math.inf, 0.05, 0.36, 0.4, 0.5, 0.7, math.inf])


@given(st.tuples(threshold, threshold), st.sampled_from(sorted(SURE)))
def test_each_image_gets_the_scores_of_the_first_width_that_is_sure(model, thresholds, confidence):
    costs = {row.width: row.macs for row in slimmable.profile(model, (4,), repeats=0).rows}
    model.eval()
    logits, widths, macs = one_by_one(model, images(), thresholds, confidence, costs)
    model.train()
    slimmable.set_width(model, 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    answer = Cascade(model, thresholds, confidence=confidence)(images())
    torch.testing.assert_close(answer.logits, logits)
    assert answer.widths.tolist() == widths
    assert answer.macs == pytest.approx(macs)
    assert model.training
    assert slimmable.width_of(model) == 0.5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_function_may_say_how_sure_the_scores_are_and_nan_is_not_sure(model):
    sure = torch.linspace(0, 1, 40)
    sure[7] = math.nan
    cascade = Cascade(model, [0.5, math.inf], confidence=lambda scores: sure[: len(scores)])
    answer = cascade(images())
    assert (answer.widths == 0.25).tolist() == (sure >= 0.5).tolist()
    assert set(answer.widths) == {0.25, 1.0}
    assert cascade.thresholds == {0.25: 0.5, 0.5: math.inf} == Cascade(model, np.array([0.5, math.inf])).thresholds


def test_a_batch_without_images_has_no_scores(model):
    answer = Cascade(model, 0.5)(images(0))
    assert (answer.logits.shape, answer.widths.shape, answer.macs) == ((0, 3), (0,), 0)


@pytest.mark.parametrize("confidence", ["probability", "margin"])
def test_scores_that_are_nan_or_infinite_are_not_sure(confidence):
    class Net:
        widths = (1.0, 0.5)

        def __call__(self, x, width):
            return x * (width if width == 1 else math.nan)

    answer = Cascade(Net(), 0.0, confidence=confidence, macs={1.0: 2, 0.5: 1})(np.ones((2, 3)))
    assert answer.widths.tolist() == [1.0, 1.0]
    assert answer.macs == 3


def test_what_is_not_scores_is_refused(model):
    features = slimmable.slimify(nn.Sequential(nn.Conv2d(3, 4, 1)), (1.0, 0.5), example_inputs=torch.zeros(1, 3, 4, 4))
    with pytest.raises(DataError, match=r"must return scores \(images, classes\), got \(2, .*, 4, 4\)"):
        Cascade(features, 0.5)(torch.zeros(2, 3, 4, 4))
    with pytest.raises(DataError, match=r"cannot take inputs of shapes \(2, 5\)"):
        Cascade(model, 0.5)(torch.zeros(2, 5))
    with pytest.raises(UsageError, match="confidence must return a number for each image"):
        Cascade(model, 0.5, confidence=lambda scores: scores)(images())


# -- the session of a file
def test_a_session_runs_each_width(session):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert session.widths == WIDTHS
    assert session.macs == dict(zip(WIDTHS, MACS, strict=True))
    for width, scale in zip(WIDTHS, SCALES, strict=True):
        np.testing.assert_array_equal(session(x, width=width), x * scale)
        assert torch.equal(session(torch.from_numpy(x), width=width), torch.from_numpy(x) * scale)
    np.testing.assert_array_equal(session(x), x * 5)


def test_the_order_of_the_widths_is_that_of_the_file(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    path = write(tmp_path / "net.onnx", widths=(0.25, 1.0, 0.5))
    session = Session(runtime.InferenceSession(path, providers=["CPUExecutionProvider"]))
    assert session.widths == (1.0, 0.5, 0.25)
    x = np.ones((1, 3), np.float32)
    assert [session(x, width=width)[0, 0] for width in (0.25, 1.0, 0.5)] == list(SCALES)
    assert math.isnan(Cascade(session, 0.5)(x).macs)
    with pytest.raises(UsageError, match="macs must be given"):
        calibrate_cascade(session, [(x, np.array([0]))], 0.9)
    assert calibrate_cascade(session, [(x, np.array([0]))], 0.9, macs={1.0: 9, 0.5: 3, 0.25: 1})(x).macs == 1


def test_a_session_says_what_is_wrong(tmp_path, session):
    x = np.ones((1, 3), np.float32)
    with pytest.raises(WidthError, match=r"width 0\.3 is not one of this model's widths \(1\.0, 0\.5, 0\.25\)"):
        session(x, width=0.3)
    for wrong in ((), (x, x), (x.astype(np.float64),), (x[:, :2],), ("text",), (None,)):
        with pytest.raises(DataError, match="cannot take inputs of shapes"):
            session(*wrong)
    with pytest.raises(CheckpointError, match=r"does not name its widths; write it with slimmable\.export"):
        Session(write(tmp_path / "plain.onnx"))
    with pytest.raises(CheckpointError, match=r"none\.onnx' cannot be read"):
        Session(tmp_path / "none.onnx")


def test_a_cascade_over_a_session_is_one_over_its_widths(session):
    x = np.array([[0, 0, 3], [0, 0, 1], [0, 0, 0.1], [0, 0, 0]], np.float32)
    answer = Cascade(session, 0.7)(x)
    assert answer.widths.tolist() == [0.25, 0.5, 1.0, 1.0]
    np.testing.assert_allclose(answer.logits, x * np.array([[1], [2], [5], [5]]), rtol=1e-6)
    assert answer.macs == (10 + 40 + 140 + 140) / 4
    tensors = Cascade(session, 0.7)(torch.from_numpy(x))
    np.testing.assert_array_equal(tensors.logits.numpy(), answer.logits)


def test_a_device_needs_no_torch(tmp_path):
    pytest.importorskip("onnxruntime")
    write(tmp_path / "all.onnx", widths=WIDTHS, macs=MACS)
    program = """
import sys
sys.modules["torch"] = None  # an import fails
import numpy as np
from slimmable.runtime import Session, WidthController, calibrate_cascade
session = Session(sys.argv[1])
images = np.eye(3, dtype=np.float32)
controller = WidthController({1.0: 5, 0.5: 2, 0.25: 1}, deadline_ms=1000)
with controller.call() as width:
    assert session(images, width=width)[0, 0] == 5
print(calibrate_cascade(session, [(images, np.arange(3))], 1.0)(images).macs)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "all.onnx")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("10.0\n", 0), done.stderr


def test_the_file_of_a_model_answers_like_the_model(model, tmp_path):
    pytest.importorskip("onnxscript")
    slimmable.export(model, tmp_path / "net.onnx", example_inputs=images(2))
    session = Session(tmp_path / "net.onnx")
    assert session.widths == slimmable.widths_of(model)
    thresholds = []
    for width in (0.25, 0.5):
        sure = Cascade(model.eval(), math.inf)._net(images(), width=width).softmax(1).amax(1).sort().values
        thresholds.append(float(sure[19] + sure[20]) / 2)  # half of the images are surer
    expected, found = (Cascade(each, thresholds)(images()) for each in (model, session))
    assert set(found.widths) == {1.0, 0.5, 0.25}
    assert found.widths.tolist() == expected.widths.tolist()
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.macs == pytest.approx(expected.macs)


# -- calibration
def held_out(seed, count=300, classes=4):
    """Scores of three widths, of which wider ones are right more often, as a model that looks them up."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    table = {}
    for width, clear in ((1.0, 3.0), (0.5, 2.0), (0.25, 1.2)):
        table[width] = random.normal(size=(count, classes)) + clear * np.eye(classes)[labels]

    class Net:
        def __init__(self):
            self.widths, self.macs = WIDTHS, dict(zip(WIDTHS, MACS, strict=True))

        def __call__(self, rows, width):
            return table[width][rows]

    return Net(), np.arange(count), labels


def worth(net, rows, labels, thresholds):
    answer = Cascade(net, thresholds)(rows)
    return (answer.logits.argmax(1) == labels).mean(), answer.macs / MACS[0]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_calibrated_keeps_its_target_and_no_fixed_width_is_better(seed):
    net, rows, labels = held_out(seed)
    batches = [(rows[:170], labels[:170]), (rows[170:], labels[170:])]
    fixed = [worth(net, rows, labels, each) for each in ([-math.inf] * 2, [math.inf, -math.inf], [math.inf] * 2)]
    for target in (0.8, 0.95, 0.99, 1.0):
        accuracy, share = worth(net, rows, labels, list(calibrate_cascade(net, batches, target).thresholds.values()))
        assert accuracy >= target * fixed[-1][0] - 1e-9
        assert share <= min(cost for right, cost in fixed if right >= target * fixed[-1][0])
    for target in (0.1, 0.2, 0.3, 0.5, 1.0):
        cascade = calibrate_cascade(net, batches, target, of="macs")
        accuracy, share = worth(net, rows, labels, list(cascade.thresholds.values()))
        assert share <= target + 1e-9
        assert accuracy >= max(right for right, cost in fixed if cost <= target + 1e-9)
    with pytest.raises(UsageError, match=r"target must be at least 0\.100"):
        calibrate_cascade(net, batches, 0.05, of="macs")


def test_calibration_finds_what_trying_everything_finds():
    net, rows, labels = held_out(0, count=12)
    sures = [1 / np.exp(net(rows, width) - net(rows, width).max(1, keepdims=True)).sum(1) for width in (0.25, 0.5)]
    every = [worth(net, rows, labels, each) for each in product(*([*sure, -math.inf, math.inf] for sure in sures))]
    for target in (0.15, 0.3, 0.6):
        cascade = calibrate_cascade(net, [(rows, labels)], target, of="macs")
        accuracy, _ = worth(net, rows, labels, [*cascade.thresholds.values()])
        assert accuracy == max(right for right, cost in every if cost <= target + 1e-9)


def test_a_cascade_can_be_calibrated_itself(model):
    cascade = Cascade(model, 0.5, confidence="margin")
    labels = torch.arange(40) % 3
    assert calibrate_cascade(cascade, [(images(), labels)], 0.9) is cascade
    again = calibrate_cascade(Cascade(model, 0.9, confidence="margin"), [(images(), labels)], 0.9)
    assert again.thresholds == cascade.thresholds
    right = [float((scores.argmax(1) == labels).float().mean()) for scores in (
        cascade(images()).logits, Cascade(model, math.inf)(images()).logits)]  # fmt: skip
    assert right[0] >= 0.9 * right[1]


def test_labels_that_are_not_class_numbers_are_refused(model):
    numbers = torch.arange(40) % 3
    for labels in (numbers[:39], numbers.float(), numbers[:, None], numbers + 1, numbers - 1):
        with pytest.raises(UsageError, match="loader must give a class number below 3 for each image"):
            calibrate_cascade(model, [(images(), labels)], 0.9)
