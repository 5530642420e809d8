"""Numbers that are at hand, units' numbers, experts, positions along channels, sequences of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import slimmable
from slimmable import Inputs
from slimmable.analysis.plan import Plan
from tests.convert import oracles

WIDTHS = (1.0, 0.5, 0.25)


def checked(
    model: nn.Module, *inputs: Any, widths: tuple[float, ...] = WIDTHS, limit: float = 1e-10, **named: Any
) -> Plan:
    """Every oracle on a model; returns its plan."""
    run = oracles.run_on(*inputs, **named)
    slim = slimmable.slimify(model, widths, example_inputs=Inputs(*inputs, **named))
    expected, outputs = run(model), oracles.outputs_of(slim, run)
    assert oracles.largest_difference(outputs[1.0], expected) == 0
    assert oracles.extracted_difference(slim, run, outputs) <= limit
    plan = slimmable.plan(slim, widths)
    assert oracles.permuted_difference(model, plan, run, expected) <= limit
    return plan


def half(plan: Plan) -> float:
    return plan.columns[1].macs / plan.columns[0].macs


def made(model: nn.Module) -> nn.Module:
    return oracles.randomise(model.double().eval())


# -- numbers that are at hand
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
MASKS: dict[str, Callable[[], Tensor | None]] = {
    "causal": lambda: CAUSAL,
    "boolean": lambda: CAUSAL < 0,
    "some other": lambda: CAUSAL.roll(1, 0),
    "none": lambda: None,
}


class Language(nn.Module):
    def __init__(self, where: str):
        super().__init__()
        self.where = where
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.body = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2)
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(16))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        steps = len(ids)
        if self.where == "buffer":
            mask = self.causal[:steps, :steps]
        elif self.where == "made":
            mask = torch.triu(torch.full((steps, steps), float("-inf"), dtype=torch.float64), 1)
        return self.head(self.body(self.embed(ids), mask))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("where", ["buffer", "made"])
def test_torchs_transformer_compares_the_mask_that_it_holds_or_makes(where):
    assert half(checked(made(Language(where)), torch.randint(0, 50, (6, 2)))) < 0.29


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_torchs_transformer_compares_the_mask_that_it_is_given(mask):
    assert half(checked(made(Language("input")), torch.randint(0, 50, (6, 2)), mask())) < 0.29


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_encoder_and_decoder_take_masks_after_their_sequences(mask):
    model = made(nn.Transformer(16, 4, 1, 1, 32))
    model.generator = nn.Linear(16, 16)
    source, target = (torch.randn(6, 2, 16, dtype=torch.float64) for _ in range(2))
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    checked(model, source, target, tgt_mask=mask(), src_key_padding_mask=padding)


class Branches(nn.Module):
    """A branch on the numbers of what `pick` makes of a buffer, a constant, a second input or features."""

    def __init__(self, pick: Callable[[nn.Module, Tensor, Tensor], Tensor]):
        super().__init__()
        self.pick = pick
        self.first, self.second, self.head = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("gain", torch.linspace(0.5, 1, 16))
        self.register_buffer("window", torch.hann_window(8))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.pick(self, x, scale) > 0:
            x = self.second(x * self.gain).relu()
        return self.head(x * scale)


def written(model: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    found = torch.zeros(3)
    found[:1].fill_(1)
    return found.sum()


def written_by_mask(model: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    found = scale.repeat(3)
    found[torch.arange(3) == 2] = 9
    return found.max() - 8


def overwritten(model: nn.Module, x: Tensor, scale: Tensor) -> Tensor:
    found = torch.zeros(3, dtype=x.dtype)
    found[:1].copy_(x[0, 0, None])  # a view of it: its numbers are no longer known
    return found.sum()


KNOWN = {
    "buffer": lambda model, x, scale: model.window.sum(),
    "constant": lambda model, x, scale: torch.tensor([1.0, 2.0]).max(),
    "second input": lambda model, x, scale: scale.mean(),
    "written in place": written,
    "written by a mask": written_by_mask,
    "put into a new tensor": lambda model, x, scale: torch.tensor([scale.mean(), 0]).max(),
    "read by a mask": lambda model, x, scale: model.window[model.window > 0.5].sum(),
}


@pytest.mark.parametrize("pick", KNOWN.values(), ids=KNOWN)
def test_code_may_branch_on_numbers_at_hand(pick):
    plan = checked(made(Branches(pick)), torch.randn(2, 4).double(), torch.ones(1).double())
    assert plan.tensors["second", "weight"][1] == [8, 8]


def test_what_a_branch_depends_on_stays_full():
    plan = checked(made(Branches(lambda model, x, scale: model.gain.sum())), torch.randn(2, 4).double(), torch.ones(1))
    assert plan.tensors["first", "weight"][1][0] is None
    assert plan.tensors["second", "weight"][1] == [8, None]
    assert {pin.reason for pin in plan.pins if pin.axis[0] == "first"} == {
        "branch in the model itself: code depends on its numbers"
    }


UNKNOWN = {
    "features": lambda model, x, scale: x.sum(),
    "weights": lambda model, x, scale: model.second.weight.sum(),
    "written in place": overwritten,
    "random": lambda model, x, scale: torch.rand(1),
}


@pytest.mark.parametrize("pick", UNKNOWN.values(), ids=UNKNOWN)
def test_code_may_not_branch_on_other_numbers(pick):
    with pytest.raises(slimmable.errors.TraceError, match="asks for numbers") as caught:
        slimmable.slimify(Branches(pick), WIDTHS, example_inputs=(torch.randn(2, 4), torch.ones(1)))
    assert "if self.pick(self, x, scale) > 0:" in str(caught.value)


def test_buffers_that_a_trace_writes_into_stay():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
            self.register_buffer("seen", torch.zeros(1, dtype=torch.long))

        def forward(self, x):
            self.seen += 1
            return self.head(self.first(x) * (2 if self.seen > 0 else 1))

    model = Counts()
    slimmable.plan(model, WIDTHS, example_inputs=torch.randn(2, 4))
    assert model.seen == 0


def test_the_advice_of_an_error_is_tried():
    class Whole(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    middle = nn.Sequential(nn.Linear(8, 8), Whole())
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), middle, nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(slimmable.errors.TraceError, match=r"with skip='2\.1'"):
        slimmable.slimify(model, WIDTHS, example_inputs=torch.randn(2, 4))
    assert slimmable.plan(model, WIDTHS, example_inputs=torch.randn(2, 4), skip="2.1").groups
    with pytest.raises(slimmable.errors.TraceError, match="To skip '1' would leave nothing that gets narrower"):
        slimmable.slimify(nn.Sequential(nn.Linear(4, 8), Whole()), WIDTHS, example_inputs=torch.randn(2, 4))


# -- units' numbers
class Cbam(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        self.pool = pool
        self.first, self.spatial = nn.Conv2d(3, 32, 3, 1, 1), nn.Conv2d(2, 1, 7, padding=3)
        self.second, self.head = nn.Conv2d(32, 32, 3, 1, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        seen = self.spatial(torch.cat([self.pool(x), x.mean(1, keepdim=True)], 1)).sigmoid()
        return self.head(self.second(x * seen).relu().mean((2, 3)))


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x.amax(1, keepdim=True),
    "max": lambda x: torch.max(x, dim=1, keepdim=True)[0],
    "max, squeezed": lambda x: x.max(1).values[:, None],
    "min": lambda x: torch.min(x, 1, keepdim=True).values,
    "topk": lambda x: x.topk(3, dim=1)[0].mean(1, keepdim=True),
    "median": lambda x: x.median(1, keepdim=True).values,
    "mode": lambda x: x.mode(1, keepdim=True).values,
    "kthvalue": lambda x: x.kthvalue(2, 1, keepdim=True).values,
    "aminmax": lambda x: torch.aminmax(x, dim=1, keepdim=True).max,
    "a shape": lambda x: x.mean(1, keepdim=True) / x[:, 0].numel(),
}
NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: x.max(1, keepdim=True)[1].to(x.dtype),
    "argmax compared": lambda x: (x.argmax(1, keepdim=True) > 3).to(x.dtype),
    "argmax of all": lambda x: x[:, :1] * 0 + (x.argmax() > 3),
    "one-hot": lambda x: (F.one_hot(x.argmax(1), 32).permute(0, 3, 1, 2) * x).sum(1, keepdim=True),
    "gathered": lambda x: x.gather(1, x.topk(3, 1)[1]).mean(1, keepdim=True),
    "sorted": lambda x: x.sort(1)[0][:, :1],
    "picked": lambda x: x[:, 3, None],
    "unbound": lambda x: x.unbind(1)[3][:, None],
    "a share": lambda x: x.topk(x.shape[1] // 2, dim=1)[0].mean(1, keepdim=True),
}


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_indices_and_units_that_nobody_uses_pin_nothing(pool):
    assert half(checked(made(Cbam(pool)), torch.randn(2, 3, 8, 8).double())) == pytest.approx(0.278, abs=0.001)


@pytest.mark.parametrize("pool", NUMBERS.values(), ids=NUMBERS)
def test_units_whose_numbers_or_shares_are_used_stay(pool):
    plan = checked(made(Cbam(pool)), torch.randn(2, 3, 8, 8).double())
    assert plan.tensors["first", "weight"][1][0] is None


def test_numbers_that_a_model_returns_keep_their_units():
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x).relu()
            values, numbers = x.max(1)
            return self.second(x) * values[:, None], numbers

    model = Picks()
    plan = slimmable.plan(model, WIDTHS, example_inputs=torch.randn(2, 4))
    assert [pin.reason for pin in plan.pins if pin.axis[0] == "first"] == [
        "output in the model itself: a unit's number is used"
    ] * 2


# -- experts
class Experts(nn.Module):
    def __init__(self, route: Callable[..., Tensor], experts: int = 4):
        super().__init__()
        self.route = route
        self.embed, self.router = nn.Linear(6, 16), nn.Linear(16, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(experts)
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2, dim=-1)
        return self.head((x + self.route(self, tokens, weights, chosen).view(x.shape)).mean(1))


def by_where(model: Experts, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    found = torch.zeros_like(tokens)
    for number, expert in enumerate(model.experts):
        row, place = torch.where(chosen == number)
        found.index_add_(0, row, expert(tokens[row]) * weights[row, place, None])
    return found


def by_mask(model: Experts, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    found = torch.zeros_like(tokens)
    for number, expert in enumerate(model.experts):
        hit = (chosen == number).any(-1)
        if hit.any():
            own = (weights * (chosen == number)).sum(-1)
            found[hit] += expert(tokens[hit]) * own[hit][:, None]
    return found


def by_one_hot(model: Experts, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    found = torch.zeros_like(tokens)
    mask = F.one_hot(chosen, len(model.experts)).permute(2, 1, 0)
    for number in mask.sum((-1, -2)).nonzero().flatten():
        place, row = torch.where(mask[number])
        found.index_add_(0, row, model.experts[number](tokens[row]) * weights[row, place, None])
    return found


def by_order(model: Experts, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    flat = chosen.flatten()
    order, counts = flat.argsort(), torch.bincount(flat, minlength=len(model.experts)).tolist()
    parts = tokens[order // 2].split(counts)
    joined = torch.cat([expert(part) for expert, part in zip(model.experts, parts, strict=True)])
    found = torch.zeros_like(joined)
    found[order] = joined
    return (found.view(*chosen.shape, -1) * weights[..., None]).sum(1)


def each_by_one(model: Experts, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    return torch.stack([model.experts[int(number)](token) for number, token in zip(chosen[:, 0], tokens, strict=True)])


@pytest.mark.parametrize("route", [by_where, by_mask, by_one_hot, by_order, each_by_one])
def test_experts_written_by_hand(route):
    plan = checked(made(Experts(route)), torch.randn(2, 5, 6).double())
    assert half(plan) < 0.29
    assert all(plan.tensors[f"experts.{i}.0", "weight"][1] == [16, 8] for i in range(4))
    assert plan.tensors["router", "weight"][1] == [None, 8]


def test_an_example_of_fewer_rows_than_experts_is_refused_with_a_reason():
    with pytest.raises(slimmable.errors.TraceError, match="is assumed if the example has a row per unit"):
        slimmable.slimify(Experts(by_order, 8), WIDTHS, example_inputs=torch.randn(1, 2, 6))


def test_experts_whose_rows_are_looked_up_need_no_row_each():
    assert half(checked(made(Experts(by_where, 8)), torch.randn(1, 2, 6).double())) < 0.29


COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "use_cache": False, "attn_implementation": "eager",
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Mixtral, one by one": {"num_local_experts": 4, "experts_implementation": "eager"},
    "Mixtral, batched": {"num_local_experts": 4, "experts_implementation": "batched_mm"},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
}


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, **named: Any) -> Tensor:
        return self.model(input_ids=ids, **named).logits


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_experts(name):
    transformers = pytest.importorskip("transformers", minversion="5")
    family = name.partition(",")[0]
    config = getattr(transformers, f"{family}Config")(**COMMON, **MIXTURES[name])
    model = Logits(getattr(transformers, f"{family}ForCausalLM")(config)).eval()
    assert half(checked(model, torch.randint(0, 60, (2, 8)), widths=(1.0, 0.5), limit=1e-5)) < 0.3


def test_switch_transformers():
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_experts": 4, "vocab_size": 60}
    layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = transformers.SwitchTransformersConfig(**sizes, **layers, use_cache=False)
    model = Logits(transformers.SwitchTransformersForConditionalGeneration(config)).eval()
    ids = torch.randint(0, 60, (2, 8))
    assert half(checked(model, ids, decoder_input_ids=ids, widths=(1.0, 0.5), limit=1e-5)) < 0.3


# -- positions along channels
class Positions(nn.Module):
    def __init__(self, place: Callable[[Tensor], Tensor]):
        super().__init__()
        self.place = place
        self.first, self.other, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.place(torch.cat([self.first(x), self.other(x)], -1).relu()))


def sinusoid_halves(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * torch.exp(-torch.arange(half, dtype=x.dtype) / half)
    return x + torch.cat([angles.sin(), angles.cos()], -1)


def sinusoid_slices(x: Tensor) -> Tensor:
    steps, units = x.shape[1:]
    table = torch.zeros(steps, units, dtype=x.dtype)
    angles = torch.arange(steps)[:, None] * torch.exp(torch.arange(0, units, 2, dtype=x.dtype) / -units)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    return x + table


def sinusoid_stack(x: Tensor) -> Tensor:
    steps, units = x.shape[1:]
    angles = torch.arange(steps)[:, None] * torch.exp(torch.arange(0, units, 2, dtype=x.dtype) / -units)
    return x + torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


FOLLOW: dict[str, Callable[[Tensor], Tensor]] = {
    "arange": lambda x: x * torch.arange(x.shape[-1]),
    "arange, by name": lambda x: x * torch.arange(end=x.shape[-1], start=0),
    "arange from one": lambda x: x * torch.arange(1, x.shape[-1] + 1),
    "arange back": lambda x: x * torch.arange(x.shape[-1], 0, -1),
    "linspace": lambda x: x * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype),
    "eye": lambda x: x @ torch.eye(x.shape[-1], dtype=x.dtype),
    "mask": lambda x: x * (torch.arange(x.shape[-1]) % 3 != 0),
    "sinusoid, halves": sinusoid_halves,
    "sinusoid, slices": sinusoid_slices,
    "sinusoid, stacked": sinusoid_stack,
}
STAY: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda x: x[..., torch.arange(x.shape[-1])],
    "reversed": lambda x: x[..., torch.arange(x.shape[-1] - 1, -1, -1)],
    "selected": lambda x: x.index_select(-1, torch.arange(x.shape[-1])),
    "gathered": lambda x: x.gather(-1, torch.arange(x.shape[-1]).expand_as(x)),
    "branch": lambda x: x * 2 if torch.arange(x.shape[-1]).sum() > 50 else x,
    "where they are": lambda x: F.pad(x[..., torch.arange(x.shape[-1]) % 2 == 0], (0, 8)),
    "permuted": lambda x: x[..., torch.randperm(x.shape[-1]).sort()[0]],
}


@pytest.mark.parametrize("place", FOLLOW.values(), ids=FOLLOW)
def test_numbers_by_position_follow_in_order(place):
    plan = checked(made(Positions(place)), torch.randn(2, 7, 6).double())
    assert plan.tensors["first", "weight"][1][0] == plan.tensors["other", "weight"][1][0] == 4
    assert any(group.ordered for group in plan.groups)


@pytest.mark.parametrize("place", STAY.values(), ids=STAY)
def test_units_that_are_picked_by_position_stay(place):
    plan = checked(made(Positions(place)), torch.randn(2, 7, 6).double())
    assert plan.tensors["first", "weight"][1][0] is None


# -- sequences of different lengths
class Packed(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], how: str, **options: Any):
        super().__init__()
        self.how, self.batch_first = how, options.get("batch_first", False)
        self.embed, self.body = nn.Embedding(20, 12), kind(12, 16, **options)
        self.head = nn.Linear(32 if options.get("bidirectional") else 16, 4)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(ids if self.batch_first else ids.T)
        given = lengths.tolist() if self.how == "list" else lengths
        ordered = self.how == "sorted"
        packed, state = self.body(pack_padded_sequence(x, given, self.batch_first, enforce_sorted=ordered))
        if self.how == "state":
            state = state[0] if isinstance(state, tuple) else state
            return self.head(torch.cat(list(state[-2:]), -1) if self.body.bidirectional else state[-1])
        total = 7 if self.how == "total" else None
        padded, found = pad_packed_sequence(packed, self.batch_first, 0.5, total)
        return self.head(padded).sum(1 if self.batch_first else 0) / found[:, None]


@pytest.mark.parametrize(
    ("kind", "how", "options"),
    [
        (nn.LSTM, "unsorted", {"batch_first": True}),
        (nn.LSTM, "list", {}),
        (nn.GRU, "total", {"batch_first": True, "bidirectional": True}),
        (nn.GRU, "state", {"bidirectional": True, "num_layers": 2}),
        (nn.RNN, "sorted", {"batch_first": True}),
    ],
)
def test_packed_sequences(kind, how, options):
    lengths = torch.tensor([6, 3, 2] if how == "sorted" else [3, 6, 2])
    plan = checked(made(Packed(kind, how, **options)), torch.randint(0, 20, (3, 6)), lengths)
    assert half(plan) < 0.3
    assert plan.tensors["body", "weight_hh_l0"][1][1] == 8
