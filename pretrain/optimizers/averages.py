"""What is kept of the weights beside them: an average for evaluation, and Lookahead's slow weights.

    ema         e <- e + r (w - e)      r = (1 - decay) / (1 - decay ** t)
    lookahead   every k updates: s <- s + share (w - s), w <- s        (Zhang et al. 2019)

With that r, e is the average of the weights after updates 1 to t with weights decay ** age, which
is bert4keras' average divided by its 1 - decay ** t, at every t: nothing of the fresh weights is
left in it, and nothing has to be corrected when it is read. t counts from a tensor's birth; an
average that begins in the middle of a run begins at the weights. Slow weights begin at the weights
too (bert4keras' begin at zero, which halves a loaded model at once).
"""

from collections.abc import Mapping

from torch import Tensor

from pretrain.optimizers.update import Update


class Ema:
    """Slot `ema`: evaluate a checkpoint with it by `launch evaluate ... --ema`."""

    slots: Mapping[str, str] = {"ema": "weight"}
    part = None
    masks = False

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def begin(self, update: Update) -> None:
        """Nothing depends on the layout."""

    def apply(self, update: Update, grads: dict[Tensor, Tensor], sick: Tensor | None) -> None:
        """After the weights have changed."""
        for flat in update.flats:
            state = update.state[flat]
            rate = (1 - self.decay) / (1 - self.decay ** state["step"].double())
            state["ema"].lerp_(flat.detach(), rate.float())


class Lookahead:
    """Slot `slow`: where the weights go back to."""

    slots: Mapping[str, str] = {"slow": "weight"}
    part = None
    masks = False

    def __init__(self, every: int, share: float) -> None:
        self.every, self.share = every, share

    def begin(self, update: Update) -> None:
        """Nothing depends on the layout."""

    def apply(self, update: Update, grads: dict[Tensor, Tensor], sick: Tensor | None) -> None:
        """After the weights have changed, at every k-th update of the run."""
        if update.updates % self.every:
            return
        for flat in update.flats:
            slow = update.state[flat]["slow"]
            slow.lerp_(flat.detach(), self.share)
            flat.detach().copy_(slow)
