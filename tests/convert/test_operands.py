"""Every operation with a rule, with units of a layer on every axis of every operand.

A tiny network makes one operand's axis, or two axes of the same or of different operands, by linear layers, runs the
operation, and reads each axis of its outputs by a linear layer. Where a rule overlooks an operand, units that belong
together are in different groups, so permuting each group changes what the full network computes.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slimmable
import slimmable.rules
from slimmable.analysis import trace
from tests.convert import oracles

aten = torch.ops.aten
DRAWN = 12  # of the pairs of axes of an operation with many
Operand = tuple[Any, ...]  # a shape, or a kind of numbers and a shape
CASES: dict[str, tuple[Callable[..., Any], tuple[Operand, ...]]] = {}

UNREACHED = {
    "it returns random numbers, or runs in training only": "rand_like randn_like bernoulli bernoulli_p uniform normal "
    "exponential native_dropout rand randn randint randperm rrelu_with_noise fractional_max_pool2d "
    "fractional_max_pool3d _batch_norm_with_update",
    "it returns memory as it is": "empty_like empty new_empty new_empty_strided empty_strided empty_permuted "
    "resize set",
    "it has no tensor operand, or none whose numbers it reads": "zeros ones full scalar_tensor linspace logspace eye "
    "arange lift_fresh zero new_zeros new_ones new_full",
    "torch runs it as other operations": "narrow avg_pool1d _reshape_alias reshape chunk unsafe_chunk "
    "t max_pool1d max_pool1d_with_indices max_pool2d max_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d batch_norm layer_norm rms_norm "
    "_weight_norm _convolution native_channel_shuffle _unsafe_view view_copy _reshape_copy split_copy "
    "native_batch_norm_legit adaptive_max_pool1d",
    "it needs other hardware, or a switch that the trace turns off": "cudnn_batch_norm _fused_rms_norm",
    "it runs in a whole network of tests/rules or tests/convert": "_fused_moving_avg_obs_fq_helper _grouped_mm",
}  # fmt: skip


def case(names: str, *operands: Operand, call: Callable[..., Any] | None = None) -> None:
    """Add operations, called with these operands or, with `call`, as `call(operation, *operands)`."""
    for name in names.split():
        packet = getattr(aten, name, None)
        CASES[name] = (packet if call is None else lambda *t, op=packet: call(op, *t)), operands


def integer(*shape: int) -> Operand:
    return ("integer", *shape)


def mask(*shape: int) -> Operand:
    return ("mask", *shape)


def positive(*shape: int) -> Operand:
    return ("positive", *shape)


M, T, P = (4, 6), (4, 6, 8), (4, 6, 8, 2)  # a matrix, three axes, images

case("add sub mul maximum eq", M, M)
case("relu sigmoid exp clone detach alias _to_copy hardswish hardsigmoid hardtanh isnan isinf nan_to_num", M)
case("leaky_relu elu celu log_sigmoid_forward zeros_like ones_like", M)
case("_conj _conj_physical", M, call=lambda op, x: op(torch.complex(x, x)).resolve_conj())
case("copy floor_divide complex polar", M, M)
case("full_like", M, call=lambda op, x: op(x, 2.0))
case("fill", M, call=lambda op, x: op(x, 2.0))
case("where", mask(4, 6), M, M)
case("masked_fill", M, mask(4, 6), call=lambda op, x, where: op(x, where, 2.0))
case("lerp addcmul", M, M, M)
case("addcdiv", M, M, positive(4, 6))
case("_softmax _log_softmax", T, call=lambda op, x: op(x, 1, False))
case("_safe_softmax", T, call=lambda op, x: op(x, 1))
case("mean sum var std amax amin logsumexp prod max min any all argmax argmin count_nonzero nansum", T,
     call=lambda op, x: op(x, 1))  # fmt: skip
case("var_mean std_mean", T, call=lambda op, x: op(x, [1]))
case("linalg_vector_norm norm", T, call=lambda op, x: op(x, 2, [0, 2]))
case("sort", T, call=lambda op, x: op(x, 1))
case("topk", T, call=lambda op, x: op(x, 2, 1))
case("aminmax", T, call=lambda op, x: op(x, dim=1))
case("constant_pad_nd", T, call=lambda op, x: op(x, [0, 0, 1, 2], 0.5))
case("view", T, call=lambda op, x: x.flatten(1))
case("permute", T, call=lambda op, x: x.permute(2, 0, 1))
case("transpose", T, call=lambda op, x: x.transpose(0, 2))
case("unsqueeze", T, call=lambda op, x: op(x, 1))
case("squeeze", (4, 1, 8), call=lambda op, x: op(x, 1))
case("expand", (4, 1, 8), call=lambda op, x: x.expand(-1, 6, -1))
case("repeat", (4, 1, 8), call=lambda op, x: x.repeat(2, 6, 1))
case("cat", M, M, call=lambda op, x, y: torch.cat([x, y], 1))
case("stack", M, M, call=lambda op, x, y: torch.stack([x, y], 1))
case("split", T, call=lambda op, x: x.split(3, 1))
case("split_with_sizes", T, call=lambda op, x: x.split([2, 4], 1))
case("unsafe_split", T, call=lambda op, x: op(x, 3, 1))
case("unsafe_split_with_sizes", T, call=lambda op, x: op(x, [2, 4], 1))
case("glu", T, call=lambda op, x: op(x, 1))
case("unbind", T, call=lambda op, x: op(x, 1))
case("select", T, call=lambda op, x: op(x, 1, 2))
case("slice", T, call=lambda op, x: x[:, 2:5])
case("as_strided", T, call=lambda op, x: op(x, [4, 6, 8], [48, 8, 1]))
case("index_select", T, integer(8), call=lambda op, x, i: op(x, 1, i))
case("gather", T, integer(4, 6, 8), call=lambda op, x, i: op(x, 1, i))
case("index", T, integer(6, 8), integer(8), call=lambda op, x, i, j: op(x, [None, i, j]))
case("pixel_shuffle", (4, 16, 8, 2), call=lambda op, x: op(x, 2))
case("pixel_unshuffle", (2, 4, 8, 2), call=lambda op, x: op(x, 2))
case("channel_shuffle", T, call=lambda op, x: op(x, 2))
case("im2col", P, call=lambda op, x: op(x, [2, 1], [1, 1], [0, 0], [2, 1]))
case("col2im", (4, 12, 8), call=lambda op, x: op(x, [8, 2], [2, 1], [1, 1], [0, 0], [2, 1]))
case("view_as_real", M, call=lambda op, x: op(torch.complex(x, x)))
case("view_as_complex", (4, 6, 2))
case("mm", M, (6, 8))
case("bmm", T, (4, 8, 2))
case("mv", M, (6,))
case("dot vdot", (6,), (6,))
case("addmm", (4, 8), M, (6, 8))
case("_sparse_addmm", (4, 8), M, (6, 8), call=lambda op, x, a, b: op(x, a.to_sparse(), b))
case("baddbmm", (4, 6, 2), T, (4, 8, 2))
case("addmv", (4,), M, (6,))
case("convolution", T, (2, 6, 1), (2,), call=lambda op, *t: F.conv1d(*t))
case("embedding", (8, 6), integer(4, 2))
case(
    "native_batch_norm",
    T,
    (6,),
    (6,),
    (6,),
    positive(6),
    call=lambda op, x, w, b, m, v: op(x, w, b, m, v, False, 0, 1e-5),
)
case("_native_batch_norm_legit_no_training", T, (6,), (6,), (6,), positive(6), call=lambda op, *t: op(*t, 0.1, 1e-5))
case("_native_batch_norm_legit", T, (6,), (6,), call=lambda op, x, w, b: op(x, w, b, True, 0.1, 1e-5)[0])
case("_batch_norm_no_update", T, (6,), (6,), (6,), positive(6), call=lambda op, *t: op(*t, 0.1, 1e-5)[0])
case("native_layer_norm", T, (8,), (8,), call=lambda op, x, w, b: F.layer_norm(x, (x.shape[-1],), w, b))
case("native_group_norm", (4, 8, 6), (8,), (8,), call=lambda op, x, w, b: F.group_norm(x, 2, w, b))
case("_weight_norm_interface", M, (4, 1), call=lambda op, v, g: op(v, g.abs(), 0))
case("renorm", M, call=lambda op, x: op(x, 2, 0, 0.5))
case("bucketize", M, (6,), call=lambda op, x, b: op(x, b.sort().values))
case("cumsum cumprod logcumsumexp cummax cummin", T, call=lambda op, x: op(x, 1))
case("flip", T, call=lambda op, x: op(x, [1]))
case("roll", T, call=lambda op, x: op(x, [1, 2], [0, 1]))
case("rot90", T, call=lambda op, x: op(x, 1, [0, 1]))
case("tril triu", T)
case("kthvalue", T, call=lambda op, x: op(x, 2, 1))
case("median nanmedian mode", T, call=lambda op, x: op(x, 1)[0])
case("diagonal", T, call=lambda op, x: op(x, 0, 0, 2))
case("unfold", T, call=lambda op, x: x.unfold(1, 2, 2))
case("linalg_cross", (4, 3, 8), (4, 3, 8), call=lambda op, x, y: op(x, y, dim=1))
case("_fft_r2c", T, call=lambda op, x: torch.fft.rfft(x, dim=1))
case("_fft_c2c", T, call=lambda op, x: torch.fft.fft(torch.complex(x, x), dim=1))
case("_fft_c2r", T, call=lambda op, x: torch.fft.irfft(torch.complex(x, x), dim=1))
case("index_fill", T, integer(2), call=lambda op, x, i: op(x, 1, i, 2.0))
case("index_add index_copy", T, integer(1), (4, 1, 8), call=lambda op, x, i, y: op(x, 1, i, y))
case("index_reduce", T, integer(2), (4, 2, 8), call=lambda op, x, i, y: op(x, 1, i, y, "amax"))
case("scatter_add", T, integer(4, 2, 8), (4, 2, 8), call=lambda op, x, i, y: op(x, 1, i, y))
case("scatter", T, integer(4, 1, 8), (4, 1, 8), call=lambda op, x, i, y: op(x, 1, i, y))
case("scatter_reduce", T, integer(4, 2, 8), (4, 2, 8), call=lambda op, x, i, y: op(x, 1, i, y, "sum"))
case("index_put _unsafe_index_put _index_put_impl", T, integer(4), (4, 8),
     call=lambda op, x, i, y: op(x, [None, i], y[:, None], True))  # fmt: skip
case("reflection_pad1d replication_pad1d", T, call=lambda op, x: op(x, [1, 1]))
case("upsample_nearest1d _upsample_nearest_exact1d", T, call=lambda op, x: op(x, [4]))
case("upsample_linear1d", T, call=lambda op, x: op(x, [4], False))
case("max_pool2d_with_indices avg_pool2d", P, call=lambda op, x: op(x, [2, 2]))
case("adaptive_max_pool2d _adaptive_avg_pool2d", P, call=lambda op, x: op(x, [3, 2]))
case("reflection_pad2d replication_pad2d", P, call=lambda op, x: op(x, [1, 1, 1, 1]))
case("upsample_nearest2d _upsample_nearest_exact2d", P, call=lambda op, x: op(x, [4, 4]))
case("upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa", P,
     call=lambda op, x: op(x, [4, 4], False))  # fmt: skip
case("max_unpool2d", P, integer(4, 6, 8, 2), call=lambda op, x, i: op(x, i, [8, 4]))
V = (2, 4, 2, 4, 2)  # a video
case("max_pool3d_with_indices avg_pool3d", V, call=lambda op, x: op(x, [2, 2, 2]))
case("adaptive_max_pool3d _adaptive_avg_pool3d", V, call=lambda op, x: op(x, [1, 3, 1]))
case("reflection_pad3d replication_pad3d", V, call=lambda op, x: op(x, [1] * 6))
case("upsample_nearest3d _upsample_nearest_exact3d", V, call=lambda op, x: op(x, [2, 2, 2]))
case("upsample_trilinear3d", V, call=lambda op, x: op(x, [2, 2, 2], False))
case("max_unpool3d", V, integer(*V), call=lambda op, x, i: op(x, i, [4, 4, 2], [2, 2, 2], [0, 0, 0]))
case("grid_sampler_2d", P, (4, 6, 8, 2), call=lambda op, x, g: op(x, g.tanh(), 0, 0, False))
case("grid_sampler_3d", V, (2, 4, 2, 4, 3), call=lambda op, x, g: op(x, g.tanh(), 0, 0, False))
case(
    "_embedding_bag _embedding_bag_forward_only",
    (8, 6),
    integer(4),
    call=lambda op, w, i: op(w, i, torch.tensor([0, 2]))[0],
)
case("_cdist_forward", T, (4, 2, 8), call=lambda op, x, y: op(x, y, 1.0, None))
case("_euclidean_dist", M, (8, 6))
case("mse_loss smooth_l1_loss huber_loss", M, M)
case("binary_cross_entropy_with_logits", M, positive(4, 6), M)
case("binary_cross_entropy", positive(4, 6), positive(4, 6), call=lambda op, x, y: op(x.tanh(), y.tanh()))
case(
    "scaled_dot_product_attention",
    T,
    (4, 2, 8),
    (4, 2, 6),
    (6, 2),
    call=lambda op, *t: F.scaled_dot_product_attention(*t),
)
case("_prelu_kernel", M, (6,))
QUANTIZED = {
    "fake_quantize_per_tensor_affine_cachemask": ((M,), lambda op, x: op(x, 0.1, 0, -8, 7)),
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams": (
        (M, positive(1), ("zero", 1), ("one", 1)), lambda op, x, s, z, on: op(x, s, z, on, -8, 7),
    ),
    "_fake_quantize_learnable_per_tensor_affine": (
        (M, positive(1), ("zero", 1)), lambda op, x, s, z: op(x, s, z.to(x), -8, 7),
    ),
    "fake_quantize_per_channel_affine_cachemask": (
        (T, positive(6), ("zero", 6)), lambda op, x, s, z: op(x, s.float(), z, 1, -8, 7),
    ),
    "_fake_quantize_learnable_per_channel_affine": (
        (T, positive(6), ("zero", 6)), lambda op, x, s, z: op(x, s.float(), z.float(), 1, -8, 7),
    ),
}  # fmt: skip
for _name, (_operands, _call) in QUANTIZED.items():
    case(_name, *_operands, call=_call)


class Made(nn.Module):
    """Runs an operation on operands of which some axes are made by layers, and reads what it returns by layers."""

    def __init__(self, name: str, labelled: set[tuple[int, int]]):
        super().__init__()
        self.call, self.operands = CASES[name]
        self.labelled = labelled
        self.makers = nn.ModuleDict({f"{i}_{axis}": nn.Linear(3, self.shape(i)[axis]) for i, axis in sorted(labelled)})
        self.readers = nn.ModuleList()  # of each axis of each output, made in the first forward

    def shape(self, i: int) -> tuple[int, ...]:
        return self.operands[i][1:] if isinstance(self.operands[i][0], str) else self.operands[i]

    def plain(self, seed: int) -> tuple[Tensor, ...]:
        """The inputs: what the layers read, and each operand with one unit on the axes that layers make."""
        torch.manual_seed(seed)
        shapes = [
            [1 if (i, axis) in self.labelled else n for axis, n in enumerate(self.shape(i))]
            for i in range(len(self.operands))
        ]
        return torch.randn(3, dtype=torch.float64), *(torch.randn(shape, dtype=torch.float64) for shape in shapes)

    def operand(self, i: int, start: Tensor, plain: Tensor) -> Tensor:
        for axis in range(plain.ndim):
            if (i, axis) in self.labelled:
                units = self.makers[f"{i}_{axis}"](start)
                plain = plain * units.reshape([-1 if other == axis else 1 for other in range(plain.ndim)])
        kind = self.operands[i][0]
        if kind == "integer":
            return (plain > 0).long()
        return {"mask": plain > 0, "positive": plain.abs() + 0.1, "zero": (plain * 0).int(), "one": plain * 0 + 1}.get(
            kind if isinstance(kind, str) else "", plain
        )

    def forward(self, start: Tensor, *plain: Tensor) -> list[Tensor]:
        out = self.call(*(self.operand(i, start, part) for i, part in enumerate(plain)))
        results = [result for result in (out if isinstance(out, (list, tuple)) else [out]) if result.numel()]
        if not self.readers:
            real = [torch.view_as_real(each) if each.is_complex() else each for each in results]
            self.readers.extend(nn.ModuleList(nn.Linear(n, 2) for n in each.shape) for each in real)
            self.double()
        read = []
        for result, readers in zip(results, self.readers, strict=True):
            result = (torch.view_as_real(result) if result.is_complex() else result).double()
            for axis, reader in enumerate(readers):
                result = reader(result.movedim(axis, -1)).movedim(-1, axis)
            read.append(result)
        return read


def choices(name: str) -> list[set[tuple[int, int]]]:
    """Each axis of each operand, and pairs of them."""
    model = Made(name, set())
    axes = [(i, axis) for i in range(len(model.operands)) for axis, n in enumerate(model.shape(i)) if n > 1]
    pairs = list(itertools.combinations(axes, 2))
    pairs = random.Random(0).sample(pairs, min(DRAWN, len(pairs)))
    return [{axis} for axis in axes] + [set(pair) for pair in pairs]


def check(name: str, labelled: set[tuple[int, int]]) -> None:
    """Assert that every oracle holds if layers make these axes of the operation's operands."""
    model = Made(name, labelled).double().eval()
    inputs = model.plain(seed=1)
    run = oracles.run_on(*inputs)
    expected = run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing gets narrower
        slim = slimmable.slimify(model, (1.0, 0.5), example_inputs=inputs)
    plan = slimmable.plan(slim, (1.0, 0.5))
    for pin in plan.pins:
        assert "fail" not in pin.reason, (labelled, pin)  # the rule, or a width that it believed in
    if plan.groups:
        difference = oracles.permuted_difference(model, plan, run, expected)
        assert difference < 1e-10, f"{labelled}: permuting the groups changes the output by {difference}"
        assert oracles.extracted_difference(slim, run, oracles.outputs_of(slim, run)) < 1e-12, labelled


def test_every_operation_with_a_rule_has_a_case():
    unreached = {name for names in UNREACHED.values() for name in names.split()}
    known = {name for name in trace.RULES if "::" not in name}
    assert sorted(known - unreached - set(CASES)) == []
    assert not unreached & set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_units_on_every_axis_of_every_operand(name, monkeypatch):
    asked = []
    if name in trace.RULES:
        rule = trace.RULES[name]
        monkeypatch.setitem(trace.RULES, name, lambda *args: (asked.append(name), rule(*args)))
    for labelled in choices(name):
        check(name, labelled)
    assert asked or name not in trace.RULES


def test_a_rule_that_overlooks_an_operand_is_found(monkeypatch):
    def without_the_grid(ctx, args, kwargs, out):
        batch, channels, *space = ctx.axes(args[0])
        for ids in space:
            ctx.pin(ids, "neighbouring units are mixed")
        ctx.label(out, [batch, channels, None, None], ctx.origin(args[0]))

    batches = {(0, 0), (1, 0)}
    check("grid_sampler_2d", batches)
    monkeypatch.setitem(trace.RULES, "grid_sampler_2d", without_the_grid)
    with pytest.raises(AssertionError, match="permuting the groups changes the output"):
        check("grid_sampler_2d", batches)
