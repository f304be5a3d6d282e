"""`python -m lycoris` is the `lycoris` command."""

from lycoris.cli import main

if __name__ == "__main__":
    main()
