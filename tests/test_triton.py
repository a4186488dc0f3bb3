"""The Triton kernels as compiled code: the PTX of a real compilation, run by ptxsim on the CPU.

The whole suite runs interpreted (`make test`, TRITON_INTERPRET=1). Here a part that stands for it
runs what a GPU would get, every argument far from the others, so that an access out of bounds is a
fault, as are warps that meet in shared memory with no barrier between them, and every approximate
instruction at the error its documentation allows.
"""

import pytest
import torch
from compiled_cases import (  # noqa: F401
    PYRAMID,
    test_decode,
    test_decode_moves_every_byte_once,
    test_decode_planes,
    test_distillation,
    test_distillation_moves_every_byte_once,
    test_distribution,
    test_distribution_bins,
    test_distribution_explicit_weights_and_layouts,
    test_family,
    test_head,
    test_head_task_aligned,
    test_head_varifocal_gamma,
    test_integral,
    test_integral_of_given_bins,
    test_moments,
    test_peak,
    test_quality_beta,
    test_quality_dense_with_weights,
    test_quality_float64,
    test_quality_layouts,
    test_quality_odd_classes,
    test_quality_probabilities,
    test_quality_probabilities_of_many_classes,
    test_quality_rows_that_begin_anywhere,
    test_quality_sparse,
    test_statistics,
    test_statistics_bins,
    test_summaries_in_other_dtypes,
    test_summaries_layouts,
    test_summaries_move_what_they_must,
)
from support import (
    INTERPRETED,
    bin_target,
    check_op,
    dense_target,
    logits,
    row_weight,
    sparse_target,
)
from test_head import LAYOUTS, scene

import gfl_kernels

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled")
triton = pytest.importorskip("triton", reason="Triton is not installed")
ptxsim = pytest.importorskip("ptxsim", reason="tests/ptxsim needs numpy")

QUALITY = gfl_kernels.quality_focal_loss
DISTRIBUTION = gfl_kernels.distribution_focal_loss


@pytest.fixture(params=["nearest", "worst"])
def compiled(request):
    """A simulated device; both readings of approximate instructions share what is compiled."""
    with simulated(approx=request.param) as device:
        yield device


@pytest.fixture
def compiled_once():
    with simulated(approx="worst") as device:
        yield device


class simulated:
    """Triton compiles for sm_90 and runs on CPU tensors, as the forced backend."""

    def __init__(self, arch=90, **options):
        options = {"isolate": True, "check_races": True, **options}
        self.device = ptxsim.triton_device(arch, **options)

    def __enter__(self):
        self.device.activate()
        self.backend = gfl_kernels.use_backend("triton")
        return self.device

    def __exit__(self, *exception):
        self.backend.__exit__(*exception)
        self.device.deactivate()


def test_launches_and_memory():
    """One launch forward, one backward; rows of weight 0 are not read, no logit is read twice but
    that of a label, and every other access is of 16 bytes."""
    with simulated() as device:
        x = logits(4096, 80, extremes=False).requires_grad_()
        label, score = sparse_target((4096,), 80)
        QUALITY(x, (label, score), avg_factor=torch.tensor(100.0)).backward()
        forward, backward = device.reports
        size = x.numel() * 4
        labels = 4 * ((label >= 0) & (label < 80)).sum().item()
        assert labels > 0
        for report in (forward, backward):
            pred = report.traffic("pred")
            assert pred.read_bytes == size + labels
            assert pred.wide_share(16) == size / (size + labels)
        assert backward.traffic("grad").written_bytes == size
        assert backward.traffic("grad").wide_share(16) == 1

        device.reports.clear()
        weight = torch.zeros(4096)
        weight[1000:1040] = 1
        z = logits(4096, 17, extremes=False).requires_grad_()
        DISTRIBUTION(z, bin_target((4096,), 17), weight=weight, avg_factor=40.0).backward()
        forward, backward = device.reports
        assert forward.traffic("pred").read_bytes == 40 * 17 * 4
        assert backward.traffic("grad").written_bytes == z.numel() * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_odd_rows_move_in_vectors_too(dtype):
    """Of the loss alone all but the ends of rows, and nothing from DRAM twice."""
    x = logits(1024, 365, extremes=False, dtype=dtype)
    label, score = sparse_target((1024,), 365)
    with simulated() as device:
        QUALITY(x, (label, score), reduction="sum")
    (report,) = device.reports
    assert report.traffic("pred").wide_share(16) > 0.9
    assert report.traffic("pred").read_unique <= x.nbytes + 32


