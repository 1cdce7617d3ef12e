"""prune: `python launch/prune.py recipe=<name> ...`, or the same under torchrun."""

import sys

from minitron_nemo.cli import main

if __name__ == "__main__":
    sys.exit(main(["prune", *sys.argv[1:]]))
