"""How long each consistency mode takes to learn the digits when one worker of four is five times slower.

    make bench ARGS="--rows stragglers"
    python tests/benchmarks/bench_stragglers.py [--cycles 3] [--step-ms 20]

Workers are threads of this process, the server is another one. A step is the real gradient of a small network on a
batch of 32 digits; then the worker waits until its step has taken `--step-ms`, and the straggler until it has taken
five times as long, as if it were computing. So the rows tell modes apart, and not machines. The optimizer is plain SGD
with one learning rate for all rows. Columns:

    seconds      median over the cycles of the time until 93 % of the test images are recognised, from the first step on
    of sync      how many times faster than a barrier of all four
    versions     steps of the session until then
    not applied  share of the pushes that were late or stale
    staleness    mean over the pushes that were applied

Target: a quorum and a bound are at least twice as fast as sync under the straggler.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from farstep.conversation import Conversation
from farstep.errors import FarstepError
from farstep.optim import SGD
from farstep.protocol.consistency import Async, Bounded, Consistency, Sync
from farstep.protocol.receipt import StepReport
from farstep_service.demo.digits import Digits, load_digits, shard
from tests.benchmarks.hardware import hardware
from tests.benchmarks.rows import Row, faster
from tests.support.service.servers import RunningServer, running_server

WORKERS, SLOWER = 4, 5
BATCH, LR, ACCURACY = 32, 0.1, 0.93
GIVEN_UP_S = 60.0

MODES: Sequence[Consistency] = (
    Sync(workers=WORKERS),
    Sync(workers=WORKERS, quorum=3),
    Sync(workers=WORKERS, quorum=3, late="fold", staleness_scaling="inverse"),
    Bounded(staleness=4),
    Bounded(staleness=64),
    Async(),
    Async(staleness_scaling="inverse"),
    Async(delay_compensation=0.04),
)
COMPARED: Sequence[Consistency] = (MODES[1], MODES[3])
AT_LEAST = 2.0


@dataclass
class Race:
    """One run: four workers, until one of them has seen the accuracy."""

    server: RunningServer
    name: str
    mode: Consistency
    step_s: float
    train: Digits
    test: Digits
    stop: threading.Event = field(default_factory=threading.Event)
    reports: list[StepReport] = field(default_factory=list)
    seconds: float = GIVEN_UP_S

    def run(self) -> None:
        """Let the workers step until the first of them has seen the accuracy."""
        together = threading.Barrier(WORKERS)
        threads = [threading.Thread(target=self._work, args=(number, together)) for number in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, number: int, together: threading.Barrier) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = SGD(
            model.parameters(),
            lr=LR,
            server=self.server.url,
            session=self.name,
            worker=f"w{number}",
            consistency=self.mode,
        )
        own = self.train.take(shard(len(self.train), number, WORKERS))
        drawn = torch.Generator().manual_seed(number)
        step_s = self.step_s * (SLOWER if number == WORKERS - 1 else 1)
        together.wait()
        began = time.monotonic()
        while not self.stop.is_set() and time.monotonic() - began < GIVEN_UP_S:
            until = time.monotonic() + step_s
            batch = own.take(torch.randint(len(own), (BATCH,), generator=drawn))
            optimizer.zero_grad()
            loss: torch.Tensor = nn.functional.cross_entropy(model(batch.images), batch.labels)
            torch.autograd.backward(loss)
            self.stop.wait(until - time.monotonic())
            try:
                optimizer.step()
            except FarstepError:
                if not self.stop.is_set():
                    raise
                break
            if optimizer.last_step is not None:
                self.reports.append(optimizer.last_step)
            if number == 0 and recognised(model, self.test) >= ACCURACY:
                self.seconds = time.monotonic() - began
                self.stop.set()
                self._end()
        optimizer.close()

    def _end(self) -> None:
        """Remove the session, so that nobody waits for the one that stopped first."""
        conversation = Conversation(self.server.url, None)
        conversation.control("DELETE", f"/v1/sessions/{self.name}")
        conversation.close()


@torch.no_grad()
def recognised(model: nn.Module, digits: Digits) -> float:
    """Return the share of images that a model recognises."""
    return float((model(digits.images).argmax(1) == digits.labels).float().mean())


def raced(modes: Sequence[Consistency], cycles: int, step_s: float) -> dict[int, list[Race]]:
    """Return the runs of each mode, which took turns."""
    train, test = load_digits()
    races: dict[int, list[Race]] = {}
    with running_server() as server:
        for cycle in range(cycles):
            for row, mode in enumerate(modes):
                race = Race(server, f"race-{cycle}-{row}", mode, step_s, train, test)
                race.run()
                races.setdefault(row, []).append(race)
    return races


def measure(*, quick: bool = False) -> list[Row]:
    """Return how much faster a quorum and a bound are than sync, with a straggler among four workers."""
    races = raced((Sync(workers=WORKERS), *COMPARED), 1 if quick else 3, 0.02)
    sync_s, *others = (median(race.seconds for race in own) for own in races.values())
    return [
        faster(f"digits to {ACCURACY:.0%}, a straggler, {mode!r}", seconds, "s", f"{MODES[0]!r}", sync_s, AT_LEAST)
        for mode, seconds in zip(COMPARED, others, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=20.0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    races = raced(MODES, given.cycles, given.step_ms / 1000)
    sync_s = median(race.seconds for race in races[0])
    print(hardware())
    print("| mode | seconds | of sync | versions | not applied | staleness |\n|---|---|---|---|---|---|")
    for row, mode in enumerate(MODES):
        seconds = median(race.seconds for race in races[row])
        reports = [report for race in races[row] for report in race.reports]
        applied = [report for report in reports if report.applied]
        versions = median(max(report.version for report in race.reports) for race in races[row])
        print(
            f"| `{mode!r}` | {seconds:.2f} | {sync_s / seconds:.1f} x | {versions:.0f} | "
            f"{1 - len(applied) / len(reports):.0%} | {mean(report.staleness for report in applied):.1f} |"
        )


if __name__ == "__main__":
    main()
