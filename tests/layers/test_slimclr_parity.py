"""A ResNet built by hand from the layers equals the published SlimCLR code: outputs, statistics, gradients."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import slimmable
from slimmable._width import set_width, width_of, widths_of
from slimmable.errors import WidthError
from slimmable.layers import (
    SlimConv2d,
    SlimLinear,
    SwitchableBatchNorm1d,
    SwitchableBatchNorm2d,
    SwitchableProbe,
    kept_at,
)
from slimmable.view.state import is_slim

GOLDEN = Path(__file__).parent.parent / "golden"
TENSORS = load_file(GOLDEN / "slimclr_resnet.safetensors")
MANIFEST = json.loads((GOLDEN / "slimclr_resnet.json").read_text())
WIDTHS = (1.0, 0.75, 0.5, 0.25)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


class Block(nn.Module):
    def __init__(self, channels: int, base: int, stride: int, **slim: object) -> None:
        super().__init__()
        widths = slim["widths"]
        self.conv1 = SlimConv2d(channels, base, 1, bias=False, **slim)
        self.bn1 = SwitchableBatchNorm2d(base, widths=widths)
        self.conv2 = SlimConv2d(base, base, 3, stride, 1, bias=False, **slim)
        self.bn2 = SwitchableBatchNorm2d(base, widths=widths)
        self.conv3 = SlimConv2d(base, 4 * base, 1, bias=False, **slim)
        self.bn3 = SwitchableBatchNorm2d(4 * base, widths=widths)
        self.shortcut = nn.Sequential(
            SlimConv2d(channels, 4 * base, 1, stride, bias=False, **slim),
            SwitchableBatchNorm2d(4 * base, widths=widths),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    def __init__(self, head: str, widths: tuple[float, ...], overlap: bool) -> None:
        super().__init__()
        slim = {"widths": widths, "overlap": overlap}
        self.conv1 = SlimConv2d(3, 16, 7, 2, 3, bias=False, slim_in=False, **slim)
        self.bn1 = SwitchableBatchNorm2d(16, widths=widths)
        self.pool = nn.MaxPool2d(3, 2, 1)
        channels, blocks = 16, []
        for stage, base in enumerate((16, 32, 64, 128)):
            blocks.append(Block(channels, base, 1 if stage == 0 else 2, **slim))
            channels = 4 * base
        self.features = nn.Sequential(*blocks)
        self.fc = make_head(head, widths, overlap)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(self.pool(self.bn1(self.conv1(x)).relu()))
        return self.fc(x.mean((2, 3)))


def make_head(head: str, widths: tuple[float, ...], overlap: bool) -> nn.Module:
    slim = {"widths": widths, "overlap": overlap}
    if head == "supervised":
        return SlimLinear(512, 10, slim_out=False, **slim)
    if head == "supervised_switch":
        return SwitchableProbe(512, 10, widths)
    if head == "mocov2_slim":
        return nn.Sequential(SlimLinear(512, 512, **slim), nn.ReLU(), SlimLinear(512, 16, slim_out=False, **slim))
    return nn.Sequential(
        SlimLinear(512, 64, head == "simclr_slim", **slim),
        SwitchableBatchNorm1d(64, widths=widths),
        nn.ReLU(),
        SlimLinear(64, 16, False, slim_out=False, **slim),
        SwitchableBatchNorm1d(16, affine=head == "simclr_slim", widths=widths, slim=False),
    )


def our_name(name: str, position: dict[int, int]) -> str | None:
    """Translate a name of the published code; `position` maps its width indices to ours."""
    if found := re.fullmatch(r"(.*)\.(bn|linears)\.(\d)\.(\w+)", name):
        owner, kind, index, tensor = found.groups()
        if int(index) not in position:
            return None
        ours = position[int(index)]
        if kind == "linears":
            return f"{owner}.linears.{ours}.{tensor}"
        return f"{owner}.{tensor}" if ours == 0 else f"{owner}.narrow.{ours - 1}.{tensor}"
    return name


def build(head: str, dtype: torch.dtype, widths: tuple[float, ...] = WIDTHS, overlap: bool = True) -> ResNet:
    net = ResNet(head, widths, overlap)
    position = {WIDTHS.index(width): index for index, width in enumerate(widths)}
    state = {}
    for key, tensor in TENSORS.items():
        if key.startswith(("sd/backbone/", f"sd/{head}/")) and (name := our_name(key.split("/", 2)[2], position)):
            state[name] = tensor
    own = net.state_dict()
    if head == "mocov2_slim":  # what is stored of it; no narrow width may read the rest
        stored = state["fc.0.weight"]
        state["fc.0.weight"] = torch.full((512, 512), torch.nan)
        state["fc.0.weight"][: stored.shape[0], : stored.shape[1]] = stored
    state |= {name: torch.tensor(3) for name in own if name.endswith("num_batches_tracked")}
    net.load_state_dict(state)
    return net.to(dtype)


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


def padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    full = tensor.new_zeros(shape)
    full[tuple(slice(size) for size in tensor.shape)] = tensor
    return full


def cases(prefix: str) -> list[tuple[str, str]]:
    return sorted({tuple(key.split("/")[1:3]) for key in TENSORS if key.startswith(prefix) and "/out_" in key})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("head", "width"), cases("eval/"))
def test_outputs_of_every_head_and_width(head, width, mode, dtype):
    net = build(head, dtype).train(mode == "train")
    set_width(net, float(width))
    with torch.no_grad():
        got = net(TENSORS["x"].to(dtype))
    expected = TENSORS[f"{mode}/{head}/{width}/out_f{dtype.itemsize * 8}"]
    assert relative_error(got, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("width", ["1", "0.75", "0.5", "0.25"])
def test_pooled_features(width):
    net = build("supervised", torch.float64).eval()
    net.fc = nn.Identity()
    set_width(net, float(width))
    assert relative_error(net(TENSORS["x"].double()), TENSORS[f"eval/{width}/feat_f64"]) <= 1e-12


@pytest.mark.parametrize("head", ["mocov3_slim", "simclr_slim"])
@pytest.mark.parametrize("width", ["1", "0.75", "0.5", "0.25"])
def test_statistics_of_the_active_width_only(head, width):
    net = build(head, torch.float64).train()
    before = {name: tensor.clone() for name, tensor in net.named_buffers()}
    set_width(net, float(width))
    net(TENSORS["x"].double())
    same = {index: index for index in range(4)}
    prefixes = (f"train/{width}/stats/", f"train/{head}/{width}/stats/")
    expected = {
        our_name(key.rsplit("/", 1)[1], same): tensor for key, tensor in TENSORS.items() if key.startswith(prefixes)
    }
    assert len(expected) == 2 * (1 + 4 * 4 + 2)
    for name, tensor in net.named_buffers():
        if name.endswith("num_batches_tracked"):
            assert tensor == 3 + (name.replace("num_batches_tracked", "running_mean") in expected)
        elif name in expected:
            assert relative_error(tensor, expected[name]) <= 1e-12
        else:
            assert torch.equal(tensor, before[name])


GRADIENTS = sorted({tuple(key.split("/")[1:4]) for key in TENSORS if "/grad_" in key})


@pytest.mark.parametrize(("head", "width", "loss"), GRADIENTS)
def test_gradients(head, width, loss):
    net = build(head, torch.float64).train()
    set_width(net, float(width))
    out = net(TENSORS["x"].double())
    (out.square() if loss == "grad_sq" else out * TENSORS["R"].double()[:, : out.shape[1]]).sum().backward()
    parameters = dict(net.named_parameters())
    same = {index: index for index in range(4)}
    prefix = f"train/{head}/{width}/{loss}/"
    expected = {our_name(key[len(prefix) :], same): t for key, t in TENSORS.items() if key.startswith(prefix)}
    assert len(expected) >= 6
    for name, tensor in expected.items():
        gradient = parameters[name].grad
        assert relative_error(gradient, padded(tensor, gradient.shape)) <= 1e-12, name


@pytest.mark.parametrize("widths", ["1-0.5", "1-0.5-0.25", "1-0.75-0.25"])
@pytest.mark.parametrize("head", sorted({key.split("/")[2] for key in TENSORS if key.startswith("nonoverlap/")}))
@pytest.mark.parametrize("mode", ["nonoverlap", "nonoverlap_train"])
def test_non_overlapping_weights(head, mode, widths):
    found = {key.split("/")[3]: key for key in TENSORS if key.startswith(f"{mode}/{widths}/{head}/")}
    net = build(head, torch.float64, tuple(map(float, widths.split("-"))), overlap=False)
    net.train(mode == "nonoverlap_train")
    assert {float(width) for width in found} == set(widths_of(net))
    for width, key in found.items():
        set_width(net, float(width))
        assert relative_error(net(TENSORS["x"].double()), TENSORS[key]) <= 1e-12


def test_non_overlapping_ranges_as_published():
    checked = 0
    for case in MANIFEST["nonoverlap_ranges"]:
        full, *narrow = case["channels"]
        if len({full, *narrow}) < len(narrow) + 1:
            continue  # not to be had from distinct widths
        widths = tuple(channels / full for channels in case["channels"])
        kept = [units or range(full) for units in kept_at(widths, full, 1, overlap=False)]
        assert kept == [tuple(range(*ends)) if index else range(*ends) for index, ends in enumerate(case["ranges"])]
        checked += 1
    assert checked == 5


def test_non_overlapping_weights_need_room():
    with pytest.raises(WidthError, match=r"overlap=False .* \[12, 8, 4\] of 16 units"):
        SlimConv2d(16, 16, 1, widths=WIDTHS, overlap=False)
    assert width_of(SlimConv2d(16, 16, 1, widths=(1.0, 0.75, 0.25), overlap=False)) == 1.0
    with pytest.raises(WidthError, match=r"\[5, 5\] of 10 units"):  # they would fit, but take more than the layer
        SlimConv2d(10, 10, 1, widths=(1.0, 0.52, 0.49), overlap=False)
    with pytest.raises(WidthError, match=r"\[1, 1, 1\] of 2 units"):  # each width keeps a unit
        SlimConv2d(2, 2, 1, widths=(1.0, 0.5, 0.2, 0.1), overlap=False)


def plain_twin(net: ResNet) -> nn.Module:
    """The network of torch's own layers with the full weights of one built by hand."""
    kinds = (SlimConv2d, SlimLinear, SwitchableProbe, SwitchableBatchNorm1d, SwitchableBatchNorm2d)
    made = {id(each): each.to_plain() for each in net.modules() if isinstance(each, kinds)}
    twin = copy.deepcopy(net, {key: copy.deepcopy(module) for key, module in made.items()})
    assert not any(is_slim(module) for module in twin.modules())
    return twin


