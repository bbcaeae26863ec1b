"""Recorded results as tables, plots and a page."""
