"""evaluate: `python launch/evaluate.py recipe=<name> ...`, or the same under torchrun."""

import sys

from minitron_nemo.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
