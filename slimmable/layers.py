"""Slimmable and switchable layers: torch's layers with `widths`, for networks built by hand."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimmable._checks import BY_NAME, check_flags, checked, shown
from slimmable._modules import twin_of
from slimmable._widths import Kept, check_widths, disjoint_starts, kept_of, kept_units
from slimmable.errors import ConversionError, InputError, SlimmableError
from slimmable.view.norms import SwitchableContainer, SwitchableNorm, inner_modules
from slimmable.view.state import WidthState, is_slim, units_of
from slimmable.view.view import install_view, remove_view

__all__ = [
    "SlimConv1d", "SlimConv2d", "SlimConv3d", "SlimGroupNorm", "SlimLayerNorm", "SlimLinear", "SwitchableBatchNorm",
    "SwitchableBatchNorm1d", "SwitchableBatchNorm2d", "SwitchableBatchNorm3d", "SwitchableContainer",
    "SwitchableLinear", "SwitchableNorm", "SwitchableProbe",
]  # fmt: skip

Layer = TypeVar("Layer", bound="SlimLayer")
Norm = TypeVar("Norm", bound="_SwitchableBatchNorm")
Linear = TypeVar("Linear", bound="SwitchableLinear")


class Explained(nn.Module):
    """A layer made by hand, which says what to do if it cannot read its input at the active width."""

    _slim: WidthState
    _if_full: ClassVar[str] = "use torch's own layer"

    def forward(self, input: Tensor) -> Tensor:
        """Run the layer at its active width."""
        try:
            return cast(Tensor, super().forward(input))
        except (SlimmableError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            what = f"{type(self).__name__} at width {self._slim.active.width} cannot read {shown(input)}: {error}"
            advice = f"{self._if_full}, otherwise make the layer before it slimmable too, with the same widths"
            raise InputError(f"{what}; if the input is full at every width, as images are, {advice}") from error


class SlimLayer(Explained):
    """A layer of torch that runs at several widths."""

    _slim_plain: ClassVar[type[nn.Module]]  # that it is made from and converted back to
    _install: Callable[..., None]  # takes the widths and the constructor's options

    @classmethod
    def from_plain(cls: type[Layer], module: nn.Module, widths: Iterable[float], **options: Any) -> Layer:
        """Return the slimmable twin of torch's layer, with its Parameters and training flag.

        `options` are those of the constructor, such as `slim_in`.

        Raises: ConversionError: unless it is exactly of torch's class. WidthError: as the constructor.
        """
        if type(module) is not cls._slim_plain:
            known = cls._slim_plain.__name__
            raise ConversionError(f"{cls.__name__} is made from torch's {known} only, not {module!r:.80}; use slimify")
        for name, value in options.items():
            BY_NAME.get(name, check_flags)(cls.__name__, **{name: value})
        slim = twin_of(module, cls)
        slim._install(check_widths(widths), **options)
        return slim

    def to_plain(self) -> Any:
        """Return torch's layer of the full width, which shares the Parameters."""
        twin = twin_of(self, type(self))
        remove_view(twin)
        if type(twin) is not self._slim_plain:
            raise ConversionError(f"a {type(self).__name__} has no torch twin of class {self._slim_plain.__name__}")
        return twin


class _SlimProduct(SlimLayer):
    weight: Tensor
    _if_full = "pass slim_in=False to this layer"

    def _install(self, widths: tuple[float, ...], slim_in: bool = True, slim_out: bool = True, **how: Any) -> None:
        (outs, in_size, *kernel), count = self.weight.shape, getattr(self, "groups", 1)
        out_size, groups = outs // count, [count] * len(widths)
        if in_size == 1 and count > 1 and slim_in and slim_out:  # depthwise: its groups are its channels
            kept_groups = kept_at(widths, count, 1, **how)
            groups = [len(kept or range(count)) for kept in kept_groups]
            rows = [kept and tuple(range(kept[0] * out_size, (kept[-1] + 1) * out_size)) for kept in kept_groups]
            columns = kept_at(widths, 1, 1)
        else:
            rows = kept_at(widths, out_size, count, slim_out, **how)
            columns = kept_at(widths, in_size, 1, slim_in, **how)
        weight = [(row, column, *kernel) for row, column in zip(rows, columns, strict=True)]
        cuts: dict[str, Sequence[Sequence[Kept]]] = {"weight": weight, "bias": [(row,) for row in rows]}
        install_view(self, widths, cuts, {"groups": groups} if len(set(groups)) > 1 else {})


