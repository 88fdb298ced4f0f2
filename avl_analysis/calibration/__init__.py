"""Choosing A-VL's settings from a model's own attention."""
