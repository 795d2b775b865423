"""A bilevel problem, and what users hand to the engine beside settings: trees, modules, functions."""
