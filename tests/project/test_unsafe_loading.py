"""Nothing in the client or the service can unpickle: bytes from a network or a disk never become code."""

import ast
from pathlib import Path

import pytest

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_NAMES = {
    "torch.load",
    "torch.save",
    "torch.serialization.load",
    "torch.serialization.save",
    "torch.jit.load",
    "torch.package",
    "torch.hub.load",
    "numpy.load",
    "pandas.read_pickle",
}


def unsafe(source: str) -> list[str]:
    """Return the uses of modules and functions that unpickle, as `line: name`, whatever they are called locally."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    used: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                used.append((node.lineno, alias.name))
                local = alias.asname or alias.name.split(".")[0]
                known[local] = alias.name if alias.asname else local
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                used.append((node.lineno, full))
                known[alias.asname or alias.name] = full
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            used.append((node.lineno, ".".join([known.get(first, ""), *rest])))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            used += [(node.lineno, str(given.value)) for given in node.args if isinstance(given, ast.Constant)]
    return [
        f"{line}: {name}"
        for line, name in sorted(set(used))
        if name.split(".")[0] in UNSAFE_MODULES or name in UNSAFE_NAMES or name.startswith("torch.package.")
    ]


@pytest.mark.promise("Nothing in client or server unpickles.", area="security")
@pytest.mark.parametrize("room", ["client", "service"])
def test_nothing_unpickles(root: Path, room: str):
    """No module imports a pickle-like library or calls `torch.load` or one of its relatives."""
    found = {
        str(path.relative_to(root)): uses
        for path in sorted((root / room).rglob("*.py"))
        if (uses := unsafe(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as harmless",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "import torch as t\nrestore = t.load",
        "from torch import load as restore",
        "import torch.serialization\ntorch.serialization.load(path)",
        "def inside():\n    from cloudpickle import loads",
        "import importlib\nimportlib.import_module('dill')",
    ],
)
def test_every_disguise_is_seen(source: str):
    """The check sees the unsafe name through aliases, inside functions and without a call."""
    assert unsafe(source) != []


@pytest.mark.parametrize(
    "source", ["import msgpack\nmsgpack.unpackb(b)", "import torch\ntorch.frombuffer(b)", "load(b)"]
)
def test_what_is_safe_is_left_alone(source: str):
    """Reading msgpack or raw bytes is no offence."""
    assert unsafe(source) == []
