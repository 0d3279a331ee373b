"""The coordinator's tokens: created, adopted, checked, revoked, with the last use of each."""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.failpoints import reached
from fedmoe.server.access.security import Principal
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.records import TokenFacts, TokenOrigin, TokenRecord
from fedmoe.wire.contract.administration import INVITE, TokenInfo
from fedmoe.wire.http.bearer import bearer_of, hash_token


class SteadyClock:
    """Seconds since 1970 by the machine's clock `wall`, but never less than the latest time seen.

    While the wall clock is behind, `monotonic` seconds are added to that time, so that what ends later still ends.
    `latest` is what an earlier process had seen.
    """

    def __init__(self, wall: Callable[[], float], monotonic: Callable[[], float], latest: float = 0.0) -> None:
        self._wall = wall
        self._monotonic = monotonic
        # One value, exchanged whole: threads ask too.
        self._seen = (latest, monotonic())

    def now(self) -> float:
        wall, passed = self._wall(), self._monotonic()
        latest, since = self._seen
        steady = latest + (passed - since)
        if wall <= steady:
            return steady
        self._seen = (wall, passed)
        return wall

    @property
    def behind(self) -> float:
        """Seconds by which the machine's clock is behind the latest time seen; 0 as a rule."""
        return max(0.0, self.now() - self._wall())


#: Under this key the journal holds the latest time that was seen.
LATEST_TIME = "latest_time"
#: Under this and the hash of a join line's token the journal holds the hash of the token it was exchanged for.
JOINED = "joined:"
#: Last uses and the latest time are kept so often, in seconds: none of it costs a request anything.
KEEP_SECONDS = 60.0
_HOW_TO_SEND = "Send 'Authorization: Bearer TOKEN' (--token or FEDMOE_TOKEN)."
_ANOTHER_LINE = "Ask the coordinator's operator for another one (fedmoe token create --join)"


