"""Random data that does not depend on which tests ran before."""

import zlib

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _seeded(request):
    rng = getattr(request.module, "rng", None)
    if rng is not None:
        seed = zlib.crc32(request.node.name.encode())
        rng.bit_generator.state = np.random.default_rng(seed).bit_generator.state
    if hasattr(request.module, "torch"):
        request.module.torch.manual_seed(0)
