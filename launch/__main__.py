"""`python -m launch VERB ...`; the verbs stand in launch/cli.py."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
