"""Run cases: torch's side once, ours at each place, compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from farstep.settings import RemoteOptions
from tests.parity import training
from tests.parity.cases import Case
from tests.parity.comparison import Comparison, compare
from tests.parity.tolerances import tolerance

Places = Mapping[str, RemoteOptions]


@dataclass(frozen=True)
class Result:
    """What became of one case in one dtype, at each place."""

    case: Case
    dtype: torch.dtype
    at: Mapping[str, Comparison]


def run(case: Case, dtype: torch.dtype, steps: int, places: Places) -> Result:
    """Train a case in one dtype on torch's side and at each place."""
    theirs = training.theirs(case, dtype, steps)
    return Result(
        case,
        dtype,
        {
            place: compare(
                training.ours(case, dtype, steps, options),
                theirs,
                tolerance(case, dtype, options.get("kernel", "reference")),
            )
            for place, options in places.items()
        },
    )


def run_all(
    cases: Iterable[Case], dtypes: Sequence[torch.dtype], steps: int, places: Places, say: Callable[[str], None]
) -> list[Result]:
    """Train all cases in those of their dtypes that are asked for."""
    results: list[Result] = []
    for case in cases:
        if not results or results[-1].case.name != case.name:
            say(case.name)
        results += [run(case, dtype, steps, places) for dtype in case.dtypes if dtype in dtypes]
    return results
