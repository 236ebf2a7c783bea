"""The command line as a module, `python -m river_ext.cli`; river_cli has it, whose help needs no torch."""

from river_cli import main, program

__all__ = ["main", "program"]

if __name__ == "__main__":
    program()
