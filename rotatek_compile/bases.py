"""Bases: ordered pairs (encode, decode) of [D, D] matrices with encodeᵀ decode = I, per KV head.

A Key k is coded as `(k - mean) @ encode[:, :R]`, a query meets it as `q @ decode[:, :R]`; the logit error is the dropped part
of the sum over directions (DESIGN.md §4.3). All bases are *whitened*: in their coordinates the query second moment they
assume is the identity and the Key covariance is `diag(spectrum)`, so that

    C = decode diag(spectrum) decodeᵀ,    M = encode encodeᵀ,

and the sum of the dropped spectrum is the expected squared logit error. Online corrections are rotations of these coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .names import BASES

MAX_CONDITION = 1e4
RIDGE = 1e-4  # of the mean variance, which the published basis adds to every direction


@dataclass(frozen=True, slots=True)
class Basis:
    """An ordered basis per KV head. encode, decode fp64 [H, D, D]; spectrum fp64 [H, D], descending, >= 0."""

    encode: Tensor
    decode: Tensor
    spectrum: Tensor


def balance(energy: Tensor) -> Tensor:
    """Scale per direction that gives Key codes and rotated queries like size (free to choose, DESIGN.md §4.3).

    In whitened coordinates a direction has query variance 1 and Key variance `energy` [..., R]; scaling codes by
    energy^{-1/4} and queries by its inverse makes both energy^{1/2}, which keeps fp16 codes away from overflow and underflow.
    """
    floor = 1e-6 * energy.amax(-1, keepdim=True).clamp_min(1e-12)
    return energy.maximum(floor) ** -0.25


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, clipped at 0) and eigenvectors (columns) of symmetric [..., D, D] in fp64."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT).double() / 2)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)


def shrink_to_condition(moment: Tensor, max_condition: float = MAX_CONDITION) -> Tensor:
    """Shrink a query second moment [H, D, D] toward its diagonal until its square root has condition <= max_condition.

    `(1 - a) M + a diag(M) + 1e-3 tr(M)/D I` (DESIGN.md §4.3), with the least a of 0.1, 0.2, ... 1 that suffices per head.
    An all-zero moment (a head nobody asked anything) becomes the identity, which makes two-sided equal to pca.
    """
    moment = moment.double()
    dim = moment.shape[-1]
    eye = torch.eye(dim, dtype=moment.dtype, device=moment.device)
    result = []
    for head in moment:
        level = head.diagonal().sum() / dim
        if level <= 0:
            result.append(eye.clone())
            continue
        for step in range(1, 11):
            a = step / 10
            candidate = (1 - a) * head + a * torch.diag(head.diagonal()) + 1e-3 * level * eye
            values = torch.linalg.eigvalsh(candidate)
            if values[0] > 0 and (values[-1] / values[0]).sqrt() <= max_condition:
                break
        result.append(candidate)
    return torch.stack(result)


def two_sided(covariance: Tensor, moment: Tensor) -> Basis:
    """The basis of least expected squared logit error at every rank (KQ-SVD, 2512.05916, in second moments).

    With W = M^{1/2} and U the eigenvectors of W C Wᵀ: encode = Wᵀ U, decode = W^{-1} U.

    Args:
        covariance: Key covariance C [H, D, D].
        moment: query second moment M [H, D, D], summed over the group, scaling² included.
    """
    values, vectors = symmetric_eigen(shrink_to_condition(moment))
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    inverse = (vectors / values.sqrt().unsqueeze(-2)) @ vectors.mT
    spectrum, directions = symmetric_eigen(root @ covariance.double() @ root)
    return Basis(root @ directions, inverse @ directions, spectrum)


def pca(covariance: Tensor) -> Basis:
    """Eigenvectors of the Key covariance [H, D, D]: least Key error, blind to what the queries look at."""
    spectrum, directions = symmetric_eigen(covariance)
    return Basis(directions, directions.clone(), spectrum)


def paper(covariance: Tensor, query_norms: Tensor) -> Basis:
    """RotateK as published (2605.19218, §1.1 of notes/systems.md): orthogonal eigenvectors of diag(n) C diag(n).

    The published code weights the covariance but projects the unweighted Key, so the spectrum is of the weighted matrix and
    does not measure the logit error.

    Args:
        covariance: Key covariance [H, D, D].
        query_norms: norms n per channel [H, D]; floored at 1e-3 of their median, as published.
    """
    norms = query_norms.double()
    norms = norms.clamp_min(1e-12).maximum(1e-3 * norms.median(-1, keepdim=True).values)
    weighted = covariance.double() * norms.unsqueeze(-1) * norms.unsqueeze(-2)
    ridge = RIDGE * weighted.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(weighted.shape[-1], dtype=weighted.dtype, device=weighted.device)
    spectrum, directions = symmetric_eigen(weighted + ridge[:, None, None] * eye)
    return Basis(directions, directions.clone(), spectrum)


def calibrated_basis(name: str, covariance: Tensor, moment: Tensor) -> Basis:
    """The basis that goes into an artifact, by name (see `BASES`); shapes as in `two_sided`."""
    if name == "two-sided":
        return two_sided(covariance, moment)
    if name == "pca":
        return pca(covariance)
    if name == "paper":
        return paper(covariance, moment.double().diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt())
    raise ValueError(f"unknown basis {name!r}, expected one of {', '.join(BASES)}")
