r"""What a hypergradient will cost before it is run: gradient evaluations, operations and memory, for every schedule.

Memory is that of a compiled program of a few steps, plus what more steps keep, by the arithmetic of schedules.py.
Two such programs are compiled for each mode, with and without rematerialised steps, whatever the number of steps and
schedules. Time is counted in floating-point operations of the traced program (`flops`).

On a mesh memory is that of one device. What part of the kept arrays lies there is measured: by how much the memory of
the compiled program grows with the number of steps.

Limits. The compiler may share a computation that is counted twice here, and it lays out very small programs (kept
states below a few kilobytes) as it likes. Only `Unrolled` and `Replay` have schedules to plan.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from bilevel.data import narrow
from bilevel.differentiation import schedules
from bilevel.differentiation.binomial import evaluations
from bilevel.differentiation.captures import forget_outdated
from bilevel.differentiation.schedules import Binomial, Checkpoint, Levels, StepBytes
from bilevel.differentiation.tracing import is_literal, is_on_host, jaxprs, operation, read, scan_counts, without_unused
from bilevel.hypergradients.replay import Replay
from bilevel.hypergradients.training import InnerState
from bilevel.hypergradients.unrolled import Unrolled
from bilevel.measuring.flops import flops, gradient_flops, operations
from bilevel.measuring.point import Point
from bilevel.problem.problem import Problem
from bilevel.settings.fields import checked
from bilevel.settings.rules import optional
from bilevel.sharding.sharding import Sharding, is_sharding
from bilevel.trees import Outer, nbytes, partition

_SHORT = 4
"""Steps of the compiled programs: so few that they cost little to hold, and so many that no loop is unrolled."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The cost of one estimate.

    Attributes:
      mode, checkpoint: as for `Unrolled`.
      flops: floating-point operations, of all devices together.
      evaluations: these in units of one inner gradient.
      temp_bytes: peak of temporary memory of one device, besides arguments and results.
      kept_bytes: of `Replay`, the most that lies in its store at once; `checkpoint` is then its `keep`.
    """

    mode: str
    checkpoint: Checkpoint
    flops: float
    evaluations: float
    temp_bytes: int
    kept_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Predicted costs of one estimate for every mode and schedule; printed as a table.

    Attributes:
      steps: K, the inner steps.
      rows: one `Row` for every mode and schedule.
      chosen: the row of the hypergradient that was planned, "auto" resolved.

    Examples:
      >>> import bilevel, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20)
      >>> plan = bilevel.plan(problem, hypergradient, inner_data=train, outer_data=val)
      >>> plan.steps, plan.chosen.mode
      (20, 'mixed')
    """

    steps: int
    rows: tuple[Row, ...]
    chosen: Row

    def row(self, mode: str, checkpoint: Checkpoint) -> Row:
        """The row of a mode and a schedule.

        Raises:
          KeyError: if it was not planned.
        """
        for row in self.rows:
            if (row.mode, row.checkpoint) == (mode, checkpoint):
                return row
        raise KeyError(f"no row for mode={mode!r}, checkpoint={checkpoint!r}")

    def __rich__(self) -> Table:
        table = Table(title=f"One hypergradient through {self.steps} steps")
        replayed = any(row.kept_bytes for row in self.rows)
        flop, operations = _scaled([row.flops for row in self.rows], "FLOP")
        byte, sizes = _scaled([max(row.temp_bytes, row.kept_bytes) for row in self.rows], "B")
        names = ("mode", "keep" if replayed else "checkpoint", "gradients", "a step", flop, f"temporary {byte}")
        for name in (*names, *[f"kept {byte}"] * replayed):
            table.add_column(name, justify="left" if name in names[:2] else "right")
        for row in self.rows:
            name = row.checkpoint if isinstance(row.checkpoint, str) else repr(row.checkpoint)
            taken = row == self.chosen
            numbers = [row.evaluations, row.evaluations / self.steps, row.flops / operations, row.temp_bytes / sizes]
            numbers += [row.kept_bytes / sizes] * replayed
            cells = map(_shown, numbers)
            table.add_row(row.mode, f"{name} *" if taken else name, *cells, style="bold" if taken else None)
        table.caption = "* is what this hypergradient takes" if self.chosen in self.rows else None
        return table

    def __str__(self) -> str:
        console = Console(width=100, file=io.StringIO())
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def _scaled(numbers: list[Any], unit: str) -> tuple[str, float]:
    """The unit of a column in which its largest number is between 1 and 1,000, and how many of `unit` it is."""
    power = min(int(math.log(max(*numbers, 1), 1000)), 5)
    return ("", "k", "M", "G", "T", "P")[power] + unit, 1000.0**power


