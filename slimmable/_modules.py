"""Modules of any class: match, replace and copy them, switch them for a while, subclass unnoticed; add-ons to them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.distributions import Distribution

M = TypeVar("M", bound=nn.Module)
_ABSENT = object()


def is_under(name: str, pattern: str) -> bool:
    """Tell whether a module's name, or that of a module above it, is this one or matches it as an `fnmatch` pattern."""
    parts = name.split(".")
    heads = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return pattern in heads or any(fnmatchcase(head, pattern) for head in heads)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put all of `model` into evaluation mode while the block runs, then restore each module's own mode."""
    with swapped([(vars(module), "training", module.training) for module in model.modules()]):
        model.eval()
        yield


@contextmanager
def swapped(new: Sequence[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Put values into dicts, each given as a dict, a key and the value, while the block runs."""
    before = [(store, name, store.get(name, _ABSENT)) for store, name, _ in new]
    try:
        for store, name, value in new:
            store[name] = value
        yield
    finally:
        for store, name, value in before:
            if value is _ABSENT:
                store.pop(name, None)
            else:
                store[name] = value


def trust_distributions(after: ExitStack) -> None:
    """Keep distributions from checking, and so from branching on, the numbers of their parameters, until `after`."""
    after.callback(Distribution.set_default_validate_args, Distribution._validate_args)
    Distribution.set_default_validate_args(False)


def walk(modules: Iterable[nn.Module], enters: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """Yield each of `modules`, and each module in one that `enters` accepts, once, in the order of `Module.modules`."""
    seen: set[nn.Module] = set()
    pending = list(modules)[::-1]
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            yield module
            if enters(module):
                pending += list(module.children())[::-1]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters and buffers, and its plain tensors of floats, such as a position table."""
    owned = {**module._parameters, **module._buffers}
    plain = {name: value for name, value in vars(module).items() if type(value) is Tensor and value.is_floating_point()}
    return {name: tensor for name, tensor in owned.items() if tensor is not None} | plain


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> nn.Module:
    """Replace modules, given by `id`, wherever they occur; return the root."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and id(child) in new:
                module._modules[name] = new[id(child)]
    return new.get(id(model), model)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Give all modules back the classes and attributes that they had if the block fails."""
    before = []
    for module in model.modules():
        dicts = [each for each in (vars(module), *vars(module).values()) if isinstance(each, dict)]
        before.append((module, type(module), [(each, each.copy()) for each in dicts]))
    try:
        yield
    except BaseException:
        for module, kind, copies in before:
            module.__class__ = kind
            for each, entries in copies:
                each.clear()
                each.update(entries)
        raise


def unannounced(base: type[nn.Module], body: dict[str, Any], *mixins: type) -> type[nn.Module]:
    """Return a subclass of `base`, with mixins before it, that no `__init_subclass__` puts into a registry."""
    # modules can be given the class if its first base with attributes follows the same one without, such as `ABC`
    root: type = base
    while root.__base__ is not None and root.__base__.__dictoffset__:
        root = root.__base__
    own = {"__init_subclass__": classmethod(lambda cls, **kwargs: None), "__module__": __name__, "__orig_bases__": ()}
    quiet = type("_Unannounced", (root.__base__ or object,), own)
    as_base = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (quiet, *mixins, base), as_base | body)


def twin_of(module: nn.Module, kind: type[M]) -> M:
    """Return a module of class `kind` with the same Parameters, buffers, settings, hooks and training flag."""
    twin = kind.__new__(kind)
    for name, value in module.__dict__.items():  # copies the dicts and sets of parts and hooks
        twin.__dict__[name] = value.copy() if isinstance(value, (dict, set)) else value
    return twin


def size_axes(module: nn.Module) -> dict[str, int]:
    """Return attribute -> axis of the weight; axis 1 of a convolution's is the attribute divided by `groups`."""
    if isinstance(module, nn.Linear):
        return {"out_features": 0, "in_features": 1}
    if isinstance(module, nn.modules.conv._ConvNd):
        return {"in_channels": 0, "out_channels": 1} if module.transposed else {"out_channels": 0, "in_channels": 1}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"embedding_dim": 1}
    if isinstance(module, nn.PReLU) and module.num_parameters > 1:
        return {"num_parameters": 0}
    return {"num_channels": 0} if isinstance(module, nn.GroupNorm) else {}


# -- add-ons to models, such as gates: how the core, which knows none, removes them, writes them to files and restores
MODULES = {"gating": "slimmable.gating"}  # name in files -> the module that registers it
ADDONS: "dict[str, AddOn]" = {}  # those whose modules have been imported


class AddOn(NamedTuple):
    refusal: str  # why a model that has it cannot be converted, and how to remove it; follows "this ResNet"
    present: Callable[[nn.Module], bool]  # whether a model has it
    detach: Callable[[nn.Module], nn.Module]  # remove it from a model, if present, in place, and return the model
    describe: Callable[[nn.Module], tuple[nn.Module, dict[str, Any]]]  # a copy without it, and JSON data for `restore`
    restore: Callable[[nn.Module, dict[str, Any]], nn.Module]  # add it again, in place, as `describe` recorded it


def addons_of(model: nn.Module) -> dict[str, AddOn]:
    return {name: addon for name, addon in ADDONS.items() if addon.present(model)}


def detach_all(model: nn.Module) -> nn.Module:
    for addon in ADDONS.values():
        model = addon.detach(model)
    return model
