"""The public face: few names at the top, everything else in submodules that are imported when they are first used."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import slimmable

SUBMODULES = (
    *("deploy", "errors", "evaluation", "gating", "integrations", "layers", "losses", "methods", "rules"),
    *("runtime", "training"),
)


def test_the_top_level_names_are_these():
    assert set(slimmable.__all__) == {
        *("slimify", "plan", "extract", "export", "save", "load", "load_slimclr", "profile", "search", "calibrate_bn"),
        *("full_state_dict", "register_rule", "pretrain", "save_pretrained", "push_to_hub", "from_pretrained"),
        *("set_width", "at_width", "width_of", "widths_of", "run_widths", "AllWidths", "inference", "repair"),
        *("SlimRecipe", "OnlineDistillation", "SwitchableProbe", "Inputs", "SlimmableError"),
        *("SlimConv2d", "SlimLinear", "SwitchableBatchNorm"),
    }
    assert dir(slimmable) == sorted([*slimmable.__all__, *SUBMODULES])
    assert all(callable(getattr(slimmable, name)) for name in slimmable.__all__)


@pytest.mark.parametrize("name", sorted({*SUBMODULES} - {"integrations"}))
def test_submodules_say_what_they_offer(name):
    module = importlib.import_module(f"slimmable.{name}")
    assert getattr(slimmable, name) is module
    assert sorted(module.__all__) == sorted(set(module.__all__))
    for own in module.__all__:
        assert getattr(module, own).__doc__, f"slimmable.{name}.{own} has no docstring"


def test_the_integrations_are_those_of_the_folder_and_import_no_framework_by_themselves():
    integrations = importlib.import_module("slimmable.integrations")
    folder = Path(integrations.__file__).parent
    assert {path.stem for path in folder.glob("[!_]*.py")} <= set(integrations.__all__)
    code = """
import sys, slimmable
slimmable.integrations
loaded = {name.partition(".")[0] for name in sys.modules} & {"timm", "transformers", "accelerate", "lightning"}
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match=r"module 'slimmable.integrations' has no attribute 'keras'"):
        integrations.keras  # noqa: B018


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="module 'slimmable' has no attribute 'gate'"):
        slimmable.gate  # noqa: B018


def test_importing_is_cheap_and_submodules_come_by_themselves():
    code = """
import sys, slimmable
loaded = {name for name in sys.modules if name.split(".")[0] in ("slimmable", "timm", "sklearn", "torchvision")}
heavy = ("timm", "sklearn", "torchvision", "slimmable.gating", "slimmable.methods", "slimmable.evaluation")
assert not loaded & set(heavy), loaded & set(heavy)
slimmable.gating.gate, slimmable.methods.SimCLR, slimmable.evaluation.knn_accuracy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
