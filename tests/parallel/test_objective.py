import pytest
import torch
import torch.nn.functional as F

from lasp.layout import SequenceLayout
from lasp.parallel.mesh import Mesh
from lasp.parallel.objective import Batch, count_labels, evaluate, shift_labels, token_loss_sum
from tests.harness import assert_close

BORDERS = (0, 5, 12)  # the worked example of the layouts


def _problem(dtype, tokens=13, dim=6, vocab=11):
    hidden = torch.randn(1, tokens, dim, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, dim, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (1, tokens))
    labels[0, ::4] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_tokens", [1, 5, 13, 64])
def test_chunked_cross_entropy_equals_torch_with_gradients(chunk_tokens):
    hidden, weight, labels = _problem(torch.float64)
    expected = F.cross_entropy((hidden @ weight.T)[0], labels[0], reduction="sum")
    expected_grads = torch.autograd.grad(expected * 0.3, (hidden, weight))
    loss = token_loss_sum(hidden, weight, labels, chunk_tokens=chunk_tokens)
    grads = torch.autograd.grad(loss * 0.3, (hidden, weight))
    assert_close("loss", loss, expected, 1e-14)
    for name, actual, wanted in zip(("hidden", "weight"), grads, expected_grads, strict=True):
        assert_close(name, actual, wanted, 1e-13)


def test_bf16_hidden_states_are_summed_in_fp32():
    hidden, weight, labels = _problem(torch.bfloat16, tokens=700)
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    expected = F.cross_entropy((wide[0] @ wide[1].T)[0], labels[0], reduction="sum")
    expected_grads = torch.autograd.grad(expected, wide)
    loss = token_loss_sum(hidden, weight, labels, chunk_tokens=64)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32 and [g.dtype for g in grads] == [torch.bfloat16] * 2
    assert_close("loss", loss, expected, 1e-6)
    assert_close("hidden", grads[0], expected_grads[0], 2**-8)
    assert_close("weight", grads[1], expected_grads[1], 2**-8)


def test_masked_tokens_alone_give_zeros_and_never_nan():
    hidden, weight, labels = _problem(torch.float32)
    loss = token_loss_sum(hidden, weight, torch.full_like(labels, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_mismatched_labels_are_refused():
    hidden, weight, labels = _problem(torch.float32)
    with pytest.raises(ValueError, match="one entry per token"):
        token_loss_sum(hidden, weight, labels[:, :-1])
    with pytest.raises(ValueError, match="width and dtype"):
        token_loss_sum(hidden, weight.double(), labels)


def test_labels_are_the_next_token_of_the_same_document():
    tokens = torch.arange(100, 112)[None]
    labels = shift_labels(tokens, SequenceLayout.contiguous(BORDERS, 2))
    assert labels.tolist() == [[101, 102, 103, 104, -100, 106, 107, 108, 109, 110, 111, -100]]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 2] = False
    assert shift_labels(tokens, SequenceLayout.contiguous(BORDERS, 2), mask)[0, 1] == -100


def _share_on_rank(group, dp_size, cp_size, make_layout, masked):
    mesh = Mesh.build(cp_size, dp_size, group)
    generator = torch.Generator().manual_seed(3)
    embedding = torch.randn(11, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(11, 6, dtype=torch.float64, generator=generator).requires_grad_()
    sequences = torch.randint(0, 11, (4, 12), generator=generator)
    layout = getattr(SequenceLayout, make_layout)(BORDERS, cp_size)
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, :8] = not masked  # with two contiguous ranks the first one has no label at all
    mine = sequences[mesh.dp_rank :: dp_size]
    batches = [Batch.cut(tokens[None], layout, mesh, loss_mask=mask) for tokens in mine]
    count = count_labels([b.labels for b in batches], mesh)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        share = token_loss_sum(embedding[batch.tokens], weight, batch.labels) / count
        share.backward()
        total += share.detach()
    held_out = evaluate(lambda b: token_loss_sum(embedding[b.tokens], weight, b.labels), batches, mesh)
    return mesh.sum(total), mesh.sum(embedding.grad), mesh.sum(weight.grad), held_out, int(count)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "dp_size, cp_size, layout",
    [(1, 2, "contiguous"), (1, 4, "zigzag"), (2, 2, "contiguous"), (4, 1, "contiguous")],
)
def test_loss_and_gradients_do_not_depend_on_the_mesh(ranks, dp_size, cp_size, layout, masked):
    expected = _share_on_rank(None, 1, 1, "contiguous", masked)
    for result in ranks.run(_share_on_rank, dp_size, cp_size, layout, masked, size=dp_size * cp_size):
        assert result[4] == expected[4]
        assert result[3] == pytest.approx(result[0].item(), rel=1e-12)  # evaluation is the same rule
        for name, actual, wanted in zip(("loss", "embedding", "weight"), result, expected, strict=False):
            assert_close(name, actual, wanted, 1e-13)
