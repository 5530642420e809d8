"""The trace of a model: one run on fake tensors in which every operation moves or merges channel labels."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from traceback import extract_tb
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimmable._inputs import named_tensors, output_tensors, tensors
from slimmable._modules import is_under, size_axes, swapped, tensors_of
from slimmable._reach import RECURRENT, written
from slimmable._tables import listed
from slimmable.analysis import _rules
from slimmable.analysis._rules import RULES as RULES, Call, Context as Context, ModuleCall
from slimmable.analysis.fake import FakeModel
from slimmable.analysis.integers import Attribute, Expression, TracedInt, size_of
from slimmable.analysis.labels import Ids
from slimmable.analysis.plan import Output
from slimmable.errors import ConversionError, RuleError, TraceError

Skip = Callable[[str, nn.Module], bool | str]  # whether a module stays full; a string is the reason
Outputs: TypeAlias = "str | Sequence[str] | Mapping[str | int, str]"
"""What becomes of the outputs: "auto", "full" or "slim" for all of them, by position, or by name or position."""


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies the rule of every ATen operation."""

    def __init__(self, context: Context, fake: FakeModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.context, self.fake, self.asleep = context, fake, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.asleep and func.namespace != "prim":
            results = out if tensors(out) else written(func._schema, args, kwargs)
            name = func._schema.name.removeprefix("aten::").rstrip("_")  # in place, that of its counterpart
            self.context.at(name, self.fake.running)
            operands = tensors((args, kwargs))
            self.context.use(operands)
            if tensors(results):
                self.context.schema = func._schema
                other = _rules.pointwise if torch.Tag.pointwise in func.tags else _rules.unknown
                reads, residuals = len(self.context.reads), len(self.context.residuals)
                try:
                    RULES.get(name, other)(self.context, args, kwargs, results)
                except RuleError:
                    raise
                except Exception as error:  # a fault of ours, for which the model still converts
                    fault = f"its rule fails ({type(error).__name__}: {error}); please report this"
                    _rules.unknown(self.context, args, kwargs, results, fault)
                for result in tensors(results) if func._schema.is_mutable else ():
                    self.context.wrote(result)
                read = [ids for _, ids in self.context.reads[reads:]]
                summed = any("slim_summed" in vars(each) for each in operands)
                self.context.streams += read if summed else []
                for result in tensors(results) if not read and (summed or self.context.residuals[residuals:]) else ():
                    vars(result)["slim_summed"] = True
        return out


class _Calls(TorchFunctionMode):
    """Records the Python-level call, returns traced sizes, and treats attention as one operation."""

    def __init__(self, context: Context, operations: _Operations) -> None:
        super().__init__()
        self.context, self.operations = context, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.shape.__get__ or name in ("size", "numel"):  # type: ignore[attr-defined]
            dims = args[1:] or tuple(kwargs.values())
            if dims and dims[0] is not None:
                return self.context.size(args[0], int(dims[0]))
            sizes = [self.context.size(args[0], axis) for axis in range(args[0].ndim)]
            return math.prod(sizes) if name == "numel" else torch.Size(sizes)
        self.context.at(name, self.operations.fake.running)
        if name == "scaled_dot_product_attention":
            with swapped([(vars(self.operations), "asleep", True)]):
                out = func(*args, **kwargs)
            _rules.attention(self.context, Call(name, args, kwargs), out)
            return out
        alike = name == "masked_scatter" and len(args) == 3 and args[2].shape[-1:] == args[0].shape[-1:] != ()
        if alike and (args[1].stride()[-1:] == (0,) or args[1].shape[-1:] == (1,)):  # rows take the places of rows
            return torch.where(args[1], args[2].reshape(-1, args[2].shape[-1])[0], args[0])
        if name in RECURRENT and isinstance(args[3], bool):
            self.context.pin(self.context.axes(args[0])[int(args[-1])], "are steps of a recurrent layer")
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            self.context.at("data", self.operations.fake.running)
            self.context.pin_all(args[:1], "the forward replaces its data")
        if name in ("layer_norm", "rms_norm") and isinstance(args[1], (list, tuple)):
            for axis, size in zip(range(-len(args[1]), 0), args[1], strict=True):
                if (units := int(args[0].shape[axis])) > 1:
                    self.context.constrain(size, self.context.axes(args[0])[axis], units)
        with swapped([(vars(self.context), "call", Call(name, args, kwargs))]):
            return func(*args, **kwargs)


def trace(fake: FakeModel, widths: tuple[float, ...], skip: Skip, choices: dict[int, int], outputs: Outputs) -> Context:
    """Run `fake` once and return the labels of all parameters, buffers and outputs, and what else that has found."""
    context = Context(widths, choices)
    _label_tensors(fake, context, skip)
    operations = _Operations(context, fake)

    def pin(operation: str, why: str, read: Sequence[Tensor]) -> None:
        context.at(operation, fake.running)
        context.pin_all(read, why)

    def note_call(path: str, args: Any, out: Any) -> None:
        source = args[0] if args and isinstance(args[0], Tensor) else None
        axes = [] if source is None else context.axes(source)
        context.calls.setdefault(path, []).append(ModuleCall(source, axes, out))

    noted = swapped([(vars(fake), "on_read", pin), (vars(fake), "on_call", note_call)])
    with noted, _traced_attributes(fake.model, context):
        try:
            output = fake.run(operations, _Calls(context, operations))
        except RuleError:
            raise
        except Exception as error:
            raise _failed(fake, context, error) from error
        untouched = context.labels.untouched()
        units = ([ids for ids in axes if ids is not None] for axes in context.tensors.values())
        if any(axes and untouched[np.concatenate(axes)].all() for axes in units):
            _follow_training(fake, context, operations, outputs)
    _follow_sizes(fake, context)
    for cache in ((path, name) for path, names in fake.reach.caches.items() for name in names):
        context.tensors.pop(cache, None)
    context.at("output", "")
    context.use(output_tensors(output))
    label_outputs(context, fake.model, named_tensors(output), "full" if skip("", fake.model) else outputs)
    return context


def _follow_training(fake: FakeModel, context: Context, operations: _Operations, outputs: Outputs) -> None:
    """Run as in training, for what only that reads, such as an auxiliary classifier, unless it needs other inputs."""
    products = len(context.products)
    with suppress(Exception), swapped([(vars(fake), "on_call", FakeModel.on_call)]), fake.in_training():
        output = named_tensors(fake.run(operations, _Calls(context, operations)))
        label_outputs(context, fake.model, output, outputs if isinstance(outputs, str) else "auto")
    del context.products[products:], context.outputs[:]


def _follow_sizes(fake: FakeModel, context: Context) -> None:
    """Require the size attributes of torch's layers that the forward's code names to follow the weights."""
    for path, module in fake.model.named_modules():
        for name, axis in size_axes(module).items() if module._parameters.get("weight") is not None else ():
            key = (path, name, ())
            if name in fake.reach.names and key in context.attributes:
                size = size_of(context.tensors[path, "weight"][axis], module.weight.shape[axis])
                if axis and "groups" in vars(module):
                    size = Expression("mul", (size, Expression("attribute", (path, "groups", ()))))
                context.at(f"reading {name}", path)
                context.on_equal(Expression("attribute", key), size)


def _failed(fake: FakeModel, context: Context, error: Exception) -> TraceError:
    path = fake.running
    asks = isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))
    why = "it asks for numbers that depend on weights or on the first input" if asks else str(error).strip()[:400]
    inside = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
    frames = extract_tb(error.__traceback__)
    at = [each for each in frames if "nn" in Path(each.filename).parts or not each.filename.startswith(inside)][-1]
    failed = TraceError(
        f"{type(fake.model).__name__} cannot be traced: {type(error).__name__} in module "
        f"{path or '(the model itself)'!r} ({type(fake.model.get_submodule(path)).__name__}) at operation "
        f"{context.operation or '(none)'!r}: {why}\nIt is in {at.filename}, line {at.lineno}: {at.line}\n"
        "The forward runs on shapes alone: it can branch on numbers of buffers, constants, integer and boolean inputs, "
        "and all inputs but the first, not on features and weights; what topk and the like choose is assumed if the "
        "example has a row per unit. You can convert the part of the model to narrow, or pass other example_inputs."
    )
    failed.module = path
    return failed


