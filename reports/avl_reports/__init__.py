"""Tell: turn recordings into figures, pages and tables, one question to a figure."""
