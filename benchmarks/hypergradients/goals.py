"""What was hoped for beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.hypergradients.side_by_side import CONTENDERS, IN_TORCH, MISMATCH, written
from benchmarks.record import Record, Row

SQRT, BINOMIAL, NONE = "bilevel, mixed, sqrt", "bilevel, mixed, binomial", "bilevel, mixed, none"
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
        if problem == "quadratic":
            limit = "none is kept: no second derivative of a linear training depends on where it is"
        yield Goal('"sqrt" keeps no more than 2.5 sqrt(K) states', where, (states,), 2.5, False, limit)
        where = _where(problem, [row["steps"] for row in rows])
        limit = "operations: 4.07 where an HVP costs 2.07 gradients, 4.5 where 2.5"
        yield Goal(
            '"sqrt" takes no more than 5 trainings', where, tuple(row["ratio"] for row in rows), 5.0, False, limit
        )


def _torch(record: Record) -> Iterator[Goal]:
    for problem in _distinct(record.find(section="peers"), "problem"):
        for name, contender in CONTENDERS.items():
            peers = _peers(record, problem, name)
            if contender.file not in IN_TORCH or not peers:
                continue
            for own in (SQRT, BINOMIAL):
                ours = _peers(record, problem, own)
                if contender.file != "hypertorch" and 64 in peers and 64 in ours and peers[64]["resident"]:
                    less = peers[64]["resident"] / ours[64]["resident"]
                    text = f"{_schedule(own)} needs 10 times less resident memory than {name}"
                    yield Goal(text, _where(problem, [64]), (less,), 10.0, True)
            for own in (NONE, SQRT):
                yield _faster(record, problem, own, name, 1.0)


def _checkpointing(record: Record) -> Iterator[Goal]:
    for problem in _distinct(record.find(section="peers"), "problem"):
        for own in (SQRT, BINOMIAL):
            for name in CHECKPOINTED:
                peers, ours = _peers(record, problem, name), _peers(record, problem, own)
                both = [k for k in peers if k in ours]
                if not both:
                    continue
                yield _faster(record, problem, own, name, 1.5)
                larger = tuple(ours[k]["temporary"] / peers[k]["temporary"] for k in both)
                yield Goal("... at 1.4 times its temporary memory", _where(problem, both), larger, 1.4, False)


def _faster(record: Record, problem: str, own: str, name: str, wanted: float) -> Goal:
    peers, ours = _peers(record, problem, name), _peers(record, problem, own)
    both = [k for k in peers if k in ours]
    ratios = tuple(peers[k]["seconds"] / ours[k]["seconds"] for k in both)
    text = f"{_schedule(own)} is {f'{wanted:g} times ' if wanted != 1 else ''}faster than {name}"
    return Goal(text, _where(problem, both), ratios, wanted, True)


def _schedule(name: str) -> str:
    schedule = name.rpartition(", ")[2]
    return written(schedule, "sqrt(K)") if name == BINOMIAL else f'"{schedule}"'


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
    """Rows of hypergradients that are not the reference's."""
    return [row for row in record.find(section="agreement") if "error" in row and not row["error"] <= MISMATCH]


def _where(problem: str, lengths: list[int]) -> str:
    return f"{problem}, K = {' / '.join(map(str, lengths))}"


def _distinct(rows: list[Row], field: str) -> list:
    return list(dict.fromkeys(row[field] for row in rows))


def _estimators(record: Record, problem: str, name: str) -> list[Row]:
    """Measured rows in the order of K."""
    rows = [row for row in record.find(section="estimators", problem=problem, name=name) if "seconds" in row]
    return sorted(rows, key=lambda row: row["steps"])


def _peers(record: Record, problem: str, name: str) -> dict[int, Row]:
    """K -> the measured row."""
    rows = record.find(section="peers", problem=problem, name=name)
    return {row["steps"]: row for row in rows if "seconds" in row}