def test_head_launches_and_memory():
    """Two launches forward and two backward for five levels, every logit read once a pass, of boxes
    those of positives alone, gradients written once."""
    s = scene(
        classes=80, sizes=((40, 48), (20, 24), (10, 12), (5, 6), (3, 3)), positives=0.02,
        strides=PYRAMID["strides"],
    )  # fmt: skip
    s.cls, s.box = ([LAYOUTS["channels_last"](t) for t in level] for level in (s.cls, s.box))
    del s.options["label_weights"]
    leaves = [t.requires_grad_() for t in (*s.cls, *s.box)]
    with simulated() as device:
        out = gfl_kernels.gfl_loss(leaves[:5], leaves[5:], *s.others, **s.options)
        assert len(device.reports) == 2
        sum(out[:3]).backward()
        boxes, forward, backward, box_grad = device.reports
    anchors = sum(t.numel() for t in s.others[1])
    positives = sum(int(((t >= 0) & (t < 80)).sum()) for t in s.others[1])
    assert 10 < positives < anchors / 20

    def moved(report, name):
        """Bytes read and written of a list of levels."""
        parts = [t for t in report.allocations if t.name.partition(".")[0] == name]
        return sum(t.read_bytes for t in parts), sum(t.written_bytes for t in parts)

    logits, bins = anchors * 80 * 4, 68 * 4
    assert moved(boxes, "box") == moved(box_grad, "box") == (positives * bins, 0)
    assert moved(boxes, "cls") == (positives * 80 * 4, 0)
    assert moved(backward, "grad") == (0, logits)
    assert moved(box_grad, "grad") == (0, anchors * bins)
    labels, value = 8 * anchors, 4 * anchors
    bins_read, target, point = 288, 32, 32  # in sectors of 32 bytes
    read = positives * (bins_read + 80 * 4 + target + point) + labels
    minimum = (
        (boxes, read + 2 * value),
        (forward, logits + labels + value),
        (backward, 2 * logits + labels + value),
        (box_grad, anchors * bins + labels + positives * (bins_read + target + point)),
    )
    for report, needed in minimum:
        dram = report.dram_bytes_read + report.dram_bytes_written
        assert dram <= 1.05 * needed, (report.kernel, dram, needed)


