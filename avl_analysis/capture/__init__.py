"""Watching a running model: from one attention call to the numbers kept."""
