"""``python -m vlaquant``, which launchers of several processes need."""

import sys

from vlaquant.cli import main

if __name__ == "__main__":
    sys.exit(main())
