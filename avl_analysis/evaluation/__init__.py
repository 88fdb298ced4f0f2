"""Policies against the full cache: answers, bytes, keys read, time."""
