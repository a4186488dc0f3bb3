"""accelerate() and restore(): mmdetection's losses and heads on ours, and back."""

import copy
import io
import warnings

import pytest
import torch
from hosts import (
    MmdetModel,
    assert_same_objects,
    assert_same_training,
    attributes,
    loss_and_grads,
    mmdet_batch,
)
from support import (
    assert_no_worse,
    bin_target,
    dense_target,
    logits,
    random_upstream,
    row_weight,
    run_python,
    sparse_target,
    to_double,
)
from test_mmdet_parity import LOSS_BOX, HeadScene

from gfl_kernels.adapters import accelerate, restore

LOSSES = "mmdet.models.losses.gfocal_loss."
NOT_BY_TORCH_2_10 = pytest.mark.skipif(
    torch.__version__ < (2, 11), reason="torch 2.10 fails on mmdetection's own head, too"
)
REPLACED = [
    LOSSES + "quality_focal_loss",
    LOSSES + "quality_focal_loss_tensor_target",
    LOSSES + "quality_focal_loss_with_prob",
    LOSSES + "distribution_focal_loss",
    "mmdet.models.losses.varifocal_loss.varifocal_loss",
    "mmdet.models.dense_heads.gfl_head.Integral.forward",
    "mmdet.models.dense_heads.gfl_head.GFLHead.loss_by_feat",
]


# ---- in, out, report


def test_every_attribute_comes_back(mmdet):
    from mmdet.models import dense_heads  # noqa: F401  so that subclasses are there

    before = attributes("mmdet")
    report = accelerate("mmdet")
    assert report.replaced == REPLACED and not report.already
    assert accelerate("mmdet").already == REPLACED
    during = attributes("mmdet")
    assert sum(during[key] is not value for key, value in before.items()) >= len(REPLACED)
    assert sorted(restore("mmdet")) == sorted(REPLACED)
    assert_same_objects(before, attributes("mmdet"))
    assert restore("mmdet") == []


def test_blocks_nest(mmdet):
    before = attributes("mmdet")
    with accelerate("mmdet") as outer:
        during = attributes("mmdet")
        with accelerate("mmdet") as inner:
            assert inner.replaced == [] and inner.already == outer.replaced
        assert_same_objects(during, attributes("mmdet"))
    assert_same_objects(before, attributes("mmdet"))
    with pytest.raises(KeyError), accelerate("mmdet"):
        raise KeyError
    assert_same_objects(before, attributes("mmdet"))


def test_what_somebody_else_replaced_stays(mmdet):
    from mmdet.models.losses import gfocal_loss

    original = gfocal_loss.quality_focal_loss
    accelerate("mmdet")
    try:
        gfocal_loss.quality_focal_loss = theirs = lambda *args: None
        assert LOSSES + "quality_focal_loss" not in restore("mmdet")
        assert gfocal_loss.quality_focal_loss is theirs
    finally:
        gfocal_loss.quality_focal_loss = original


def test_the_report_names_what_was_left(mmdet):
    from mmdet.models.dense_heads.ld_head import LDHead

    own = LDHead.loss_by_feat
    with accelerate("mmdet") as report:
        assert LDHead.loss_by_feat is own
    text = str(report)
    assert text.startswith("gfl_kernels under mmdet 3.3.0\n  replaced:")
    assert all(f"    {name}\n" in text for name in REPLACED)
    why = report.left["mmdet.models.dense_heads.ld_head.LDHead"]
    assert why.startswith("it has its own loss_by_feat, loss_by_feat_single")


def test_versions_that_were_not_checked_are_refused(mmdet, monkeypatch):
    import mmdet as package

    before = attributes("mmdet")
    monkeypatch.setattr(package, "__version__", "2.28.2")
    with pytest.raises(RuntimeError, match=r"mmdet 2\.28\.2 is not supported, 3\.3\.0 is"):
        accelerate("mmdet")
    monkeypatch.undo()
    assert_same_objects(before, attributes("mmdet"))


def test_another_signature_is_left_alone(mmdet, monkeypatch):
    from mmdet.models.losses import gfocal_loss

    def quality_focal_loss(pred, target, weight=None, gamma=2.0):
        raise AssertionError

    monkeypatch.setattr(gfocal_loss, "quality_focal_loss", quality_focal_loss)
    with accelerate("mmdet") as report:
        assert gfocal_loss.quality_focal_loss is quality_focal_loss
    why = report.left[LOSSES + "quality_focal_loss"]
    assert why == "its signature is another: (pred, target, weight=None, gamma=2.0)"


