"""The tiny base and the rows of the unit tests, for those that need torch, transformers and peft."""

from tests.unit.conftest import rows_file, tiny_base

__all__ = ["rows_file", "tiny_base"]
