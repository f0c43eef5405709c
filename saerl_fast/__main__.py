"""The ``saerl`` command, and ``python -m saerl_fast``."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """`saerl_fast.cli.main`; a Ctrl-C while it is loaded, or after its last line, shows no traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from saerl_fast.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
