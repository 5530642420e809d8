"""Analysis: one run on fake tensors labels the channels; the plan of what each width keeps follows from the labels."""

from slimmable.analysis.plan import Group, Pin, Plan

__all__ = ["Group", "Pin", "Plan"]
