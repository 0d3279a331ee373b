"""Input moments: second moments of what goes into the adapted modules, which a site discloses for better merges.

For inputs x of one module, G = mean of w x x' (n x n, n = in_features) is too large to keep or send; w says how much
the loss cares for this input (`models/input_moments.py`), in any unit. A site keeps G's diagonal and a sketch
G @ Omega (n x q) instead, both of which add up batch by batch. Omega is drawn from a seed and the module's name, so
every site has the same and sketches can be averaged. From these numbers `approximate` rebuilds G as a low-rank part
plus a diagonal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from fedmoe.lora.adapter import Float64Array, FloatArray, FloatMatrix, FloatVector, ShapeError, read_only
from fedmoe.lora.safetensors_bytes import (
    Buffer,
    MismatchError,
    encode_named,
    read_header,
    read_named,
    shown,
    whole_numbers,
)

# Directions in which Omega is a thousandth of what it is in others: their sketch is float32 rounding.
_SOUND = 1e-6
# Triangular matrices up to so many rows are inverted whole.
_SMALL = 96
#: Moments of fewer tokens than this are thin: alone they cost the expert in a merge (`benchmarks/README.md`).
LEAST_TOKENS = 1_024
_KIND = "fedmoe-weighted-input-moments"
_DIAGONAL, _SKETCH = ".diagonal", ".sketch"


def thin(tokens: int) -> str:
    """A warning that moments of so many tokens are thin; empty where they are not."""
    if tokens >= LEAST_TOKENS:
        return ""
    return f"input moments of {tokens:,} tokens only, fewer than {LEAST_TOKENS:,}"


def thin_notes(tokens: Mapping[str, int]) -> tuple[str, ...]:
    """Notes on a merge with thin moments: one for each such expert, in name order; one expert alone needs none."""
    if len(tokens) < 2:
        return ()
    thin_ones = ((name, thin(tokens[name])) for name in sorted(tokens))
    return tuple(f"{name} has {few}; the rest is taken from the mean of all experts'" for name, few in thin_ones if few)


def omega(seed: int, module: str, features: int, columns: int) -> FloatMatrix:
    """The test matrix of one module, (features, columns) float32: signs +1 and -1, the same at every site.

    With `columns == features` it is the identity, so that the sketch is G itself; more columns are refused.
    """
    if seed < 0 or not 1 <= columns <= features:
        raise ValueError(
            f"Omega of {module!r} needs a seed of at least 0 and 1 to {features} columns, got {seed} and {columns}"
        )
    if columns == features:
        return np.eye(features, dtype=np.float32)
    key = hashlib.sha256(f"{seed}:{module}".encode()).digest()
    count = features * columns
    # numpy promises the same raw bits in every version; of its normal numbers it does not.
    words = np.random.PCG64(int.from_bytes(key, "little")).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=count)
    return (bits.astype(np.float32) * 2 - 1).reshape(features, columns)


@dataclass(frozen=True, eq=False)
class ModuleMoments:
    """One module's moments: `diagonal` (n,) is the mean of w x^2, `sketch` (n, q) is G @ Omega; float32, read-only.

    q = n means that the sketch is G itself. Raises `ShapeError` for other shapes or types and `ValueError` for numbers
    that no G can have.
    """

    diagonal: FloatVector
    sketch: FloatMatrix

    def __post_init__(self) -> None:
        for name, values, dimensions in (("diagonal", self.diagonal, 1), ("sketch", self.sketch, 2)):
            if values.dtype != np.float32 or values.ndim != dimensions:
                raise ShapeError(
                    f"the {name} must be float32 with {dimensions} axes, got {values.dtype} {values.shape}"
                )
            if not np.isfinite(values).all():
                raise ValueError(f"the {name} holds a NaN or an infinity; leave out the batch that made it")
            object.__setattr__(self, name, read_only(values))
        if self.sketch.shape[0] != self.features or not 1 <= self.columns <= self.features:
            raise ShapeError(
                f"a sketch for {self.features} features has that many rows and at most as many columns, "
                f"got {self.sketch.shape}"
            )
        if (self.diagonal < 0).any():
            raise ValueError(f"the diagonal is a mean of squares, its least number is {self.diagonal.min():g}")

    @property
    def features(self) -> int:
        """n, the module's in_features."""
        return len(self.diagonal)

    @property
    def columns(self) -> int:
        """q, the columns of the sketch."""
        return int(self.sketch.shape[1])


