"""Measurements against the systems that do the same job; nothing here is shipped."""
