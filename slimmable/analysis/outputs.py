"""Outputs: which keep their size (class scores, images, embeddings), and which get thinner (features)."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from slimmable._modules import is_under
from slimmable._tables import listed
from slimmable.analysis._context import Context
from slimmable.analysis.channels import Output
from slimmable.analysis.labels import Ids
from slimmable.errors import ConversionError

Outputs: TypeAlias = "str | Sequence[str] | Mapping[str | int, str]"
"""What becomes of the outputs: "auto", "full" or "slim" for all of them, by position, or by name or position."""


def label_outputs(
    context: Context, model: nn.Module, named: Sequence[tuple[str, Tensor]], wanted: Outputs, called: Collection[str]
) -> list[Output]:
    """Pin the outputs that keep their size; `called` are the paths of the modules that ran.

    By default, units that layers with weights made and that were then only moved, scaled, normalized or bounded stay.
    Those of a residual stream, keys and values, all of a timm model without its classifier, and others get thinner.
    """
    labels = context.labels
    backbones = _backbones(model, called)
    classes = {path: vars(module).get("num_classes") for path, module in model.named_modules()}
    inner = {
        "features of a residual stream": labels.roots(*context.residuals) & labels.roots(*context.consumed),
        "keys and values of an attention": labels.roots(*context.attended),
    }

    def features(origin: str | None, ids: Ids) -> str:
        """Return why these units get thinner, or "" if they stay."""
        own = labels.roots(ids)
        makers = {path for path, made in context.producers if own & labels.roots(made)}
        sized = [path for path, count in classes.items() if count == len(ids)]
        if any(not path or is_inside(maker, path) for path in sized for maker in makers):
            return ""  # class scores, which SqueezeNet rectifies
        if any(not path or all(is_inside(maker, path) for maker in makers) for path in backbones):
            return "features of a timm model without its classifier"
        for why, roots in inner.items():
            if own & roots:
                return why
        return "" if origin == "made" else "features, rectified or combined after the layer that made them"

    found = []
    names = [name or "output" for name, _ in named]
    for name, (_, tensor), kind in zip(names, named, _kinds(wanted, names), strict=True):
        context.at(f"output {name}" if len(names) > 1 else "output", "")
        axes = context.axes(tensor)
        slim: dict[str, None] = {}
        for ids in axes:
            if ids is None or not labels.produced(ids).any():
                continue
            why = features(context.origin(tensor), ids) if kind == "auto" else "as asked"
            if kind == "full" or not why:
                context.pin(ids, why or "class scores, an image or an embedding")
            else:
                slim[why] = None
        found.append(Output(name, tuple(tensor.shape), tuple(axes), ", ".join(slim)))
    return found


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


def is_inside(path: str, outer: str) -> bool:
    """Tell whether a module is the outer one or inside it; as the outer one, the root only contains itself."""
    return path == outer or path.startswith(f"{outer}.")


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