@dataclass(frozen=True, eq=False)
class Gram:
    """A positive semidefinite matrix F F' + diag(d): `factor` F (n, k) and `diagonal` d (n,) >= 0, float64."""

    factor: Float64Array
    diagonal: Float64Array

    @property
    def features(self) -> int:
        """n, rows and columns of the matrix."""
        return len(self.diagonal)

    def rows(self, left: Float64Array) -> Float64Array:
        """left @ G for `left` (m, n); no n x n matrix is formed."""
        return (left @ self.factor) @ self.factor.T + left * self.diagonal

    def between(self, left: Float64Array) -> Float64Array:
        """left @ G @ left' for `left` (m, n)."""
        seen = left @ self.factor
        return np.asarray(seen @ seen.T + (left * self.diagonal) @ left.T, np.float64)

    @cached_property
    def full_diagonal(self) -> Float64Array:
        """The diagonal of the whole matrix, (n,)."""
        squares: Float64Array = np.einsum("ij,ij->i", self.factor, self.factor)
        return squares + self.diagonal

    def dense(self) -> Float64Array:
        """The n x n matrix, for small n."""
        return self.factor @ self.factor.T + np.diag(self.diagonal)

    def plus(self, ridge: float) -> Gram:
        """G + ridge I."""
        return Gram(self.factor, self.diagonal + ridge)

    def solve(self, left: Float64Array) -> Float64Array:
        """left @ G^-1 for `left` (m, n); every number of `diagonal` must be above 0.

        By Woodbury's identity through a k x k matrix; where k >= n the n x n matrix is the smaller one.
        """
        return Inverse.of(self).rows(left)


@dataclass(frozen=True, eq=False)
class Inverse:
    """G^-1 of a `Gram` with d > 0: `root` is d^(1/2) and `half` F / root, or both None; L^-1 inverts the inner matrix.

    The inner matrix L L' is I + half' half (k x k), or G itself where k >= n.
    """

    root: Float64Array | None
    half: Float64Array | None
    lower: Float64Array

    @classmethod
    def of(cls, gram: Gram) -> Inverse:
        if gram.factor.shape[1] >= gram.features:
            return cls(None, None, _inverse_of_lower(_lower(gram.dense())))
        root = np.sqrt(gram.diagonal)
        half = gram.factor / root[:, None]
        # A matrix times its own transpose: numpy takes the symmetric product, which is half the work.
        inner = half.T @ half
        inner[np.diag_indices_from(inner)] += 1.0
        return cls(root, half, _inverse_of_lower(_lower(inner)))

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return sum(part.nbytes for part in (self.root, self.half, self.lower) if part is not None)

    def rows(self, left: Float64Array) -> Float64Array:
        """left @ G^-1 for `left` (m, n)."""
        if self.root is None or self.half is None:
            return (left @ self.lower.T) @ self.lower
        halved = left / self.root
        inner = ((halved @ self.half) @ self.lower.T) @ self.lower
        return np.asarray((halved - inner @ self.half.T) / self.root, np.float64)


def _lower(matrix: Float64Array) -> Float64Array:
    return np.asarray(np.linalg.cholesky(matrix), np.float64)


def _inverse_of_lower(lower: Float64Array) -> Float64Array:
    """L^-1 of a lower triangular matrix, by halves: numpy alone has no triangular solver."""
    size = len(lower)
    if size <= _SMALL:
        return np.asarray(np.tril(np.linalg.inv(lower)), np.float64)
    cut = size // 2
    first, last = _inverse_of_lower(lower[:cut, :cut]), _inverse_of_lower(lower[cut:, cut:])
    inverse = np.zeros_like(lower)
    inverse[:cut, :cut], inverse[cut:, cut:] = first, last
    inverse[cut:, :cut] = -(last @ (lower[cut:, :cut] @ first))
    return inverse


