"""CompiledKernel `__init__` files list names, and the list is true."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("farstep", "farstep_service")
INITS = sorted(path for room in ("client", "service") for path in (ROOT / room).rglob("__init__.py"))


def name_of(init: Path) -> str:
    return ".".join(init.relative_to(ROOT).parts[1:-1])


def offered(init: Path) -> set[str]:
    """Return the public names that the file takes from our modules or assigns itself."""
    tree = ast.parse(init.read_text())
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).split(".")[0] in OURS):
            names |= {alias.asname or alias.name for alias in node.names}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("init", INITS, ids=name_of)
def test_all_lists_what_the_package_offers(init: Path):
    """`__all__` names exactly the public names that the file brings in, and each of them is there."""
    package = importlib.import_module(name_of(init))
    listed = getattr(package, "__all__", [])
    assert sorted(listed) == sorted(offered(init))
    assert [name for name in listed if not hasattr(package, name)] == []


@pytest.mark.parametrize("init", INITS, ids=name_of)
def test_packages_define_nothing_in_their_init(init: Path):
    """An `__init__` file lists names; all it may define are the module hooks `__getattr__` and `__dir__`."""
    defined = [
        node.name
        for node in ast.parse(init.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    ]
    assert [name for name in defined if name not in ("__getattr__", "__dir__")] == []
