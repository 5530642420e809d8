"""The commands of the program `slimmable`, and what they work with."""
