"""How far our models lie from those of transformers, on the same random weights, in float64.

    python -m benchmarks.rounding

The stock MT5 computes its norms in float32 and the stock RoFormer its table of positions, whatever
the model's precision; "forced" has both in float64, as the tests force them. Differences in
standard deviations of what is compared: logits by the largest, gradients by the largest element of
any tensor and by the worst tensor's root mean square.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from tests import test_roformer_equals_its_origin as roformer
from tests import test_t5_pegasus_equals_mt5 as t5

Found = tuple[str, float, float, float]


def seen(logits: tuple[Tensor, Tensor], gradients: list[tuple[Tensor, Tensor]]) -> list[float]:
    """(largest of the logits, largest of the gradients, worst root mean square of a gradient)."""
    far = [((mine - other).abs(), other.std()) for mine, other in gradients if other.std() > 1e-6]
    return [
        ((logits[0] - logits[1]).abs().max() / logits[1].std()).item(),
        max((apart.max() / scale).item() for apart, scale in far),
        max((apart.square().mean().sqrt() / scale).item() for apart, scale in far),
    ]


def of_t5(forced: bool) -> Iterator[Found]:
    """T5 PEGASUS as mT5, tiny and published heads, packed and padded."""
    stock: Callable[..., Tensor] = t5.modeling.MT5LayerNorm.forward
    cases = {
        "tiny, packed": (replace(t5.TINY, **t5.MT5), t5.PACKED),
        "tiny, padded": (t5.TINY, t5.PADDED),
        "published heads": (t5.BASE_HEADS, t5.LONG),
    }
    t5.modeling.MT5LayerNorm.forward = t5.exact_norm if forced else stock
    try:
        for name, (config, lengths) in cases.items():
            largest = []
            for exact in (True, False):
                ours = t5.build(config, torch.float64)
                largest.append(t5.compare(ours, t5.mt5_of(ours), lengths, exact))
            (logits, top), (_, mean) = largest
            yield f"T5 PEGASUS, {name}", logits, max(top.values()), max(mean.values())
    finally:
        t5.modeling.MT5LayerNorm.forward = stock


def of_roformer(forced: bool) -> Iterator[Found]:
    """RoFormer v1, the same."""
    for name, config, lengths in (
        ("tiny, packed", roformer.TINY, roformer.PACKED),
        ("tiny, padded", roformer.TINY, roformer.PADDED),
        ("published heads", roformer.BASE_HEADS, roformer.LONG),
    ):
        ours = roformer.build(config, torch.float64)
        theirs: nn.Module = roformer.hf_of(ours, forced)
        logits = roformer.ours_on(ours, lengths), roformer.theirs_on(theirs, lengths)
        mine = roformer.with_gradients(logits[0], dict(ours.named_parameters()))
        mine = roformer.to_hf(mine, config.layers)
        other = roformer.with_gradients(logits[1], dict(theirs.named_parameters()))
        pairs = [(value, other[key]) for key, value in mine.items()]
        yield (f"RoFormer v1, {name}", *seen(logits, pairs))


def main() -> None:
    """Print the table."""
    print(f"{'':32}{'logits':>12}{'gradients':>12}{'their rms':>12}")
    for forced in (False, True):
        print("forced to float64" if forced else "stock")
        for family in (of_t5, of_roformer):
            for name, *far in family(forced):
                print(f"  {name:30}" + "".join(f"{one:>12.1e}" for one in far))


if __name__ == "__main__":
    main()
