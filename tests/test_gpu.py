"""What only a GPU can show. Skipped without one, where the same kernels run interpreted (Triton's)
and simulated (both backends').
"""

import pytest
import torch
from support import bin_target, check_op, expected, lay_out, logits, moved, sparse_target, why_not
from test_head import LAYOUTS, aligned, check, one_level, scene

import gfl_kernels
from gfl_kernels import (
    distribution_focal_loss,
    gfl_loss,
    integral,
    quality_focal_loss,
    task_aligned_loss,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def backend(request):
    reason = why_not(request.param)
    if reason is not None:
        (pytest.fail if expected(request.param) else pytest.skip)(
            f"backend {request.param!r} is not usable: {reason}"
        )
    with gfl_kernels.use_backend(request.param):
        yield request.param


def step(x, z, target, position, count, head):
    leaves = [x, z, *head.cls, *head.box]
    for leaf in leaves:
        leaf.grad = None
    loss = quality_focal_loss(x, target, avg_factor=count)
    loss = loss + distribution_focal_loss(z, position, avg_factor=count)
    losses = gfl_loss(head.cls, head.box, *head.others, **head.options)[:3]
    (loss + integral(z).mean() + sum(losses)).backward()
    return loss.detach(), *(part.detach() for part in losses), *(leaf.grad for leaf in leaves)


def inputs(device="cuda", dtype=torch.float32):
    x = logits(3000, 80, dtype=dtype).to(device).requires_grad_()
    z = logits(3001, 17, dtype=dtype).to(device).requires_grad_()
    target = tuple(part.to(device) for part in sparse_target((3000,), 80))
    position = bin_target((3001,), 17).to(device)
    head = scene(classes=20, sizes=((40, 33), (20, 16), (10, 8)), dtype=dtype)
    head = head.to(lambda t: t.to(device))
    for leaf in (*head.cls, *head.box):
        leaf.requires_grad_()
    return x, z, target, position, torch.tensor(37.0, device=device), head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "nchw", "width_cropped"])
def test_values(dtype, layout):
    laid = lay_out(layout, logits(2, 12, 20, 17, dtype=dtype, device="cuda"))
    rows = laid.row_shape
    for beta in (2.0, 1.5):
        target = sparse_target(rows, 17, device="cuda")
        check_op("quality", laid.pred, target, beta=beta, class_dim=laid.dim, reduction="none")
        check_op("quality", laid.pred, target, beta=beta, class_dim=laid.dim, avg_factor=9.0)
    position = bin_target(rows, 17, device="cuda")
    check_op("distribution", laid.pred, position, bin_dim=laid.dim, avg_factor=9.0)
    check_op("integral", laid.pred, bin_dim=laid.dim, scale=17.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "cropped"])
def test_head_values(dtype, layout):
    for options in ({}, {"beta": 1.5, "iou": "ciou"}):
        s = scene(classes=16, sizes=((24, 20), (12, 10), (5, 3)), dtype=dtype, **options)
        if layout != "nchw":
            s.cls, s.box = ([LAYOUTS[layout](t) for t in level] for level in (s.cls, s.box))
        s = s.to(lambda t: moved(t, "cuda"))
        check(s)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"beta": 2.0}, {"varifocal": True}, {"varifocal": True, "gamma": 1.5}], ids=str
)
def test_task_aligned_values(dtype, options):
    task = aligned(classes=16, dtype=dtype)
    for channel_dim in (-1, 1):
        cls, box = (t if channel_dim < 0 else t.transpose(1, 2).contiguous() for t in task[:2])
        s, function = one_level(cls, box, *task[2:], channel_dim=channel_dim, **options)
        check(s.to(lambda t: t.cuda()), function=function)


