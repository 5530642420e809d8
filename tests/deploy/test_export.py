"""`slimmable.export`: one file with all widths gives what the model does at each, for models of any kind."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import slimmable
from slimmable import SlimmableError
from slimmable.errors import CheckpointError, ConversionError, UsageError, WidthError
from tests.convert import oracles

WIDTHS = (1.0, 0.5, 0.25)


class Pair(nn.Module):
    """Two inputs, one of them by name and of numbers, and two outputs with names."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 16), nn.Linear(16 + 4, 24), nn.Linear(24, 3)

    def forward(self, tokens, features, *, scale=1.0):
        x = torch.cat([self.embed(tokens).mean(1), features], 1)
        x = self.mix(x).relu()
        return {"scores": self.head(x) * scale, "mean": x.mean(1)}


class Placed(nn.Module):
    """Blocks that each keep the same table of positions, as those of ConViT do."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(40, 40) for _ in range(2))
        for block in self.blocks:
            block.register_buffer("places", torch.linspace(-1, 1, 1600).view(40, 40))

    def forward(self, images):
        for block in self.blocks:
            images = block(images).relu() + block.places
        return images


class Rotated(nn.Module):
    """Takes each of four heads apart, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 64), nn.Linear(64, 4)

    def forward(self, input):
        first, second = self.first(input).reshape(*input.shape[:2], 4, -1).chunk(2, -1)
        return self.last(torch.cat([-second, first.sin()], -1).flatten(2))


class Heads(nn.Module):
    """Adds a buffer that is not saved, of which narrow widths keep the first units of each of four heads."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 3)
        self.register_buffer("shift", torch.linspace(-1, 1, 32), persistent=False)

    def forward(self, input):
        heads = (self.first(input) + self.shift).unflatten(1, (4, -1))
        return self.last((heads / (1 + heads.square().mean(-1, keepdim=True))).flatten(1))


def mlp():
    net = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    return net, torch.rand(4, 6)


def pair():
    return Pair(), slimmable.Inputs(torch.randint(0, 9, (3, 5)), torch.rand(3, 4), scale=torch.rand(1))


def keywords():
    return Pair(), {"features": torch.rand(2, 4), "tokens": torch.randint(0, 9, (2, 5))}


def rotated():
    return Rotated(), torch.rand(4, 7, 6)


def placed():
    return Placed(), torch.rand(4, 40, 40)


class Policy(nn.Module):
    """Of an actor: a distribution made in the forward."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 64), nn.Tanh()), nn.Linear(64, 3)

    def forward(self, input):
        chosen = torch.distributions.Categorical(logits=self.head(self.body(input)))
        return chosen.probs, chosen.entropy()


def policy():
    return Policy(), torch.rand(5, 4)


def heads():
    return Heads(), torch.rand(4, 8)


def resnet():
    return timm.create_model("test_resnet", num_classes=10), torch.rand(2, 3, 64, 64)


def features():
    return timm.create_model("test_resnet", num_classes=0), torch.rand(2, 3, 64, 64)


def convnext():
    return timm.create_model("test_convnext", num_classes=10, depths=(1, 1, 1, 2)), torch.rand(2, 3, 64, 64)


def vit():
    return timm.create_model("test_vit", num_classes=10, img_size=64, depth=2), torch.rand(2, 3, 64, 64)


def torchvision_net():
    return pytest.importorskip("torchvision").models.squeezenet1_1(num_classes=5), torch.rand(2, 3, 64, 64)


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    net = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))
    tokens = torch.randint(0, 50, (2, 7))
    return net, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


KINDS = {
    **{make.__name__: make for make in (mlp, pair, keywords, policy, rotated, placed, heads, resnet, features)},
    **{make.__name__: make for make in (convnext, vit, torchvision_net, bert)},
}
NAMES = {
    "pair": ["tokens", "features", "scale"],
    "bert": ["input_ids", "attention_mask"],
    "mlp": ["input"],
    "policy": ["input"],
    "rotated": ["input"],
    "heads": ["input"],
}