def _label_tensors(fake: FakeModel, context: Context, skip: Skip) -> None:
    known = set[int]()
    for path, module in fake.model.named_modules():
        skipped = skip(path, module)
        first_space = 2 if isinstance(module, nn.modules.conv._ConvNd) else 99
        for name, tensor in tensors_of(module).items():
            if id(tensor) not in known:
                known.add(id(tensor))
                sizes = enumerate(tensor.shape)
                axes = [context.labels.fresh(n) if n > 1 and axis < first_space else None for axis, n in sizes]
                if id(tensor) in fake.frozen and _is_diagonal(fake.frozen[id(tensor)]):
                    axes[1] = axes[0]
                context.label(tensor, axes, "weights")
                context.labels.roles.extend(ids for ids in axes if ids is not None)
            context.tensors[path, name] = context.axes(tensor)
            if skipped:
                context.at(skipped if isinstance(skipped, str) else "skip", path)
                context.pin_all([tensor])


def _is_diagonal(weight: nn.Parameter) -> bool:
    """Tell whether a weight only scales each channel, as frozen ones that normalize colours do."""
    known = type(weight) is nn.Parameter and not weight.is_meta and weight.dtype.itemsize > 1
    if not known or weight.ndim < 2 or weight.shape[0] != weight.shape[1]:
        return False
    filled = weight.bool()
    return bool(filled.count_nonzero() == filled.diagonal().count_nonzero())


