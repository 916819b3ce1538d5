"""TOKENS -> WEIGHTS: order, batches, models, objectives, the engine and its checkpoints."""
