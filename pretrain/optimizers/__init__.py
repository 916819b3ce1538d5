"""Update rules over the logical tensors of a model, whatever layout it has.

    groups.py      which tensors are updated alike
    fragments.py   what a rank holds of each tensor; norms of whole tensors in one message
    update.py      one update of everything: collect, clip, apply
    adam.py        adamw, rms_adamw, lamb
    adafactor.py   second moments by row and column
    muon.py        orthogonalised momentum for matrices
    rows.py        adamw for embeddings, where a row that was not used stays as it is
    averages.py    ema and lookahead, beside any of them

`pretrain/optimizer.py` builds what a run's `optimizer` section names out of these.
"""
