"""``python -m asyncdiff_nodes``."""

import sys

from asyncdiff_nodes.cli import main

if __name__ == "__main__":
    sys.exit(main())
