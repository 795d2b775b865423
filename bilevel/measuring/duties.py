"""The duties of an estimator, one function each: it tries an estimator, and yields a sentence for what is not met."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.bijectors import Interval
from bilevel.data import FullBatch, Indexed
from bilevel.differentiation.influence import StructuralZeroWarning
from bilevel.hypergradients.contract import Estimate, Hypergradient
from bilevel.hypergradients.query import outer_value, split_keys
from bilevel.measuring.quadratic import quadratic
from bilevel.problem.problem import Problem
from bilevel.trees import PyTree, leaf_names, shape

Make = Callable[[Any, int], Hypergradient]

KEY = jax.random.PRNGKey(5)
"""Of the estimates; made a typed key where it is used, so that importing this does no more than it has to."""

STEPS, RATE, SAME = 4, 0.5, 1e-7
"""Training steps, their learning rate, and the relative difference of numbers that count as equal."""


def _key(i: int = 0) -> jax.Array:
    return jax.random.wrap_key_data(KEY + np.uint32(i))


def _estimate(hypergradient: Hypergradient, problem: Problem, outer: Any, **given: Any) -> Estimate:
    of = {"inner_state": None, "inner_batches": None, "outer_batch": None, "key": _key()} | given
    return hypergradient.estimate(problem, of["inner_state"], outer, of["inner_batches"], of["outer_batch"], of["key"])


def _difference(a: PyTree, b: PyTree) -> float:
    """Relative difference of two trees of numbers; infinite if they are unlike."""
    a, b = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (a, b))
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    flat = [np.concatenate([x.ravel() for x in tree] or [np.zeros(0)]) for tree in (a, b)]
    size = max(map(np.linalg.norm, flat))
    error = float(np.linalg.norm(flat[0] - flat[1]) / (size or 1.0))
    return error if np.isfinite(error) else float("inf")


def _refuses(hypergradient: Hypergradient, problem: Problem, outer: Any, **given: Any) -> Estimate | None:
    """The estimate; None if it is refused."""
    try:
        return _estimate(hypergradient, problem, outer, **given)
    except (ValueError, TypeError):
        return None


def _is_random(make: Make) -> bool:
    """Whether an estimate depends on its key where no loss does."""
    hypergradient, outer = make(optax.sgd(RATE), STEPS), _outer()
    one, other = (_estimate(hypergradient, _PROBLEM.problem, outer, key=_key(i)).grad for i in range(2))
    return _difference(one, other) > SAME


_PROBLEM = quadratic(3, 2, seed=1)
"""The problem of which the others are forms."""


def _outer() -> dict[str, jax.Array]:
    return {"tilt": jnp.array([0.3, -0.2])}


def _compiled(make: Make) -> Iterator[str]:
    hypergradient, problem, outer = make(optax.sgd(RATE), STEPS), _PROBLEM.problem, _outer()
    if jax.tree_util.all_leaves([hypergradient]):
        yield "it is no pytree, so that it cannot be an argument of a compiled function: put `register` above its class"
        return
    call = lambda hypergradient: _estimate(hypergradient, problem, outer)  # noqa: E731
    first, again, compiled = call(hypergradient), call(hypergradient), jax.jit(call)(hypergradient)
    for what, other in (("a second time", again), ("in a compiled function", compiled)):
        if (error := _difference((first.value, first.grad), (other.value, other.grad))) > SAME:
            yield f"asked {what}, it gives another answer (relative difference {error:.0e}): it must be a pure function"
    keys = jax.random.split(_key(), 2)
    together = jax.vmap(lambda key: _estimate(hypergradient, problem, outer, key=key).grad)(keys)
    alone = [_estimate(hypergradient, problem, outer, key=key).grad for key in keys]
    if (error := _difference(together, jax.tree.map(lambda *x: jnp.stack(x), *alone))) > SAME:
        yield f"under vmap over keys it is another estimate than key by key (relative difference {error:.0e})"


def _noisy(both: Any) -> Callable[..., Any]:
    """A loss that is random by its own key and by the one in `outer`, and reports both."""

    def loss(w, outer, batch, key):
        noise = jax.random.normal(key, w.shape) + jax.random.normal(outer["key"], w.shape)
        value = both(w, outer, batch, key) + 0.1 * jnp.sum(noise * w)
        return value, {"own": jax.random.key_data(jax.random.clone(key)), "step": jax.random.key_data(outer["key"])}

    return loss


def _results(make: Make) -> Iterator[str]:
    hypergradient, plain = make(optax.sgd(RATE), STEPS), _PROBLEM.problem
    problem = Problem(
        _noisy(plain.inner_loss), _noisy(plain.outer_loss), plain.init_inner, plain.init_outer, has_aux=True
    )
    outer = _outer() | {"key": jax.random.clone(_key(1)), "count": jnp.arange(2), "on": jnp.asarray(True), "none": None}
    result, steps = _estimate(hypergradient, problem, outer), hypergradient.steps
    keys = split_keys(_key(), steps)
    if [name for name in outer if result.grad.get(name) is not None] != ["tilt"]:
        yield "grad must have an entry for each floating-point leaf of outer, and None for keys, integers and booleans"
    elif shape(result.grad["tilt"]) != shape(outer["tilt"]):
        yield f"grad is {shape(result.grad['tilt'])} where the leaf of outer is {shape(outer['tilt'])}"
    if not all(isinstance(x, jax.Array) for x in jax.tree.leaves((result.value, result.grad, result.aux.info))):
        yield "value, grad and info must hold arrays"
    losses = result.aux.info.get("inner_loss")
    if losses is None or jnp.shape(losses) != (steps,):
        yield f"info['inner_loss'] must hold the {steps} inner losses of training"
    trained = hypergradient.solve(problem, None, outer, None, _key()).params
    if (error := _difference(trained, result.inner_state.params)) > SAME:
        yield f"`solve` trains to another point than `estimate` (relative difference {error:.0e})"
    value, told = outer_value(problem, steps, result.inner_state.params, outer, None, keys)
    if (error := _difference(value, result.value)) > SAME:
        yield (
            "value is not the outer loss at inner_state.params with the key `split_keys(key, steps).outer` "
            f"(relative difference {error:.0e})"
        )
    folded = jax.vmap(lambda t: jax.random.key_data(jax.random.fold_in(outer["key"], t)))(jnp.arange(steps))
    aux, wanted = result.aux.inner, jax.random.key_data(keys.inner)
    if not np.array_equal(aux["own"], wanted) or not np.array_equal(aux["step"], folded):
        yield (
            "aux.inner must be what inner_loss returned at each step, which sees its key of "
            "`split_keys(key, steps).inner` and every random key of outer folded with the number of the step"
        )
    if not np.array_equal(result.aux.outer["own"], told["own"]):
        yield "aux.outer must be what outer_loss returned with the key `split_keys(key, steps).outer`"
    start = jax.eval_shape(hypergradient.init, problem, outer, _key())
    before, after = (
        dict(zip(leaf_names(x), map(shape, jax.tree.leaves(x)), strict=True)) for x in (start, result.inner_state)
    )
    if odd := [name for name in before | after if before.get(name) != after.get(name)]:
        yield (
            f"inner_state comes back with {odd[0]} {after.get(odd[0], 'left out')}, which init gives as "
            f"{before.get(odd[0], 'nothing')}: a loop cannot carry it"
        )


def _keys_once(make: Make) -> Iterator[str]:
    def dropped(w, key):
        return jnp.where(jax.random.bernoulli(key, 0.5, w.shape), w, 0.0)

    problem = Problem(
        lambda w, o, batch, key: jnp.sum((dropped(w, key) - 1.0) ** 2) + o * jnp.sum(w**2),
        lambda w, o, batch, key: jnp.sum((dropped(w, key) - 1.0) ** 2),
        lambda key, o: jax.random.uniform(key, (4,)),
        lambda key: jnp.asarray(0.1),
    )
    hypergradient, outer = make(optax.sgd(0.1), STEPS), jnp.asarray(0.1)
    for start in ("cold", "warm"):
        with jax.debug_key_reuse(True):
            try:
                state = hypergradient.init(problem, outer, jax.random.clone(_key(1))) if start == "warm" else None
                _estimate(hypergradient, problem, outer, inner_state=state)
            except jax.errors.KeyReuseError as error:
                said = str(error).partition("\n")[0]
                yield f"at a {start} start a random key is consumed twice ({said}): clone it where noise is replayed"


def _domains(make: Make) -> Iterator[str]:
    if _is_random(make):  # it may draw its perturbations in the free coordinates
        return
    hypergradient, free = make(optax.sgd(RATE), STEPS), _PROBLEM.problem
    bounded = dataclasses.replace(free, domain={"tilt": Interval(-1.0, 1.0)})
    one, other = (_estimate(hypergradient, problem, _outer()).grad for problem in (free, bounded))
    if (error := _difference(one, other)) > SAME:
        yield f"grad must be in natural units whatever Problem.domain says, but with one it differs by {error:.0e}"


def _starts(make: Make) -> Iterator[str]:
    by_rate = lambda outer: optax.inject_hyperparams(optax.sgd)(learning_rate=outer["rate"])  # noqa: E731
    hypergradient, problem = make(by_rate, STEPS), _PROBLEM.problem
    outer = _outer() | {"rate": jnp.asarray(RATE), "start": jnp.asarray(_PROBLEM.start)}
    elsewhere = hypergradient.init(problem, outer | {"rate": jnp.asarray(0.1)}, _key(1))
    fresh = hypergradient.init(problem, outer, _key(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        old = _estimate(hypergradient, problem, outer, inner_state=elsewhere)
    new = _estimate(hypergradient, problem, outer, inner_state=fresh)
    if (error := _difference((old.value, old.grad), (new.value, new.grad))) > SAME:
        yield f"an optimizer state that was made at another outer changes the estimate (by {error:.0e}): make it anew"
    said = " ".join(str(w.message) for w in caught if issubclass(w.category, StructuralZeroWarning))
    random = _is_random(make)
    if not random and np.any(np.asarray(old.grad["start"])):
        yield "an inner_state is a constant, but grad is not 0 for a leaf that acts through init_inner alone"
    if "['start']" not in said:
        yield "with an inner_state, a leaf that acts through init_inner alone must be named in a StructuralZeroWarning"


def _zeros(make: Make) -> Iterator[str]:
    hypergradient, problem = make(lambda outer: optax.sgd(outer["rate"]), STEPS), _PROBLEM.problem
    outer = _outer() | {"rate": jnp.asarray(RATE), "start": jnp.asarray(_PROBLEM.start), "idle": jnp.ones(2)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        grad = _estimate(hypergradient, problem, outer).grad
    said = " ".join(str(w.message) for w in caught if issubclass(w.category, StructuralZeroWarning))
    for name, leaf in grad.items():
        if f"['{name}']" not in said and (name == "idle" or not np.any(np.asarray(leaf))):
            yield f"the hypergradient of leaf ['{name}'] is 0, and no StructuralZeroWarning names it"
    unread = Problem(_alone, _alone, lambda key, o: jnp.zeros(3), problem.init_outer)
    if _refuses(make(optax.sgd(RATE), STEPS), unread, outer) is not None:
        yield "where neither loss depends on outer, there must be a ValueError"


def _alone(w, outer, batch, key):
    return jnp.sum((w - 1.0) ** 2)


def _captured(make: Make) -> Iterator[str]:
    outer = jnp.array([0.3, -0.2])
    problem = Problem(
        lambda w, o, batch, key: jnp.sum((w - outer) ** 2),
        lambda w, o, batch, key: jnp.sum(w**2) + jnp.sum(o**2),
        lambda key, o: jnp.zeros(2),
        lambda key: outer,
    )
    if _refuses(make(optax.sgd(0.1), STEPS), problem, outer) is not None:
        yield "inner_loss captured the very array that outer is, and no ValueError says so"


def _shifted(loss: Any, w: Any, outer: Any, batch: Any, key: Any) -> Any:
    return loss(w, outer, None, key) + jnp.sum(w * jnp.mean(batch, axis=0))


def _batches(make: Make) -> Iterator[str]:
    hypergradient, plain = make(optax.sgd(RATE), STEPS), _PROBLEM.problem
    add = lambda loss: lambda w, *rest: _shifted(loss, w, *rest)  # noqa: E731
    problem = Problem(add(plain.inner_loss), add(plain.outer_loss), plain.init_inner, plain.init_outer)
    rows, steps = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3))), hypergradient.steps
    index = jnp.asarray(np.random.default_rng(1).integers(0, 6, (steps, 2)))
    pairs = {
        "drawn by Indexed or stacked": (Indexed(rows, index), rows[index]),
        "of all rows, as a FullBatch or stacked": (FullBatch(rows), jnp.stack([rows] * steps)),
    }
    for what, forms in pairs.items():
        one, other = (_estimate(hypergradient, problem, _outer(), inner_batches=x, outer_batch=rows) for x in forms)
        if (error := _difference((one.value, one.grad), (other.value, other.grad))) > SAME:
            yield f"batches {what} give different estimates (by {error:.0e}): take a step's by query.inner_loss"
    more = jnp.stack([rows] * (steps + 1))
    if _refuses(hypergradient, problem, _outer(), inner_batches=more, outer_batch=rows) is not None:
        yield f"{steps + 1} batches for {steps} steps must be a ValueError"


def _own_rules(make: Make) -> Iterator[str]:
    # The rule scales the gradient by d, so that training is preconditioned. With u = w / sqrt(d) it is plain gradient
    # descent on a loss without a rule, and the hypergradient is the same.
    d = jnp.array([0.4, 0.7, 1.0])
    scaled = jax.custom_vjp(operator.pos)  # +w, and no function of this package, whose own rules are trusted
    scaled.defvjp(lambda w: (w, None), lambda _, ct: (d * ct,))
    q, root, outer_loss = _PROBLEM.problem, jnp.sqrt(d), _PROBLEM.problem.outer_loss
    assert outer_loss is not None
    ruled = Problem(lambda w, *rest: q.inner_loss(scaled(w), *rest), q.outer_loss, q.init_inner, q.init_outer)
    plain = Problem(
        lambda u, *rest: q.inner_loss(root * u, *rest),
        lambda u, *rest: outer_loss(root * u, *rest),
        lambda key, outer: q.init_inner(key, outer) / root,
        q.init_outer,
    )
    hypergradient = make(optax.sgd(RATE), STEPS)
    if (found := _refuses(hypergradient, ruled, _outer())) is None:
        return
    if (error := _difference(found.grad, _estimate(hypergradient, plain, _outer()).grad)) > SAME:
        yield (
            "where inner_loss has a derivative of its own (jax.custom_vjp), the estimate is not that of the same "
            f"training without one (relative difference {error:.0e}): take second derivatives in reverse mode, or "
            "refuse the loss by meet_custom_rule"
        )


def _masked(updates: Any, params: Any) -> Any:
    return updates * jnp.array([1.0, 1.0, 0.0])


def _frozen(make: Make) -> Iterator[str]:
    q = _PROBLEM.problem
    held = jnp.asarray(_PROBLEM.start[:1])
    join = lambda inner: jnp.concatenate([inner["w"], inner["held"]])  # noqa: E731
    of = lambda loss: lambda inner, *rest: loss(join(inner), *rest)  # noqa: E731
    begin = lambda key, outer: q.init_inner(key, outer)[:2]  # noqa: E731
    both = Problem(of(q.inner_loss), of(q.outer_loss), lambda k, o: {"w": begin(k, o), "held": held}, q.init_outer)
    constant = lambda loss: lambda inner, *rest: loss(join(inner | {"held": held}), *rest)  # noqa: E731
    alone = Problem(constant(q.inner_loss), constant(q.outer_loss), lambda k, o: {"w": begin(k, o)}, q.init_outer)
    kinds = {"w": "train", "held": "freeze"}
    freezing = optax.partition({"train": optax.sgd(RATE), "freeze": optax.set_to_zero()}, kinds)
    masking = optax.chain(optax.sgd(RATE), optax.stateless(_masked))
    last = lambda key, outer: jnp.concatenate([begin(key, outer), held])  # noqa: E731
    cases = [("leaves", freezing, both)]
    if not _is_random(make):  # which may draw as many numbers as there are entries
        cases.append(("entries of a leaf", masking, dataclasses.replace(q, init_inner=last)))
    for what, optimizer, problem in cases:
        hypergradient = make(optimizer, STEPS)
        if (found := _refuses(hypergradient, problem, _outer())) is None:
            continue
        flat = jnp.concatenate(jax.tree.leaves(found.inner_state.params)[::-1])  # "held" comes before "w"
        if not np.array_equal(flat[2:], held) or np.array_equal(flat[:2], _PROBLEM.start[:2]):
            return  # it does not train by this optimizer
        wanted = _estimate(make(optax.sgd(RATE), STEPS), alone, _outer())
        if (error := _difference(found.grad, wanted.grad)) > SAME:
            yield (
                f"where the optimizer freezes {what} of the inner variable, the estimate is not that with constants in "
                f"their place (relative difference {error:.0e}): take what moves from self.trainable(query, state)"
            )


DUTIES: dict[str, Callable[[Make], Iterator[str]]] = {
    "compiled": _compiled,
    "results": _results,
    "keys": _keys_once,
    "domains": _domains,
    "warm starts": _starts,
    "zeros": _zeros,
    "captured": _captured,
    "batches": _batches,
    "own rules": _own_rules,
    "frozen": _frozen,
}
"""The duties that `check_estimator` tries, by name."""
