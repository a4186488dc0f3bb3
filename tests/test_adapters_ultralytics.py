"""accelerate("ultralytics"): v8DetectionLoss and its parts on ours, and back."""

import pytest
import torch
from hosts import (
    CLASSES,
    assert_same_objects,
    assert_same_training,
    attributes,
    detection_batch,
    detection_loss,
    detection_run,
)
from support import assert_no_worse, logits, random_upstream, run_python
from test_adapters import check_exports

from gfl_kernels.adapters import accelerate, restore

REPLACED = [
    "ultralytics.nn.modules.block.DFL.forward",
    "ultralytics.utils.loss.DFLoss.__call__",
    "ultralytics.utils.loss.BboxLoss.forward",
    "ultralytics.utils.loss.VarifocalLoss.forward",
    "ultralytics.utils.loss.v8DetectionLoss.bbox_decode",
    "ultralytics.utils.loss.v8DetectionLoss.get_assigned_targets_and_loss",
]


def test_every_attribute_comes_back(ultralytics):
    from ultralytics.nn.modules import block, head  # noqa: F401
    from ultralytics.utils import loss  # noqa: F401

    before = attributes("ultralytics")
    report = accelerate("ultralytics")
    assert report.replaced == REPLACED
    assert accelerate("ultralytics").already == REPLACED
    assert "its boxes are rotated" in str(report)
    assert sorted(restore("ultralytics")) == sorted(REPLACED)
    assert_same_objects(before, attributes("ultralytics"))


def test_versions_that_were_not_checked_are_refused(ultralytics, monkeypatch):
    monkeypatch.setattr(ultralytics, "__version__", "8.3.253")
    with pytest.raises(RuntimeError, match=r"ultralytics 8\.3\.253 is not supported, 8\.4\.x is"):
        accelerate("ultralytics")


# ---- numbers


@pytest.mark.parametrize("counts", [(3, 2), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_detection_loss(ultralytics, counts, dtype):
    criterion, prepared = detection_loss(), detection_batch(counts=counts, dtype=dtype)
    expected, items = detection_run(criterion, prepared)
    got, our_items = detection_run(criterion, prepared, "ultralytics")
    assert_same_training(got, expected, eps=2e-6 if dtype == torch.float32 else 2e-7)
    assert got[0].dtype == expected[0].dtype and items.keys() == our_items.keys()
    for name in items:
        torch.testing.assert_close(our_items[name], items[name], rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits(ultralytics, dtype):
    """Near what Ultralytics gets from the same logits made float32: nearer than itself from half
    logits, whose boxes it decodes in half precision."""
    criterion, (leaves, others, batch) = detection_loss(), detection_batch(dtype=dtype)
    wide = [leaf.float() for leaf in leaves]
    others["feats"] = [level.float() for level in others["feats"]]
    expected, _ = detection_run(criterion, (wide, others, batch))
    upstream, _ = detection_run(criterion, (leaves, others, batch))
    got, _ = detection_run(criterion, (leaves, others, batch), "ultralytics")
    ours, theirs = ((run[0] - expected[0]).abs().sum() for run in (got, upstream))
    assert ours < theirs / 2
    assert [grad.dtype for grad in got[1]] == [dtype, dtype]
    as_float = got[0], [grad.float() for grad in got[1]]
    assert_same_training(as_float, expected, eps=torch.finfo(dtype).eps)
    with torch.autocast("cpu", dtype=dtype):
        again, _ = detection_run(criterion, (leaves, others, batch), "ultralytics")
    assert_same_training(again, got)


def test_class_weights(ultralytics):
    """The classification is upstream's there, the box losses are ours."""
    criterion, prepared = detection_loss(), detection_batch()
    criterion.class_weights = torch.tensor([0.5, 1.0, 2.0]).view(1, 1, -1)
    expected, _ = detection_run(criterion, prepared)
    got, _ = detection_run(criterion, prepared, "ultralytics")
    assert_same_training(got, expected)


def test_other_losses_run_as_they_were(ultralytics):
    criterion, prepared = detection_loss(), detection_batch()
    criterion.bce = torch.nn.BCEWithLogitsLoss(reduction="none", pos_weight=torch.full((3,), 2.0))
    expected, _ = detection_run(criterion, prepared)
    with pytest.warns(UserWarning, match="v8DetectionLoss is not fused: its bce is"):
        got, _ = detection_run(criterion, prepared, "ultralytics")
    assert_same_training(got, expected)


def test_without_distributions(ultralytics):
    """YOLO26: an L1 loss, which stays what it is."""
    criterion, prepared = detection_loss(reg_max=1), detection_batch(reg_max=1)
    expected, _ = detection_run(criterion, prepared)
    with pytest.warns(UserWarning, match="its reg_max is 1: it has no distributions"):
        got, _ = detection_run(criterion, prepared, "ultralytics")
    assert torch.equal(got[0], expected[0])


def test_parts(ultralytics):
    from ultralytics.nn.modules.block import DFL
    from ultralytics.utils.loss import BboxLoss, DFLoss, VarifocalLoss

    pred, target = logits(40, 16, extremes=False), torch.rand(10, 4) * 17 - 1
    layer, maps = DFL(16), logits(2, 64, 5, extremes=False)
    keys = list(layer.state_dict())
    boxes = [torch.rand(2, 6, 4) for _ in range(2)]
    boxes = [torch.cat([b[..., :2], b[..., :2] + b[..., 2:] + 0.1], -1) * 8 for b in boxes]
    scores, points = torch.rand(2, 6, CLASSES), torch.rand(6, 2) * 8
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1]], dtype=torch.bool)
    box_logits = logits(2, 6, 64, extremes=False)

    def distribution(leaf):
        return DFLoss(16)(leaf, target.to(leaf.dtype))

    def varifocal(leaf):  # a positive whose score is 0 among them
        one_hot = torch.nn.functional.one_hot(torch.tensor([[0, 3, 2], [3, 1, 1]]), 4)[..., :-1]
        scores = torch.tensor([[0.7, 0.9, 0.0], [0.2, 1.0, 0.4]], dtype=leaf.dtype)[..., None]
        return VarifocalLoss()(leaf, scores * one_hot, one_hot)

    def box(leaf):  # boxes that were not decoded from these logits
        args = [t.to(leaf.dtype) for t in (boxes[0], points, boxes[1], scores, scores.sum())]
        image, stride = torch.tensor([64.0, 64.0]), torch.ones(6, 1)
        return torch.stack(BboxLoss(16)(leaf, *args, mask, image, stride))

    for name, function, leaf in (
        ("DFL", lambda x: layer.to(x.dtype)(x), maps),
        ("DFLoss", distribution, pred),
        ("BboxLoss", box, box_logits),
        ("VarifocalLoss", varifocal, logits(2, 3, CLASSES, extremes=False)),
    ):
        results = []
        for number, report in ((1, accelerate("ultralytics")), (1, None), (2, None)):
            x = (leaf.double() if number == 2 else leaf).detach().requires_grad_()
            value = function(x)
            results.append((value, *torch.autograd.grad(value, x, random_upstream(value))))
            if report:
                report.restore()
        for got, eager, truth in zip(*results, strict=True):
            assert got.dtype == eager.dtype
            assert_no_worse(got.detach(), truth.detach(), eager.detach(), what=name, scale=16)
    assert list(layer.state_dict()) == keys == ["conv.weight"]


