"""Show: the dashboard.

Widgets and layout only; numbers come from `avl_analysis`, drawings from its figures.
"""
