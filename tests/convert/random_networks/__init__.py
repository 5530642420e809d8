"""Random networks of functional operations, caches, several outputs and multiple calls."""

from tests.convert.random_networks.check import Found, check
from tests.convert.random_networks.draw import Conversion, conversions, drawn, layouts, smaller
from tests.convert.random_networks.network import Layout, Network, Output, Step, made_inputs

__all__ = [
    "Conversion", "Found", "Layout", "Network", "Output", "Step", "check", "conversions", "drawn", "layouts",
    "made_inputs", "smaller",
]  # fmt: skip
