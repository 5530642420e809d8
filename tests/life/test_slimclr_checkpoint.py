"""`load_slimclr` against a network written here in the published layout, and that against the published code."""

import argparse
import re
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import slimmable
from slimmable import SwitchableProbe, at_width, load_slimclr, widths_of
from slimmable.errors import CheckpointError, WidthError

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "slimclr_resnet.safetensors")
WIDTHS = (1.0, 0.75, 0.5, 0.25)


class Norm(nn.Module):
    """The BatchNorms of all widths in a list."""

    def __init__(self, channels: int, widths: tuple[float, ...]) -> None:
        super().__init__()
        self.bn = nn.ModuleList(nn.BatchNorm2d(int(channels * width)) for width in widths)


class Block(nn.Module):
    def __init__(self, inputs: int, base: int, stride: int, widths: tuple[float, ...]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, base, 1, bias=False), Norm(base, widths)
        self.conv2, self.bn2 = nn.Conv2d(base, base, 3, stride, 1, bias=False), Norm(base, widths)
        self.conv3, self.bn3 = nn.Conv2d(base, 4 * base, 1, bias=False), Norm(4 * base, widths)
        if stride != 1 or inputs != 4 * base:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * base, 1, stride, bias=False), Norm(4 * base, widths))


class Published(nn.Module):
    """A slimmable ResNet with the module names of the published code, on plain torch layers."""

    def __init__(self, blocks, bases, stem, widths=WIDTHS, head: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, stem, 7, 2, 3, bias=False), Norm(stem, widths)
        features, channels = [], stem
        for stage, (count, base) in enumerate(zip(blocks, bases, strict=True)):
            for index in range(count):
                features.append(Block(channels, base, 2 if stage and not index else 1, widths))
                channels = 4 * base
        self.features = nn.Sequential(*features)
        if head is not None:
            self.fc = head

    def forward(self, x: Tensor, index: int) -> Tensor:
        """Return the features of the width with this index."""
        x = F.max_pool2d(cut(self.conv1, self.bn1, x, index).relu(), 3, 2, 1)
        for block in self.features:
            y = cut(block.conv1, block.bn1, x, index).relu()
            y = cut(block.conv2, block.bn2, y, index).relu()
            y = cut(block.conv3, block.bn3, y, index)
            x = (y + (cut(*block.shortcut, x, index) if hasattr(block, "shortcut") else x)).relu()
        return x.mean((2, 3))


def cut(conv: nn.Conv2d, norm: Norm, x: Tensor, index: int) -> Tensor:
    bn = norm.bn[index]
    weight = conv.weight[: bn.num_features, : x.shape[1]]
    return bn(F.conv2d(x, weight, None, conv.stride, conv.padding))


class Switch(nn.Module):
    def __init__(self, widths=WIDTHS, classes: int = 1000) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(int(2048 * width), classes) for width in widths)


def resnet50(widths=WIDTHS, head: nn.Module | None = None, seed: int = 0) -> Published:
    """All numbers random, and exact in float32; the statistics of every width are different."""
    torch.manual_seed(seed)
    net = Published((3, 4, 6, 3), (64, 128, 256, 512), 64, widths, head)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 0.7)
            nn.init.normal_(module.bias, 0, 0.1)
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            module.num_batches_tracked.fill_(int(torch.randint(1000, ())))
    return net.eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def state():
    return resnet50().state_dict()


@pytest.fixture(scope="module")
@torch.no_grad()
def features(state, images):
    return features_of(resnet50(), images)


@torch.no_grad()
def features_of(net, images):
    net = net.double()
    widths = len(net.bn1.bn)
    return [net(images, index) for index in range(widths)]


@torch.no_grad()
def assert_outputs(model, images, expected):
    assert type(model) is type(timm.create_model("resnet50", num_classes=0))
    assert not model.training
    model = model.double()
    for width, wanted in zip(widths_of(model), expected, strict=True):
        with at_width(model, width):
            torch.testing.assert_close(model(images), wanted, rtol=1e-12, atol=1e-12)