@pytest.fixture(params=KINDS, scope="module")
def made(request, tmp_path_factory):
    """A converted model of a kind, an example of its inputs, and its file for onnxruntime."""
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    plain, example = KINDS[request.param]()
    slim = slimmable.slimify(oracles.randomise(plain.eval()), WIDTHS, example_inputs=example)
    slim = oracles.randomise(slim, seed=1)
    path = tmp_path_factory.mktemp(request.param) / "net.onnx"
    before = {name: tensor.clone() for name, tensor in slim.state_dict().items()}
    slimmable.export(slim, path, example_inputs=example)
    assert slimmable.width_of(slim) == 1.0
    assert all(torch.equal(before[name], tensor) for name, tensor in slim.state_dict().items())
    return request.param, slim, example, path


def given(example, batch, length):
    """Return another example of this kind, of a batch of this size."""

    def other(tensor):
        if not tensor.ndim or len(tensor) != length:
            return tensor
        rows = tensor[torch.arange(batch) % length]
        return torch.rand_like(rows) if rows.is_floating_point() else rows

    return torch.utils._pytree.tree_map_only(torch.Tensor, other, example)


def arguments(example, batch):
    example = example if isinstance(example, slimmable.Inputs) else (
        slimmable.Inputs(**example) if isinstance(example, dict) else slimmable.Inputs(example)
    )  # fmt: skip
    length = len((*example.args, *example.kwargs.values())[0])
    return given(example.args, batch, length), given(example.kwargs, batch, length)


def narrow_outputs(slim, width, args, kwargs):
    found = slimmable.extract(slim, width)
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(dict(out) if hasattr(out := found(*args, **kwargs), "keys") else out)


def test_each_width_gives_what_its_extracted_network_does(made):
    runtime = pytest.importorskip("onnxruntime")
    kind, slim, example, path = made
    session = runtime.InferenceSession(path)
    assert json.loads(session.get_modelmeta().custom_metadata_map["slimmable.widths"]) == list(WIDTHS)
    *inputs, chosen = [each.name for each in session.get_inputs()]
    assert chosen == "width"
    assert sorted(inputs) == sorted(NAMES.get(kind, ["tokens", "features"] if kind == "keywords" else ["images"]))
    for batch in (1, 5):
        args, kwargs = arguments(example, batch)
        tensors = dict(zip(inputs, args, strict=False)) | kwargs
        feed = {name: tensor.numpy() for name, tensor in tensors.items()}
        for at, width in enumerate(WIDTHS):
            outputs = session.run(None, feed | {"width": np.array(at)})
            expected = narrow_outputs(slim, width, args, kwargs)
            assert len(outputs) == len(expected)
            for output, right in zip(outputs, expected, strict=True):
                assert output.shape == tuple(right.shape)
                assert oracles.difference(torch.from_numpy(output), right) <= 1e-5


def test_openvino_runs_it(made):
    openvino = pytest.importorskip("openvino")
    _, slim, example, path = made
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    args, kwargs = arguments(example, 2)
    names = [name for each in compiled.inputs for name in each.get_names()]
    feed = dict(zip(names, args, strict=False)) | kwargs
    for at, width in enumerate(WIDTHS):
        outputs = compiled({**{name: tensor.numpy() for name, tensor in feed.items()}, "width": np.array(at)})
        for output, right in zip(outputs.values(), narrow_outputs(slim, width, args, kwargs), strict=True):
            assert oracles.difference(torch.from_numpy(output), right) <= 1e-4