def _shown(number: float) -> str:
    if number >= 100:
        return f"{number:,.0f}"
    return f"{number:.2f}" if number >= 0.1 or number == 0 else f"{number:.1g}"


def plan(
    problem: Problem,
    hypergradient: Unrolled | Replay,
    *,
    outer: Outer = None,
    inner_state: InnerState | None = None,
    inner_data: Any = None,
    outer_data: Any = None,
    key: jax.Array | None = None,
    sharding: Sharding | None = None,
) -> Plan:
    """Predicts gradients, operations and memory of `hypergradient.estimate` for every mode and schedule.

    Programs of a few steps are compiled, which is what it takes time for; nothing is run.

    Args:
      problem: the problem.
      hypergradient: an `Unrolled`; its optimizer, steps, truncation and chunk are kept, mode and schedule varied. Or a
        `Replay`, of which `keep` is varied: what lies in its store is planned beside the device's temporary memory.
      outer: the point; by default `problem.start_outer(key)`. Only shapes matter.
      inner_state: a warm start; None for a cold one.
      inner_data, outer_data: as for `run`, without iterators.
      key: randomness; None is `jax.random.key(0)`.
      sharding: where arrays lie on a mesh, as for `run`: memory is then that of one device. Of a `Replay` no plan is
        made on a mesh.

    Raises:
      TypeError: for an estimator without schedules.
      ValueError: for a `Replay` on a mesh.

    Examples:
      >>> import bilevel, optax
      >>> from bilevel.testing import ridge
      >>> problem, train, val = ridge()
      >>> hypergradient = bilevel.Unrolled(optax.sgd(0.5), steps=20)
      >>> plan = bilevel.plan(problem, hypergradient, inner_data=train, outer_data=val)
      >>> every, root = plan.row("mixed", "step"), plan.row("mixed", "sqrt")
      >>> every.evaluations < root.evaluations  # the price of less memory
      True
    """
    if not isinstance(hypergradient, Unrolled | Replay):
        raise TypeError(f"{type(hypergradient).__name__} keeps no trajectory, so there is nothing to plan: compare it.")
    checked("plan", "sharding", sharding, optional(is_sharding))
    if sharding and isinstance(hypergradient, Replay):
        raise ValueError("plan(sharding=...) plans an Unrolled: a Replay runs on a mesh, but is not planned there.")
    forget_outdated(problem, hypergradient)
    if sharding:
        problem = sharding.problem(problem)
    point = Point.of("plan", problem, outer, inner_state, inner_data, outer_data, key)
    arguments = point.arguments(hypergradient.steps)
    if isinstance(hypergradient, Replay):
        return _replayed(hypergradient, *arguments)
    return planned(hypergradient, *arguments)


