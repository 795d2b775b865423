"""Outer iterations: one file each, `init` and `step` for all."""

from bilevel.solvers.base import Solver as Solver
from bilevel.solvers.nested import Nested as Nested
from bilevel.solvers.nested import NestedState as NestedState