class SlimLinear(_SlimProduct, nn.Linear):
    """`nn.Linear` that runs with part of its features: at width `w`, with the first `round(w * features)`.

    Names in the state dict are torch's; `in_features` and `out_features` are the full ones at every width.

    Shapes: (..., kept in_features) -> (..., kept out_features). Arguments: torch's, and those of `SlimConv2d`.

    >>> layer = SlimLinear(8, 4, widths=(1.0, 0.5))
    >>> slimmable.set_width(layer, 0.5)
    >>> layer, layer.weight.shape
    (SlimLinear(in_features=8, out_features=4, bias=True, widths=(1.0, 0.5), width=0.5), torch.Size([2, 4]))
    """

    _slim_plain = nn.Linear

    @checked
    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None, *,
        widths: Iterable[float], slim_in: bool = True, slim_out: bool = True, overlap: bool = True,
        rounding: str = "nearest",
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self._install(check_widths(widths), slim_in, slim_out, overlap=overlap, rounding=rounding)


class _SlimConv(_SlimProduct, nn.modules.conv._ConvNd):
    @checked
    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1, padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1, groups: int = 1, bias: bool = True, padding_mode: str = "zeros",
        device: Any = None, dtype: Any = None, *,
        widths: Iterable[float], slim_in: bool = True, slim_out: bool = True, overlap: bool = True,
        rounding: str = "nearest",
    ) -> None:  # fmt: skip
        settings: Any = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *settings)  # type: ignore[arg-type]
        self._install(check_widths(widths), slim_in, slim_out, overlap=overlap, rounding=rounding)


class SlimConv1d(_SlimConv, nn.Conv1d):
    """`nn.Conv1d` that runs with part of its channels; everything is as in `SlimConv2d`.

    >>> SlimConv1d(4, 8, 3, widths=(1.0, 0.5))
    SlimConv1d(4, 8, kernel_size=(3,), stride=(1,), widths=(1.0, 0.5), width=1.0)
    """

    _slim_plain = nn.Conv1d


class SlimConv2d(_SlimConv, nn.Conv2d):
    """`nn.Conv2d` that runs with part of its channels: at width `w`, with the first `round(w * channels)`.

    Names in the state dict are torch's; `in_channels` and `out_channels` are the full ones at every width. A depthwise
    convolution keeps its first groups. Any other grouped one keeps all groups and the first channels of each, so it
    expects an input of `groups * round(w * in_channels / groups)` channels.

    Shapes: (N, kept in_channels, H, W) -> (N, kept out_channels, H', W').

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as in torch.
        widths: distinct numbers in (0, 1] with 1.0 among them.
        slim_in: False if the input is full at every width, such as an image or a vector of measurements.
        slim_out: False if the output should be full at every width.
        overlap: False gives narrower widths disjoint channels, the first to the narrowest (SlimCLR, IJCV 2024).
        rounding: "floor" keeps the first `int(w * channels)`, but at least one, as their published code does.

    Raises: WidthError: if `widths` is invalid, or too large in total for `overlap=False`.

    >>> conv = SlimConv2d(3, 8, 3, widths=(1.0, 0.5), slim_in=False)
    >>> with slimmable.at_width(conv, 0.5):
    ...     conv(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 4, 6, 6])
    """

    _slim_plain = nn.Conv2d


