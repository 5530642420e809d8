"""Quantisers, counters and recorders by others: on a converted model right at each width, or refused with what works.

Each line of the table in docs/how-to/other-tools.md is a test here.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization

import slimmable
from slimmable.errors import ConversionError
from tests.convert.oracles import randomise

WIDTHS = (1.0, 0.5)
X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
INSTEAD = r"slimmable\.extract\(model, width\)"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def convolutional() -> nn.Module:
    body = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def transformer() -> nn.Module:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    return torchvision.models.VisionTransformer(16, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64)


def converted(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return slimmable.slimify(randomise(make()), WIDTHS, example_inputs=X).eval()


@pytest.fixture(params=[convolutional, transformer], ids=lambda make: make.__name__)
def slim(request) -> nn.Module:
    return converted(request.param)


def outputs(model: nn.Module) -> dict[float, Tensor]:
    with torch.no_grad():
        return slimmable.run_widths(model, X)


def close(found: Tensor, expected: Tensor, limit: float) -> bool:
    """Whether the error is below this share of the largest value, and not zero by chance of nothing having changed."""
    return 0 < (found - expected).abs().max() < limit * expected.abs().max()


# -- torch.ao.quantization
def static(model: nn.Module, mode: str) -> nn.Module:
    """The three steps of torch.ao's quantisation of weights and activations, without those that run the model."""
    model.train(mode == "qat")
    model.qconfig = getattr(quantization, f"get_default_{'qat_' if mode == 'qat' else ''}qconfig")("x86")
    return quantization.prepare_qat(model) if mode == "qat" else quantization.prepare(model)


def graph(model: nn.Module, mode: str) -> nn.Module:
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
    return quantize_fx.prepare_fx(model, quantization.get_default_qconfig_mapping(), (X,))


@pytest.mark.parametrize(
    "quantise",
    [
        partial(quantization.quantize_dynamic, qconfig_spec={nn.Linear}),
        partial(quantization.quantize_dynamic, dtype=torch.float16),
        partial(static, mode="static"),
        partial(static, mode="qat"),
        partial(graph, mode="fx"),
    ],
)
def test_torch_ao_is_refused_and_the_model_stays_as_it_was(slim, quantise):
    before = outputs(slim)
    with pytest.raises(ConversionError, match=INSTEAD):
        quantise(slim)
    for width, y in outputs(slim.eval()).items():
        assert torch.equal(y, before[width])


def test_a_network_with_settings_for_quantisation_converts_and_keeps_them():
    model = convolutional()
    model[5].qconfig = quantization.default_dynamic_qconfig
    slim = slimmable.slimify(model, WIDTHS, example_inputs=X, inplace=True)
    assert slim[5].qconfig is quantization.default_dynamic_qconfig
    assert not hasattr(slim[7], "qconfig")
    with pytest.raises(ConversionError, match=INSTEAD):
        quantization.convert(slim)
    assert isinstance(slimmable.extract(slim, 0.5)[5].qconfig, quantization.QConfig)


@pytest.mark.parametrize("width", WIDTHS)
def test_an_extracted_network_is_quantised_dynamically(width):
    small = slimmable.extract(converted(convolutional), width)
    quantised = quantization.quantize_dynamic(small, {nn.Linear})
    assert all("quantized" in type(quantised[place]).__module__ for place in (5, 7))
    assert close(quantised(X), small(X), 0.05)


@pytest.mark.parametrize("width", WIDTHS)
def test_an_extracted_network_is_quantised_in_training(width):
    small = slimmable.extract(converted(convolutional), width)
    prepared = static(small, "qat")
    assert [type(prepared[place]).__module__.startswith("torch.ao.nn.qat") for place in (0, 5, 7)] == [True] * 3
    prepared(X)
    assert close(prepared.eval()(X), small.eval()(X), 0.1)


# -- torchao
def torchao_configs() -> dict[str, Any]:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    return {"weights": Int8WeightOnlyConfig(), "dynamic": Int8DynamicActivationInt8WeightConfig()}


@pytest.mark.parametrize("kind", ["weights", "dynamic"])
def test_torchao_quantises_a_converted_model_for_every_width(kind):
    config = torchao_configs()[kind]
    from torchao.quantization import quantize_

    slim = converted(convolutional)
    before = outputs(slim)
    quantize_(slim, config)
    for width, y in outputs(slim).items():
        assert close(y, before[width], 0.05)
        small = slimmable.extract(slim, width)
        assert type(small[5].weight).__name__ == "Int8Tensor"
        assert torch.equal(small(X), y)


