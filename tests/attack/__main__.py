"""Attack a server as strangers, broken clients and broken networks do: `python -m tests.attack`, or `make attack`.

bodies        damaged bodies to every route: no answer is a 5xx, and a session that was not meant keeps its bits
connections   every state of a connection held at once, without a token, beside a good client
ledger        workers killed behind a network that cuts: nothing acknowledged is lost, nothing is applied twice
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.attack import bodies, company, ledger
from tests.attack.company import p99_ms
from tests.benchmarks.hardware import hardware
from tests.support.service.measured import MIB, Process
from tests.support.service.raw import RawClient, gradient
from tests.support.service.servers import TOKEN, running_server

PAGE = Path(__file__).parents[2] / "docs" / "attack.md"
PARTS = ("bodies", "connections", "ledger")
MOST_GROWTH_BYTES = 50 * MIB
MOST_RATIO = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for, print what came of them, and return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which parts: {', '.join(PARTS)}; all by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bodies", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=10.0, help="for how long connections are held")
    parser.add_argument("--each", type=int, default=8, help="connections at once, of each way to hold one")
    parser.add_argument("--steps", type=int, default=20_000, help="acknowledged steps of the ledger")
    parser.add_argument("--write", action="store_true", help=f"write the tables to {PAGE.name}")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    lines, broken = [f"Seed {options.seed}; {hardware()}.", ""], []
    for part in options.parts or PARTS:
        table, complaints = RUNS[part](options)
        print("\n".join([*table, ""]), flush=True)
        lines += [*table, ""]
        broken += complaints
    if options.write:
        begin = PAGE.read_text().partition("<!-- figures -->")[0] if PAGE.exists() else "# Attacks\n\n"
        PAGE.write_text(begin + "<!-- figures -->\n\n" + "\n".join(lines).rstrip() + "\n")
    for complaint in broken:
        print(f"BROKEN: {complaint}", file=sys.stderr)
    return bool(broken)


def _bodies(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    with running_server() as server, RawClient(server.url) as raw:
        (kept,) = raw.begun("kept", parameters=bodies.PARAMETERS)
        assert kept.push(gradient(5, bodies.PARAMETERS)).status == 200
        before = kept.pull()
        memory = Process(server)
        result = bodies.attack(server, seed=options.seed, count=options.bodies)
        taken = memory.settle(MOST_GROWTH_BYTES)
        version, parameters = kept.pull()
        same = version == before[0] and all(map(torch.equal, parameters, before[1]))
    statuses = ", ".join(f"{status}: {count:,}" for status, count in sorted(result.statuses.items()))
    table = [
        "| damaged bodies | 5xx or unknown | connections closed | memory taken | statuses |",
        "|---|---|---|---|---|",
        f"| {result.sent:,} | {len(result.wrong)} | {result.dropped} | {taken / MIB:.0f} MiB | {statuses} |",
    ]
    complaints = [*result.wrong[:20], *([] if same else ["a session that was not addressed changed"])]
    if taken > MOST_GROWTH_BYTES:
        complaints.append(f"bodies left {taken / MIB:.0f} MiB behind")
    return table, complaints


def _connections(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    with running_server(token=TOKEN) as server:
        result = company.attack(server, seconds=60 * options.minutes, each=options.each)
    quiet, control, attacked = map(p99_ms, (result.quiet, result.control, result.attacked))
    table = [
        f"{options.minutes:g} minutes, {options.each} connections of each kind at once, "
        f"{len(result.attacked):,} steps of a good client ({company.PARAMETERS:,} parameters).",
        "",
        "| held | opened | longest life | sent |",
        "|---|---|---|---|",
        *(
            f"| {name} | {held.opened:,} | {held.longest_s:.1f} s | {held.sent_bytes / MIB:,.1f} MiB |"
            for name, held in result.held.items()
        ),
        "",
        "| good client | p99 alone | beside an attack on a sink | attacked | ratio to the sink | server's memory |",
        "|---|---|---|---|---|---|",
        f"| | {quiet:.2f} ms | {control:.2f} ms | {attacked:.2f} ms | {attacked / control:.2f} | "
        f"+{result.taken_bytes / MIB:.0f} MiB at most, +{result.left_bytes / MIB:.0f} MiB after |",
    ]
    complaints = []
    if attacked > MOST_RATIO * control:
        complaints.append(f"a good client's p99 became {attacked / control:.1f} x")
    if result.taken_bytes > MOST_GROWTH_BYTES:
        complaints.append(f"connections took {result.taken_bytes / MIB:.0f} MiB")
    return table, complaints


def _ledger(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    with running_server() as server:
        result = ledger.attack(server, seed=options.seed, steps=options.steps)
    table = [
        "| acknowledged steps | kills | network faults | lost | doubled | gave up | hung |",
        "|---|---|---|---|---|---|---|",
        f"| {result.steps:,} | {result.kills} | {result.faults:,} | {result.lost} | {result.doubled} | "
        f"{result.ended} | {result.hanging} |",
    ]
    complaints = []
    if result.lost or result.doubled or result.hanging or result.ended:
        complaints.append(f"the ledger: {result}")
    return table, complaints


RUNS = {"bodies": _bodies, "connections": _connections, "ledger": _ledger}


if __name__ == "__main__":
    sys.exit(main())
