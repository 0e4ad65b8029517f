"""What Palu would have learned of a made-up model: random orthonormal directions, and Fisher information that falls from group to group."""

import torch

from rotatek_compile.runtime.before_rope import BeforeRope, Turning
from rotatek_compile.runtime.rivals.palu import Factors, widths_of


def made_factors(geometry, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = widths_of(geometry)
    directions = {place: torch.linalg.qr(torch.randn(width, width, generator=generator)).Q for place, width in widths.items()}
    return Factors(directions, {place: 1 / (1 + n) for n, place in enumerate(widths)})


def made_before(heads, tokens, dim, dtype=torch.float32, seed=0, norm=None):
    """Keys before RoPE [heads, tokens, dim] at positions that are no simple count, as those of M-RoPE are none."""
    generator = torch.Generator().manual_seed(seed)
    angles = torch.randint(0, 90, (tokens, dim // 2), generator=generator).float() * 0.1
    angles = torch.cat([angles, angles], -1)
    keys = torch.randn(heads, tokens, dim, generator=generator).to(dtype)
    return BeforeRope(keys, Turning(angles.cos().to(dtype), angles.sin().to(dtype), norm))
