"""What was hoped for beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.hypergradients.record import Record, Row
from benchmarks.hypergradients.side_by_side import CONTENDERS, IN_TORCH, MISMATCH

OURS = "bilevel, mixed, sqrt"
CHECKPOINTED = ("optimistix, sqrt(K) checkpoints", "equinox, sqrt(K) checkpoints")


class Goal(NamedTuple):
    """Attributes:
    text, where: what is wanted, and of which measurements.
    measured: ratios.
    wanted: what each of them should reach (`is_least`) or not exceed.
    limit: what theory allows, or the reason where that is known; may be empty.
    """

    text: str
    where: str
    measured: tuple[float, ...]
    wanted: float
    is_least: bool
    limit: str = ""

    @property
    def is_met(self) -> bool:
        return all(x >= self.wanted if self.is_least else x <= self.wanted for x in self.measured)


def goals(record: Record) -> list[Goal]:
    """Every goal that the record has the numbers for."""
    return [goal for part in (_sqrt, _torch, _checkpointing, _mixed, _compile) for goal in part(record)]


def _sqrt(record: Record) -> Iterator[Goal]:
    for problem in _distinct(record.find(section="estimators"), "problem"):
        rows = [row for row in _estimators(record, problem, "mixed, sqrt") if row["steps"] >= 16]
        training = {row["steps"]: row for row in _estimators(record, problem, "training")}
        if len(rows) < 2:
            continue
        first, last = rows[0], rows[-1]
        growth = (last["temporary"] - first["temporary"]) / (last["steps"] ** 0.5 - first["steps"] ** 0.5)
        states = growth / training[last["steps"]]["state"]
        where = f"{problem}, K = {first['steps']} to {last['steps']}"
        limit = "2 + gradient / state: 2.33 with Adam, 2.5 with momentum"
        yield Goal('"sqrt" keeps 2.5 states for each of sqrt(K)', where, (states,), 2.5, False, limit)
        where = _where(problem, [row["steps"] for row in rows])
        limit = "operations: 4.07 where an HVP costs 2.07 gradients, 4.5 where 2.5"
        yield Goal('"sqrt" takes 5 trainings', where, tuple(row["ratio"] for row in rows), 5.0, False, limit)


def _torch(record: Record) -> Iterator[Goal]:
    for problem in _distinct(record.find(section="peers", dtype="float32"), "problem"):
        for name, contender in CONTENDERS.items():
            if contender.file not in IN_TORCH:
                continue
            ours, plain = _peers(record, problem, OURS), _peers(record, problem, "bilevel, mixed, none")
            peers = {k: row for k, row in _peers(record, problem, name).items() if k in ours and k in plain}
            if not peers:
                continue
            if contender.file in ("torchopt", "higher") and 64 in peers and peers[64]["resident"]:
                less = peers[64]["resident"] / ours[64]["resident"]
                text = f'"sqrt" needs 10 times less resident memory than {name}'
                yield Goal(text, _where(problem, [64]), (less,), 10.0, True)
            for schedule, own in (("none", plain), ("sqrt", ours)):
                faster = tuple(peers[k]["seconds"] / own[k]["seconds"] for k in peers)
                yield Goal(f'"{schedule}" is faster than {name}', _where(problem, list(peers)), faster, 1.0, True)


def _checkpointing(record: Record) -> Iterator[Goal]:
    for problem in _distinct(record.find(section="peers", dtype="float32"), "problem"):
        for name in CHECKPOINTED:
            peers, ours = _peers(record, problem, name), _peers(record, problem, OURS)
            both = [k for k in peers if k in ours]
            if not both:
                continue
            where = _where(problem, both)
            faster = tuple(peers[k]["seconds"] / ours[k]["seconds"] for k in both)
            yield Goal(f'"sqrt" is 1.5 times faster than {name} ...', where, faster, 1.5, True)
            larger = tuple(ours[k]["temporary"] / peers[k]["temporary"] for k in both)
            yield Goal("... at 1.4 times its temporary memory", where, larger, 1.4, False)


def _mixed(record: Record) -> Iterator[Goal]:
    for blocks in _distinct(record.find(section="transformer"), "blocks"):
        found = {row["name"]: row for row in record.find(section="transformer", blocks=blocks)}
        for schedule in ("none", "step", "sqrt"):
            less = found[f"reverse, {schedule}"]["temporary"] / found[f"mixed, {schedule}"]["temporary"]
            text = f'mixed mode needs 5 times less temporary memory than reverse mode, "{schedule}"'
            yield Goal(text, f"8-block transformer, blocks {blocks}", (less,), 5.0, True)


def _compile(record: Record) -> Iterator[Goal]:
    for problem in _distinct(record.find(section="estimators"), "problem"):
        took = {row["steps"]: row["compile_seconds"] for row in _estimators(record, problem, "mixed, sqrt")}
        if 16 in took and 1024 in took:
            where, growth = f"{problem}, K = 1024 over 16", took[1024] / took[16]
            yield Goal("compile time does not grow with K", where, (growth,), 1.2, False)
    depths = sorted(record.find(section="depth"), key=lambda row: row["blocks"])
    if len(depths) > 1:
        where = f"{depths[-1]['blocks']} blocks over {depths[0]['blocks']}"
        growth = depths[-1]["compile_seconds"] / depths[0]["compile_seconds"]
        yield Goal("compile time does not grow with depth", where, (growth,), 1.2, False)


def disagreements(record: Record) -> list[Row]:
    """Rows of other libraries whose hypergradient is not the reference's, up to rounding."""
    rows = record.find(section="peers")
    return [row for row in rows if "error" in row and not row["error"] <= MISMATCH[row["dtype"]]]


def _where(problem: str, lengths: list[int]) -> str:
    return f"{problem}, K = {' / '.join(map(str, lengths))}"


def _distinct(rows: list[Row], field: str) -> list:
    return list(dict.fromkeys(row[field] for row in rows))


def _estimators(record: Record, problem: str, name: str) -> list[Row]:
    """Measured rows in the order of K."""
    rows = [row for row in record.find(section="estimators", problem=problem, name=name) if "seconds" in row]
    return sorted(rows, key=lambda row: row["steps"])


def _peers(record: Record, problem: str, name: str) -> dict[int, Row]:
    """K -> the measured row in float32."""
    rows = record.find(section="peers", dtype="float32", problem=problem, name=name)
    return {row["steps"]: row for row in rows if "seconds" in row}
