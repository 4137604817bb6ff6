"""Names of parameters as the plain model has them, so that workers with wrapped and plain models share a session.

    torch.compile                     _orig_mod.layer.weight, and within a model layers.0._orig_mod.weight
    DistributedDataParallel           module.layer.weight
    FSDP, checkpoint wrappers         _fsdp_wrapped_module, _checkpoint_wrapped_module

A compiled worker and a plain one train the same model. What a wrapper puts into a name is removed, and what the user
put there is kept where the two can be told apart: given the model, `module` counts as a wrapper's only below a wrapper;
given names alone, `module.` is removed only if all of them begin with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

WRAPPED: Final = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Attributes under which wrappers keep what they wrap; other modules have no such names."""
MODULE: Final = "module"
"""The attribute of parallel wrappers; other modules may have the same name."""


def plain_names(names: Sequence[str]) -> list[str]:
    """Return names without what wrappers put into them; unchanged if two would then be equal."""
    short = [_joined([part for part in name.split(".") if part not in WRAPPED], name) for name in names]
    while short and all(name.startswith(f"{MODULE}.") for name in short):
        short = [name.removeprefix(f"{MODULE}.") for name in short]
    return short if len(set(short)) == len(set(names)) else list(names)


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model under their names without wrappers."""
    parallel = {
        path for path, each in model.named_modules() if isinstance(each, (DataParallel, DistributedDataParallel))
    }
    found: dict[str, Tensor] = dict(model.named_parameters())
    short = {name: _without(name, parallel) for name in found}
    if len(set(short.values())) < len(found):
        return found
    return {short[name]: p for name, p in found.items()}


def _without(name: str, parallel: set[str]) -> str:
    kept, path = [], ""
    for part in name.split("."):
        if part not in WRAPPED and not (part == MODULE and path in parallel):
            kept.append(part)
        path = f"{path}.{part}" if path else part
    return _joined(kept, name)


def _joined(parts: list[str], name: str) -> str:
    return ".".join(parts) or name
