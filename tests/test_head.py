"""gfl_loss and task_aligned_loss: values and gradients, layouts, normalisers, ops, compile, DDP.

mmdetection's own head is next to gfl_loss in test_mmdet_parity.py. Here the truth is the reference
in float64, as for the other losses, and for the task-aligned mode PyTorch's and torchvision's.
"""

import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from support import (
    HALF,
    INTERPRETED,
    assert_no_worse,
    logits,
    on_cpu,
    random_upstream,
    run_python,
    to_double,
)
from torch.utils._python_dispatch import TorchDispatchMode

import gfl_kernels
from gfl_kernels import dispatch, gfl_loss, ops, reference, task_aligned_loss

# A call of an interpreted head takes a second or more.
pytestmark = pytest.mark.interpreted_part(
    "test_against_float64[triton-giou-dtype0",
    "test_against_float64[triton-ciou-dtype1",
    "test_half_logits",
    "test_sizes[triton-1-1]",
    "test_sizes[triton-32-81]",
    "test_levels",
    "test_positives",
    "test_beta[triton-0.5]",
    "test_layouts[triton-dtype0-channels_last",
    "test_layouts[triton-dtype0-cropped",
    "test_layouts[triton-dtype0-one_image",
    "test_random_calls[triton-0",
    "test_random_calls[triton-6",
    "test_label_dtypes",
    "test_negatives_are_not_read",
    "test_a_nan_stays_in_its_anchor",
    "test_boxes_and_iou",
    "test_box_loss_at_ties",
    "test_gradient_forms",
    "test_double_backward",
    "test_avg_factor[triton-2.5",
    "test_empty_batch",
    "test_no_host_reads[triton-None",
    "test_compile",
    "test_opcheck",
    "test_ops_check_what_memory_safety_needs",
    "test_task_aligned[triton-rows-0.2",
    "test_task_aligned[triton-joint-0.0",
    "test_task_aligned_against_float64[triton-{}-dtype1",
    "test_task_aligned_against_float64[triton-{'varifocal': True}-dtype0",
    "test_varifocal[triton-rows-0.2",
    "test_varifocal_extreme_logits[triton-2.0",
    "test_varifocal_gradcheck[triton-1.5",
    "test_opcheck_varifocal",
    "test_ops_refuse_forms",
    "test_module_is_the_function",
)

SIZES = ((9, 7), (5, 4), (3, 2))
STRIDES = (8, 16, 32)
KINDS = ("iou", "giou", "diou", "ciou")


not_interpreted = pytest.mark.skipif(
    INTERPRETED, reason="interpreted: schemas and fake kernels are the same for every backend"
)


@dataclasses.dataclass
class Scene:
    """A call of gfl_loss: its five lists and its options."""

    cls: list
    box: list
    others: tuple
    options: dict

    def to(self, convert):
        lists = [[convert(t) for t in tensors] for tensors in (self.cls, self.box, *self.others)]
        options = {
            key: [convert(t) for t in value] if key == "label_weights" else value
            for key, value in self.options.items()
        }
        return Scene(lists[0], lists[1], tuple(lists[2:]), options)


@on_cpu
def scene(
    batch=2,
    classes=5,
    sizes=SIZES,
    strides=STRIDES,
    reg_max=16,
    positives=0.2,
    dtype=torch.float32,
    box_dtype=None,
    seed=0,
    spread=2.0,
    **options,
):
    """Anchors on a grid, boxes about them; positives: their share in each level, or shares."""
    random = torch.Generator().manual_seed(seed)
    box_dtype = box_dtype or dtype
    other = torch.float64 if dtype == torch.float64 else torch.float32
    if not isinstance(positives, tuple):
        positives = (positives,) * len(sizes)
    cls, box, points, labels, targets, weights = [], [], [], [], [], []
    for level, ((h, w), stride, share) in enumerate(zip(sizes, strides, positives, strict=True)):
        shape = batch, h * w
        kwargs = {"seed": seed * 10 + level, "extremes": False, "spread": spread}
        cls.append(logits(batch, classes, h, w, dtype=dtype, **kwargs))
        box.append(logits(batch, 4 * (reg_max + 1), h, w, dtype=box_dtype, **kwargs))
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        point = (torch.stack([x, y], -1).view(-1, 2) + 0.5) * stride
        points.append(point.to(other))
        label = torch.randint(classes, shape, generator=random)
        background = torch.tensor([classes, -1, 255])[torch.randint(3, shape, generator=random)]
        positive = torch.rand(shape, generator=random) < share
        labels.append(torch.where(positive, label, background))
        # Some sides beyond reg_max, some on the wrong side of the point, one in ten an integer.
        sides = torch.rand((*shape, 4), generator=random) * (reg_max + 2) - 1
        sides = torch.where(torch.rand(sides.shape, generator=random) < 0.1, sides.round(), sides)
        sides = sides * stride
        target = torch.cat([point - sides[..., :2], point + sides[..., 2:]], dim=-1)
        targets.append(target.to(other))
        weight = torch.rand(shape, generator=random) * 2
        weights.append(torch.where(weight < 0.4, 0.0, weight).to(other))
    options = {"strides": strides, "reg_max": reg_max, "label_weights": weights, **options}
    return Scene(cls, box, (points, labels, targets), options)


