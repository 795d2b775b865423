"""A `bilevel.Problem` from modules of flax's nnx: the kinds of variables say what is learned where.

- `problem`: from a module, or a function that makes one, and two losses `loss(model, batch, key)`.
- `Outer`: the type of variables that are learned outside.
- `merge`: the module again, with what `run` or `fit` found.

Needs flax, which the engine itself does not: `pip install 'bilevel[nnx]'`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from bilevel.nnx.losses import InnerStart, ModuleLoss, OuterStart, source
from bilevel.nnx.modules import divided, nnx
from bilevel.problem.problem import Problem
from bilevel.settings.fields import checked, shown
from bilevel.settings.rules import boolean, function, optional
from bilevel.trees import Batch, Key, PyTree

__all__ = ["Outer", "merge", "problem"]

_LOSS = function("model", "batch", "key", result="scalar")


class Outer(nnx.Variable):
    """A variable that is learned outside: what `problem` makes `outer` of, unless it is told otherwise.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevel.nnx import Outer
      >>> from flax import nnx
      >>> class Decayed(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.layer = nnx.Linear(3, 1, rngs=rngs)
      ...         self.log_decay = Outer(jnp.zeros(()))
      >>> float(Decayed(nnx.Rngs(0)).log_decay[...])
      0.0
    """


def problem(
    model: Any,
    inner_loss: Callable[[Any, Batch, Key], Any],
    outer_loss: Callable[[Any, Batch, Key], Any] | None,
    *,
    inner: Any = nnx.Param,
    outer: Any = Outer,
    mutable: Any = nnx.BatchStat,
    frozen: Any = None,
    has_aux: bool = False,
    project: Callable[[PyTree], PyTree] | None = None,
    domain: PyTree = None,
) -> Problem:
    r"""The bilevel problem of a module: both losses are functions of the module, with every variable where it belongs.

    Each variable is of the first of these kinds whose filter (a type, `nnx.PathContains("head")`, `nnx.All(...)`, a
    tuple of filters) takes it:

    - `mutable`: carried from step to step as `inner_loss` leaves it, without a gradient: batch statistics. It is the
      entry `"mutable"` of the inner variable, of which `Problem.mutable` says more; a variable keeps its dtype.
    - `outer`: learned outside. `Result.outer` is a dict of the arrays, nested as the module is.
    - `inner`: trained by `inner_loss`. `Result.inner.params["params"]` is such a dict.
    - `frozen`: constant. These are arguments of the compiled step and are not differentiated; so are arrays of the
      module that are no variables. `frozen=...` takes all that is left.

    **Random streams** (`nnx.Dropout`, `nnx.Rngs`) are no kind of these. Whenever a loss is called they are seeded from
    the key of that step: another mask at each inner step, the same one whenever that step is computed again, with every
    estimator and solver. With `mutable=(nnx.BatchStat, nnx.RngState)` their keys and counters are carried from step to
    step instead, as in flax's own training loops, from a start that seeds them; the outer loss has its own key.

    **A loss is given a module of its own**, in the mode that `model` is in; it may call `model.train()` and
    `model.eval()`. What the inner loss writes into mutable variables is carried on; what the outer loss writes ends
    with the call. Several modules, say a network and a learned penalty, are one dict or tuple of modules:
    `{"net": net, "penalty": penalty}` with `outer=nnx.PathContains("penalty")`.

    Args:
      model: a module: training starts at its values. Or a function `rngs -> module`, which makes a new one from the key
        of each start; its frozen variables are those of `model(nnx.Rngs(0))`. It does not know the values of `outer`:
        what it computes from outer variables that it makes does not follow them, as a start would that `init_inner` of
        a `Problem` makes. Either may be a dict, list or tuple of modules and variables.
      inner_loss: `inner_loss(model, batch, key) -> scalar`, or `(scalar, aux)` with `has_aux`.
      outer_loss: likewise; None where there is nothing to find, for `bilevel.fit` alone.
      inner, outer, mutable, frozen: filters of nnx, as above; None takes nothing.
      has_aux, project, domain: as for `bilevel.Problem`, the outer variable being the dict of arrays.

    Raises:
      ValueError: in one sentence: for a variable that no kind takes, or that is of two kinds by two paths that lead to
        it, a filter that takes none, a function that does not make the same structure each time; when a loss is
        traced, if the inner loss has changed the module's structure, has written into a variable that is not mutable,
        or computes a mutable one behind a `stop_gradient` that cannot be undone, in a function with a rule of its own.

    Examples:
      >>> import bilevel, bilevel.nnx, jax, optax
      >>> import jax.numpy as jnp
      >>> from bilevel.testing import ridge
      >>> from flax import nnx
      >>> class Line(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.weights = nnx.Param(jnp.zeros(2))
      ...         self.log_decay = bilevel.nnx.Outer(jnp.zeros(()))
      ...     def __call__(self, rows):
      ...         return rows @ self.weights[...]
      >>> def error(model, batch, key):
      ...     return 0.5 * jnp.mean((model(batch[0]) - batch[1]) ** 2)
      >>> def decayed(model, batch, key):
      ...     penalty = jnp.exp(model.log_decay[...]) * jnp.sum(model.weights[...] ** 2)
      ...     return error(model, batch, key) + 0.5 * penalty
      >>> problem = bilevel.nnx.problem(Line, decayed, error)
      >>> _, train, val = ridge()
      >>> solver = bilevel.Nested(problem, bilevel.Unrolled(optax.sgd(0.5), steps=20), optax.sgd(2.0))
      >>> result = bilevel.run(solver, inner_data=train, outer_data=val, steps=40, progress=False)
      >>> round(float(jnp.exp(result.outer["log_decay"])), 2)
      0.5
      >>> bilevel.nnx.merge(problem, result).weights[...].round(2).tolist()
      [1.0, 1.0]
    """
    inner_function = checked("problem", "inner_loss", inner_loss, _LOSS)
    outer_function = checked("problem", "outer_loss", outer_loss, optional(_LOSS))
    checked("problem", "has_aux", has_aux, boolean)
    make, template = source(model)
    filters = {"mutable": mutable, "outer": outer, "inner": inner, "frozen": frozen}
    structure, values = divided(template, filters)
    for name in ("inner", "outer")[: 1 + (outer_loss is not None)]:
        if not structure.paths[name]:
            types = dict.fromkeys(variable.type for variable in structure.variables.values())
            hint = ": make a variable that is learned outside a bilevel.nnx.Outer" if name == "outer" else ""
            raise ValueError(
                f"problem({name}={shown(filters[name])}): takes none of the module's variables, which are of "
                f"{', '.join(types) or 'no type'}{hint}."
            )
    given = {} if make else {name: values[name] for name in ("mutable", "outer", "inner")}
    return Problem(
        ModuleLoss(inner_function, values["frozen"], structure, True, has_aux),
        None if outer_loss is None else ModuleLoss(outer_function, values["frozen"], structure, False, has_aux),
        InnerStart(make, given, structure),
        OuterStart(make, given, structure),
        has_aux=has_aux,
        project=project,
        domain=domain,
        mutable=("mutable",) if structure.paths["mutable"] else (),
    )


def merge(problem: Problem, found: Any, *, key: Key | None = None) -> Any:
    """The module of a `problem` with the values that were found: trained, with its statistics and outer variables.

    Args:
      problem: what `bilevel.nnx.problem` returned.
      found: what `bilevel.run` or `bilevel.fit` returned, or a solver's state: it has `outer` and `inner`.
      key: seeds the random streams of the module; None is `jax.random.key(0)`.

    Returns:
      A new module, in the mode (`train()`, `eval()`) of the one that the problem was made of.

    Raises:
      ValueError: for a problem that is not of modules, or values that are not of this module: of other variables,
        shapes or dtypes. What was found in float64 is taken for a module of float32.

    Examples:
      >>> import bilevel, bilevel.nnx, optax
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> target = lambda model, batch, key: (model["w"][...] - 3.0) ** 2
      >>> problem = bilevel.nnx.problem({"w": nnx.Param(jnp.zeros(()))}, target, None)
      >>> result = bilevel.fit(problem, {}, optimizer=optax.sgd(0.5), steps=5, progress=False)
      >>> float(bilevel.nnx.merge(problem, result)["w"][...])
      3.0
    """
    parts = [problem.inner_loss, problem.outer_loss] if isinstance(problem, Problem) else []
    loss = next((part for part in parts if isinstance(part, ModuleLoss)), None)
    if loss is None:
        raise ValueError(f"merge(problem={shown(problem)}): must be what bilevel.nnx.problem returned.")
    if not (hasattr(found, "outer") and hasattr(getattr(found, "inner", None), "params")):
        raise ValueError(
            f"merge(found={shown(found)}): must be what run or fit returned, or a solver's state, with outer and inner."
        )
    return loss.module(found.inner.params, found.outer, jax.random.key(0) if key is None else key)
