"""The tests read as sentences, and none of them waits for a clock."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
TREES = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("test_*.py"))
}


def test_every_test_says_what_it_shows():
    """The docstring of a test is one sentence of behaviour."""
    silent = [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        if not (ast.get_docstring(node) or "").split("\n\n")[0].endswith(".")
    ]
    assert silent == []


def test_no_test_sleeps():
    """A test waits for what it wants to see, never for a time in which that should have happened."""
    sleeping = [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.sleep", "sleep")
    ]
    assert sleeping == []


def test_no_test_module_is_anothers_helper():
    """What several of them need is in a module of its own, named after what it is, or a fixture of their room."""
    borrowing = [
        f"{path}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module is not None
        if node.module.startswith("tests.") and node.module.rpartition(".")[2].startswith("test_")
    ]
    assert borrowing == []


SUPPORT = "support"
"""Where helpers are, in the folders of those that they help."""
TOOLS = {"attack", "benchmarks", "parity", "promises", "robustness"}
"""Programs that `make` runs, each with its tests beside it."""
MODELS = {"codecs", "coordinator", "policies", "session"}
"""Folders whose tests compare with a model or a table that stands beside them."""


def test_helpers_are_in_one_place():
    """A folder of tests holds tests: what they share is a fixture of the folder, or in tests/support."""
    tests = ROOT / "tests"
    elsewhere = [
        str(path.relative_to(ROOT))
        for path in sorted(tests.rglob("*.py"))
        if not path.name.startswith("test_") and path.name != "conftest.py"
        if path.relative_to(tests).parts[0] not in {SUPPORT, *TOOLS, *MODELS}
    ]
    assert elsewhere == []
    assert list((tests / SUPPORT).rglob("test_*.py")) == []
