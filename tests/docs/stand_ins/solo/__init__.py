"""What the page on solo-learn uses of it, for a machine without it: the same protocol of the base classes, no more."""
