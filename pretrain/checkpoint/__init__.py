"""The run folder's checkpoints: one logical state on disk, written by all ranks at once.

    RUN/checkpoints/stage-00-step-00001000/
        weights-00000.safetensors exp_avg-00000.safetensors ...   whole tensors, <= 512 MB a file
        state.json      progress, configs, fingerprints (pretrain.state.Record)
        verify.json     a sum of each logical tensor, the loss of a recorded micro-batch
        tokenizer/      what turns text into these tokens
        manifest.json   every file with its size and hash, and its own hash; written last

    places.py    names and shapes -> the place of every byte, the same on every rank
    writing.py   pieces of all ranks -> files aside -> fsync, hashes, manifest -> one rename
    saver.py     the same behind the training: a copy in host memory, a thread that writes it
    reading.py   what is damaged, which is the newest good one, a state mapped from its files
    sums.py      a tensor's sum, whoever holds which part of it
    retention.py which ones stay
    ranks.py     steps that all ranks take together, or none

A folder without the rename is no checkpoint; a file that differs from its hash is named and the
next older checkpoint is taken. The bytes do not depend on world size, ZeRO stage or tensor
parallelism. safetensors and JSON only.
"""

from pretrain.checkpoint.places import (
    FORMAT,
    CheckpointError,
    Piece,
    Slot,
    StorageError,
    checkpoint_name,
    layout,
)
from pretrain.checkpoint.ranks import first_rank, gather, own_group
from pretrain.checkpoint.reading import damage, found_in, newest, own_hash, read, resolve
from pretrain.checkpoint.retention import passed_over, rotate
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.sums import differing
from pretrain.checkpoint.writing import save, write_state

__all__ = [
    "FORMAT",
    "CheckpointError",
    "Piece",
    "Saver",
    "Slot",
    "StorageError",
    "checkpoint_name",
    "damage",
    "differing",
    "first_rank",
    "found_in",
    "gather",
    "layout",
    "newest",
    "own_group",
    "own_hash",
    "passed_over",
    "read",
    "resolve",
    "rotate",
    "save",
    "write_state",
]
