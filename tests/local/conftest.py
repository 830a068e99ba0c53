"""Pods that really run, and what they meet: run by `make engine`, as root."""

from tests.engine.conftest import tools

__all__ = ["tools"]
