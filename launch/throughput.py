"""throughput: `python launch/throughput.py recipe=<name> ...`, or the same under torchrun."""

import sys

from minitron_nemo.cli import main

if __name__ == "__main__":
    sys.exit(main(["throughput", *sys.argv[1:]]))