class SlimConv3d(_SlimConv, nn.Conv3d):
    """`nn.Conv3d` that runs with part of its channels; everything is as in `SlimConv2d`.

    >>> SlimConv3d(4, 8, 1, widths=(1.0, 0.5))
    SlimConv3d(4, 8, kernel_size=(1, 1, 1), stride=(1, 1, 1), widths=(1.0, 0.5), width=1.0)
    """

    _slim_plain = nn.Conv3d


class SlimLayerNorm(SlimLayer, nn.LayerNorm):
    """`nn.LayerNorm` over part of the features: at width `w`, the first `round(w * n)` of the last axis.

    Shapes: (..., *normalized_shape with a narrower last axis) -> the same. Arguments: torch's and `SlimConv2d`'s.

    >>> norm = SlimLayerNorm(8, widths=(1.0, 0.5))
    >>> with slimmable.at_width(norm, 0.5):
    ...     norm(torch.randn(2, 4)).shape
    torch.Size([2, 4])
    """

    _slim_plain = nn.LayerNorm

    @checked
    def __init__(
        self, normalized_shape: int | list[int] | tuple[int, ...], eps: float = 1e-5, elementwise_affine: bool = True,
        bias: bool = True, device: Any = None, dtype: Any = None, *,
        widths: Iterable[float], rounding: str = "nearest",
    ) -> None:  # fmt: skip
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._install(check_widths(widths), rounding)

    def _install(self, widths: tuple[float, ...], rounding: str = "nearest") -> None:
        *outer, last = self.normalized_shape
        shapes = [(*outer, kept_units(last, width, rounding=rounding)) for width in widths]
        install_view(self, widths, {"weight": shapes, "bias": shapes}, {"normalized_shape": shapes})


class SlimGroupNorm(SlimLayer, nn.GroupNorm):
    """`nn.GroupNorm` over part of the channels.

    If `w * num_groups` is a whole number at every width `w`, that many first groups are kept. Otherwise all groups are
    kept, each with its first channels, and the input must have `num_groups * round(w * num_channels / num_groups)`.

    Shapes: (N, kept channels, ...) -> the same. Arguments: torch's, `widths` and `rounding` as in `SlimConv2d`.

    >>> norm = SlimGroupNorm(4, 16, widths=(1.0, 0.5))
    >>> with slimmable.at_width(norm, 0.5):
    ...     norm.num_groups, tuple(norm.weight.shape)
    (2, (8,))
    """

    _slim_plain = nn.GroupNorm

    @checked
    def __init__(
        self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True, device: Any = None,
        dtype: Any = None, *,
        widths: Iterable[float], rounding: str = "nearest",
    ) -> None:  # fmt: skip
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self._install(check_widths(widths), rounding)

    def _install(self, widths: tuple[float, ...], rounding: str = "nearest") -> None:
        size = self.num_channels // self.num_groups
        shares = [width * self.num_groups for width in widths]
        groups = [round(share) for share in shares]
        kept: list[Kept] = [count * size for count in groups]
        if min(groups) < 1 or not all(map(math.isclose, groups, shares)):
            groups = [self.num_groups] * len(widths)
            kept = [*kept_at(widths, size, self.num_groups, rounding=rounding)]
        counts, cuts = [kept_of(self.num_channels, each) for each in kept], [(each,) for each in kept]
        install_view(self, widths, {"weight": cuts, "bias": cuts}, {"num_groups": groups, "num_channels": counts})