class Cached(nn.Module):
    """A layer whose scale is computed once and kept, as the attention biases of LeViT are."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.logits, self.cache = (
            nn.Linear(4, 8),
            nn.Linear(8, 2),
            nn.Parameter(torch.rand(8)),
            {},
        )

    def forward(self, x):
        if x.device not in self.cache:
            self.cache[x.device] = self.logits.sigmoid()
        return self.last(self.first(x) * self.cache[x.device])


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_what_a_forward_keeps_is_kept_as_numbers(suffix, tmp_path):
    pytest.importorskip("onnxruntime")
    x = torch.rand(3, 4)
    slim = slimmable.slimify(Cached().eval(), (1.0, 0.5), example_inputs=x)
    slimmable.export(slim, tmp_path / f"net.{suffix}", example_inputs=x)
    for width in (1.0, 0.5):
        with slimmable.at_width(slim, width):
            assert torch.equal(slim(x), slimmable.extract(slim, width)(x))


def test_a_position_that_is_none_is_refused(made):
    runtime = pytest.importorskip("onnxruntime")
    _, _, example, path = made
    args, kwargs = arguments(example, 1)
    session = runtime.InferenceSession(path)
    feed = dict(zip([each.name for each in session.get_inputs()], args, strict=False)) | kwargs
    with pytest.raises(Exception, match="out of data bounds"):
        session.run(None, {**{name: each.numpy() for name, each in feed.items()}, "width": np.array(3)})


def test_the_file_holds_the_weights_once(made):
    _, slim, _, path = made
    full = sum(tensor.nbytes for tensor in slimmable.extract(slim, 1.0).state_dict().values())
    norms = sum(tensor.nbytes for name, tensor in slim.state_dict().items() if ".narrow." in name)
    tensors = __import__("onnx").load(path).graph.initializer
    assert sum(len(tensor.raw_data) for tensor in tensors) < full + norms + 10_000  # of indices and shapes
    assert path.stat().st_size < 1.05 * full + norms + 40_000 * len(WIDTHS)  # of the graphs
    values = [tensor.raw_data for tensor in tensors if len(tensor.raw_data) > 64]
    assert len(values) == len(set(values))


def operations(path):
    """Return the operations, in all branches, of the graph that onnxruntime makes of a file."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(".opt")), 3
    runtime.InferenceSession(path, options)

    def inside(graph):
        for node in graph.node:
            branches = [each.g for each in node.attribute if each.HasField("g")]
            yield from (inner for branch in branches for inner in inside(branch)) if branches else [node.op_type]

    return list(inside(onnx.load(path.with_suffix(".opt")).graph))


def test_onnxruntime_folds_norms_and_slices_of_each_branch_as_in_a_file_of_its_own(tmp_path):
    torch.manual_seed(0)
    convolutions = nn.Conv2d(3, 32, 3, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4))
    example = torch.rand(2, 3, 16, 16)
    slim = slimmable.slimify(oracles.randomise(net.eval()), WIDTHS, example_inputs=example)
    slimmable.export(slim, tmp_path / "all.onnx", example_inputs=example)
    joined, single = operations(tmp_path / "all.onnx"), list[str]()
    for width in WIDTHS:
        slimmable.export(slim, tmp_path / f"{width}.onnx", width=width, example_inputs=example)
        single += operations(tmp_path / f"{width}.onnx")
    assert not {"BatchNormalization", "Slice"} & {*joined, *single}
    kernels = [name for name in {*single} if name.startswith(("Conv", "Reorder", "Gemm"))]
    assert {name: joined.count(name) for name in kernels} == {name: single.count(name) for name in kernels}


