"""The width view: modules of any class that run with the slices and sizes of their active width."""
