"""`python -m ewavit.cli`."""

import sys

from ewavit.cli import main

if __name__ == "__main__":
    sys.exit(main())
