"""What a width may drop: channels labelled by one run on fake tensors, and the plan that follows."""

from slimmable.analysis.plan import Group, Pin, Plan

__all__ = ["Group", "Pin", "Plan"]
