"""Prompt statistics that a site discloses for routing: number of prompts, mean and covariance of their features.

The numbers are of prompt features (`fedmoe.models.prompt_features`), vectors of d numbers. They come in two halves, of
different samples: a router fitted to one half is checked on the other, so that its probabilities are honest although no
single prompt's features ever leave the site. Statistics of several sites add up to those of all their prompts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmoe.lora.adapter import Float64Array, FloatMatrix, FloatVector, ShapeError, read_only
from fedmoe.lora.safetensors_bytes import (
    Buffer,
    MismatchError,
    encode_named,
    read_header,
    read_named,
    shown,
    whole_numbers,
)

#: Directions of the covariance that are kept; the rest of it is kept as a diagonal. 64 route as well as all (SmolLM2, 3
#: to 12 domains), take 2 MB at d = 3,584, and tell much less about single prompts.
DIRECTIONS = 64

_KIND = "fedmoe-prompt-statistics"
#: What the features are; raised when routers could no longer compare older ones. 1 was the state at one depth.
_VERSION = "2"
_HALVES, _PARTS = ("first", "second"), ("mean", "spread", "rest")
# Directions with less than this share of the largest variance are rounding noise of float32 features.
_RELATIVE_FLOOR = 1e-12


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Mean and covariance of the features of `count` samples: `mean` (d,), `spread` (k, d), `rest` (d,), float32.

    The covariance, a mean of squares, is spread' spread + diag(rest). The rows of `spread` are orthogonal, at least one
    (of zeros where nothing spreads) and at most `DIRECTIONS` and d. Raises `ShapeError` for shapes that do not fit and
    `ValueError` for numbers that no covariance has.
    """

    count: int
    mean: FloatVector
    spread: FloatMatrix
    rest: FloatVector

    def __post_init__(self) -> None:
        for name, values in zip(_PARTS, (self.mean, self.spread, self.rest), strict=True):
            if values.dtype != np.float32:
                raise ShapeError(f"{name} must be float32, got {values.dtype}")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} holds a NaN or an infinity; leave out the prompt that made it")
            object.__setattr__(self, name, read_only(values))
        shapes = self.mean.shape, self.spread.shape, self.rest.shape
        width, most = self.mean.size, min(DIRECTIONS, self.mean.size)
        rows = self.spread.shape[0] if self.spread.ndim else 0
        if shapes != ((width,), (rows, width), (width,)) or not 1 <= rows <= most:
            raise ShapeError(f"mean (d,), spread (1 to {most}, d) and rest (d,) are needed, got shapes {shapes}")
        if self.count < 1 or (self.rest < 0).any():
            raise ValueError(
                f"at least one sample and no negative variance are needed, got {self.count} and {self.rest.min():g}"
            )

    @property
    def width(self) -> int:
        """d, the features of one prompt."""
        return len(self.mean)

    @classmethod
    def of(cls, features: FloatMatrix, count: int) -> FeatureMoments:
        """The moments of rows (n, d) that are from `count` different samples."""
        wide = features.astype(np.float64)
        mean = wide.mean(axis=0)
        return cls._made(count, mean, (wide - mean) / np.sqrt(len(wide)), np.zeros_like(mean))

    @classmethod
    def add(cls, parts: Sequence[FeatureMoments]) -> FeatureMoments:
        """Those of all samples of all parts (law of total covariance); raises `ShapeError` for different widths."""
        widths = {part.width for part in parts}
        if len(widths) != 1:
            raise ShapeError(f"features to add have widths {sorted(widths)}; one width, of one base model, is needed")
        count = sum(part.count for part in parts)
        shares = np.array([part.count / count for part in parts])
        roots = np.sqrt(shares)
        means = np.stack([part.mean for part in parts]).astype(np.float64)
        mean = shares @ means
        within = [root * part.spread.astype(np.float64) for root, part in zip(roots, parts, strict=True)]
        rest = shares @ np.stack([part.rest for part in parts]).astype(np.float64)
        return cls._made(count, mean, np.concatenate([*within, roots[:, None] * (means - mean)]), rest)

    @classmethod
    def _made(cls, count: int, mean: Float64Array, rows: Float64Array, rest: Float64Array) -> FeatureMoments:
        directions = orthogonal_rows(rows)
        main, minor = directions[:DIRECTIONS], directions[DIRECTIONS:]
        rest = rest + np.square(minor).sum(axis=0)
        return cls(count, mean.astype(np.float32), main.astype(np.float32), rest.astype(np.float32))