def _replayed(hypergradient: Replay, *arguments: Any) -> Plan:
    """As `planned`, for a `Replay` and each of its `keep`."""
    problem, state, outer, inner_batches, _, key = arguments
    twin = hypergradient.twin
    gradient = gradient_flops(problem, twin, outer, inner_batches, key)
    step = flops(_solve, twin, *arguments[:4], key) / hypergradient.steps
    whole, temporary = flops(_estimate, twin, *arguments), hypergradient.temporary_bytes(*arguments)
    keeps: list[Any] = ["all", "sqrt", Levels(3), Binomial(max(2, math.ceil(math.log2(hypergradient.count + 1))))]
    rows = []
    for keep in keeps if hypergradient.keep in keeps else [*keeps, hypergradient.keep]:
        each = dataclasses.replace(hypergradient, keep=keep)
        # A program of all steps evaluates each once forward; here a segment's derivative is a program of its own, which
        # does so again.
        count = whole + each.advanced_steps * step
        kept = each.kept_bytes(problem, state, outer, key)
        on_device = kept if hypergradient.store == "device" else 0
        rows.append(Row(hypergradient.mode, keep, count, count / gradient, temporary + on_device, kept))
    (chosen,) = (row for row in rows if row.checkpoint == hypergradient.keep)
    return Plan(hypergradient.steps, tuple(rows), chosen)


def planned(hypergradient: Unrolled, *arguments: Any) -> Plan:
    """As `plan`, for an estimator and the very arguments of its `estimate`."""
    problem, _, outer, inner_batches, _, key = arguments
    through = hypergradient.truncate or hypergradient.steps
    gradient = gradient_flops(problem, hypergradient, outer, inner_batches, key)
    step = flops(_solve, hypergradient, *arguments[:4], key) / hypergradient.steps
    moving = jax.tree.leaves(partition(outer)[0])
    rows = []
    for mode in ("mixed", "reverse", "forward"):
        own = dataclasses.replace(hypergradient, mode=mode, checkpoint="none")
        measured, plain = _Measured.of(own, *arguments), _Traced.of(own, *arguments)
        rows.append(Row(mode, "none", plain.flops, plain.flops / gradient, measured.with_kept(plain.kept)))
        if mode == "forward":
            break
        measured = _Measured.of(dataclasses.replace(own, checkpoint="step"), *arguments)
        rest, state = measured.rest, _sizes(own, *arguments).state
        # Binomial's loop of recomputations has arrays of its own; without iterates to keep there is no such loop.
        two = _short(dataclasses.replace(own, checkpoint=Binomial(2)), *arguments)
        binomial = temp_bytes(_estimate, *two) - 2 * state if plain.kept else rest
        for checkpoint in _table(through, hypergradient.checkpoint):
            if isinstance(checkpoint, Binomial):
                slots = min(checkpoint.c, through)
                count = plain.flops + (through + evaluations(through, slots)) * step
                kept = slots * state if plain.kept else 0
                memory = binomial + kept
            else:
                traced = _Traced.of(dataclasses.replace(own, checkpoint=checkpoint), *arguments)
                # Every loop inside another sums up a derivative by `outer` of its own.
                inside = len(schedules.chunks(through, schedules.levels(checkpoint))) - 1
                count = traced.flops
                memory = measured.with_kept(traced.kept + inside * sum(map(nbytes, moving)))
            rows.append(Row(mode, checkpoint, count, count / gradient, memory))
    return Plan(hypergradient.steps, tuple(rows), _chosen(rows, hypergradient, arguments, through))


def _table(length: int, own: Checkpoint) -> list[Checkpoint]:
    table: list[Checkpoint] = ["step", "sqrt", Levels(3), Binomial(max(2, math.ceil(math.log2(length + 1))))]
    known = [*table, "auto", "none", Levels(1), Levels(2)]
    return table if own in known or isinstance(own, schedules.Auto) else [*table, own]


def _chosen(rows: list[Row], hypergradient: Unrolled, arguments: tuple[Any, ...], length: int) -> Row:
    checkpoint: Checkpoint = "none"
    if hypergradient.mode != "forward":
        checkpoint = schedules.choose(hypergradient.checkpoint, lambda: _sizes(hypergradient, *arguments), length)
    aliases = {Levels(1): "step", Levels(2): "sqrt"}
    wanted = aliases[checkpoint] if checkpoint in aliases else checkpoint
    found = [row for row in rows if (row.mode, row.checkpoint) == (hypergradient.mode, wanted)]
    if found:
        return found[0]
    # A depth that "auto" found and the table does not show: every level costs another forward pass.
    own = dataclasses.replace(hypergradient, checkpoint=checkpoint)
    return planned(own, *arguments).chosen


