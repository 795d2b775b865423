# Reference

## Problems and data

::: bilevel.Problem

::: bilevel.MicroBatches
::: bilevel.Sharding
    options:
      members: [start_outer, start_inner]
::: bilevel.Batches
::: bilevel.Indexed
::: bilevel.FullBatch
::: bilevel.InnerState

::: bilevel.data
    options:
      members: false

### Domains of outer variables

::: bilevel.Bijector
::: bilevel.Positive
::: bilevel.Softplus
::: bilevel.Interval
::: bilevel.Simplex
::: bilevel.Compose

## Hypergradients

::: bilevel.Hypergradient
::: bilevel.Estimate
::: bilevel.Aux
::: bilevel.value_and_hypergrad

### Through training

::: bilevel.Unrolled
::: bilevel.Reversible
::: bilevel.Levels
::: bilevel.Binomial
::: bilevel.Auto
::: bilevel.differentiation.checkpointing
    options:
      members: false
::: bilevel.plan
::: bilevel.Plan

### At the trained point

::: bilevel.Implicit
::: bilevel.FixedPoint
::: bilevel.ImplicitSolve
::: bilevel.proximal_gradient
::: bilevel.soft_threshold

### Cheap

::: bilevel.FirstOrder
::: bilevel.OneStep
::: bilevel.FiniteDifference
::: bilevel.SAMA

### Without derivatives

::: bilevel.EvolutionStrategies
::: bilevel.PersistentES

### For many tasks

::: bilevel.PerTask

### Comparing them

::: bilevel.compare
::: bilevel.Comparison
::: bilevel.variance
::: bilevel.Variance

## Linear solvers

::: bilevel.linear_solvers
    options:
      members: false
::: bilevel.CG
::: bilevel.NormalCG
::: bilevel.GMRES
::: bilevel.BiCGStab
::: bilevel.Dense
::: bilevel.Neumann
::: bilevel.Nystrom

## Solvers

::: bilevel.Solver
::: bilevel.Nested

### Stochastic

::: bilevel.solvers.stochastic.State
::: bilevel.SOBA
::: bilevel.MASOBA
::: bilevel.SABA
::: bilevel.SRBA
::: bilevel.AmIGO
::: bilevel.StocBiO
::: bilevel.BSA
::: bilevel.TTSA
::: bilevel.FSLA
::: bilevel.MRBO
::: bilevel.VRBO
::: bilevel.SUSTAIN
::: bilevel.F2SA
::: bilevel.BOME
::: bilevel.PZOBO
::: bilevel.Power

## Outer transformations

::: bilevel.allocate
::: bilevel.project
::: bilevel.center

## Running

::: bilevel.run
::: bilevel.Result
::: bilevel.fit

## Warnings

::: bilevel.StructuralZeroWarning
::: bilevel.CustomDerivativeWarning
::: bilevel.InexactHypergradientWarning
::: bilevel.SteepUpdateWarning
::: bilevel.warn_if_inexact

## Extending

::: bilevel.extend
    options:
      members: false
::: bilevel.extend.Estimator
::: bilevel.extend.Trained
::: bilevel.extend.Query
::: bilevel.extend.Answer
::: bilevel.extend.Keys
::: bilevel.extend.LinearSolver
::: bilevel.extend.Stochastic
::: bilevel.extend.Iteration
::: bilevel.extend.Iterate
::: bilevel.extend.Calls
::: bilevel.extend.StepSize
::: bilevel.extend.descend
::: bilevel.extend.Trace
::: bilevel.extend.INSIDE_TRAINING

### Settings and trees

::: bilevel.extend.PyTree
::: bilevel.extend.Inner
::: bilevel.extend.Outer
::: bilevel.extend.Batch
::: bilevel.extend.Key
::: bilevel.extend.register
::: bilevel.extend.setting
::: bilevel.extend.child
::: bilevel.extend.integer
::: bilevel.extend.real
::: bilevel.extend.scalar
::: bilevel.extend.step_size
::: bilevel.extend.as_pytree
::: bilevel.extend.split_inner
::: bilevel.extend.combine
::: bilevel.extend.resolve
::: bilevel.extend.is_marked

### Split weights

::: bilevel.extend.gathered
::: bilevel.extend.across
::: bilevel.extend.split_rows
::: bilevel.extend.on_a_mesh

### Loops and benchmarks

::: bilevel.extend.chunk
::: bilevel.extend.CAPACITY
::: bilevel.extend.Checkpoints
::: bilevel.extend.flops
::: bilevel.extend.gradient_flops

## Checking

::: bilevel.testing
    options:
      members: false
::: bilevel.testing.check_hypergradient
::: bilevel.testing.check_estimator
::: bilevel.testing.DUTIES
::: bilevel.testing.EstimatorCheck
::: bilevel.testing.HypergradientCheck
::: bilevel.testing.Agreement
::: bilevel.testing.central_differences
::: bilevel.testing.Quadratic
::: bilevel.testing.quadratic
::: bilevel.testing.ridge
