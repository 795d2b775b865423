"""The update rules of the stochastic solvers as their papers state them, in NumPy, and the losses they are tried on.

The losses are not quadratic: all their derivatives move with w and with lambda, so that it shows where each is taken.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bilevel import Problem

INNER, OUTER, ROWS, OUTER_ROWS, SIZE, OUTER_SIZE = 3, 2, 12, 9, 5, 4
T, N, Q, J, PERIOD = 2, 3, 3, 3, 3  # inner steps, linear steps, terms, directions, iterations between full passes
ETA, AVERAGE, SIGMA, MU, ALPHA = 0.6, 0.3, 5.0, 0.1, 0.15


def _data() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)

    def definite(rows, n):
        root = 0.4 * rng.normal(size=(rows, n, n))
        return np.eye(n) + root @ root.transpose(0, 2, 1)

    inner = {
        "H": definite(ROWS, INNER),
        "C": rng.normal(size=(ROWS, OUTER, INNER)),
        "b": rng.normal(size=(ROWS, INNER)),
        "D": rng.uniform(0.1, 0.5, size=(ROWS, OUTER, INNER)),
        "q": rng.uniform(0.1, 0.5, size=(ROWS, INNER)),
    }
    outer = {
        "A": definite(OUTER_ROWS, INNER),
        "c": rng.normal(size=(OUTER_ROWS, INNER)),
        "R": definite(OUTER_ROWS, OUTER),
        "r": rng.normal(size=(OUTER_ROWS, OUTER)),
        "E": rng.normal(size=(OUTER_ROWS, OUTER, INNER)),
    }
    return inner, outer


DATA, OUTER_DATA = _data()
W, LAM = np.array([0.5, -0.8, 0.3]), np.array([0.7, -0.4])


def inner_loss(w, lam, batch, key):
    H, C, b, D, q = (batch[k].mean(0) for k in "HCbDq")
    return 0.5 * w @ H @ w + lam @ C @ w + b @ w + 0.5 * lam**2 @ D @ w**2 + q @ w**4 / 12


def outer_loss(w, lam, batch, key):
    A, c, R, r, E = (batch[k].mean(0) for k in "AcRrE")
    return 0.5 * w @ A @ w + c @ w + 0.5 * lam @ R @ lam + r @ lam + lam @ E @ w


PROBLEM = Problem(inner_loss, outer_loss, lambda key, lam: jnp.asarray(W), lambda key: jnp.asarray(LAM))


class Rows:
    """A loss on some rows; `seen` are the points at which it was differentiated."""

    def __init__(self, data, rows):
        self.data, self.seen = {k: x[rows].mean(0) for k, x in data.items()}, []

    def at(self, w, lam):
        self.seen.append((w, lam))
        return self.data


class Inner(Rows):
    """f: its value, its gradients `w` and `lam`, its Hessian `H` and its mixed derivative `C`, by hand."""

    def __init__(self, rows):
        super().__init__(DATA, rows)

    def value(self, w, lam):
        return float(inner_loss(w, lam, {k: x[None] for k, x in self.data.items()}, None))

    def w(self, w, lam):
        d = self.at(w, lam)
        return d["H"] @ w + lam @ d["C"] + d["b"] + (lam**2 @ d["D"]) * w + d["q"] * w**3 / 3

    def lam(self, w, lam):
        d = self.at(w, lam)
        return d["C"] @ w + lam * (d["D"] @ w**2)

    def H(self, w, lam):
        d = self.at(w, lam)
        return d["H"] + np.diag(lam**2 @ d["D"] + d["q"] * w**2)

    def C(self, w, lam):
        d = self.at(w, lam)
        return d["C"] + 2 * lam[:, None] * d["D"] * w[None]


class Outer(Rows):
    """F: its value and gradients, by hand."""

    def __init__(self, rows):
        super().__init__(OUTER_DATA, rows)

    def value(self, w, lam):
        return float(outer_loss(w, lam, {k: x[None] for k, x in self.data.items()}, None))

    def w(self, w, lam):
        d = self.at(w, lam)
        return d["A"] @ w + d["c"] + lam @ d["E"]

    def lam(self, w, lam):
        d = self.at(w, lam)
        return d["R"] @ lam + d["r"] + d["E"] @ w


class Now(NamedTuple):
    """What a rule is given: f and F on the batch of each draw and on all rows, step sizes, and what was random.

    `p` is the number of random products, as reported; `u` holds the directions. `rows` and `outer_rows` are the
    batches' row numbers.
    """

    k: int
    f: list[Inner]
    F: list[Outer]
    all_f: Inner
    all_F: Outer
    rho: float
    rho_v: float
    gamma: float
    p: int
    u: np.ndarray
    rows: np.ndarray
    outer_rows: np.ndarray


def sgd(w, lam, draws, rho):
    for f in draws:
        w = w - rho * f.w(w, lam)
    return w


def neumann(b, w, lam, draws, eta):
    """eta sum_q prod_j (I - eta H_j) b."""
    total = chain = b
    for f in draws:
        chain = chain - eta * f.H(w, lam) @ chain
        total = total + chain
    return eta * total


def random_term(b, w, lam, draws, eta):
    """Q eta prod_j (I - eta H_j) b."""
    for f in draws:
        b = b - eta * f.H(w, lam) @ b
    return Q * eta * b


def three(f, F, w, lam, v):
    """SOBA's directions of w, v and lambda."""
    return [f.w(w, lam), f.H(w, lam) @ v - F.w(w, lam), F.lam(w, lam) - f.C(w, lam) @ v]


