"""Bugs that are planted on purpose, each with the test that catches it: `python -m tests.robustness.planted NAME`.

A bug takes the place of a piece of code in this process, where pytest then runs the one test that is named. The line
that is printed says whether the bug was at work, and how pytest ended: a suite that cannot fail shows nothing.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest

from farstep_service.coordinator import Push
from farstep_service.coordinator.modes.decisions import Skip, Step
from farstep_service.coordinator.modes.sync import SyncMode
from farstep_service.coordinator.written import read_back, write_down
from farstep_service.durability import reading, recorder, snapshots
from farstep_service.durability.journal import Journal
from farstep_service.durability.recorder import Recorder
from farstep_service.durability.storage import Storage
from farstep_service.keeping import place, recovery
from farstep_service.session import Session
from farstep_service.sessions import registry
from farstep_service.sessions.keeper import Keeper
from tests.support.durability.power import PowerStorage

POWER: Final = "tests/robustness/test_power.py"
LOSS: Final = f"{POWER}::test_a_loss_of_power_takes_nothing_that_was_answered"
SAID: Final = f"{POWER}::test_a_loss_of_power_that_takes_steps_is_announced"
DEATH: Final = f"{POWER}::test_the_death_of_the_process_takes_nothing_that_was_answered"

at_work = False
"""Whether the bug has been at work."""
broken = ""
"""Why the bug cannot be planted any more: the code around it has changed."""


@dataclass(frozen=True)
class Bug:
    """A bug.

    Attributes:
        plant: puts it in place.
        caught_by: the test that fails then.
    """

    plant: Callable[[], None]
    caught_by: str


def _noted(work: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that notes that the bug is at work."""

    def noted(*arguments: Any, **options: Any) -> Any:
        global at_work, broken
        at_work = True
        try:
            return work(*arguments, **options)
        except (AttributeError, NameError, TypeError) as error:
            broken = f"{type(error).__name__}: {error}"
            raise

    return noted


def _put(owner: Any, name: str, work: Callable[..., Any]) -> None:
    assert hasattr(owner, name), f"there is no {name} any more: plant the bug where that is now"
    setattr(owner, name, _noted(work))


# -- when an answer is given -----------------------------------------------------------------------------------------


def acknowledge_before_the_sync() -> None:
    async def kept(self: Keeper, number: int | None = None) -> float:
        return 0.0

    _put(Keeper, "kept", kept)


def take_a_failed_sync_for_done() -> None:
    whole = Journal.sync

    def sync(self: Journal, number: int) -> None:
        try:
            whole(self, number)
        except OSError:
            self.failed, self.durable = None, self.number

    _put(Journal, "sync", sync)


# -- what is written down --------------------------------------------------------------------------------------------


def leave_receipts_out_of_a_snapshot() -> None:
    whole = Keeper._saved

    def saved(self: Keeper, *, clean: bool) -> Any:
        found = whole(self, clean=clean)
        if found is None:
            return None
        state = read_back(found.coordinator)
        for member in state.roster.members.values():
            member.receipts.clear()
        return replace(found, coordinator=write_down(state))

    _put(Keeper, "_saved", saved)


def leave_a_schedulers_options_out() -> None:
    def written(event: Any) -> Any:
        if isinstance(event, Push):
            event = replace(event, head=replace(event.head, groups={}))
        return write_down(event)

    _put(recorder, "write_down", written)


def leave_results_out() -> None:
    _put(Recorder, "_result", lambda self, result, now: None)


def leave_waiting_gradients_out_of_a_snapshot() -> None:
    _put(Session, "waiting", lambda self: [])


def sum_in_the_order_of_arrival() -> None:
    def take(self: SyncMode, *, without: tuple[str, ...] = ()) -> Step | Skip:
        decision = Skip if any(push.skip for push in self.state.waiting.values()) else Step
        workers = tuple(self.state.waiting)
        self._clear()
        return decision(workers, without)

    _put(SyncMode, "_take", take)


# -- in which order the disk has it ----------------------------------------------------------------------------------


def forget_to_sync_names() -> None:
    _put(PowerStorage, "sync_names", lambda self, folder: self.observe())