@pytest.mark.parametrize("kind", ["mlp", "pair", "keywords", "resnet", "vit"])
def test_programs_of_all_widths_share_their_weights(kind, tmp_path):
    torch.manual_seed(0)
    plain, example = KINDS[kind]()
    slim = oracles.randomise(slimmable.slimify(plain.eval(), WIDTHS, example_inputs=example), seed=1)
    path = tmp_path / "net.pt2"
    slimmable.export(slim, path, example_inputs=example)
    programs = slimmable.deploy.Programs(path)
    assert programs.widths == WIDTHS
    for batch in (1, 3):
        args, kwargs = arguments(example, batch)
        for width in WIDTHS:
            outputs = torch.utils._pytree.tree_leaves(programs(*args, width=width, **kwargs))
            for output, right in zip(outputs, narrow_outputs(slim, width, args, kwargs), strict=True):
                assert oracles.difference(output, right) <= 1e-5
    held = {tensor.data_ptr(): tensor for each in programs._modules for tensor in each.state_dict().values()}
    own = sum(tensor.nbytes for tensor in slim.state_dict().values())
    assert sum(tensor.nbytes for tensor in held.values() if tensor.nbytes > 8) <= own
    with zipfile.ZipFile(path) as file:
        assert file.getinfo("weights.pt").file_size < own + 1000 * len(slim.state_dict())
    with pytest.raises(WidthError, match=r"Nearest is 0\.25"):
        programs(*args, width=0.3, **kwargs)


@pytest.mark.parametrize("suffix", ["pt2", "onnx", "safetensors"])
def test_a_single_width_is_the_extracted_network(suffix, tmp_path):
    net, example = mlp()
    slim = slimmable.slimify(net.eval(), WIDTHS, example_inputs=example)
    small, path = slimmable.extract(slim, 0.5), tmp_path / f"net.{suffix}"
    slimmable.export(slim, path, width=0.5, example_inputs=example)
    if suffix == "safetensors":
        found = slimmable.load(path, model=net)(example)
    elif suffix == "pt2":
        found = torch.export.load(path).module()(example)
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        found = torch.from_numpy(session.run(None, {"input": example.numpy()})[0])
    assert oracles.difference(found, small(example)) <= 1e-5
    weights = sum(tensor.nbytes for tensor in small.state_dict().values())
    assert path.stat().st_size < weights + 60_000


class Clamped(nn.Module):
    """Clamps a tensor twice, in two steps each, of which torch's optimizer for ONNX stores only one pair of limits."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 4)

    def forward(self, input):
        x = self.first(input)
        return self.last(x.clamp(min=-0.2).clamp(max=0.1) + x.clamp(min=-0.1).clamp(max=0.3))


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_single_width_has_all_its_constants(calibrated, tmp_path):
    runtime, example = pytest.importorskip("onnxruntime"), torch.randn(16, 6)
    slim, path = slimmable.slimify(Clamped().eval(), WIDTHS, example_inputs=example), tmp_path / "net.onnx"
    slimmable.export(slim, path, width=0.5, example_inputs=example, calibration=[example] if calibrated else None)
    found = torch.from_numpy(runtime.InferenceSession(path).run(None, {"input": example.numpy()})[0])
    expected = slimmable.extract(slim, 0.5)(example)
    assert (found - expected).abs().max() <= (0.1 if calibrated else 1e-5) * expected.abs().max()


class Autoencoder(nn.Module):
    """Returns its input beside what it makes of it, for a loss, and one tensor under two names."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 32), nn.Linear(32, 6)

    def forward(self, x):
        made = self.decoder(self.encoder(x).relu())
        return {"made": made, "x": x, "again": made}


def test_outputs_may_be_inputs_or_the_same(tmp_path):
    runtime, example = pytest.importorskip("onnxruntime"), torch.randn(2, 6)
    slim, path = slimmable.slimify(Autoencoder().eval(), WIDTHS, example_inputs=example), tmp_path / "net.onnx"
    slimmable.export(slim, path, example_inputs=example)
    session = runtime.InferenceSession(path)
    assert [each.name for each in session.get_inputs()] == ["x", "width"]
    assert [each.name for each in session.get_outputs()] == ["made", "output.x", "again"]
    for at, width in enumerate(WIDTHS):
        found = session.run(None, {"x": example.numpy(), "width": np.array(at)})
        with slimmable.at_width(slim, width):
            for got, right in zip(map(torch.from_numpy, found), slim(example).values(), strict=True):
                assert oracles.difference(got, right) <= 1e-5


