"""Checkpoints of other houses, in and out: a table of rules for each format, each with a proof."""