class _Traced(NamedTuple):
    """A traced estimate: its operations, and the bytes that its loops keep for the backward pass."""

    flops: float
    kept: int

    @classmethod
    def of(cls, hypergradient: Unrolled, *arguments: Any) -> _Traced:
        jaxpr = jax.make_jaxpr(_estimate)(hypergradient, *arguments).jaxpr
        # What no result is computed from is not kept either: of a quadratic, for one, not even the iterates.
        jaxpr = without_unused(jaxpr)
        return cls(operations(jaxpr), _kept(jaxpr))


class _Measured(NamedTuple):
    """The memory of a compiled estimate, on one device.

    Attributes:
      rest: temporary bytes that do not depend on the number of its steps.
      share: what part of that which loops keep lies on one device: 1 without a mesh.
    """

    rest: int
    share: float

    @classmethod
    def of(cls, *arguments: Any) -> _Measured:
        short = _short(*arguments)
        bytes_, kept = temp_bytes(_estimate, *short), _Traced.of(*short).kept
        share, longer = 1.0, _short(*arguments, most=4 * _SHORT)
        if arguments[1].sharding is not None and (more := _Traced.of(*longer).kept - kept) > 0:
            # A compiler may lay out a small program as it likes, but holds neither nothing of an array nor it twice.
            share = (temp_bytes(_estimate, *longer) - bytes_) / more
            share = min(1.0, max(share, 1 / arguments[1].sharding.mesh.size))
        return cls(bytes_ - round(share * kept), share)

    def with_kept(self, kept: int) -> int:
        """Temporary bytes where loops keep so many, counted as whole arrays."""
        return self.rest + round(self.share * kept)


def _short(
    hypergradient: Unrolled, problem, state, outer, inner_batches, outer_batch, key, *, most: int = _SHORT
) -> tuple[Any, ...]:
    """Cuts the arguments of `_estimate` down to a few steps."""
    steps = min(most, hypergradient.steps)
    few = dataclasses.replace(hypergradient, steps=steps, truncate=None)
    return few, problem, state, outer, narrow(inner_batches, 0, steps), outer_batch, key


def _kept(jaxpr: Any) -> int:
    """Bytes that loops stack up for later ones: all of this level, and the most that is inside one of them."""
    results = {v for v in jaxpr.outvars if not is_literal(v)}
    for eqn in reversed(jaxpr.eqns):  # a report by another name is a result too
        if operation(eqn) in ("reshape", "stop_gradient") and results.intersection(eqn.outvars):
            results.update(eqn.invars)
    stacked, inside, used = 0, 0, read(jaxpr)
    for eqn in jaxpr.eqns:
        if operation(eqn) == "scan":
            stacks = eqn.outvars[scan_counts(eqn)[1] :]
            kept = (v.aval for v in stacks if v not in results and v in used and not is_on_host(v.aval))
            stacked += sum(map(nbytes, kept))
        inside = max([inside, *(_kept(inner) for inner in jaxprs(eqn.params))])
    return stacked + inside


def _estimate(hypergradient, *arguments):
    return hypergradient.estimate(*arguments)


def _solve(hypergradient, problem, state, outer, inner_batches, key):
    return hypergradient.solve(problem, state, outer, inner_batches, key)


def _sizes(hypergradient: Unrolled, problem, state, outer, inner_batches, outer_batch, key) -> StepBytes:
    probe = schedules.Probe([])
    measured = dataclasses.replace(hypergradient, checkpoint=probe)
    jax.eval_shape(lambda *arguments: _solve(measured, *arguments), problem, state, outer, inner_batches, key)
    return probe.found[-1]


def temp_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Peak bytes of temporary memory of the compiled `function(*arguments)`, which is not run.

    Raises:
      RuntimeError: if the backend does not tell.
    """
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    if analysis is None:
        raise RuntimeError(f"The {jax.default_backend()} backend has no memory analysis, so memory cannot be planned.")
    return analysis.temp_size_in_bytes
