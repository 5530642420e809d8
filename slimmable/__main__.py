"""Entry point of the program `slimmable`, also run by `python -m slimmable`."""

import sys
from collections.abc import Sequence

from slimmable.cli.commands import parse, run
from slimmable.errors import SlimmableError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for unusable input, 130 when interrupted.

    >>> main(["plan", "resnet1"])
    2
    """
    arguments = sys.argv[1:] if argv is None else argv
    command, given = parse(arguments)
    try:
        return run(command, given)
    except SlimmableError as error:
        print(f"slimmable {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"slimmable {arguments[0]}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `slimmable plan NAME | head`
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    sys.exit(main())
