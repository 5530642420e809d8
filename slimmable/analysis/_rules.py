"""The state of a trace, and the rules that change it: arithmetic, new tensors, layers, attention, moves of axes."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from slimmable._inputs import tensors
from slimmable._reach import arguments
from slimmable.analysis.integers import Attribute, Constraint, Expression, TracedInt, size_of
from slimmable.analysis.labels import Axes, Ids, Labels, spread
from slimmable.analysis.plan import Output

Args = Sequence[Any]
Kwargs = dict[str, Any]


@dataclass
class Call:
    """The Python-level call that is running; its integer arguments still carry their expressions."""

    name: str = ""
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def argument(self, position: int, name: str) -> Any:
        """Return an argument by its position or name, or None if the caller passed none."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)


class ModuleCall(NamedTuple):
    """One call of a module: its first argument and its labels, if that is a tensor, and its output."""

    source: Tensor | None
    axes: list[Ids | None]
    out: Any


@dataclass
class Context:
    """The state of one trace, and what it has found.

    Each tensor has its labels as the attribute `slim_axes`, and as `slim_origin` how its units came about: "weights"
    (from parameters alone), "made" (by layers with weights, and since then only moved, scaled, normalized or bounded),
    "constant" (not from features: zeros, noise, one value for all units) or None (features: rectified or unknown).
    """

    widths: tuple[float, ...]
    choices: Mapping[int, int]
    labels: Labels = field(default_factory=Labels)
    constraints: list[Constraint] = field(default_factory=list)
    splits: list[tuple[Ids, int]] = field(default_factory=list)  # per split: labels carried on, number of candidates
    producers: list[tuple[str, Ids]] = field(default_factory=list)  # module path, labels of what it makes
    products: list[tuple[int, list[Ids], str]] = field(default_factory=list)  # multiply-adds, labels, module path
    reads: list[tuple[str, Ids]] = field(default_factory=list)  # module path, labels of what its weights read
    meetings: list[tuple[str, Ids]] = field(default_factory=list)  # where, labels of units mixed without weights
    sums: list[Ids] = field(default_factory=list)  # labels along which features are added, not only scaled
    residuals: list[Ids] = field(default_factory=list)  # the same where different layers made the addends
    streams: list[Ids] = field(default_factory=list)  # labels of such sums that a layer with weights reads
    attended: list[Ids] = field(default_factory=list)  # labels of keys and values of attention
    contractions: list[tuple[str, Ids]] = field(default_factory=list)  # module path, labels of a product's inner axis
    factors: dict[str, list[Ids]] = field(default_factory=dict)  # module path -> labels of products' second factors
    weighting: set[str] = field(default_factory=set)  # paths of modules that have made weights by a softmax
    tensors: dict[tuple[str, str], list[Ids | None]] = field(default_factory=dict)  # module path, name -> labels
    attributes: dict[Attribute, int] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    calls: dict[str, list[ModuleCall]] = field(default_factory=dict)  # by module path
    module: str = ""  # path of the module that is running
    operation: str = ""
    schema: Any = None  # of the operation
    call: Call = field(default_factory=Call)

    def axes(self, tensor: Tensor) -> list[Ids | None]:
        """Return the labels of each axis of `tensor`; an axis of size 1 has none."""
        known: Axes | None = getattr(tensor, "slim_axes", None)
        return list(known) if known is not None else [None] * tensor.ndim

    def label(self, tensor: Tensor, axes: Sequence[Ids | None], origin: str | None = None) -> None:
        kept = tuple(ids if ids is not None and len(ids) > 1 else None for ids in axes)
        vars(tensor).update(slim_axes=kept, slim_origin=origin, slim_shape=tuple(tensor.shape))

    def origin(self, tensor: Tensor) -> str | None:
        own: str | None = getattr(tensor, "slim_origin", None)
        return own if own != "constant" or tensor._base is None else getattr(tensor._base, "slim_origin", own)

    def is_features(self, tensor: Tensor) -> bool:
        """Tell whether `tensor` has labelled units that layers made."""
        return any(ids is not None for ids in self.axes(tensor)) and self.origin(tensor) not in ("weights", "constant")

    def wrote(self, part: Tensor) -> None:
        """Let the tensor of which `part` is a view have the origin of what was written there."""
        whole = part._base
        if whole is not None and self.is_features(part) and self.origin(whole) != "weights":
            alike = not self.is_features(whole) or self.origin(whole) == self.origin(part)
            vars(whole)["slim_origin"] = self.origin(part) if alike else None

    def at(self, operation: str, module: str) -> None:
        self.operation, self.module = operation, module

    @property
    def where(self) -> str:
        """The operation and the module that the trace is in, for reports."""
        return f"{self.operation} in {self.module or 'the model itself'}"

    def pin(self, ids: Ids | None, why: str = "") -> None:
        """Keep `ids` at full width because of the current operation."""
        if ids is not None:
            self.labels.pin(ids, f"{self.where}{': ' + why if why else ''}")

    def pin_all(self, tensors: Sequence[Tensor], why: str = "") -> None:
        """Keep all axes of these tensors at full width because of the current operation."""
        self.use(tensors)
        for tensor in tensors:
            for ids in self.axes(tensor):
                self.pin(ids, why)

    def refuse(self, operands: Sequence[Tensor], why: str) -> None:
        """Keep all that an operation meets at full width; the plan lists weights too, which might have shrunk."""
        self.pin_all(operands, why)
        for tensor in operands:
            for ids in self.axes(tensor) if self.origin(tensor) == "weights" else ():
                if ids is not None:
                    self.labels.produce(ids)

    def use(self, tensors: Iterable[Tensor]) -> None:
        """Note that tensors are read, which pins the axes in `slim_picked`, whose single units or indices they are."""
        for tensor in tensors:
            for ids in self.axes(tensor) if hasattr(tensor, "slim_elsewhere") else ():
                self.pin(ids, "no width reaches weights in a list, an object or a module outside of the model")
            for ids, why in getattr(tensor, "slim_picked", ()):
                self.pin(ids, why)

    def merge(self, *axes: Ids | None, why: str = "meets an axis that does not shrink") -> Ids | None:
        """Join axes that must shrink together; pin them if one has no labels. Return the labels of all."""
        labelled = [ids for ids in axes if ids is not None]
        joined = labelled[0] if labelled else None
        for ids in labelled[1:]:
            self.labels.merge(labelled[0], ids)
        if len(labelled) < len(axes):
            self.pin(joined, why)
        return joined

    def consume(self, ids: Ids | None, other: Ids | None) -> None:
        joined = self.merge(ids, other, why="reads an axis that does not shrink")
        if joined is not None:
            self.reads.append((self.module, joined))

    def contract(self, first: Tensor, mine: Ids | None, second: Tensor, yours: Ids | None) -> None:
        """Join the axes along which products of two tensors are added up."""
        weights = [self.origin(tensor) == "weights" for tensor in (first, second)]
        if any(weights) and not all(weights):
            self.consume(mine, yours)
        elif (joined := self.merge(mine, yours)) is not None and not any(weights):
            self.meet(joined)
            self.contractions.append((self.module, joined))

    def produce(self, ids: Ids | None) -> None:
        if ids is not None:
            self.labels.produce(ids)
            self.producers.append((self.module, ids))

    def multiply(self, macs: int, axes: Sequence[Ids | None]) -> None:
        """Note multiply-adds that are proportional to the kept units of each of these axes."""
        self.products.append((macs, [ids for ids in axes if ids is not None], self.module))

    def meet(self, ids: Ids | None) -> None:
        """Note that units along an axis are mixed without weights, as by a normalization over them."""
        if ids is not None:
            self.meetings.append((self.where, ids))

    def constrain(self, size: Any, ids: Ids | None, full: int) -> None:
        """Require a size argument to follow the axis that it sizes."""
        if isinstance(size, TracedInt):
            self.constraints.append(Constraint(size.expression, size_of(ids, full), self.where))
        else:
            self.pin(ids, f"the size {size} is a constant")

    def on_equal(self, first: Expression, second: Expression) -> None:
        self.constraints.append(Constraint(first, second, self.where))

    def size(self, tensor: Tensor, axis: int) -> int:
        """Return the size of an axis, as a `TracedInt` if the axis is labelled."""
        ids, size = self.axes(tensor)[axis], int(tensor.size(axis))
        return size if ids is None else TracedInt(size, Expression("size", ids), self.on_equal)

    def split(self, ids: Ids, shape: Sequence[int], sizes: Sequence[Any]) -> list[Ids | None]:
        """Label the axes of `shape` into which an axis labelled `ids` is folded; one of them carries the labels.

        `sizes` holds the size argument of each, None if the code passed none; one sized by a constant cannot carry.
        First comes one that needs no merge, then one of whole size at every width (attention heads), then the largest.
        """
        result: list[Ids | None] = [None] * len(shape)
        able = [i for i, size in enumerate(sizes) if shape[i] > 1 and (type(size) is not int or size == -1)]
        if not able:
            self.pin(ids, f"is folded to constants {tuple(shape)}")
            return result
        carried = [np.moveaxis(ids.reshape(shape), axis, 0).reshape(shape[axis], -1) for axis in able]
        for axis, rows in zip(able, carried, strict=True):
            roots = self.labels.find(rows)
            if (roots == roots[:, :1]).all():
                result[axis] = rows[:, 0]
                return result
        whole = [all(float(shape[axis] * width).is_integer() for width in self.widths) for axis in able]
        order = sorted(range(len(able)), key=lambda i: (not whole[i], -shape[able[i]] if not whole[i] else 0))
        pick = order[self.choices.get(len(self.splits), 0) % len(able)]
        rows = carried[pick]
        self.labels.merge_rows(rows)
        result[able[pick]] = rows[:, 0]
        self.splits.append((rows[:, 0], len(able)))
        return result

    def fold(self, axes: Sequence[Ids | None], shape: Sequence[int]) -> Ids | None:
        """Return the labels of the axis into which axes of `shape` are flattened."""
        labelled = {i: ids for i, ids in enumerate(axes) if ids is not None}
        if not labelled:
            return None
        shrinks = {i: (self.labels.produced(ids) & ~self.labels.pinned(ids)).any() for i, ids in labelled.items()}
        carrier = max(labelled, key=lambda i: (shrinks[i], len(labelled[i])))
        flat = spread(labelled.pop(carrier), math.prod(shape[:carrier]), math.prod(shape[carrier + 1 :]))
        for ids in labelled.values():
            self.pin(ids, "is flattened together with another labelled axis")
        return flat