def follow(s, at, d):
    s.w, s.v, s.lam = s.w - at.rho * d[0], s.v - at.rho_v * d[1], s.lam - at.gamma * d[2]


# The rules, one a solver: `s` holds w, lam, and what is kept from one iteration to the next, 0 at first (y, the second
# inner variable of F2SA, starts where w does).


def soba(s, at):
    follow(s, at, three(at.f[0], at.F[0], s.w, s.lam, s.v))


def ma_soba(s, at):
    d = three(at.f[0], at.F[0], s.w, s.lam, s.v)
    old, s.d_lam = s.d_lam, (1 - AVERAGE) * s.d_lam + AVERAGE * d[2]
    follow(s, at, [*d[:2], old])


def saba(s, at):
    estimates = []
    for name, rows, total, size, cls in (
        ("inner", at.rows[0], ROWS, SIZE, Inner),
        ("outer", at.outer_rows[0], OUTER_ROWS, OUTER_SIZE, Outer),
    ):
        blocks = [np.arange(total)[i : i + size] for i in range(0, total, size)]
        j = rows[-1] // size
        on = cls(blocks[j])
        (at.f if name == "inner" else at.F).append(on)
        if name == "inner":
            new = [on.w(s.w, s.lam), on.H(s.w, s.lam) @ s.v, on.C(s.w, s.lam) @ s.v]
        else:
            new = [on.w(s.w, s.lam), on.lam(s.w, s.lam)]
        table = s.tables.setdefault(name, [[0 * x for x in new] for _ in blocks])
        mean = [sum(len(b) / total * row[i] for b, row in zip(blocks, table, strict=True)) for i in range(len(new))]
        estimates += [n - t + m for n, t, m in zip(new, table[j], mean, strict=True)]
        table[j] = new
    grad, hvp, mixed, outer_w, outer_lam = estimates
    follow(s, at, [grad, hvp - outer_w, outer_lam - mixed])


def srba(s, at):
    now = (s.w, s.lam, s.v)
    if at.k % PERIOD == 0:
        s.d = three(at.all_f, at.all_F, *now)
    else:
        new, old = three(at.f[0], at.F[0], *now), three(at.f[0], at.F[0], *s.before)
        s.d = [d + n - o for d, n, o in zip(s.d, new, old, strict=True)]
    s.before = now
    follow(s, at, s.d)


def amigo(s, at):
    s.w = sgd(s.w, s.lam, at.f[:T], at.rho)
    for f in at.f[T : T + N]:
        s.v = s.v - at.rho_v * (f.H(s.w, s.lam) @ s.v - at.F[0].w(s.w, s.lam))
    s.lam = s.lam - at.gamma * (at.F[0].lam(s.w, s.lam) - at.f[-1].C(s.w, s.lam) @ s.v)


def stocbio(s, at):
    s.w = sgd(s.w, s.lam, at.f[:T], at.rho)
    v = neumann(at.F[0].w(s.w, s.lam), s.w, s.lam, at.f[T : T + Q], at.rho_v)
    s.lam = s.lam - at.gamma * (at.F[0].lam(s.w, s.lam) - at.f[-1].C(s.w, s.lam) @ v)


