"""An artifact: a directory that one stage made, complete or not there at all.

    with writing(output, stage="prune", config=..., inputs=[teacher]) as draft:
        ... write files under draft.path ...
        draft.metrics["parameters"] = 1234

The files go to `<output>.partial` and the directory is renamed when the block ends, so a half-written artifact cannot
be mistaken for a finished one and an older one stays intact until its successor is whole. `manifest.json` says which
stage made it, from which config and inputs (with digests), with which versions and in which numbers, what it measured,
what it cost, and of every file its size and sha256; and it holds a sha256 of itself. Opening an artifact compares the
manifest, all sizes and the contents of small files, which is where numbers and names stand; the contents of all with
`verify`.

The digest is the identity of what was made: stage, what in the config decides it, identities of the inputs, and the
files. Where something lies does not count (an input's path stands for its identity, and one beside the output for its
place from there), nor when, how fast or with which versions it was made: two runs of the same in two directories have
the same digest where their files are the same. Two runs of the quickstart on a CPU differ in no file but these, which
say of the run what the manifest would say, and are left out:

    .metadata                          of a Megatron checkpoint: its path and a random id; its tensors lie beside it
    history.jsonl, tensorboard, wandb  seconds and tokens per second beside losses

Under several ranks every rank enters the block with the same output; rank 0 reads all files once more for their sha256,
writes the manifest and renames.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_nemo import platform
from minitron_nemo.checks import CannotWrite, NothingThere, reading, require
from minitron_nemo.config.identity import as_dict, decisive
from minitron_nemo.parallel import barrier, by_rank_zero, is_rank_zero, rank_zero_works, world_size
from minitron_nemo.platform.numerics import numerics

MANIFEST = "manifest.json"
_READERS = 8  # threads, which hash about 1 GB/s each
_BLOCK_BYTES = 4 * 2**20
_SMALL_BYTES = 2**20
"""Files up to this size are read whenever their artifact is opened: all but weights, tokens and teachers' answers."""
_SEAL = "sha256"
_MEND = "Make it again, or copy it again."
_VERSIONED = ("minitron-nemo", "torch", "megatron-core", "nemo-toolkit", "transformers")


@dataclass
class Draft:
    """An artifact being written: files go under `path`, figures into `metrics`, what later stages need into `facts`."""

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """A finished artifact."""

    path: Path
    manifest: dict[str, Any]

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest["metrics"]

    @property
    def facts(self) -> dict[str, Any]:
        return self.manifest["facts"]

    @property
    def digest(self) -> str:
        """Identity of what was made, see the module's text; empty where an earlier version made it."""
        return self.manifest.get("digest", "")


@by_rank_zero
def is_artifact(path: Path | str) -> bool:
    """Whether rank 0 sees a finished artifact there. Every rank calls."""
    return os.path.isfile(Path(path) / MANIFEST)  # also of what is no path at all, such as a long prompt


@by_rank_zero
def open_artifact(
    path: Path | str, *, made_by: Sequence[str] = (), key: str = "input", verify: bool = False
) -> Artifact:
    """Read a finished artifact. Every rank calls: rank 0 looks, as others may see what it wrote only later.

    Args:
        made_by: stages whose artifacts fit; empty accepts any.
        key: the user's config key that named the path, for the message.
        verify: read large files too, to see that each is as it was written.
    Raises: FileNotFoundError: nothing there, or unfinished. ValueError: made by another kind of stage, or a file is
        gone or not as it was written.
    """
    path = Path(path)
    finish_what_was_cut_off(path)
    require(path.exists(), f"{key}={path} does not exist. Run the stage that makes it, or correct {key}.", NothingThere)
    require(
        is_artifact(path),
        f"{key}={path} is not a finished artifact: it has no {MANIFEST}. "
        f"Run the stage that makes it to its end, or correct {key}.",
        NothingThere,
    )
    artifact = Artifact(path, _read_manifest(path, key))
    require(
        not made_by or artifact.stage in made_by,
        f"{key}={path} was made by stage {artifact.stage}, but one made by {' or '.join(made_by)} is needed here. "
        f"Set {key} to such an artifact.",
    )
    _require_as_written(artifact, key, verify=verify)
    return artifact


