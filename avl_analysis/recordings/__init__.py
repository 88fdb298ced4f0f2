"""Labelled arrays of many samples: their schema, files and tables."""
