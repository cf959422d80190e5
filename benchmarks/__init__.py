"""Measurements, each beside a named baseline from the same run."""
