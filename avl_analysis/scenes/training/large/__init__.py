"""Training of the second embedded model: decoder on text first, vision tower on whole pictures, then both together."""
