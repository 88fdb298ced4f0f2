"""Training code of the embedded model; not needed to use it."""