@pytest.mark.parametrize("iou", ["iou", "giou", "diou", "ciou"])
def test_head_gradcheck(iou):
    """The quality targets and the weights, which follow from logits, are constants: the boxes'
    terms are checked in the box logits, the classification in the class logits."""
    s = scene(batch=1, classes=2, sizes=((2, 2), (1, 2)), strides=(8, 16), reg_max=3,
              positives=0.6, dtype=torch.float64, iou=iou)  # fmt: skip
    s = s.to(lambda t: t.cuda())
    for leaf in (*s.cls, *s.box):
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *box: gfl_loss(s.cls, box, *s.others, **s.options)[1:3], s.box
    )
    assert torch.autograd.gradcheck(
        lambda *cls: gfl_loss(cls, s.box, *s.others, **s.options).loss_cls_levels, s.cls
    )


@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_varifocal_gradcheck(gamma):
    cls, *others = (
        tensor.cuda() for tensor in aligned(batch=1, anchors=4, classes=3, dtype=torch.float64)
    )
    assert torch.autograd.gradcheck(
        lambda cls: task_aligned_loss(cls, *others, varifocal=True, gamma=gamma).loss_cls,
        cls.requires_grad_(),
    )


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
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [part.clone() for part in step(*arguments)]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*arguments)
    for _ in range(3):
        graph.replay()
        for got, want in zip(captured, expected, strict=True):
            assert torch.equal(got, want)
    # New values at the same addresses.
    with torch.no_grad():
        arguments[0].neg_()
    graph.replay()
    again = [part.clone() for part in captured]
    for got, want in zip(again, step(*arguments), strict=True):
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


def test_runs_on_the_current_stream():
    """Work that a side stream has not reached yet is waited for there, not elsewhere."""
    x, _, target, _, count, _ = inputs()
    expected = quality_focal_loss(x * 2, target, avg_factor=count)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side), torch.no_grad():
        torch.cuda._sleep(100_000_000)
        doubled = x * 2
        loss = quality_focal_loss(doubled, target, avg_factor=count)
    side.synchronize()
    assert torch.equal(loss, expected.detach())


def test_tensors_elsewhere_are_refused():
    """Below the public functions, which name the argument: nothing reads an address of the host."""
    x, _, (label, score), *_ = inputs()
    for target in ((label.cpu(), score), (label, score.cpu())):
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.gfl_kernels.quality_forward(
                x.detach(), *target, None, None, 0, 0, 0.0, 2.0, 1.0, 1, False
            )
    torch.cuda.synchronize()


def test_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is no second CUDA device")
    expected = step(*inputs("cuda:0"))
    with torch.cuda.device(0):
        got = step(*inputs("cuda:1"))
    assert torch.cuda.current_device() == 0
    for a, b in zip(got, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        assert torch.equal(a.cpu(), b.cpu())


def test_bit_identical_repetition():
    arguments = inputs(dtype=torch.bfloat16)
    first = [part.clone() for part in step(*arguments)]
    for _ in range(10):
        for got, want in zip(step(*arguments), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.slow
def test_more_than_2_to_31_elements():
    rows, classes = 2**25 + 3, 66
    needed = 3 * rows * classes * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"it takes {needed >> 30} GiB of device memory")
    x = torch.full((rows, classes), -3.0, dtype=torch.bfloat16, device="cuda")
    x[-1, -1] = 2.0
    x.requires_grad_()
    label = torch.full((rows,), classes, device="cuda")
    label[-1] = classes - 1
    score = torch.full((rows,), 0.5, device="cuda")
    loss = quality_focal_loss(x, (label, score), reduction="none")
    loss.backward(torch.ones_like(loss))
    tail = x.detach()[-2:].clone().requires_grad_()
    with gfl_kernels.use_backend("reference"):
        expected = quality_focal_loss(tail, (label[-2:], score[-2:]), reduction="none")
        expected.sum().backward()
    torch.testing.assert_close(loss[-2:], expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(x.grad[-2:], tail.grad, rtol=1e-2, atol=1e-3)
    assert torch.equal(x.grad[0], x.grad[rows // 2])
