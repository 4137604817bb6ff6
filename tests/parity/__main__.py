"""Compare every optimizer with torch.optim, embedded and on a server process, and print the table.

    python -m tests.parity [--kernel fused] [--only Adam,SGD] [--dtypes float32] [--steps 50] [--write]
    python -m tests.parity --distances [--only Adam,SGD] [--dtypes float16] [--write]

Ends with 1 if anything differs beyond the tolerance that the table states. `--distances` compares training in 16 bits
with float64: torch's and that of fused kernels. `--write` puts the table into `docs/parity.md`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from farstep.settings import RemoteOptions
from farstep_service.optimizers import METHODS
from tests.benchmarks.hardware import hardware
from tests.parity.cases import DTYPES, NAMES, cases, skipped
from tests.parity.distances import ELEMENTS, FUSED, HALVES, SEEDS, STEPS, distances
from tests.parity.distances import render as render_distances
from tests.parity.running import Result, run_all
from tests.parity.table import render
from tests.parity.ways import Closure
from tests.support.service.servers import running_server

DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"
FUSED_DTYPES = (torch.float32, torch.float64)


def main() -> int:
    """Run what is asked for, print it, and say whether all of it is alike."""
    asked = _asked()
    named = [getattr(torch, name) for name in asked.dtypes.split(",") if name]
    if asked.distances:
        return _distances(tuple(asked.only.split(",")) if asked.only else FUSED, named or HALVES, write=asked.write)
    dtypes = named or (FUSED_DTYPES if asked.kernel == "fused" else DTYPES)
    names = tuple(asked.only.split(",")) if asked.only else NAMES
    names = tuple(name for name in names if asked.kernel in METHODS[name].kernels)
    table = [case for case in cases(names) if asked.kernel == "reference" or not isinstance(case.way, Closure)]
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled")  # torch's own, of its Adagrad
    here: RemoteOptions = {"kernel": asked.kernel}
    with running_server() as server:
        places: dict[str, RemoteOptions] = {"embedded": here, "server": {**here, "server": server.url}}
        results = run_all(table, dtypes, asked.steps, places, lambda word: print(word, file=sys.stderr))
    title = f"{hardware()}; farstep {version('farstep')}; {asked.steps} steps, {asked.kernel} kernels"
    text = f"{title}.\n\n{render(results, skipped(names), asked.kernel)}"
    print(text)
    if asked.write:
        _write(asked.kernel, text)
    wrong = list(_wrong(results))
    print("\n".join([*wrong, f"{len(wrong)} wrong in {len(results) * len(places)} comparisons"]), file=sys.stderr)
    return 1 if wrong else 0


def _distances(names: Sequence[str], dtypes: Sequence[torch.dtype], *, write: bool) -> int:
    """Compare fused kernels in 16 bits with float64, print it, and return 1 if any is further away than torch."""
    torch.set_num_threads(1)
    found = list(distances(names, dtypes, STEPS, lambda word: print(word, file=sys.stderr)))
    size = f"{STEPS} steps of {SEEDS} x {ELEMENTS:,} elements"
    text = f"{hardware()}; farstep {version('farstep')}; {size}.\n\n{render_distances(found)}\n"
    print(text)
    if write:
        _write("distances", text)
    further = [
        f"{each.name}({each.label}) {each.dtype} is further from float64 than torch" for each in found if each.further
    ]
    print("\n".join([*further, f"{len(further)} further in {len(found)} comparisons"]), file=sys.stderr)
    return 1 if further else 0


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=["reference", "fused"], default="reference")
    parser.add_argument("--distances", action="store_true", help="of 16 bits from float64, fused kernels and torch")
    parser.add_argument("--only", default="", help="optimizers, separated by commas")
    parser.add_argument("--dtypes", default="", help="dtypes, separated by commas")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--write", action="store_true", help="put the table into docs/parity.md")
    return parser.parse_args()


def _wrong(results: list[Result]) -> list[str]:
    return [
        f"{each.case.name}({each.case.label}) {each.dtype} {place}: {words}"
        for each in results
        for place, found in each.at.items()
        for words in found.wrong
    ]


def _write(part: str, text: str) -> None:
    begin, end = f"<!-- {part}: written by make parity -->\n", f"<!-- {part}: end -->"
    before, _, rest = DOCUMENT.read_text().partition(begin)
    _, _, after = rest.partition(end)
    DOCUMENT.write_text(f"{before}{begin}\n{text}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
