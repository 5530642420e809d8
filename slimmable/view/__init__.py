"""The width view, with which modules of any class run on the slices and sizes of their active width."""
