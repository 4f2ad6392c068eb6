"""Where the console script begins: an interrupt while the command line is imported ends quietly too."""

import sys
from typing import NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main() -> NoReturn:
    """Entry point of the console script; the command line itself is flashsparse.cli's."""
    try:
        from flashsparse.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
