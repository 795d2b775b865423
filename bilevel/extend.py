"""What a new estimator, solver or linear solver is built from.

The guide "Extending" of the documentation builds one of each, in about thirty lines.

- A hypergradient: a frozen dataclass under `Trained`, where the inner problem is trained by an optimizer, or under
  `Estimator`, with one method, `differentiate(query: Query) -> Answer`.
- A stochastic solver: a frozen dataclass under `Stochastic` with one method, `iterate`.
- A linear solver: any object with `solve`, as `LinearSolver` says.
- `register` makes a dataclass a pytree; `setting` and `child` put the rule of a field beside it.
- For benchmarks and loops of one's own: `chunk`, the compiled steps that `run` takes at once, at most `CAPACITY`;
  `Checkpoints`, its files; `Progress`, its bar; `flops` and `gradient_flops`, operations of a traced function;
  `resolve`, rows of `Indexed`.
- For models whose weights are split over a mesh: `gathered`, `across`, `split_rows`, `on_a_mesh`.
- A tracker of metrics: a class under `Tracker` with three methods, `begin`, `write` and `end`.
- For a `jax.custom_vjp` with `symbolic_zeros`: `is_marked`, whether a leaf is what its forward rule is given.
"""

# pyright: strict

from types import ModuleType as _ModuleType

from bilevel.data import resolve as resolve
from bilevel.differentiation.tracing import is_marked as is_marked
from bilevel.hypergradients.base import INSIDE_TRAINING as INSIDE_TRAINING
from bilevel.hypergradients.base import Estimator as Estimator
from bilevel.hypergradients.base import Trained as Trained
from bilevel.hypergradients.progress import Progress as Progress
from bilevel.hypergradients.query import Answer as Answer
from bilevel.hypergradients.query import Keys as Keys
from bilevel.hypergradients.query import Query as Query
from bilevel.hypergradients.training import Trace as Trace
from bilevel.linear_solvers.base import LinearSolver as LinearSolver
from bilevel.measuring.flops import flops as flops
from bilevel.measuring.flops import gradient_flops as gradient_flops
from bilevel.problem.problem import split_inner as split_inner
from bilevel.running.checkpoints import Checkpoints as Checkpoints
from bilevel.running.chunks import CAPACITY as CAPACITY
from bilevel.running.chunks import chunk as chunk
from bilevel.running.trackers.base import Tracker as Tracker
from bilevel.settings.fields import child as child
from bilevel.settings.fields import register as register
from bilevel.settings.fields import setting as setting
from bilevel.settings.numeric import integer as integer
from bilevel.settings.numeric import real as real
from bilevel.settings.numeric import scalar as scalar
from bilevel.settings.numeric import step_size as step_size
from bilevel.settings.rules import as_pytree as as_pytree
from bilevel.sharding.inside import across as across
from bilevel.sharding.inside import gathered as gathered
from bilevel.sharding.inside import on_a_mesh as on_a_mesh
from bilevel.sharding.inside import split_rows as split_rows
from bilevel.solvers.stochastic import Calls as Calls
from bilevel.solvers.stochastic import Iterate as Iterate
from bilevel.solvers.stochastic import Iteration as Iteration
from bilevel.solvers.stochastic import StepSize as StepSize
from bilevel.solvers.stochastic import Stochastic as Stochastic
from bilevel.solvers.stochastic import descend as descend
from bilevel.trees import Batch as Batch
from bilevel.trees import Inner as Inner
from bilevel.trees import Key as Key
from bilevel.trees import Outer as Outer
from bilevel.trees import PyTree as PyTree
from bilevel.trees import combine as combine

__all__ = sorted(  # pyright: ignore[reportUnsupportedDunderAll]  (the lines above are the list)
    name for name, value in globals().items() if not name.startswith("_") and not isinstance(value, _ModuleType)
)
