"""What a model gives out: class scores, images and embeddings keep their size, features get thinner."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import slimmable
from slimmable._inputs import named_tensors
from slimmable.errors import ConversionError
from tests.convert import oracles
from tests.convert.test_zoo import SAMPLE, SMALLEST

WIDTHS = (1.0, 0.5)
SCORES = "class scores, an image or an embedding"


class Fn(nn.Module):
    """Layers and a function of them."""

    def __init__(self, run, **layers: nn.Module):
        super().__init__()
        self.layers, self.run = nn.ModuleDict(layers), run

    def forward(self, *inputs: Tensor):
        return self.run(*self.layers.values(), *inputs)


def shapes_at_half(model: nn.Module, *inputs: Tensor, **options) -> list[tuple[int, ...]]:
    """The shapes of the outputs at half width, which must be those of the plan and of the extracted network."""
    slim = slimmable.slimify(model.eval(), WIDTHS, example_inputs=inputs, **options).eval()
    run = oracles.run_on(*inputs)
    outputs = oracles.outputs_of(slim, run)
    assert [tuple(t.shape) for t in outputs[0.5]] == slimmable.plan(slim, WIDTHS).columns[-1].output_shapes
    assert oracles.extracted_difference(slim, run, outputs) < 1e-5
    assert slimmable.plan(slim, WIDTHS).groups, "nothing got thinner"
    return [tuple(t.shape) for t in outputs[0.5]]


def shapes(model: nn.Module, *inputs: Tensor) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in oracles.run_on(*inputs)(model.eval())]


# -- scores and images behind anything that keeps their units
IMAGES = torch.randn(2, 3, 16, 16)


def body(made: int, channels: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, made, 1),
    )


TAILS = {
    "softmax": lambda y: y.softmax(1),
    "log_softmax": lambda y: F.log_softmax(y, 1),
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "tanh": torch.tanh,
    "clamp": lambda y: y.clamp(0, 1),
    "hardtanh": F.hardtanh,
    "softplus": F.softplus,
    "exp": torch.exp,
    "scaled and shifted": lambda y: (y * 2 + 1) / 3,
    "temperature": lambda y: y / 0.07,
    "normalize": lambda y: F.normalize(y, dim=1),
    "standardized by hand": lambda y: (y - y.mean(0)) * (y.var(0) + 1e-5).rsqrt(),
    "batch_norm": lambda y: F.batch_norm(y, torch.zeros(12), torch.ones(12)),
    "instance_norm": F.instance_norm,
    "bilinear": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
    "nearest": lambda y: F.interpolate(y, size=(24, 24)),
    "padded": lambda y: F.pad(y, (1, 1, 1, 1)),
    "reflected": lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"),
    "max_pool": lambda y: F.max_pool2d(y, 2),
    "avg_pool": lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1),
    "mean": lambda y: y.mean((2, 3)),
    "pixel_shuffle": lambda y: F.pixel_shuffle(y, 2),
    "flattened": lambda y: y.flatten(1),
    "permuted": lambda y: y.permute(0, 2, 3, 1).reshape(2, -1, 12),
    "anchors": lambda y: y.view(2, 3, 4, 16, 16).permute(0, 1, 3, 4, 2).sigmoid(),
    "concatenated": lambda y: torch.cat([y, y * 2], 1),
    "stacked": lambda y: torch.stack([y, -y]),
    "chunked": lambda y: y.chunk(2, 1)[1],
    "indexed": lambda y: y[torch.tensor([1, 0])],
    "sliced": lambda y: y[:, :, 2:],
    "cast": lambda y: y.to(torch.bfloat16).float(),
    "dropout": lambda y: F.dropout(y, 0.5, training=False),
    "masked": lambda y: y.masked_fill(torch.zeros(16, 16, dtype=torch.bool), 0.0),
    "where": lambda y: torch.where(torch.ones(16, 16, dtype=torch.bool), y, torch.zeros_like(y)),
    "detached": lambda y: y.detach().clone(),
    "grid_sample": lambda y: F.grid_sample(y, torch.zeros(2, 4, 4, 2), align_corners=False),
}


@pytest.mark.parametrize("tail", TAILS)
def test_scores_stay_full_behind_whatever_keeps_their_units(tail):
    model = Fn(lambda net, x: TAILS[tail](net(x)), net=body(12))
    assert shapes_at_half(model, IMAGES) == shapes(model, IMAGES)


def test_scores_beside_the_input_stay_full():
    model = Fn(lambda net, x: torch.cat([net(x), x], 1), net=body(12))
    assert shapes_at_half(model, IMAGES) == shapes(model, IMAGES)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from(["tanh", "sigmoid", "normalize", "scaled and shifted", "padded", "cast", "nearest"])))
def test_scores_stay_full_behind_any_number_of_such_steps(steps):
    def run(net: nn.Module, x: Tensor) -> Tensor:
        y = net(x)
        for step in steps:
            y = TAILS[step](y)
        return y

    model = Fn(run, net=body(12))
    assert shapes_at_half(model, IMAGES) == shapes(model, IMAGES)


def test_images_and_classes_of_whole_networks_stay_full():
    decoder = nn.Sequential(*body(3), nn.BatchNorm2d(3))
    assert shapes_at_half(decoder, IMAGES) == [(2, 3, 16, 16)]
    super_resolution = nn.Sequential(*body(12), nn.PixelShuffle(2))
    assert shapes_at_half(super_resolution, IMAGES) == [(2, 3, 32, 32)]
    summed = Fn(
        lambda a, b, c, x: c(y := a(x).relu()) + b(y), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 5, 1), c=nn.Conv2d(8, 5, 1)
    )
    assert shapes_at_half(summed, IMAGES) == [(2, 5, 16, 16)]  # two heads, as in FCN; no layer reads the sum


@pytest.mark.parametrize("end", [lambda y: y, lambda y: y.softmax(1), torch.sigmoid])
def test_what_is_refined_stays_full(end):
    """A layer reads the first guess, as in the spectrograms of Tacotron 2, but none the sum."""
    model = Fn(lambda guess, more, x: (y := guess(x), end(y + more(y))), guess=body(5), more=body(5, channels=5))
    assert shapes_at_half(model, IMAGES) == [(2, 5, 16, 16)] * 2


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"])
def test_segmentation_of_torchvision_keeps_its_classes(name):
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    model = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=21, aux_loss=None).eval()
    found = slimmable.plan(model, WIDTHS, example_inputs=torch.zeros(1, 3, 64, 64))
    assert [(output.name, output.shape) for output in found.channels.outputs] == [("out", (1, 21, 64, 64))]
    assert found.columns[-1].output_shapes == [(1, 21, 64, 64)]
    assert found.columns[-1].macs < 0.34 * found.columns[0].macs


# -- embeddings
class SimSiam(nn.Module):
    def __init__(self, last: nn.Module):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), last)
        self.predictor = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 32))


RETURNS = {
    "once": lambda e, p, x, _: (z := e(x), p(z)),
    "detached": lambda e, p, x, _: (p(z := e(x)), z.detach()),
    "twice": lambda e, p, x, y: (p(z := e(x)), p(w := e(y)), z, w),
    "twice, detached": lambda e, p, x, y: (p(z := e(x)), p(w := e(y)), z.detach(), w.detach()),
    "twice, embeddings first": lambda e, p, x, y: (z := e(x), w := e(y), p(z), p(w)),
    "normalized": lambda e, p, x, y: (F.normalize(z := e(x), dim=1), F.normalize(p(z), dim=1), e(y)),
    "similarities too": lambda e, p, x, y: ((z := e(x)) @ e(y).T, p(z), z),
    "in one batch": lambda e, p, x, y: (z := e(torch.cat([x, y])), *p(z).chunk(2)),
}


@pytest.mark.parametrize("returned", RETURNS)
@pytest.mark.parametrize(
    "last", [nn.Identity(), nn.BatchNorm1d(32), nn.BatchNorm1d(32, affine=False), nn.LayerNorm(32)]
)
def test_an_embedding_stays_full_however_it_is_returned(returned, last):
    class Model(SimSiam):
        def forward(self, x: Tensor, y: Tensor):
            return RETURNS[returned](self.encoder, self.predictor, x, y)

    model, inputs = Model(last), (torch.randn(4, 16), torch.randn(4, 16))
    assert shapes_at_half(model, *inputs) == shapes(model, *inputs)


# -- features
def residual(modules, y: Tensor) -> Tensor:
    return y + modules["c"](modules["b"](y).relu())


FEATURES = {
    "rectified": lambda m, x: m["a"](x).relu(),
    "relu6": lambda m, x: F.relu6(m["a"](x)),
    "clamped from zero": lambda m, x: m["a"](x).clamp(min=0),
    "gelu": lambda m, x: F.gelu(m["a"](x)),
    "swish by hand": lambda m, x: (y := m["a"](x)) * y.sigmoid(),
    "rectified, then pooled": lambda m, x: m["a"](x).relu().mean((2, 3)),
    "rectified, then normalized": lambda m, x: F.normalize(m["a"](x).relu(), dim=1),
    "a residual stream": lambda m, x: residual(m, residual(m, m["a"](x))),
    "a residual stream, normalized": lambda m, x: F.instance_norm(residual(m, residual(m, m["a"](x)))),
}


@pytest.mark.parametrize("kind", FEATURES)
def test_features_get_thinner(kind):
    def run(a: nn.Module, b: nn.Module, c: nn.Module, x: Tensor) -> Tensor:
        return FEATURES[kind]({"a": a, "b": b, "c": c}, x)

    model = Fn(run, a=nn.Conv2d(3, 16, 3), b=nn.Conv2d(16, 8, 1), c=nn.Conv2d(8, 16, 1))
    assert shapes_at_half(model, IMAGES)[0][1] == 8


ATTENTION = {
    "fused": F.scaled_dot_product_attention,
    "by hand": lambda q, k, v: (q @ k.mT / 8).softmax(-1) @ v,
    "cast": lambda q, k, v: torch.matmul((q @ k.mT / 8).softmax(-1, dtype=torch.float64).to(v.dtype), v),
    "einsum": lambda q, k, v: torch.einsum("bhts,bhsd->bhtd", torch.einsum("bhtd,bhsd->bhts", q, k).softmax(-1), v),
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_cache_of_keys_and_values_gets_thinner_and_the_output_of_attention_does_not(kind):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.qkv, self.out = 4, nn.Linear(16, 96), nn.Linear(32, 10)

        def forward(self, x: Tensor):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            y = ATTENTION[kind](q, k, v).transpose(1, 2).flatten(2)
            return {"scores": self.out(y), "cache": [(k, v)]}

    heads = (2, 2, 6, 8)
    assert shapes_at_half(Attention(), torch.randn(2, 6, 16)) == [(2, 6, 10), heads, heads]


PRODUCTS = {
    "soft clusters": lambda body, a, b, x: a(body(x)).softmax(-1).mT @ b(body(x)),  # as in NetVLAD
    "pairs": lambda body, a, b, x: (both := (a(body(x)), b(body(x))), (both[0] @ both[1].mT).softmax(-1))[0],  # CLIP
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_embeddings_beside_a_softmax_are_no_keys_and_values(kind):
    layers = {"body": nn.Sequential(nn.Linear(8, 16), nn.ReLU()), "a": nn.Linear(16, 12), "b": nn.Linear(16, 12)}
    model, x = Fn(PRODUCTS[kind], **layers), torch.randn(4, 5, 8)
    assert shapes_at_half(model, x) == shapes(model, x)


ONTO = torch.tensor([0, 2, 1, 1])  # rows
ADDED = {
    "index_add": lambda y: torch.zeros(3, 12).index_add(0, ONTO, y),
    "scatter_add": lambda y: torch.zeros(3, 12).scatter_add(0, ONTO[:, None].expand_as(y), y),
    "scatter_reduce": lambda y: torch.zeros(3, 12).scatter_reduce(0, ONTO[:, None].expand_as(y), y, "mean"),
    "index_put": lambda y: torch.zeros(3, y.shape[1]).index_put((ONTO,), y, accumulate=True),
    "sparse product": lambda y: torch.sparse.mm(torch.eye(4).to_sparse(), y),
    "dense product": lambda y: torch.ones(3, 4) @ y,
}


@pytest.mark.parametrize("how", ADDED)
def test_scores_of_nodes_stay_full_when_messages_are_added_up(how):
    model = Fn(lambda a, b, x: ADDED[how](b(a(x).relu())), a=nn.Linear(8, 16), b=nn.Linear(16, 12))
    x = torch.randn(4, 8)
    assert shapes_at_half(model, x) == shapes(model, x)


def test_the_first_state_of_a_residual_stream_is_features_too():
    def run(a: nn.Module, b: nn.Module, c: nn.Module, head: nn.Module, x: Tensor) -> dict[str, object]:
        states = [a(x)]
        states.append(states[0] + c(b(states[0]).relu()))
        return {"logits": head(states[-1].relu()), "states": states}

    layers = {"a": nn.Linear(8, 16), "b": nn.Linear(16, 32), "c": nn.Linear(32, 16), "head": nn.Linear(16, 10)}
    assert shapes_at_half(Fn(run, **layers), torch.randn(2, 8)) == [(2, 10), (2, 8), (2, 8)]


@pytest.mark.parametrize(
    "module", [pytest.param(m, marks=() if m in SAMPLE[:8] else pytest.mark.slow) for m in SMALLEST]
)
def test_timm_models_without_their_classifier_give_features(module):
    class Features(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, x: Tensor):
            return self.model.forward_features(x)

    with torch.device("meta"):
        model = timm.create_model(SMALLEST[module]).eval()
        backbones = [Features(model), timm.create_model(SMALLEST[module], num_classes=0).eval()]
        with contextlib.suppress(RuntimeError, TypeError, AttributeError):  # timm cannot do it for all
            backbones.append(timm.create_model(SMALLEST[module], features_only=True).eval())
    x = torch.zeros(1, *model.pretrained_cfg["input_size"], device="meta")
    for backbone in backbones:
        plan = slimmable.plan(backbone, WIDTHS, example_inputs=x)
        for output, narrow in zip(plan.channels.outputs, plan.columns[-1].output_shapes, strict=True):
            assert narrow != output.shape, f"{type(backbone).__name__}: {output.name}: {output.why}"


def test_a_projector_on_a_backbone_of_timm_gives_an_embedding():
    backbone = timm.create_model("test_resnet", num_classes=0)
    model = Fn(lambda b, p, x: (h := b(x), p(h)), b=backbone, p=nn.Linear(backbone.num_features, 32))
    x = torch.randn(2, 3, 32, 32)
    (features, embedding), full = shapes_at_half(model, x), shapes(model, x)
    assert features[1] == full[0][1] // 2
    assert embedding == full[1]


def test_scores_that_a_model_counts_as_its_classes_stay_full_though_rectified():
    class Squeeze(nn.Sequential):
        num_classes = 0

    model = Squeeze(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    assert shapes_at_half(model, IMAGES) == [(2, 5, 1, 1)]
    model.num_classes = 10
    assert shapes_at_half(model, IMAGES) == [(2, 10, 1, 1)]


# -- what the caller wants
@dataclasses.dataclass
class Both:
    features: Tensor
    scores: Tensor


def two_outputs(pack=lambda features, scores: {"features": features, "scores": scores}) -> nn.Module:
    return Fn(lambda a, b, x: pack(y := a(x).relu(), b(y)), a=nn.Linear(8, 16), b=nn.Linear(16, 10))


X = torch.randn(2, 8)
WANTED = [
    ("auto", (8, 10)),
    ("full", None),
    ("slim", (8, 5)),
    (["full", "slim"], (16, 5)),
    (["auto", "auto"], (8, 10)),
    (["slim"], (8, 10)),
    ({0: "full", 1: "slim"}, (16, 5)),
    ({"features": "full", "scores": "slim"}, (16, 5)),
    ({"scores": "slim"}, (8, 5)),
    ({"*": "slim", "scores": "full"}, (8, 10)),
]


@pytest.mark.parametrize("pack", [None, Both])
@pytest.mark.parametrize(("wanted", "sizes"), WANTED)
def test_the_caller_decides(wanted, sizes, pack):
    model = two_outputs() if pack is None else two_outputs(pack)
    if sizes is None:  # then nothing is left to get thinner
        plan = slimmable.plan(model, WIDTHS, example_inputs=X, outputs=wanted)
        assert plan.columns[-1].output_shapes == [(2, 16), (2, 10)]
    else:
        assert shapes_at_half(model, X, outputs=wanted) == [(2, sizes[0]), (2, sizes[1])]


def test_a_single_output_has_a_name_and_a_position():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 10))
    for wanted in ("slim", ["slim"], {0: "slim"}, {"output": "slim"}):
        assert shapes_at_half(model, X, outputs=wanted) == [(2, 5)]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("thin", r"outputs='thin': 'thin' is unknown; use 'auto', 'full' or 'slim'"),
        ({"scores": True}, r"True is unknown"),
        ({"logits": "full"}, r"has no output 'logits'; it has 'features', 'scores'"),
        ({2: "full"}, r"has no output 2"),
        (["full"] * 3, r"has no output 2"),
    ],
)
def test_an_output_that_is_not_there_is_an_error(wanted, message):
    model = two_outputs()
    with pytest.raises(ConversionError, match=message):
        slimmable.slimify(model, WIDTHS, example_inputs=X, outputs=wanted)


def test_a_converted_model_keeps_what_was_decided_until_told_otherwise():
    slim = slimmable.slimify(two_outputs(), WIDTHS, example_inputs=X, outputs={"scores": "slim"})
    assert slimmable.plan(slim, WIDTHS).columns[-1].output_shapes == [(2, 8), (2, 5)]
    again = slimmable.slimify(slim, WIDTHS, example_inputs=X, outputs="full")
    assert slimmable.plan(again, WIDTHS).columns[-1].output_shapes == [(2, 16), (2, 10)]


# -- what the plan says
def test_the_plan_lists_every_output_with_its_shapes_and_the_reason():
    plan = slimmable.plan(two_outputs(), WIDTHS, example_inputs=X)
    rectified = "features, rectified or combined after the layer that made them"
    assert str(plan).splitlines()[-3:] == [
        "outputs:",
        f"  features: (2, 16), (2, 8) at 0.5, slim: {rectified}",
        f"  scores: (2, 10), full: {SCORES}",
    ]
    assert plan.to_dict()["outputs"] == [
        {"name": "features", "shapes": [[2, 16], [2, 8]], "reason": rectified},
        {"name": "scores", "shapes": [[2, 10], [2, 10]], "reason": SCORES},
    ]
    assert "<td>features</td>" in plan._repr_html_()
    asked = slimmable.plan(two_outputs(), WIDTHS, example_inputs=X, outputs="full")
    assert str(asked).splitlines()[-2:] == [
        f"  {name}: {shape}, full: as asked" for name, shape in (("features", (2, 16)), ("scores", (2, 10)))
    ]


def test_features_that_another_operation_pins_are_listed_with_its_reason():
    def run(a: nn.Module, b: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = a(x).relu()
        return y + torch.ones(16), b(y).relu().view(2, 4, 4)

    model = Fn(run, a=nn.Linear(8, 16), b=nn.Linear(16, 16))
    shifted, folded = slimmable.plan(model, WIDTHS, example_inputs=X).channels.outputs
    assert shifted.why == "add in the model itself: meets an axis that does not shrink"
    assert folded.why == "no units that could get thinner reach it"


def test_names_of_nested_outputs():
    tensor = torch.zeros(1)
    nested = {"a": [tensor, (tensor,)], "b": Both(tensor, tensor)}
    assert [name for name, _ in named_tensors(nested)] == ["a.0", "a.1.0", "b.features", "b.scores"]
    assert [name for name, _ in named_tensors(tensor)] == [""]


# -- scores that look like features
class Residual(nn.Module):
    """A network like MONAI's U-Net, which ends with a residual block of as many channels as classes."""

    def __init__(self, classes: int, **sizes: int):
        super().__init__()
        self.body, self.last = body(classes), nn.Conv2d(classes, classes, 3, padding=1)
        vars(self).update(sizes)

    def forward(self, images):
        features = F.prelu(self.body(images), torch.tensor([0.2], dtype=images.dtype))
        return features + self.last(features)


def test_the_sum_of_a_last_residual_block_stays_full_as_no_layer_reads_it():
    for sizes in ({"out_channels": 6}, {"num_classes": 6}, {}, {"out_channels": 5}):
        assert shapes_at_half(Residual(6, **sizes), IMAGES) == [(2, 6, 16, 16)]
    inside = nn.Sequential(Residual(6, out_channels=6), nn.ReLU())  # a block says so of its features
    assert shapes_at_half(inside, IMAGES) == [(2, 3, 16, 16)]


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(1), nn.Softmax2d()])
def test_what_competes_is_a_class(last):
    rectified = nn.Sequential(body(6), nn.ReLU())
    assert shapes_at_half(nn.Sequential(rectified, last), IMAGES) == [(2, 6, 16, 16)]
    assert shapes_at_half(rectified, IMAGES) == [(2, 3, 16, 16)]
    assert shapes_at_half(nn.Sequential(rectified, nn.Softmax(2)), IMAGES) == [(2, 3, 16, 16)]
    assert shapes_at_half(nn.Sequential(rectified, last, nn.Conv2d(6, 6, 1), nn.ReLU()), IMAGES) == [(2, 3, 16, 16)]
