"""What single operations do to a plan: which axes get thinner with the units, and which stay, and why."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimmable
from slimmable.analysis.plan import Plan


class Fn(nn.Module):
    """A function of layers, parameters and an input of shape (2, 5, 4)."""

    def __init__(self, run, **parts: "nn.Module | Tensor"):
        super().__init__()
        self.run, self.head = run, nn.Linear(16, 3)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 16)
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.second(self.first(x).relu()).relu())


def plan_of(run, **parts: "nn.Module | Tensor") -> Plan:
    return slimmable.plan(Fn(run, **parts), (1.0, 0.5), example_inputs=torch.zeros(2, 5, 4))


def kept(plan: Plan, path: str, name: str) -> list:
    return plan.columns[-1].tensors[path, name]


def reasons(plan: Plan) -> dict[str, str]:
    return {".".join(filter(None, pin.axis[:2])): pin.reason for pin in plan.pins}


@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_units_pins_them_only_if_it_looks_at_their_order(causal):
    def over_units(net: Fn, h: Tensor) -> Tensor:
        units = h.transpose(1, 2)
        return net.head(F.scaled_dot_product_attention(units, units, units, is_causal=causal).transpose(1, 2))

    plan = plan_of(over_units)
    why = "scaled_dot_product_attention in the model itself: the order of the units matters"
    assert reasons(plan).get("second.weight") == (why if causal else None)
    assert kept(plan, "second", "weight") == ([None, 4] if causal else [8, 4])


@pytest.mark.parametrize(("beta", "read"), [(1, True), (0.5, True), (0, False)])
def test_an_addend_of_a_product_gets_thinner_if_it_is_read(beta, read):
    def run(net: Fn, h: Tensor) -> Tensor:
        made = torch.addmm(net.bias, h.flatten(0, 1), net.weight.T, beta=beta)
        return net.last(made.relu())

    plan = plan_of(run, weight=torch.randn(12, 16), bias=torch.randn(12), last=nn.Linear(12, 3))
    assert kept(plan, "", "weight") == [6, 8]
    assert kept(plan, "", "bias") == [6 if read else None]


def test_a_product_with_a_vector_reads_units():
    plan = plan_of(lambda net, h: h.flatten(0, 1) @ net.vector, vector=torch.randn(16))
    assert kept(plan, "", "vector") == [8]
    assert not any("rule fails" in reason for reason in reasons(plan).values())


REDUCTIONS = {
    "max": lambda h: h.max(1).values,
    "min": lambda h: h.min(dim=1)[0],
    "larger": lambda h: torch.max(h, 2 * h).mean(1),
    "sum": lambda h: h.mean(1) / h.sum(),
    "mean of all": lambda h: h.mean(1) / h.mean(),
    "mean of the last": lambda h: h.mean(1) / h.mean(-1).mean(1)[:, None],
    "amax": lambda h: h.amax((1,)),
    "norm": lambda h: torch.linalg.vector_norm(h, dim=1),
    "std": lambda h: h.std(1),
    "logsumexp": lambda h: h.logsumexp(1),
    "median": lambda h: h.median(1).values,
    "topk": lambda h: h.topk(2, 1).values.mean(1),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_keeps_the_units_of_other_axes(name):
    plan = plan_of(lambda net, h: net.head(REDUCTIONS[name](h)))
    assert kept(plan, "second", "weight") == [8, 4]
    assert kept(plan, "head", "weight") == [None, 8]
    assert set(reasons(plan)) == {"head.weight", "head.bias"}


def test_a_table_of_vectors_makes_units():
    def run(net: Fn, h: Tensor) -> Tensor:
        return net.head(h) * net.last(net.table(torch.arange(5)).relu())

    plan = plan_of(run, table=nn.Embedding(5, 6), last=nn.Linear(6, 3))
    assert kept(plan, "table", "weight") == [None, 3]
    assert kept(plan, "last", "weight") == [None, 3]


PADS = {  # before and after the units -> which inputs of the last layer stay at half width
    (1, 1): (0, 1, 2, 3, 4, 5, 6, 7, 8, 17),
    (0, 2): (0, 1, 2, 3, 4, 5, 6, 7, 16, 17),
    (2, 0): 10,
    (0, 0): 8,
    (-1, 0): None,
    (0, -2): None,
    (3, -1): None,
}


@pytest.mark.parametrize("pad", PADS)
def test_padding_is_kept_and_what_is_cropped_stays(pad):
    plan = plan_of(lambda net, h: net.last(F.pad(h, pad)), last=nn.Linear(16 + sum(pad), 3))
    assert kept(plan, "last", "weight") == [None, PADS[pad]]
    assert kept(plan, "second", "weight") == [None if PADS[pad] is None else 8, 4]
    assert (reasons(plan).get("second.weight") is None) == (PADS[pad] is not None)


COUNTED = {
    "end": lambda n: torch.arange(n),
    "named end": lambda n: torch.arange(end=n),
    "start and end": lambda n: torch.arange(0, n),
    "from 1": lambda n: torch.arange(1, n + 1),
    "by 2": lambda n: torch.arange(0, 2 * n, 2),
    "named step": lambda n: torch.arange(3, 3 + 2 * n, step=2),
}


@pytest.mark.parametrize("name", COUNTED)
def test_numbers_by_position_follow_and_keep_the_order(name):
    plan = plan_of(lambda net, h: net.head(h * COUNTED[name](h.shape[-1])))
    assert kept(plan, "head", "weight") == [None, 8]
    [group] = [group for group, makers in enumerate(plan.channels.makers) if "second" in makers]
    assert plan.channels.ordered[group]


RECTIFIERS = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "mish": F.mish, "hardswish": F.hardswish, "elu": F.elu,
    "celu": F.celu, "selu": F.selu, "leaky_relu": F.leaky_relu, "relu6": F.relu6,
    "prelu": lambda y: F.prelu(y, torch.ones(1)), "rrelu": lambda y: F.rrelu(y, training=True),
    "threshold": lambda y: F.threshold(y, 0.1, 0.0), "clamp": lambda y: y.clamp(min=0),
    "clamp_min": lambda y: torch.clamp_min(y, 0), "hardtanh": lambda y: F.hardtanh(y, 0.0, 2.0),
    "gated": lambda y: y * y.sigmoid(),
}  # fmt: skip
BOUNDS = {
    "clamp": lambda y: y.clamp(0, 1), "from 1": lambda y: y.clamp(1, 2), "hardtanh": F.hardtanh, "tanh": torch.tanh,
    "gated": lambda y: y * 0.5, "from below": lambda y: y.clamp(min=-1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "made"), [*((f, 6) for f in RECTIFIERS.values()), *((f, 12) for f in BOUNDS.values())]
)
def test_rectified_units_are_features_and_bounded_ones_are_not(function, made):
    plan = plan_of(lambda net, h: function(net.last(h)), last=nn.Linear(16, 12))
    assert plan.columns[-1].output_shapes == [(2, 5, made)]


@pytest.mark.parametrize("function", [lambda h: h.unsqueeze_(1).squeeze_(1), lambda h: h.unsqueeze_(0).squeeze_()])
def test_axes_of_size_one_come_and_go_in_place(function):
    plan = plan_of(lambda net, h: net.head(function(h)))
    assert kept(plan, "second", "weight")[0] == 8


def test_a_layer_without_bias_takes_a_single_vector():  # torch lets one axis come and go in place
    net = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2, bias=False))
    assert slimmable.plan(net, (1.0, 0.5), example_inputs=torch.zeros(4)).columns[-1].counts == (4,)


SIZED = {  # how code uses an integer of the module -> its value, that at half width, and the inputs of the last layer
    "expand": (lambda net, h: h * net.gain.expand(2, 5, net.size), 16, 8, 16),
    "expand by position": (lambda net, h: h * net.gain.expand(-1, 5, net.size), 16, 8, 16),
    "broadcast_to": (lambda net, h: h * net.gain.broadcast_to((2, 5, net.size)), 16, 8, 16),
    "repeat": (lambda net, h: h * net.gain.repeat(2, 5, net.size), 16, 8, 16),
    "reshape": (lambda net, h: h.reshape(2, 5, net.size, 4).flatten(2), 4, 2, 16),
    "view by name": (lambda net, h: h.view(size=(2, 5, net.size, 4)).flatten(2), 4, 2, 16),
    "unflatten": (lambda net, h: h.unflatten(-1, (net.size, 4)).flatten(2), 4, 2, 16),
    "named unflatten": (lambda net, h: h.unflatten(dim=2, sizes=(net.size, 4)).flatten(2), 4, 2, 16),
    "split": (lambda net, h: h.split(net.size, -1)[0], 8, 4, 8),
    "named split": (lambda net, h: h.split(split_size=net.size, dim=-1)[1], 8, 4, 8),
    "unsafe_split": (lambda net, h: torch.unsafe_split(h, net.size, -1)[1], 8, 4, 8),
    "split in two": (lambda net, h: h.split([net.size, net.other], -1)[0], 6, 3, 6),
    "from the front": (lambda net, h: h[..., : net.size], 6, 3, 6),
    "from the back": (lambda net, h: h[..., -net.size :], 6, 3, 6),
    "up to the back": (lambda net, h: h[..., : -net.size], 6, 3, 10),
    "narrow": (lambda net, h: h.narrow(-1, 0, net.size), 6, 3, 6),
    "narrow later": (lambda net, h: h.narrow(-1, net.other, net.size), 6, 3, 6),
}


@pytest.mark.parametrize("way", SIZED)
def test_an_integer_of_the_module_follows_what_it_sizes(way):
    run, size, half, inputs = SIZED[way]
    model = Fn(lambda net, h: net.last(run(net, h)), last=nn.Linear(inputs, 3), gain=torch.randn(1, 1, 1))
    model.size, model.other = size, 10
    plan = slimmable.plan(model, (1.0, 0.5), example_inputs=torch.zeros(2, 5, 4))
    made, _ = kept(plan, "second", "weight")
    assert (len(made) if isinstance(made, tuple) else made) == 8
    assert plan.columns[-1].values[""]["size"] == half
    assert plan.columns[-1].values[""].get("other", 5) == 5
    assert kept(plan, "last", "weight") == [None, inputs // 2]


def test_a_forward_may_move_its_layers():
    plan = plan_of(lambda net, h: net.head.float()(net.last.to(h.dtype)(h)), last=nn.Linear(16, 16))
    assert kept(plan, "head", "weight") == [None, 8]


def test_several_outputs_are_told_apart():
    plan = plan_of(lambda net, h: (net.head(h), {"other": net.last(h)}), last=nn.Linear(16, 3))
    ends = ": class scores, an image or an embedding"
    assert reasons(plan)["head.weight"] == f"output 0 in the model itself{ends}"
    assert reasons(plan)["last.weight"] == f"output 1.other in the model itself{ends}"


@pytest.mark.parametrize("outputs", [{"1.other": "slim"}, ("full", "slim"), {1: "slim", 0: "full"}])
def test_outputs_are_asked_for_by_name_and_position(outputs):
    model = Fn(lambda net, h: (net.head(h), {"other": net.last(h)}), last=nn.Linear(16, 12))
    plan = slimmable.plan(model, (1.0, 0.5), example_inputs=torch.zeros(2, 5, 4), outputs=outputs)
    assert plan.columns[-1].output_shapes == [(2, 5, 3), (2, 5, 6)]


def test_what_a_trace_switches_off_is_on_again():
    flags = torch.backends.mkldnn.set_flags(_enabled=True)
    try:
        plan_of(lambda net, h: net.head(h))
        assert torch.backends.mkldnn.set_flags(_enabled=True)[0]
    finally:
        torch.backends.mkldnn.set_flags(*flags)
