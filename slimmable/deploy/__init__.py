"""Networks for other programs and devices: programs of one width, all widths in one file, tables of latencies."""

from slimmable.deploy.latency import LatencyTable
from slimmable.deploy.programs import Programs

__all__ = ["LatencyTable", "Programs"]
