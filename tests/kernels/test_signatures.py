"""Every operation has a torch reference of the same signature; everything outside Triton is annotated."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from kernels import ops

ROOT = Path(__file__).parents[2] / "kernels"


@pytest.mark.parametrize("name", ops.TRITON)
def test_kernel_and_reference_have_one_signature(name):
    kernel = getattr(importlib.import_module(f"kernels.{ops.TRITON[name]}"), name)
    assert inspect.signature(kernel) == inspect.signature(getattr(ops, name))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_outside_triton_are_annotated(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not any(
            ast.unparse(d).startswith(("triton.jit", "gluon.jit", "hopper.paired"))
            for d in node.decorator_list
        ):
            given = node.args.args + node.args.kwonlyargs
            missing = [a.arg for a in given if a.annotation is None and a.arg != "self"]
            assert not missing, f"{node.name}: {missing}"
            assert node.returns is not None, node.name
