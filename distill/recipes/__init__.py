"""Whole runs, from data to report."""
