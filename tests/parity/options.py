"""Options worth comparing, as pure data: a value for each option alone, and options that act on each other.

`inspect.signature` of torch's class says which options there are; here is what they are set to. An option that stands
nowhere here has no case, and `test_completeness.py` names it.
"""

from __future__ import annotations

from typing import Any

import torch

Options = dict[str, Any]

ALONE: dict[str, tuple[Options, ...]] = {
    "lr": ({"lr": 0.1}, {"lr": torch.tensor(0.1)}, {"lr": torch.tensor(0.1, dtype=torch.float64)}),
    "lr_decay": ({"lr_decay": 0.05},),
    "weight_decay": ({"weight_decay": 0.05},),
    "initial_accumulator_value": ({"initial_accumulator_value": 0.7},),
    "eps": ({"eps": 1e-3},),
    "rho": ({"rho": 0.5}, {"rho": 0.0}),
    "betas": ({"betas": (0.7, 0.9)}, {"betas": (0.0, 0.3)}),
    "lambd": ({"lambd": 0.1}, {"lambd": 0}, {"lambd": -0.01}),
    "alpha": ({"alpha": 0.5},),
    "t0": ({"t0": 20}, {"t0": 0}, {"t0": 30.5}),
    "momentum": ({"momentum": 0.8},),
    "dampening": ({"dampening": 0.3, "momentum": 0.9},),
    "momentum_decay": ({"momentum_decay": 0.1}, {"momentum_decay": 0}),
    "decoupled_weight_decay": ({"decoupled_weight_decay": True, "weight_decay": 0.05},),
    "etas": ({"etas": (0.3, 1.5)},),
    "step_sizes": ({"step_sizes": (1e-3, 0.2)},),
    "amsgrad": ({"amsgrad": True},),
    "centered": ({"centered": True},),
    "maximize": ({"maximize": True},),
    "nesterov": ({"nesterov": True, "momentum": 0.8},),
    "beta2_decay": ({"beta2_decay": -0.5},),
    "d": ({"d": 2.0},),
    "ns_coefficients": ({"ns_coefficients": (3.0, -4.0, 2.0)},),
    "ns_steps": ({"ns_steps": 3},),
    "adjust_lr_fn": ({"adjust_lr_fn": "match_rms_adamw"}, {"adjust_lr_fn": "original"}),
    "max_iter": ({"max_iter": 3},),
    "max_eval": ({"max_eval": 2},),
    "tolerance_grad": ({"tolerance_grad": 0.1},),
    "tolerance_change": ({"tolerance_change": 0.01},),
    "history_size": ({"history_size": 2},),
    "line_search_fn": ({"line_search_fn": "strong_wolfe"},),
}
"""What each option is set to, with what it needs to have an effect."""

OWN: dict[tuple[str, str], tuple[Options, ...]] = {
    ("Adafactor", "eps"): ({"eps": (1e-8, 1e-2)},),
    ("LBFGS", "lr"): ({"lr": 0.1},),
    ("Muon", "lr"): ({"lr": 0.1},),
    ("Muon", "nesterov"): ({"nesterov": False},),
    ("SGD", "weight_decay"): ({"weight_decay": 0.05}, {"weight_decay": torch.tensor(0.05)}),
    **{
        (name, "betas"): (
            {"betas": (0.7, 0.9)},
            {"betas": (0.0, 0.3)},
            {"betas": (torch.tensor(0.7), torch.tensor(0.9))},
        )
        for name in ("Adam", "AdamW")
    },
}
"""The same where an option means something else in one class, has another default or takes more."""