def test_all_widths_as_safetensors(tmp_path):
    net, example = resnet()
    slim = oracles.randomise(slimmable.slimify(net.eval(), WIDTHS, example_inputs=example), seed=1)
    slimmable.export(slim, tmp_path / "net.safetensors")
    again = slimmable.load(tmp_path / "net.safetensors")
    for model in (slim, again):
        slimmable.set_width(model, 0.25)
    assert torch.equal(again(example), slim(example))


def test_some_of_the_widths_and_training_mode(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    net, example = mlp()
    slim = oracles.randomise(slimmable.slimify(net, WIDTHS, example_inputs=example), seed=1).train()
    slimmable.set_width(slim, 0.5)
    slimmable.export(slim, tmp_path / "net.onnx", widths=(0.25, 1.0), example_inputs=example)
    assert slim.training
    assert slimmable.width_of(slim) == 0.5
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["slimmable.widths"]) == [1.0, 0.25]
    (found,) = session.run(None, {"input": example.numpy(), "width": np.array(1)})
    assert oracles.difference(torch.from_numpy(found), slimmable.extract(slim.eval(), 0.25)(example)) <= 1e-5


class Width(nn.Linear):
    def forward(self, x, width):
        return super().forward(x) * width


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.rand(1)


@pytest.mark.parametrize(
    ("model", "path", "options", "error", "message"),
    [
        ("mlp", "net.tflite", {}, UsageError, "must end in .pt2, .onnx, .safetensors"),
        ("mlp", "net.onnx", {"width": 0.5, "widths": (1.0, 0.5)}, UsageError, "give one of both"),
        ("mlp", "net.onnx", {"width": 0.3}, WidthError, "Nearest is 0.25"),
        ("mlp", "net.onnx", {"widths": (0.5,)}, WidthError, "full width 1.0 is missing"),
        ("mlp", "net.pt2", {"widths": (1.0, 0.3)}, WidthError, "Nearest is 0.25"),
        ("mlp", "net.safetensors", {"widths": (1.0, 0.5)}, UsageError, "holds all widths"),
        ("mlp", "none/net.pt2", {}, CheckpointError, "cannot write"),
        ("plain", "net.onnx", {}, ConversionError, "call slimmable.slimify first"),
        ("width", "net.onnx", {}, UsageError, "has an input named 'width'"),
        ("noisy", "net.onnx", {}, SlimmableError, "differs from the model"),
        ("noisy", "net.pt2", {}, SlimmableError, "differs from the model"),
    ],
)
def test_what_is_refused_leaves_nothing(tmp_path, model, path, options, error, message):
    if path.endswith("onnx"):
        pytest.importorskip("onnxruntime")
    example = torch.rand(4, 6)
    if model == "mlp":
        net = mlp()[0]
    elif model == "plain":
        net = nn.Linear(6, 8)
    else:
        net = nn.Sequential(nn.Linear(6, 8), Noisy(8, 2)) if model == "noisy" else Width(6, 8)
        example = (example, torch.rand(4, 8)) if model == "width" else example
    if model != "plain":
        net = slimmable.slimify(
            net.eval(), WIDTHS, example_inputs=example, outputs="slim" if model == "width" else "auto"
        )
    with pytest.raises(error, match=message):
        slimmable.export(net, tmp_path / path, example_inputs=example, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06" + bytes(18), b"no archive"])
def test_files_that_hold_no_programs(tmp_path, content):
    Path(tmp_path, "net.pt2").write_bytes(content)
    for path in (tmp_path / "net.pt2", tmp_path / "none.pt2", tmp_path):
        with pytest.raises(CheckpointError, match=r"which slimmable\.export writes"):
            slimmable.deploy.Programs(path)
