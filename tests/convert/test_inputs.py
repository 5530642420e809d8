"""What goes into and comes out of a forward: any nesting of tensors, keyword arguments, what timm's models take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import timm
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

import slimmable
from slimmable import Inputs
from slimmable._inputs import output_tensors
from tests.convert import oracles

WIDTHS = (1.0, 0.5, 0.25)


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclass
class Record:
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class FrozenRecord:
    a: Any
    b: Any


class Plain:
    def __init__(self, a: Any, b: Any):
        self.a, self.b = a, b


KINDS = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"a": a, "b": b},
    "named tuple": Pair,
    "dataclass": Record,
    "frozen dataclass": FrozenRecord,
    "object": Plain,
}
kinds = st.sampled_from(list(KINDS))


def parts_of(value: Any) -> tuple[Any, Any]:
    if isinstance(value, dict):
        return value["a"], value["b"]
    return tuple(value) if isinstance(value, (tuple, list)) else (value.a, value.b)


class Network(nn.Module):
    """Two inputs in one object and a scale by keyword; features and scores out in another."""

    def __init__(self, units: int, blocks: int, outer: str, inner: str):
        super().__init__()
        self.first, self.second = nn.Linear(4, units), nn.Linear(6, units)
        self.blocks = nn.ModuleList(nn.Linear(units, units) for _ in range(blocks))
        self.head = nn.Linear(units, 3)
        self.outer, self.inner = outer, inner

    def forward(self, both: Any, *, scale: Tensor) -> Any:
        left, right = parts_of(both)
        x = self.first(left) + self.second(right) * scale
        for block in self.blocks:
            x = x + block(x).relu()
        return KINDS[self.outer](self.head(x), KINDS[self.inner](x.relu(), {"deep": [x * scale]}))


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 24), st.integers(0, 3), kinds, kinds, kinds)
def test_any_nesting_of_inputs_and_outputs(units, blocks, taken, outer, inner):
    torch.manual_seed(0)
    model = Network(units, blocks, outer, inner).double().eval()
    left, right = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    example = Inputs(KINDS[taken](left, right), scale=torch.tensor(0.7, dtype=torch.float64))
    slim = slimmable.slimify(model, WIDTHS, example_inputs=example)
    plan = slimmable.plan(model, WIDTHS, example_inputs=example)
    run = oracles.run_on(*example.args, **example.kwargs)
    expected, outputs = run(model), oracles.outputs_of(slim, run)
    assert len(expected) == 3
    assert oracles.largest_difference(outputs[1.0], expected) == 0
    assert oracles.extracted_difference(slim, run, outputs) <= 1e-12
    assert oracles.permuted_difference(model, plan, run, expected) <= 1e-10
    narrow = max(1, round(0.25 * units))
    shapes = sorted(tuple(tensor.shape) for tensor in outputs[0.25])
    assert shapes == sorted([(2, 3), (2, narrow), (2, narrow)])


def test_tensors_in_attributes_are_found_once_also_where_objects_refer_to_each_other():
    first, second = Plain(torch.zeros(1), None), Plain(torch.zeros(2), None)
    first.b, second.b = second, [first, nn.Linear(1, 1)]
    assert [tensor.shape for tensor in output_tensors({"x": first})] == [(1,), (2,)]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_vit", {"img_size": 64}),
        ("test_resnet", {"in_chans": 1}),
        ("cs3darknet_focus_s", {}),
        ("test_vit", {"img_size": (64, 96), "in_chans": 4}),
        ("test_resnet", {"features_only": True}),
        ("test_efficientnet", {"num_classes": 0, "global_pool": ""}),
    ],
)
def test_timm_models_need_no_example_however_they_were_made(name, arguments):
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    assert slimmable.widths_of(slimmable.slimify(model, WIDTHS)) == WIDTHS


def test_an_input_object_is_printed_as_its_call():
    assert repr(Inputs(1, b="x")) == "Inputs(1, b='x')"


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_a_forward_whose_only_argument_is_a_dict_or_a_tuple_takes_inputs(kind):
    model = Network(8, 1, "tuple", "tuple")
    both = KINDS[kind](torch.zeros(2, 4), torch.zeros(2, 6))
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=Inputs(both, scale=torch.ones(1)))
    with slimmable.at_width(slim, 0.5):
        assert slim(both, scale=torch.ones(1))[1][0].shape == (2, 4)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"a": torch.zeros(2, 4), "b": torch.zeros(2, 6)}, r"Network.forward\(.*\).* does not take .*'both'.*Inputs\("),
        (torch.zeros(2, 4), r"does not take example_inputs: missing a required argument: 'scale'"),
    ],
)
def test_an_example_that_the_forward_does_not_take_is_refused_with_its_signature(example, message):
    with pytest.raises(slimmable.errors.ConversionError, match=message):
        slimmable.plan(Network(8, 1, "tuple", "dict"), WIDTHS, example_inputs=example)


def test_a_size_where_a_tensor_was_expected_is_refused_with_what_to_write():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    for example in ((3, 32, 32), [3, 32, 32], torch.Size([3, 32, 32])):
        with pytest.raises(slimmable.errors.ConversionError, match=r"an input size.* torch\.zeros\(2, 3, 32, 32\)"):
            slimmable.slimify(model, (1.0, 0.5), example_inputs=example)


def test_a_tensor_where_a_size_was_expected_is_refused_with_what_to_write():
    with pytest.raises(
        slimmable.errors.UsageError, match=r"tensor of shape \(1, 4\), .*; a batch goes into example_inputs="
    ):
        slimmable.profile(nn.Linear(4, 2), torch.zeros(1, 4))


def test_a_forward_that_takes_integers_gets_them_in_inputs():
    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, rows, times):
            return self.second(self.first(torch.ones(rows, 4)) * times)

    with pytest.raises(slimmable.errors.ConversionError, match=r"slimmable\.Inputs\(2, 3\)"):
        slimmable.plan(Made(), (1.0, 0.5), example_inputs=(2, 3))
    assert slimmable.plan(Made(), (1.0, 0.5), example_inputs=Inputs(2, 3)).columns[1].counts == (4,)


class PaddedText(nn.Module):
    """As people write it: torch's own encoder, which in evaluation mode drops the padding by nested tensors."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        kept = ids != 0
        x = self.encoder(self.embed(ids), src_key_padding_mask=~kept) * kept[..., None]
        return self.head(x.sum(1) / kept.sum(1, keepdim=True))


