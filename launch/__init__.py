"""Who starts it: the verbs of `python -m launch`. It imports the other rooms, none imports it."""
