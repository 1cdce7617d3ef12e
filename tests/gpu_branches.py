"""Which functions ask for an accelerator, and so hold lines that no CPU runs.

    python tests/gpu_branches.py              file and function of each, as docs/gpu.md lists them
    python tests/gpu_branches.py tests/gpu    the same after a run of those tests, with the lines of each that did not
                                              run in it, and how many (make gpu-branches)

Found in the source, not by name: a function that names `torch.cuda`, asks the platform or a tensor whether there is an
accelerator or transformer-engine, asks for a device's type, or imports triton or transformer-engine. The
stand-ins of platform/cpu.py are the CPU's and left out.
"""

from __future__ import annotations

import ast
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "minitron_nemo"
QUESTIONS = {"is_cuda", "has_accelerator", "has_transformer_engine", "supports_distributed_optimizer"}
LIBRARIES = {"triton", "transformer_engine", "apex"}
OF_THE_CPU = {"platform/cpu.py"}


def asks(node: ast.AST) -> bool:
    """Whether a piece of syntax by itself is a question about the accelerator, or a use of it."""
    if isinstance(node, ast.Attribute):
        of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr == "cuda"
        of_device = getattr(node.value, "attr", getattr(node.value, "id", None)) == "device"
        return of_torch or node.attr in QUESTIONS or (node.attr == "type" and of_device)
    if isinstance(node, ast.Name):
        return node.id in QUESTIONS
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return any(isinstance(side, ast.Constant) and side.value == "cuda" for side in sides)
    if isinstance(node, ast.Import):
        return any(each.name.split(".")[0] in LIBRARIES for each in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in LIBRARIES or any(
            each.name == "triton_kernels" for each in node.names
        )
    return False


def functions(file: Path) -> Iterator[tuple[str, ast.AST]]:
    """Qualified name and syntax of each function that asks; nested ones count as the outer one, a module as itself."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
        rest: list[ast.AST] = []
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if any(asks(each) for each in ast.walk(node)):
                    yield f"{prefix}{node.name}", node
            else:
                rest.append(node)
        if any(asks(each) for node in rest for each in ast.walk(node)):
            yield (
                prefix.rstrip(".") or "(module)",
                ast.Module([each for each in rest if isinstance(each, ast.stmt)], []),
            )

    yield from walk(ast.parse(file.read_text()).body, "")


def found() -> dict[tuple[str, str], ast.AST]:
    """(file below src/minitron_nemo, function) -> its syntax."""
    return {
        (name, function): node
        for file in sorted(SOURCE.rglob("*.py"))
        if (name := file.relative_to(SOURCE).as_posix()) not in OF_THE_CPU
        for function, node in functions(file)
    }


def lines(node: ast.AST) -> set[int]:
    """Of its statements, less texts of functions."""
    statements = [each for each in ast.walk(node) if isinstance(each, ast.stmt) and each is not node]
    return {
        each.lineno for each in statements if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
    }


class Ran:
    """Lines of given files that this process runs while the block does; slow."""

    def __init__(self, files: set[str]) -> None:
        self.files = files
        self.lines: set[tuple[str, int]] = set()

    def __enter__(self) -> Ran:
        threading.settrace(self._called)
        sys.settrace(self._called)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _called(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._called


def main(tests: list[str]) -> int:
    """List the functions; given tests, run them first and say which lines of those functions did not run."""
    code, ran = 0, Ran({str(SOURCE / file) for file, _ in found()})
    if tests:
        import pytest

        with ran:
            code = int(pytest.main(["-q", *tests]))
    never = 0
    for (file, function), node in found().items():
        left_out = sorted(line for line in lines(node) if (str(SOURCE / file), line) not in ran.lines) if tests else []
        never += len(left_out)
        print(f"{file} {function}" + (f": lines {', '.join(map(str, left_out))} did not run" if left_out else ""))
    if tests:
        print(f"{never} lines of {len(found())} functions that ask for an accelerator did not run in this process.")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