def evaluate(call, leaves, upstreams):
    """The six losses and the leaves' gradients, for the upstream gradients of all six."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = call(leaves)
    losses = out[:6]
    if upstreams is None:
        upstreams = [random_upstream(loss.detach(), i) for i, loss in enumerate(losses)]
    upstreams = [u.to(loss.dtype) for u, loss in zip(upstreams, losses, strict=True)]
    grads = torch.autograd.grad(losses, leaves, upstreams)
    return [loss.detach() for loss in losses], grads, upstreams


def check(s, upstreams=None, what="", function=gfl_loss):
    """Losses and gradients of a scene: no worse than the reference in the same dtype."""

    def call_of(scene):
        count = len(scene.cls)
        return lambda leaves: function(
            leaves[:count], leaves[count:], *scene.others, **scene.options
        )

    leaves = [*s.cls, *s.box]
    got, got_grads, upstreams = evaluate(call_of(s), leaves, upstreams)
    with gfl_kernels.use_backend("reference"):
        wide = s.to(to_double)
        truth, truth_grads, _ = evaluate(call_of(wide), [*wide.cls, *wide.box], upstreams)
        eager, eager_grads, _ = evaluate(call_of(s), leaves, upstreams)
    for name, *values in zip(ops_names(), got, truth, eager, strict=True):
        assert_no_worse(*values, what=f"{what} {name}")
    for i, (leaf, *grads) in enumerate(
        zip(leaves, got_grads, truth_grads, eager_grads, strict=True)
    ):
        assert grads[0].dtype == leaf.dtype
        if dispatch._forced != "reference":
            assert grads[0].stride() == torch.empty_like(leaf).stride()
        assert_no_worse(*grads, what=f"{what} gradient of logits {i}")
    return got, got_grads


def ops_names():
    return gfl_kernels.GFLLossOutput._fields[:6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iou", KINDS)
def test_against_float64(backend, iou, dtype):
    for seed in range(1 if INTERPRETED else 3):
        check(scene(iou=iou, dtype=dtype, seed=seed))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("box_dtype", [torch.float32, None])
def test_half_logits(backend, dtype, box_dtype):
    """mmdetection's head under autocast leaves half class logits and float32 box logits."""
    check(scene(dtype=dtype, box_dtype=box_dtype))


@pytest.mark.parametrize("classes", [1, 3, 80, 81])
@pytest.mark.parametrize("reg_max", [1, 7, 16, 32])
def test_sizes(backend, classes, reg_max):
    check(scene(classes=classes, reg_max=reg_max))


@pytest.mark.parametrize("sizes", [((1, 1),), ((40, 33),), ((1, 5), (5, 1)), ((0, 4), (2, 2))])
def test_levels(backend, sizes):
    check(scene(sizes=sizes, strides=(4, 12.5)[: len(sizes)]))


@pytest.mark.parametrize("share", [0.0, 1.0, (0.0, 0.5, 0.0), (0.5, 0.0, 0.0)])
def test_positives(backend, share):
    losses, grads = check(scene(positives=share))
    if share == 0.0:
        assert float(losses[1]) == float(losses[2]) == 0.0
        assert all(float(grad.abs().max()) == 0.0 for grad in grads[3:])


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 3.0])
def test_beta(backend, beta):
    check(scene(beta=beta, loss_weights=(0.7, 1.3, 0.5)))


def test_extreme_logits(backend):
    s = scene(seed=3)
    s.cls = [logits(*level.shape, seed=i) for i, level in enumerate(s.cls)]
    s.box = [logits(*level.shape, seed=9 + i) for i, level in enumerate(s.box)]
    check(s)


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "flat": lambda t: t.flatten(2),
    "channel_slice": lambda t: torch.cat([t + float("nan"), t], dim=1)[:, t.shape[1] :],
    "cropped": lambda t: F.pad(t, (2, 3, 1, 0), value=float("nan"))[..., 1:, 2:-3],
    "flipped_cells": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "one_image_expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(backend, layout, dtype):
    """Read where they lie; the memory around a view is NaN."""
    s = scene(dtype=dtype)
    s.cls, s.box = ([LAYOUTS[layout](t) for t in level] for level in (s.cls, s.box))
    points, labels, targets = s.others
    # And the targets as views of one tensor for all levels, as mmdetection leaves them.
    split = [t.shape[1] for t in labels]
    labels, targets = (torch.cat(t, dim=1).split(split, dim=1) for t in (labels, targets))
    s.others = points, labels, targets
    if layout == "one_image_expanded":  # not a layout a gradient can have
        leaves = [t[:1].clone().requires_grad_() for t in (*s.cls, *s.box)]
        views = [leaf.expand(2, *leaf.shape[1:]) for leaf in leaves]
        got = gfl_loss(views[:3], views[3:], *s.others, **s.options)
        whole = [t.contiguous() for t in (*s.cls, *s.box)]
        expected = gfl_loss(whole[:3], whole[3:], *s.others, **s.options)
        torch.testing.assert_close(got[:3], expected[:3], rtol=1e-6, atol=0)
        return
    check(s)


@pytest.mark.parametrize("seed", range(12))
def test_random_calls(backend, seed):
    random = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=random, device="cpu"))]

    count = pick(1, 2, 5)
    s = scene(
        batch=pick(1, 2, 3),
        classes=pick(1, 2, 4, 20, 33),
        sizes=tuple((pick(1, 2, 5, 17), pick(1, 3, 8, 40)) for _ in range(count)),
        strides=tuple(pick(4, 8, 10, 16.5) for _ in range(count)),
        reg_max=pick(1, 3, 8, 16, 40),
        positives=tuple(pick(0.0, 0.05, 0.5, 1.0) for _ in range(count)),
        dtype=pick(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        seed=seed,
        iou=pick(*KINDS),
        beta=pick(2.0, 2.0, 1.0),
    )
    lay_out = pick(lambda t: t, *LAYOUTS.values())
    if lay_out is not LAYOUTS["one_image_expanded"]:
        s.cls, s.box = ([lay_out(t) for t in level] for level in (s.cls, s.box))
    if pick(True, False):
        del s.options["label_weights"]
    check(s)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.float32])
