"""The Triton kernels on a GPU, against float64; skipped without one. Most of the time is compiling: a kernel per case."""

import dataclasses

import pytest
import torch

from kernel_caches import Coded, Segment, brute_force, random_cache, random_layout, relative_error
from rotatek_compile.kernels import decode, decode_ops
from rotatek_compile.kernels.decode_torch import decode_attention_torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-4}
CASES = [  # G, D, T, dtype
    (1, 64, 1, torch.bfloat16),
    (4, 128, 1, torch.bfloat16),
    (3, 96, 1, torch.bfloat16),
    (7, 128, 3, torch.bfloat16),
    (8, 256, 1, torch.bfloat16),
    (8, 128, 4, torch.bfloat16),
    (4, 128, 3, torch.bfloat16),
    (8, 128, 2, torch.float16),
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


def check(cache, group, new, dim, dtype, **options):
    view = cache.view
    generator = torch.Generator("cuda").manual_seed(7)
    shape = (view.batch_size, view.num_kv_heads * group, new, dim)
    q = torch.randn(shape, generator=generator, device="cuda").to(dtype)
    expected = brute_force(q, cache, dim**-0.5)
    assert relative_error(decode.decode_attention(q, view, dim**-0.5, **options), expected) < LIMITS[dtype]
    assert relative_error(decode_attention_torch(q, view, dim**-0.5), expected) < LIMITS[dtype]


@pytest.mark.parametrize(("group", "dim", "new", "dtype"), CASES, ids=[f"G{g}-D{d}-T{t}-{x}".replace("torch.", "") for g, d, t, x in CASES])
def test_ragged(group, dim, new, dtype):
    """Every pair of raw and coded sides, own bases and means, other slabs for every row and head."""
    generator = torch.Generator().manual_seed(group)
    layout = random_layout(generator, 3, 2, min(dim, 64), 2500)
    windows = torch.randint(new, 129, (3,), generator=generator).tolist()
    cache = random_cache(layout, windows, dim, 128, dtype, device="cuda", num_programs=60, full_bases=dim == 128)
    check(cache, group, new, dim, dtype, two_part_query=group % 2 == 0)


@pytest.mark.parametrize("group", [1, 4, 8])
def test_native_keys_of_every_rank(group):
    layout = [[[Segment(700 + rank, Coded(rank), None)] for rank in range(0, 136, 8)]]
    check(random_cache(layout, [77], 128, 128, torch.bfloat16, device="cuda", num_programs=100), group, 1, 128, torch.bfloat16)


def test_64_rows():
    """Numbers take 64 query rows, codes do not: `decode.MAX_CODED_ROWS`."""
    layout = [[[Segment(700 + rank, Coded(rank), None)] for rank in range(0, 136, 32)]]
    check(random_cache(layout, [77], 128, 128, torch.bfloat16, device="cuda", num_programs=100), 8, 8, 128, torch.bfloat16)


@pytest.mark.parametrize(
    "kept", [Coded(0, 64), Coded(0, 128), Coded(0, 0, 32), Coded(0, 0, 128), Coded(0, 16, 48), Coded(16, 24, 64)], ids=str
)
@pytest.mark.parametrize("two_part", [False, True])
def test_codes_of_every_precision(kept, two_part):
    layout = [[[Segment(length, kept, kept)] for length in (1, 63, 64, 65, 1000, 4097)]]
    cache = random_cache(layout, [5], 128, 128, torch.bfloat16, device="cuda", num_programs=100)
    check(cache, 4, 1, 128, torch.bfloat16, two_part_query=two_part)


@pytest.mark.parametrize(("group", "new"), [(1, 1), (7, 1), (8, 2)])
def test_warps_apart_at_every_length(group, new):
    """Whole tiles of 128 tokens, one token more and less, and splits of every kind, with own bases and both means."""
    layout = [[[Segment(length, Coded(0, 0, 48, own_basis=True), Coded(0, 24, 64))] for length in (*range(126, 131), 512, 1300, 5000)]]
    for programs in (1, 300):
        cache = random_cache(layout, [40], 128, 128, torch.bfloat16, device="cuda", num_programs=programs)
        plan = cache.view.splits
        widths = decode.Widths.of(plan.key_widths, plan.value_widths, plan.pairs)
        assert decode.config(widths, 128, 2, 16 if group * new > 8 else 8).apart
        check(cache, group, new, 128, torch.bfloat16)


# of torch 2.11 itself, in what inductor imports; a filter above another one goes before it
@pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("error")
def test_the_operator():
    """Torch's own checks of the operator where it runs the kernel, and the same numbers as the plain call."""
    kept = Coded(0, 0, 32)
    cache = random_cache([[[Segment(300, kept, kept)] for _ in range(2)]], [40], 128, 128, torch.bfloat16, device="cuda", num_programs=20)
    q, keys, values = (torch.randn(1, heads, 1, 128, device="cuda").bfloat16() for heads in (8, 2, 2))
    expected = decode.decode_attention(q, cache.view, 0.1, new=(keys, values))
    assert torch.equal(decode_ops.decode(q, cache.view, 0.1, keys, values), expected)
    step = torch.compile(lambda q: decode_ops.decode(2 * q, cache.view, 0.1, keys, values) + 1, fullgraph=True)
    assert torch.allclose(step(q / 2), expected + 1, atol=1e-2)


@pytest.mark.parametrize("tiles", [None, decode.Config(32, 2, 32, 2)], ids=["apart", "together"])
def test_overflow_of_fp16(tiles):
    """Rotated queries beyond fp16: the softmax picks single tokens."""
    layout = [[[Segment(5 + h, Coded(16, 8, 16), value)] for h, value in enumerate((Coded(16, 8, 16), None))]]
    cache = random_cache(layout, [3], 64, 8, torch.float16, device="cuda")
    view = dataclasses.replace(cache.view, scales=cache.view.scales * 100)
    q = (torch.randn(1, 8, 1, 64, generator=torch.Generator().manual_seed(3)) * 1e4).half().cuda()
    expected = decode_attention_torch(q.double(), view, 1.0)
    assert relative_error(decode.decode_attention(q, view, 1.0, tiles=tiles, two_part_query=True), expected) < LIMITS[torch.float16]


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("kept", [None, Coded(32), Coded(0, 0, 32)], ids=str)
def test_append(kept, new):
    """The kernel writes the newest tokens to the window itself, the same in a CUDA graph, and gives the same result as copies."""
    layout = [[[Segment(1000, kept, kept)] for _ in range(2)] for _ in range(3)]
    cache = random_cache(layout, [300, 65, new], 128, 300, torch.bfloat16, device="cuda", num_programs=50)
    view = cache.view
    q = torch.randn(3, 8, new, 128, device="cuda").bfloat16()
    expected = decode.decode_attention(q, view, 0.1)
    windows = view.window_keys, view.window_values
    whole = [window.clone() for window in windows]
    newest = [torch.stack([w[b, :, n - new : n] for b, n in enumerate(view.window_lengths.tolist())]) for w in windows]

    def spoil():
        for window in windows:
            for b, n in enumerate(view.window_lengths.tolist()):
                window[b, :, n - new : n] = float("nan")

    spoil()
    assert torch.equal(decode.decode_attention(q, view, 0.1, new=tuple(newest)), expected)
    assert all(torch.equal(a.nan_to_num(9), b.nan_to_num(9)) for a, b in zip(windows, whole, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode.decode_attention(q, view, 0.1, new=tuple(newest))
    for _ in range(3):
        spoil()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_nibbles_are_exact(dtype):
    """One token per head, so that its Value comes out as it was coded: every level, in both halves of a byte."""
    for nibble in (16, 32, 128):
        kept = Coded(0, 0, nibble, False, False)
        cache = random_cache([[[Segment(1, Coded(), kept)] for _ in range(16)]], [0], 128, 0, dtype, device="cuda")
        q = torch.zeros(1, 16, 1, 128, device="cuda", dtype=dtype)
        expected = torch.stack([cache.pieces[0][h][0].values[0] for h in range(16)])
        found = decode.decode_attention(q, cache.view, 1.0)[0, :, 0]
        limit = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]  # the output is rounded
        assert relative_error(found, expected) < limit
