"""Hyper-parameters found by differentiating through training.

What is public is what this file exports, one line a name, and three modules: `bilevel.testing`, which checks a
hypergradient, `bilevel.extend`, which a new estimator, solver or linear solver is built from, and `bilevel.nnx`, which
makes a problem of modules of flax. The rest may change.
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version
from types import ModuleType as _ModuleType

from bilevel.bijectors import Bijector as Bijector
from bilevel.bijectors import Compose as Compose
from bilevel.bijectors import Interval as Interval
from bilevel.bijectors import Positive as Positive
from bilevel.bijectors import Simplex as Simplex
from bilevel.bijectors import Softplus as Softplus
from bilevel.data import Batches as Batches
from bilevel.data import FullBatch as FullBatch
from bilevel.data import Indexed as Indexed
from bilevel.differentiation.custom_rules import CustomDerivativeWarning as CustomDerivativeWarning
from bilevel.differentiation.influence import InexactHypergradientWarning as InexactHypergradientWarning
from bilevel.differentiation.influence import SteepUpdateWarning as SteepUpdateWarning
from bilevel.differentiation.influence import StructuralZeroWarning as StructuralZeroWarning
from bilevel.differentiation.influence import ZeroHypergradientWarning as ZeroHypergradientWarning
from bilevel.differentiation.influence import warn_if_inexact as warn_if_inexact
from bilevel.differentiation.schedules import Auto as Auto
from bilevel.differentiation.schedules import Binomial as Binomial
from bilevel.differentiation.schedules import Levels as Levels
from bilevel.differentiation.schedules import Offload as Offload
from bilevel.hypergradients.base import Aux as Aux
from bilevel.hypergradients.base import Estimate as Estimate
from bilevel.hypergradients.base import Hypergradient as Hypergradient
from bilevel.hypergradients.base import value_and_hypergrad as value_and_hypergrad
from bilevel.hypergradients.evolution import EvolutionStrategies as EvolutionStrategies
from bilevel.hypergradients.finite_difference import SAMA as SAMA
from bilevel.hypergradients.finite_difference import FiniteDifference as FiniteDifference
from bilevel.hypergradients.first_order import FirstOrder as FirstOrder
from bilevel.hypergradients.fixed_point import FixedPoint as FixedPoint
from bilevel.hypergradients.implicit import Implicit as Implicit
from bilevel.hypergradients.implicit_solve import ImplicitSolve as ImplicitSolve
from bilevel.hypergradients.jacobian import value_and_hyperjacobian as value_and_hyperjacobian
from bilevel.hypergradients.one_step import OneStep as OneStep
from bilevel.hypergradients.per_task import PerTask as PerTask
from bilevel.hypergradients.persistent_evolution import PersistentES as PersistentES
from bilevel.hypergradients.replay import Replay as Replay
from bilevel.hypergradients.reversible import Reversible as Reversible
from bilevel.hypergradients.training import InnerState as InnerState
from bilevel.hypergradients.unrolled import Unrolled as Unrolled
from bilevel.linear_solvers.bicgstab import BiCGStab as BiCGStab
from bilevel.linear_solvers.dense import Dense as Dense
from bilevel.linear_solvers.krylov import CG as CG
from bilevel.linear_solvers.krylov import GMRES as GMRES
from bilevel.linear_solvers.krylov import NormalCG as NormalCG
from bilevel.linear_solvers.neumann import Neumann as Neumann
from bilevel.linear_solvers.nystrom import Nystrom as Nystrom
from bilevel.measuring.compare import Comparison as Comparison
from bilevel.measuring.compare import compare as compare
from bilevel.measuring.importances import gradient_sizes as gradient_sizes
from bilevel.measuring.importances import importances as importances
from bilevel.measuring.planning import Plan as Plan
from bilevel.measuring.planning import plan as plan
from bilevel.measuring.smoothness import Smoothness as Smoothness
from bilevel.measuring.smoothness import smoothness as smoothness
from bilevel.measuring.variance import Variance as Variance
from bilevel.measuring.variance import variance as variance
from bilevel.problem.micro_batches import MicroBatches as MicroBatches
from bilevel.problem.problem import Problem as Problem
from bilevel.running.fit import fit as fit
from bilevel.running.run import Result as Result
from bilevel.running.run import run as run
from bilevel.running.trackers.event_files import TensorBoard as TensorBoard
from bilevel.running.trackers.mlflow_runs import MLflow as MLflow
from bilevel.running.trackers.optuna_trials import OptunaPruning as OptunaPruning
from bilevel.running.trackers.wandb_runs import WandB as WandB
from bilevel.sharding.sharding import Sharding as Sharding
from bilevel.solvers.amigo import AmIGO as AmIGO
from bilevel.solvers.base import Solver as Solver
from bilevel.solvers.bome import BOME as BOME
from bilevel.solvers.bsa import BSA as BSA
from bilevel.solvers.f2sa import F2SA as F2SA
from bilevel.solvers.fsla import FSLA as FSLA
from bilevel.solvers.ma_soba import MASOBA as MASOBA
from bilevel.solvers.mrbo import MRBO as MRBO
from bilevel.solvers.nested import Nested as Nested
from bilevel.solvers.pzobo import PZOBO as PZOBO
from bilevel.solvers.saba import SABA as SABA
from bilevel.solvers.soba import SOBA as SOBA
from bilevel.solvers.srba import SRBA as SRBA
from bilevel.solvers.stocbio import StocBiO as StocBiO
from bilevel.solvers.stochastic import Power as Power
from bilevel.solvers.sustain import SUSTAIN as SUSTAIN
from bilevel.solvers.ttsa import TTSA as TTSA
from bilevel.solvers.vrbo import VRBO as VRBO
from bilevel.transforms import allocate as allocate
from bilevel.transforms import center as center
from bilevel.transforms import project as project
from bilevel.transforms import proximal_gradient as proximal_gradient
from bilevel.transforms import soft_threshold as soft_threshold

__all__ = sorted(  # pyright: ignore[reportUnsupportedDunderAll]  (the lines above are the list)
    name for name, value in globals().items() if not name.startswith("_") and not isinstance(value, _ModuleType)
)

try:
    __version__ = _version("bilevel")
except _PackageNotFoundError:  # a folder that was never installed
    __version__ = "unknown"
