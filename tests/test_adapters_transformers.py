"""accelerate("transformers") on the real criteria of RT-DETR, D-FINE, DEIMv2 and LW-DETR."""

import sys
import types
from contextlib import contextmanager, nullcontext
from importlib import import_module

import pytest
import torch
from hosts import assert_same_objects, attributes
from support import assert_no_worse, logits, random_upstream, to_double

from gfl_kernels.adapters import accelerate, restore

CLASSES, BINS, QUERIES = 7, 33, 12
LOSS = "transformers.loss.loss_"
REPLACED = [
    LOSS + "rt_detr.RTDetrLoss.loss_labels_vfl",
    LOSS + "d_fine.DFineLoss.unimodal_distribution_focal_loss",
    LOSS + "d_fine.DFineLoss.loss_local",
    LOSS + "deimv2.Deimv2Loss.loss_labels_mal",
    LOSS + "lw_detr.LwDetrImageLoss.loss_labels",
    "transformers.models.d_fine.modeling_d_fine.DFineIntegral.forward",
    "transformers.models.deimv2.modeling_deimv2.Deimv2Integral.forward",
    LOSS + "for_object_detection.sigmoid_focal_loss",
    LOSS + "deformable_detr.sigmoid_focal_loss",
    LOSS + "rt_detr.sigmoid_focal_loss",
    LOSS + "lw_detr.sigmoid_focal_loss",
]
CONFIG = types.SimpleNamespace(
    num_labels=CLASSES,
    max_num_bins=BINS - 1,
    reg_scale=4.0,
    up=0.5,
    matcher_class_cost=2.0,
    matcher_bbox_cost=5.0,
    matcher_giou_cost=2.0,
    matcher_alpha=0.25,
    matcher_gamma=2.0,
    use_focal_loss=True,
    weight_loss_vfl=1.0,
    weight_loss_mal=1.0,
    weight_loss_bbox=5.0,
    weight_loss_giou=2.0,
    weight_loss_fgl=0.15,
    weight_loss_ddf=1.5,
    eos_coefficient=1e-4,
    focal_loss_alpha=0.75,
    focal_loss_gamma=2.0,
    mal_alpha=None,
    use_dense_one_to_one=True,
    auxiliary_loss=True,
)


@pytest.fixture(scope="module")
def transformers():
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    for name in ("rt_detr", "d_fine", "deimv2", "lw_detr", "deformable_detr"):
        import_module(f"transformers.loss.loss_{name}")
    import_module("transformers.models.d_fine.modeling_d_fine")
    import_module("transformers.models.deimv2.modeling_deimv2")
    return package


# ---- in, out, report


def test_every_attribute_comes_back(transformers):
    before = attributes("transformers")
    report = accelerate("transformers")
    assert report.replaced == REPLACED and not report.already
    assert accelerate("transformers").already == REPLACED
    during = attributes("transformers")
    assert sum(during[key] is not value for key, value in before.items()) >= len(REPLACED)
    assert sorted(restore("transformers")) == sorted(REPLACED)
    assert_same_objects(before, attributes("transformers"))
    assert restore("transformers") == []
    with pytest.raises(KeyError), accelerate(transformers) as report:
        assert report.replaced == REPLACED
        raise KeyError
    assert_same_objects(before, attributes("transformers"))


def test_versions_that_were_not_checked_are_refused(transformers, monkeypatch):
    # The package puts another object in its own place when a model is imported.
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.40.0")
    with pytest.raises(RuntimeError, match=r"transformers 4\.40\.0 is not supported, 5\.x is"):
        accelerate("transformers")
    assert restore("transformers") == []


def test_the_criteria_are_known_by_their_numbers_too(transformers):
    """accelerate(module), which tries every method before it replaces it."""
    modules = [import_module(f"transformers.loss.loss_{n}") for n in ("rt_detr", "deimv2")]
    reports = [accelerate(module) for module in modules]
    assert REPLACED[0] in reports[0].replaced and reports[1].replaced == [REPLACED[3]]
    focal = "transformers.loss.loss_rt_detr.RTDetrLoss.loss_labels_focal"
    assert reports[0].left[focal].startswith("it could not be tried: ")


# ---- numbers: patched, unpatched, and unpatched in float64


def criterion(name, number=lambda x: x, **options):
    config = types.SimpleNamespace(**{**vars(CONFIG), **options})
    made = getattr(import_module(f"transformers.loss.loss_{name}"), KINDS[name])(config)
    return made.double() if number is to_double else made


KINDS = {"rt_detr": "RTDetrLoss", "d_fine": "DFineLoss", "deimv2": "Deimv2Loss"}