class TokenGate:
    """Knows the tokens; read from the journal at start, changed through `add`, `adopt` and `revoke`.

    `clock` gives seconds since 1970, `monotonic` seconds that nobody sets back.
    """

    def __init__(
        self,
        journal: Journal,
        required: bool,
        clock: Callable[[], float],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self.required = required
        self._wall = clock
        self._kept_at = float(journal.meta(LATEST_TIME) or 0.0)
        self.clock = SteadyClock(clock, monotonic, self._kept_at)
        self._records = {record.hash: record for record in journal.tokens()}
        # Tokens that an older program made have no facts yet.
        self._facts = {name: TokenFacts(name, "", "unknown", None) for name in self._records}
        self._facts |= {facts.hash: facts for facts in journal.token_facts()}
        self._joined = journal.metas(JOINED)
        self._used: dict[str, tuple[float, str | None]] = {}
        self._lock = threading.RLock()
        #: Called with the hash of every token that is revoked, in the thread that revokes it.
        self.on_revoked: list[Callable[[str], None]] = []

    @property
    def ever_had_tokens(self) -> bool:
        """Whether there was ever a token here, revoked ones counted: such a coordinator never opens by itself."""
        return bool(self._records or self._facts)

    @property
    def now(self) -> float:
        """The time by which tokens end; it never goes back."""
        return self.clock.now()

    @property
    def any_joined(self) -> bool:
        """Whether a join line was ever used here."""
        return bool(self._joined)

    def has(self, role: str) -> bool:
        """Whether a usable token of this role exists."""
        return any(record.role == role and self._usable(record) for record in list(self._records.values()))

    def listed(self) -> list[TokenInfo]:
        """All tokens, the oldest first."""
        with self._lock:
            self._note_uses()
            tokens = [
                TokenInfo.model_validate(
                    {**asdict(record), **asdict(self._facts[record.hash]), "usable": self._usable(record)}
                )
                for record in self._records.values()
            ]
        return sorted(tokens, key=lambda token: (token.made_at or 0.0, token.hash))

    def label(self, token_hash: str) -> str:
        """What people call a token; empty for none."""
        return self._facts[token_hash].label if token_hash else ""

    def add(
        self,
        token: str,
        role: str,
        worker: str | None = None,
        experts: Sequence[str] | None = None,
        expires_in: float | None = None,
        label: str = "",
        origin: TokenOrigin = "created",
    ) -> TokenRecord:
        """Keep a new token's hash with what it may do, for `expires_in` seconds or for ever."""
        with self._lock:
            now = self.now
            scope = tuple(experts) if experts is not None else None
            expires_at = now + expires_in if expires_in is not None else None
            record = TokenRecord(hash_token(token), role, worker, scope, expires_at)
            self._require_same(record)
            facts = TokenFacts(record.hash, label, origin, now)
            # The facts first: a token in use has its origin on disk.
            self._journal.put_token_facts([facts])
            self._facts[record.hash] = facts
            self._journal.put_token(record)
            self._records[record.hash] = record
            if expires_at is not None:
                self._keep_time()
        return record

    def exchange(self, invite: str, token_hash: str, worker: str, address: str | None = None) -> TokenRecord:
        """The token with this hash, made for the join line whose token has the hash `invite`; works once.

        The same exchange again gives the same record, so an answer that was lost can be asked for again. Raises
        `RefusedError` for a line that was used for another token.
        """
        with self._lock:
            line, earlier = self._records[invite], self._joined.get(invite)
            if earlier not in (None, token_hash):
                raise _used(self._facts[earlier].used_from if earlier in self._facts else None)
            if earlier is None:
                if token_hash in self._records or token_hash in self._facts:
                    raise RefusedError(
                        "token_mismatch", "a token with this hash is known here already.", "Make another one."
                    )
                # The one step that uses the line up: after a crash only the same token can finish what follows.
                self._journal.set_meta(JOINED + invite, token_hash)
                self._joined[invite] = token_hash
                reached("join.after_use")
            record = self._records.get(token_hash)
            if record is None:
                record = self._add_joined(line, token_hash, worker, address)
            if record.revoked:
                raise self.ended(token_hash)
            Principal(record.role, record.worker).require_worker(worker)
            return record

    def _add_joined(self, line: TokenRecord, token_hash: str, worker: str, address: str | None) -> TokenRecord:
        record = TokenRecord(token_hash, "worker", worker, line.experts)
        facts = TokenFacts(token_hash, self._facts[line.hash].label, "joined", self.now, self._wall(), address)
        used = replace(self._facts[line.hash], used_at=self._wall(), used_from=address)
        self._journal.put_token_facts([facts, used])
        self._facts |= {token_hash: facts, line.hash: used}
        self._journal.put_token(record)
        self._records[token_hash] = record
        return record

    def adopt(self, tokens: Mapping[str, str]) -> list[TokenRecord]:
        """Take the tokens that the environment gives, by role; those it gave before for these roles are revoked.

        Those are returned. Raises `RefusedError` for one that is revoked, expired or known with other rights, and
        changes nothing then.
        """
        for role, token in tokens.items():
            self._require_same(TokenRecord(hash_token(token), role))
        revoked: list[TokenRecord] = []
        for role, token in tokens.items():
            label, facts = f"{role} token of the environment", self._facts.get(hash_token(token))
            if facts is None:
                self.add(token, role, label=label, origin="given")
            elif facts.origin in ("start", "unknown"):
                with self._lock:
                    self._facts[facts.hash] = replace(facts, origin="given", label=facts.label or label)
                    self._journal.put_token_facts([self._facts[facts.hash]])
            current = [record for record in self._records.values() if record.role == role and not record.revoked]
            for record in current:
                if self._facts[record.hash].origin == "given" and record.hash != hash_token(token):
                    self.revoke(record.hash)
                    revoked.append(record)
        return revoked

    def _require_same(self, record: TokenRecord) -> None:
        """Refuse to give a token that is known already other rights, or new life."""
        before = self._records.get(record.hash)
        if before is None and record.hash not in self._facts:
            return
        if before is None or before.revoked:
            # Of one that was damaged nobody can know any more whether it was revoked.
            damaged = f"what the given {record.role} token may do was damaged in the journal and left out."
            raise RefusedError(
                "token_revoked",
                damaged if before is None else f"the given {record.role} token was revoked.",
                "Give another one, or unset the variable: the other tokens stay valid.",
            )
        if (before.role, before.worker, before.experts) != (record.role, record.worker, record.experts):
            raise RefusedError(
                "token_mismatch",
                f"the token given as {record.role} token is known here as a token with other rights ({before.role}).",
                "Give another one.",
            )
        if not self._usable(before):
            raise RefusedError("token_mismatch", f"the given {record.role} token has expired.", "Give another one.")

    def revoke(self, token_hash: str) -> None:
        """Refuse a token from now on, and stop what is under way with it."""
        with self._lock:
            record = self._records.get(token_hash)
            if record is None:
                raise RefusedError("unknown_token", "no token has this hash.", "fedmoe token list shows them.")
            # Refused before it is durable: nothing gets in while the disk works.
            self._records[token_hash] = replace(record, revoked=True)
            self._journal.put_token(self._records[token_hash])
        for callback in self.on_revoked:
            callback(token_hash)

    def admit(self, authorization: str | None, address: str | None = None) -> Principal:
        """Who sent this `Authorization` header; raises unless a usable token is shown where one is required."""
        if not self.required:
            return Principal("admin")
        token = bearer_of(authorization)
        if token is None:
            raise self._unauthorised("a token is needed and none was sent.")
        presented = hash_token(token)
        # The look-up is by hash of 256 random bits: what its timing may tell about a hash leads to no token.
        record = self._records.get(presented)
        if record is None or not hmac.compare_digest(record.hash, presented):
            raise self._unauthorised("this token is not known here.")
        # An exchange may be asked for again whose answer was lost.
        if not self._usable(record) and (record.revoked or presented not in self._joined):
            raise self.ended(presented)
        if record.role != INVITE:  # which is used when it is exchanged
            self._used[presented] = (self._wall(), address)
        return Principal(record.role, record.worker, record.experts, presented)

    def ended(self, token_hash: str) -> RefusedError:
        """The refusal of a token that was revoked or has expired."""
        record = self._records[token_hash]
        revoked = record.revoked
        if record.role == INVITE:
            state = "was revoked" if revoked else "has expired"
            return self._unauthorised(f"this join line {state}.", f"{_ANOTHER_LINE}.")
        return self._unauthorised("this token was revoked." if revoked else "this token has expired.")

    def seconds_left(self, token_hash: str) -> float | None:
        """Until a token that was admitted ends; None for one without an end."""
        expires_at = self._records[token_hash].expires_at
        return None if expires_at is None else max(0.0, expires_at - self.now)

    def _usable(self, record: TokenRecord) -> bool:
        unused = not record.revoked and record.hash not in self._joined
        return unused and (record.expires_at is None or record.expires_at > self.now)

    def _unauthorised(self, detail: str, fix: str = _HOW_TO_SEND) -> RefusedError:
        # With the time, so that a worker can say how far its own clock is off.
        return RefusedError("unauthorised", detail, fix, coordinator_time=round(self._wall(), 3))

    @property
    def keeping_is_due(self) -> bool:
        """Whether `keep` has something to do: last uses from time to time, and every end of a token at once."""
        now = self.now
        ended = any(
            record.expires_at is not None and self._kept_at < record.expires_at <= now
            for record in list(self._records.values())
        )
        return ended or (now - self._kept_at >= KEEP_SECONDS and bool(self._used))

    def keep(self) -> None:
        """Make last uses and the latest time durable, in one go; a crash loses the uses of the last minute."""
        with self._lock:
            self._note_uses()
            self._journal.put_token_facts(list(self._facts.values()))
            self._keep_time()

    def _keep_time(self) -> None:
        now = self.now
        self._journal.set_meta(LATEST_TIME, repr(now))
        self._kept_at = now

    def _note_uses(self) -> None:
        used, self._used = self._used, {}
        for token_hash, (at, address) in list(used.items()):
            self._facts[token_hash] = replace(self._facts[token_hash], used_at=at, used_from=address)


def _used(address: str | None) -> RefusedError:
    return RefusedError(
        "join_line_used",
        f"this join line was used before{f', from {address}' if address else ''}; each works once.",
        f"{_ANOTHER_LINE}. If none of yours used it, tell them: the token it was exchanged for has to be revoked.",
    )
