"""The process of the command ``distmeta``, and of ``python -m distmeta``."""

import signal
import sys


def main() -> None:
    """Runs the command line; from its first moment, Ctrl-C or a preemption notice ends it in one line, with 130."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        from distmeta.cli import app

        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
