"""Analysis: one run on fake tensors labels the channels, and the labels determine what each width keeps."""

from slimmable.analysis.plan import Group, Pin, Plan

__all__ = ["Group", "Pin", "Plan"]
