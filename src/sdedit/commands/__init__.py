"""The commands, each a function of its own that `cli.py` registers; heavy imports wait until the input was checked."""