def test_label_dtypes(backend, dtype):
    s = scene()
    points, labels, targets = s.others
    expected = gfl_loss(s.cls, s.box, *s.others, **s.options)
    got = gfl_loss(s.cls, s.box, points, [t.to(dtype) for t in labels], targets, **s.options)
    assert all(torch.equal(a, b) for a, b in zip(got[:6], expected[:6], strict=True))


def test_negatives_are_not_read(backend):
    s = scene()
    expected, expected_grads = check(s)
    for level, label in enumerate(s.others[1]):
        negative = ~((label >= 0) & (label < 5))
        b, h, w = s.box[level].shape[0], *s.box[level].shape[2:]
        s.box[level] = s.box[level].masked_fill(negative.view(b, 1, h, w), float("nan"))
        s.others[2][level][negative] = float("nan")
    leaves = [*s.cls, *s.box]
    upstreams = [random_upstream(loss, i) for i, loss in enumerate(expected)]
    got, grads, _ = evaluate(
        lambda leaves: gfl_loss(leaves[:3], leaves[3:], *s.others, **s.options), leaves, upstreams
    )
    for a, b in zip((*got, *grads), (*expected, *expected_grads), strict=True):
        assert torch.equal(a, b)


def test_a_nan_stays_in_its_anchor(backend):
    s = scene(return_boxes=True)
    label = s.others[1][0]
    image, cell = ((label >= 0) & (label < 5)).nonzero()[0].tolist()
    width = s.box[0].shape[3]
    whole = gfl_loss(s.cls, s.box, *s.others, **s.options)
    s.box[0] = s.box[0].clone()
    s.box[0][image, 3, cell // width, cell % width] = float("nan")
    got = gfl_loss(s.cls, s.box, *s.others, **s.options)
    assert bool(got.loss_bbox.isnan()) and bool(got.loss_dfl.isnan())
    assert got.iou.isnan().nonzero().tolist() == [[image, cell]]
    mask = ~got.iou.isnan()
    assert torch.equal(got.iou[mask], whole.iou[mask])
    assert torch.equal(got.loss_bbox_levels[1:], whole.loss_bbox_levels[1:])


def test_boxes_and_iou(backend):
    s = scene(dtype=torch.float64)
    assert gfl_loss(s.cls, s.box, *s.others, **s.options)[6:] == (None, None)
    out = gfl_loss(s.cls, s.box, *s.others, **s.options, return_boxes=True)
    points, labels, targets = (torch.cat(t, dim=-2 if i != 1 else 1) for i, t in
                               enumerate(s.others))  # fmt: skip
    rows = torch.cat([t.flatten(2).transpose(1, 2) for t in s.box], dim=1)
    stride = torch.cat([torch.full((h * w, 1), float(s)) for (h, w), s in
                        zip(SIZES, STRIDES, strict=True)])  # fmt: skip
    sides = gfl_kernels.integral(rows.unflatten(-1, (4, 17))) * stride
    boxes = torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1)
    positive = (labels >= 0) & (labels < 5)
    torch.testing.assert_close(out.boxes, torch.where(positive.unsqueeze(-1), boxes, 0))
    torchvision = pytest.importorskip("torchvision", reason="the oracle of the IoU")
    for image in range(2):
        iou = torchvision.ops.box_iou(boxes[image], targets[image]).diagonal()
        expected = torch.where(positive[image], iou, 0)
        torch.testing.assert_close(out.iou[image], expected, rtol=1e-4, atol=1e-9)
    assert not out.boxes.requires_grad and not out.iou.requires_grad


@pytest.mark.parametrize("iou", KINDS)
def test_box_loss_at_ties(backend, iou):
    """Perfect boxes, boxes that share sides, boxes apart: eager's derivatives, and no NaN."""
    s = scene(iou=iou, dtype=torch.float64, spread=0.0,
              reg_max=15)  # fmt: skip
    # Equal logits of 16 bins decode to 7.5 strides exactly.
    for point, label, target, stride in zip(*s.others, STRIDES, strict=True):
        label[:] = 1
        far = torch.tensor([-7.5, -7.5, 7.5, 7.5], dtype=torch.float64)
        shift = torch.tensor([0.0, 1.0, -3.0, 16.5, 40.0], dtype=torch.float64)
        for cell in range(label.shape[1]):
            target[:, cell] = (far + shift[torch.arange(4) * cell % 5] * (cell % 4)) * stride
            target[:, cell] += point[cell].repeat(2)
    check(s)


@pytest.mark.parametrize("iou", KINDS)
def test_gradcheck(backend, iou):
    s = scene(batch=1, classes=2, sizes=((2, 2), (1, 2)), strides=(8, 16), reg_max=3,
              positives=0.6, dtype=torch.float64, iou=iou)  # fmt: skip
    # The weights and the IoU are constants of the derivative: only its own terms are checked, so
    # class logits, on which weights depend, are checked in the classification alone.
    boxes = [t.requires_grad_() for t in s.box]
    assert torch.autograd.gradcheck(
        lambda *box: gfl_loss(s.cls, box, *s.others, **s.options)[1:3], boxes
    )
    quality = gfl_loss(s.cls, s.box, *s.others, **s.options, return_boxes=True).iou
    cls = [t.requires_grad_() for t in s.cls]
    assert torch.autograd.gradcheck(
        lambda *cls: gfl_loss(cls, s.box, *s.others, **s.options).loss_cls_levels, cls
    )
    assert float(quality.max()) > 0


