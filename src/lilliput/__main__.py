"""`python -m lilliput` is the command `lilliput`."""

import sys

from lilliput.apps.cli import main

if __name__ == "__main__":
    sys.exit(main())
