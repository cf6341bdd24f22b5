"""`python -m sdedit` is the command line."""

from sdedit.commands.cli import main

if __name__ == "__main__":
    main()
