"""Networks for other programs and devices: programs of one width, and one file that holds all widths."""

from slimmable.deploy.programs import Programs as Programs

__all__ = ["Programs"]
