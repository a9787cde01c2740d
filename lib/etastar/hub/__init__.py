"""Floor 3: released checkpoints and ours in the same form: fetched, loaded, exported, evaluated, measured."""
