"""Outer iterations: one file each, `init` and `step` for all."""

from bilevel.solvers.amigo import AmIGO as AmIGO
from bilevel.solvers.base import Solver as Solver
from bilevel.solvers.bome import BOME as BOME
from bilevel.solvers.bsa import BSA as BSA
from bilevel.solvers.f2sa import F2SA as F2SA
from bilevel.solvers.fsla import FSLA as FSLA
from bilevel.solvers.ma_soba import MASOBA as MASOBA
from bilevel.solvers.mrbo import MRBO as MRBO
from bilevel.solvers.nested import Nested as Nested
from bilevel.solvers.nested import NestedState as NestedState
from bilevel.solvers.pzobo import PZOBO as PZOBO
from bilevel.solvers.saba import SABA as SABA
from bilevel.solvers.soba import SOBA as SOBA
from bilevel.solvers.srba import SRBA as SRBA
from bilevel.solvers.stocbio import StocBiO as StocBiO
from bilevel.solvers.stochastic import Calls as Calls
from bilevel.solvers.stochastic import Power as Power
from bilevel.solvers.stochastic import State as State
from bilevel.solvers.sustain import SUSTAIN as SUSTAIN
from bilevel.solvers.ttsa import TTSA as TTSA
from bilevel.solvers.vrbo import VRBO as VRBO
