"""Published ways to spend a budget of adapter parameters, each a function `find(setting, key) -> Found`."""

from collections.abc import Callable

from methods.baselines import (
    adalora,
    alora,
    autolora,
    bilora,
    depth,
    increlora,
    lora_drop,
    lorta,
    melora,
    mos,
    rac_lora,
    random_k,
    sparse,
    tied_lora,
    uniform,
)
from methods.baselines.base import Found, Setting

BASELINES = {
    "uniform": uniform.find,
    "random-k": random_k.find,
    "first-k": depth.first_k,
    "last-k": depth.last_k,
    "lora-drop": lora_drop.find,
    "adalora": adalora.find,
    "increlora": increlora.find,
    "autolora": autolora.find,
    "bilora": bilora.find,
    "alora": alora.find,
    "sam": sparse.find,
    "melora": melora.find,
    "tied-lora": tied_lora.find,
    "lorta": lorta.find,
    "mos": mos.find,
    "rac-lora": rac_lora.find,
}
"""By the name that the command line knows; a new one is a new file and an entry here."""
WITHOUT_BUDGET = ("autolora", "bilora", "lorta", "tied-lora")
"""Those whose size follows from the rank alone."""
LEAST_STEPS = {"alora": alora.ROUNDS + 1, "rac-lora": rac_lora.LINKS}
"""Those that train in several parts, of a step each at least."""

BESIDES: dict[str, Callable[[int], int]] = {"lora-drop": lora_drop.measuring, "autolora": lambda steps: steps}
"""How many steps those take that train to choose, before the training of so many steps."""
_RANKS = "since its budget is one of ranks, one a module at least, whatever they cost"
BEYOND = {
    "lora-drop": "since the LoRA that the other layers share comes on top",
    "adalora": "since its budget is one of ranks, whatever they cost",
    "increlora": _RANKS,
    "alora": _RANKS,
    "mos": "since a linear has two vectors at least",
}
"""Why a budget of parameters does not bind those; all others spend whole ranks, one at least, or stay within it."""

__all__ = ["BASELINES", "BESIDES", "BEYOND", "LEAST_STEPS", "WITHOUT_BUDGET", "Found", "Setting"]
