"""Observe attention: load a model, record what its heads look at, and reduce that to labelled numbers.

Everything here looks on from outside; whatever changes a model's computation lives in `avl`.
"""