TOGETHER: dict[str, list[Options]] = {
    "Adagrad": [
        {"lr": 0.5, "lr_decay": 0.01},
        {"weight_decay": 0.1, "eps": 1e-3},
        {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.02, "initial_accumulator_value": 0.3, "eps": 1e-6},
        {"maximize": True, "weight_decay": 0.01},
    ],
    "Adadelta": [
        {"lr": 0.3, "rho": 0.5, "eps": 1e-3},
        {"lr": 0.5, "rho": 0.7, "eps": 1e-4, "weight_decay": 0.02},
        {"maximize": True, "rho": 0.0, "weight_decay": 0.1},
    ],
    "Adamax": [
        {"lr": 0.3, "betas": (0.7, 0.9), "eps": 1e-3},
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.02},
        {"maximize": True, "betas": (0.0, 0.0), "weight_decay": 0.1},
    ],
    "ASGD": [
        {"lr": 0.3, "lambd": 0.1, "alpha": 0.5, "t0": 20},
        {"lr": 0.1, "lambd": 0.02, "alpha": 0.6, "t0": 5, "weight_decay": 0.02},
        {"weight_decay": 0.1, "t0": 0},
        {"lambd": 0, "alpha": 1, "t0": 100.5},
        {"maximize": True, "weight_decay": 0.01, "t0": 30},
    ],
    "SGD": [
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
        {"lr": 0.01, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.02},
        {"lr": 0.1, "weight_decay": 0.02, "maximize": True},
        {"momentum": 0.7, "nesterov": True, "maximize": True},
    ],
    "Adam": [
        {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3},
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.02, "amsgrad": True},
        {"betas": (0.0, 0.3), "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"maximize": True, "weight_decay": 0.01, "amsgrad": True},
        {"maximize": True, "weight_decay": 0.01, "decoupled_weight_decay": True, "amsgrad": True},
    ],
    "AdamW": [
        {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3},
        {"weight_decay": 0.1, "amsgrad": True},
        {"betas": (0.0, 0.3), "weight_decay": 0},
        {"lr": 0.1, "betas": (0.0, 0.9), "eps": 1e-4, "amsgrad": True, "maximize": True, "weight_decay": 0.1},
    ],
    "NAdam": [
        {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3, "momentum_decay": 0.1},
        {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.02, "momentum_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        {"betas": (0.0, 0.3), "maximize": True, "weight_decay": 0.01},
    ],
    "RAdam": [
        {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "lr": 0.01},
        {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"betas": (0.0, 0.3), "maximize": True, "weight_decay": 0.01},
    ],
    "RMSprop": [
        {"lr": 0.1, "alpha": 0.7, "eps": 1e-3},
        {"weight_decay": 0.1, "momentum": 0.9},
        {"lr": 0.1, "alpha": 0.7, "eps": 1e-3, "weight_decay": 0.02, "momentum": 0.5},
        {"centered": True, "weight_decay": 0.01},
        {"centered": True, "momentum": 0.5, "maximize": True, "eps": 1e-2},
    ],
    "Rprop": [
        {"lr": 0.1, "etas": (0.3, 1.5)},
        {"lr": 0.1, "etas": (0.3, 1.5), "step_sizes": (1e-3, 0.2), "maximize": True},
        {"maximize": True, "etas": (0.9, 1.01), "step_sizes": (0, 1)},
    ],
    "Adafactor": [
        {"lr": 0.1, "beta2_decay": -0.6, "d": 2.0, "eps": (1e-6, 1e-2)},
        {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
        {"maximize": True, "weight_decay": 0.01, "eps": (0.0, 0.0)},
    ],
    "Muon": [
        {"lr": 0.1, "momentum": 0.5, "nesterov": False, "weight_decay": 0.02, "adjust_lr_fn": "match_rms_adamw"},
        {"weight_decay": 0.02, "adjust_lr_fn": "original", "eps": 1e-2},
        {"ns_coefficients": (3.0, -4.0, 2.0), "ns_steps": 2, "momentum": 0.0},
    ],
    "SparseAdam": [
        {"lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3},
        {"lr": 0.1, "betas": (0.0, 0.3), "maximize": True},
    ],
    "LBFGS": [
        {"lr": 0.5, "history_size": 3, "max_iter": 4},
        {"line_search_fn": "strong_wolfe", "history_size": 5, "max_iter": 8, "max_eval": 12},
    ],
}
"""Options that act on each other."""

REFUSED: dict[str, tuple[Options, ...]] = {
    "lr": ({"lr": -1.0}, {"lr": torch.ones(2)}),
    "lr_decay": ({"lr_decay": -1.0},),
    "weight_decay": ({"weight_decay": -1.0},),
    "initial_accumulator_value": ({"initial_accumulator_value": -1.0},),
    "eps": ({"eps": -1.0},),
    "rho": ({"rho": 1.5},),
    "betas": ({"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}),
    "alpha": ({"alpha": -1.0},),
    "beta2_decay": ({"beta2_decay": 0.1},),
    "d": ({"d": 0.5},),
    "ns_steps": ({"ns_steps": 100},),
    "momentum": ({"momentum": -1.0},),
    "momentum_decay": ({"momentum_decay": -1.0},),
    "etas": ({"etas": (1.0, 1.5)}, {"etas": (0.5, 0.9)}),
    "fused": ({"fused": True, "foreach": True},),
}
"""What torch refuses in some class or other. A class that takes the value trains with it."""

REFUSED_TOGETHER: dict[str, tuple[Options, ...]] = {
    "Adafactor": ({"eps": (-1, 0)}, {"eps": (None, -1)}),
    "LBFGS": ({"line_search_fn": "weak_wolfe"},),
    "Muon": ({"adjust_lr_fn": "none"},),
    "SparseAdam": ({"lr": 0}, {"eps": 0}),
    "SGD": ({"nesterov": True, "momentum": 0}, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    "Adam": ({"foreach": True, "lr": torch.tensor(0.1)}, {"betas": (0, 0.5)}),
    "AdamW": ({"foreach": True, "lr": torch.tensor(0.1)}, {"betas": (0.5, torch.tensor(0.5))}),
}
"""Options that torch refuses together."""

IMPLEMENTATIONS = {
    "foreach": "torch.optim's choice among its implementations",
    "fused": "torch.optim's choice among its implementations; on CPU its fused one ignores strides",
    "capturable": "asks for a step inside a CUDA graph; on CPU torch.optim refuses it at the first step",
}
"""Options that ours keeps in its groups while beside it torch's for-loop runs without them, each with the reason."""

SKIPPED = {
    "differentiable": "farstep refuses it at construction: autograd would have to run through the step on another "
    "machine",
}
"""Options without a case, each with the reason, which the table prints."""

SKIPPED_TOGETHER = {
    ("Adafactor", "empty parameters"): "torch divides by their number of elements",
    ("SGD", "sparse gradients, momentum=0.9, float16"): "torch adds no sparse halves; farstep takes them",
    ("LBFGS", "float16"): "torch's own values overflow",
    (
        "LBFGS",
        "bfloat16",
    ): "the line search amplifies how the last elements of a vector are rounded",
}
"""What else has no case, each with the reason."""