def test_a_head_has_the_same_bits_on_every_run():
    """Whatever order the warps of a program run in."""
    s = scene(classes=80, sizes=((20, 33), (9, 7), (5, 4)), positives=0.2)
    leaves = [t.requires_grad_() for t in (*s.cls, *s.box)]
    results = []
    for order in ("reverse", "forward", "reverse"):
        with simulated(order=order):
            out = gfl_kernels.gfl_loss(leaves[:3], leaves[3:], *s.others, **s.options)
            results.append((*out[:6], *torch.autograd.grad(sum(out[:3]), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_head_of_one_level():
    """Triton 3.6 failed on the count of positives an image, summed in a loop over one level."""
    s = scene(batch=2, classes=2, reg_max=3, sizes=((3, 4),), strides=(8,), positives=0.6)
    leaves = [t.requires_grad_() for t in (*s.cls, *s.box)]
    results = []
    for backend in (simulated(), gfl_kernels.use_backend("reference")):
        with backend:
            out = gfl_kernels.gfl_loss(leaves[:1], leaves[1:], *s.others, **s.options)
            results.append((*out[:6], *torch.autograd.grad(sum(out[:3]), leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_launches_that_repeat_one():
    """A call like one before goes past Triton's binding of arguments, with its own values and
    addresses; another alignment, layout, dtype or weight is another launch."""
    from gfl_kernels.triton import launch

    def rows(seed, **kwargs):
        x = logits(20, 16, seed=seed, **kwargs)
        return x, sparse_target((20,), 16, seed=seed), {"avg_factor": 2.0 + seed}

    x, target, options = rows(3)
    crooked = torch.empty(20 * 16 + 1)[1:].view(20, 16).copy_(x)
    weight = {"weight": row_weight((20,))}
    calls = [  # (call, how many launches it adds to those that were made)
        (rows(0), 2),
        (rows(1), 0),
        (rows(2), 0),
        ((crooked, target, options), 2),
        ((x.t().contiguous().t(), target, options), 2),
        (rows(0, dtype=torch.bfloat16), 2),
        (rows(4, dtype=torch.bfloat16), 0),
        ((x, target, {**options, **weight}), 2),
        ((x, target, {"reduction": "none"}), 2),
        ((x, target, {"reduction": "sum"}), 0),  # as the mean over an avg_factor that is a number
        ((x, target, {**options, "beta": 1.5}), 2),
        ((x, target, {**options, "beta": 1.25}), 0),
    ]
    with simulated():
        for (pred, target, kwargs), added in calls:
            before = len(launch._launched)
            check_op("quality", pred, target, what=f"{kwargs}", **kwargs)
            assert len(launch._launched) - before == added, kwargs


SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 160, 255, 256, 257, 500, 512, 1000]


def test_one_compilation_for_every_number_of_rows():
    """Triton compiles anew for an integer argument that is 1 or a multiple of 16, or beyond 2^31:
    none of ours."""
    from gfl_kernels.triton.distribution import distribution_kernel
    from gfl_kernels.triton.quality import quality_kernel

    def compiled_kernels(kernel):
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    with simulated():
        counts = []
        for n in SIZES:
            x = torch.zeros(n, 16, requires_grad=True)
            z = torch.zeros(n, 8, requires_grad=True)
            QUALITY(x, (torch.zeros(n, dtype=torch.int64), torch.zeros(n))).backward()
            DISTRIBUTION(z, torch.zeros(n)).backward()
            # Rows that are no whole vectors; a single one has no stride.
            y = torch.zeros(max(2, n), 81)
            QUALITY(y, (torch.zeros(len(y), dtype=torch.int64), torch.zeros(len(y))))
            counts.append((compiled_kernels(quality_kernel), compiled_kernels(distribution_kernel)))
    assert len(set(counts)) == 1, list(zip(SIZES, counts, strict=True))


def test_one_compilation_for_every_size_of_a_head():
    from gfl_kernels.triton import head

    kernels = (head.head_boxes_kernel, head.head_cls_kernel, head.head_box_grad_kernel)

    def compiled_kernels():
        return [sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels]

    with simulated():
        counts = []
        # Planes of a level are aligned to 16 bytes or not: each of these pyramids has both.
        for sizes in (((4, 5), (2, 3)), ((4, 4), (1, 1)), ((1, 2), (5, 16)), ((16, 16), (3, 3))):
            s = scene(batch=len(counts) + 1, classes=3, reg_max=3, sizes=sizes, strides=(8, 16))
            leaves = [t.requires_grad_() for t in (*s.cls, *s.box)]
            out = gfl_kernels.gfl_loss(leaves[:2], leaves[2:], *s.others, **s.options)
            sum(out[:3]).backward()
            counts.append(tuple(compiled_kernels()))
    assert len(set(counts)) == 1, counts


def test_the_last_programs_sum_survives_any_order():
    """Two losses one after the other in one workspace, more programs than the last one adds at
    once, and the counter back at 0."""
    from gfl_kernels.triton import launch

    with simulated():
        n = 64 * 1100
        x = torch.zeros(n, 1)
        label = torch.full((n,), -1)
        first = QUALITY(x, (label, torch.zeros(n)), reduction="sum")
        second = QUALITY(x, (label, torch.zeros(n)), reduction="sum")
    expected = n * 0.25 * torch.log(torch.tensor(2.0, dtype=torch.float64))
    assert first == second
    torch.testing.assert_close(first.double(), expected, rtol=1e-6, atol=0)
    for _, counter in launch._workspaces.values():
        assert counter.item() == 0


def recorded_launches(monkeypatch, call):
    """(kernel, arguments) of every launch that call would make: nothing is compiled, and results
    are whatever memory holds.
    """
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        launches.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", record)
    with simulated():
        call()
    monkeypatch.undo()
    return launches


TRITON_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


# A compilation takes five seconds and more: one architecture gets the first launch of each pair,
# the other the second: forward and backward of a loss, boxes and classes of a head, mean and peak.
@pytest.mark.parametrize("arch, first", [("gfx942", 0), ("gfx90a", 1)])
def test_compiles_for_amd(monkeypatch, arch, first):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def step():
        x = torch.zeros(64, 80, dtype=torch.bfloat16, requires_grad=True)
        z = torch.zeros(64, 17, requires_grad=True)
        QUALITY(x, sparse_target((64,), 80)).backward()
        DISTRIBUTION(z, torch.zeros(64)).backward()
        gfl_kernels.integral(z).sum().backward()
        s = scene(sizes=((4, 4), (2, 3)), strides=(8, 16), classes=80, dtype=torch.bfloat16)
        leaves = [t.requires_grad_() for t in (*s.cls, *s.box)]
        sum(gfl_kernels.gfl_loss(leaves[:2], leaves[2:], *s.others, **s.options)[:3]).backward()
        gfl_kernels.varifocal_loss(x, sparse_target((64,), 80)).backward()
        gfl_kernels.matchability_aware_loss(x, dense_target((64,), 80)).backward()
        y = torch.zeros(64, 8, requires_grad=True)  # of 17 bins statistics take 16 seconds
        gfl_kernels.distribution_statistics(y).sum().backward()
        gfl_kernels.integral(y, mode="peak").sum().backward()
        gfl_kernels.localization_distillation_loss(y, z.detach()[:, :8]).backward()
        points, cls = torch.zeros(64, 2), torch.zeros(64, 80)
        for mode in ("mean", "peak"):
            gfl_kernels.decode_boxes(points, cls[:, :68], strides=8, cls_logits=cls, mode=mode)

    launches = recorded_launches(monkeypatch, step)
    assert len(launches) == 22
    for kernel, arguments in launches[first::2]:
        signature, constants = {}, {}
        for parameter in kernel.params:
            value = arguments[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = TRITON_TYPES[value.dtype]
            elif isinstance(value, tuple):
                types = {int: "i64", float: "fp32"}
                signature[parameter.name] = tuple(
                    TRITON_TYPES[v.dtype] if isinstance(v, torch.Tensor) else types[type(v)]
                    for v in value
                )
            elif parameter.is_constexpr or value is None:
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = False if parameter.name == "FAST" else value
            else:
                signature[parameter.name] = parameter.annotation_type
        source = ASTSource(kernel, signature, constants)
        options = {"num_warps": arguments["num_warps"]}
        binary = triton.compile(source, target=GPUTarget("hip", arch, 64), options=options)
        assert arch in binary.asm["amdgcn"]
        assert "vgpr_spill_count: 0" in binary.asm["amdgcn"].replace("   ", " ").replace("  ", " ")
