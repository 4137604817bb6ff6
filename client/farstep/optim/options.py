"""Options of param groups: checked by torch's own class, compared with what was sent, and converted to plain values.

What the user puts into a group stays there, as in torch: a numpy scalar, a tensor, an OmegaConf list. Each step
converts it anew, so that an option changed in place counts, too:

    flag      maximize, amsgrad, foreach, ...    whether torch's `if` would take it
    count     max_iter, ns_steps, ...            an int, or a float that is whole, since torch compares and counts alike
    number    lr, betas, eps, ...                a float or an int, or a list of them
    text      line_search_fn, adjust_lr_fn       a string

Where torch refuses an option or a gradient, its own class is asked, on tensors of one element, and raises its own
error: code that catches torch's exceptions gets them. Each class takes other types of numbers (a `Fraction` is a
learning rate for Adam and not for SGD), and only a step shows which, so each unusual type is tried once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from farstep.errors import invalid_option
from farstep.protocol.plain import PYTHONS, pythons_own


def refusal(
    torch_class: type[torch.optim.Optimizer], defaults: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]
) -> RuntimeError | None:
    """Return what torch's class raises for gradients like those of these groups, None where it takes them all."""
    for group in groups:
        probes = {_gradient_kind(p): p for p in group["params"] if p.grad is not None}
        for p in probes.values():
            asked = torch_class([_probe(p)], **arguments(torch_class, defaults))
            asked.param_groups[0].update({key: group[key] for key in defaults if key in group})
            try:
                asked.step()
            except RuntimeError as error:
                return error
            except TypeError:
                return None  # an option that is no number, which the session says better
    return None


def _gradient_kind(p: Tensor) -> tuple[object, ...]:
    return p.dtype, p.dim(), p.grad is not None and (p.grad.layout, p.grad.dtype)


def _probe(p: Tensor) -> Tensor:
    """Return a parameter of one element with a gradient of the same kind."""
    probe = torch.zeros([1] * p.dim(), dtype=p.dtype, device="cpu")
    probe.requires_grad_(probe.is_floating_point() or probe.is_complex())
    gradient = torch.ones_like(probe, requires_grad=False)
    if p.grad is not None and p.grad.is_sparse:
        gradient = gradient.to_sparse(p.grad.sparse_dim())
    if p.grad is not None and p.grad.dtype is not p.dtype:
        gradient = gradient.to(p.grad.dtype)
        probe.data = probe.data.to(p.grad.dtype)  # torch takes a gradient only of the present dtype
        probe.grad = gradient
        probe.data = probe.data.to(p.dtype)
        return probe
    probe.grad = gradient
    return probe


STEPS: Final = 8
"""Steps that a trial takes: SGD multiplies by its momentum in the second, RAdam uses `eps` from the sixth on."""
_TAKEN: dict[tuple[object, ...], Exception | None] = {}
"""The outcomes of trials: the error that torch's class raised, None where it took the option."""


