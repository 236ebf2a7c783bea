"""`python -m river_cli` is the command `river`."""

from . import program

if __name__ == "__main__":
    program()
