"""The Triton kernels on a GPU, against float64; skipped without one."""

import pytest
import torch

from kernel_caches import brute_force, random_cache, random_layout, relative_error
from rotatek_compile.kernels import decode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-4}
CASES = [  # G, D, T, dtype
    (1, 64, 1, torch.bfloat16),
    (1, 128, 3, torch.bfloat16),
    (3, 96, 1, torch.bfloat16),
    (4, 128, 1, torch.bfloat16),
    (7, 128, 3, torch.bfloat16),
    (8, 256, 1, torch.bfloat16),
    (8, 128, 8, torch.bfloat16),
    (4, 128, 1, torch.float16),
    (7, 64, 3, torch.float16),
    (4, 96, 1, torch.float32),
    (1, 128, 1, torch.float32),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Torch fills what `torch.empty` returns with NaN, so that nothing unwritten passes for a result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("group", "dim", "new", "dtype"), CASES, ids=[f"G{g}-D{d}-T{t}-{x}".replace("torch.", "") for g, d, t, x in CASES])
def test_ragged(group, dim, new, dtype):
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        layout = random_layout(generator, 3, 2, dim, 2500)
        windows = torch.randint(new, 129, (3,), generator=generator).tolist()
        cache = random_cache(layout, windows, dim, 128, dtype, device="cuda", seed=seed, num_programs=60, full_bases=bool(seed))
        q = torch.randn(3, 2 * group, new, dim, generator=generator).to("cuda", dtype)
        out = decode.decode_attention(q, cache.view, dim**-0.5, two_part_query=seed == 2)
        assert relative_error(out, brute_force(q, cache, dim**-0.5)) < LIMITS[dtype]


@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_every_rank(group):
    layout = [[[("coded", 700 + rank, rank)] for rank in range(0, 136, 8)]]
    cache = random_cache(layout, [77], 128, 128, torch.bfloat16, device="cuda", num_programs=100)
    q = torch.randn(1, 17 * group, 1, 128, device="cuda", dtype=torch.bfloat16)
    assert relative_error(decode.decode_attention(q, cache.view, 128**-0.5), brute_force(q, cache, 128**-0.5)) < 1e-2