def test_torchs_transformer_encoder_converts_with_a_padding_mask():
    torch.manual_seed(0)
    model = PaddedText().double().eval()
    ids = torch.tensor([[3, 7, 1, 9, 4], [5, 2, 8, 0, 0]])
    slim = slimmable.slimify(model, WIDTHS, example_inputs=ids)
    assert torch.backends.mha.get_fastpath_enabled()
    assert slimmable.extract(slim, 0.5).encoder.layers[0].self_attn.num_heads == 2
    assert slimmable.extract(slim, 0.25).encoder.layers[0].self_attn.num_heads == 1  # odd: torch has no fused form
    run = oracles.run_on(ids)
    with torch.no_grad():  # takes the fused path
        fused = oracles.outputs_of(slim, run)
    assert oracles.extracted_difference(slim, run, fused) <= 1e-12
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        plain = oracles.outputs_of(slim, run)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert max(oracles.largest_difference(fused[width], plain[width]) for width in WIDTHS) <= 1e-12
    oracles.permuting_units_changes_nothing(model, slimmable.plan(slim, WIDTHS), ids, limit=1e-12)


def naflex_batch(dtype: torch.dtype) -> dict[str, Tensor]:
    """Two images of different shape as patches, the second one padded."""
    torch.manual_seed(0)
    grids = [(3, 4), (2, 3)]
    coordinates = torch.zeros(2, 12, 2, dtype=torch.long)
    valid = torch.zeros(2, 12, dtype=torch.bool)
    for image, (high, wide) in enumerate(grids):
        places = torch.stack(torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij"), -1)
        coordinates[image, : high * wide], valid[image, : high * wide] = places.reshape(-1, 2), True
    return {
        "patches": torch.randn(2, 12, 8 * 8 * 3, dtype=dtype),
        "patch_coord": coordinates,
        "patch_valid": valid,
    }


@pytest.mark.parametrize("kind", ["learned", "factorized", "rope"])
def test_naflex_models_take_patches_in_a_dict(kind):
    torch.manual_seed(0)
    arguments = {"rope_type": "axial"} if kind == "rope" else {"pos_embed": kind}
    sizes = {"patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 4, "num_classes": 5}
    model = timm.create_model("naflexvit_base_patch16_gap", **sizes, **arguments)
    model = oracles.randomise(model.double().eval())
    batch = naflex_batch(torch.float64)
    slim = slimmable.slimify(model, WIDTHS, example_inputs=Inputs(batch))
    run = oracles.run_on(batch)
    outputs = oracles.outputs_of(slim, run)
    assert oracles.largest_difference(outputs[1.0], run(model)) == 0
    assert oracles.extracted_difference(slim, run, outputs) <= 1e-12
    plan = slimmable.plan(slim, WIDTHS)
    assert oracles.permuted_difference(model, plan, run, run(model)) <= 1e-10
    assert all(group.kept[1] < group.units for group in plan.groups)


class ByLength(nn.Module):
    """Code that branches on a mask, and sizes a tensor by lengths."""

    def __init__(self):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(10, 16), nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        tokens = tokens[:, : int(lengths.max())]
        mask = torch.arange(tokens.shape[1], device=tokens.device)[None] < lengths[:, None]
        x = self.mix(self.table(tokens)).relu()
        if not bool(mask.all()):
            x = x * mask[..., None]
        flat = x[mask]
        return self.head(flat).mean(0)


def test_code_may_branch_on_numbers_that_follow_from_integer_inputs():
    torch.manual_seed(0)
    model = ByLength().double().eval()
    example = (torch.arange(12).reshape(2, 6) % 10, torch.tensor([3, 5]))
    slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=example)
    run = oracles.run_on(*example)
    outputs = oracles.outputs_of(slim, run)
    assert oracles.largest_difference(outputs[1.0], run(model)) == 0
    assert oracles.extracted_difference(slim, run, outputs) <= 1e-12
    assert slimmable.plan(slim, (1.0, 0.5)).tensors["table", "weight"][1] == [None, 8]


def test_an_example_that_the_forward_writes_into_stays():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 2)

        def forward(self, ids):
            ids += 1
            return self.head(self.table(ids[:, : int(ids[0, 0])]).mean(1))

    ids = torch.zeros(2, 3, dtype=torch.long)
    slim = slimmable.slimify(Shifted(), (1.0, 0.5, 0.25), example_inputs=ids)
    assert slimmable.plan(slim, (1.0, 0.5, 0.25)).columns[2].counts == (2,)
    assert ids.tolist() == [[0] * 3] * 2
