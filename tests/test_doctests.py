"""Every public name has an example in its docstring, and what the example shows is true."""

import doctest
import inspect
import types

import pytest

import bilevel
import bilevel.extend
import bilevel.nnx
import bilevel.testing

MODULES = (bilevel, bilevel.extend, bilevel.nnx, bilevel.testing)


def documented() -> dict[str, object]:
    """Public classes and functions of this package. Constants and aliases of types have no docstring of their own."""
    return {
        f"{module.__name__}.{name}": value
        for module in MODULES
        for name in module.__all__
        if str(getattr(value := getattr(module, name), "__module__", "")).partition(".")[0] == "bilevel"
    }


NAMES = documented()


def example(name: str) -> doctest.DocTest:
    """The examples of one docstring, not those of methods; they see nothing but what they import."""
    text = inspect.cleandoc(NAMES[name].__doc__ or "")
    return doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, name, None, 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_name_is_right(name):
    found = example(name)
    shown = [step for step in found.examples if step.want]
    assert shown, "has no example whose output is checked"
    assert "SKIP" not in found.docstring
    section = found.docstring.rpartition("\n\nExamples:\n")[2]
    assert section.count(">>>") == len(found.examples), "examples are in a last section, `Examples:`"
    said: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=doctest.REPORT_ONLY_FIRST_FAILURE).run(found, out=said.append)
    assert not said, "".join(said)




@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_public_module_exports_nothing_that_it_merely_imports(module):
    for name in module.__all__:
        value = getattr(module, name)
        assert not name.startswith("_") and not isinstance(value, types.ModuleType)
    if module is bilevel.testing:
        rooms = {getattr(module, name).__module__ for name in module.__all__ if not name.isupper()}
        assert all(room == module.__name__ or room.startswith("bilevel.measuring.") for room in rooms)
