"""The architectures, one family a file; plain single-device PyTorch, nothing distributed in here."""
