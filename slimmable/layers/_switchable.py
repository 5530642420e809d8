"""Switchable layers: batch norms with the constructors of torch's, and a linear probe of one classifier per width."""

from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from slimmable._checks import check_flags, check_rounding, checked
from slimmable._widths import check_widths, kept_units
from slimmable.errors import ConversionError
from slimmable.layers._slim import Explained
from slimmable.view.norms import SwitchableContainer, SwitchableNorm, inner_modules

Norm = TypeVar("Norm", bound="_SwitchableBatchNorm")
Linear = TypeVar("Linear", bound="SwitchableLinear")


class _SwitchableBatchNorm(Explained, SwitchableNorm):
    _torch_class: ClassVar[type[_BatchNorm]]
    _if_full = "pass slim=False to this norm"

    @checked
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        widths: Iterable[float],
        slim: bool = True,
        rounding: str = "nearest",
    ) -> None:
        norm = self._torch_class(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._fill(norm, widths, slim, rounding)

    def _fill(self, norm: _BatchNorm, widths: Iterable[float], slim: bool, rounding: str) -> None:
        check_flags(type(self).__name__, slim=slim)
        check_rounding(type(self).__name__, rounding=rounding)
        known, size = check_widths(widths), norm.num_features
        kept = [kept_units(size, width, rounding=rounding) if slim and width < 1 else None for width in known]
        SwitchableNorm.__init__(self, norm, known, kept)

    @classmethod
    def from_plain(
        cls: type[Norm], module: nn.Module, widths: Iterable[float], *, slim: bool = True, rounding: str = "nearest"
    ) -> Norm:
        """Return a switchable norm of `module` and cut copies of it; `ConversionError` if it is not a batch norm."""
        if not isinstance(module, _BatchNorm):
            raise ConversionError(f"{cls.__name__} is made from a batch norm, got {type(module).__name__}")
        switchable = cls.__new__(cls)
        switchable._fill(module, widths, slim, rounding)
        return switchable

    def __repr__(self) -> str:
        if type(self.full) is not self._torch_class:
            return super().__repr__()
        full = self.full.extra_repr()  # type: ignore[no-untyped-call]
        return f"{type(self).__name__}({full}, {self.extra_repr()})"


class SwitchableBatchNorm1d(_SwitchableBatchNorm):
    """One `nn.BatchNorm1d` per width; everything is as in `SwitchableBatchNorm2d`.

    >>> SwitchableBatchNorm1d(8, widths=(1.0, 0.5)).module_at(1).num_features
    4
    """

    _torch_class = nn.BatchNorm1d


class SwitchableBatchNorm2d(_SwitchableBatchNorm):
    """A `SwitchableNorm` of one `nn.BatchNorm2d` per width, each with its own statistics, gain and bias.

    Shapes: (N, kept num_features, H, W) -> the same.

    Source: switchable batch normalization of Yu et al., Slimmable Neural Networks, ICLR 2019, section 3.2.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in torch.
        widths: distinct numbers in (0, 1] with 1.0 among them.
        slim: False if the input is full at every width; statistics are still separate.
        rounding: as in `SlimConv2d`.

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

    Source: the switchable linear layers of the published code of Zhao et al., SlimCLR, IJCV 2024.

    Shapes: (..., kept in_features) -> (..., kept out_features).

    Args:
        in_features, out_features: numbers of features at the full width.
        widths: distinct numbers in (0, 1] with 1.0 among them.
        bias, device, dtype: as in `nn.Linear`.
        slim_in, slim_out, rounding: as in `SlimConv2d`.

    >>> layer = SwitchableLinear(8, 4, (1.0, 0.5))
    >>> [tuple(parameter.shape) for parameter in layer.parameters()]
    [(4, 8), (4,), (2, 4), (2,)]
    """

    _if_full = "pass slim_in=False to this layer"

    @checked
    def __init__(
        self,
        in_features: int,
        out_features: int,
        widths: Iterable[float],
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        slim_in: bool = True,
        slim_out: bool = True,
        rounding: str = "nearest",
    ) -> None:
        super().__init__(widths)
        self.in_features, self.out_features = in_features, out_features
        ins, outs = (
            [kept_units(size, width, rounding=rounding) if slim else size for width in self.widths]
            for size, slim in ((in_features, slim_in), (out_features, slim_out))
        )
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
    orthogonal. To compare with a sliced classifier, use `SlimLinear(..., slim_out=False)`.

    Source: the switchable linear probe layer of Zhao et al., SlimCLR, IJCV 2024.

    Shapes: (N, kept in_features) -> (N, num_classes).

    Args:
        in_features: number of features at the full width.
        num_classes: number of scores, at every width.
        widths, bias, device, dtype, rounding: as in `SwitchableLinear`.

    >>> import torch
    >>> from slimmable import at_width
    >>> probe = SwitchableProbe(8, 10, (1.0, 0.5))
    >>> with at_width(probe, 0.5):
    ...     probe(torch.zeros(2, 4)).shape
    torch.Size([2, 10])
    """

    _if_full = "use one nn.Linear for all widths"

    @checked
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        widths: Iterable[float],
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        rounding: str = "nearest",
    ) -> None:
        super().__init__(in_features, num_classes, widths, bias, device, dtype, slim_out=False, rounding=rounding)
        self.num_classes = num_classes

    def __repr__(self) -> str:
        return super().__repr__().replace("out_features", "num_classes")
