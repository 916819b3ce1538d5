"""WHAT a corpus, a model and a run are. No torch here; this room imports nothing of ours but itself."""