def _read_manifest(path: Path, key: str) -> dict[str, Any]:
    with reading(path / MANIFEST, f"It belongs to {key}={path}. {_MEND}"):
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
        whole = all(name in manifest for name in ("stage", "metrics", "facts", "files"))
        seal = manifest.pop(_SEAL, None)  # an earlier version wrote none
    require(
        whole and seal in (None, _seal(manifest)),
        f"{key}={path} is damaged: {MANIFEST} is not as it was written. {_MEND}",
    )
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest, of what it says and not how it is laid out."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _require_as_written(artifact: Artifact, key: str, *, verify: bool) -> None:
    """Compare the files with the manifest: sizes, and contents of small files or of all. Raises: Mistake."""
    looked_at = []
    for name, written in artifact.manifest["files"].items():
        file = artifact.path / name
        size = file.stat().st_size if file.is_file() else None
        problem = "is gone" if size is None else f"has {size} bytes, not {written['bytes']}"
        require(size == written["bytes"], _not_as_written(artifact, key, name, problem))
        if verify or written["bytes"] <= _SMALL_BYTES:
            looked_at.append((name, written["sha256"]))
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(_sha256, [artifact.path / name for name, _ in looked_at])
        for (name, sha256), now in zip(looked_at, found, strict=True):
            require(now == sha256, _not_as_written(artifact, key, name, "has other contents"))


def _not_as_written(artifact: Artifact, key: str, name: str, problem: str) -> str:
    return f"{key}={artifact.path} is not as {artifact.stage} made it: {name} {problem}. {_MEND}"


_began: list[float] = []
"""When the stage that runs now began; empty where nobody said it."""


def stage_begins() -> None:
    """From here on counts what the next artifact cost. Every rank may call."""
    _began[:] = [time.time()]


def _cost(started: float) -> dict[str, Any]:
    """Wall time of the stage in the process that ended it, and on how many processes and what."""
    seconds = time.time() - (_began.pop() if _began else started)
    return {"seconds": round(seconds, 3), "processes": world_size(), "device": platform.device_name()}


@contextmanager
def writing(output: Path | str, *, stage: str, config: Any, inputs: Sequence[Artifact] = ()) -> Iterator[Draft]:
    """Write an artifact; see the module's text. Any error (disk full: OSError) leaves the older artifact untouched.

    Args:
        config: the stage's dataclass, or plain data that all counts.
    """
    output = Path(output)
    partial = _draft(output)
    draft = Draft(partial)
    started = time.time()

    def finish() -> None:
        files = _files(partial)
        manifest = {
            "stage": stage,
            "digest": _identity(output, stage, config, inputs, files),
            "config": as_dict(config) if dataclasses.is_dataclass(config) else config,
            "inputs": [{"path": str(a.path), "stage": a.stage, "digest": a.digest} for a in inputs],
            "versions": _versions(),
            "numerics": numerics(),
            "metrics": draft.metrics,
            "facts": draft.facts,
            "seconds": round(time.time() - started, 3),
            "cost": _cost(started),
            "files": files,
        }
        as_plain = json.loads(json.dumps(manifest))  # numbers and keys as they will be read
        sealed = as_plain | {_SEAL: _seal(as_plain)}
        written = partial / f"{MANIFEST}.partial"  # beside its place first: a draft with a manifest is whole
        written.write_text(json.dumps(sealed, indent=2, sort_keys=True) + "\n")
        written.rename(partial / MANIFEST)
        _replace(partial, output)

    rank_zero_works(lambda: _make(partial, output))
    try:
        with saying_when_full(output):
            yield draft
            barrier()
            rank_zero_works(finish)
    except BaseException:
        if is_rank_zero():
            shutil.rmtree(partial, ignore_errors=True)
        raise


_OF_THE_RUN = {".metadata", "history.jsonl", "tensorboard", "wandb"}
"""Files and folders, by name, that say how the step ran; see the module's text."""


