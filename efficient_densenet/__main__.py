"""``python -m efficient_densenet`` is the ``efficient-densenet`` command."""

import sys

from efficient_densenet.cli import main

if __name__ == "__main__":
    sys.exit(main())
