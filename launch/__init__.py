"""Who starts it: the verbs of `python -m launch`. It imports the other rooms; no room imports it."""
