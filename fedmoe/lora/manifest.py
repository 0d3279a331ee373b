"""The manifest: the base model and LoRA configuration that all experts of one federation share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Self, TypedDict, cast

from fedmoe.lora.adapter import Layout, ModuleShape


class _BaseJson(TypedDict):
    name: str
    revision: str
    weights_hash: str
    tokenizer_hash: str


class _ManifestJson(TypedDict):
    base: _BaseJson
    rank: int
    alpha: float
    modules: list[tuple[str, int, int]]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """Which base model: its name for people, the content hashes for machines."""

    name: str
    revision: str
    weights_hash: str
    tokenizer_hash: str


@dataclass(frozen=True)
class Manifest:
    """The exact contract of an expert: base model, rank, alpha, and every adapted module with its shape."""

    base: BaseModel
    layout: Layout
    alpha: float

    def differences(self, other: Manifest) -> list[str]:
        """How `other` differs from this one, in words; empty if they agree. Names for people do not count."""
        differences = base_differences(self.base, other.base)
        if self.layout.rank != other.layout.rank:
            differences.append(f"rank: expected {self.layout.rank}, got {other.layout.rank}")
        if self.alpha != other.alpha:
            differences.append(f"lora_alpha: expected {self.alpha:g}, got {other.alpha:g}")
        return differences + _module_differences(self.layout, other.layout)

    def shared_by(self, other: Manifest) -> Manifest:
        """The other one on this one's layout if it is the same: the modules of many experts are in memory once."""
        return Manifest(other.base, self.layout, other.alpha) if self.layout == other.layout else other

    def to_json(self) -> dict[str, object]:
        """JSON types only; `from_json` gives an equal manifest back."""
        return {
            "base": asdict(self.base),
            "rank": self.layout.rank,
            "alpha": float(self.alpha),
            "modules": [[module.name, module.in_features, module.out_features] for module in self.layout.modules],
        }

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Self:
        """The manifest that `to_json` wrote; the caller has validated the types (see `wire.messages`)."""
        fields = cast(_ManifestJson, data)
        modules = tuple(ModuleShape(name, n_in, n_out) for name, n_in, n_out in fields["modules"])
        return cls(BaseModel(**fields["base"]), Layout(modules, fields["rank"]), float(fields["alpha"]))


def base_differences(mine: BaseModel, theirs: BaseModel) -> list[str]:
    """How the second base model differs from the first, in words; empty if they agree."""
    return [
        f"base {field}: expected {getattr(mine, field)} ({mine.name}), got {getattr(theirs, field)} ({theirs.name})"
        for field in ("weights_hash", "tokenizer_hash")
        if getattr(mine, field) != getattr(theirs, field)
    ]


def _module_differences(mine: Layout, theirs: Layout) -> list[str]:
    ours = {module.name: module for module in mine.modules}
    others = {module.name: module for module in theirs.modules}
    differences = [f"module missing: {name}" for name in sorted(ours.keys() - others.keys())]
    differences += [f"module not expected: {name}" for name in sorted(others.keys() - ours.keys())]
    pairs = [(ours[name], others[name]) for name in sorted(ours.keys() & others.keys())]
    return differences + [
        f"{want.name}: expected {want.in_features} -> {want.out_features} features, "
        f"got {got.in_features} -> {got.out_features}"
        for want, got in pairs
        if want != got
    ]
