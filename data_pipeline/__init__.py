"""Text -> tokens: sources, cleaning, words and pieces, Megatron's index files. No torch in here."""