@pytest.mark.parametrize("mode", ["nonoverlap", "nonoverlap_train", "eval", "train"])
@pytest.mark.parametrize("head", ["supervised", "mocov3_slim"])
def test_slimify_with_and_without_overlap_as_published(head, mode):
    overlap = not mode.startswith("nonoverlap")
    widths = WIDTHS if overlap else (1.0, 0.75, 0.25)
    built = build(head, torch.float64, widths, overlap)
    images = TENSORS["x"].double()
    net = slimmable.slimify(plain_twin(built), widths, example_inputs=images, overlap=overlap, rounding="floor")
    net.load_state_dict(built.state_dict())
    net.train(mode in ("train", "nonoverlap_train"))
    for width in widths:
        key = f"{mode}/{head}" if overlap else f"{mode}/1-0.75-0.25/{head}"
        set_width(net, width)
        assert relative_error(net(images), TENSORS[f"{key}/{width:g}/out_f64"]) <= 1e-12


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_slimify_with_a_switchable_classifier_as_published(mode):
    built = build("supervised_switch", torch.float64)
    images = TENSORS["x"].double()
    net = slimmable.slimify(plain_twin(built), WIDTHS, example_inputs=images, switchable="fc")
    state = built.state_dict()
    for index in range(len(WIDTHS)):
        for name in ("weight", "bias"):
            ours = f"fc.narrow.{index - 1}.{name}" if index else f"fc.{name}"
            state[ours] = state.pop(f"fc.linears.{index}.{name}")
    net.load_state_dict(state)
    net.train(mode == "train")
    for width in WIDTHS:
        set_width(net, width)
        assert relative_error(net(images), TENSORS[f"{mode}/supervised_switch/{width:g}/out_f64"]) <= 1e-12
