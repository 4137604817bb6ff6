"""What two trainings left, compared: how much, how much of it bit by bit, and how far the rest is apart.

An outcome is a flat mapping from the path of an entry, such as `state.3.exp_avg`, to a tensor, a number or None. Both
sides have to have the same paths, and tensors the same dtype and shape. Values have to be equal in every bit where the
tolerance is 0, else within it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from farstep.errors import FarstepError

Outcome = Mapping[str, object]


@dataclass(frozen=True)
class Tolerance:
    """How far apart elements may be: `atol + rtol * the largest element of torch's tensor`.

    Not relative to the element itself as in `torch.testing.assert_close`: an element that has just passed zero carries
    the rounding errors of the time when it was large.
    """

    rtol: float = 0.0
    atol: float = 0.0


@dataclass(frozen=True)
class Refusal:
    """An exception in the place of an outcome.

    Attributes:
        step: at which it was raised; 0 is the constructor.
    """

    step: int
    error: Exception

    @property
    def words(self) -> str:
        """Return the message; an error of ours says more beside torch's words."""
        return self.error.detail if isinstance(self.error, FarstepError) else str(self.error)

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.words}"


@dataclass(frozen=True)
class Comparison:
    """SegmentCounters and distances of one case, or of several added up.

    Attributes:
        tensors: how many were compared, numbers of the state among them.
        identical: how many have the same bits.
        largest: the largest difference of two elements.
        ulps: the same in units in the last place of the largest element of its tensor.
        wrong: what is beyond the tolerance or not alike, in words.
        refusal: what both refused to do.
    """

    tensors: int = 0
    identical: int = 0
    largest: float = 0.0
    ulps: float = 0.0
    wrong: tuple[str, ...] = ()
    refusal: str = ""

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(
            self.tensors + other.tensors,
            self.identical + other.identical,
            max(self.largest, other.largest),
            max(self.ulps, other.ulps),
            (*self.wrong, *other.wrong),
            self.refusal or other.refusal,
        )


def compare(ours: Outcome | Refusal, theirs: Outcome | Refusal, tolerance: Tolerance) -> Comparison:
    """Compare two outcomes, or two refusals by class and words.

    A constructor raises torch's very exception. A step may raise one of ours, if it is caught as torch's is and has its
    words. What torch refuses in the first step, a constructor of ours may refuse in the same words.
    """
    if isinstance(ours, Refusal) and isinstance(theirs, Refusal):
        wrong = (
            () if _alike(ours, theirs) else (f"farstep at step {ours.step} {ours}; torch at {theirs.step} {theirs}",)
        )
        return Comparison(wrong=wrong, refusal=str(theirs))
    if isinstance(ours, Refusal):
        return Comparison(wrong=(f"farstep refused at step {ours.step}: {ours}",))
    if isinstance(theirs, Refusal):
        return Comparison(wrong=(f"farstep took what torch refused at step {theirs.step}: {theirs}",))
    total = Comparison()
    if different := sorted(ours.keys() ^ theirs.keys()):
        total += Comparison(wrong=(f"only one side has {', '.join(different)}",))
    for path in ours.keys() & theirs.keys():
        total += _entry(path, ours[path], theirs[path], tolerance)
    return total


def _alike(ours: Refusal, theirs: Refusal) -> bool:
    caught = isinstance(ours.error, type(theirs.error)) if theirs.step else type(ours.error) is type(theirs.error)
    early = ours.step == 0 < theirs.step  # an option with which no step is possible is refused where it enters
    return ours.words == theirs.words and (early or (caught and ours.step == theirs.step))


def _entry(path: str, ours: object, theirs: object, tolerance: Tolerance) -> Comparison:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return _tensors(path, ours, theirs, tolerance)
    a_rate = path.endswith(".t")  # of L-BFGS: the group's lr as the user wrote it, 1 or 1.0
    if ours == theirs and (type(ours) is type(theirs) or a_rate):
        return Comparison()
    return Comparison(wrong=(f"{path} is {ours!r}, torch's {theirs!r}",))


def _tensors(path: str, ours: Tensor, theirs: Tensor, tolerance: Tolerance) -> Comparison:
    theirs = theirs.to_dense() if theirs.is_sparse else theirs  # what torch keeps sparse is dense in a session
    if (ours.dtype, ours.shape, ours.device) != (theirs.dtype, theirs.shape, theirs.device):
        words = [f"{each.dtype} {tuple(each.shape)} on {each.device}" for each in (ours, theirs)]
        return Comparison(tensors=1, wrong=(f"{path} is {words[0]}, torch's {words[1]}",))
    if _bits(ours) == _bits(theirs):
        return Comparison(tensors=1, identical=1)
    wide = torch.complex128 if ours.is_complex() else torch.float64
    here, there = ours.to(wide), theirs.to(wide)
    apart = (here - there).abs()
    apart[(here == there) | (here.isnan() & there.isnan())] = 0  # an infinity less itself is not a number
    largest = apart.nan_to_num(nan=inf, posinf=inf).max().item()
    scale = there.abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    unit = torch.finfo(ours.dtype).eps * scale
    exact = tolerance == Tolerance()
    wrong = (
        ()
        if largest <= tolerance.atol + tolerance.rtol * scale and not exact
        else (f"{path} differs by {largest:.3g}",)
    )
    return Comparison(1, 0, largest, largest / unit if unit else inf, wrong)


def _bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
