"""Messages of the coordinator: names, requests and answers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
)

from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.codec import WireDtype
from fedmoe.lora.manifest import BaseModel as Base
from fedmoe.lora.manifest import Manifest

#: The port of a coordinator, by the specification.
DEFAULT_PORT = 5000
SAFETENSORS = "application/vnd.safetensors"
PROBLEM = "application/problem+json"
#: RFC 7240: who pushes with this `Prefer` needs no weights where its own update is all that the newest version brings.
MINIMAL = "return=minimal"
#: Beside it: where one update of another worker landed in between, that update may come instead of the weights.
WITH_OTHER = "fedmoe-other-update"
#: Every answer of a coordinator says in this header which history it is of.
INCARNATION_HEADER = "FedMoE-Incarnation"

# ASCII only, lower case, no dots, no separators: a name can never be a path, a twin of another name or a hidden file.
ExpertName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
WorkerName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
EpochName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]{1,32}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
#: A content hash, or the beginning of one as people see it.
DigestStart = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12,64}$")]
#: Names one history of a coordinator; one that was restored or made anew has another.
Incarnation = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]{1,32}$")]
#: The kind of a statistic that is a worker's held-out loss, with the numbers of `HeldOutInfo`.
HELD_OUT = "held_out"
StatisticsKind = Literal["prompts", "moments"]
#: Where experts start: each from first weights of its own, or from the gateway, and from its next version again.
StartFrom = Literal["initial", "gateway"]
Count = Annotated[int, Field(ge=0, le=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _no_text(value: object) -> object:
    if isinstance(value, str | bytes | bool):
        raise ValueError("expected a number")
    return value


#: Of a number in a JSON body, which may not be spelled as text; in a query everything is text.
NUMBER = BeforeValidator(_no_text)

# Shown to people in logs, terminals and pages: nothing that moves a cursor or turns the reading direction.
# A pattern, so that /openapi.json says it too: no control (Cc), format (Cf) or separating (Zl, Zp) character.
_UNSEEN = (
    "\u0000-\u001f\u007f-\u009f\u00ad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e007f"
)
VISIBLE = f"^[^{_UNSEEN}]*$"
ShortText = Annotated[str, StringConstraints(max_length=200, pattern=VISIBLE)]
# Of a mapping whose names have a pattern; pydantic leaves it out, and other names would then be allowed.
NO_OTHER_KEYS: dict[str, JsonValue] = {"additionalProperties": False}
_ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,200}$")]
_Features = Annotated[int, Field(ge=1, le=1 << 24), NUMBER]
#: Numbers in an adapter, 4 GiB as float32; more is a mistake, and would be memory taken by a message of a few bytes.
MAX_PARAMETERS = 1 << 30
#: A seed's largest value: nearly 2^64, and the same for readers of JSON to whom every number is a double.
MAX_SEED = 18_446_744_073_709_550_000
# Every answer with weights carries the manifest, in the metadata that a safetensors header has room for.
_MAX_MANIFEST_CHARACTERS = 60_000


class Message(BaseModel):
    """Base of all messages: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SparseMessage(Message):
    """A message that leaves out keys without news: older programs refuse keys that they do not know.

    These are the keys in `sparse`, where they have their default.
    """

    sparse: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_news(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        unsaid = {key: type(self).model_fields[key].default for key in self.sparse}
        return {key: value for key, value in handler(self).items() if key not in unsaid or value != unsaid[key]}


class HistoryMessage(SparseMessage):
    """An answer that names the history it is of; without a name the key is not sent, see `answers_with_new_keys`."""

    sparse: ClassVar[frozenset[str]] = frozenset({"incarnation"})
    incarnation: Incarnation | None = None


class BaseModelMessage(Message):
    """Which base model, by content."""

    name: ShortText
    revision: ShortText
    weights_hash: Sha256
    tokenizer_hash: Sha256


class ManifestMessage(Message):
    """The LoRA contract of a federation; `modules` are `[name, in_features, out_features]`."""

    base: BaseModelMessage
    rank: Annotated[int, Field(ge=1, le=1024), NUMBER]
    alpha: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False), NUMBER]
    modules: Annotated[
        list[tuple[_ModuleName, _Features, _Features]],
        Field(min_length=1, max_length=4096, json_schema_extra={"uniqueItems": True}),
        FailFast(),
    ]

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """The message; raises ValueError for a manifest that cannot be taken."""
        message = cls.model_validate(manifest.to_json())
        message.check()
        return message

    def check(self) -> None:
        """Raise ValueError for more than can be kept and sent; no schema says that."""
        parameters = self.rank * sum(n_in + n_out for _, n_in, n_out in self.modules)
        if parameters > MAX_PARAMETERS:
            raise ValueError(f"the adapter has {parameters} parameters; at most {MAX_PARAMETERS} are taken")
        characters = len(self.model_dump_json())
        if characters > _MAX_MANIFEST_CHARACTERS:
            raise ValueError(
                f"the manifest takes {characters} characters, at most {_MAX_MANIFEST_CHARACTERS} can be sent; "
                "adapt fewer modules with --target-modules"
            )

    def base_model(self) -> Base:
        """The base model named."""
        return Base(self.base.name, self.base.revision, self.base.weights_hash, self.base.tokenizer_hash)

    def manifest(self) -> Manifest:
        """The manifest itself; raises ValueError for one that contradicts itself or cannot be taken."""
        self.check()
        layout = Layout(tuple(ModuleShape(*module) for module in self.modules), self.rank)
        return Manifest(self.base_model(), layout, self.alpha)


