"""``python -m tlkit``, hence ``torchrun -m tlkit``; also the entry point of the installed command."""

import sys


def main() -> None:
    """Run the command line and leave with its exit code."""
    from tlkit.cli.app import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":  # worker processes that are spawned import this file under another name
    main()
