"""Adapters for host codebases."""