class _SwitchableBatchNorm(Explained, SwitchableNorm):
    _torch_class: ClassVar[type[_BatchNorm]]
    _if_full = "pass slim=False to this norm"

    @checked
    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, device: Any = None, dtype: Any = None, *,
        widths: Iterable[float], slim: bool = True, rounding: str = "nearest",
    ) -> None:  # fmt: skip
        norm = self._torch_class(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._fill(norm, widths, slim, rounding)

    def _fill(self, norm: _BatchNorm, widths: Iterable[float], slim: bool, rounding: str) -> None:
        known, size = check_widths(widths), norm.num_features
        kept = [kept_units(size, width, rounding=rounding) if slim and width < 1 else None for width in known]
        SwitchableNorm.__init__(self, norm, known, kept)

    @classmethod
    @checked
    def from_plain(
        cls: type[Norm], module: nn.Module, widths: Iterable[float], *, slim: bool = True, rounding: str = "nearest"
    ) -> Norm:
        """Return a switchable norm of `module` and cut copies of it; `ConversionError` if it is not a batch norm."""
        if not isinstance(module, _BatchNorm):
            raise ConversionError(f"{cls.__name__} is made from a batch norm, got {type(module).__name__}")
        switchable = cls.__new__(cls)
        switchable._fill(module, widths, slim, rounding)
        return switchable


class SwitchableBatchNorm1d(_SwitchableBatchNorm):
    """One `nn.BatchNorm1d` per width; everything is as in `SwitchableBatchNorm2d`.

    >>> SwitchableBatchNorm1d(8, widths=(1.0, 0.5)).module_at(1).num_features
    4
    """

    _torch_class = nn.BatchNorm1d


class SwitchableBatchNorm2d(_SwitchableBatchNorm):
    """A `SwitchableNorm` of one `nn.BatchNorm2d` per width, each with its own statistics, gain and bias.

    This is switchable batch normalization (Yu et al., Slimmable Neural Networks, ICLR 2019, section 3.2).

    Shapes: (N, kept num_features, H, W) -> the same. Arguments: torch's, `widths` and `rounding` as in `SlimConv2d`,
    and `slim`, False if the input is full at every width; statistics are still separate.

    >>> norm = SwitchableBatchNorm2d(8, widths=(1.0, 0.5), affine=False)
    >>> list(norm.state_dict())[:4]
    ['running_mean', 'running_var', 'num_batches_tracked', 'narrow.0.running_mean']
    """

    _torch_class = nn.BatchNorm2d


class SwitchableBatchNorm3d(_SwitchableBatchNorm):
    """One `nn.BatchNorm3d` per width; everything is as in `SwitchableBatchNorm2d`.

    >>> SwitchableBatchNorm3d(8, widths=(1.0, 0.5)).module_at(1).num_features
    4
    """

    _torch_class = nn.BatchNorm3d


SwitchableBatchNorm = SwitchableBatchNorm2d


class SwitchableLinear(Explained, SwitchableContainer):
    """One `nn.Linear` per width, `linears.0` and so on, for a layer in which widths should share no weights.

    As in the published code of SlimCLR (Zhao et al., IJCV 2024). Arguments are as for `SlimLinear`.

    Shapes: (..., kept in_features) -> (..., kept out_features).

    >>> layer = SwitchableLinear(8, 4, (1.0, 0.5))
    >>> [tuple(parameter.shape) for parameter in layer.parameters()]
    [(4, 8), (4,), (2, 4), (2,)]
    """

    _if_full = "pass slim_in=False to this layer"

    @checked
    def __init__(
        self, in_features: int, out_features: int, widths: Iterable[float], bias: bool = True, device: Any = None,
        dtype: Any = None, *,
        slim_in: bool = True, slim_out: bool = True, rounding: str = "nearest",
    ) -> None:  # fmt: skip
        super().__init__(widths)
        self.in_features, self.out_features = in_features, out_features
        ins = [kept_units(in_features, w, rounding=rounding) if slim_in else in_features for w in self.widths]
        outs = [kept_units(out_features, w, rounding=rounding) if slim_out else out_features for w in self.widths]
        self.linears = nn.ModuleList(nn.Linear(*kept, bias, device, dtype) for kept in zip(ins, outs, strict=True))

    @classmethod
    def from_plain(cls: type[Linear], module: nn.Module, widths: Iterable[float], **options: Any) -> Linear:
        """Return a layer of `module` itself and cut copies of it; `ConversionError` if it is not a linear layer."""
        if not isinstance(module, nn.Linear):
            raise ConversionError(f"{cls.__name__} is made from a linear layer, got {type(module).__name__}")
        sizes, weight = (module.in_features, module.out_features), module.weight
        layer = cls(*sizes, widths, module.bias is not None, weight.device, weight.dtype, **options)
        for name, own in layer.linears[1:].named_parameters():
            own.data.copy_(getattr(module, name.rpartition(".")[2])[tuple(map(slice, own.shape))])
        layer.linears[0] = module
        return layer.train(module.training)

    def to_plain(self) -> nn.Linear:
        """Return the layer of the full width, the module itself, not a copy."""
        return cast(nn.Linear, self.linears[0])

    def module_at(self, index: int) -> nn.Linear:
        """Return the layer of the width with this index; 0 is the full width."""
        return cast(nn.Linear, inner_modules(self, "linears")[str(index)])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.to_plain().extra_repr()}, {self.extra_repr()})"