def check_types(torch_class: type[torch.optim.Optimizer], groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse options of types that torch's class does not take, before they are converted to numbers.

    Raises:
        TypeError, ValueError, RuntimeError: as torch's class does, naming the option.
    """
    kinds = option_kinds(torch_class)
    for group in groups:
        if not (names := undocumented(group, kinds)):
            continue
        p = next((p for p in group["params"] if p.grad is not None), None)
        if p is None:
            continue
        plain = plain_options(group, {key: kind for key, kind in kinds.items() if key in group and key not in names})
        used = tuple(map(bool, plain.values()))
        for name in names:
            key = (torch_class, name, _type_of(group[name]), used, *_gradient_kind(p))
            if key not in _TAKEN:
                _TAKEN[key] = _trial(torch_class, plain, name, group[name], p)
            if (said := _TAKEN[key]) is not None:
                raise _as(said)(
                    f"torch.optim.{torch_class.__name__} does not take {name}={group[name]!r:.80}, which is a "
                    f"{type(group[name]).__name__}: {said!s:.200}"
                ) from said


def _as(error: Exception) -> type[Exception]:
    """Return the built-in class of an error."""
    return next(each for each in (TypeError, ValueError, RuntimeError) if isinstance(error, each))


def _type_of(value: Any) -> tuple[object, ...]:
    """Return the facts that decide whether an operation takes a value: its type, and whether it is zero or empty."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (type(value), *map(_type_of, value))
    form = (getattr(value, "dtype", None), getattr(value, "shape", None))
    return type(value), *form, bool(value) if form[1] in (None, ()) else None


def _trial(
    torch_class: type[torch.optim.Optimizer], plain: Mapping[str, Any], name: str, value: Any, p: Tensor
) -> Exception | None:
    """Return what torch's class raises for one option beside plain ones, None where it takes it."""
    probe = _probe(p)
    try:
        asked = torch_class([probe], **arguments(torch_class, {}))
        asked.param_groups[0].update({**plain, "foreach": False, "fused": False, "capturable": False, name: value})
        for _ in range(STEPS):
            _step(asked, probe)
    except (TypeError, ValueError, RuntimeError) as error:
        return error.with_traceback(None)
    except ArithmeticError:
        return None  # for the value, not its type
    return None


def _step(optimizer: torch.optim.Optimizer, probe: Tensor) -> None:
    loss = probe.sum().abs() + 1  # which LBFGS takes for its objective
    optimizer.step(lambda: loss)  # type: ignore[arg-type, return-value]  # as LBFGS has it


Options = dict[str, Any]
OptionKind = Literal["flag", "count", "number", "text"]

IMPLEMENTATIONS: Final = frozenset({"foreach", "fused"})
"""Flags that are None by default."""
COUNTS: Final = frozenset({"max_iter", "max_eval", "history_size", "ns_steps"})
TEXTS: Final = frozenset({"line_search_fn", "adjust_lr_fn"})


def check_group(torch_class: type[torch.optim.Optimizer], own: Mapping[str, Any]) -> None:
    """Let torch's class of the same name check a group's options.

    Raises:
        ValueError: torch's own.
    """
    torch_class([torch.zeros(1, 1, device="cpu")], **arguments(torch_class, own))


def check_parameters(
    torch_class: type[torch.optim.Optimizer], groups: Iterable[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> None:
    """Let torch's class of the same name check the parameters of all groups, without memory for their copies.

    Raises:
        ValueError: torch's own.
    """
    torch_class(
        [{**group, "params": [_without_memory(p) for p in group["params"]]} for group in groups],
        **arguments(torch_class, defaults),
    )


def _without_memory(p: Tensor) -> Tensor:
    """Return a substitute for a parameter where only its kind and shape count."""
    if is_lazy(p):
        return p
    return (
        torch.empty(p.shape, dtype=torch.uint8, device="meta") if p.is_quantized else torch.empty_like(p, device="meta")
    )


def arguments(torch_class: type[torch.optim.Optimizer], own: Mapping[str, Any]) -> Options:
    """Return the options that the constructor of torch's class takes."""
    code = torch_class.__init__.__code__
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    return {key: value for key, value in own.items() if key in names}


_KINDS: dict[str, dict[str, OptionKind]] = {}


def option_kinds(torch_class: Callable[..., torch.optim.Optimizer]) -> Mapping[str, OptionKind]:
    """Return the options of torch's class with their kinds; `defaults` may have more, which torch adds on loading."""
    kinds = _KINDS.get(torch_class.__name__)
    if kinds is None:
        defaults = torch_class([torch.zeros(1, 1, device="cpu")]).defaults
        kinds = _KINDS[torch_class.__name__] = {name: _kind(name, value) for name, value in defaults.items()}
    return kinds


def _kind(name: str, default: object) -> OptionKind:
    if isinstance(default, bool) or name in IMPLEMENTATIONS:
        return "flag"
    return "count" if name in COUNTS else "text" if name in TEXTS else "number"


_AS_THEY_ARE: Final[Mapping[OptionKind, frozenset[object]]] = {
    "flag": frozenset({bool}),
    "count": frozenset({int, type(None)}),
    "number": PYTHONS - {bool},
    "text": PYTHONS,
}
"""Types of values that are sent unchanged."""


def plain_options(group: Mapping[str, Any], kinds: Mapping[str, OptionKind]) -> Options:
    """Return a group's options as plain values.

    Raises:
        InvalidOption: one of them has no plain value.
        KeyError: torch's own, for an option that the group lacks, for example after loading an old checkpoint.
    """
    return {
        key: value if type(value := group[key]) in _AS_THEY_ARE[kind] else _plain(key, kind, value)
        for key, kind in kinds.items()
    }


def undocumented(group: Mapping[str, Any], kinds: Mapping[str, OptionKind]) -> list[str]:
    """Return the options of a group whose types torch does not document."""
    return [
        key
        for key, kind in kinds.items()
        if kind == "number"
        and key in group
        and type(value := group[key]) not in _DOCUMENTED
        and not _all_documented(value)
    ]


_DOCUMENTED: Final = PYTHONS - {bool}


def _all_documented(value: object) -> bool:
    return type(value) in (tuple, list) and all(type(each) in _DOCUMENTED for each in value)  # type: ignore[attr-defined]


def _plain(name: str, kind: OptionKind, value: Any) -> Any:
    if kind == "flag":
        return None if value is None and name in IMPLEMENTATIONS else bool(value)
    found = _number(value) if kind == "number" else pythons_own(value)
    if kind == "count" and type(found) is float and found.is_integer():
        found = int(found)
    if type(found) not in PYTHONS and type(found) is not list:
        raise invalid_option(
            f"{name}={value!r:.80} is a {type(value).__name__}, which is not a number.",
            remedy="Give a float.",
            field=name,
        )
    return found


def _number(value: Any) -> Any:
    """Return a number or a list of numbers as plain values, anything else unchanged."""
    found = pythons_own(value)
    if type(found) is bool:
        return int(found)
    if type(found) in PYTHONS or isinstance(found, (bytes, Mapping)):
        return found
    if isinstance(found, Sized) and isinstance(found, Iterable):
        numbers = [_number(each) for each in found]
        return numbers if all(type(each) in PYTHONS for each in numbers) else found
    return found


def take_(group: dict[str, Any], named: Mapping[str, Any], taken: Mapping[str, Any]) -> None:
    """Put received options into a group, whose own were sent as `named`; equal ones stay unchanged."""
    for key, value in taken.items():
        if named[key] != value:
            group[key] = _in_form_of(group[key], value)


def _in_form_of(before: Any, value: Any) -> Any:
    """Return a received value in the form of the one before it: a tensor, a tuple."""
    if isinstance(before, torch.Tensor) and isinstance(value, (int, float)):
        return torch.full_like(before, value, requires_grad=False)
    if isinstance(before, tuple) and isinstance(value, (list, tuple)) and len(before) == len(value):
        return tuple(map(_in_form_of, before, value))
    return value


def changes(now: Sequence[Options], sent: Sequence[Options]) -> dict[int, Options]:
    """Return the options of each group that the session does not have yet."""
    return {
        index: {key: value for key, value in here.items() if key not in there or there[key] != value}
        for index, (here, there) in enumerate(zip(now, sent, strict=True))
        if here != there
    }


def without(sent: Sequence[Options], unsure: Mapping[int, Options]) -> list[Options]:
    """Return the options that the session is known to have, if some changes may not have arrived."""
    return [
        {key: value for key, value in options.items() if key not in unsure.get(index, {})}
        for index, options in enumerate(sent)
    ]
