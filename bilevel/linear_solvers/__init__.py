r"""Linear systems $A x = b$ given by products with A, as implicit differentiation meets them.

Every solver is a pytree with one method, `solve(matvec, rhs, start, key, symmetric=...) -> (solution, info)`:

- `matvec` maps a tree like `rhs` to a tree like `rhs`; all leaves of `rhs` share one real dtype.
- `start` is a first guess (the solution of the outer iteration before), or None for zero; direct solvers ignore it.
- `key` is the randomness of solvers that sketch A; `symmetric` says whether A is known to equal its transpose.
- `info` is `{"iterations", "matvecs"}`, int32 scalars. With A a Hessian, a matvec is a Hessian-vector product (HVP).

Iterative solvers stop at $\|b - Ax\| \lesssim \mathrm{tol}\,\|b\|$ (GMRES with an equally small last step, within
a factor of two), or after `max_steps`; none raises on the device. `tol=None` is `eps**0.75` of the dtype: 2e-12 in
float64, 6e-6 in float32. Where A is not what a solver is for (singular; indefinite for `CG`) none but `Neumann`, which
is a fixed sum, returns what is worse than its start.

| solver | A | cost in HVPs |
|---|---|---|
| `CG` | symmetric positive definite | one an iteration, about sqrt(condition) iterations |
| `NormalCG` | any nonsingular | two an iteration, about condition iterations |
| `GMRES` | any nonsingular | `restart` + 1 a cycle, at least two cycles |
| `BiCGStab` | any nonsingular (may break down) | two an iteration |
| `Neumann` | spectral radius of I - scale A below 1 | `terms` (one less from zero) |
| `Nystrom` | symmetric positive semidefinite, low rank + damping | `rank`, in one batch |
| `Dense` | any nonsingular, small | the dimension, in one batch |
"""