class RegisterRequest(Message):
    """A worker asks for an expert; `seed` fixes its first A, by default it follows from the name.

    `start_from` is what the worker counts on, refused if experts here start otherwise; null counts on none.
    """

    expert: ExpertName
    worker: WorkerName
    manifest: ManifestMessage
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), NUMBER] | None = None
    start_from: StartFrom | None = None


class ExpertRequest(Message):
    """Which expert, and in which precision."""

    expert: ExpertName
    dtype: WireDtype = "fp32"


class UpdateHeader(Message):
    """What accompanies an update's bytes, as query parameters, so that it is judged before the body is read.

    `incarnation` and `base_digest` (the content hash of version `base_version`) say in which history it was made; an
    update of another history is refused, one without them is taken at its version's number.
    """

    expert: ExpertName
    worker: WorkerName
    epoch: EpochName
    sequence: Count
    base_version: Count
    base_digest: Sha256 | None = None
    incarnation: Incarnation | None = None
    answer: Literal["result", "weights"] = "result"
    loss: Finite | None = None
    steps: Count | None = None
    tokens: Count | None = None


class HeldOutcome(Message):
    """Number and outcome of a held update: `held` still, `released` as `version`, or `rejected` with a reason."""

    held: int
    sequence: int
    status: Literal["held", "released", "rejected"]
    version: int | None = None
    reason: str = ""


class LandedUpdate(Message):
    """An update that landed: the sha256 of its bytes as they were sent, and what its delta was multiplied with."""

    digest: Sha256
    coefficient: float


class UpdateResult(SparseMessage):
    """What became of an update; the same for a repeated push, with `duplicate` set.

    A `quarantined` one, `held` under a number, has not landed: `version` is the expert's, unchanged, and `note` the
    reason. A `note` also warns of an id that is used in two places. `outcomes` tell of what was held of this worker and
    epoch, the newest last. `digest` is that of the update's bytes, `weights_digest` that of the version's weights where
    they do not come along: those of the sender's base, plus the `other` update, plus this one. Keys without news are
    not sent: older programs refuse keys that they do not know.
    """

    sparse: ClassVar[frozenset[str]] = frozenset(
        {"incarnation", "status", "held", "note", "outcomes", "weights_digest", "other"}
    )
    expert: ExpertName
    version: int
    gateway_version: int
    staleness: int
    coefficient: float
    digest: Sha256
    duplicate: bool = False
    incarnation: Incarnation | None = None
    status: Literal["landed", "quarantined"] = "landed"
    held: int | None = None
    note: str = ""
    outcomes: list[HeldOutcome] = []
    weights_digest: Sha256 | None = None
    other: LandedUpdate | None = None


class FederationInfo(HistoryMessage):
    """What a worker must know before it loads a model; `manifest` is null until the first expert is registered.

    Where experts start from the gateway, each is rebased onto its next version after `merge_after` steps. `max_length`
    are the tokens of a packed row of every worker, null where each has its own.
    """

    sparse: ClassVar[frozenset[str]] = frozenset({"incarnation", "max_length"})
    fedmoe: str
    manifest: ManifestMessage | None
    min_sync_interval: float
    wire_dtypes: list[str]
    start_from: StartFrom = "initial"
    merge_after: int | None = None
    max_length: int | None = None


class DataStatisticsHeader(Message):
    """Whose data the statistics in the body are of: `prompts` to route by, or the `moments` of the modules' inputs."""

    expert: ExpertName
    worker: WorkerName
    kind: StatisticsKind


class DataStatisticsResult(Message):
    """What became of data statistics; `duplicate` if these very bytes were there already."""

    expert: ExpertName
    kind: StatisticsKind
    digest: Sha256
    gateway_version: int
    duplicate: bool = False


class DataStatisticsRequest(Message):
    """Which statistics, of all workers of an expert together."""

    expert: ExpertName
    kind: StatisticsKind


class StatisticRequest(Message):
    """A small fact a worker discloses of its own will, for example a held-out loss; kept like an update."""

    expert: ExpertName
    worker: WorkerName
    kind: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
    values: Annotated[
        dict[ShortText, Annotated[Finite, NUMBER]], Field(max_length=256, json_schema_extra=NO_OTHER_KEYS)
    ]


class RollbackRequest(Message):
    """Take an expert back to an earlier version; with its digest or the incarnation, only if that is the one meant."""

    expert: ExpertName
    to_version: Annotated[Count, NUMBER]
    to_digest: DigestStart | None = None
    incarnation: Incarnation | None = None
    reason: ShortText = ""


class RetractRequest(Message):
    """Take one worker's contributions out of an expert; with `erase` their bytes go for good too."""

    expert: ExpertName
    worker: WorkerName
    reason: ShortText = ""
    erase: bool = False


class ChangeResult(HistoryMessage):
    """An expert after a rollback or a retraction; `note` says what could not be taken back."""

    expert: ExpertName
    version: int
    gateway_version: int
    removed: int
    digest: Sha256
    note: str = ""


class Problem(BaseModel):
    """An error as RFC 9457 problem details; `code` is for programs, `detail` and `fix` for people."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    fix: str = ""
