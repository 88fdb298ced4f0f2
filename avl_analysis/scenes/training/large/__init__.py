"""Training of a larger scenes model: the decoder on text first, the vision tower on whole pictures,
then both together."""
