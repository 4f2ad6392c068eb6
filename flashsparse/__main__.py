"""`python -m flashsparse` is the `flashsparse` command."""

from flashsparse.command import main

if __name__ == "__main__":
    main()
