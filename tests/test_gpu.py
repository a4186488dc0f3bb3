"""What only a GPU can show. Skipped without one; the same kernels run interpreted and simulated."""

import pytest
import torch
from support import bin_target, logits, sparse_target

from gfl_kernels import distribution_focal_loss, integral, quality_focal_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA or ROCm device"),
]


def step(x, z, target, position, count):
    x.grad = z.grad = None
    loss = quality_focal_loss(x, target, avg_factor=count)
    loss = loss + distribution_focal_loss(z, position, avg_factor=count)
    (loss + integral(z).mean()).backward()
    return loss.detach(), x.grad, z.grad


def inputs():
    x = logits(3000, 80).cuda().requires_grad_()
    z = logits(3001, 17).cuda().requires_grad_()
    target = tuple(part.cuda() for part in sparse_target((3000,), 80))
    return x, z, target, bin_target((3001,), 17).cuda(), torch.tensor(37.0, device="cuda")


def test_no_host_synchronisation():
    arguments = inputs()
    step(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph():
    arguments = inputs()
    expected = [part.clone() for part in step(*arguments)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*arguments)
    for _ in range(3):
        graph.replay()
    for got, want in zip(captured, expected, strict=True):
        assert torch.equal(got, want)


def test_streams_do_not_share_a_workspace():
    arguments = [inputs() for _ in range(4)]
    expected = [step(*a)[0].clone() for a in arguments]
    torch.cuda.synchronize()
    results = []
    for a in arguments:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append([step(*a)[0] for _ in range(50)])
    torch.cuda.synchronize()
    for got, want in zip(results, expected, strict=True):
        assert all(torch.equal(value, want) for value in got)
