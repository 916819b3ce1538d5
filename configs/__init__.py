"""WHAT a corpus, a model and a run are. No torch here, and nothing of ours but this room."""
