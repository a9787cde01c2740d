"""Floor 2: where tokens come from."""
