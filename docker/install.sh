#!/bin/sh
# Add minitron_nemo to the Python of an image, from the folder above; docker/Dockerfile and docker/minitron.def run it.
#
# The image's torch, transformer-engine, apex, megatron-core and NeMo were built for one another: nothing that is there
# is changed. What is missing is added beside it; where that cannot be, or where a version lies outside of what
# pyproject.toml allows, the build ends here with a sentence for each.
set -eu
cd "$(dirname "$0")/.."

python -m pip --version >/dev/null 2>&1 || python -m ensurepip
python -m pip install --no-cache-dir --no-deps .

there="$(mktemp -d)"
python -m pip list --format=freeze >"$there/image.txt"
python -m minitron_nemo.versions --missing >"$there/missing.txt"
if [ -s "$there/missing.txt" ]; then
    python -m pip install --no-cache-dir -c "$there/image.txt" -r "$there/missing.txt"
fi
rm -r "$there"

python -m minitron_nemo.versions
python -c 'import minitron_nemo.doors, minitron_nemo.nemo.implementation'
