"""`python -m flashsparse` is the `flashsparse` command."""

from flashsparse.cli import main

if __name__ == "__main__":
    main()