@pytest.mark.parametrize("kind", ["weights", "dynamic"])
def test_torchao_is_refused_at_a_narrow_width_where_it_would_lose_the_full_weights(kind):
    config = torchao_configs()[kind]
    from torchao.quantization import quantize_

    slim = converted(convolutional)
    before = outputs(slim)
    with slimmable.at_width(slim, 0.5), pytest.raises(ConversionError, match=INSTEAD):
        quantize_(slim, config)
    for width, y in outputs(slim).items():
        assert torch.equal(y, before[width])


@pytest.mark.parametrize("kind", ["weights", "dynamic"])
@pytest.mark.parametrize("width", WIDTHS)
def test_torchao_quantises_an_extracted_network(kind, width):
    config = torchao_configs()[kind]
    from torchao.quantization import quantize_

    small = slimmable.extract(converted(convolutional), width)
    quantised = copy.deepcopy(small)
    quantize_(quantised, config)
    assert close(quantised(X), small(X), 0.05)


def test_a_parameter_of_the_full_shape_may_be_set_at_a_narrow_width():
    slim = converted(convolutional)
    with slimmable.at_width(slim, 0.5):
        slim[5].weight = nn.Parameter(torch.ones(64, 32))
        assert torch.equal(slim[5].weight, torch.ones(32, 16))
        with pytest.raises(ConversionError, match=r"has shape \(64, 32\), and cannot become \(32, 16\)"):
            slim[5].weight = nn.Parameter(torch.zeros(32, 16))
    assert torch.equal(slim[5].weight, torch.ones(64, 32))


@pytest.mark.parametrize("width", WIDTHS)
def test_pt2e_quantises_an_extracted_network(width):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    small = slimmable.extract(converted(convolutional), width)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(small, (X,)).module(), quantizer)
    prepared(X)
    quantised = convert_pt2e(prepared)
    assert sum("dequantize" in str(node.target) for node in quantised.graph.nodes) >= 3
    assert close(quantised(X), small(X), 0.1)


# -- counters
def by_thop(model: nn.Module) -> tuple[float, float]:
    return pytest.importorskip("thop", reason="thop is not installed").profile(model, (X,), verbose=False)


def by_ptflops(model: nn.Module, backend: str = "pytorch") -> tuple[float, float]:
    ptflops = pytest.importorskip("ptflops", reason="ptflops is not installed")
    options = {"print_per_layer_stat": False, "as_strings": False, "backend": backend}
    return ptflops.get_model_complexity_info(model, tuple(X.shape[1:]), **options)


def by_torchinfo(model: nn.Module) -> tuple[float, float]:
    torchinfo = pytest.importorskip("torchinfo", reason="torchinfo is not installed")
    found = torchinfo.summary(model, input_data=X, verbose=0)
    return found.total_mult_adds, found.total_params


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [by_thop, by_ptflops])
def test_counters_that_know_layers_by_their_class_are_refused(slim, width, count):
    before = outputs(slim)
    slimmable.set_width(slim, width)
    with pytest.raises(ConversionError, match=INSTEAD):
        count(slim)
    for width, y in outputs(slim.eval()).items():
        assert torch.equal(y, before[width])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [by_torchinfo, partial(by_ptflops, backend="aten")])
def test_counters_of_what_a_model_holds_come_with_a_warning(slim, width, count):
    slimmable.set_width(slim, width)
    with pytest.warns(UserWarning, match=INSTEAD):
        macs, parameters = count(slim)
    assert parameters == sum(p.numel() for p in slim.parameters())
    small = slimmable.extract(slim, width)
    if isinstance(count, partial):  # counts operations as they run
        assert macs == count(small)[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [by_thop, by_ptflops, by_torchinfo, partial(by_ptflops, backend="aten")])
def test_counters_count_an_extracted_network_as_a_plain_one(count):
    plain = convolutional()
    slim = slimmable.slimify(plain, WIDTHS, example_inputs=X)
    assert count(slimmable.extract(slim, 1.0)) == count(plain)
    narrow = nn.Sequential(*(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), *convolutional()[2:5]))
    narrow.extend([nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 10)])
    assert count(slimmable.extract(slim, 0.5)) == count(narrow)