class SwitchableProbe(SwitchableLinear):
    """One linear classifier per width, on the features of that width: a `SwitchableLinear` whose outputs are full.

    The best classifier on part of the features is not a slice of the best classifier on all of them, unless they are
    orthogonal. To compare with a sliced classifier, use `SlimLinear(..., slim_out=False)`. As in the published code of
    SlimCLR (Zhao et al., IJCV 2024). Arguments are as for `SlimLinear`, but for `num_classes`, the number of scores.

    Shapes: (N, kept in_features) -> (N, num_classes).

    >>> probe = SwitchableProbe(8, 10, (1.0, 0.5))
    >>> with slimmable.at_width(probe, 0.5):
    ...     probe(torch.zeros(2, 4)).shape
    torch.Size([2, 10])
    """

    _if_full = "use one nn.Linear for all widths"

    @checked
    def __init__(
        self, in_features: int, num_classes: int, widths: Iterable[float], bias: bool = True, device: Any = None,
        dtype: Any = None, rounding: str = "nearest",
    ) -> None:  # fmt: skip
        super().__init__(in_features, num_classes, widths, bias, device, dtype, slim_out=False, rounding=rounding)
        self.num_classes = num_classes


def refuse_plain_between(layers: Mapping[str, nn.Module | None]) -> None:
    """Raise `ConversionError` if, in a Sequential, a plain layer reads units of which a slim one makes fewer."""
    maker, fewer = nn.Module(), 0  # the last slim layer, and its number of units if it makes fewer when narrow
    for name, layer in layers.items():
        if isinstance(layer, _SlimProduct):
            maker, cut = layer, layer._slim.columns[-1].cuts.get("weight")
            fewer = cut.full[0] if cut is not None and len(units_of(cut)[0]) < cut.full[0] else 0
        elif isinstance(layer, SwitchableContainer) and not isinstance(layer, SwitchableNorm):
            fewer = 0  # it makes units of its own
        elif layer is not None and not is_slim(layer):
            tensors = [each for each in (*layer._parameters.values(), *layer._buffers.values()) if each is not None]
            across = isinstance(layer, (nn.Linear, nn.LayerNorm)) and not isinstance(maker, nn.Linear)  # not channels
            if fewer and not across and any(fewer in tensor.shape for tensor in tensors):
                what = f"layer {name!r}, {type(layer).__name__}, is full at every width, but the {type(maker).__name__}"
                advice = "use a layer of slimmable.layers, slim_out=False before it, or slimify on a plain network"
                raise ConversionError(f"{what} before it makes fewer units at narrow ones; {advice}")
            fewer = 0 if tensors else fewer


def kept_at(
    widths: Sequence[float], size: int, groups: int, slim: bool = True, overlap: bool = True, rounding: str = "nearest"
) -> list[tuple[int, ...] | None]:
    """Return the units that each width keeps of an axis of groups of `size`, the same of each; None for all."""
    if not slim:
        return [None] * len(widths)
    counts = [kept_units(size, width, rounding=rounding) for width in widths]
    starts = [0] * len(widths) if overlap else disjoint_starts(widths, counts)
    return [
        None if count == size else tuple(group * size + start + at for group in range(groups) for at in range(count))
        for start, count in zip(starts, counts, strict=True)
    ]