@pytest.mark.parametrize("function", [accelerate, restore])
def test_wrong_targets(function):
    hosts = "mmdet, ultralytics, transformers"
    with pytest.raises(ValueError, match=f"the hosts are {hosts}, got 'detectron2'"):
        function("detectron2")
    with pytest.raises(TypeError, match="an nn.Module or a Python module, got int"):
        function(3)


def test_heads_with_other_losses_run_as_they_were(mmdet):
    model = MmdetModel(loss_bbox={"type": "GIoULoss", "eps": 1e-3, "loss_weight": 2.0})
    batch = mmdet_batch()
    expected = loss_and_grads(model, batch)
    with pytest.warns(UserWarning, match="GFLHead.loss_by_feat is not fused: its loss_bbox is"):
        got = loss_and_grads(model, batch, "mmdet")
    torch.testing.assert_close(got, expected)


# ---- numbers: patched, unpatched, and unpatched in float64


def compare(function, pred, *args, **kwargs):
    """What function returns, and its gradient, with and without accelerate("mmdet")."""
    results = []
    for target, number in (("mmdet", lambda x: x), (None, lambda x: x), (None, to_double)):
        leaf = number(pred).detach().clone().requires_grad_()

        def run(leaf=leaf, number=number):
            value = function(leaf, *number(args), **number(kwargs))
            return value.detach(), *torch.autograd.grad(value, leaf, random_upstream(value))

        if target is None:
            results.append(run())
        else:
            with accelerate(target):
                results.append(run())
    for what, got, eager, truth in zip(("value", "gradient"), *results, strict=True):
        assert got.shape == eager.shape and got.dtype == eager.dtype, what
        assert_no_worse(got, truth, eager, what=what)


@pytest.mark.parametrize("reduction, avg_factor", [("none", None), ("mean", 2.5), ("sum", None)])
def test_functions(mmdet, reduction, avg_factor):
    rows, classes, bins = 60, 17, 9
    pred = logits(rows, classes, extremes=False)
    weight = row_weight((rows,))
    sparse, dense = sparse_target((rows,), classes), dense_target((rows,), classes)
    options = {"reduction": reduction, "loss_weight": 0.75}
    for beta in (2.0, 1.5):
        loss = mmdet.QualityFocalLoss(beta=beta, **options)
        activated = mmdet.QualityFocalLoss(beta=beta, activated=True, **options)
        for target in (sparse, dense):
            compare(loss, pred, target, weight, avg_factor)
            compare(activated, pred.sigmoid(), target, weight, avg_factor)
    for iou_weighted in (True, False):
        varifocal = mmdet.VarifocalLoss(iou_weighted=iou_weighted, **options)
        compare(varifocal, pred, dense, weight[:, None].expand(rows, classes), avg_factor)
    maps, soft = logits(2, 5, 3, 4, extremes=False), dense_target((2, 5, 3), 4)
    compare(mmdet.QualityFocalLoss(reduction="none"), maps, soft)
    target = bin_target((rows,), bins).clamp(0, bins - 1.1)
    distribution = mmdet.DistributionFocalLoss(**options)
    compare(distribution, logits(rows, bins, extremes=False), target, weight, avg_factor)


def test_integral(mmdet):
    pred = logits(30, 4 * 17, extremes=False)
    layer = mmdet.Integral(16)
    keys = list(layer.state_dict())
    with accelerate("mmdet"):
        got = layer(pred)
        assert list(layer.state_dict()) == list(mmdet.Integral(16).state_dict()) == keys
        assert layer(pred.half()).dtype == torch.half
    assert_no_worse(got, layer.double()(pred.double()), mmdet.Integral(16)(pred), what="distances")


@pytest.mark.parametrize("iou", LOSS_BOX)
def test_head(mmdet, iou):
    scene = HeadScene(mmdet, (3, 5), iou=iou)
    results = []
    for target, number in (("mmdet", lambda x: x), (None, lambda x: x), (None, to_double)):
        leaves = [number(t).detach().requires_grad_() for t in scene.leaves]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a fallback would say so
            if target is None:
                losses = scene.theirs(leaves)
            else:
                with accelerate(target):
                    losses = scene.theirs(leaves)
        upstream = [random_upstream(loss, i) for i, loss in enumerate(losses)]
        grads = torch.autograd.grad(losses, leaves, upstream)
        results.append((*(loss.detach() for loss in losses), *grads))
    for i, (got, eager, truth) in enumerate(zip(*results, strict=True)):
        assert_no_worse(got, truth, eager, what=f"result {i}")


