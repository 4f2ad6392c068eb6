"""`python -m flashsparse`: the command line without its console script."""

from __future__ import annotations

from flashsparse.cli import main

main()
