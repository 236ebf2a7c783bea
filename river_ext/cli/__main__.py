"""`python -m river_ext.cli` is the command `river`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
