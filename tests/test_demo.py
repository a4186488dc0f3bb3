"""The demo: its parts, and one short run from end to end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for name in ("matplotlib", "pycocotools", "rich", "sklearn", "torchvision"):
    pytest.importorskip(name, reason=f"the demo needs {name} (extra: bench)")
pytest.importorskip("bench", reason="bench is found from the repository root: python -m pytest")

from bench import eager, gallery  # noqa: E402
from bench.digits import assign, compare, evaluate  # noqa: E402
from bench.digits import boxes as box_ops  # noqa: E402
from bench.digits.detector import Detector, LossObjects  # noqa: E402
from bench.digits.scenes import IMAGE_SIZE, NUM_CLASSES, Scenes, make_scenes, scans  # noqa: E402
from bench.digits.train import Clock, Clocked, InDouble, Plan, Run  # noqa: E402
from gfl_kernels import reference  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PLAIN = LossObjects(eager.QualityFocalLoss, eager.DistributionFocalLoss, eager.Integral)
PICTURES = ("loss_curves.png", "detections.png", "side_distributions.png")


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(6, seed=3, held_out=False)


@pytest.fixture(scope="module")
def anchors():
    return Detector(PLAIN, IMAGE_SIZE, NUM_CLASSES).head.anchors()


def test_scenes_follow_from_the_seed(scenes):
    again = make_scenes(4, seed=3, held_out=False)
    assert torch.equal(again.images, scenes.images[:4])
    for i in range(4):
        assert torch.equal(again.boxes[i], scenes.boxes[i])
        assert torch.equal(again.labels[i], scenes.labels[i])
    other = make_scenes(4, seed=4, held_out=False)
    assert not torch.equal(other.images, again.images)


def test_boxes_lie_in_the_image_and_hold_ink(scenes):
    for image, boxes in zip(scenes.images[:, 0], scenes.boxes, strict=True):
        assert len(boxes) > 0
        assert (boxes >= 0).all() and (boxes <= IMAGE_SIZE).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        for x1, y1, x2, y2 in boxes.int().tolist():
            assert image[y1:y2, x1:x2].max() > image.mean() + image.std()


def test_held_out_scans_are_not_trained_on():
    train, held_out = (
        {scan.tobytes() for scan in scans(held_out=kind)[0]} for kind in (False, True)
    )
    assert len(train) > 1000 and len(held_out) >= 400
    assert not train & held_out


def _atss_by_hand(anchors, boxes, labels, topk=9):
    """One object at a time, one anchor at a time."""
    every = torch.cat(anchors)
    level_of = [i for i, level in enumerate(anchors) for _ in range(len(level))]
    centers = (every[:, :2] + every[:, 2:]) / 2
    best = {}
    for g, box in enumerate(boxes):
        middle = (box[:2] + box[2:]) / 2
        candidates = []
        for level in range(len(anchors)):
            rows = [a for a in range(len(every)) if level_of[a] == level]
            rows.sort(key=lambda a: float((centers[a] - middle).norm()))
            candidates += rows[:topk]
        ious = torch.stack([box_ops.iou(every[a], box) for a in candidates])
        bar = ious.mean() + ious.std()
        for a, overlap in zip(candidates, ious, strict=True):
            x, y = centers[a]
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= bar and inside and (a not in best or overlap > best[a][0]):
                best[a] = (overlap, g)
    assigned = torch.full((len(every),), NUM_CLASSES)
    targets = torch.zeros(len(every), 4)
    for a, (_, g) in best.items():
        assigned[a], targets[a] = labels[g], boxes[g]
    return assigned, targets


def test_assignment_agrees_with_loops():
    # Sides and places without ties: ties of equally near anchors may be broken either way
    boxes = torch.tensor(
        [[3.3, 5.1, 20.9, 31.7], [15.2, 20.6, 47.1, 61.9], [50.4, 9.7, 58.8, 22.2]]
    )
    labels = torch.tensor([3, 7, 1])
    anchors = [
        box_ops.anchor_boxes(box_ops.anchor_centers(64, stride), stride, 5.0) for stride in (8, 16)
    ]
    got = assign.assign(anchors, boxes, labels, NUM_CLASSES)
    want = _atss_by_hand(anchors, boxes, labels)
    assert (want[0] < NUM_CLASSES).sum() >= 3
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_assignment_without_objects(anchors):
    labels, boxes = assign.assign(
        anchors, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), NUM_CLASSES
    )
    assert (labels == NUM_CLASSES).all() and (boxes == 0).all()


def test_every_object_has_an_anchor(scenes, anchors):
    targets = assign.assign_all(anchors, scenes, NUM_CLASSES)
    for labels, boxes, true_boxes in zip(targets.labels, targets.boxes, scenes.boxes, strict=True):
        chosen = {tuple(box) for box in boxes[labels < NUM_CLASSES].tolist()}
        assert len(chosen & {tuple(box) for box in true_boxes.tolist()}) >= len(true_boxes) - 1


def test_giou_and_distances():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, 0.0, 3.0, 2.0], [2.0, 0.0, 3.0, 1.0]])
    # overlap 2 of union 6, hull 6; apart: union 2, hull 3
    assert torch.allclose(box_ops.giou(a, b), torch.tensor([2 / 6, -1 / 3]))
    points = torch.tensor([[1.0, 1.0], [0.5, 0.25]])
    sides = box_ops.box_to_distances(points, a, limit=16.0)
    assert torch.allclose(box_ops.distances_to_box(points, sides), a)


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("activated", [False, True])
def test_eager_quality_is_the_reference(form, activated):
    pred = torch.randn(40, 5, dtype=torch.float64) * 3
    pred = pred.sigmoid() if activated else pred
    label, score = torch.randint(-1, 7, (40,)), torch.rand(40, dtype=torch.float64)
    target = (label, score)
    if form == "dense":
        inside = (label >= 0) & (label < 5)
        target = torch.zeros(40, 5, dtype=torch.float64)
        target[inside, label[inside]] = score[inside]
    weight = torch.rand(40, dtype=torch.float64)
    module = eager.QualityFocalLoss(activated=activated, loss_weight=1.5)
    got = module(pred, target, weight, avg_factor=7.0)
    want = 1.5 * reference.quality_focal_loss(
        pred, target, weight=weight, avg_factor=7.0, activated=activated
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_eager_distribution_and_integral_are_the_reference():
    pred = torch.randn(24, 4 * 17, dtype=torch.float64)
    rows, target = pred.reshape(-1, 17), torch.rand(96, dtype=torch.float64) * 15.9
    torch.testing.assert_close(
        eager.DistributionFocalLoss(loss_weight=0.25)(rows, target, avg_factor=4.0),
        0.25 * reference.distribution_focal_loss(rows, target, avg_factor=4.0),
        rtol=1e-7,  # eager rounds the bin weights to float32
        atol=0,
    )
    torch.testing.assert_close(
        eager.Integral(16)(pred), reference.integral(rows).reshape(-1, 4), rtol=1e-12, atol=0
    )


def test_eager_refuses_a_sum_over_an_avg_factor():
    with pytest.raises(ValueError, match='avg_factor can not be used with reduction="sum"'):
        eager.distribution_focal_loss(
            torch.randn(4, 9), torch.rand(4), reduction="sum", avg_factor=2
        )


def test_clock_and_double_change_no_value():
    loss, clock = eager.QualityFocalLoss(), Clock()
    target = (torch.randint(0, 6, (50,)), torch.rand(50))
    values = {}
    for name, module in {"bare": loss, "clocked": Clocked(loss, clock)}.items():
        pred = torch.linspace(-4, 4, 250).view(50, 5).requires_grad_()
        value = module(pred, target, avg_factor=10.0)
        value.backward()
        values[name] = (value.detach(), pred.grad)
    assert torch.equal(values["bare"][0], values["clocked"][0])
    assert torch.equal(values["bare"][1], values["clocked"][1])
    assert clock.objects > 0
    in_double = InDouble(eager.QualityFocalLoss())(pred, target, avg_factor=10.0)
    assert in_double.dtype == torch.float32
    torch.testing.assert_close(in_double.detach(), values["bare"][0], rtol=1e-6, atol=0)


def test_a_step_without_positives_trains_the_background():
    empty = Scenes(
        images=torch.randn(2, 1, IMAGE_SIZE, IMAGE_SIZE),
        boxes=[torch.zeros(0, 4)] * 2,
        labels=[torch.zeros(0, dtype=torch.int64)] * 2,
    )
    anchors = Detector(PLAIN, IMAGE_SIZE, NUM_CLASSES).head.anchors()
    plan = Plan(empty, assign.assign_all(anchors, empty, NUM_CLASSES), 2, 2, seed=0)
    threads = torch.get_num_threads()
    try:
        run = Run("plain", plan, threads=1, loss_objects=PLAIN)
        losses = [run.step(numbers) for numbers in plan.order()]
    finally:
        torch.set_num_threads(threads)
    assert all(0 < loss < 10 for loss in losses)


def test_perfect_detections_have_perfect_precision(scenes):
    found = [
        evaluate.Detections(
            boxes=boxes,
            scores=torch.ones(len(boxes)),
            labels=labels,
            sides=torch.zeros(len(boxes), 4, 17),
            points=torch.zeros(len(boxes), 2),
            strides=torch.ones(len(boxes)),
        )
        for boxes, labels in zip(scenes.boxes, scenes.labels, strict=True)
    ]
    assert evaluate.average_precision(found, scenes)["AP"] == pytest.approx(1.0)
    found[0].labels = (found[0].labels + 1) % NUM_CLASSES
    assert evaluate.average_precision(found, scenes)["AP"] < 1.0


def test_distance_and_objections():
    base = [2.0, 1.5, 1.2, 1.1] * 20
    near, far = ([x * (1 + e) for x in base] for e in (1e-4, 5e-4))
    control = compare.distance(near, base)
    assert control.largest == pytest.approx(1e-4)
    assert control.rms == pytest.approx(1e-4)
    assert compare.objections(compare.distance(base, base), [control]) == []
    assert compare.objections(control, [control]) == []
    whole, early = compare.objections(compare.distance(far, base), [control])
    assert "rms" in whole and "first" in early
    assert (
        compare.objections(compare.distance(far, base), [control, compare.distance(far, base)])
        == []
    )
    late = compare.distance(base[:40] + far[40:], base)
    assert compare.objections(late, [late]) == []
    (objection,) = compare.objections(control, [late])
    assert "first" in objection
    broken = compare.distance([*base[:-1], float("nan")], base)
    assert "nan" in compare.objections(broken, [control])[0]
    same = compare.distance(base, base)
    assert "bit-identical" in compare.objections(same, [control, same])[0]


@pytest.mark.slow
def test_a_short_demo_from_end_to_end(tmp_path):
    # No forced backend: what a user gets
    environment = {k: v for k, v in os.environ.items() if k != "GFL_KERNELS_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.train_digits", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**environment, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("plain PyTorch", "gfl_kernels", "control: 1 thread", "AP", "|ours"):
        assert words in done.stdout, done.stdout
    for picture in PICTURES:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    report = json.loads((tmp_path / "train_digits.json").read_text())
    plain, ours = (report["runs"][name] for name in ("plain PyTorch", "gfl_kernels"))
    assert len(plain["curve"]) == len(ours["curve"]) == report["size"]["steps"]
    assert plain["curve"][-1] < plain["curve"][0]
    # Before rounding has had time to grow
    assert ours["distance_from_plain"]["early"] < 2e-6
    assert max(abs(a / b - 1) for a, b in zip(ours["curve"], plain["curve"], strict=True)) < 1e-3
    for run in report["runs"].values():
        times = run["milliseconds"]
        assert 0 < times["loss objects"] < times["loss stage"] < times["step"]


# ---- the gallery


def test_lines_are_counted_to_some_digits(scenes):
    """Boxes stay what they were but for their lower sides, which lie on the line or on the
    digit."""
    before = scenes.images.clone()
    drawn = gallery.underline(scenes, seed=2)
    assert torch.equal(scenes.images, before)
    tight, given, lines = (torch.cat(x) for x in (scenes.boxes, drawn.scenes.boxes, drawn.lines))
    assert torch.equal(given[:, :3], tight[:, :3])
    counted = given[:, 3] != tight[:, 3]
    assert torch.equal(given[counted, 3], lines[counted])
    assert (lines[lines > 0] > tight[lines > 0, 3]).all() and (lines <= IMAGE_SIZE).all()
    assert 0 < counted.sum() < (lines > 0).sum() < len(lines)
    changed = [i for i in range(len(scenes)) if bool((drawn.lines[i] > 0).any())]
    for i in range(len(scenes)):
        assert torch.equal(drawn.scenes.images[i], before[i]) == (i not in changed)


def _found(line, modes):
    """A detection whose lower side has these modes."""
    logits = torch.full((4, 17), -8.0)
    logits[:, 3] = 4.0
    logits[3, 3] = -8.0
    for k, value in modes.items():
        logits[3, k] = value
    point, options = torch.tensor([[60.0, 50.0]]), {"strides": 8.0, "max_shape": (128, 128)}
    mean = gallery.decode_boxes(point, logits.view(1, -1), return_uncertainty=True, **options)
    peak = gallery.decode_boxes(point, logits.view(1, -1), mode="peak", window=1, **options)
    return gallery.Found(
        image=torch.zeros(IMAGE_SIZE, IMAGE_SIZE),
        label=3,
        score=0.5,
        tight_box=torch.tensor([36.0, 26.0, 84.0, 66.0]),
        line=line,
        point=point[0],
        stride=8.0,
        sides=logits.softmax(-1),
        mean=mean.boxes[0],
        peak=peak[0],
        deviation=mean.uncertainty[0],
    )


def test_the_gallery_shows_sides_whose_mean_and_peak_differ(tmp_path):
    sure, lined = _found(0.0, {3: 4.0}), _found(98.0, {2: 4.0, 6: 3.6})
    torch.testing.assert_close(sure.apart(), torch.zeros(4), rtol=0, atol=0.1)
    assert lined.apart()[3] > 1 and lined.apart()[:3].max() < 0.1
    assert 0.3 < lined.second_mode(3) < 0.45 and sure.second_mode(3) < 1e-3
    chosen = gallery.choose([lined, sure, _found(98.0, {2: 4.0, 3: 3.6}), lined])
    assert chosen[0] is sure and len(chosen) == 1 + gallery.AMBIGUOUS
    picture = gallery.draw(tmp_path / "gallery.png", [lined])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert gallery.choose([]) == []


def test_the_gallery_runs_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "QUICK", gallery.Size(2, 2, 4, 2))
    assert gallery.main(["--quick", "--out", str(tmp_path)]) == 0
    assert all(path.name == "gallery.png" for path in tmp_path.iterdir())
