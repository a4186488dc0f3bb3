"""Each op of the installed native library against the reference, without pytest.

    python tests/smoke.py [--built-against 2.13.0] [--through C++]

For installations that have nothing but torch: the library of one torch loaded under another, or a
wheel in a fresh environment. The tests proper are the test_*.py files.
"""

import argparse

import torch

import gfl_kernels
from gfl_kernels import native, reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def cases(dtype):
    """(name, arguments) of every public function; the first argument is differentiated."""
    logits = torch.randn(33, 7, dtype=torch.float64).to(dtype)
    bins = (3 * torch.randn(33, 17, dtype=torch.float64)).to(dtype)
    label, score = torch.randint(0, 8, (33,)), torch.rand(33)
    dense, position = torch.rand(33, 7), 16 * torch.rand(33)
    left, fraction = position.floor().clamp(max=15).long(), torch.rand(33)
    yield "quality_focal_loss", (logits, (label, score)), {}
    yield "quality_focal_loss", (logits, (label, score)), {"beta": 1.5, "reduction": "none"}
    yield "quality_focal_loss", (logits, dense), {"avg_factor": 5.0}
    yield "quality_focal_loss", (logits.sigmoid(), (label, score)), {"activated": True}
    yield "distribution_focal_loss", (bins, position), {}
    yield "distribution_focal_loss", (bins, (left, 1 - fraction, fraction)), {"reduction": "sum"}
    yield "integral", (bins,), {}
    yield "integral", (bins,), {"bins": torch.linspace(-1.0, 1.0, 17)}
    yield "integral", (bins,), {"mode": "peak"}
    yield "distribution_statistics", (bins,), {}
    yield "localization_distillation_loss", (bins, bins.flip(1)), {}


def value_and_grad(function, args, options, upstream):
    leaf = args[0].detach().clone().requires_grad_()
    value = function(leaf, *args[1:], **options)
    value.backward(upstream.to(value.dtype).expand(value.shape))
    return value.detach().double(), leaf.grad.double()


def as_double(arg):
    if isinstance(arg, tuple):
        return tuple(as_double(a) for a in arg)
    if isinstance(arg, dict):
        return {key: as_double(a) for key, a in arg.items()}
    return arg.double() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--built-against", help="the torch version the library must come from")
    parser.add_argument("--through", choices=["C++", "Python"], help="how calls must get there")
    options = parser.parse_args()
    info = native.build_info()
    why_not = native.autograd_why_not()
    if options.through and options.through != ("C++" if why_not is None else "Python"):
        raise SystemExit(f"calls should reach the kernels through {options.through}: {why_not}")
    if options.built_against and options.built_against not in str(info):
        raise SystemExit(f"the library was not built against torch {options.built_against}: {info}")
    if info["cuda_architectures"]:
        # Loaded is what it can be without a GPU: the CUDA implementations are there.
        for op in ("quality_forward", "distribution_forward", "integral_backward"):
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"gfl_native::{op}", "CUDA"):
                raise SystemExit(f"the library has not registered {op} for CUDA")
        print(f"cuda kernels for {info['cuda_architectures']}: {gfl_kernels.backends()['cuda']}")
    torch.manual_seed(0)
    checked = 0
    with gfl_kernels.use_backend("cpu"):
        for dtype, tolerance in TOLERANCE.items():
            for name, args, kwargs in cases(dtype):
                upstream = torch.rand((), dtype=torch.float64) + 0.5
                got = value_and_grad(getattr(gfl_kernels, name), args, kwargs, upstream)
                oracle = getattr(reference, name)
                truth = value_and_grad(oracle, as_double(args), as_double(kwargs), upstream)
                for what, g, t in zip(("value", "gradient"), got, truth, strict=True):
                    worst = ((g - t).abs() / (t.abs() + t.abs().mean() + 1e-3)).max().item()
                    if not worst <= tolerance:
                        raise SystemExit(f"{name} {kwargs} {dtype}: {what} is off by {worst:.2g}")
                    checked += 1
    print(
        f"gfl_kernels {gfl_kernels.__version__} in {gfl_kernels.__path__[0]}, built with {info},\n"
        f"running under torch {torch.__version__} on {native.cpu_isa()} of "
        f"{native.available_isas()}: "
        f"{checked} values and gradients agree with the reference"
    )
    print(f"calls through Python: {why_not}" if why_not else "calls through C++")


if __name__ == "__main__":
    main()
