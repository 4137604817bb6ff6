"""`farstep bench`: measure what a step of a model costs over this link and on this server, and where the time goes."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farstep_service.cli.output import JsonOutput, print_facts, print_json, print_table, reporting, size
from farstep_service.cli.remote import Token, document_of, open_conversation

if TYPE_CHECKING:
    from farstep_service.bench import Expectation, Workload

DEFAULT_PARAMETERS = "25M"
DEFAULT_TENSORS = 60

PART_LABELS = {
    "up": "gradients up",
    "queue": "waiting for the turn",
    "check": "finite check",
    "update": "update",
    "down": "parameters down",
    "copy": "copy into the model",
    "client": "client bookkeeping",
    "other": "other: latency, HTTP, threads",
}
EMBEDDED_PARTS = frozenset({"update", "client", "other"})


def bench(
    server: Annotated[
        str | None,
        typer.Option(envvar="FARSTEP_SERVER", metavar="URL", help="The server; without one, steps are embedded."),
    ] = None,
    token: Token = None,
    parameters: Annotated[
        str | None,
        typer.Option(metavar="N", help=f"Number of parameters, as 2.5k, 25M or 7B; {DEFAULT_PARAMETERS} by default."),
    ] = None,
    tensors: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"Number of tensors; {DEFAULT_TENSORS} by default.")
    ] = None,
    shapes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The model's shapes instead, one per line: 64x3x7x7.")
    ] = None,
    optimizer: Annotated[str, typer.Option(metavar="NAME", help="The optimizer.")] = "Adagrad",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="Dtype of parameters and gradients.")] = "float32",
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, help="Steps of each size; as many as fit into --seconds by default."),
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="S", min=0.1, help="How long the steps may take.")] = 10.0,
    wait: Annotated[
        float, typer.Option(metavar="S", min=0.0, help="How long to wait for a fused kernel to be built.")
    ] = 60.0,
    json_output: JsonOutput = False,
) -> None:
    """Measure link and server with real steps of a model like yours, and estimate other sizes."""
    with reporting(json_output):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
        from farstep_service.bench import BenchOptions, run

        options = BenchOptions(
            workload=workload_of(parameters, tensors, shapes, optimizer, dtype),
            steps=steps,
            seconds=seconds,
            wait_s=wait,
        )

        def progress(what: str) -> None:
            if not json_output:
                typer.echo(f"{what} ...", err=True)

        with open_conversation(server, token) if server else nullcontext() as conversation:
            info = {} if conversation is None else document_of(conversation, "/v1/info", "farstep")
            found = run(options, conversation, token, info, progress)
    if json_output:
        print_json(found.document())
    else:
        show(found)


def workload_of(
    parameters: str | None, tensors: int | None, shapes: Path | None, optimizer: str, dtype: str
) -> Workload:
    """Return the workload that the options describe.

    Raises:
        InvalidOption: an invalid option, or two that both give the size.
    """
    from farstep.errors import invalid_option
    from farstep_service.bench import Workload, count_of, read_shapes

    if shapes is None:
        count = count_of(parameters or DEFAULT_PARAMETERS)
        return Workload.of(optimizer, dtype, count, min(DEFAULT_TENSORS, count) if tensors is None else tensors)
    if parameters is not None or tensors is not None:
        raise invalid_option(
            "--shapes already gives the numbers of parameters and tensors.",
            remedy="Leave --parameters and --tensors out.",
            field="shapes",
        )
    return Workload(optimizer, dtype, read_shapes(shapes))


def show(found: Expectation) -> None:
    """Print the result for people."""
    from farstep_service.bench import STEP_SHARE

    requested, costs, trip = found.requested, found.costs, found.round_trip
    typical = requested.typical()
    model, kernel = requested.workload, f"{requested.report.kernel} kernel"
    if requested.report.kernel == "reference" and model.fuses:
        kernel += ": no fused one was ready; with it, updates are shorter"
    tensors = f"{model.parameters:,} {model.dtype} parameters in {len(model.shapes)} tensors"
    facts = {"model": f"{tensors} ({size(model.nbytes)})", "optimizer": f"{model.optimizer}, {kernel}"}
    if trip is None:
        facts["server"] = "none: embedded in this process"
    else:
        sent, received = size(requested.report.bytes_sent), size(requested.report.bytes_received)
        facts |= {
            "server": f"{found.server}, on {found.device}",
            "round trip": f"{ms(trip.median_s)}, p99 {ms(trip.p99_s)}, of an empty request",
            "link": f"{rate(found, 'up')} up, {rate(found, 'down')} down, as a step uses it",
            "bytes": f"{sent} there and {received} back in each step",
        }
    facts |= {
        "device": f"{ms(typical.parts_s['update'])} for the update",
        "step": f"{ms(requested.median_s)}, p90 {ms(requested.p90_s)}, of {len(requested.samples)} steps; "
        f"{1 / requested.median_s:,.1f} steps per second",
    }
    print_facts(facts)
    typer.echo()
    parts = {part: typical.parts_s[part] for part in PART_LABELS if trip or part in EMBEDDED_PARTS}
    rows = [(PART_LABELS[part], ms(seconds), f"{seconds / typical.total_s:.0%}") for part, seconds in parts.items()]
    print_table(
        ("WHERE IT GOES", "TIME", "SHARE"), [*rows, ("together", ms(typical.total_s), "mean of the middle half")]
    )
    typer.echo()
    measured = [(f"{each.workload.parameters:,}", ms(each.median_s), "measured") for each in found.sizes]
    estimated = [(f"{count:,}", ms(seconds), "estimated") for count, seconds in found.estimates()]
    print_table(("PARAMETERS", "STEP", ""), measured + estimated)
    typer.echo(
        f"A step costs {ms(costs.fixed_s)} by itself, and for large models {ms(1e9 * costs.per_byte_s)} for each GB of "
        "parameters."
    )
    typer.echo(
        f"For the step to be less than {STEP_SHARE:.0%} of it, the backward pass has to take at least "
        f"{ms(found.backward_s)}."
    )


def ms(seconds: float) -> str:
    """Format seconds with three digits: `12.3 ms`."""
    if seconds >= 9.995:
        return f"{seconds:,.0f} s" if seconds >= 99.95 else f"{seconds:.1f} s"
    millis = 1e3 * seconds
    return f"{millis:,.0f} ms" if millis >= 99.95 else f"{millis:.1f} ms" if millis >= 9.995 else f"{millis:.2f} ms"


def rate(found: Expectation, part: str) -> str:
    """Format the rate of bytes up or down."""
    per_s = found.bytes_per_s(part)
    return "nothing" if per_s is None else f"{size(round(per_s))}/s"
