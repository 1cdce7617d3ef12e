"""docs/gpu.md lists every function that asks for an accelerator, and which test is to run its branch first."""

from __future__ import annotations

import ast
import re

from gpu_branches import ROOT, found

ROW = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \| [^|]* \| ([^|]+) \|$", re.MULTILINE)


def test_the_list_of_what_never_ran_is_that_of_the_source() -> None:
    listed = ROW.findall((ROOT / "docs" / "gpu.md").read_text())
    places = [(file, function) for file, function, _ in listed]
    assert sorted(places) == sorted(found()), "python tests/gpu_branches.py says what docs/gpu.md has to list"
    tests = (ROOT / "tests" / "gpu" / "test_on_a_gpu.py").read_text()
    known = {node.name for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.FunctionDef)}
    for file, function, by in listed:
        assert set(re.findall(r"`(test_\w+)`", by)) <= known, (file, function)
        for other in re.findall(r"tests/[\w/]+\.py", by):
            assert (ROOT / other).is_file(), other
        assert by.strip(), (file, function)


def test_a_question_for_the_accelerator_is_found_however_it_is_asked() -> None:
    from gpu_branches import asks

    for asking in (
        "torch.cuda.is_available()",
        "x.is_cuda",
        "device.type == 'cuda'",
        "x.device.type != 'cpu'",
        "platform.has_transformer_engine()",
        "import triton.language as tl",
        "from transformer_engine.pytorch import Linear",
        "from minitron_nemo.divergence import triton_kernels",
    ):
        assert any(asks(node) for node in ast.walk(ast.parse(asking))), asking
    for silent in ("x.cpu()", "shape.type", "import torch", "torch.device('meta')"):
        assert not any(asks(node) for node in ast.walk(ast.parse(silent))), silent
