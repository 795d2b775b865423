"""Ways to estimate d outer_loss / d outer: one file each, one signature for all."""

from bilevel.hypergradients.base import Aux as Aux
from bilevel.hypergradients.base import Estimate as Estimate
from bilevel.hypergradients.base import Hypergradient as Hypergradient
from bilevel.hypergradients.base import value_and_hypergrad as value_and_hypergrad
from bilevel.hypergradients.first_order import FirstOrder as FirstOrder
from bilevel.hypergradients.fixed_point import FixedPoint as FixedPoint
from bilevel.hypergradients.implicit import Implicit as Implicit
from bilevel.hypergradients.implicit_solve import ImplicitSolve as ImplicitSolve
from bilevel.hypergradients.unrolled import Unrolled as Unrolled
