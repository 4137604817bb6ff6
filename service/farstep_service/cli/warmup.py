"""`farstep warmup`: build fused kernels before the first session needs them."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farstep.errors import InvalidOption
from farstep.protocol.codecs import codecs
from farstep_service.cli.output import FAILED, JsonOutput, print_json, reporting

if TYPE_CHECKING:
    from farstep_service.kernels import KernelStatus

LOOK_AGAIN_S = 0.5
HALVES = tuple(codec.element for codec in codecs() if codec.element is not None)


class Dtype(StrEnum):
    """Dtypes of kernels; complex parameters use the kernels of their real parts."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


def warmup(
    optimizers: Annotated[
        str, typer.Option(metavar="NAMES", help="Optimizers, separated by commas; all by default.")
    ] = "",
    dtypes: Annotated[
        str, typer.Option(metavar="DTYPES", help=f"Any of {', '.join(Dtype)}, separated by commas.")
    ] = Dtype.float32,
    everything: Annotated[
        bool, typer.Option("--all", help="Every dtype, and every choice of optional state, such as that of amsgrad.")
    ] = False,
    wire: Annotated[
        str,
        typer.Option(
            metavar="DTYPES", help=f"Also for float32 with gradients and answers in {' or '.join(HALVES)}, or both."
        ),
    ] = "",
    device: Annotated[str, typer.Option(envvar="FARSTEP_SERVE_DEVICE", help="The device.")] = "cpu",
    json_output: JsonOutput = False,
) -> None:
    """Build fused kernels ahead, so that no session begins on the slower reference ones.

    Without options, build the kernels that most sessions need: every optimizer in float32. A server builds any other
    kernel in the background when a session first needs it, and uses the reference kernel meanwhile.
    """
    with reporting(json_output):
        chosen = choose("" if everything else dtypes, list(Dtype), "dtypes")
        halves = choose(wire, list(HALVES), "wire") if wire else []
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

        import torch

        from farstep_service.kernels import Kernels, possible, usual
        from farstep_service.kernels.build import build_on_all_cores
        from farstep_service.optimizers import RULES
        from farstep_service.server import check_device, check_device_name

        names = choose(optimizers, list(RULES), "optimizers")
        check_device_name(device)
        check_device(device)
        kernels = Kernels("auto", build=build_on_all_cores)
        wanted = (possible if everything else usual)([RULES[name] for name in names], chosen)
        wide = [(rule, form) for rule, form in wanted if form.dtype == Dtype.float32]
        wanted += [(rule, form._replace(gradient=half, copy=half)) for half in halves for rule, form in wide]
        kernels.begin(wanted, torch.device(device))
        shown: set[object] = set()
        over = False
        while not over:
            over = kernels.wait(LOOK_AGAIN_S)
            for each in kernels.status():
                if each.state != "building" and each.package not in shown:
                    shown.add(each.package)
                    if not json_output:
                        typer.echo(line_of(each))
    found = kernels.status()
    if json_output:
        print_json({"kernels": [document_of(each) for each in found]})
    if any(each.state == "failed" for each in found):
        raise typer.Exit(FAILED)


def choose(text: str, known: list[str], field: str) -> list[str]:
    """Return the names in a list separated by commas, all known ones for "".

    Raises:
        InvalidOption: a name is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InvalidOption(f"Unknown {field}: {name!r:.80}.", remedy=f"There are {', '.join(known)}.", field=field)
    return [str(name) for name in names or known]


def line_of(status: KernelStatus) -> str:
    """Describe the state of one kernel."""
    package = status.package
    threads = "one thread" if package.threads == "one" else "many threads"
    rule = " with ".join([package.rule, *filter(None, [", ".join(package.optional)])])
    gradients = f" from {package.gradient}" if package.gradient else ""
    copy = f" and to {package.copy}" if package.copy else ""
    what = f"{rule} {package.dtype}{gradients}{copy} on {package.device}, {threads}"
    return f"{what}: {status.state}" + (f", {status.reason.splitlines()[0]}" if status.reason else "")


def document_of(status: KernelStatus) -> dict[str, Any]:
    """Return the state of one kernel as `--json` prints it."""
    package = status.package
    return {
        "optimizer": package.rule,
        "dtype": package.dtype,
        "gradient": package.gradient or package.dtype,
        "copy": package.copy or None,
        "optional": list(package.optional),
        "device": package.device,
        "threads": package.threads,
        "state": status.state,
        "reason": status.reason,
    }