def scene(counts=(4, 0, 3), extremes=True, dtype=torch.float32):
    """(outputs, targets): every tensor of outputs is the outputs of a decoder layer."""
    images = len(counts)
    centres = torch.rand(images, QUERIES, 2) * 0.6 + 0.2
    sizes = torch.rand(images, QUERIES, 2) * 0.3 + 0.02
    boxes = torch.cat([centres, sizes], dim=-1)
    corners = (images, QUERIES, 4 * BINS)
    outputs = {
        "logits": logits(images, QUERIES, CLASSES, dtype=dtype, extremes=extremes),
        "pred_boxes": boxes,
        "pred_corners": logits(*corners, dtype=dtype, seed=1, extremes=False),
        "ref_points": (boxes + 0.03 * torch.randn_like(boxes)).clamp(min=0.01),
        "teacher_corners": logits(*corners, dtype=dtype, seed=2, extremes=False),
        "teacher_logits": logits(images, QUERIES, CLASSES, seed=3, extremes=False),
    }
    targets = []
    for i, count in enumerate(counts):
        near = boxes[i, :count] + 0.1 * torch.randn(count, 4)
        targets.append(
            {
                "class_labels": torch.randint(CLASSES, (count,)),
                "boxes": near.clamp(min=0.02),
            }
        )
    return outputs, targets


def matches(counts):
    """Of every image some queries, in any order, and all of its targets."""
    return [(torch.randperm(QUERIES)[:count], torch.randperm(count)) for count in counts]


LEAVES = ("logits", "pred_corners")


@contextmanager
def targets_of_float32():
    """transformers' targets of FGL are made in float32 only, for float64 boxes as well."""
    module = import_module("transformers.loss.loss_d_fine")
    original = module.bbox2distance

    def bbox2distance(points, boxes, *others):
        made = original(points.float(), boxes.float(), *others[:2], others[2].float())
        return tuple(tensor.double() for tensor in made)

    module.bbox2distance = bbox2distance
    try:
        yield
    finally:
        module.bbox2distance = original


def compare(call, outputs, targets, scale=1.0):
    """call(number, outputs, targets) -> losses, and their gradients, on both sides."""
    results = []
    for target, number in ((True, lambda x: x), (False, lambda x: x), (False, to_double)):
        leaves = {k: number(outputs[k]).detach().requires_grad_() for k in LEAVES}
        wanted = [{k: number(v) for k, v in t.items()} for t in targets]
        everything = {**{k: number(v) for k, v in outputs.items()}, **leaves}
        with (
            accelerate("transformers") if target else nullcontext(),
            targets_of_float32() if number is to_double else nullcontext(),
        ):
            losses = call(number, everything, wanted)
            values = [loss for loss in losses.values() if loss.requires_grad]
            upstream = [random_upstream(loss, i) for i, loss in enumerate(values)]
            grads = torch.autograd.grad(
                values, list(leaves.values()), upstream, allow_unused=True, materialize_grads=True
            )
        found = {k: v.detach() for k, v in losses.items()}
        results.append({**found, **dict(zip(LEAVES, grads, strict=True))})
    got, eager, truth = results
    assert got.keys() == eager.keys()
    for what in got:
        assert_no_worse(got[what], truth[what], eager[what], what=what, scale=scale)
        if what not in LEAVES:
            torch.testing.assert_close(got[what].double(), truth[what], rtol=1e-5, atol=1e-5)
    return got


@pytest.mark.parametrize("counts", [(4, 0, 3), (0, 0)])
@pytest.mark.parametrize(
    "name, loss, options",
    [
        ("rt_detr", "vfl", {}),
        ("d_fine", "vfl", {"focal_loss_alpha": 0.2, "focal_loss_gamma": 1.5}),
        ("deimv2", "mal", {"focal_loss_gamma": 1.5}),
        ("deimv2", "mal", {"mal_alpha": 0.4}),
    ],
)
def test_classification(transformers, name, loss, options, counts):
    outputs, targets = scene(counts)
    indices = matches(counts)

    def call(number, outputs, targets):
        made = criterion(name, number, **options)
        return made.get_loss(loss, outputs, targets, indices, 3.0)

    got = compare(call, outputs, targets, scale=16)
    assert list(got)[0] == f"loss_{loss}" and got["logits"].abs().sum() > 0


def test_positives_without_overlap(transformers):
    """Their IoU is 0: they are positives all the same."""
    outputs, targets = scene((2,))
    targets[0]["boxes"] = torch.tensor([[0.02, 0.02, 0.01, 0.01]] * 2)
    indices = matches((2,))
    for name, loss in (("rt_detr", "vfl"), ("deimv2", "mal")):
        compare(
            lambda number, *scene, name=name, loss=loss: criterion(name, number).get_loss(
                loss, *scene, indices, 2.0
            ),
            outputs,
            targets,
            scale=16,
        )


@pytest.mark.parametrize("counts", [(4, 0, 3), (0, 0), (QUERIES,)])
def test_local(transformers, counts):
    outputs, targets = scene(counts)
    indices = matches(counts)
    kept = []

    def call(number, outputs, targets):
        made = criterion("d_fine", number)
        losses = made.loss_local(outputs, targets, indices, 3.0)
        kept.append([float(made.num_pos), float(made.num_neg)])
        return losses

    got = compare(call, outputs, targets)
    assert list(got)[:2] == ["loss_fgl", "loss_ddf"] and got["pred_corners"].abs().sum() > 0
    assert kept[0] == pytest.approx(kept[2])
    with accelerate("transformers"):
        assert criterion("d_fine").loss_local({"logits": outputs["logits"]}, [], [], 1.0) == {}


