"""Floor 2: numbers in, numbers out; no torch, no plots, no files but the claims."""
