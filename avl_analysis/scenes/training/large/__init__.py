"""Training of a larger scenes model.

The decoder on text first, the vision tower on whole pictures, then both together.
"""
