"""Adapter artifacts: versions of an adapter in an OCI registry or in a folder. Imports no torch."""
