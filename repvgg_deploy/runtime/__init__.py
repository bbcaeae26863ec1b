"""Backends that run a model, behind one protocol."""
