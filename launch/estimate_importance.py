"""estimate-importance: `python launch/estimate_importance.py recipe=<name> ...`, or the same under torchrun."""

import sys

from minitron_nemo.cli import main

if __name__ == "__main__":
    sys.exit(main(["estimate-importance", *sys.argv[1:]]))