def test_gradient_forms(fused):
    """What forward saved, what backward computes, and a second backward are the same."""
    s = scene()
    leaves = [t.requires_grad_() for t in (*s.cls, *s.box)]

    def losses():
        return gfl_loss(leaves[:3], leaves[3:], *s.others, **s.options)

    out = losses()
    total = sum(out[:3])
    saved = torch.autograd.grad(total, leaves, retain_graph=True)
    for grad in saved:
        grad.clone().fill_(7.0)
    again = torch.autograd.grad(total, leaves)
    by_levels = torch.autograd.grad(sum(levels.sum() for levels in losses()[3:6]), leaves)
    mixed = losses()
    mixed = torch.autograd.grad(mixed[0] + mixed[4].sum() + mixed[2], leaves)
    scaled = torch.autograd.grad(sum(losses()[:3]) * 2, leaves)
    for a, b, c, d, e in zip(saved, again, by_levels, mixed, scaled, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(a, d)
        torch.testing.assert_close(a * 2, e, rtol=1e-6, atol=0)


def test_one_loss_alone(backend):
    """A loss that is left out contributes exact zeros, and every gradient is there."""
    s = scene()
    leaves = [t.requires_grad_() for t in (*s.cls, *s.box)]
    for term in range(3):
        out = gfl_loss(leaves[:3], leaves[3:], *s.others, **s.options)
        grads = torch.autograd.grad(out[term], leaves, allow_unused=not backend.fused)
        zero, other = (grads[3:], grads[:3]) if term == 0 else (grads[:3], grads[3:])
        assert all(g is None or float(g.abs().max()) == 0.0 for g in zero)
        assert all(float(g.abs().max()) > 0.0 for g in other)


def test_frozen_branches(backend):
    s = scene()
    for frozen in (s.cls, s.box):
        free = s.box if frozen is s.cls else s.cls
        leaves = [t.detach().requires_grad_() for t in free]
        cls, box = (s.cls, leaves) if frozen is s.cls else (leaves, s.box)
        sum(gfl_loss(cls, box, *s.others, **s.options)[:3]).backward()
        assert all(float(leaf.grad.abs().max()) > 0.0 for leaf in leaves)


def test_double_backward(backend):
    s = scene(dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*s.cls, *s.box)]
    out = gfl_loss(leaves[:3], leaves[3:], *s.others, **s.options)
    grads = torch.autograd.grad(sum(out[:3]), leaves, create_graph=True)
    total = sum(grad.square().sum() for grad in grads)
    if not backend.fused:
        assert all(g is not None for g in torch.autograd.grad(total, leaves))
    else:
        with pytest.raises(RuntimeError, match="head_backward is not differentiable"):
            torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("avg_factor", [3, 2.5, torch.tensor(2.5), torch.tensor([7])], ids=repr)
def test_avg_factor(backend, avg_factor):
    if isinstance(avg_factor, torch.Tensor):
        avg_factor = avg_factor.to(backend.device)
    s = scene()
    base = gfl_loss(s.cls, s.box, *s.others, **s.options)
    got = gfl_loss(s.cls, s.box, *s.others, **s.options, avg_factor=avg_factor)
    positives = sum(
        max(1, sum(int(((t[image] >= 0) & (t[image] < 5)).sum()) for t in s.others[1]))
        for image in range(2)
    )
    torch.testing.assert_close(got[0] * float(avg_factor) / positives, base[0])
    assert torch.equal(got[1], base[1]) and torch.equal(got[2], base[2])


def test_empty_batch(backend):
    s = scene(batch=0)
    leaves = [t.requires_grad_() for t in (*s.cls, *s.box)]
    out = gfl_loss(leaves[:3], leaves[3:], *s.others, **s.options, return_boxes=True)
    assert [float(loss.detach()) for loss in out[:3]] == [0.0] * 3
    assert out.boxes.shape == (0, 89, 4) and out.iou.shape == (0, 89)
    sum(out[:3]).backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


