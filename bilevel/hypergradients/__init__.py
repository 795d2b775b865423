"""Ways to estimate d outer_loss / d outer: one file each, one signature for all."""

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
from bilevel.hypergradients.one_step import OneStep as OneStep
from bilevel.hypergradients.persistent_evolution import PersistentES as PersistentES
from bilevel.hypergradients.reversible import Reversible as Reversible
from bilevel.hypergradients.unrolled import Unrolled as Unrolled
