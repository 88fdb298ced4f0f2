"""Kinds of attention heads, where they look, and what silencing them does."""