def test_same_bits_for_any_number_of_threads(fused):
    s = scene(batch=3, sizes=((70, 61), (35, 31), (9, 9)), positives=0.1)
    leaves = [t.requires_grad_() for t in (*s.cls, *s.box)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            out = gfl_loss(leaves[:3], leaves[3:], *s.others, **s.options)
            results.append((*out[:6], *torch.autograd.grad(sum(out[:3]), leaves)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_concurrent_calls(fused):
    s = scene()
    expected = gfl_loss(s.cls, s.box, *s.others, **s.options)
    wrong = []

    def work():
        for _ in range(20):
            got = gfl_loss(s.cls, s.box, *s.others, **s.options)
            wrong.extend(i for i in range(6) if not torch.equal(got[i], expected[i]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- the host, the compiler, the ops


class NoHostReads(TorchDispatchMode):
    """Fails where a value or a shape depends on what a tensor holds."""

    READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "unique"}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.READS, f"{function} is a stop for the host"
        # Indexing by a mask is a nonzero underneath.
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("avg_factor", [None, 3.0, torch.tensor(3.0)], ids=repr)
def test_no_host_reads(backend, avg_factor):
    s = scene()
    leaves = [t.requires_grad_() for t in (*s.cls, *s.box)]
    with NoHostReads():
        out = gfl_loss(leaves[:3], leaves[3:], *s.others, **s.options, avg_factor=avg_factor,
                       return_boxes=True)  # fmt: skip
        sum(out[:3]).backward()
        task = aligned()
        task_aligned_loss(*task)
    with pytest.raises(AssertionError, match="is a stop for the host"), NoHostReads():
        torch.ones(()).item()


def test_compile(fused):
    """One graph, also for other sizes of the levels and another avg_factor."""
    torch._dynamo.reset()

    def step(cls, box, points, labels, targets, weights, avg_factor):
        options = {"label_weights": weights, "strides": STRIDES[:2], "avg_factor": avg_factor}
        out = gfl_loss(cls, box, points, labels, targets, **options, return_boxes=True)
        return sum(out[:3]), out.loss_bbox_levels, out.iou

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    # The compiler takes equal sizes for the same one: these are all different.
    first, second = ((9, 7), (6, 8)), ((10, 12), (13, 14))
    for sizes, avg_factor in ((first, 3.0), (second, 4.5)):
        s, results = scene(sizes=sizes, strides=STRIDES[:2]), []
        with torch._dynamo.config.patch(error_on_recompile=sizes is second):
            for function in (step, compiled):
                leaves = [t.detach().requires_grad_() for t in (*s.cls, *s.box)]
                lists = (leaves[:2], leaves[2:], *s.others, s.options["label_weights"])
                out = function(*lists, avg_factor)
                out[0].backward()
                results.append((*out, *(leaf.grad for leaf in leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_export_leaves_plain_operations(native):
    s = scene()

    class Model(torch.nn.Module):
        def forward(self, cls, box, points, labels, targets):
            return gfl_loss(cls, box, points, labels, targets, strides=STRIDES)[:3]

    program = torch.export.export(Model(), (s.cls, s.box, *s.others))
    assert "gfl_kernels" not in str(program.graph)
    got = program.module()(s.cls, s.box, *s.others)
    torch.testing.assert_close(got, gfl_loss(s.cls, s.box, *s.others, strides=STRIDES)[:3])


def test_function_transforms_take_the_reference(native):
    s = scene(dtype=torch.float64)
    leaves = tuple((*s.cls, *s.box))

    def total(*leaves):
        return sum(gfl_loss(leaves[:3], leaves[3:], *s.others, **s.options)[:3])

    got = torch.func.grad(total, argnums=tuple(range(6)))(*leaves)
    wanted = [t.detach().requires_grad_() for t in leaves]
    for a, b in zip(got, torch.autograd.grad(total(*wanted), wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_changes_nothing(backend):
    s = scene(dtype=torch.bfloat16, box_dtype=torch.float32)
    expected = gfl_loss(s.cls, s.box, *s.others, **s.options)
    with torch.autocast(backend.device, torch.bfloat16):
        got = gfl_loss(s.cls, s.box, *s.others, **s.options)
    for a, b in zip(got[:6], expected[:6], strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def head_arguments(s):
    """Arguments of the op head_forward, out of a scene."""
    levels = [t.movedim(1, -1) for t in s.cls], [t.movedim(1, -1) for t in s.box]
    lists = (*levels, *s.others, [], s.options["label_weights"])
    box = ([float(x) for x in s.options["strides"]], ops.IOUS["ciou"], 1e-6, 15.9)
    quality, weight, sums, normalisers, _ = torch.ops.gfl_kernels.head_boxes(*lists, *box, False)
    return lists, box, (quality, weight, sums, normalisers)


@not_interpreted
def test_opcheck(fused):
    s = scene(batch=2, classes=3, sizes=((3, 2), (2, 2)), strides=(8, 16))
    lists, box, assessed = head_arguments(s)
    namespace = torch.ops.gfl_kernels
    for write in (False, True):
        torch.library.opcheck(namespace.head_boxes.default, (*lists, *box, write))
    cls, others = lists[:2], lists[2:]
    leaves = [[t.detach().requires_grad_() for t in level] for level in cls]
    cls_loss = (reference.LOGITS, 0.0, 2.0)
    rest = (*assessed, *box, *cls_loss, [1.0, 2.0, 0.25])
    torch.library.opcheck(namespace.head_forward.default, (*leaves, *others, *rest, False))
    with torch.no_grad():
        torch.library.opcheck(namespace.head_forward.default, (*lists, *rest, True))
    upstream = [torch.tensor(1.5), None, torch.tensor(-0.5), None, torch.ones(1).expand(2), None]
    torch.library.opcheck(namespace.head_backward.default, (*upstream, *lists, *rest))


@not_interpreted
def test_opcheck_varifocal(fused):
    cls, box, points, scores, targets, mask = aligned(anchors=5, classes=3)
    lists = ([cls], [box], [points], [mask], [targets], [scores], [])
    constants = ([1.0], ops.IOUS["ciou_all"], 1e-7, 14.99)
    namespace = torch.ops.gfl_kernels
    *assessed, _ = namespace.head_boxes(*lists, *constants, False)
    rest = (*assessed, *constants, reference.VARIFOCAL, 0.75, 1.5, [1.0, 2.0, 0.25])
    leaves = [[t.detach().requires_grad_()] for t in (cls, box)]
    torch.library.opcheck(namespace.head_forward.default, (*leaves, *lists[2:], *rest, False))
    with torch.no_grad():
        torch.library.opcheck(namespace.head_forward.default, (*lists, *rest, True))
    upstream = [torch.tensor(1.5), None, None, None, None, torch.ones(1)]
    torch.library.opcheck(namespace.head_backward.default, (*upstream, *lists, *rest))


def test_ops_check_what_memory_safety_needs(fused):
    lists, box, _ = head_arguments(scene())
    for i in range(5):
        for wrong in (
            lists[i][:-1],
            [t[:, :1] for t in lists[i]],
            [t[:1] for t in lists[i]],
            [t.unsqueeze(0) for t in lists[i]],
            [t.to(torch.complex64) for t in lists[i]],
        ):
            changed = [*lists]
            changed[i] = wrong
            with pytest.raises((ValueError, RuntimeError)):
                torch.ops.gfl_kernels.head_boxes(*changed, *box, False)


def test_ops_refuse_forms_that_a_head_has_not(fused):
    lists, box, assessed = head_arguments(scene())
    for form in (
        reference.PROBABILITIES,
        reference.VARIFOCAL,
        7,
        -1,
    ):  # Varifocal Loss needs targets
        arguments = (*lists, *assessed, *box, form, 0.75, 2.0, [1.0, 2.0, 0.25], False)
        with pytest.raises((ValueError, RuntimeError), match="form"):
            torch.ops.gfl_kernels.head_forward(*arguments)


@pytest.mark.parametrize("iou", [-1, 5])
def test_compiled_ops_refuse_an_iou_that_there_is_not(native, iou):
    lists, (strides, _, *rest), assessed = head_arguments(scene())
    box = (strides, iou, *rest)
    with pytest.raises((ValueError, RuntimeError), match="no such iou"):
        torch.ops.gfl_native.head_boxes(*lists, *box, False)
    with pytest.raises((ValueError, RuntimeError), match="no such iou"):
        arguments = (*lists, *assessed, *box, reference.LOGITS, 0.75, 2.0, [1.0, 2.0, 0.25], False)
        torch.ops.gfl_native.head_forward(*arguments)


# ---- processes

WORKER = """
import sys, torch, torch.distributed as dist
import torch.multiprocessing as mp
sys.path.insert(0, ".")
import gfl_kernels
from test_head import scene

def shares(rank):
    # The second process has no positives in the second run.
    return [(0.3, 0.2, 0.1), (0.0, 0.0, 0.0) if rank else (0.3, 0.2, 0.1)]

class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.cls = torch.nn.Parameter(torch.randn(5, 5, generator=generator).double())
        self.box = torch.nn.Parameter(torch.randn(68, 68, generator=generator).double() / 8)
    def forward(self, cls, box):
        cls = [torch.einsum("oc,bchw->bohw", self.cls, x) for x in cls]
        return cls, [torch.einsum("oc,bchw->bohw", self.box, x) for x in box]

def batch(rank, run):
    return scene(seed=rank + 1, dtype=torch.float64, positives=shares(rank)[run])

def loss(model, s):
    cls, box = model(s.cls, s.box)
    return gfl_kernels.gfl_loss(cls, box, *s.others, **s.options)

def work(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for run in range(2):
        model = torch.nn.parallel.DistributedDataParallel(Head())
        out = loss(model, batch(rank, run))
        sum(out[:3]).backward()
        results[rank, run] = [x.item() for x in out[:3]] + [
            p.grad.flatten().tolist() for p in model.parameters()]
        if run == 0:  # a group of one is not averaged
            groups = [dist.new_group([0]), dist.new_group([1])]
            s = batch(rank, run)
            alone = gfl_kernels.gfl_loss(s.cls, s.box, *s.others, **s.options,
                                         process_group=groups[rank])
            results["alone", rank] = [x.item() for x in alone[:3]]
    dist.destroy_process_group()

if __name__ == "__main__":
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(work, (port, results), nprocs=2, start_method="fork")
        for run in range(2):
            model = Head()
            parts = [batch(rank, run) for rank in range(2)]
            joint = lambda lists: [torch.cat(pair) for pair in zip(*lists)]
            s = parts[0]
            s.cls, s.box = joint([p.cls for p in parts]), joint([p.box for p in parts])
            points, labels, targets = zip(*(p.others for p in parts))
            s.others = points[0], joint(labels), joint(targets)
            s.options["label_weights"] = joint([p.options["label_weights"] for p in parts])
            out = loss(model, s)
            sum(out[:3]).backward()
            for i in range(3):
                mean = (results[0, run][i] + results[1, run][i]) / 2
                # Each process adds mmdetection's eps(float32) to its share of the divisor.
                assert abs(mean - float(out[i].detach())) < 1e-7 * abs(mean), (run, i, mean)
            for rank in range(2):
                for i, parameter in enumerate(model.parameters()):
                    torch.testing.assert_close(torch.tensor(results[rank, run][3 + i]).double(),
                        parameter.grad.flatten(), rtol=1e-5, atol=1e-7)
        for rank in range(2):
            s = batch(rank, 0)
            out = gfl_kernels.gfl_loss(s.cls, s.box, *s.others,
                                       **s.options)
            assert results["alone", rank] == [x.item() for x in out[:3]]
    with open(sys.argv[0] + ".said", "w") as said:  # Gloo talks on standard output
        said.write("same")
"""


def test_two_processes_have_the_gradient_of_one(native, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = run_python([str(script)], GFL_KERNELS_BACKEND="cpu", timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "worker.py.said").read_text() == "same"


# ---- the task-aligned mode


@on_cpu
def aligned(batch=2, anchors=90, classes=5, bins=16, dtype=torch.float32, seed=0, foreground=0.2):
    random = torch.Generator().manual_seed(seed)
    cls = logits(batch, anchors, classes, dtype=dtype, seed=seed, extremes=False)
    box = logits(batch, anchors, 4 * bins, dtype=dtype, seed=seed + 1, extremes=False)
    points = torch.rand(anchors, 2, generator=random) * 20
    mask = torch.rand(batch, anchors, generator=random) < foreground
    sides = torch.rand(batch, anchors, 4, generator=random) * (bins + 1) - 0.5
    targets = torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1)
    scores = torch.rand(batch, anchors, classes, generator=random)
    scores = torch.where(torch.rand(scores.shape, generator=random) < 0.7, 0.0, scores)
    scores = torch.where(mask.unsqueeze(-1), scores, 0)
    other = torch.float64 if dtype == torch.float64 else torch.float32
    return cls, box, points.to(other), scores.to(other), targets.to(other), mask


def plain_varifocal(cls, scores, alpha, gamma):
    """YOLOv6's and PP-YOLOE's VarifocalLoss, element by element."""
    label = (scores > 0).to(scores.dtype)
    weight = alpha * cls.sigmoid().pow(gamma) * (1 - label) + scores * label
    return F.binary_cross_entropy_with_logits(cls, scores, reduction="none") * weight


def plain_aligned(
    cls, box, points, scores, targets, mask, loss_weights=(0.5, 7.5, 1.5), varifocal=None
):
    """The loss out of PyTorch's and torchvision's own: independent of the reference. varifocal:
    (alpha, gamma), or cross entropy."""
    torchvision = pytest.importorskip("torchvision", reason="the oracle of the box loss")
    bins = box.shape[-1] // 4
    total = scores.sum().clamp(min=1)
    if varifocal:
        loss_cls = plain_varifocal(cls, scores, *varifocal).sum() / total
    else:
        loss_cls = F.binary_cross_entropy_with_logits(cls, scores, reduction="none").sum() / total
    weight = scores.sum(-1)[mask]
    rows = box[mask].unflatten(-1, (4, bins))
    sides = rows.softmax(-1) @ torch.arange(bins, dtype=box.dtype)
    point = points.expand(len(cls), -1, -1)[mask]
    boxes = torch.cat([point - sides[:, :2], point + sides[:, 2:]], dim=-1)
    ciou = torchvision.ops.complete_box_iou_loss(boxes, targets[mask], eps=1e-7)
    loss_box = (ciou * weight).sum() / total
    goal = torch.cat([point - targets[mask][:, :2], targets[mask][:, 2:] - point], dim=-1)
    goal = goal.clamp(0, bins - 1.01)
    left = goal.long()

    def entropy(bin):
        return F.cross_entropy(rows.flatten(0, 1), bin.flatten(), reduction="none").view(-1, 4)

    dfl = entropy(left) * (left + 1 - goal) + entropy(left + 1) * (goal - left)
    loss_dfl = (dfl.mean(-1) * weight).sum() / total
    return [a * b for a, b in zip(loss_weights, (loss_cls, loss_box, loss_dfl), strict=True)]


@pytest.mark.parametrize("foreground", [0.2, 0.0, 1.0])
@pytest.mark.parametrize("layout", ["rows", "channels", "joint"])
def test_task_aligned(backend, layout, foreground):
    for seed in range(3):
        task = aligned(dtype=torch.float64, seed=seed, foreground=foreground)
        leaves = [t.requires_grad_() for t in task[:2]]
        expected = plain_aligned(*task)
        expected_grads = torch.autograd.grad(sum(expected), leaves)
        cls, box = leaves
        if layout == "channels":
            cls, box = (t.transpose(1, 2).contiguous() for t in leaves)
        if layout == "joint":  # the two as channels of one tensor, as YOLO heads leave them
            box, cls = torch.cat([box, cls], dim=-1).transpose(1, 2).split((64, 5), dim=1)
        dim = -1 if layout == "rows" else 1
        got = task_aligned_loss(cls, box, *task[2:], channel_dim=dim, return_boxes=True)
        # torchvision has eps in alpha's denominator.
        torch.testing.assert_close(list(got[:3]), expected, rtol=1e-6, atol=1e-12)
        grads = torch.autograd.grad(sum(got[:3]), leaves)
        for a, b in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)
        assert got.boxes.shape == (2, 90, 4) and got.loss_dfl_levels.shape == (1,)


def one_level(cls, box, *others, **options):
    """(scene, function) as check() takes them, of a call of task_aligned_loss."""

    def function(cls, box, *lists, **kwargs):
        return task_aligned_loss(cls[0], box[0], *(t for (t,) in lists), **kwargs)

    return Scene([cls], [box], tuple([t] for t in others), options), function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 2.0, "iou": "giou"},
        {"iou": "diou"},
        {"varifocal": True},
        {"varifocal": True, "alpha": 0.2, "gamma": 1.5},
        {"varifocal": True, "gamma": 0.0},
    ],
    ids=str,
)
def test_task_aligned_against_float64(backend, dtype, options):
    s, function = one_level(*aligned(dtype=dtype), **options)
    check(s, function=function)


@pytest.mark.parametrize("alpha, gamma", [(0.75, 2.0), (0.2, 1.5), (1.0, 0.5), (0.0, 2.0)])
@pytest.mark.parametrize("layout", ["rows", "channels"])
def test_varifocal(backend, layout, alpha, gamma):
    """Against YOLOv6's formula, through whose weight the gradient goes."""
    task = aligned(dtype=torch.float64, classes=40)
    leaves = [t.requires_grad_() for t in task[:2]]
    expected = plain_aligned(*task, varifocal=(alpha, gamma))
    expected_grads = torch.autograd.grad(sum(expected), leaves)
    dim = -1 if layout == "rows" else 1
    cls, box = (t if dim == -1 else t.transpose(1, 2).contiguous() for t in leaves)
    got = task_aligned_loss(
        cls, box, *task[2:], channel_dim=dim, varifocal=True, alpha=alpha, gamma=gamma
    )
    torch.testing.assert_close(list(got[:3]), expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=0)
    grads = torch.autograd.grad(sum(got[:3]), leaves)
    torch.testing.assert_close(grads[0], expected_grads[0], rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(grads[1], expected_grads[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("gamma", [2.0, 1.5, 0.5, 0.0])
def test_varifocal_extreme_logits(backend, gamma):
    cls, box, *others = aligned(classes=20)
    cls = logits(*cls.shape, seed=4)
    s, function = one_level(cls, box, *others, varifocal=True, gamma=gamma)
    check(s, function=function)
    cls[0, 0, 0], others[1][0, 0, 0] = -float("inf"), 0.0  # a perfect negative
    cls = cls.requires_grad_()
    loss = task_aligned_loss(cls, box, *others, varifocal=True, gamma=gamma).loss_cls
    (grad,) = torch.autograd.grad(loss, cls)
    assert bool(loss.isfinite()) and float(grad[0, 0, 0]) == 0.0


@pytest.mark.parametrize("gamma", [2.0, 1.5])
def test_varifocal_gradcheck(backend, gamma):
    cls, *others = aligned(batch=1, anchors=4, classes=3, dtype=torch.float64, foreground=0.6)
    assert 0 < int((others[2] > 0).sum()) < others[2].numel()
    assert torch.autograd.gradcheck(
        lambda cls: task_aligned_loss(cls, *others, varifocal=True, gamma=gamma).loss_cls,
        cls.requires_grad_(),
    )


def test_task_aligned_avg_factor(backend):
    task = aligned()
    weight = task[3].sum()
    base = task_aligned_loss(*task)
    for factor in (float(weight), weight):
        got = task_aligned_loss(*task, avg_factor=factor)
        torch.testing.assert_close(got[:3], base[:3])


# ---- arguments


def call(**changes):
    s = scene()
    names = ("cls_logits", "box_logits", "points", "labels", "box_targets")
    arguments = dict(zip(names, (s.cls, s.box, *s.others), strict=True)) | s.options
    arguments |= {
        name: change(arguments[name]) if callable(change) else change
        for name, change in changes.items()
    }
    return gfl_loss(**arguments)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"cls_logits": lambda x: x[0]}, TypeError, "cls_logits must be a list with an entry per"),
        ({"labels": lambda x: x[:2]}, ValueError, "labels must have an entry per level of cls_"),
        ({"strides": (8, 16)}, ValueError, "strides must have an entry per level .* 3, got 2"),
        ({"strides": ("a", 1, 2)}, TypeError, r"strides\[0\] must be a number, got str"),
        ({"cls_logits": []}, ValueError, "cls_logits must have an entry per level"),
        ({"reg_max": 7}, ValueError, r"box_logits\[0\] must have shape \(2, 32, 9, 7\), got"),
        ({"reg_max": 0}, ValueError, "reg_max must be an int >= 1, got 0"),
        ({"beta": -1}, ValueError, "beta must be >= 0"),
        (
            {"iou": "ciou_all"},
            ValueError,
            "iou must be one of iou, giou, diou, ciou, got .ciou_all",
        ),
        ({"loss_weights": (1, 2)}, ValueError, "loss_weights must be three numbers"),
        ({"avg_factor": torch.ones(2)}, ValueError, "avg_factor must be a number or a tensor of"),
        (
            {"points": lambda x: [t[:-1] for t in x]},
            ValueError,
            r"points\[0\] must have shape \(63, 2\), got \(62, 2\)",
        ),
        (
            {"box_logits": lambda x: [x[0], x[1].half(), x[2]]},
            TypeError,
            r"box_logits\[1\] must have the dtype of the first level, torch.float32, got",
        ),
        (
            {"box_logits": lambda x: [t.double() for t in x]},
            TypeError,
            "must both be float64 or neither",
        ),
        ({"cls_logits": lambda x: [t.long() for t in x]}, TypeError, "must have a floating dtype"),
        (
            {"label_weights": lambda x: [None, *x[1:]]},
            TypeError,
            r"label_weights\[0\] must be a Tensor, got NoneType",
        ),
        (
            {"labels": lambda x: [t.to("meta") for t in x]},
            ValueError,
            r"labels\[0\] must be on pred's device HERE, got meta",
        ),
    ],
    ids=lambda value: "" if isinstance(value, (type, str)) else "-".join(value),
)
def test_errors(backend, changes, error, message):
    message = message.replace("HERE", str(torch.empty(0).device))
    with pytest.raises(error, match=f"^gfl_loss: .*{message}"):
        call(**changes)


def test_task_aligned_errors(backend):
    task = aligned()
    for index, change, message in (
        (0, lambda t: t[:, :-1], "box_logits must have shape"),
        (1, lambda t: t[..., :-1], "4 K channels"),
        (2, lambda t: t[:-1], "points must have shape"),
        (3, lambda t: t[..., :-1], "target_scores must have shape"),
        (4, lambda t: t[..., :-1], "target_boxes must have shape"),
        (5, lambda t: t[:-1], "foreground must have shape"),
    ):
        changed = [change(t) if i == index else t for i, t in enumerate(task)]
        with pytest.raises(ValueError, match=f"^task_aligned_loss: .*{message}"):
            task_aligned_loss(*changed)
    for options, message in (
        ({"channel_dim": 2}, "channel_dim must be 1 or -1"),
        ({"varifocal": True, "alpha": -0.1}, "alpha must be >= 0, got -0.1"),
        ({"varifocal": True, "gamma": float("nan")}, "gamma must be >= 0, got nan"),
        ({"varifocal": True, "beta": 2.0}, "beta must be 0 with varifocal, got 2.0"),
    ):
        with pytest.raises(ValueError, match=f"^task_aligned_loss: {message}"):
            task_aligned_loss(*task, **options)


def test_debug_names_the_label(backend, monkeypatch):
    monkeypatch.setattr(dispatch, "DEBUG", True)
    s = scene()
    s.others[1][1][0, 3] = 77
    with pytest.raises(
        ValueError, match=r"gfl_loss: labels\[\d\] must be in \[-1, 5\]; row .* has"
    ):
        gfl_loss(s.cls, s.box, *s.others, **s.options)


def test_module_is_the_function(backend):
    s = scene()
    module = gfl_kernels.GFLLoss(strides=STRIDES, iou="ciou", loss_weights=(1.0, 1.5, 0.5))
    got = module(s.cls, s.box, *s.others, label_weights=s.options["label_weights"])
    options = {**s.options, "iou": "ciou", "loss_weights": (1.0, 1.5, 0.5)}
    expected = gfl_loss(s.cls, s.box, *s.others, **options)
    assert all(torch.equal(a, b) for a, b in zip(got[:6], expected[:6], strict=True))
    assert not list(module.state_dict())


def test_targets_that_require_grad_take_the_reference(native):
    s = scene()
    s.others[2][0].requires_grad_()
    out = gfl_loss(s.cls, s.box, *s.others, **s.options)
    assert out.loss_bbox.requires_grad
    with gfl_kernels.use_backend("cpu"), pytest.raises(RuntimeError, match="no derivative for"):
        gfl_loss(s.cls, s.box, *s.others, **s.options)
