"""The program `slimmable`, also `python -m slimmable`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from slimmable.cli.arguments import make_parser
from slimmable.errors import SlimmableError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for bad input, 130 when interrupted.

    >>> main(["plan", "resnet1"])
    2
    """
    arguments = vars(make_parser().parse_args(argv))
    name = arguments.pop("command")
    try:
        from slimmable.cli import commands  # imports torch, which --help does not need

        return int(getattr(commands, name)(**arguments))
    except SlimmableError as error:
        print(f"slimmable {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"slimmable {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `slimmable plan NAME | head`
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    sys.exit(main())
