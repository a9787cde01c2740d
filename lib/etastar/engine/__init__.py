"""Floor 3: plan a sweep, train it in stacks, keep it in a store."""