def test_local_of_the_last_layer(transformers):
    """Its teacher is itself."""
    outputs, targets = scene((3, 2))
    indices = matches((3, 2))
    outputs["teacher_corners"] = outputs["pred_corners"]

    def call(number, outputs, targets):
        return criterion("d_fine", number).loss_local(outputs, targets, indices, 3.0)

    assert compare(call, outputs, targets)["loss_ddf"] == 0


@pytest.mark.parametrize("name", KINDS)
def test_whole_criterion(transformers, name):
    """The matcher, auxiliary layers and denoising queries, as a model calls it: fewer operations,
    the same losses."""
    counts = (3, 1)
    outputs, targets = scene(counts, extremes=False)
    layers = [scene(counts, extremes=False)[0] for _ in range(3)]
    groups = 2
    positive = [torch.arange(count * groups) for count in counts]

    def call(number, outputs, targets):
        share = {k: outputs[k] for k in ("teacher_corners", "teacher_logits")}
        others = [{**{k: number(v) for k, v in layer.items()}, **share} for layer in layers]
        others[2]["logits"], others[2]["pred_corners"] = (outputs[k] for k in LEAVES)
        everything = {
            **outputs,
            "auxiliary_outputs": others[:2],
            "dn_auxiliary_outputs": others[2:],
            "denoising_meta_values": {"dn_positive_idx": positive, "dn_num_group": groups},
        }
        return criterion(name, number)(everything, targets)

    got = compare(call, outputs, targets)
    assert len(got) > len(LEAVES) + 9


def test_iou_aware(transformers):
    counts = (4, 0, 3)
    outputs, targets = scene(counts, extremes=False)
    indices = matches(counts)
    kind = import_module("transformers.loss.loss_lw_detr").LwDetrImageLoss

    def call(number, outputs, targets):
        made = kind(None, CLASSES, 0.25, ["labels"], 1)
        return made.loss_labels(outputs, targets, indices, 3.0)

    compare(call, outputs, targets)


def test_focal(transformers):
    """DETR's, of [B, Q, C] logits and of [N, pixels] masks."""
    detection = import_module("transformers.loss.loss_for_object_detection")
    outputs, targets = scene()
    onehot = torch.nn.functional.one_hot(torch.arange(QUERIES) % CLASSES, CLASSES).expand(3, -1, -1)

    def call(number, outputs, targets):
        x, y = outputs["logits"], onehot.to(outputs["logits"].dtype)
        return {
            "ce": detection.sigmoid_focal_loss(x, y, 3.0),
            "mask": detection.sigmoid_focal_loss(x[0], y[0], 2.0, alpha=-1, gamma=1.5),
        }

    compare(call, outputs, targets, scale=16)


def test_half_logits(transformers):
    outputs, targets = scene((4, 0, 3), extremes=False, dtype=torch.bfloat16)
    indices = matches((4, 0, 3))

    def run(target, number):
        leaves = {k: number(outputs[k]).detach().requires_grad_() for k in LEAVES}
        wanted = [{k: number(v) for k, v in t.items()} for t in targets]
        made = criterion("d_fine", number)
        with (
            accelerate("transformers") if target else nullcontext(),
            targets_of_float32() if number is to_double else nullcontext(),
        ):
            everything = {**{k: number(v) for k, v in outputs.items()}, **leaves}
            losses = [made.get_loss(n, everything, wanted, indices, 3.0) for n in ("vfl", "local")]
            total = sum(loss.double() for part in losses for loss in part.values())
            return torch.autograd.grad(total, list(leaves.values()))

    for what, got, eager, truth in zip(
        LEAVES,
        run(True, lambda x: x),
        run(False, lambda x: x),
        run(False, to_double),
        strict=True,
    ):
        assert got.dtype == torch.bfloat16
        assert_no_worse(got, truth, eager, what=what)


# ---- the decode layer


@pytest.mark.parametrize("name", ["d_fine.modeling_d_fine.DFine", "deimv2.modeling_deimv2.Deimv2"])
def test_integral(transformers, name):
    module, _, kind = name.rpartition(".")
    layer = getattr(import_module(f"transformers.models.{module}"), f"{kind}Integral")(CONFIG)
    x = logits(2, QUERIES, 4 * BINS, extremes=False)
    values = torch.linspace(-2, 2, BINS) ** 3
    eager, truth = layer(x, values), layer(x.double(), values.double())
    exported = torch.export.export(layer, (x, values)).graph_module.code
    with accelerate("transformers"):
        assert_no_worse(layer(x, values), truth, eager, what="distances")
        assert layer(x.half(), values).dtype == torch.half
        assert torch.export.export(layer, (x, values)).graph_module.code == exported
