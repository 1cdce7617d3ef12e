"""prepare-data: `python launch/prepare_data.py recipe=<name> ...`, or the same under torchrun."""

import sys

from minitron_nemo.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare-data", *sys.argv[1:]]))
