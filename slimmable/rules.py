"""Rules of operations, in the words that `register_rule` gives to users; the basic ones are in `slimmable.analysis`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from slimmable._checks import check_flags
from slimmable._inputs import tensors
from slimmable._reach import arguments
from slimmable.analysis.labels import Ids
from slimmable.analysis.trace import RULES, Context
from slimmable.errors import RuleError, UsageError

__all__ = ["Operation", "register_rule"]

R = TypeVar("R", bound="Callable[[Operation], Any]")
ORDER = "the order of the units matters"
NEIGHBOURS = "neighbouring units are mixed"


class Operation:
    """One call of an operation, as its rule sees it.

    `op["weight"]` is the argument of that name in the operation's schema, or its default. Verbs take the name of a
    tensor, or "indices[0]" for the first of a list, and one of its axes. About an optional tensor that was not passed,
    and about axes of size 1, which are broadcast, they say nothing. If the rule leaves out an axis on which there are
    units, the operation counts as one without a rule; what it does say is believed.

    Attributes:
        name: such as "torchvision::roi_align".
        tensors: the tensors among the arguments, by name.
        outputs: the tensors that it has returned, or those that it has written to if it returns none.
    """

    def __init__(self, context: Context, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        self.name = str(context.schema.name)
        self.outputs = tensors(out)
        self._context = context
        self._arguments = arguments(context.schema, args, kwargs)
        self.tensors: dict[str, Tensor] = {}
        for name, value in self._arguments.items():
            parts = enumerate(value) if isinstance(value, (list, tuple)) else ()
            named = {name: value} | {f"{name}[{i}]": part for i, part in parts}
            self.tensors |= {key: part for key, part in named.items() if isinstance(part, Tensor)}
        self._mentioned: set[tuple[str, int]] = set()
        self._axes: list[dict[int, Ids | None]] = [{} for _ in self.outputs]
        self._sources: list[set[str]] = [set() for _ in self.outputs]  # names of what moves there
        self._products: list[tuple[int, Ids | None]] = []  # multiply-adds per element of the output, inner axis
        self._made = False

    def __getitem__(self, name: str) -> Any:
        if name not in self._arguments:
            raise KeyError(f"{self.name} has no argument {name!r}; it has {', '.join(self._arguments)}")
        return self._arguments[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arguments

    def same(self, first: str, axis: int, second: str, other: int) -> None:
        """Say that two axes hold the same units, such as batches, heads or channels that meet one by one."""
        (units, mine), (others, yours) = self._axis(first, axis), self._axis(second, other)
        if 1 not in (units, others):
            _check(units, others, f"axis {axis} of {first!r}", f"axis {other} of {second!r}")
            self._context.merge(mine, yours)

    def moves(self, name: str, axis: int, to: int, output: int = 0) -> None:
        """Say that an axis becomes axis `to` of an output; all that moves to one axis there is the same units."""
        (units, ids), axes, result = self._axis(name, axis), self._axes[output], self.outputs[output]
        to = _number(to, result, f"output {output}")
        if units != 1:
            _check(units, int(result.shape[to]), f"axis {axis} of {name!r}", f"axis {to} of output {output}")
            axes[to] = self._context.merge(axes[to], ids) if to in axes else ids
            self._sources[output].add(name)

    def keeps(self, name: str, *but: int, output: int = 0) -> None:
        """Say that all axes but some move to an output, each to its own place, or closing up if that has fewer axes."""
        count = self.tensors[name].ndim if self._passed(name) else 0
        fewer = self.outputs[output].ndim < count
        kept = [axis for axis in range(count) if axis not in {each % count for each in but}]
        for number, axis in enumerate(kept):
            self.moves(name, axis, to=number if fewer else axis, output=output)

    def makes(self, weight: str, axis: int, to: int, output: int = 0) -> None:
        """Say that an axis of a weight makes the units on axis `to` of an output, as the channels of a convolution."""
        if self._passed(weight) and self._context.origin(self.tensors[weight]) == "weights":
            self._context.produce(self._axis(weight, axis)[1])
            self._made = True
        self.moves(weight, axis, to, output)

    def contracts(self, first: str, axis: int, second: str, other: int, times: int = 1) -> None:
        """Say that products of two tensors are added up along an axis of both; a weight among them reads that axis.

        The plan counts `times` multiply-adds per unit and output element: for a convolution the size of its kernel.
        """
        mine, yours = self._axis(first, axis), self._axis(second, other)
        if self._passed(first) and self._passed(second):
            _check(mine[0], yours[0], f"axis {axis} of {first!r}", f"axis {other} of {second!r}")
            self._context.contract(self.tensors[first], mine[1], self.tensors[second], yours[1])
            self._products.append((times * mine[0], mine[1]))

    def mixes(self, name: str, axis: int) -> None:
        """Say that the units along an axis are put together without weights, all alike, as by a mean or a softmax."""
        self._context.meet(self._axis(name, axis)[1])

    def pins(self, name: str, axis: int, why: str) -> None:
        """Keep an axis at full width, for a reason that the plan gives, such as "the order of the units matters"."""
        self._context.pin(self._axis(name, axis)[1], why)

    def sizes(self, number: str, name: str, axis: int) -> None:
        """Say that the integer argument `number` counts the units on an axis, as `num_heads` does.

        It follows the width if it comes from an attribute of a module or the shape of a tensor; a constant pins.
        """
        given, passed = self._axis(name, axis), self._context.call.argument(list(self._arguments).index(number), number)
        if self._passed(name):
            self._context.constrain(self[number] if passed is None else passed, given[1], given[0])

    def _passed(self, name: str) -> bool:
        if name not in self.tensors and "[" not in name and self[name] is not None:
            raise TypeError(f"argument {name!r} is no tensor, but {self[name]!r}")
        return name in self.tensors

    def _axis(self, name: str, axis: int) -> tuple[int, Ids | None]:
        """Return size and labels of an axis, 1 and none if there is no such tensor; note that the rule mentions it."""
        if not self._passed(name):
            return 1, None
        tensor = self.tensors[name]
        number = _number(axis, tensor, repr(name))
        self._mentioned.add((name, number))
        return int(tensor.shape[number]), self._context.axes(tensor)[number]

    def _finish(self) -> None:
        """Pin everything if the rule has left out an axis, count the multiply-adds, and label the outputs."""
        context = self._context
        for name, tensor in self.tensors.items():
            for axis, ids in enumerate(context.axes(tensor)):
                if ids is not None and (name, axis) not in self._mentioned:
                    context.refuse([*self.tensors.values()], f"its rule says nothing about axis {axis} of {name!r}")
        for macs, inner in self._products:
            context.multiply(macs * int(self.outputs[0].numel()), [*self._axes[0].values(), inner])
        numbers = [each for each in self.tensors.values() if each.is_floating_point() or each.is_complex()]
        decisive = [*self.tensors.values()] if self._made else numbers  # not the indices by which weights are picked
        fixed = bool(decisive) and all(context.origin(tensor) == "weights" for tensor in decisive)
        for tensor, axes, names in zip(self.outputs, self._axes, self._sources, strict=True):
            features = [self.tensors[name] for name in names if context.is_features(self.tensors[name])]
            origins = {context.origin(each) for each in features} or {"constant"}
            origin = "weights" if fixed else "made" if self._made else origins.pop() if len(origins) == 1 else None
            context.label(tensor, [axes.get(axis) for axis in range(tensor.ndim)], origin)


def _number(axis: int, tensor: Tensor, what: str) -> int:
    if not -tensor.ndim <= axis < tensor.ndim:
        raise IndexError(f"{what}, of shape {tuple(tensor.shape)}, has no axis {axis}")
    return axis % tensor.ndim


def _check(one: int, two: int, first: str, second: str) -> None:
    if one != two:
        raise ValueError(f"{first} has {one} units, and {second} {two}")


@overload
def register_rule(op: Any, *, replace: bool = ...) -> Callable[[R], R]: ...
@overload
def register_rule(op: Any, rule: R, *, replace: bool = ...) -> R: ...
def register_rule(op: Any, rule: R | None = None, *, replace: bool = False) -> Any:
    """Tell `slimify` and `plan` what an operation does with the units on the axes of its tensors.

    An operation without a rule keeps at full width what it meets. One with torch's tag `pointwise` needs none.

    Args:
        op: the operation's name, such as "mylib::attend", or the operation, such as `torch.ops.mylib.attend`. The rule
            holds for all of its overloads and for its in-place counterpart.
        rule: a function of one `slimmable.rules.Operation`; without it, the decorator of such a function is returned.
        replace: take the place of a rule that the operation has already, also of one of slimmable's own.

    Raises: UsageError: if `op` is no operation, or has a rule and `replace` is not set. RuleError: from `slimify`, if
        a rule raises, or names an axis that a tensor does not have.

    >>> @torch.library.custom_op("doctest::scale", mutates_args=())
    ... def scale(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    ...     return x * gain
    >>> _ = scale.register_fake(lambda x, gain: torch.empty_like(x))
    >>> @register_rule("doctest::scale")
    ... def rule(op):
    ...     op.keeps("x")
    ...     op.same("x", -1, "gain", 0)
    """
    check_flags("register_rule", replace=replace)
    name = _name(op)
    if rule is None:
        return lambda function: register_rule(op, function, replace=replace)
    if not callable(rule) or isinstance(rule, type):
        raise UsageError(f"the rule of {name} is {rule!r}; it must be a function of one Operation")
    key = name.removeprefix("aten::")
    if key in RULES and not replace:
        raise UsageError(f"{name} has a rule already; pass replace=True to use this one instead")
    described = f"{getattr(rule, '__module__', '')}.{getattr(rule, '__qualname__', repr(rule))}"

    def apply(context: Context, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        operation = Operation(context, args, kwargs, out)
        try:
            rule(operation)
        except Exception as error:
            if described.startswith("slimmable."):
                raise  # the trace pins what the operation meets
            failed = f"the rule {described} of {name} failed in module {context.module or '(the model itself)'!r}"
            raise RuleError(f"{failed}: {type(error).__name__}: {error}") from error
        operation._finish()

    RULES[key] = apply
    return rule


def _name(op: Any) -> str:
    """Return the name of an operation, without that of an overload and the underscore of an in-place one."""
    op = getattr(op, "_opoverload", op)  # of a function decorated by `torch.library.custom_op`
    name = getattr(op, "_qualified_op_name", None) or getattr(op, "_name", op)
    space, _, own = name.partition(".")[0].rstrip("_").partition("::") if isinstance(name, str) else ("", "", "")
    if not own:
        raise UsageError(f'{op!r} is no operation; pass a name such as "mylib::attend" or torch.ops.mylib.attend')
    if space == "aten" and not (hasattr(torch.ops.aten, own) or hasattr(torch.ops.aten, f"{own}_")):
        raise UsageError(f"torch has no operation {space}::{own}")
    return f"{space}::{own}"


# -- the rules of torch and torchvision; first, of operations that treat units one by one
def _rule_of(operations: str) -> Callable[[Callable[[Operation], Any]], Any]:
    def register(rule: Callable[[Operation], Any]) -> Any:
        for operation in operations.split():
            if hasattr(torch.ops.aten, operation) or hasattr(torch.ops.aten, f"{operation}_"):  # older ones lack some
                register_rule(f"aten::{operation}", rule)
        return rule

    return register


def _one_by_one(operations: str, why: str = "", *special: int | str, also: str = "") -> None:
    """Register operations on single units of the first tensor and of `also`; `special` axes or arguments are pinned."""

    @_rule_of(operations)
    def rule(op: Operation) -> None:
        first = next(iter(op.tensors))
        axes: list[int] = []
        for each in special:
            number = each if isinstance(each, int) else op[each]
            axes += [number] if isinstance(number, int) else number or range(op[first].ndim)  # none given: all
        for name in (first, also) if also else (first,):
            for axis in axes if op[name].ndim else ():
                op.pins(name, axis, why)
            for output, result in enumerate(op.outputs):
                whole = result.ndim == op[name].ndim  # then a pinned axis of the same size keeps its labels
                lost = [axis for axis in axes if not (whole and result.shape[axis] == op[name].shape[axis])]
                op.keeps(name, *lost, output=output)
        for name in op.tensors.keys() - {first, also}:
            for axis in range(op.tensors[name].ndim):
                op.pins(name, axis, "is an index or a bound")


_one_by_one("bucketize renorm view_as_real fake_quantize_per_tensor_affine_cachemask")
_one_by_one("_fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fake_quantize_learnable_per_tensor_affine")
_one_by_one("view_as_complex", "is the real and imaginary part", -1)
_one_by_one("cumsum cumprod logcumsumexp", ORDER, "dim")
_one_by_one("flip rot90 roll", ORDER, "dims")
_one_by_one("tril triu", ORDER, -1, -2)
_one_by_one("cummax cummin", "units are ranked", "dim")
_one_by_one("sort", "its units are sorted", "dim")
_one_by_one("diagonal", "a diagonal is taken", "dim1", "dim2")
_one_by_one("unfold", "is cut into windows", "dimension")
_one_by_one("linalg_cross", "is a space", "dim", also="other")
_one_by_one("_fft_r2c _fft_c2r _fft_c2c", "is transformed", "dim")
_one_by_one("index_fill", "is indexed", "dim")
_one_by_one("index_add index_copy index_reduce", "is indexed", "dim", also="source")

for _dims in (1, 2, 3):
    _kinds = (  # each exists for some numbers of axes
        "max_pool{}d_with_indices max_pool{}d avg_pool{}d adaptive_max_pool{}d adaptive_avg_pool{}d "
        "_adaptive_avg_pool{}d fractional_max_pool{}d reflection_pad{}d replication_pad{}d upsample_nearest{}d "
        "_upsample_nearest_exact{}d upsample_linear{}d upsample_bilinear{}d upsample_bicubic{}d upsample_trilinear{}d "
        "_upsample_bilinear{}d_aa _upsample_bicubic{}d_aa"
    )
    _one_by_one(_kinds.replace("{}", str(_dims)), NEIGHBOURS, *range(-_dims, 0))
    _one_by_one(f"max_unpool{_dims}d", NEIGHBOURS, *range(-_dims, 0), also="indices")


@_rule_of("fake_quantize_per_channel_affine_cachemask _fake_quantize_learnable_per_channel_affine")
@_rule_of("_fused_moving_avg_obs_fq_helper")
def fake_quantize(op: Operation) -> None:
    """Numbers are rounded to steps of a size for each unit of an axis; the fused way, only if asked to."""
    for output in range(len(op.outputs)):
        op.keeps("self", output=output)
    fused = "running_min" in op
    axis = op["ch_axis" if fused else "axis"]
    if fused and op["per_row_fake_quant"] and not op["running_min"].numel():
        op.pins("self", axis, "its observer has seen nothing yet; run the model once before it is converted")
    elif not fused or op["per_row_fake_quant"]:
        for name in ("running_min", "running_max", "scale", "zero_point"):
            if name in op:
                op.same("self", axis, name, 0)


@_rule_of("_softmax _log_softmax _safe_softmax")
def softmax(op: Operation) -> None:
    """The units of an axis compete; as an output, they are classes."""
    op.keeps("self")
    if op["self"].ndim:
        op.mixes("self", op["dim"])
        op._made = op._axis("self", op["dim"])[1] is not None
    op._context.weighting.add(op._context.module)


@_rule_of("native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm")
@_rule_of("_batch_norm_with_update _batch_norm_no_update")
def batch_norm(op: Operation) -> None:
    """Axis 1 shrinks with every per-channel tensor; statistics of the input itself mix the units of the others."""
    op.keeps("input")
    for name in [*op.tensors][1:]:
        op.moves(name, 0, to=1)
    for axis in range(2, op["input"].ndim) if op._arguments.get("training") else ():
        op.mixes("input", axis)


@_rule_of("native_layer_norm _fused_rms_norm layer_norm rms_norm")
def layer_norm(op: Operation) -> None:
    """The last axes shrink with weight and bias."""
    op.keeps("input")
    for axis in range(-len(op["normalized_shape"]), 0):
        for name in [*op.tensors][1:]:
            op.moves(name, axis, to=axis)
        op.mixes("input", axis)


@_rule_of("_weight_norm_interface _weight_norm")
def weight_norm(op: Operation) -> None:
    """A weight is given by direction and length, which has one value per slice along one axis."""
    op.keeps("v")
    for output in range(len(op.outputs)):
        op.keeps("g", output=output)


@_rule_of("scatter scatter_add scatter_reduce")
def scatter(op: Operation) -> None:
    """Elements are written or added at places along one axis."""
    op.keeps("self", op["dim"])
    for name in {"self", "index", "src"} & op.tensors.keys():
        op.pins(name, op["dim"], "is indexed")
    for axis in set(range(op["self"].ndim)) - {op["dim"] % max(op["self"].ndim, 1)}:
        for name in {"index", "src"} & op.tensors.keys():
            if op[name].shape[axis] == op["self"].shape[axis]:
                op.moves(name, axis, to=axis)
            else:
                op.pins("self", axis, "is written in part")
                op.pins(name, axis, "writes a part")


@_rule_of("index index_put _index_put_impl _unsafe_index_put")
def index(op: Operation) -> None:
    """Indices of some axes, or masks of them, say what is read, or where `values` are written or added."""
    indices = [(i, part) for i, part in enumerate(op["indices"]) if part is not None]
    masked = any(part.dtype == torch.bool for _, part in indices)
    used, axis = list[int](), 0
    for part in op["indices"]:
        covered = part.ndim if part is not None and part.dtype == torch.bool else 1  # a mask may cover several axes
        used += [] if part is None else range(axis, axis + covered)
        axis += covered
    if masked and len(indices) == 1 and "values" in op and op["values"].numel() == 1:  # as masked_fill does
        op.keeps("self")
        for number, axis in enumerate(used):
            op.same("self", axis, f"indices[{indices[0][0]}]", number)
        return
    for axis in used:
        op.pins("self", axis, "is indexed")
    picked = max(1 if part.dtype == torch.bool else part.ndim for _, part in indices)
    rest: list[int | None] = [axis for axis in range(op["self"].ndim) if axis not in used]
    front = used[0] if used[-1] - used[0] == len(used) - 1 else 0
    rest[front:front] = [None] * picked  # now the axes of what is read or written; those of the indices are None
    if "values" in op:
        op.keeps("self", *used)
        for axis, own in zip(range(-1, -1 - op["values"].ndim, -1), reversed(rest), strict=False):
            if own is None:
                op.pins("values", axis, "is written at indices")
            else:
                op.moves("values", axis, to=own)
    else:
        for number, own in enumerate(rest):
            if own is not None:
                op.moves("self", own, to=number)
    for i, part in indices:
        for number in range(part.ndim):
            if "values" in op or masked:
                op.pins(f"indices[{i}]", number, "is an index")
            else:
                op.moves(f"indices[{i}]", number, to=front + picked - part.ndim + number)


@_rule_of("embedding _embedding_bag _embedding_bag_forward_only")
def embedding(op: Operation) -> None:
    """A table of vectors makes their units; which rows are read, or added up in bags, depends on the data."""
    op.makes("weight", 1, to=-1)
    op.pins("weight", 0, "is indexed")
    if "offsets" not in op:
        op.keeps("indices")


@_rule_of("grid_sampler_2d grid_sampler_3d")
def grid_sample(op: Operation) -> None:
    """Each image is read at the places of its own grid."""
    op.keeps("input", *range(2, op["input"].ndim))
    op.pins("grid", -1, "is a place")
    for axis in range(op["grid"].ndim - 1):
        op.moves("grid", axis, to=axis + 1 if axis else 0)


@_rule_of("_cdist_forward _euclidean_dist")
def cdist(op: Operation) -> None:
    """Distances between all pairs of vectors."""
    op.keeps("x1", -1)
    op.keeps("x2", -1, -2)
    op.moves("x2", -2, to=-1)
    op.contracts("x1", -1, "x2", -1)


@_rule_of("mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits")
def loss(op: Operation) -> None:
    """A loss of each number or, if `reduction` is not 0, of all of them together."""
    for name in (name for name in op.tensors if op[name].ndim == op["self"].ndim):
        if op["reduction"] == 0:
            op.keeps(name)
        for axis in range(op["self"].ndim) if op["reduction"] else ():
            op.same("self", axis, name, axis)
            op.mixes(name, axis)


@_rule_of("_grouped_mm")
def grouped_mm(op: Operation) -> None:
    """Each run of rows is multiplied by a matrix of its own, such as that of an expert."""
    if (op["self"].ndim, op["mat2"].ndim) == (2, 3):
        op.moves("self", 0, to=0)
        op.contracts("self", 1, "mat2", 1)
        op.makes("mat2", 2, to=1)
        op.pins("mat2", 0, "each has its own rows")


@register_rule("torchvision::roi_align")
@register_rule("torchvision::roi_pool")
def regions(op: Operation) -> None:
    """Regions are cut out of images; channels are resampled one by one."""
    for output in range(len(op.outputs)):
        op.moves("input", 1, to=1, output=output)
        op.moves("rois", 0, to=0, output=output)
    for name, axis in (("input", 0), ("input", 2), ("input", 3), ("rois", 1)):
        op.pins(name, axis, "regions are cut out")


@register_rule("torchvision::deform_conv2d")
def deform_conv2d(op: Operation) -> None:
    """A convolution that reads at positions shifted by `offset`, and weighs what it reads by `mask`."""
    for name in ("input", "offset", "mask"):
        op.moves(name, 0, to=0)
        for axis in (1, 2, 3) if name != "input" else ():
            op.pins(name, axis, "there is one for each position of the kernel")
    for axis in (2, 3):
        op.pins("input", axis, NEIGHBOURS)
        op.pins("weight", axis, "is the kernel of a convolution")
    if (ids := op._axis("input", 1)[1]) is not None:  # those read at other positions shrink alike
        op._context.labels.merge_rows(ids.reshape(op["offset_groups"], -1).T)
    if op["groups"] == 1:
        op.contracts("input", 1, "weight", 1, times=op["weight"][0, 0].numel())
        op.makes("weight", 0, to=1)
        op.same("weight", 0, "bias", 0)
