"""What a model is trained to do; an objective turns a batch into (sum of losses, their count)."""