def _identity(
    output: Path, stage: str, config: Any, inputs: Sequence[Artifact], files: dict[str, dict[str, Any]]
) -> str:
    """sha256 of what was made."""
    identity_of = {os.path.normpath(artifact.path): artifact.digest for artifact in inputs}

    def placeless(value: Any) -> Any:
        if isinstance(value, list):
            return [placeless(each) for each in value]
        if isinstance(value, dict):
            return {key: placeless(each) for key, each in value.items()}
        if not isinstance(value, str):
            return value
        path, beside = os.path.normpath(value), os.path.join(os.path.normpath(output.parent), "")
        return identity_of.get(path, path.removeprefix(beside) if path.startswith(beside) else value)

    made = {
        "stage": stage,
        "config": placeless(decisive(config)),
        "inputs": [artifact.digest for artifact in inputs],
        "files": {name: file for name, file in files.items() if not _OF_THE_RUN.intersection(Path(name).parts)},
    }
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file below a directory but its manifest, by relative path; reads several at once."""
    files = [file for file in sorted(directory.rglob("*")) if file.is_file() and file != directory / MANIFEST]
    with ThreadPoolExecutor(_READERS) as readers:
        hashes = readers.map(_sha256, files)
        return {
            str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": sha256}
            for file, sha256 in zip(files, hashes, strict=True)
        }


def _sha256(file: Path) -> str:
    sha256, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while read := stream.readinto(block):
            sha256.update(block[:read])  # other threads run meanwhile
    return sha256.hexdigest()


def _make(partial: Path, output: Path) -> None:
    finish_what_was_cut_off(output)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with saying_when_full(output):
            partial.mkdir(parents=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise CannotWrite(
            error.errno,
            f"{output} cannot be made there ({error.strerror}). Set run_dir or this step's output to a place where you "
            "may write.",
        ) from error


def link_or_copy(file: Path | str, second: Path | str) -> None:
    """Give a file that will not change a second name, so that a kill before the first one goes loses nothing; where the
    file system knows one name only, a copy."""
    try:
        os.link(file, second)
    except OSError:
        shutil.copyfile(file, second)


_FULL_DISK = (
    "No space left",  # Python
    "Disk quota exceeded",
    "os error 28",  # safetensors
    "os error 122",
    "unexpected pos",  # torch's zip writer
    "requested and",  # numpy: "4096 requested and 512 written"
)
"""How a full disk reads in the errors of those who write."""


@contextmanager
def saying_when_full(output: Path) -> Iterator[None]:
    """A full disk becomes one OSError that says what to do; libraries wrap it in errors of their own."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        if not any(words in text for text in _chain(error) for words in _FULL_DISK):
            raise
        raise CannotWrite(
            errno.ENOSPC,
            f"No space left while writing {output}; what stood there before is intact. "
            "Free disk space or set run_dir to a larger disk, then run the same command again.",
        ) from error


def _chain(error: BaseException | None) -> Iterator[str]:
    """Text of an error and of those that led to it."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def _replace(partial: Path, output: Path) -> None:
    """Put `partial` where `output` stands; the old one is moved aside first, as a directory cannot be overwritten."""
    old = _aside(output)
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)  # only now: where nothing stands, this may be all that is left
        output.rename(old)
    try:
        partial.rename(output)
    except FileNotFoundError:
        if not is_artifact(output):  # else a reader took this for a kill and did it
            raise
    shutil.rmtree(old, ignore_errors=True)


def finish_what_was_cut_off(output: Path) -> None:
    """After a kill between the renames of `_replace`: the artifact that was whole stands where it belongs.

    Whoever looks first does it, several ranks at once too. A draft has its manifest only when it is whole.
    """
    if output.exists():
        return
    for whole in (_draft(output), _aside(output)):
        if is_artifact(whole):
            with suppress(OSError):  # another one was faster: it is gone, or its place is taken
                whole.rename(output)
            return


def _draft(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _aside(output: Path) -> Path:
    return output.with_name(output.name + ".replaced")  # no name that a person gives to what they keep


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a container may carry it without metadata
            found[package] = "unknown"
    return found