Rule = Callable[[Context, Sequence[Any], dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}
"""By the name of the ATen operation; a rule is called after its operation has run, and labels the output."""


def rule_of(*names: str) -> Callable[[Rule], Rule]:
    """Make the decorated function the rule of these operations."""

    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


# -- arithmetic, and new tensors
def unknown(ctx: Context, args: Args, kwargs: Kwargs, out: Any, why: str = "has no rule") -> None:
    ctx.refuse(tensors((args, kwargs)), why)
    for tensor in tensors(out):
        ctx.label(tensor, [None] * tensor.ndim)


_RECTIFIERS = {
    "relu", "gelu", "silu", "mish", "hardswish", "leaky_relu", "_prelu_kernel", "rrelu_with_noise", "elu", "celu",
    "selu", "threshold",
}  # fmt: skip


def _equal(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Tell whether the axes of two tensors have the very same labels, not just merged ones."""
    return len(first) == len(second) and all(map(np.array_equal, first, second))


def _origin_after(ctx: Context, args: Args, operands: Sequence[Tensor]) -> str | None:
    """Return the origin of a pointwise result, see `Context`."""
    if operands and all(ctx.origin(tensor) == "weights" for tensor in operands):
        return "weights"
    features = [tensor for tensor in operands if ctx.is_features(tensor)]
    if not features or ctx.operation.endswith("_like"):
        return "constant"
    first, *others = features
    gates_itself = any(_equal(ctx.axes(first), ctx.axes(other)) for other in others)  # x * sigmoid(x)
    low, high = [*args[1:3], None, None][:2] if ctx.operation in ("hardtanh", "clamp", "clamp_min") else (None, None)
    numbers = not any(isinstance(end, Tensor) for end in (low, high))
    from_zero = numbers and low == 0 and (high is None or high > 1)  # not [0, 1], which bounds an image
    if ctx.operation in _RECTIFIERS or from_zero or (ctx.operation == "mul" and gates_itself):
        return None
    origins = {ctx.origin(tensor) for tensor in features}
    return "made" if origins == {"made"} or (ctx.operation == "add" and "made" in origins) else None


@rule_of(
    "detach", "alias", "_to_copy", "copy", "lift_fresh", "native_dropout", "where", "masked_fill", "hardswish",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "bernoulli", "_prelu_kernel",
    "complex", "fill", "zero", "rrelu_with_noise", "_conj", "polar", "floor_divide", "uniform", "normal", "exponential",
    "log_sigmoid_forward", "hardsigmoid", "hardtanh", "_conj_physical", "leaky_relu", "elu", "celu",
)  # fmt: skip
def pointwise(ctx: Context, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Broadcast: aligned axes shrink together. Listed are the operations without torch's tag, some only up to 2.11."""
    operands = [tensor for tensor in tensors((args, kwargs)) if tensor.ndim]
    origin = _origin_after(ctx, args, operands)
    for result in (each for each in tensors(out) if each.ndim):
        joined: list[Ids | None] = []
        outer = set()
        for axis in range(1, result.ndim + 1):
            aligned = [t for t in operands if t.ndim >= axis and t.shape[-axis] == result.shape[-axis] != 1]
            if ctx.operation == "mul" and {ctx.origin(tensor) for tensor in aligned} == {"weights"} != {origin}:
                outer.add(result.ndim - axis)
            labels = [ctx.axes(tensor)[-axis] for tensor in aligned]
            ids = ctx.merge(*labels)
            if ids is not None and ctx.operation not in ("mul", "div"):
                made = [own for t, own in zip(aligned, labels, strict=True) if own is not None and ctx.is_features(t)]
                if len(made) > 1:
                    ctx.sums.append(ids)
                    if ctx.operation == "add" and not all(_equal([own], [made[0]]) for own in made):
                        ctx.residuals.append(ids)
            joined.append(ids)
        ctx.label(result, joined[::-1], origin)
        vars(result)["slim_outer"] = outer  # axes that only weights have: a sum over others is a matrix product


@rule_of(
    "mean", "sum", "var", "std", "var_mean", "amax", "amin", "linalg_vector_norm", "norm", "logsumexp", "prod", "max",
    "min", "any", "all", "argmax", "argmin", "std_mean", "count_nonzero", "nansum", "aminmax", "median", "nanmedian",
    "mode", "kthvalue", "topk", "select", "unbind",
)  # fmt: skip
def reduce(ctx: Context, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Drop the reduced axes; where single units of them, or indices that number them, are read, they stay full."""
    source = args[0]
    results, given = tensors(out), arguments(ctx.schema, args, kwargs).get("dim")
    dims = [given] if isinstance(given, int) else given or range(source.ndim)
    reduced = {dim % source.ndim for dim in dims} if source.ndim else set()
    axes, origin = ctx.axes(source), ctx.origin(source)
    made: set[int] = getattr(source, "slim_outer", set()) - reduced if ctx.operation == "sum" else set()
    picked = "single units are picked" if ctx.operation in ("select", "unbind") else ""
    for dim in reduced if origin != "weights" and not picked else ():
        ctx.consume(axes[dim], axes[dim]) if made else ctx.meet(axes[dim])
    for dim in made:
        ctx.produce(axes[dim])
    if ctx.operation == ctx.call.name in ("kthvalue", "topk"):
        ctx.constrain(ctx.call.argument(1, "k"), None, int(args[1]))
    for result in results:
        keep = result.ndim == source.ndim
        left = [None if dim in reduced else ids for dim, ids in enumerate(axes) if keep or dim not in reduced]
        ctx.label(result, left, "made" if made else origin)
    last = ctx.operation in ("max", "min", "median", "nanmedian", "mode", "kthvalue", "topk")  # they hold indices
    for result in results[1:] if last else results if picked or ctx.operation.startswith("arg") else ():
        vars(result)["slim_picked"] = [(axes[dim], picked or "a unit's number is used") for dim in reduced]


@rule_of("constant_pad_nd")
def pad(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Padding adds units before and after those of an axis, and is always kept."""
    axes = ctx.axes(args[0])
    amounts = [int(amount) for amount in args[1]]
    for i in range(len(amounts) // 2):
        ids, (before, after) = axes[-1 - i], amounts[2 * i : 2 * i + 2]
        if min(before, after) < 0:
            ctx.pin(ids, "is cropped")
            axes[-1 - i] = None
        elif ids is not None and before + after:
            first, last = ctx.labels.fresh(before), ctx.labels.fresh(after)
            ctx.pin(np.concatenate([first, last]), "is padding")
            axes[-1 - i] = np.concatenate([first, ids, last])
    ctx.label(out, axes, ctx.origin(args[0]))


@rule_of(
    "zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full",
    "scalar_tensor", "new_empty_strided", "empty_strided", "empty_permuted", "randint", "randperm", "linspace",
    "logspace", "eye", "arange",
)  # fmt: skip
def factory(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """An axis of a new tensor follows the size that was asked for; if values depend on their position, in order."""
    asked = ctx.call.name.removeprefix("new_") in ("new", ctx.operation.removeprefix("new_"))
    like = ctx.call.args[0] if ctx.call.name.rstrip("_") in ("pad", "feature_dropout", "feature_alpha_dropout") else out
    given = tree_leaves((list(ctx.call.args), dict(ctx.call.kwargs))) if asked else []
    if asked and ctx.operation == "arange":
        names = ("start", "end", "step") if len(ctx.call.args) > 1 else ("end",)
        ends = {"start": 0, "step": 1, **ctx.call.kwargs, **dict(zip(names, ctx.call.args, strict=False))}
        start, end, step = ends["start"], ends["end"], ends["step"]
        given = [end if (start, step) == (0, 1) else -((start - end) // step)]
    numbers = [size for size in given if type(size) in (int, TracedInt)]
    runs = (numbers[at : at + out.ndim] for at in range(len(numbers)))
    sizes = next((run for run in runs if [*map(int, run)] == [*out.shape]), None)
    if sizes is None:  # of `eye`, or of another layout
        by_value = {int(size): size for size in numbers if isinstance(size, TracedInt)}
        sizes = [by_value.get(units) for units in map(int, out.shape)]
    axes: list[Ids | None] = []
    for units, known, own, size in zip(out.shape, like.shape, ctx.axes(like), sizes, strict=True):
        ids = own if units == known else None
        if isinstance(size, TracedInt):
            if ctx.operation != "randperm":
                ids = size.expression.value if size.expression.kind == "size" else ctx.labels.fresh(int(units))
            ctx.constrain(size, ids, int(units))
            if ids is not None and ctx.operation in ("linspace", "logspace", "eye", "arange"):
                ctx.labels.order(ids)
        axes.append(ids)
    ctx.label(out, axes, "constant")


# -- channels are mixed by weights, or normalized in groups
@rule_of("mm", "bmm", "mv", "dot", "vdot", "addmm", "baddbmm", "addmv", "_sparse_addmm")
def product(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Matrix product, to which an addend may be added."""
    *addends, first, second = args
    a, b = ctx.axes(first), ctx.axes(second)
    weights = [ctx.origin(tensor) == "weights" for tensor in (first, second)]
    ctx.multiply(int(out.numel()) * int(first.shape[-1]), [*a, b[-1] if len(b) > 1 else None])
    if not any(weights):  # such as queries times keys, then a softmax of that times values
        factors, own = ctx.factors.setdefault(ctx.module, []), [ids for ids in b if ids is not None]
        ctx.attended += [*factors, *own] if factors and ctx.module in ctx.weighting else []
        factors += own
    ctx.contract(first, a[-1], second, b[-2 if len(b) > 1 else -1])
    batch = [ctx.merge(x, y) for x, y in zip(a[:-2], b[:-2], strict=True)]
    result = [*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else [])]
    moved = ctx.origin(second if ctx.is_features(second) else first)  # attention weights move the values, for one
    origin = "weights" if all(weights) else "made" if any(weights) else moved
    if origin == "made" and any(weights):
        for ids in (b[-1:] if len(b) > 1 else []) if weights[1] else a[-2:-1]:
            ctx.produce(ids)
    for bias in addends if kwargs.get("beta") != 0 else ():
        for i, ids in enumerate(reversed(ctx.axes(bias)), 1):
            if bias.shape[-i] != 1:
                result[-i] = ctx.merge(result[-i], ids)
    ctx.label(out, result, origin)


@rule_of("convolution", "_convolution")
def convolution(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """A convolution is slimmed within each of its groups; a depthwise one loses whole groups."""
    (source, weight, bias), transposed, groups = args[:3], bool(args[6]), int(args[8])
    x, w = ctx.axes(source), ctx.axes(weight)
    space = list(x[2:])
    strides, paddings = (list(sizes) * (1 if len(sizes) > 1 else len(space)) for sizes in args[3:5])  # "valid" is [0]
    for i, (kernel, stride, padding) in enumerate(zip(weight.shape[2:], strides, paddings, strict=True)):
        if (kernel, stride, padding) == (1, 1, 0):  # units along this axis are not mixed
            continue
        ids = space[i]
        if ids is not None and out.shape[2 + i] == source.shape[2 + i]:  # attention over neighbouring channels
            ctx.labels.order(ids)
            ctx.meet(ids)
        else:
            ctx.pin(ids, "is a spatial axis of a convolution")
            space[i] = None
    for ids in w[2:]:
        ctx.pin(ids, "is the kernel of a convolution")
    inner, result = (w[0], w[1]) if transposed else (w[1], w[0])
    if groups == 1:
        ctx.consume(x[1], inner)
    else:
        result = _grouped(ctx, args, out, transposed, groups)
    ctx.produce(result)
    places = source if transposed else out
    ctx.multiply(int(places.numel() // places.shape[1]) * int(weight.numel()), [x[0], *w, *space])
    if bias is not None:
        result = ctx.merge(result, ctx.axes(bias)[0])
    ctx.label(out, [x[0], result, *space], "made")


def _grouped(ctx: Context, args: Args, out: Tensor, transposed: bool, groups: int) -> Ids | None:
    x, w = ctx.axes(args[0])[1], ctx.axes(args[1])
    each_in, each_out = int(args[0].shape[1]) // groups, int(out.shape[1]) // groups
    if transposed:
        x, inner_each = ctx.merge(x, w[0]), None
        outer = None if w[1] is None else spread(w[1], groups, 1)
    else:
        inner_each, outer = w[1], w[0]
    given = ctx.call.argument(6, "groups")
    follows = isinstance(given, TracedInt) and given.expression.kind != "constant"
    if each_in == 1 and each_out >= 1 and follows and x is not None:  # depthwise
        made_of = spread(x, 1, each_out)
        outer = ctx.merge(made_of if transposed else outer, made_of)  # transposed, all groups share the output axis
        ctx.constrain(given, x, groups)
        return outer
    ctx.constrain(given, None, groups)
    if x is not None:
        block = x.reshape(groups, each_in)
        ctx.labels.merge_rows(block.T)
        if each_in == 1:
            ctx.pin(x, "every group reads one unit")
        else:
            ctx.consume(block[0], block[0] if transposed else inner_each)
    else:
        ctx.consume(None, inner_each)
    if outer is not None:
        ctx.labels.merge_rows(outer.reshape(groups, each_out).T)
        if each_out == 1:
            ctx.pin(outer, "every group makes one unit")
    return outer


@rule_of("native_group_norm")
def group_norm(ctx: Context, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Channels are (groups, n): whole groups go if every width keeps a whole number of them, else units of each."""
    source, groups = args[0], int(args[6])
    axes = ctx.axes(source)
    axes[1] = ctx.merge(axes[1], *(ctx.axes(tensor)[0] for tensor in tensors(args[1:3])))
    if axes[1] is not None and groups > 1:
        given = ctx.call.argument(1, "num_groups")
        carried = ctx.split(axes[1], (groups, len(axes[1]) // groups), [groups if given is None else given, None])
        ctx.constrain(given, carried[0], groups)
    for ids in axes[1:]:
        ctx.meet(ids)
    ctx.label(tensors(out)[0], axes, ctx.origin(source))


def attention(ctx: Context, call: Call, out: Tensor) -> None:
    """Scaled dot-product attention as one operation: batches and heads agree, queries and keys share their units."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    query, key, value, mask, _, causal = (call.argument(at, name) for at, name in enumerate(names))
    q, k, v = ctx.axes(query), ctx.axes(key), ctx.axes(value)
    batch = []
    for i in range(query.ndim - 2):
        alike = query.shape[i] == key.shape[i] == value.shape[i]
        for ids in () if alike else (q[i], k[i], v[i]):  # grouped queries
            ctx.pin(ids, "queries and keys have different numbers of heads")
        batch.append(ctx.merge(q[i], k[i], v[i]) if alike else None)
    ctx.contract(query, q[-1], key, k[-1])
    ctx.merge(k[-2], v[-2])
    if causal:
        for ids in (q[-2], k[-2]):
            ctx.pin(ids, "the order of the units matters")
    ctx.attended.extend(ids for ids in (*k, *v) if ids is not None)
    for axis in (q[-1], v[-1]):  # queries times keys, then the resulting weights times values
        macs = int(out.numel() // out.shape[-1]) * int(key.shape[-2])
        ctx.multiply(macs * int((query if axis is q[-1] else value).shape[-1]), [*batch, q[-2], k[-2], axis])
    if isinstance(mask, Tensor):
        for i, ids in enumerate(reversed([*batch, q[-2], k[-2]][-mask.ndim :]), 1):
            if mask.shape[-i] != 1:
                ctx.merge(ids, ctx.axes(mask)[-i])
    ctx.label(out, [*batch, q[-2], v[-1]], ctx.origin(value))


# -- axes are moved, folded, split, joined or indexed
def _blocks(source: Sequence[int], target: Sequence[int]) -> Iterator[tuple[Ids, Ids]]:
    """Return the shortest runs of source and target axes with equal products; axes of size 1 belong to no run."""
    left, right = ([i for i, n in enumerate(shape) if n > 1] for shape in (source, target))
    before, after = np.cumprod([source[i] for i in left]), np.cumprod([target[i] for i in right])
    _, ends, others = np.intersect1d(before, after, return_indices=True)
    return zip(np.split(left, ends[:-1] + 1), np.split(right, others[:-1] + 1), strict=True)


def _size_arguments(ctx: Context, names: set[str], out: Tensor) -> list[Any]:
    """Return the size argument of each output axis as the caller passed it, or None if there was none."""
    nothing: list[Any] = [None] * out.ndim
    if ctx.call.name not in names:
        return nothing
    if ctx.call.name.endswith("_as"):
        return [ctx.size(ctx.call.args[1], axis) for axis in range(out.ndim)]
    given = list(ctx.call.args[1:]) + [v for k, v in ctx.call.kwargs.items() if k in ("size", "shape", "sizes")]
    if ctx.call.name == "unflatten":
        dim, sizes = given if len(given) == 2 else (ctx.call.kwargs["dim"], given[0])
        front = int(dim) % (out.ndim - len(sizes) + 1)
        return nothing[:front] + list(sizes) + nothing[front + len(sizes) :]
    sizes = list(given[0]) if len(given) == 1 and isinstance(given[0], (list, tuple)) else given
    return sizes if len(sizes) == out.ndim and all(isinstance(size, int) for size in sizes) else nothing


@rule_of("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "unsqueeze", "squeeze")
def view(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Fold and split blocks of axes; those of size 1 come and go."""
    source = args[0]
    sizes = _size_arguments(ctx, {"view", "reshape", "unflatten", "view_as", "reshape_as"}, out)
    before, after = ctx.axes(source), [None] * out.ndim  # type: list[Ids | None], list[Ids | None]
    if out.dtype != source.dtype or (out.numel() == 0 and "squeeze" not in ctx.operation):  # blocks cannot be told
        return unknown(ctx, args, kwargs, out)
    shape = getattr(source, "slim_shape", source.shape)  # that before squeeze_ or unsqueeze_
    for a, b in _blocks(shape, out.shape):
        ids = ctx.fold([before[i] for i in a], [shape[i] for i in a])
        if ids is not None:
            parts = [ids] if len(b) == 1 else ctx.split(ids, [out.shape[i] for i in b], [sizes[i] for i in b])
            for axis, labels in zip(b, parts, strict=True):
                after[axis] = labels
    for axis, size in enumerate(sizes):
        if size is not None and int(size) != -1 and out.shape[axis] > 1:
            ctx.constrain(size, after[axis], out.shape[axis])
    return ctx.label(out, after, ctx.origin(source))


@rule_of("permute", "transpose", "t")
def permute(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    axes = ctx.axes(args[0])
    if ctx.operation == "permute":
        axes = [axes[dim] for dim in args[1]]
    elif axes:
        a, b = args[1:3] or (0, -1)
        axes[a], axes[b] = axes[b], axes[a]
    ctx.label(out, axes, ctx.origin(args[0]))


@rule_of("expand", "repeat")
def expand(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Repeat along an axis: a single unit becomes any number of them, several are tiled."""
    source = args[0]
    sizes = _size_arguments(ctx, {"expand", "expand_as", "broadcast_to", "repeat"}, out)
    axes = [None] * (out.ndim - source.ndim) + ctx.axes(source)
    old = [1] * (out.ndim - source.ndim) + list(source.shape)
    for axis, size in enumerate(sizes):
        if old[axis] == out.shape[axis]:
            continue
        ids = axes[axis]
        if ids is not None:
            axes[axis] = spread(ids, out.shape[axis] // old[axis], 1)
        elif old[axis] == 1:
            axes[axis] = ctx.labels.fresh(out.shape[axis])
            if size is not None and int(size) != -1:
                ctx.constrain(size, axes[axis], out.shape[axis])
    constant = all(ids is None for ids in ctx.axes(source)) and ctx.origin(source) != "weights"
    ctx.label(out, axes, "constant" if constant else ctx.origin(source))


def _dim(ctx: Context, args: Args, kwargs: Kwargs, axes: int) -> int:
    """Return the argument `dim` of the operation, on `axes` axes, as a number from 0."""
    return int(arguments(ctx.schema, args, kwargs)["dim"]) % axes


@rule_of("cat", "stack")
def join(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Join along an axis, or along a new one; pieces without labels keep their size."""
    stacked = ctx.operation == "stack"
    pieces = [piece for piece in args[0] if stacked or piece.ndim == out.ndim]
    dim = _dim(ctx, args, kwargs, out.ndim)
    rows = [ctx.axes(piece) for piece in pieces]
    along = [] if stacked else [row.pop(dim) for row in rows]
    axes = [ctx.merge(*each) for each in zip(*rows, strict=True)]
    axes.insert(dim, None)
    if any(ids is not None for ids in along):
        for i, piece in enumerate(pieces):
            if along[i] is None:
                along[i] = ctx.labels.fresh(piece.shape[dim])
                ctx.pin(along[i], "is joined as it is")
        axes[dim] = np.concatenate([ids for ids in along if ids is not None])
    fixed = all(ctx.origin(piece) == "weights" for piece in pieces)
    origins = {ctx.origin(piece) for piece in pieces if ctx.is_features(piece)} or {"weights" if fixed else "constant"}
    ctx.label(out, axes, origins.pop() if len(origins) == 1 else None)


@rule_of("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes", "split_copy")
def split(ctx: Context, args: Args, kwargs: Kwargs, out: Sequence[Tensor]) -> None:
    """Cut along an axis: equal pieces shrink alike, unequal ones each by its own size."""
    source, pieces = args[0], [None] * len(out)  # type: Tensor, list[Ids | None]
    axes, dim = ctx.axes(source), _dim(ctx, args, kwargs, source.ndim)
    if (ids := axes[dim]) is not None:
        cuts = np.split(ids, np.cumsum([piece.shape[dim] for piece in out])[:-1])
        pieces = list(cuts)
        alike = len(set(map(len, cuts))) == 1
        if alike:
            ctx.merge(*cuts)
        else:
            ctx.labels.roles.extend(cuts)
        if ctx.call.name.removeprefix("unsafe_") in ("split", "split_with_sizes"):
            given = ctx.call.args[1] if len(ctx.call.args) > 1 else next(iter(ctx.call.kwargs.values()))
            sizes = list(given) if isinstance(given, (list, tuple)) else [given] * len(out)
            for size, part in zip(sizes, cuts, strict=False):
                ctx.constrain(size, part if len(part) > 1 else None, len(part))
        elif ctx.call.name == "chunk":
            for part in cuts[:-1]:  # each but the last has ceil(size / chunks) units
                ctx.constrain(-(-ctx.size(source, dim) // len(out)), part, len(part))
        elif not alike:
            ctx.pin(ids, f"is cut into {[len(part) for part in cuts]}")
    for piece, labels in zip(out, pieces, strict=True):
        ctx.label(piece, [labels if i == dim else other for i, other in enumerate(axes)], ctx.origin(source))


@rule_of("glu")
def glu(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """The second half of an axis gates the first."""
    axes, dim = ctx.axes(args[0]), _dim(ctx, args, kwargs, out.ndim)
    if (ids := axes[dim]) is not None:
        axes[dim] = ctx.merge(*np.split(ids, 2))
    ctx.label(out, axes, ctx.origin(args[0]))


@rule_of("slice", "narrow")
def cut(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Take a range of an axis; if it is labelled, the ends of the range must follow the units before them."""
    axes, dim = ctx.axes(args[0]), _dim(ctx, args, kwargs, args[0].ndim)
    if (ids := axes[dim]) is not None:
        start, stop, step = slice(*[*args[2:], None, None, None][:3]).indices(len(ids))
        if step == 1:
            _follow_ends(ctx, ids, start, stop)
        elif start >= step or len(ids) % step or stop < len(ids) - step + 1:
            ctx.pin(ids, f"every {step}th unit from {start} to {stop} is taken")
        else:
            ctx.labels.merge_rows(ids.reshape(-1, step))
        axes[dim] = ids[start:stop:step]
    ctx.label(out, axes, ctx.origin(args[0]))


def _follow_ends(ctx: Context, ids: Ids, start: int, stop: int) -> None:
    units = len(ids)
    for end, at, outermost in zip(_ends_in_call(ctx, start, stop, units), (start, stop), (0, units), strict=True):
        if at != outermost and end is not None and int(end) < 0:
            ctx.constrain(-end, ids[at:], units - at)
        elif at != outermost or ctx.call.name == "narrow":  # which does not cut off what is beyond the end
            ctx.constrain(at if end is None else end, ids[:at], at)
    if stop - start < units:
        ctx.labels.roles.extend(piece for piece in (ids[:start], ids[start:stop], ids[stop:]) if len(piece))


def _ends_in_call(ctx: Context, start: int, stop: int, units: int) -> tuple[Any, Any]:
    if ctx.call.name == "narrow":
        first = ctx.call.argument(2, "start")
        return first, first + ctx.call.argument(3, "length")
    if ctx.call.name in ("__getitem__", "__setitem__"):
        index = ctx.call.args[1]
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, slice) and part.indices(units) == (start, stop, 1):
                return part.start, part.stop
    return None, None


@rule_of("as_strided", "resize", "set")
def as_strided(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """A change of memory layout alone keeps the labels."""
    if out.shape != args[0].shape or ctx.call.name == "as_strided":
        return unknown(ctx, args, kwargs, out)
    return ctx.label(out, ctx.axes(args[0]), ctx.origin(args[0]))


@rule_of("index_select", "gather")
def pick_by_index(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Read units of an axis at indices: one list of them, or one for each place."""
    source, chosen, each = args[0], args[2], ctx.operation == "gather"
    axes, picked = ctx.axes(source), ctx.axes(chosen)
    dim = args[1] % max(source.ndim, 1)
    for i, ids in enumerate(axes):
        if i != dim and each and source.shape[i] == chosen.shape[i]:
            axes[i] = ctx.merge(ids, picked[i])
        elif i == dim or each:
            ctx.pin(ids, "is indexed" if i == dim else "is read in part")
            axes[i] = picked[i if each else 0] if picked else None
    ctx.label(out, axes, ctx.origin(source))


@rule_of("pixel_shuffle", "pixel_unshuffle", "im2col", "col2im", "channel_shuffle", "native_channel_shuffle")
def blocks_of_channels(ctx: Context, args: Args, kwargs: Kwargs, out: Tensor) -> None:
    """Turn each input channel into a block of output channels, or the reverse, or shuffle them."""
    axes, shuffled = ctx.axes(args[0]), "channel_shuffle" in ctx.operation
    channel = 1 if shuffled else len(axes) - (2 if ctx.operation == "col2im" else 3)
    ids, rest, after = axes[channel], axes[channel + 1 :], int(out.shape[channel])
    if not shuffled:
        for space in rest:
            ctx.pin(space, "is cut into blocks")
        rest = [None] * (out.ndim - channel - 1)
    if ids is not None and after > len(ids):
        ids = spread(ids, 1, after // len(ids))
    elif ids is not None:
        block = ids.reshape(args[1], -1).T if shuffled else ids.reshape(after, -1)  # (groups, n) -> (n, groups)
        ctx.labels.merge_rows(block)
        ids = block.reshape(-1) if shuffled else block[:, 0]
    ctx.label(out, [*axes[:channel], ids, *rest], ctx.origin(args[0]))