def bsa(s, at, steps=T):
    s.w = sgd(s.w, s.lam, at.f[:steps], at.rho)
    v = random_term(at.F[0].w(s.w, s.lam), s.w, s.lam, at.f[steps : steps + at.p], at.rho_v)
    s.lam = s.lam - at.gamma * (at.F[0].lam(s.w, s.lam) - at.f[-1].C(s.w, s.lam) @ v)


def ttsa(s, at):
    bsa(s, at, steps=1)


def fsla(s, at):
    w = s.w - at.rho * at.f[0].w(s.w, s.lam)
    v = s.v - at.rho_v * (at.f[1].H(w, s.lam) @ s.v - at.F[0].w(w, s.lam))

    def D(w, lam, v):
        return at.F[1].lam(w, lam) - at.f[2].C(w, lam) @ v

    new = D(w, s.lam, v)
    s.d_lam = new if at.k == 0 else new + (1 - ETA) * (s.d_lam - D(s.w, s.lam_before, s.v))
    s.lam_before = s.lam
    s.w, s.v, s.lam = w, v, s.lam - at.gamma * s.d_lam


def double_momentum(s, at, invert):
    def both(w, lam):
        v = invert(at.F[0].w(w, lam), w, lam)
        return at.f[0].w(w, lam), at.F[0].lam(w, lam) - at.f[0].C(w, lam) @ v

    new = both(s.w, s.lam)
    if at.k == 0:
        s.d = new
    else:
        s.d = [n + (1 - ETA) * (d - o) for n, d, o in zip(new, s.d, both(*s.before), strict=True)]
    s.before = s.w, s.lam
    s.w, s.lam = s.w - at.rho * s.d[0], s.lam - at.gamma * s.d[1]


def mrbo(s, at):
    double_momentum(s, at, lambda b, w, lam: neumann(b, w, lam, at.f[1 : 1 + Q], at.rho_v))


def sustain(s, at):
    double_momentum(s, at, lambda b, w, lam: random_term(b, w, lam, at.f[1 : 1 + at.p], at.rho_v))


def vrbo(s, at):
    def both(w, lam, f, F, series):
        v = neumann(F.w(w, lam), w, lam, series, at.rho_v)
        return np.concatenate([f.w(w, lam), F.lam(w, lam) - f.C(w, lam) @ v])

    if at.k % PERIOD == 0:
        s.d = both(s.w, s.lam, at.all_f, at.all_F, [at.all_f] * Q)
    before, s.lam = (s.w, s.lam), s.lam - at.gamma * s.d[INNER:]
    for t in range(T):
        draws = at.f[t * (1 + Q)], at.F[t], at.f[t * (1 + Q) + 1 : (t + 1) * (1 + Q)]
        s.d = s.d + both(s.w, s.lam, *draws) - both(*before, *draws)
        before, s.w = (s.w, s.lam), s.w - at.rho * s.d[:INNER]


def f2sa(s, at):
    for t in range(T):
        s.y = s.y - at.rho * (at.f[2 * t].w(s.y, s.lam) + at.F[t].w(s.y, s.lam) / SIGMA)
        s.w = s.w - at.rho * at.f[2 * t + 1].w(s.w, s.lam)
    difference = at.f[-2].lam(s.y, s.lam) - at.f[-1].lam(s.w, s.lam)
    s.lam = s.lam - at.gamma * (at.F[-1].lam(s.y, s.lam) + SIGMA * difference)


def bome(s, at):
    trained = sgd(s.w, s.lam, at.f[:T], ALPHA)
    objective = np.concatenate([at.F[0].w(s.w, s.lam), at.F[0].lam(s.w, s.lam)])
    f, beyond = at.f[-2], at.f[-1]
    gap = np.concatenate([f.w(s.w, s.lam), f.lam(s.w, s.lam) - beyond.lam(trained, s.lam)])
    d = objective + max(ETA - objective @ gap / (gap @ gap), 0) * gap
    s.w, s.lam = s.w - at.rho * d[:INNER], s.lam - at.gamma * d[INNER:]


def pzobo(s, at):
    w = sgd(s.w, s.lam, at.f, at.rho)
    at.f[-1].at(w, s.lam)  # where the inner loss is reported
    moved = [sgd(s.w, s.lam + MU * u, at.f, at.rho) for u in at.u]
    slopes = [(m - w) / MU @ at.F[0].w(w, s.lam) for m in moved]
    s.lam = s.lam - at.gamma * (at.F[0].lam(w, s.lam) + np.mean([a * u for a, u in zip(slopes, at.u, strict=True)], 0))
    s.w = w