def rename_a_snapshot_before_it_is_synced() -> None:
    def put(self: Any, name: str, pieces: Any) -> None:
        path = f"{self.folder}/{name}"
        self.storage.write(path + snapshots.PART, pieces)
        self.storage.rename(path + snapshots.PART, path)
        self.storage.sync_names(self.folder)

    _put(snapshots._Writer, "put", put)


def remove_old_snapshots_before_the_new_one() -> None:
    def write(storage: Storage, folder: str, number: int, saved: Any) -> None:
        snapshots.forget_snapshots(storage, folder, number)
        snapshots.write_snapshot(storage, folder, number, saved)

    _put(place, "write_snapshot", write)


def let_the_journal_go_before_the_snapshot_is_there() -> None:
    whole = place.Place.write

    def write(self: place.Place, saved: Any, journal: Any, *, only: bool = False) -> None:
        journal.forget(saved.position.segment)
        whole(self, saved, journal, only=only)

    _put(place.Place, "write", write)


# -- how it is read --------------------------------------------------------------------------------------------------


class _Whatever:
    """Equal to everything."""

    def __eq__(self, _: object) -> bool:
        return True

    def __ne__(self, _: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def take_a_damaged_event_for_a_whole_one() -> None:
    _put(reading, "chained", lambda before, number, body: _Whatever())


def take_any_payload() -> None:
    _put(recorder, "is_whole", lambda payload, reader: True)


def go_back_without_a_word() -> None:
    _put(recovery, "begin_anew", lambda recovered: recovered)


def keep_another_life_in_memory_only() -> None:
    _put(recovery, "write_anew", lambda recovered: None)


def count_an_outage_as_time() -> None:
    whole = registry.Registry._add

    def add(self: Any, session: Any, keeper_: Any, clock: Any) -> Any:
        return whole(self, session, keeper_, self._clock)

    _put(registry.Registry, "_add", add)


BUGS: Final[Mapping[str, Bug]] = {
    bug.plant.__name__.replace("_", " "): bug
    for bug in (
        Bug(acknowledge_before_the_sync, f"{LOSS}[group]"),
        Bug(take_a_failed_sync_for_done, "tests/durability/test_disk_errors.py::test_one_operation_fails[EIO]"),
        Bug(leave_receipts_out_of_a_snapshot, f"{DEATH}[os]"),
        Bug(leave_a_schedulers_options_out, f"{DEATH}[os]"),
        Bug(leave_results_out, f"{POWER}::test_a_step_happens_again_with_the_kernel_that_ran"),
        Bug(leave_waiting_gradients_out_of_a_snapshot, f"{DEATH}[os]"),
        Bug(sum_in_the_order_of_arrival, f"{DEATH}[os]"),
        Bug(forget_to_sync_names, f"{LOSS}[group]"),
        Bug(rename_a_snapshot_before_it_is_synced, f"{LOSS}[group]"),
        Bug(remove_old_snapshots_before_the_new_one, f"{DEATH}[os]"),
        Bug(let_the_journal_go_before_the_snapshot_is_there, f"{DEATH}[os]"),
        Bug(
            take_a_damaged_event_for_a_whole_one,
            "tests/durability/test_damage.py::test_no_damage_is_silent",
        ),
        Bug(take_any_payload, f"{POWER}::test_gradients_that_are_damaged_are_not_applied"),
        Bug(go_back_without_a_word, f"{SAID}[snapshot]"),
        Bug(keep_another_life_in_memory_only, f"{SAID}[os]"),
        Bug(
            count_an_outage_as_time,
            "tests/robustness/test_clock.py::test_a_lease_goes_on_where_it_stopped[killed]",
        ),
    )
}
"""The bugs by what they do."""


def main(name: str) -> None:
    """Plant a bug, run the test that is to catch it, and print what came of it."""
    bug = BUGS[name]
    bug.plant()
    said = io.StringIO()
    quietly = ["-q", "-x", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    loaded_before = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    with redirect_stdout(said), redirect_stderr(said):
        code = pytest.main([*quietly, *loaded_before, bug.caught_by])
    print(
        json.dumps({"at_work": at_work, "broken": broken, "code": int(code), "said": said.getvalue()[-2000:]}),
        flush=True,
    )


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
