"""The stand-ins are imported by the programs of the pages, where their packages are missing; they hold no tests."""

collect_ignore = ["stand_ins"]
