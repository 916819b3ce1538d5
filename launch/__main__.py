"""`python -m launch VERB ...`; the verbs stand in launch/cli.py."""

import os
import sys

# Threads that wait by spinning lose a shared core to each other: 30 times slower was measured
# (docs/benchmarks.md). OpenMP reads this when torch is loaded, so it stands before everything.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from launch.cli import main
from pretrain.device import many_files

if __name__ == "__main__":
    many_files()
    sys.exit(main(sys.argv[1:]))
