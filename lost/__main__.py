"""`python -m lost <command>`: the same as `lost <command>`, and what torchrun starts."""

import sys

from lost.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
