"""What a session is: everything its creator decided, checked and frozen. Workers join with an equal plan.

A session grows by param groups: it then has a new plan, whose beginning is the old one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from farstep.errors import InvalidOption, LimitExceeded, found_by
from farstep.protocol.consistency import Consistency, from_options
from farstep.protocol.durability import NONE, Durability, from_document, to_text
from farstep.protocol.hyper import Hyper
from farstep.protocol.policies import NO_POLICIES, Policies
from farstep_service.layout import Layout, SegmentSpec
from farstep_service.optimizers import METHODS
from farstep_service.optimizers.rule import AnyMethod, Rule
from farstep_service.store import check_first_step

KernelMode = Literal["auto", "reference", "fused"]
MAX_GROUPS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Describe one session completely.

    Attributes:
        rule: its update rule.
        groups: the options of each param group at creation; they may change later.
        nonfinite: `refuse` or `allow` gradients that hold NaN or Inf, or `skip` their steps.
        kernel: which kernels may run.
        policies: what is done to the gradients before a step, and to the parameters after it.
        durability: what is kept of it on disk. None in the plan of a worker that joins with any level; a session that
            was created has one.
        level: the same as text, for answers.
    """

    name: str
    rule: AnyMethod
    groups: tuple[Hyper, ...]
    layout: Layout
    consistency: Consistency
    nonfinite: str
    kernel: KernelMode
    policies: Policies = NO_POLICIES
    durability: Durability | None = None
    level: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "level", to_text(NONE if self.durability is None else self.durability))

    @classmethod
    def build(
        cls,
        *,
        name: str,
        optimizer: str,
        groups: Sequence[Mapping[str, Any]],
        segments: Sequence[SegmentSpec] | Layout,
        consistency: Mapping[str, Any],
        nonfinite: str,
        kernel: str,
        policy: Mapping[str, Any] | None = None,
        durability: Mapping[str, Any] | None = None,
    ) -> Plan:
        """Check what a client asks for.

        Raises:
            InvalidOption: an unknown optimizer, option or mode, a value out of range, or options with which
                no step could be taken.
            TensorMismatch, LimitExceeded: a parameter that cannot be stored, or that the optimizer does not take.
        """
        rule = METHODS.get(optimizer)
        if rule is None:
            raise InvalidOption(
                f"Unknown optimizer {optimizer!r:.80}.",
                remedy=f"There are {', '.join(sorted(METHODS))}.",
                field="optimizer",
            )
        layout = segments if isinstance(segments, Layout) else Layout.build(segments)
        rule.check_layout(layout)
        if layout.groups > len(groups):
            raise InvalidOption(
                f"A parameter is of group {layout.groups - 1}, but there are {len(groups)} groups.", field="groups"
            )
        hypers = tuple(rule.hyper.from_options(options) for options in groups)
        _check_steps(rule, layout, hypers)
        wanted = Policies.from_options(policy) if policy else NO_POLICIES
        _check_policies(rule, layout, nonfinite, wanted)
        plan = cls(
            name=name,
            rule=rule,
            groups=hypers,
            layout=layout,
            consistency=from_options(consistency),
            nonfinite=_one_of("nonfinite", nonfinite, ("refuse", "skip", "allow")),
            kernel=_kernel(rule, kernel),
            policies=wanted,
            durability=None if durability is None else _durability(durability),
        )
        plan.check_consistency()
        return plan

    def check_consistency(self) -> None:
        """Refuse a mode that does not go with the optimizer.

        Raises:
            InvalidOption: stale evaluations of a closure cannot be made up for.
        """
        mode = self.consistency
        if isinstance(self.rule, Rule) or (mode.staleness_scaling == "none" and not mode.delay_compensation):
            return
        field = "delay_compensation" if mode.delay_compensation else "staleness_scaling"
        raise InvalidOption(
            f"{self.rule.name} takes evaluations of one step, of which none may be stale: there is no {field} for it.",
            remedy="Leave it out.",
            field=field,
        )

    @property
    def looks_at_gradients(self) -> bool:
        """Return whether a step depends on a check of its gradients, which must not change after it."""
        return self.nonfinite != "allow" or self.policies.looking

    def append(self, options: Mapping[str, Any], segments: Sequence[SegmentSpec]) -> Plan:
        """Return this plan with one more param group, whose number the segments have.

        Raises:
            InvalidOption: an unknown option, a value out of range, or one with which no step could be taken.
            TensorMismatch, LimitExceeded: a parameter that cannot be stored, or that the optimizer does not take, or
                more than a session may have.
        """
        if len(self.groups) >= MAX_GROUPS:
            raise LimitExceeded(f"The session has {MAX_GROUPS} param groups.", field="group", limit=MAX_GROUPS)
        hyper, layout = self.rule.hyper.from_options(options), self.layout.append(segments)
        self.rule.check_layout(layout)
        _check_policies(self.rule, layout, self.nonfinite, self.policies)
        groups = (*self.groups, hyper)
        _check_steps(self.rule, layout, groups, beginning=len(self.groups))
        return replace(self, groups=groups, layout=layout)

    def first(self, groups: int) -> Plan:
        """Return what this plan was before it grew beyond these first param groups."""
        return replace(self, groups=self.groups[:groups], layout=self.layout.first(groups))

    def difference(self, other: Plan, *, options: bool = True, in_force: Sequence[Hyper] | None = None) -> str | None:
        """Say in words where another plan differs first, None if nowhere.

        Args:
            options: compare the options of the groups, too.
            in_force: the options of each group by now, with which another plan may agree in place of the first ones.
        """
        if self.rule.name != other.rule.name:
            return f"its optimizer is {self.rule.name}, not {other.rule.name}"
        mine, theirs = self.layout.segments, other.layout.segments
        for index, (here, there) in enumerate(zip(mine, theirs, strict=False)):
            if here != there:
                return (
                    f"its parameter {index} is {here.name!r} {here.dtype}{list(here.shape)} of group {here.group}, "
                    f"not {there.name!r} {there.dtype}{list(there.shape)} of group {there.group}"
                )
        if len(mine) != len(theirs):
            return f"it has {len(mine)} parameters, not {len(theirs)}"
        if len(self.groups) != len(other.groups):
            return f"it has {len(self.groups)} param groups, not {len(other.groups)}"
        if options and (different := self._other_options(other, in_force or self.groups)):
            return different
        for key in ("consistency", "nonfinite", "kernel"):
            if getattr(self, key) != getattr(other, key):
                return f"its {key} is {getattr(self, key)!r}, not {getattr(other, key)!r}"
        if difference := self.policies.difference(other.policies):
            return difference
        if self.durability is None or other.durability in (None, self.durability):
            return None
        return f"its durability is {self.level}, not {other.level}"

    def _other_options(self, other: Plan, in_force: Sequence[Hyper]) -> str | None:
        """Return where the options of another plan are neither those of the creation nor those in force."""
        for index, (ours, now, others) in enumerate(zip(self.groups, in_force, other.groups, strict=True)):
            given, changed = others.to_options(), now.to_options()
            if given == changed:
                continue
            for key, value in ours.to_options().items():
                if value != given[key]:
                    by_now = f" and is {changed[key]!r}" if changed[key] != value else ""
                    return f"{key} of its group {index} was created as {value!r}{by_now}, not {given[key]!r}"
        return None