def pad_thin_grams(grams: Sequence[Gram], tokens: Sequence[int]) -> list[Gram]:
    """The matrices of several experts, those of few tokens padded to `LEAST_TOKENS` with the mean of all.

    In a merge, inputs that an expert's few tokens happen not to hold would count as no expert's, and go to the others:
    so what is missing is taken to look like all experts' inputs together, each matrix of one mean diagonal.
    """
    if len(grams) == 1 or min(tokens) >= LEAST_TOKENS:
        return list(grams)
    sizes = [float(gram.full_diagonal.mean()) for gram in grams]
    heard = [(1.0 / size, gram) for size, gram in zip(sizes, grams, strict=True) if size > 0]
    filled = []
    for gram, size, count in zip(grams, sizes, tokens, strict=True):
        share = min(1.0, count / LEAST_TOKENS)
        missing = (1.0 - share) * size / max(1, len(heard))
        parts = [(share, gram), *((missing * weight, other) for weight, other in heard)]
        filled.append(sum_of_grams(parts) if missing > 0 else gram)
    return filled


def sum_of_grams(terms: Sequence[tuple[float, Gram]]) -> Gram:
    """sum_i w_i G_i for weights w_i >= 0; the factors are laid side by side."""
    ends = np.cumsum([gram.factor.shape[1] for _, gram in terms])
    factor = np.empty((terms[0][1].features, ends[-1]))
    for end, (weight, gram) in zip(ends, terms, strict=True):
        np.multiply(gram.factor, np.sqrt(weight), out=factor[:, end - gram.factor.shape[1] : end])
    return Gram(factor, np.sum([weight * gram.diagonal for weight, gram in terms], axis=0))


@dataclass(frozen=True, eq=False)
class InputMoments:
    """The moments of every adapted module over `tokens` inputs, with the seed that Omega was drawn from."""

    modules: Mapping[str, ModuleMoments]
    tokens: int
    seed: int

    def __post_init__(self) -> None:
        if not self.modules:
            raise ShapeError("moments need at least one module, got none")
        if self.tokens < 1 or self.seed < 0:
            raise ValueError(f"moments need tokens >= 1 and a seed >= 0, got {self.tokens} and {self.seed}")
        object.__setattr__(self, "modules", {name: self.modules[name] for name in sorted(self.modules)})

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Modules by what goes into them: query, key and value of a layer have one input, so do gate and up.

        Equal inputs have diagonals that are equal to the bit. Their sketches differ, because Omega does.
        """
        groups: dict[bytes, list[str]] = {}
        for name, module in self.modules.items():
            groups.setdefault(module.diagonal.tobytes(), []).append(name)
        return tuple(map(tuple, groups.values()))

    @cached_property
    def group_of(self) -> Mapping[str, tuple[str, ...]]:
        """Module -> the modules with the same input, itself among them."""
        return {name: group for group in self.groups for name in group}

    def approximate(self, module: str) -> Gram:
        """G of one module, rebuilt from the diagonal and the sketches of all modules with the same input.

        Raises `KeyError` for a module that is not there.
        """
        group = {name: self.modules[name] for name in self.group_of[module]}
        whole = [name for name, alike in group.items() if alike.columns == alike.features]
        if whole:
            group = {whole[0]: group[whole[0]]}
        tests = tuple((name, alike.features, alike.columns) for name, alike in group.items())
        sketches = np.hstack([alike.sketch for alike in group.values()])
        return nystrom(self.modules[module].diagonal, sketches, _omega_basis(self.seed, tests))

    def to_bytes(self) -> bytes:
        """As safetensors: `<module>.diagonal` and `<module>.sketch`; tokens and seed are in the metadata."""
        tensors: dict[str, FloatArray] = {}
        for name, module in self.modules.items():
            tensors |= {name + _DIAGONAL: module.diagonal, name + _SKETCH: module.sketch}
        return encode_named(tensors, {"format": _KIND, "tokens": str(self.tokens), "seed": str(self.seed)})

    @classmethod
    def from_bytes(cls, body: Buffer) -> InputMoments:
        """What `to_bytes` wrote; raises `MalformedError`, `MismatchError`, `ShapeError` or `ValueError`."""
        _, metadata, _ = read_header(body)
        if metadata.get("format") != _KIND:
            raise MismatchError("format", f"not a file of input moments: format is {metadata.get('format')!r}")
        tokens, seed = whole_numbers(metadata, ("tokens", "seed"), 19)
        tensors = read_named(body)
        names = sorted({name.rpartition(".")[0] for name in tensors})
        expected = {name + part for name in names for part in (_DIAGONAL, _SKETCH)}
        if tensors.keys() != expected:
            odd = sorted(tensors.keys() ^ expected)
            raise MismatchError("tensor_mismatch", f"every module needs a diagonal and a sketch; see {shown(odd)}")
        modules = {name: ModuleMoments(tensors[name + _DIAGONAL], tensors[name + _SKETCH]) for name in names}
        return cls(modules, tokens, seed)


@dataclass(frozen=True, eq=False)
class OmegaBasis:
    """Omega made orthonormal: `basis` = Omega @ `mix` (n, c), without directions that are rounding."""

    basis: Float64Array
    mix: Float64Array

    @classmethod
    def of(cls, test: FloatMatrix) -> OmegaBasis:
        wide = test.astype(np.float64)
        sizes, mix = np.linalg.eigh(wide.T @ wide)
        sound = sizes > _SOUND * sizes[-1]
        mix = mix[:, sound] / np.sqrt(sizes[sound])
        return cls(wide @ mix, mix)


@lru_cache(maxsize=1)
def _omega_basis(seed: int, tests: tuple[tuple[str, int, int], ...]) -> OmegaBasis:
    """The basis of modules by name, features and columns: one for all experts, whose moments of them come in a row."""
    return OmegaBasis.of(np.hstack([omega(seed, *test) for test in tests]))


def nystrom(diagonal: FloatVector, sketch: FloatMatrix, test: OmegaBasis) -> Gram:
    """PSD G from its diagonal, Y = G Omega and Omega: Nystrom's Y (Omega' Y)^+ Y' plus what the diagonal has beyond it.

    Stable with the shift of Tropp, Yurtsever, Udell and Cevher 2017 (Algorithm 3).
    """
    y = sketch.astype(np.float64) @ test.mix
    shift = float(np.finfo(np.float32).eps) * float(np.linalg.norm(y))
    y += shift * test.basis
    left = _left_factor(y, test.basis.T @ y, shift)
    # Its singular values squared, less the shift, are the eigenvalues; what does not exceed the shift is rounding.
    squares, turned = np.linalg.eigh(left.T @ left)
    real = squares > shift
    factor = left @ (turned[:, real] * np.sqrt((squares[real] - shift) / squares[real]))
    remainder = diagonal.astype(np.float64) - np.einsum("ij,ij->i", factor, factor)
    return Gram(factor, np.clip(remainder, 0.0, None))


def _left_factor(y: Float64Array, core: Float64Array, shift: float) -> Float64Array:
    """L with L L' = Y core^+ Y', of the core's eigenvalues above `shift`; by Cholesky where all of them are."""
    core = (core + core.T) / 2
    try:
        np.linalg.cholesky(core - shift * np.eye(len(core)))
        return np.asarray(y @ np.linalg.inv(np.linalg.cholesky(core)).T, np.float64)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(core)
        real = values > shift
        return np.asarray(y @ (vectors[:, real] / np.sqrt(values[real])), np.float64)


