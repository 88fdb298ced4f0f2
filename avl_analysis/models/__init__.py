"""Loading a model, preparing its images and prompts, and describing it."""
