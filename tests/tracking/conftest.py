"""The environment of the registry's tests."""

from tests.registry.conftest import clean_environment

__all__ = ["clean_environment"]
