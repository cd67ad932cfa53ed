"""The tracking server and store of the registry's tests."""

from tests.registry.conftest import clean_environment, packaged, server

__all__ = ["clean_environment", "packaged", "server"]