# ---- ways of training


def test_accumulation_retained_graphs_and_scaled_losses(ultralytics):
    criterion, (leaves, others, batch) = detection_loss(), detection_batch()
    (losses, grads), _ = detection_run(criterion, (leaves, others, batch))

    def loss(scores, boxes):
        return criterion({"scores": scores, "boxes": boxes, **others}, batch)[0].sum()

    def accumulate(*leaves):
        (loss(*leaves) / 4).backward()
        (loss(*leaves) / 2).backward()

    def retain(*leaves):
        value = loss(*leaves)
        value.backward(retain_graph=True)
        value.backward()

    def checkpoint(*leaves):
        torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False).backward()

    def scale(*leaves):
        torch.amp.GradScaler("cpu", init_scale=2.0**10).scale(loss(*leaves)).backward()

    for way, factor in ((accumulate, 0.75), (retain, 2), (checkpoint, 1), (scale, 1024)):
        fresh = [leaf.detach().requires_grad_() for leaf in leaves]
        with accelerate("ultralytics"):
            way(*fresh)
        got = losses, [leaf.grad for leaf in fresh]
        assert_same_training(got, (losses, [factor * grad for grad in grads]))


WORKER = """
import sys, torch, torch.distributed as dist
import torch.multiprocessing as mp
sys.path.insert(0, ".")
from hosts import assert_same_training, detection_batch, detection_loss, detection_run
import gfl_kernels.adapters.ultralytics, ultralytics.nn.modules.block, ultralytics.utils.loss

def work(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    criterion = detection_loss()
    # Its divisor is each process's own. Only the first has a loss the second time: nothing waits.
    for counts in ((3, 2), (0, 1))[: 2 - rank]:
        prepared = detection_batch(rank, counts)
        got, _ = detection_run(criterion, prepared, "ultralytics")
        assert_same_training(got, detection_run(criterion, prepared)[0])
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
    print("same")
"""


@pytest.mark.slow
def test_two_processes(ultralytics, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = run_python([str(script), str(tmp_path / "store")], timeout=300)
    assert done.returncode == 0 and done.stdout.strip().endswith("same"), done.stdout + done.stderr


def test_compiled(ultralytics):
    """The decode layer and the loss from given targets on in one graph without breaks."""
    from ultralytics.nn.modules.block import DFL
    from ultralytics.utils.loss import DFLoss

    layer, loss = DFL(16), DFLoss(16)

    def function(maps, rows, target):
        return layer(maps).sum() + loss(rows, target).sum()

    args = logits(2, 64, 5, extremes=False), logits(40, 16, extremes=False), torch.rand(10, 4) * 15
    expected = function(*args)
    torch._dynamo.reset()
    with accelerate("ultralytics"):
        got = torch.compile(function, backend="aot_eager", fullgraph=True)(*args)
    torch._dynamo.reset()
    torch.testing.assert_close(got, expected)


def test_export(ultralytics):
    """A Detect head with its decode layer."""
    from ultralytics.nn.modules.head import Detect

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 8, 8)
            self.detect = Detect(CLASSES, ch=(8,))
            self.detect.stride = torch.tensor([8.0])
            self.detect.export, self.detect.format = True, "onnx"

        def forward(self, images):
            return self.detect([self.stem(images)])

    check_exports(Model(), torch.randn(1, 3, 32, 32), "ultralytics")


def test_one_model(ultralytics):
    """A criterion is no module of the tree, but an attribute of the model."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = detection_loss()

    model, prepared = Model(), detection_batch()
    expected, _ = detection_run(model.criterion, prepared)
    report = accelerate(model)
    assert report.replaced == [
        "criterion.bbox_decode",
        "criterion.get_assigned_targets_and_loss",
        "criterion.bbox_loss.forward",
    ]
    assert_same_training(detection_run(model.criterion, prepared)[0], expected)
    assert len(restore(model)) == 3
    assert not {"bbox_decode", "get_assigned_targets_and_loss"} & vars(model.criterion).keys()
