"""Relevance of image tokens for one answer token, beside raw attention weights."""

from collections.abc import Mapping

METHODS: Mapping[str, str] = {
    "raw": "raw attention",
    "value": "value-weighted attention",
    "relative": "relative attention",
    "gradient": "gradient-weighted attention",
    "chefer": "relevance propagation",
}
"""Name of a map -> what it is called in figures."""
UNITS: Mapping[str, str] = {
    "raw": "share of the row",
    "value": "attention times length of the value vector",
    "relative": "times that under a generic instruction",
    "gradient": "attention times nats per attention",
    "chefer": "relevance",
}
"""Name of a map -> the unit of its values."""
