"""Tables of the page *Which hypergradient*, from their records."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.record import Record, Row

UNROLLED = Path(__file__).with_name("unrolled.jsonl")
LONG = Path(__file__).with_name("long.jsonl")

BIASES = {
    "`Unrolled` (every mode and schedule), `Reversible`": (
        *("mixed, none", "mixed, step", "mixed, sqrt", "mixed, binomial", "reverse, none", "forward", "reversible"),
    ),
    "`Unrolled(truncate=K // 4)`": ("truncated to K/4",),
    "`Implicit`, CG": ("implicit, CG",),
    "`FixedPoint`, 100 terms": ("fixed point",),
    "`Implicit`, `Nystrom(rank=20)`": ("implicit, Nystrom",),
    "`OneStep`, `FiniteDifference`, `SAMA`": ("one step", "finite difference", "SAMA"),
    "`FirstOrder`": ("first order",),
    "`EvolutionStrategies`, 32 members": ("evolution strategies",),
}
"""What the page calls them -> rows of the record, of which the largest error is told."""


def bias(record: Record, lengths: tuple[int, ...] = (64, 1024)) -> str:
    """Relative errors on the quadratic."""

    def largest(names: Iterable[str], steps: int) -> float:
        rows = [row for row in record.find(section="estimators", problem="quadratic", steps=steps) if "error" in row]
        return max(row["error"] for row in rows if row["name"] in names)

    body = [(title, *(_error(largest(names, k)) for k in lengths)) for title, names in BIASES.items()]
    return _table(("relative error", *(f"K = {k}" for k in lengths)), body)


def _error(x: float) -> str:
    if x < 1e-12:
        return "< 1e-12"
    return f"{x:.0e}" if x < 0.01 else f"{x:.0f}" if x >= 100 else f"{x:.2f}"


def unrolled(record: Record) -> str:
    """Memory and operations of every mode and schedule on a LoRA transformer."""
    (step,) = record.find(section="step")
    parts = [
        f"One gradient needs {step['gradient'] / 1e6:.1f} MB of temporary memory; the moving state is "
        f"{step['state'] / 1e6:.1f} MB.\n"
    ]
    rows = record.find(section="memory", blocks="rematerialised")
    found = {row["name"]: f"{row['temporary'] / 1e6:,.{0 if row['temporary'] >= 1e8 else 1}f} MB" for row in rows}
    body = [(f'`"{s}"`', found[f"mixed, {s}"], found[f"reverse, {s}"]) for s in ("none", "step", "sqrt")]
    parts.append(_table((f"blocks rematerialised, K = {rows[0]['steps']}", "mixed", "reverse"), body))
    rows = record.find(section="operations")
    shown = ("mixed, none", "mixed, step", "mixed, sqrt", "reverse, none", "reverse, step")
    counts = {(row["blocks"], row["name"]): f"{row['gradients']:.2f}" for row in rows}
    body = [(f"blocks {kept}", *(counts[kept, name] for name in shown)) for kept in ("rematerialised", "stored")]
    parts.append(_table((f"G a step, K = {rows[0]['steps']}", *(n.replace(",", "") for n in shown)), body))
    return "\n".join(parts)


def long(rows: list[Row]) -> str:
    """Long trainings by `Replay`."""
    head = ("K", "steps a segment", "first call, compiled", "training", "estimate", "over training", "resident memory")
    body = [
        (
            f"{row['steps']:,}",
            str(row["segment"]),
            *(f"{row[k]:.1f} s" for k in ("first_call_seconds", "training_seconds", "estimate_seconds")),
            f"{row['ratio']:.2f}",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
        )
        for row in rows
    ]
    return _table(head, body)


def _table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    head = list(head)
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body)) + "\n"
