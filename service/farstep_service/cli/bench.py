"""`farstep bench`: what a step of a model will cost over this link and on this server, and where the time goes."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farstep_service.cli.output import JsonOutput, print_facts, print_json, print_table, reporting, size
from farstep_service.cli.remote import Token, conversation, document_of

if TYPE_CHECKING:
    from farstep_service.bench import Expectation, Workload

DEFAULT_PARAMETERS = "25M"
DEFAULT_TENSORS = 60

PARTS_TOLD = {
    "up": "gradients up",
    "queue": "waiting for the turn",
    "check": "finite check",
    "update": "update",
    "down": "parameters down",
    "copy": "copy into the model",
    "client": "client bookkeeping",
    "other": "other: latency, HTTP, threads",
}
PARTS_EMBEDDED = frozenset({"update", "client", "other"})


def bench(
    server: Annotated[
        str | None,
        typer.Option(envvar="FARSTEP_SERVER", metavar="URL", help="Which server; without one a step is embedded."),
    ] = None,
    token: Token = None,
    parameters: Annotated[
        str | None, typer.Option(metavar="N", help=f"How many, as 2.5k, 25M or 7B; {DEFAULT_PARAMETERS} otherwise.")
    ] = None,
    tensors: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"In how many tensors; {DEFAULT_TENSORS} otherwise.")
    ] = None,
    shapes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The model's shapes instead, one in a line: 64x3x7x7.")
    ] = None,
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="Which optimizer.")] = "Adagrad",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="Of the parameters and gradients.")] = "float32",
    steps: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Steps of each size; as many as there is time for otherwise.")
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="S", min=0.1, help="How long the steps may take.")] = 10.0,
    wait: Annotated[
        float, typer.Option(metavar="S", min=0.0, help="How long to wait for a fused kernel that is being built.")
    ] = 60.0,
    json_output: JsonOutput = False,
) -> None:
    """Measure link and server with real steps of a model like yours, and say what to expect of it."""
    with reporting(json_output):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
        from farstep_service.bench import Asked, run

        asked = Asked(
            workload=workload_of(parameters, tensors, shapes, optimizer, dtype),
            steps=steps,
            seconds=seconds,
            wait_s=wait,
        )

        def tell(what: str) -> None:
            if not json_output:
                typer.echo(f"{what} ...", err=True)

        with conversation(server, token) if server else nullcontext() as speaking:
            info = {} if speaking is None else document_of(speaking, "/v1/info", "farstep")
            found = run(asked, speaking, token, info, tell)
    if json_output:
        print_json(found.document())
    else:
        show(found)


def workload_of(
    parameters: str | None, tensors: int | None, shapes: Path | None, optimizer: str, dtype: str
) -> Workload:
    """Return the model that was asked for.

    Raises:
        InvalidOption: there can be none, or it is said twice how large it is.
    """
    from farstep.errors import invalid_option
    from farstep_service.bench import Workload, count_of, read_shapes

    if shapes is None:
        count = count_of(parameters or DEFAULT_PARAMETERS)
        return Workload.of(optimizer, dtype, count, min(DEFAULT_TENSORS, count) if tensors is None else tensors)
    if parameters is not None or tensors is not None:
        raise invalid_option(
            "--shapes says how many parameters and tensors there are.",
            remedy="Leave --parameters and --tensors out.",
            field="shapes",
        )
    return Workload(optimizer, dtype, read_shapes(shapes))


def show(found: Expectation) -> None:
    """Print what was found, for people."""
    from farstep_service.bench import SHARE

    asked, usual, costs, trip = found.asked, found.asked.usual(), found.costs, found.round_trip
    model, kernel = asked.workload, f"{asked.report.kernel} kernel"
    if asked.report.kernel == "reference" and model.fuses:
        kernel += ": no fused one was ready, with which updates will be shorter"
    tensors = f"{model.parameters:,} {model.dtype} parameters in {len(model.shapes)} tensors"
    facts = {"model": f"{tensors} ({size(model.nbytes)})", "optimizer": f"{model.optimizer}, {kernel}"}
    if trip is None:
        facts["server"] = "none: embedded in this process"
    else:
        sent, received = size(asked.report.bytes_sent), size(asked.report.bytes_received)
        facts |= {
            "server": f"{found.server}, on {found.device}",
            "round trip": f"{ms(trip.median_s)}, p99 {ms(trip.p99_s)}, of an empty request",
            "link": f"{rate(found, 'up')} up, {rate(found, 'down')} down, as a step uses it",
            "bytes": f"{sent} there and {received} back in each step",
        }
    facts |= {
        "device": f"{ms(usual.parts_s['update'])} for the update",
        "step": f"{ms(asked.median_s)}, p90 {ms(asked.p90_s)}, of {len(asked.samples)} steps; "
        f"{1 / asked.median_s:,.1f} steps per second",
    }
    print_facts(facts)
    typer.echo()
    parts = {part: usual.parts_s[part] for part in PARTS_TOLD if trip or part in PARTS_EMBEDDED}
    rows = [(PARTS_TOLD[part], ms(seconds), f"{seconds / usual.total_s:.0%}") for part, seconds in parts.items()]
    print_table(("WHERE IT GOES", "TIME", "SHARE"), [*rows, ("together", ms(usual.total_s), "mean of the middle half")])
    typer.echo()
    measured = [(f"{each.workload.parameters:,}", ms(each.median_s), "measured") for each in found.sizes]
    estimated = [(f"{count:,}", ms(seconds), "estimated") for count, seconds in found.estimates()]
    print_table(("PARAMETERS", "STEP", ""), measured + estimated)
    typer.echo(
        f"A step costs {ms(costs.fixed_s)} by itself, and for large models {ms(1e9 * costs.per_byte_s)} for each GB of "
        "parameters."
    )
    typer.echo(
        f"For the step to be less than {SHARE:.0%} of it, the backward pass has to take at least "
        f"{ms(found.backward_s)}."
    )


def ms(seconds: float) -> str:
    """Return seconds for people: `12.3 ms`, three digits."""
    if seconds >= 9.995:
        return f"{seconds:,.0f} s" if seconds >= 99.95 else f"{seconds:.1f} s"
    millis = 1e3 * seconds
    return f"{millis:,.0f} ms" if millis >= 99.95 else f"{millis:.1f} ms" if millis >= 9.995 else f"{millis:.2f} ms"


def rate(found: Expectation, part: str) -> str:
    """Return how many bytes went up or down in a second."""
    per_s = found.bytes_per_s(part)
    return "nothing" if per_s is None else f"{size(round(per_s))}/s"
