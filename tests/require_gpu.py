"""``require_gpu.py TARGET [PROGRAM ...]``: stops a make target in one line where there is no GPU,
or a program is missing that it needs.
"""

import shutil
import sys

import torch

target, *programs = sys.argv[1:]
if not torch.cuda.is_available():
    built = torch.version.cuda or torch.version.hip
    sys.exit(
        f"make {target} needs a CUDA or ROCm GPU: torch {torch.__version__} "
        + ("finds none on this machine" if built else "was built for the CPU alone")
    )
for program in programs:
    if shutil.which(program) is None:
        sys.exit(f"make {target} needs {program}, which is not on the PATH")
