"""What holds for the tests of the methods: their programs run for milliseconds, too."""

from tests.bilevel.conftest import quick_compilation as quick_compilation