def merge_moments(parts: Sequence[InputMoments]) -> InputMoments:
    """The moments of all inputs together: means weighted by tokens.

    Raises `ShapeError` for parts with other modules, shapes or seeds: their Omega differs.
    """
    if not parts:
        raise ShapeError("there are no moments to merge: at least one part is needed")
    first = parts[0]
    shapes = {name: module.sketch.shape for name, module in first.modules.items()}
    for part in parts:
        if part.seed != first.seed:
            raise ShapeError(f"moments with seeds {first.seed} and {part.seed} have other sketches; use one seed")
        if {name: module.sketch.shape for name, module in part.modules.items()} != shapes:
            raise ShapeError("moments of other modules or sketch sizes cannot be merged; use one base and one size")
    tokens = sum(part.tokens for part in parts)
    shares = [part.tokens / tokens for part in parts]
    modules = {}
    for name in shapes:
        pairs = [(share, part.modules[name]) for share, part in zip(shares, parts, strict=True)]
        diagonal = sum((share * module.diagonal.astype(np.float64) for share, module in pairs), np.float64(0))
        sketch = sum((share * module.sketch.astype(np.float64) for share, module in pairs), np.float64(0))
        modules[name] = ModuleMoments(np.asarray(diagonal, np.float32), np.asarray(sketch, np.float32))
    return InputMoments(modules, tokens, first.seed)
