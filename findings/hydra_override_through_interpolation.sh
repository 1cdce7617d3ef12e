#!/usr/bin/env bash
# hydra-core 1.3.2, omegaconf 2.3.0: an override into a dict field that is an interpolation of another one,
#
#     @dataclass
#     class Config:
#         small: dict[str, int]                                        {width: 8, depth: 2}
#         large: dict[str, int] = "${small}"
#
#     $ app large.width=16
#
# does not give `large` a width of its own. It is written into `small`, without a word, and both are 16 wide; what YAML
# merges into the same place leaves `small` as it was. The interpolation stays in `large`, so the config as written
# (--cfg job) shows `large: ${small}` and a `small` that nobody asked for. The same reference in a plain YAML dict is safe:
# there the override is refused as an unknown key.
#
# Seen on 2026-11-28, Python 3.11:
#
#     override, typed dict:  {'small': 16, 'large': 16} | large as written: ${small}
#     merged, typed dict:    {'small': 8, 'large': 16}
#     override, plain YAML:  Could not override 'large.width'.
#
# Fails where that changes.
set -euo pipefail
place="$(mktemp -d)"
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check hydra-core==1.3.2 omegaconf==2.3.0

mkdir "$place/conf"
printf 'defaults: [schema, _self_]\nsmall: {width: 8, depth: 2}\n' >"$place/conf/typed.yaml"
printf 'small: {width: 8, depth: 2}\nlarge: ${small}\n' >"$place/conf/plain.yaml"

"$place/venv/bin/python" - "$place/conf" <<'PY'
import sys
from dataclasses import dataclass, field

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf


@dataclass
class Config:
    small: dict[str, int] = field(default_factory=dict)
    large: dict[str, int] = "${small}"


def widths(config):
    return {"small": config.small.width, "large": config.large.width}


ConfigStore.instance().store(name="schema", node=Config)
with hydra.initialize_config_dir(sys.argv[1], version_base="1.3"):
    overridden = hydra.compose("typed", ["large.width=16"])
    merged = OmegaConf.merge(hydra.compose("typed"), {"large": {"width": 16}})
    try:
        plain = widths(hydra.compose("plain", ["large.width=16"]))
    except HydraException as refusal:
        plain = str(refusal).splitlines()[0]

print("override, typed dict: ", widths(overridden), "| large as written:", OmegaConf.to_container(overridden)["large"])
print("merged, typed dict:   ", widths(merged))
print("override, plain YAML: ", plain)
assert widths(overridden) == {"small": 16, "large": 16}, "an override no longer reaches through: mend the finding"
assert OmegaConf.to_container(overridden)["large"] == "${small}"
assert widths(merged) == {"small": 8, "large": 16}, "merging now reaches through as well: mend the finding"
assert plain == "Could not override 'large.width'.", "a plain dict is no longer safe: mend the finding"
PY
