"""Questions from drawn scenes or a JSONL file, and recording many of them."""