def _traced_attributes(model: nn.Module, context: Context) -> AbstractContextManager[None]:
    """Replace the integer attributes of all modules with traced ones while the block runs."""
    new: list[tuple[dict[str, Any], str, Any]] = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) in (int, tuple, list, torch.Size) and value:
                new.append((vars(module), name, _traced(value, (path, name, ()), context)))
    return swapped(new)


def _traced(value: Any, key: Attribute, context: Context) -> Any:
    if type(value) is int:
        context.attributes[key] = value
        return TracedInt(value, Expression("attribute", key), context.on_equal)
    if type(value) in (tuple, list, torch.Size):
        parts = [_traced(part, (*key[:2], (*key[2], i)), context) for i, part in enumerate(value)]
        return type(value)(parts) if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    return value


# -- outputs: which keep their size (class scores, images, embeddings), and which get thinner (features)
def label_outputs(context: Context, model: nn.Module, named: Sequence[tuple[str, Tensor]], wanted: Outputs) -> None:
    """Note the outputs, and pin those that keep their size, as `slimify` says."""
    labels, backbones = context.labels, _backbones(model, context.calls)
    classes = {path: vars(module).get("num_classes") for path, module in model.named_modules()}
    inner = {
        "features of a residual stream": labels.roots(*context.residuals) & labels.roots(*context.streams),
        "keys and values of an attention": labels.roots(*context.attended),
    }

    def features(origin: str | None, ids: Ids) -> str:
        """Return why these units get thinner, or "" if they stay."""
        own = labels.roots(ids)
        makers = {path for path, made in context.producers if own & labels.roots(made)}
        sized = [path for path, count in classes.items() if count == len(ids)]
        sized += [""] if vars(model).get("out_channels") == len(ids) else []
        if any(not path or is_under(maker, path) for path in sized for maker in makers):
            return ""  # class scores, which SqueezeNet rectifies
        if any(not path or all(is_under(maker, path) for maker in makers) for path in backbones):
            return "features of a timm model without its classifier"
        for why, roots in inner.items():
            if own & roots:
                return why
        return "" if origin == "made" else "features, rectified or combined after the layer that made them"

    names = [name or "output" for name, _ in named]
    for name, (_, tensor), kind in zip(names, named, _kinds(wanted, names), strict=True):
        context.at(f"output {name}" if len(names) > 1 else "output", "")
        axes = context.axes(tensor)
        slim: dict[str, None] = {}
        for ids in axes:
            if ids is not None and labels.produced(ids).any():
                why = features(context.origin(tensor), ids) if kind == "auto" else "as asked"
                if kind == "full" or not why:
                    context.pin(ids, why or "class scores, an image or an embedding")
                else:
                    slim[why] = None
        context.outputs.append(Output(name, tuple(tensor.shape), tuple(axes), ", ".join(slim)))


def _kinds(wanted: Outputs, names: Sequence[str]) -> list[str]:
    given = {"*": wanted} if isinstance(wanted, str) else wanted
    if not isinstance(given, Collection):
        raise ConversionError(f"outputs is {wanted!r}; it must be 'auto', 'full' or 'slim', or say so for each output")
    positions = list(dict.fromkeys(name.partition(".")[0] for name in names))
    kinds = dict.fromkeys(names, "auto")
    for key, kind in given.items() if isinstance(given, Mapping) else enumerate(given):
        if kind not in ("auto", "full", "slim"):
            raise ConversionError(f"outputs={wanted!r}: {kind!r} is unknown; use 'auto', 'full' or 'slim'")
        pattern = positions[key] if isinstance(key, int) and 0 <= key < len(positions) else str(key)
        matching = [name for name in names if is_under(name, pattern)]
        if not matching and key != "*":
            known = listed([*map(repr, names)])
            raise ConversionError(f"outputs={wanted!r}: this model has no output {key!r}; it has {known}")
        kinds |= dict.fromkeys(matching, kind)
    return [kinds[name] for name in names]


def _backbones(model: nn.Module, called: Collection[str]) -> list[str]:
    """Return the paths of timm models that have no classifier, or ran without it."""
    names = {module: path for path, module in model.named_modules()}
    found = []
    for module, path in names.items():
        if hasattr(vars(module).get("feature_info"), "out_indices"):
            found.append(path)
        elif hasattr(module, "pretrained_cfg") and callable(getattr(module, "get_classifier", None)):
            heads: list[Any] = []
            with suppress(AttributeError):  # some without one look for its layer
                heads = tree_leaves(module.get_classifier())
            layers = [m for head in heads if isinstance(head, nn.Module) for m in head.modules() if m._parameters]
            if not any(names.get(layer) in called for layer in layers):
                found.append(path)
    return found