@pytest.mark.parametrize("counts", [(3, 2), (0, 2), (0, 0)], ids=str)
def test_head_with_its_assigner(mmdet, counts):
    """Anchors outside a padded image, images without objects."""
    model, batch = MmdetModel(), mmdet_batch(counts=counts)
    assert_same_training(loss_and_grads(model, batch, "mmdet"), loss_and_grads(model, batch))


def test_configs_can_name_our_classes(mmdet):
    """type='gfl_kernels...': mmdetection's classes, so isinstance and type names hold; no patch."""
    from mmdet.registry import MODELS

    loss = MODELS.build({"type": "gfl_kernels.QualityFocalLoss", "loss_weight": 0.5})
    assert isinstance(loss, mmdet.QualityFocalLoss) and type(loss).__name__ == "QualityFocalLoss"
    pred, target = logits(9, 4, extremes=False), sparse_target((9,), 4)
    expected = mmdet.QualityFocalLoss(loss_weight=0.5)(pred, target)
    torch.testing.assert_close(loss(pred, target), expected)

    head = MODELS.get("gfl_kernels.GFLHead")
    assert issubclass(head, mmdet.GFLHead)
    theirs = MmdetModel()
    ours = MmdetModel(
        head=head,
        loss_cls={"type": "gfl_kernels.QualityFocalLoss", "use_sigmoid": True},
        loss_dfl={"type": "gfl_kernels.DistributionFocalLoss", "loss_weight": 0.25},
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    batch = mmdet_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        got = loss_and_grads(ours, batch)
    assert_same_training(got, loss_and_grads(theirs, batch))


# ---- ways of training


def test_autocast_and_grad_scaler(mmdet):
    """The logits are the same half numbers in both; upstream also rounds scores to half."""
    model, batch = MmdetModel(), mmdet_batch()
    for dtype in (torch.bfloat16, torch.float16):
        eps = 4 * torch.finfo(dtype).eps
        with torch.autocast("cpu", dtype=dtype):
            expected = loss_and_grads(model, batch)
            assert_same_training(loss_and_grads(model, batch, "mmdet"), expected, eps)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    with accelerate("mmdet"):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(*batch)
        optimiser.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
    grads = [parameter.grad for parameter in model.parameters()]
    assert_same_training((loss.detach(), grads), expected, eps)


def test_accumulation_retained_graphs_and_checkpointing(mmdet):
    model, batch = MmdetModel(), mmdet_batch()
    loss, grads = loss_and_grads(model, batch)

    def accumulate():
        (model(*batch) / 4).backward()
        (model(*batch) / 2).backward()

    def retain():
        loss = model(*batch)
        loss.backward(retain_graph=True)
        loss.backward()

    def checkpoint():
        torch.utils.checkpoint.checkpoint(model, *batch, use_reentrant=False).backward()

    for way, factor in ((accumulate, 0.75), (retain, 2), (checkpoint, 1)):
        model.zero_grad()
        with accelerate("mmdet"):
            way()
        got = [parameter.grad for parameter in model.parameters()]
        assert_same_training((loss, got), (loss, [factor * grad for grad in grads]))


WORKER = """
import sys, torch, torch.distributed as dist
import torch.multiprocessing as mp
sys.path.insert(0, ".")
from gfl_kernels.adapters import accelerate
from gfl_kernels.adapters.mmdet import allow_mmcv_lite
allow_mmcv_lite()
from hosts import MmdetModel, assert_same_training, mmdet_batch
from contextlib import nullcontext
import mmdet.models.dense_heads.gfl_head, mmdet.models.task_modules  # before the fork

def work(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    for target in (None, "mmdet"):
        # The second process has no objects the second time.
        for run, counts in enumerate([(3, 2), (0, 0) if rank else (3, 2)]):
            model = torch.nn.parallel.DistributedDataParallel(MmdetModel())
            with accelerate(target) if target else nullcontext():
                loss = model(*mmdet_batch(rank, counts))
                loss.backward()
            results[rank, target, run] = loss.detach(), [p.grad for p in model.parameters()]
    dist.destroy_process_group()

if __name__ == "__main__":
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(work, (sys.argv[1], results), nprocs=2, start_method="fork")
        for rank in range(2):
            for run in range(2):
                assert_same_training(results[rank, "mmdet", run], results[rank, None, run])
        print("same")
"""


@pytest.mark.slow
def test_two_processes(mmdet, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = run_python([str(script), str(tmp_path / "store")], timeout=300)
    assert done.returncode == 0 and done.stdout.strip().endswith("same"), done.stdout + done.stderr


@pytest.mark.slow
@NOT_BY_TORCH_2_10
def test_compiled(mmdet):
    """A head under torch.compile, from its features to the losses of given targets."""
    model, batch = MmdetModel(), mmdet_batch()
    expected = loss_and_grads(model, batch)
    head, sizes = model.head, [(8, 12), (4, 6)]
    targets = head.get_targets(*head.get_anchors(sizes, batch[2], device="cpu"), *batch[1:])
    head.get_targets = torch._dynamo.assume_constant_result(lambda *args, **kwargs: targets)
    torch._dynamo.reset()
    with accelerate("mmdet"):
        got = loss_and_grads(torch.compile(model, backend="aot_eager"), batch)
    torch._dynamo.reset()
    assert_same_training(got, expected)


# ---- export


class Distances(torch.nn.Module):
    """What a deployed head computes: scores and distances."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        cls, box = self.model.outputs(images)
        rows = [x.flatten(2).transpose(1, 2) for x in box]
        return torch.cat([x.flatten(2) for x in cls], dim=2).sigmoid(), [
            self.model.head.integral(x) for x in rows
        ]


def exported(model, images):
    """(torch.export's graph, ONNX of the tracing exporter, ONNX of the exporting one)."""
    fresh = lambda: copy.deepcopy(model)  # noqa: E731  Ultralytics' heads keep what they traced
    program = torch.export.export(fresh(), (images,))
    traced, dynamo = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(fresh(), (images,), traced, dynamo=False)
        torch.onnx.export(fresh(), (images,), dynamo=True, verbose=False).save(dynamo)
    return program.graph_module.code, traced.getvalue(), dynamo.getvalue()


def check_exports(model, images, target):
    """Patched and unpatched models export to the same bytes, which give the model's numbers."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = model.eval()
    expected = exported(model, images)
    with accelerate(target):
        patched = exported(model, images)
        with torch.no_grad():
            outputs = model(images)
    assert patched[0] == expected[0]
    assert patched[1] == expected[1]
    for content in patched[1:]:
        session = onnxruntime.InferenceSession(content)
        (name,) = [entry.name for entry in session.get_inputs()]
        results = session.run(None, {name: images.numpy()})
        flat = torch.utils._pytree.tree_leaves(outputs)
        for got, want in zip(results, flat, strict=True):
            torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)


@NOT_BY_TORCH_2_10
def test_export(mmdet):
    check_exports(Distances(MmdetModel()), mmdet_batch()[0][:1], "mmdet")


def test_one_model(mmdet):
    """accelerate(model): this model, its copies, and no other."""
    model, other, batch = MmdetModel(), MmdetModel(), mmdet_batch()
    expected = loss_and_grads(model, batch)
    before = [dict(vars(module)) for module in model.modules()]
    report = accelerate(model)
    assert "head.loss_by_feat" in report.replaced and "head.integral.forward" in report.replaced
    assert accelerate(model).already == report.replaced
    twin = copy.deepcopy(model)
    assert twin.head.loss_by_feat.instance is twin.head
    assert not hasattr(other.head.loss_by_feat, "instance")
    for each in (model, twin):
        assert_same_training(loss_and_grads(each, batch), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert loaded.head.integral.forward.instance is loaded.head.integral
    images, rows = batch[0][:1], logits(6, 4 * 17, extremes=False)
    patched = torch.export.export(Distances(twin), (images,)).graph_module.code
    compiled = torch.compile(twin.head.integral, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows), other.head.integral(rows))
    torch._dynamo.reset()
    assert len(restore(twin)) == len(report.replaced)
    restore(model)
    assert torch.export.export(Distances(twin), (images,)).graph_module.code == patched
    for module, attributes_before in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes_before.keys()
        changed = [k for k, v in attributes_before.items() if vars(module)[k] is not v]
        assert not changed, (type(module).__name__, changed)
