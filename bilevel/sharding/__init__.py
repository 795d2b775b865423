"""Where things live on a mesh of devices: batches, weights, the inner and the outer variable.

The program is written for one device; `jax.jit` cuts it up by where its arguments lie and by what is pinned inside. So
`Sharding` does two things only: it *places* arrays on the mesh before a program runs, and it *pins* the batch a loss is
given, and the variables a training carries, where they belong. All numbers are those of one device, to rounding.
"""
