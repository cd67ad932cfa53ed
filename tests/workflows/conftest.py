"""What tests of tables share."""

from tests.results.conftest import finished

__all__ = ["finished"]