def prefixed(prefix, tensors):
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def training_checkpoint(tensors):
    """What the published training programs save, and a namespace of arguments as others do."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    return {
        "epoch": 200,
        "global_step": 250200,
        "arch": "resnet50",
        "state_dict": tensors,
        "best_acc1": torch.tensor(67.5),
        "optimizer": optimizer.state_dict(),
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "args": argparse.Namespace(lr=0.2, width_mult_list=[1.0, 0.75, 0.5, 0.25]),
    }


MLP = {"fc.0.weight": torch.randn(64, 2048), "fc.0.bias": torch.randn(64), "fc.2.weight": torch.randn(8, 64)}


def momentum_encoder():
    return resnet50(seed=5).state_dict() | MLP


def mocov2(state):
    queue = {"module.queue": torch.randn(8, 16), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return queue | prefixed("module.encoder_k.", momentum_encoder()) | prefixed("module.encoder_q.", state | MLP)


def mocov3(state):
    predictor = {"module.predictor.1.bn.0.weight": torch.ones(8), "module.predictor.0.weight": torch.ones(8, 4)}
    both = prefixed("module.momentum_encoder.", momentum_encoder()) | prefixed("module.base_encoder.", state | MLP)
    return both | predictor


def simclr(state):
    """With a projection that is a single layer, which looks like a classifier."""
    return prefixed("module.encoder_q.", state | {"fc.weight": torch.randn(8, 2048), "fc.bias": torch.randn(8)})


def test_the_stand_in_computes_what_the_published_code_computes():
    net = Published((1, 1, 1, 1), (16, 32, 64, 128), 16)
    stored = {name.removeprefix("sd/backbone/"): t for name, t in GOLDEN.items() if name.startswith("sd/backbone/")}
    keys = net.load_state_dict(stored, strict=False)
    assert not keys.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in keys.missing_keys)  # the golden data has none
    head = "sd/supervised_switch/fc.linears"
    for index, found in enumerate(features_of(net.eval(), GOLDEN["x"].double())):
        torch.testing.assert_close(found, GOLDEN[f"eval/{WIDTHS[index]:g}/feat_f64"], rtol=1e-12, atol=1e-12)
        scores = F.linear(found, *(GOLDEN[f"{head}.{index}.{name}"].double() for name in ("weight", "bias")))
        expected = GOLDEN[f"eval/supervised_switch/{WIDTHS[index]:g}/out_f64"]
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [mocov2, mocov3, simclr])
def test_pre_training_gives_the_features_of_the_trained_encoder(layout, state, images, features, tmp_path):
    path = tmp_path / "ckpt.pth.tar"
    torch.save(training_checkpoint(layout(state)), path)
    model = load_slimclr(path if layout is mocov3 else str(path))
    assert widths_of(model) == WIDTHS
    assert_outputs(model, images, features)


@pytest.mark.parametrize("prefix", ["module.encoder_q.", "encoder_q.", "base_encoder.", "module.module.", ""])
def test_prefixes_and_bare_state_dicts(prefix, state, images, features):
    given = prefixed(prefix, state | MLP)
    before = dict(given)
    model = load_slimclr(given)
    assert_outputs(model, images, features)
    assert given == before  # the same tensors under the same names
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in given.values()}


def test_each_width_gets_its_own_counter_and_statistics(state):
    model = load_slimclr(state)
    for ours, theirs in (
        ("bn1", "bn1"),
        ("layer3.5.bn2", "features.12.bn2"),
        ("layer4.0.downsample.1", "features.13.shortcut.1"),
    ):
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            for index in range(4):
                at = f"{ours}.narrow.{index - 1}" if index else ours
                assert torch.equal(model.state_dict()[f"{at}.{name}"], state[f"{theirs}.bn.{index}.{name}"])


def test_linear_evaluation_has_a_classifier_per_width(images, features, tmp_path):
    net = resnet50(head=Switch())
    path = tmp_path / "lincls.pth.tar"
    torch.save(training_checkpoint(prefixed("module.", net.state_dict())), path)
    model = load_slimclr(path)
    assert isinstance(model.fc, SwitchableProbe)
    assert model.num_classes == 1000
    features = features_of(net, images)
    scores = [F.linear(x, at.weight, at.bias) for x, at in zip(features, net.fc.linears, strict=True)]
    assert_outputs(model, images, scores)
    small = slimmable.extract(model, 0.25)
    assert type(small.fc) is nn.Linear
    slimmable.save(small, tmp_path / "small.safetensors")
    for network in (small, slimmable.load(tmp_path / "small.safetensors")):
        torch.testing.assert_close(network(images), scores[3], rtol=1e-12, atol=1e-12)
    assert_outputs(slimmable.slimify(model), images, scores)
    model.reset_classifier(0)
    assert_outputs(model, images, features)
    slimmable.save(model, tmp_path / "backbone.safetensors")
    assert_outputs(slimmable.load(tmp_path / "backbone.safetensors"), images, features)


def test_a_sliced_classifier_stays_one(images):
    net = resnet50(head=nn.Linear(2048, 7))
    features = features_of(net, images)
    scores = [F.linear(x, net.fc.weight[:, : x.shape[1]], net.fc.bias) for x in features]
    assert_outputs(load_slimclr(net.float().state_dict()), images, scores)


@pytest.mark.parametrize("widths", [(1.0, 0.5), (1.0,), (1.0, 0.7, 0.3)])  # int(64 * 0.7) is 44
def test_other_widths(widths, images):
    net = resnet50(widths, Switch(widths, 5))
    tensors = net.state_dict()
    with pytest.raises(CheckpointError, match="if it has others, pass widths="):
        load_slimclr(tensors)
    scores = [F.linear(x, at.weight, at.bias) for x, at in zip(features_of(net, images), net.fc.linears, strict=True)]
    assert_outputs(load_slimclr(tensors, widths=widths), images, scores)


with torch.device("meta"):
    NAMES = sorted(Published((3, 4, 6, 3), (64, 128, 256, 512), 64).state_dict())


@settings(max_examples=5)
@given(st.sets(st.sampled_from(NAMES), min_size=1, max_size=5), st.sets(st.sampled_from(NAMES), max_size=3))
def test_all_entries_that_are_missing_unknown_or_of_another_shape_are_listed(state, lost, changed):
    tensors = {name: tensor for name, tensor in state.items() if name not in lost}
    tensors |= {name: torch.zeros(2, 2, 2) for name in changed - lost} | {
        "extra.0": torch.zeros(1),
        "fc.bias": torch.zeros(1),
    }
    with pytest.raises(CheckpointError) as caught:
        load_slimclr(tensors)
    lines = dict(line.strip().split(": ", 1) for line in str(caught.value).splitlines()[1:])
    assert set(lines["missing"].split(", ")) == lost
    assert set(lines["unknown"].split(", ")) == {"extra.0", "fc.bias"}
    assert set(re.findall(r"(\S+) \(2, 2, 2\), expected", lines.get("of another shape", ""))) == changed - lost


def test_networks_that_are_not_a_slimmable_resnet50():
    deep = Published((3, 4, 23, 3), (4, 4, 4, 4), 4).state_dict()
    with pytest.raises(CheckpointError, match="has 33 residual blocks; only ResNet-50, with 16"):
        load_slimclr(prefixed("module.encoder_q.", deep))
    with pytest.raises(CheckpointError, match=r"conv1\.weight \(4, 3, 7, 7\), expected \(64, 3, 7, 7\)"):
        load_slimclr(Published((3, 4, 6, 3), (4, 4, 4, 4), 4).state_dict())
    plain = prefixed("module.encoder_q.", timm.create_model("resnet10t").state_dict())
    with pytest.raises(CheckpointError, match=r"holds conv1\.0\.weight, .*not slimmable; load it into one that"):
        load_slimclr({"state_dict": plain})
    with pytest.raises(CheckpointError, match=r"holds nothing; it has names such as features\.0\.conv1"):
        load_slimclr({"state_dict": {}})


def test_what_is_no_checkpoint(tmp_path, state):
    path = tmp_path / "file"
    with pytest.raises(CheckpointError, match="there is no file"):
        load_slimclr(path)
    with pytest.raises(CheckpointError, match="there is no file"):
        load_slimclr(tmp_path)
    torch.save({"state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, path)
    whole = path.read_bytes()
    for damaged in (b"", b"not a checkpoint", whole[:-100], whole[: len(whole) // 2], b"\x80\x02}q\x00."[:4]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is not a file of weights"):
            load_slimclr(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError, match="is not a file of weights"):
        load_slimclr(path)
    for nothing in ({"state_dict": 3}, {"state_dict": None}):
        with pytest.raises(CheckpointError, match="the checkpoint holds no state dict"):
            load_slimclr(nothing)
    with pytest.raises(CheckpointError, match="more than named plain tensors: epoch, model"):
        load_slimclr({"epoch": 3, "model": {}})
    with pytest.raises(CheckpointError, match="the checkpoint holds no state dict, but a list"):
        load_slimclr([state])
    with pytest.raises(WidthError):
        load_slimclr(state, widths=(0.5, 0.25))


class Runs:
    """An object whose pickle runs a program when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path, state):
    path, trace = tmp_path / "ckpt.pth.tar", tmp_path / "it ran"
    torch.save({"state_dict": state, "args": Runs(trace)}, path)
    with pytest.raises(CheckpointError, match=r"is not a file of weights .*Weights only load failed"):
        load_slimclr(path)
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()
