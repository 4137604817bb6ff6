"""Whose options a step has, decided from what came with its pushes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from farstep.protocol.messages import PushHead, WriteName
from farstep_service.coordinator import Agreed, agreed


def named(worker: str, groups: Mapping[int, Mapping[str, Any]], passing: bool = False) -> PushHead:
    return PushHead(WriteName(worker, 1, 1), "here", 0, groups=groups, options="push" if passing else "session")


def said(worker: str, lr: float, *, passing: bool = False, group: int = 0, **more: object) -> PushHead:
    return named(worker, {group: {"lr": lr, **more}}, passing)


def test_pushes_without_options_change_nothing() -> None:
    """No push names any: what is in force stays so."""
    assert agreed([named("w0", {}, False), named("w1", {}, True)]) == Agreed()


def test_the_later_of_two_changes_counts_and_the_difference_is_said() -> None:
    """As summed, so decided; both workers and both values are named, and the one that was used."""
    found = agreed([said("w0", 0.1), said("w1", 0.05)])
    assert found.lasting == {0: {"lr": 0.05}}
    assert found.passing == {}
    assert found.disagreement == "lr of group 0 is 0.1 from w0, 0.05 from w1; 0.05 was used."


@pytest.mark.parametrize("passing", [False, True])
def test_workers_that_say_the_same_do_not_disagree(passing: bool) -> None:
    """Equal values are no difference, nor is a worker that changes nothing."""
    found = agreed([said("w0", 0.1, passing=passing), said("w1", 0.1, passing=passing), named("w2", {}, False)])
    assert found.disagreement == ""
    assert (found.passing if passing else found.lasting) == {0: {"lr": 0.1}}


def test_changes_of_different_options_all_hold() -> None:
    """Options that one worker alone changes hold beside those of another."""
    found = agreed([named("w0", {0: {"lr": 0.1}}, False), named("w1", {0: {"eps": 1e-3}, 1: {"lr": 0.2}}, False)])
    assert found == Agreed({0: {"lr": 0.1, "eps": 1e-3}, 1: {"lr": 0.2}})


def test_options_of_one_step_count_before_those_that_stay() -> None:
    """A group of a push is whole, whatever a later push changes in the session; both are kept apart."""
    found = agreed([said("w0", 0.3, passing=True, eps=1e-8), said("w1", 0.05)])
    assert found.lasting == {0: {"lr": 0.05}}
    assert found.passing == {0: {"lr": 0.3, "eps": 1e-8}}
    assert found.disagreement.endswith("0.05 from w1; 0.3 was used.")


def test_what_is_said_stays_short() -> None:
    """With many workers, values and options three of each are named, and the number of the others."""
    pushes = [named(f"w{i}", {0: {f"o{j}": i // 5 for j in range(9)}}, False) for i in range(40)]
    words = agreed(pushes).disagreement
    assert words.startswith("o0 of group 0 is 0 from w0, w1, w2 and 2 more, 1 from w5,")
    assert "and 5 other values; 7 was used." in words
    assert words.endswith("So it is with 6 other options.")
    assert len(words) < 1000
