"""Settings: what a frozen dataclass is given, checked by a rule that stands beside the field.

A rule is a function `value -> value`: it returns the value as it is kept (an `int` of NumPy becomes one of Python, a
function becomes a pytree) or raises `Unfit` with what it must be. `check_fields`, called in `__post_init__`, makes one
sentence of that, with the class, the field and the value. Booleans are never numbers, classes never their instances.
"""