def _check_steps(rule: AnyMethod, layout: Layout, groups: Sequence[Hyper], beginning: int = 0) -> None:
    """Refuse options of the groups from `beginning` on with which their first step could not be taken.

    Raises:
        InvalidOption: naming what stands in the way.
    """
    if isinstance(rule, Rule):
        check_first_step(layout, rule, groups, beginning)
        return
    for hyper in groups[beginning:]:
        rule.check_step(hyper)


def _check_policies(rule: AnyMethod, layout: Layout, nonfinite: str, policies: Policies) -> None:
    """Refuse policies that go with no step of this optimizer, or with no gradient of these parameters.

    Raises:
        InvalidOption: naming the option.
    """
    asked = [*policies.to_options(), *(["nonfinite"] if nonfinite == "skip" else [])]
    if asked and not isinstance(rule, Rule):
        raise InvalidOption(
            f"{asked[0]} does not go with {rule.name}, which searches along the gradients it is given.",
            remedy="Do it in the closure.",
            field=asked[0],
        )
    for policy in policies.asked:
        for segment in layout.segments:
            policy.check_parameter(segment.name, is_complex=segment.is_complex)


def _durability(document: Mapping[str, Any]) -> Durability:
    with found_by("server"):
        return from_document(document)


def _kernel(rule: AnyMethod, wanted: str) -> KernelMode:
    kernel = cast(KernelMode, _one_of("kernel", wanted, ("auto", "reference", "fused")))
    if kernel == "fused" and "fused" not in rule.kernels:
        raise InvalidOption(
            f"There is no fused kernel for {rule.name}, which does not work on each element by itself.",
            remedy="Use the kernel auto or reference.",
            field="kernel",
        )
    return kernel


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise InvalidOption(f"Invalid {name}: {value!r:.80}. There are {', '.join(choices)}.", field=name)
    return value
