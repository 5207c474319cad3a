"""Start the program: Ctrl-C while its parts are still being imported ends it in a line, as it does later."""

import sys

_INTERRUPTED = 130


def main() -> None:
    """Run the program and exit with its code."""
    try:
        from qeval.cli.app import main as program  # noqa: PLC0415 - so that Ctrl-C during the import is caught
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted before anything was done.\n")
        sys.exit(_INTERRUPTED)
    program()


if __name__ == "__main__":
    main()