@dataclass(frozen=True, eq=False)
class PromptStatistics:
    """The moments of two halves of one expert's samples; raises `ShapeError` for halves of different width."""

    first: FeatureMoments
    second: FeatureMoments

    def __post_init__(self) -> None:
        if self.first.width != self.second.width:
            raise ShapeError(f"the halves have features of width {self.first.width} and {self.second.width}")

    @property
    def count(self) -> int:
        """Samples in both halves."""
        return self.first.count + self.second.count

    @property
    def width(self) -> int:
        """d, the features of one prompt."""
        return self.first.width

    def together(self) -> FeatureMoments:
        """The moments of both halves."""
        return FeatureMoments.add([self.first, self.second])

    @classmethod
    def of(cls, features: FloatMatrix, samples: Sequence[int] | None = None) -> PromptStatistics:
        """The statistics of prompt features (n, d); `samples[i]` says which sample row i is from, None one each.

        Prompts that are beginnings of one text are one sample and stay in one half: were they in both, the check would
        see what the fit has seen. Samples go to the halves in turn. Raises `ShapeError` for fewer than two samples.
        """
        of_row = np.arange(len(features)) if samples is None else np.asarray(samples)
        if features.ndim != 2 or of_row.shape != features.shape[:1]:
            raise ShapeError(f"every row of features needs its sample, got {features.shape} and {of_row.shape}")
        unique, place = np.unique(of_row, return_inverse=True)
        if len(unique) < 2:
            raise ShapeError(f"two halves need at least two samples, got {len(unique)}")
        halves = [place % 2 == half for half in (0, 1)]
        counts = ((len(unique) + 1) // 2, len(unique) // 2)
        return cls(*(FeatureMoments.of(features[half], count) for half, count in zip(halves, counts, strict=True)))

    def to_bytes(self) -> bytes:
        """As safetensors, the counts in the metadata."""
        tensors: dict[str, NDArray[np.float32]] = {}
        for name, half in zip(_HALVES, (self.first, self.second), strict=True):
            tensors |= {f"{name}.mean": half.mean, f"{name}.spread": half.spread, f"{name}.rest": half.rest}
        metadata = {
            "format": _KIND,
            "version": _VERSION,
            "first": str(self.first.count),
            "second": str(self.second.count),
        }
        return encode_named(tensors, metadata)

    @classmethod
    def from_bytes(cls, body: Buffer) -> PromptStatistics:
        """What `to_bytes` wrote; raises `CodecError`, `ShapeError` or `ValueError` for anything else."""
        entries, metadata, _ = read_header(body)
        if metadata.get("format") != _KIND:
            raise MismatchError("format", f"not prompt statistics: format is {shown([metadata.get('format', '')])}")
        if (version := metadata.get("version", "1")) != _VERSION:
            raise MismatchError(
                "version",
                f"prompt statistics of version {shown([version])} cannot be compared with those of version {_VERSION}; "
                "start the worker with the same fedmoe as the gateway, it sends new ones",
            )
        if entries.keys() != {f"{half}.{part}" for half in _HALVES for part in _PARTS}:
            raise MismatchError("tensor_mismatch", f"each half needs {', '.join(_PARTS)}; got {shown(entries)}")
        halves = zip(_HALVES, whole_numbers(metadata, _HALVES, 15), strict=True)
        tensors = read_named(body)
        return cls(*(FeatureMoments(count, *(tensors[f"{half}.{part}"] for part in _PARTS)) for half, count in halves))


def add_statistics(parts: Sequence[PromptStatistics]) -> PromptStatistics:
    """The statistics of all samples of all parts; raises `ShapeError` for no part or features of different width."""
    if not parts:
        raise ShapeError("there are no statistics to add: at least one part is needed")
    first, second = [part.first for part in parts], [part.second for part in parts]
    return PromptStatistics(FeatureMoments.add(first), FeatureMoments.add(second))


def orthogonal_rows(rows: Float64Array) -> Float64Array:
    """The fewest orthogonal rows, largest first, with the same `rows.T @ rows`: (m, d) -> (k, d), 1 <= k <= min(m, d).

    From the eigenvectors of the smaller Gram matrix; directions below rounding noise are left out.
    """
    wide = rows.shape[0] <= rows.shape[1]
    values, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = np.clip(values[::-1], 0.0, None), vectors[:, ::-1]
    directions = max(1, int(np.count_nonzero(values > _RELATIVE_FLOOR * values[0])))
    if wide:
        return np.asarray(vectors[:, :directions].T @ rows, np.float64)
    return np.asarray(np.sqrt(values[:directions])[:, None] * vectors[:, :directions].T, np.float64)