@pytest.mark.parametrize("width", WIDTHS)
def test_torchs_counter_counts_the_active_width(slim, width):
    from torch.utils.flop_counter import FlopCounterMode

    slimmable.set_width(slim, width)
    found = []
    for model in (slim, slimmable.extract(slim, width)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(X)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


@pytest.mark.filterwarnings("error")
def test_other_hooks_and_functions_are_let_through_in_silence(slim):
    seen: list[nn.Module] = []
    slim.apply(seen.append)
    handle = next(slim.children()).register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    slim(X)
    handle.remove()
    assert len(seen) == len({id(module) for module in seen})


# -- torch.fx
@pytest.mark.parametrize("width", WIDTHS)
def test_torch_fx_records_the_active_width(slim, width):
    slimmable.set_width(slim, width)
    recorded = torch.fx.symbolic_trace(slim)
    assert torch.equal(recorded(X), slim(X))
    targets = {str(node.target) for node in recorded.graph.nodes if node.op == "get_attr"}
    assert targets <= {name for name, _ in slim.named_parameters()}  # no constants


@pytest.mark.parametrize("width", WIDTHS)
def test_a_feature_extractor_gives_the_features_of_its_width_and_trains_the_model(width):
    slim = converted(transformer)
    from torchvision.models.feature_extraction import create_feature_extractor

    nodes = ["encoder.layers.encoder_layer_0", "heads"]
    slimmable.set_width(slim, width)
    found = create_feature_extractor(slim, nodes)(X)
    expected = create_feature_extractor(slimmable.extract(slim, width), nodes)(X)
    assert found["encoder.layers.encoder_layer_0"].shape[-1] == int(32 * width)
    for name, features in expected.items():
        assert torch.equal(found[name], features)
    found["heads"].sum().backward()
    recorded = slim._parameters["class_token"].grad
    slim.zero_grad()
    slim(X).sum().backward()
    torch.testing.assert_close(recorded, slim._parameters["class_token"].grad)
    assert recorded.any()


# -- TorchScript and what is built on it
@pytest.mark.parametrize("width", WIDTHS)
def test_scripting_is_refused_and_works_on_an_extracted_network(width):
    slim = converted(convolutional)
    with pytest.raises(ConversionError, match=INSTEAD):
        torch.jit.script(slim)
    small = slimmable.extract(slim, width)
    assert torch.equal(torch.jit.script(small)(X), small(X))


@pytest.mark.parametrize("width", WIDTHS)
def test_tracing_records_the_active_width(slim, width):
    slimmable.set_width(slim, width)
    with torch.no_grad():
        traced, expected = torch.jit.trace(slim, X), slim(X)
        slimmable.set_width(slim, 1.0)
        assert torch.equal(traced(X), expected)
        assert "as_strided" not in str(traced.inlined_graph)


@pytest.mark.parametrize("width", WIDTHS)
def test_openvino_takes_the_active_width(width):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    slim = converted(convolutional)
    slimmable.set_width(slim, width)
    single = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    with torch.no_grad():
        compiled = openvino.compile_model(openvino.convert_model(slim, example_input=X), "CPU", single)
        torch.testing.assert_close(torch.from_numpy(compiled(X.numpy())[0]), slim(X), rtol=1e-4, atol=1e-5)
        with pytest.raises(Exception, match=INSTEAD):
            openvino.convert_model(slim)


@pytest.mark.parametrize("width", WIDTHS)
def test_onnx_is_written_of_the_active_width(slim, width, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    slimmable.set_width(slim, width)
    file = str(tmp_path / "model.onnx")
    with torch.no_grad():
        torch.onnx.export(slim, (X,), file, dynamo=True, input_names=["x"])
        found = onnxruntime.InferenceSession(file).run(None, {"x": X.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), slim(X), rtol=1e-4, atol=1e-5)


# -- features against those of a momentum encoder
class Dense(nn.Module):
    """DenseCL: a loss on the backbone's features, and one on an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(x).flatten(2).transpose(1, 2)
        return features, self.head(features)


def test_dense_features_that_stay_full_fit_those_of_a_momentum_encoder():
    slim = slimmable.slimify(Dense(), WIDTHS, example_inputs=X, outputs="full")
    momentum = copy.deepcopy(slim).requires_grad_(False)
    recipe = slimmable.SlimRecipe(slim)
    for width in recipe.widths(1.0):
        queries, embeddings = slim(X)
        if recipe.first:
            keys, _ = momentum(X)
        similarities = queries @ keys.transpose(1, 2)
        recipe.loss(similarities.mean() + embeddings.square().mean()).backward()
        assert slim.backbone[0].weight.shape[0] == int(32 * width)
    assert all(p.grad is not None for p in slim.parameters())


def test_dense_features_may_be_compared_at_equal_widths():
    slim = slimmable.slimify(Dense(), WIDTHS, example_inputs=X)
    momentum = copy.deepcopy(slim)
    for width in WIDTHS:
        with slimmable.at_width(slim, width), slimmable.at_width(momentum, width):
            assert (slim(X)[0] @ momentum(X)[0].transpose(1, 2)).shape == (2, 144, 144)


def test_a_loss_of_thin_and_full_features_says_what_to_do():
    slim = slimmable.slimify(Dense(), WIDTHS, example_inputs=X)
    queries, keys = ({w: y[0].flatten(0, 1) for w, y in slimmable.run_widths(slim, X).items()}[w] for w in (0.5, 1.0))
    with pytest.raises(slimmable.errors.DataError, match='outputs="full"'):
        slimmable.losses.moco_logits(queries, keys, torch.zeros(32, 4))
