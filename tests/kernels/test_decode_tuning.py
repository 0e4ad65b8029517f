"""The tuning table: which row a GPU gets, and what is guessed for one without."""

from types import SimpleNamespace

import pytest
import torch

from rotatek_compile.kernels import decode, decode_tuning, table
from rotatek_compile.kernels.decode_tuning import H100, Tuning, guessed, tuning_of
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.kernels.splits import plan_splits, programs_for

BOTH = frozenset({(False, False)})


def gpu(name, **known):
    return SimpleNamespace(name=name, multi_processor_count=132, **known)


@pytest.fixture
def on(monkeypatch):
    """Settings of a GPU with these properties."""

    def found(properties):
        tuning_of.cache_clear()
        decode._choice.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return tuning_of(torch.device("cuda", 0))

    yield found
    tuning_of.cache_clear()
    decode._choice.cache_clear()


def test_rows_by_name(on, monkeypatch):
    monkeypatch.setitem(decode_tuning.ROWS, "NVIDIA H100 NVL", Tuning(programs=5))
    assert on(gpu("NVIDIA H100 80GB HBM3")) is H100
    assert on(gpu("NVIDIA H100 NVL")).programs == 5  # the longest beginning
    assert tuning_of(torch.device("cpu")) is H100


def test_guesses(on):
    """More bytes for each instruction where memory is faster; what the driver does not say is as on an H100."""
    assert on(gpu("Some GPU")) == H100
    speed = {"clock_rate": 1755000, "memory_bus_width": 5120, "memory_clock_rate": round(3.35e12 / 5120 * 8 / 2e3)}
    assert on(gpu("Some GPU", **speed)) == H100
    faster = guessed(gpu("Some GPU", **speed | {"memory_clock_rate": 2 * speed["memory_clock_rate"]}))
    assert (faster.softmax, faster.byte, faster.nibble) == pytest.approx((56, 1.04, 1.8), rel=1e-3) and faster.stages == 3
    small = guessed(gpu("Some GPU", shared_memory_per_multiprocessor=100 << 10, regs_per_multiprocessor=1 << 15))
    assert (small.stages, small.few_registers, small.softmax) == (2, None, 28)
    assert on(gpu("Some GPU", shared_memory_per_multiprocessor=100 << 10)).many_registers == 168
    chosen, _ = decode._choice(Slabs(0, 0, 32), Slabs(0, 0, 64), BOTH, 128, 2, 8, torch.device("cuda", 0))
    assert chosen == decode.Config(128, 2, 32, 2, 4, True, 128)


def test_settings_reach_the_plan_and_the_kernel():
    codes = torch.zeros(1, 2, 1, table.FIELDS, dtype=torch.int64)
    codes[..., table.KIND], codes[..., table.LENGTH] = int(table.Kind.CODED), 8192
    codes[..., table.KEY + table.NIBBLE], codes[..., table.VALUE + table.NIBBLE] = torch.tensor([[16], [48]]), torch.tensor([[32], [96]])
    assert programs_for(codes, 100, Tuning(coded_programs=7)) == 700
    assert programs_for(codes, 2, Tuning(filled_programs=5)) == 10
    bound, read = (  # by instructions, the same for both heads; by their own bytes, 24 and 72, in splits of whole tiles
        plan_splits(codes, window_capacity=0, head_dim=128, num_programs=32, tuning=tuning).ranges.diff().tolist()
        for tuning in (H100, Tuning(softmax=0.0, nibble=0.0))
    )
    assert bound == [16, 16] and read == [8, 22]
    eight = codes.clone()
    eight[..., table.KEY + table.NIBBLE], eight[..., table.VALUE + table.NIBBLE] = 0, 0
    eight[..., table.KEY + table.BYTE] = torch.tensor([[16], [48]])
    by_bytes, by_tiles = (
        plan_splits(eight, window_capacity=0, head_dim=128, num_programs=32, tuning=Tuning(softmax=0.0, byte=byte)) for byte in (0.0, 9.0)
    )
    assert (by_bytes.ranges.diff().tolist(), by_tiles.ranges.diff().tolist()) == ([8, 22], [16, 16])
    widths = decode.Widths.of(Slabs(0, 0, 32), Slabs(0, 0, 64), BOTH)
    assert decode.config(widths, 128, 2) == decode.Config(128, 3, 32, 2, 4, True, 128)
    changed = decode.config(widths, 128, 2, tuning=Tuning(stages=2, large_tile=40, few_registers=96))
    assert changed == decode.Config(64, 2, 32, 2, 4, True, 96)
    wide_one = decode.config(decode.Widths.of(Slabs(0, 64), Slabs(0, 128), BOTH), 128, 2, tuning=Tuning(many_registers=None))
    assert wide_one.registers is None and wide_one.apart
