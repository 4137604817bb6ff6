"""End servers in every way, for long, and count what is lost: `python -m tests.robustness`, or `make torture`.

kills        SIGKILL at random under load of four worker processes, with a ledger of every acknowledged step
twins        SIGKILL within trainings of every mode, compared bit for bit with trainings that nothing disturbs
failpoints   an end at each named place of the code, many times each
restarts     SIGTERM within trainings: no step fails
power        losses of power in the life of a session, on a storage that has what was synced
files        power losses, failing disks and damaged bytes below the journal: tests of `tests/durability`
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import farstep
from farstep.protocol.durability import Durability, to_text
from farstep.settings import RemoteOptions
from farstep_service.failpoints import NAMES
from tests.benchmarks.hardware import hardware
from tests.robustness.failpoints import SMALL, Campaign
from tests.robustness.kills import MODES, ROTATING, attack
from tests.robustness.power import live, lose_power
from tests.robustness.twins import CASES, Steps, disturbed, train
from tests.support.service.servers import RunningServer, running_server

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "torture.md"
LEVELS: dict[str, RemoteOptions] = {
    "journal:os": {"durability": farstep.Journal(sync="os")},
    "journal:group": {"durability": farstep.Journal(sync="group")},
}
POWER_LEVELS: tuple[Durability, ...] = (
    farstep.Journal(sync="group"),
    farstep.Journal(sync="always"),
    farstep.Journal(sync="os"),
    farstep.Snapshot(every_steps=2),
)
FILES = tuple(f"tests/durability/test_{name}.py" for name in ("power_loss", "disk_errors", "damage"))
Part = Callable[[argparse.Namespace], tuple[list[str], list[str]]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for, print what came of them, and return 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.robustness", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"which parts: {', '.join(PARTS)}; all by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=1000, help="of the server, under load")
    parser.add_argument("--trainings", type=int, default=20, help="of each mode, with five kills each")
    parser.add_argument("--each", type=int, default=20, help="ends at each named place")
    parser.add_argument("--restarts", type=int, default=100, help="by SIGTERM")
    parser.add_argument("--losses", type=int, default=5000, help="of power, in the life of a session of each level")
    parser.add_argument("--states", type=int, default=100_000, help="of a disk after a loss of power, below a journal")
    parser.add_argument("--damages", type=int, default=5000, help="of files below a journal")
    parser.add_argument("--write", action="store_true", help=f"write the tables to {PAGE.name}")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    logging.getLogger("farstep").setLevel(logging.ERROR)  # each rollback is a warning
    lines, broken = [f"Seed {options.seed}; {hardware()}.", ""], []
    for part in options.parts or PARTS:
        began = time.monotonic()
        table, complaints = PARTS[part](options)
        table = [*table, "", f"{part}: {(time.monotonic() - began) / 60:.1f} minutes."]
        print("\n".join([*table, ""]), flush=True)
        lines += [*table, ""]
        broken += complaints
    if options.write:
        begin = PAGE.read_text().partition("<!-- figures -->")[0]
        PAGE.write_text(begin + "<!-- figures -->\n\n" + "\n".join(lines).rstrip() + "\n")
    for complaint in broken:
        print(f"BROKEN: {complaint}", file=sys.stderr)
    return bool(broken)


def _kills(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    table = [
        "| mode | level | kills of the server | of a worker too | acknowledged steps | lost | doubled | gave up | hung "
        "| slowest return of all workers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    complaints = []
    pairs = [(mode, level) for mode in MODES for level in LEVELS]
    for index, (mode, level) in enumerate(pairs):
        kills = options.kills * (index + 1) // len(pairs) - options.kills * index // len(pairs)
        with (
            tempfile.TemporaryDirectory() as place,
            running_server("--data-dir", place, *ROTATING, loaded=True) as server,
        ):
            result = attack(server, seed=options.seed + index, kills=kills, mode=mode, remote=LEVELS[level])
            log = server.log
        table.append(
            f"| {mode} | {level} | {result.server_kills:,} | {result.kills:,} | {result.steps:,} | {result.lost} | "
            f"{result.doubled} | {result.ended} | {result.hanging} | {result.slowest_s:.1f} s |"
        )
        if result.broken or result.server_kills < kills:
            complaints.append(f"the ledger of {mode}, {level}: {result}\n{log[-4000:]}")
    return table, complaints


def _twins(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    table = ["| training | trainings | kills | with other bits |", "|---|---|---|---|"]
    complaints: list[str] = []
    with tempfile.TemporaryDirectory() as place, running_server("--data-dir", place, loaded=True) as server:
        for name in CASES:
            wrong = _trainings(server, name, options, complaints, times=5, count=options.trainings)
            table.append(f"| {name} | {options.trainings} | {5 * options.trainings} | {wrong} |")
    return table, complaints


def _restarts(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    complaints: list[str] = []

    def ask_to_end(server: RunningServer) -> None:
        if code := server.stop():
            complaints.append(f"a server that was asked to end exited with {code}")

    count = max(1, options.restarts // 5)
    with tempfile.TemporaryDirectory() as place, running_server("--data-dir", place, loaded=True) as server:
        wrong = _trainings(server, "sync Adam", options, complaints, times=5, count=count, end=ask_to_end)
    return ["| rolling restarts | failed steps, or other bits |", "|---|---|", f"| {5 * count} | {wrong} |"], complaints


def _trainings(
    server: RunningServer,
    name: str,
    options: argparse.Namespace,
    complaints: list[str],
    *,
    times: int,
    count: int,
    end: Callable[[RunningServer], object] = RunningServer.kill,
) -> int:
    """Run so many disturbed trainings, half of them at each level, and return how many end with other bits."""
    case, session, wrong = CASES[name], name.replace(" ", "-"), 0
    calm = train(server.url, f"{session}.calm", case, LEVELS["journal:os"], Steps())
    for number in range(count):
        level = LEVELS[("journal:os", "journal:group")[number % 2]]
        try:
            ended = disturbed(
                server, f"{session}.{number}", case, level, times=times, seed=options.seed + number, end=end
            )
            found = [each for one, other in zip(calm, ended, strict=True) for each in one.differences(other)]
        except Exception as error:  # whatever a worker sees is a broken promise
            found = [f"{type(error).__name__}: {error}"]
        if found:
            wrong += 1
            complaints.append(f"{name}, seed {options.seed + number}: {found}")
    return wrong


def _failpoints(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    table = ["| place | ends there | not come to so often | wrong |", "|---|---|---|---|"]
    complaints = []
    with tempfile.TemporaryDirectory() as place, running_server("--data-dir", place, *SMALL, loaded=True) as server:
        campaign = Campaign(server, seed=options.seed)
        for name in NAMES:
            deaths = campaign.end_at(name, options.each)
            table.append(f"| `{name}` | {deaths.reached} | {deaths.missed} | {len(deaths.wrong)} |")
            complaints += [f"{name}: {each}" for each in deaths.wrong]
            if deaths.reached < options.each:
                complaints.append(f"{name} was reached {deaths.reached} times only")
    return table, complaints


def _power(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    table = [
        "| level | losses of power | answered pushes | said that steps are lost | wrong |",
        "|---|---|---|---|---|",
    ]
    complaints = []
    for index, level in enumerate(POWER_LEVELS):
        with tempfile.TemporaryDirectory() as place:
            life = live(level, place)
        losses = lose_power(life, seed=options.seed + index, states=options.losses)
        table.append(
            f"| {to_text(level)} | {losses.states:,} | {losses.told:,} | {losses.rolled_back:,} | {len(losses.wrong)} |"
        )
        complaints += [f"{to_text(level)}: {each}" for each in losses.wrong[:20]]
    return table, complaints


def _files(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    counts = {"CRASH_STATES": str(options.states), "DAMAGES": str(options.damages)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *FILES],
        cwd=ROOT,
        env={**os.environ, **counts},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.strip().splitlines()[-1]
    table = [
        "| losses of power of a journal | damaged files | tests |",
        "|---|---|---|",
        f"| {options.states:,} | {options.damages:,} | {last} |",
    ]
    return table, [done.stdout[-4000:]] if done.returncode else []


PARTS: dict[str, Part] = {
    "kills": _kills,
    "twins": _twins,
    "failpoints": _failpoints,
    "restarts": _restarts,
    "power": _power,
    "files": _files,
}


if __name__ == "__main__":
    sys.exit(main())
