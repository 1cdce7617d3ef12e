"""What stands at a path that was given as a model, by the files that are there, and the way from it to what is wanted.

    ours            manifest.json                                  NeMo 2          context/
    Hugging Face    config.json                                    NeMo 1          *.nemo, model_config.yaml
    Megatron-Bridge latest_train_state.pt, iter_*/run_config.yaml  GGUF            *.gguf
    Megatron-LM     latest_checkpointed_iteration.txt, iter_*/{.metadata,mp_rank_*}, the same without iter_*

Names alone are looked at; nothing is loaded but our own manifest.
"""

from __future__ import annotations

import json
from pathlib import Path

from minitron_nemo.checks import Mistake, reading

ARTIFACT, HUGGING_FACE, NEMO_2 = "artifact", "Hugging Face", "NeMo 2"
NEMO_1, BRIDGE, MEGATRON, OLD_MEGATRON, GGUF = "NeMo 1", "Megatron-Bridge", "Megatron-LM", "old Megatron-LM", "GGUF"

_WORDS = {
    HUGGING_FACE: "a Hugging Face folder",
    NEMO_2: "a NeMo 2 checkpoint",
    NEMO_1: "a NeMo 1 checkpoint (.nemo)",
    BRIDGE: "a Megatron-Bridge checkpoint",
    MEGATRON: "a Megatron-LM distributed checkpoint",
    OLD_MEGATRON: "a Megatron-LM checkpoint of one file a rank",
    GGUF: "a GGUF file",
}
_EXPORT_BY_BRIDGE = (
    "Megatron-Bridge writes it as a Hugging Face folder: AutoBridge.from_hf_pretrained(<the Hugging Face model of this "
    "architecture>).export_ckpt(megatron_path='{path}', hf_path=...)"
)
_TO_HUGGING_FACE = {
    BRIDGE: _EXPORT_BY_BRIDGE,
    MEGATRON: _EXPORT_BY_BRIDGE,
    OLD_MEGATRON: "Let Megatron-LM save it again (--ckpt-convert-format torch_dist --ckpt-convert-save DIR). From DIR "
    + _EXPORT_BY_BRIDGE.replace("{path}", "DIR"),
    NEMO_1: "NeMo's scripts/checkpoint_converters/convert_<family>_nemo_to_hf.py writes it as a Hugging Face folder",
    GGUF: "minitron import-hf reads it (import_hf.model=<file>.gguf), and minitron export-hf makes a folder of that",
}


def kind_of(path: Path) -> str | None:
    """The kind of what stands at `path`; None: nothing that has a name here."""
    if path.is_file():
        return {".nemo": NEMO_1, ".gguf": GGUF}.get(path.suffix)
    holds = {
        ARTIFACT: ("manifest.json",),
        NEMO_2: ("context",),
        HUGGING_FACE: ("config.json",),
        NEMO_1: ("*.nemo", "model_config.yaml"),
        BRIDGE: ("latest_train_state.pt", "run_config.yaml", "iter_*/run_config.yaml"),
        OLD_MEGATRON: ("mp_rank_*", "iter_*/mp_rank_*", "release/mp_rank_*"),
        MEGATRON: ("latest_checkpointed_iteration.txt", ".metadata", "iter_*/.metadata"),
        GGUF: ("*.gguf",),
    }
    return next((kind for kind, patterns in holds.items() if any(any(path.glob(each)) for each in patterns)), None)


def refuse_as_artifact(path: Path, key: str) -> None:
    """Raises: ValueError: what stands there is a model, but of a kind that has to be imported first."""
    kind = kind_of(path)
    if kind in (None, ARTIFACT, NEMO_2):
        return
    if kind in (HUGGING_FACE, GGUF):
        file = next(path.glob("*.gguf"), path) if kind == GGUF else path
        way = f"Import it: minitron import-hf import_hf.model={file}"
    else:
        way = f"{_TO_HUGGING_FACE[kind].format(path=path)}; that one goes in by minitron import-hf"
    raise Mistake(f"{key}={path} is {_WORDS[kind]}, not a model artifact. {way}, and {key} is its output.")


def refuse_as_hugging_face(path: Path, key: str) -> None:
    """Raises: ValueError: what stands there is a model, but no Hugging Face folder."""
    kind = kind_of(path)
    if kind is None or (path / "config.json").is_file():
        return
    if kind == ARTIFACT:
        with reading(path / "manifest.json", "Make the artifact again, or copy it again."):
            stage = json.loads((path / "manifest.json").read_text()).get("stage")
        what = f"an artifact of stage {stage}"
        way = "Stages read it as it is (prune.model, distill.teacher, ...); minitron export-hf makes a folder of it"
    elif kind == NEMO_2:
        what = _WORDS[kind]
        way = (
            "Stages read it as it is (prune.model, distill.teacher, ...); NeMo's "
            "llm.export_ckpt(path=..., target='hf') makes a folder of it"
        )
    else:
        what, way = _WORDS[kind], _TO_HUGGING_FACE[kind].format(path=path)
    raise Mistake(f"{key}={path} is {what}, not a Hugging Face folder. {way}. Set {key} to such a folder.")
