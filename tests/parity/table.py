"""Render results as the Markdown of `docs/parity.md`: totals, then every case, what was refused, what was left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

import torch

from farstep_service.optimizers import METHODS
from tests.parity.cases import Skip
from tests.parity.comparison import Comparison, Tolerance
from tests.parity.options import IMPLEMENTATIONS
from tests.parity.running import Result
from tests.parity.tolerances import CLOSE, EXACT, REASONS

BESIDE = "the notes beside the cases say why"
FUSED = "one rounding where torch has several: a compiled kernel keeps what is between in registers"

GROWING = "Their gradients come from the parameters, so that one rounding apart may be anything apart later."


def render(results: Sequence[Result], skipped: Sequence[Skip], kernel: str) -> str:
    """Return all tables; of fused kernels totals only, as the cases are the same."""
    if kernel == "fused":
        without = ", ".join(name for name, method in METHODS.items() if kernel not in method.kernels)
        left_out = f"Not compared: closures. {GROWING} {without} have no fused kernel."
        return f"{_totals(results, kernel)}\n\n{_by_optimizer(results)}\n\n{left_out}\n"
    parts = [_totals(results, kernel), *_details(results)]
    if refused := list(_refused(results)):
        parts.append("### Refused alike\n\n" + table(["optimizer", "case", "torch"], refused))
    rows = [[f"`{each.name}`", f"`{each.label}`", each.reason] for each in skipped]
    parts.append("### Not compared\n\n" + table(["optimizer", "case", "why"], rows))
    return "\n\n".join(parts) + "\n"


def _totals(results: Sequence[Result], kernel: str) -> str:
    """Return one row for each place and dtype."""
    tolerances = CLOSE if kernel == "fused" else EXACT
    rows = []
    for place in results[0].at:
        for dtype in dict.fromkeys(each.dtype for each in results):
            for inexact in (False, True):
                these = [each for each in results if each.dtype is dtype and bool(each.case.inexact) is inexact]
                total = sum((each.at[place] for each in these), Comparison())
                if not these:
                    continue
                allowed = tolerances[dtype]
                if inexact:
                    allowed = max(allowed, CLOSE[torch.float32], key=lambda each: each.atol)
                why = FUSED if kernel == "fused" else BESIDE if inexact else REASONS[dtype]
                rows.append(
                    [
                        place,
                        _dtype(dtype) + (", inexact" if inexact else ""),
                        f"{len(these):,}",
                        f"{total.tensors:,}",
                        f"{total.identical:,}",
                        *_largest(total),
                        _tolerance(allowed),
                        why,
                    ]
                )
    head = ["place", "dtype", "cases", "tensors", "bit-identical", "largest difference", "in ulps", "tolerance", "why"]
    return table(head, rows)


def _by_optimizer(results: Sequence[Result]) -> str:
    """Return one row for each optimizer and dtype, with the worst of both places."""
    rows = []
    for name, own in groupby(results, key=lambda each: each.case.name):
        these = list(own)
        for dtype in dict.fromkeys(each.dtype for each in these):
            total = sum((at for each in these if each.dtype is dtype for at in each.at.values()), Comparison())
            rows.append([f"`{name}`", _dtype(dtype), f"{total.tensors:,}", f"{total.identical:,}", *_largest(total)])
    return table(["optimizer", "dtype", "tensors", "bit-identical", "largest difference", "in ulps"], rows)


def _details(results: Sequence[Result]) -> Iterator[str]:
    """Return a table for each optimizer: a row for each case, a column for each dtype."""
    for name, own in groupby(results, key=lambda each: each.case.name):
        kept = [each for each in own if not each.at["embedded"].refusal]
        dtypes = list(dict.fromkeys(each.dtype for each in kept))
        rows = []
        for _, those in groupby(kept, key=lambda result: id(result.case)):
            these = list(those)
            case, cells = these[0].case, {result.dtype: _cell(result.at) for result in these}
            why = [case.inexact] if case.inexact else [IMPLEMENTATIONS[option] for option in case.instead]
            rows.append([f"`{case.label}`", *(cells.get(dtype, "") for dtype in dtypes), *(why or [""])])
        yield f"### {name}\n\n" + table(["options", *map(_dtype, dtypes), "note"], rows)


def _refused(results: Iterable[Result]) -> Iterator[list[str]]:
    for each in results:
        refusals = {found.refusal for found in each.at.values()}
        if refusals != {""}:
            words = " ".join(sorted(refusals)[-1].split())
            yield [f"`{each.case.name}`", f"`{each.case.label}`", words.replace("|", "\\|")]


def _cell(at: Mapping[str, Comparison]) -> str:
    """Return what all places have in common, or each place's own."""
    said = {place: _counts(found) for place, found in at.items()}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "<br>".join(f"{place}: {counts}" for place, counts in said.items())


def _counts(found: Comparison) -> str:
    counts = f"{found.identical}/{found.tensors}"
    if found.identical != found.tensors:
        counts += f" ({found.largest:.1e}, {found.ulps:.2g} ulp)"
    return counts + (" **differs**" if found.wrong else "")


def _largest(found: Comparison) -> tuple[str, str]:
    return (f"{found.largest:.1e}", f"{found.ulps:.2g}") if found.largest else ("0", "0")


def _tolerance(allowed: Tolerance) -> str:
    return f"{allowed.rtol:.1e} · largest + {allowed.atol:.1e}" if allowed != Tolerance() else "0"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)
