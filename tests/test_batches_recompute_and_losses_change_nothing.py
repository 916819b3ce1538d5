"""Promise: the loss of a batch is the plain cross-entropy of its counted positions, however it is
computed: chunked or not, recomputed or not, dropout on or off, in one batch or in several."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.model import CPMConfig
from pretrain import recompute
from pretrain.batches import Batch
from pretrain.models.cpm import CPM
from pretrain.models.dropout import drop
from pretrain.objectives.causal import Causal
from pretrain.objectives.losses import token_losses_plain
from tests.windows import causal_batch, empty_batch

CONFIG = CPMConfig("cpm", 61, 32, 3, 4, 8, 64, 40)


def model_of(dtype: torch.dtype = torch.float64, train: bool = True) -> CPM:
    model = CPM(CONFIG).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator).to(dtype) * 0.3
    return model.train(train)


def a_batch(rows: int = 3, boundaries: bool = True) -> Batch:
    windows = np.random.default_rng(1).integers(0, 61, (rows, 41)).astype(np.int64)
    windows[np.random.default_rng(2).random(windows.shape) < 0.1] = 7
    return causal_batch(windows, 7, boundaries)


def step(model: CPM, batch: Batch, chunk: int = 0) -> tuple[float, int, list[torch.Tensor]]:
    """(loss, count, gradients) of one forward and backward from one dropout seed."""
    model.zero_grad()
    torch.manual_seed(3)
    losses = lambda f, h, t: token_losses_plain(f, h, t, chunk)  # noqa: E731
    loss, count = Causal().loss(model, batch, losses)
    loss.backward()
    return loss.item(), int(count), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("chunk", [0, 1, 7, 64, 1000])
def test_losses_equal_pytorchs_cross_entropy(chunk: int) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 16, generator=g, dtype=torch.float64, requires_grad=True)
    table = torch.randn(900, 16, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(900, (50,), generator=g)
    weight = torch.rand(50, generator=g, dtype=torch.float64)
    expected = F.cross_entropy(hidden @ table.T, targets, reduction="none")
    gradients = torch.autograd.grad((expected * weight).sum(), (hidden, table))
    got = token_losses_plain(lambda h: h @ table.T, hidden, targets, chunk)
    assert (got - expected).abs().max() < 1e-12
    for mine, theirs in zip(
        torch.autograd.grad((got * weight).sum(), (hidden, table)), gradients, strict=True
    ):
        assert (mine - theirs).abs().max() < 1e-12
    with torch.no_grad():
        quiet = token_losses_plain(lambda h: h @ table.T, hidden, targets, chunk)
    assert torch.equal(quiet, got)


def test_low_precision_losses_are_fp32_and_no_fp32_logits_are_kept() -> None:
    hidden = torch.randn(256, 32, dtype=torch.bfloat16, requires_grad=True)
    table = torch.randn(3000, 32, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(3000, (256,))
    for chunk, most in ((0, 256 * 3000 * 2), (32, 0)):
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in (hidden.data_ptr(), table.data_ptr()):
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            losses = token_losses_plain(lambda h: h @ table.T, hidden, targets, chunk)
        assert losses.dtype == torch.float32
        losses.sum().backward()
        # The logits in their own dtype at most, and a few numbers a position.
        assert sum(kept.values()) <= most + 256 * 64


@pytest.mark.parametrize("boundaries", [True, False])
def test_the_objective_counts_and_sums_the_positions_of_the_mask(boundaries: bool) -> None:
    model, batch = model_of(train=False), a_batch(boundaries=boundaries)
    loss, count, gradients = step(model, batch)
    logits = model.logits(model(batch.tokens_BT, batch.positions_BT, batch.document_ids_BT))
    every = F.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), reduction="none")
    expected = (every * batch.loss_mask_BT.flatten()).sum()
    assert count == int(batch.loss_mask_BT.sum())
    assert count < batch.tokens_BT.numel() or not boundaries
    assert abs(loss - expected.item()) < 1e-9
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    assert max((a - b).abs().max().item() for a, b in zip(gradients, theirs, strict=True)) < 1e-10
    # Without the loader's list of positions the mask alone gives the same.
    bare = Batch(**{**vars(batch), "loss_at_N": None})
    assert step(model, bare)[:2] == (loss, count)


def test_an_empty_micro_batch_adds_nothing() -> None:
    model = model_of()
    for boundaries in (True, False):
        loss, count, gradients = step(model, empty_batch(40, 5, boundaries))
        assert (loss, count) == (0.0, 0)
        assert all((g == 0).all() for g in gradients)  # there, and zero: no rank waits for another


def test_a_batch_in_parts_has_the_same_gradient() -> None:
    model = model_of(train=False)
    whole = step(model, a_batch(5))
    windows = torch.cat([a_batch(5).tokens_BT, a_batch(5).targets_BT[:, -1:]], 1).numpy()
    parts = [step(model, causal_batch(part, 7, True)) for part in (windows[:1], windows[1:])]
    assert parts[0][1] + parts[1][1] == whole[1]
    assert abs(parts[0][0] + parts[1][0] - whole[0]) < 1e-9
    for a, b, c in zip(parts[0][2], parts[1][2], whole[2], strict=True):
        assert (a + b - c).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["full", "sublayer"])
def test_recompute_gives_the_same_bits_with_dropout(how: str, dtype: torch.dtype) -> None:
    model, batch = model_of(dtype), a_batch()
    names = [name for name, _ in model.named_parameters()]
    plain = step(model, batch)
    again = step(recompute.apply(model, how), batch)
    assert [name for name, _ in model.named_parameters()] == names
    assert again[:2] == plain[:2]
    assert all(torch.equal(a, b) for a, b in zip(again[2], plain[2], strict=True))
    # Negative control: another dropout seed is another loss.
    torch.manual_seed(4)
    assert Causal().loss(model, batch, token_losses_plain)[0].item() != plain[0]
    back = step(recompute.apply(model, "none"), batch)
    assert back[:2] == plain[:2]


def kept_bytes(model: CPM, batch: Batch) -> int:
    """Bytes of the tensors that a forward saves for its backward, each storage once."""
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        hidden = model(batch.tokens_BT, batch.positions_BT, batch.document_ids_BT)
    del hidden
    return sum(kept.values())


def test_recompute_keeps_less() -> None:
    model, batch = model_of(torch.float32), a_batch(8)
    none, sublayer, full = (
        kept_bytes(recompute.apply(model, how), batch) for how in ("none", "sublayer", "full")
    )
    assert full < sublayer < none / 3


def test_a_copy_of_a_recomputing_model_is_its_own() -> None:
    model = recompute.apply(model_of(), "full")
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data.zero_()
    batch = a_batch()
    hidden = twin(batch.tokens_BT, batch.positions_BT, batch.document_ids_BT)
    assert (hidden == 0).all()


def test_an_unknown_way_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"recompute: is 'half', must be none, full or sublayer"):
        recompute.apply(model_of(), "half")


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(1_000_003)
    for probability in (0.1, 0.5):
        y = drop(x, probability)
        # 5 standard errors of a million draws.
        error = 5 * (probability * (1 - probability) / len(x)) ** 0.5
        assert abs((y == 0).double().mean() - probability) < error + 1e-5
        assert abs(y.double().mean() - 1) < error / (1 - probability)
        assert len(y.unique()) == 2
    assert drop(x, 0.0) is x
    torch.manual_seed(1)
    first = drop(x, 0.1)
    torch.manual_seed(1)
    assert torch.equal(drop(x, 0.1), first)
    assert not torch.equal(drop(x, 0.1), first)
    # Elements at any distance, of one mask and of two, are independent: the share of pairs dropped
    # together is p squared.
    zero, other = first == 0, drop(x, 0.1) == 0
    for apart in (1, 2, 3, 4, 8, 512, 2048, 4096):
        for behind in (zero, other):
            together = (zero[apart:] & behind[:-apart]).double().mean().item()
            assert abs(together - 0.01) < 5 * (0.01 / len(x)) ** 0.5
    assert abs((zero & other).double().mean().item() - 0.01) < 5 * (0.01 / len(x)) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropout_is_the_same_in_every_precision_and_in_the_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    plain = drop(torch.ones(37, 5, 11), 0.25)
    x = torch.ones(37, 5, 11, dtype=dtype, requires_grad=True)
    torch.manual_seed(3)
    y = drop(x.transpose(0, 2), 0.25)  # the mask belongs to places, whatever the strides
    y.sum().backward()
    assert y.dtype == dtype and x.grad is not None
    assert torch.equal((y != 0).flatten(), (plain != 0).flatten())
    assert torch.equal(x.grad.transpose(0, 2), y.detach())
    assert torch.allclose(y[y != 0].double(), torch.tensor(4 / 3).double(), rtol=2**-8)
    assert bool((drop(x, 1.0) == 0).all())
