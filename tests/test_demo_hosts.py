"""The demos and the benchmark on real hosts: a few steps of each, from end to end."""

import json

import pytest
import torch

for name in ("matplotlib", "pycocotools", "rich", "sklearn", "torchvision"):
    pytest.importorskip(name, reason=f"the demo needs {name} (extra: bench)")
pytest.importorskip("bench", reason="bench is found from the repository root: python -m pytest")

from bench import hosts, train_hosts  # noqa: E402
from bench.train_digits import Size  # noqa: E402
from gfl_kernels import dispatch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.slow
@pytest.mark.parametrize("host", ["mmdet", "ultralytics"])
def test_a_short_demo_from_end_to_end(host, request, tmp_path, monkeypatch):
    request.getfixturevalue(host)
    monkeypatch.setattr(train_hosts, "QUICK", Size(steps=3, batch_size=2, scenes=6, held_out=2))
    chosen, choose = [], dispatch.choose

    def note(*args, **kwargs):
        chosen.append(choose(*args, **kwargs))
        return chosen[-1]

    monkeypatch.setattr(dispatch, "choose", note)
    threads = torch.get_num_threads()
    try:
        assert train_hosts.main([host, "--quick", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    report = json.loads((tmp_path / f"train_{host}.json").read_text())
    assert (tmp_path / f"train_{host}.png").read_bytes().startswith(b"\x89PNG")
    plain, ours, control = report["runs"].values()
    assert len(plain["curve"]) == len(ours["curve"]) == 3
    assert set(chosen) == {"cpu"}, "a run was not on the kernels"
    # Before rounding has had time to grow
    assert abs(ours["curve"][0] / plain["curve"][0] - 1) < 1e-6
    for run in (plain, ours, control):
        times = run["milliseconds"]
        assert 0 < times["after targets"] < times["loss stage"] < times["step"]
        assert run["peak_of_loss"] > 0


def test_the_demo_judges():
    def run(first, rms):
        return {"first": first, "distance_from_host": {"rms": rms}}

    plain, good = run(0.0, 0.0), run(1e-6, 1e-3)
    assert train_hosts.judge(plain, good, good) == []
    assert "first 20" in train_hosts.judge(plain, run(2e-4, 1e-3), good)[0]
    assert "rms" in train_hosts.judge(plain, run(1e-6, 3e-3), good)[0]
    assert "nan" in train_hosts.judge(plain, run(float("nan"), 1e-3), good)[0]
    assert "bit-identical" in train_hosts.judge(plain, good, plain)[0]


def test_the_benchmark_checks_what_it_times(mmdet, ultralytics):
    for host in (hosts.mmdet(size=(64, 96), positives=20), hosts.ultralytics(64, 2, objects=2)):
        hosts.check(host)
        for from_targets in (True, False):
            samples = hosts.measure(host, rounds=1, seconds=0.01, from_targets=from_targets)
            assert all(0 < sample.seconds[0] < 10 for sample in samples.values())
        host.calls["gfl_kernels"] = lambda *leaves: sum(leaf.sum() for leaf in leaves)
        with pytest.raises(hosts.WrongResult, match="result 0 is off by"):
            hosts.check(host)
