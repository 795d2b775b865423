"""Outer iterations: one file each, `init` and `step` for all, exported by `bilevel`."""
