"""ResNet-50 (or what comes nearest) at four widths, by slimmable and by the published code of others.

Each function returns a network whose width can be set, what sets it, and what gives the plain network of a width. The
code of others is read where the checkouts are, and the packages of OFA and mmrazor where they are installed.
"""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
from torch import Tensor, nn

import slimmable

WIDTHS = (1.0, 0.75, 0.5, 0.25)
IMAGE = 96  # pixels


class Contestant(NamedTuple):
    """A network, what sets its width, and what makes the plain network of a width."""

    network: nn.Module
    set_width: Callable[[float], object]
    plain: Callable[[float], nn.Module]


def _timm_plain(width: float) -> nn.Module:
    """Return the ResNet-50 of this width that both published codes make, from timm's."""
    model = slimmable.slimify(timm.create_model("resnet50"), (1.0, width) if width < 1 else (1.0,))
    return slimmable.extract(model, width)


def ours(folder: Path) -> Contestant:
    """Return timm's ResNet-50, converted."""
    model = slimmable.slimify(timm.create_model("resnet50"), WIDTHS)
    return Contestant(
        model, lambda width: slimmable.set_width(model, width), lambda width: slimmable.extract(model, width)
    )


def yu(folder: Path) -> Contestant:
    """Return the ResNet-50 of github.com/JiahuiYu/slimmable_networks."""
    settings = types.ModuleType("utils.config")
    flags = types.SimpleNamespace(depth=50, width_mult_list=sorted(WIDTHS), reset_parameters=True)
    vars(settings)["FLAGS"] = flags
    sys.modules |= {"utils": types.ModuleType("utils"), "utils.config": settings}
    sys.path.insert(0, str(folder / "slimmable_networks"))
    from models.s_resnet import Model  # type: ignore[import-not-found]

    model = Model(input_size=IMAGE)

    def set_width(width: float) -> None:
        model.apply(lambda module: setattr(module, "width_mult", width))

    return Contestant(model, set_width, _timm_plain)


def slimclr(folder: Path) -> Contestant:
    """Return the ResNet-50 of github.com/mzhaoshuai/SlimCLR."""
    package = types.ModuleType("backbones")
    package.__path__ = [str(folder / "SlimCLR" / "models" / "backbones")]
    sys.modules["backbones"] = package
    from backbones.s_resnet import Model  # type: ignore[import-not-found]

    settings = {"depth": 50, "width_mult_list": WIDTHS, "inplace_distill": False, "inplace_distill_mixed": False}

    class AtWidth(Model):  # type: ignore[misc]
        """The network, called at the width that is set."""

        width = 1.0

        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images, specify_width=self.width)[self.width]  # type: ignore[no-any-return]

    model = AtWidth(args=types.SimpleNamespace(**settings))
    return Contestant(model, lambda width: setattr(model, "width", width), _timm_plain)


def ofa(folder: Path) -> Contestant:
    """Return the elastic ResNet-50D of github.com/mit-han-lab/once-for-all, at the least depth and one expansion."""
    from ofa.imagenet_classification.elastic_nn.networks import OFAResNets  # type: ignore[import-not-found]

    model: Any = OFAResNets(depth_list=[0, 1], expand_ratio_list=[0.25], width_mult_list=sorted(WIDTHS))
    places = {width: place for place, width in enumerate(sorted(WIDTHS))}

    def set_width(width: float) -> None:
        model.set_active_subnet(d=1, e=0.25, w=places[width])

    def plain(width: float) -> nn.Module:
        set_width(width)
        return model.get_active_subnet()  # type: ignore[no-any-return]

    return Contestant(model, set_width, plain)


def mmrazor(folder: Path) -> Contestant:
    """Return torchvision's ResNet-50 with the mutable channels of github.com/open-mmlab/mmrazor, version 1.0.0."""
    for name in (
        "structures.quantization",
        "models.quantizers",
    ):  # which this torch cannot import, and nothing here uses
        sys.modules[f"mmrazor.{name}"] = mock.MagicMock(__all__=[])
    from mmrazor.models.mutators import OneShotChannelMutator  # type: ignore[import-not-found]
    from torchvision.models import resnet50

    model = resnet50()
    unit = {
        "type": "OneShotMutableChannelUnit",
        "default_args": {"candidate_choices": sorted(WIDTHS), "choice_mode": "ratio"},
    }
    parser = {"type": "ChannelAnalyzer", "demo_input": (1, 3, IMAGE, IMAGE), "tracer_type": "FxTracer"}
    mutator = OneShotChannelMutator(channel_unit_cfg=unit, parse_cfg=parser)
    mutator.prepare_from_supernet(model)

    def set_width(width: float) -> None:
        mutator.set_choices(dict.fromkeys(mutator.current_choices, width))

    return Contestant(model, set_width, _timm_plain)


CONTESTANTS = {each.__name__: each for each in (ours, yu, slimclr, ofa, mmrazor)}
