"""What `bench_merge_quality.py` measures on: data, trained experts and their input moments, each made once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedmoe.datasets.demo.domains import TEST, TRAIN
from fedmoe.datasets.tokens.packing import Block, BlockSampler, collate, pack
from fedmoe.gateway.evaluate import held_out_blocks
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.formats import peft_files, read_peft
from fedmoe.lora.moments import InputMoments
from fedmoe.models.base import LoadedBase
from fedmoe.models.input_moments import MomentsCollector
from fedmoe.models.prepare_data import prepare_samples
from fedmoe.models.training_config import LoraConfig, TrainingConfig
from fedmoe.qwen_finetune import QwenLoRAExpert
from fedmoe.runtime.files import write_atomic, write_folder_atomic
from lib.merge_domains import DEMO, build

LENGTH = 256
BATCH = 2
STEPS = 40
RANK = 16
TRAINING = TrainingConfig(
    learning_rate=1e-3,
    warmup_steps=5,
    lr_scheduler_type="linear",
    max_steps=STEPS,
    per_device_train_batch_size=BATCH,
)


@dataclass(frozen=True)
class Work:
    """A folder with data, and with the experts of one seed; whatever it lacks is made and kept there."""

    folder: Path
    base: LoadedBase
    seed: int = 0
    rank: int = RANK
    _packed: dict[tuple[str, str, int], list[Block]] = field(default_factory=dict, repr=False)

    @property
    def lora(self) -> LoraConfig:
        """Of the experts: scale alpha / r is 2 at rank 16, and falls with the root of the rank (rsLoRA)."""
        return LoraConfig(self.rank, 2 * (RANK * self.rank) ** 0.5, seed=self.seed)

    def build(self, domains: Sequence[str] = DEMO) -> None:
        """Data of the domains; the held-out rows are split by file, one half to choose with, one to test."""
        build(self.folder / "data", domains)
        for domain in domains:
            for half in ("validation", "test"):
                file = self._held_out_file(domain, half)
                if not file.exists():
                    rows = (self.folder / "data" / domain / TEST).read_text("utf-8").splitlines()
                    kept = [row for row in rows if _half_of(json.loads(row)["file"]) == half]
                    write_atomic(file, "".join(row + "\n" for row in kept).encode(), 0o644)

    def held_out(self, half: str, domain: str, limit: int) -> list[Block]:
        """The first `limit` blocks of a domain's validation or test half."""
        key = (half, domain, limit)
        if key not in self._packed:
            self._packed[key] = held_out_blocks(self._held_out_file(domain, half), self.base, LENGTH, limit)
        return self._packed[key]

    def training_blocks(self, domain: str, count: int = STEPS * BATCH) -> list[Block]:
        """The first `count` blocks that an expert of this domain is trained on, in order."""
        data = prepare_samples(self.folder / "data" / domain / TRAIN, self.base.tokenizer, LENGTH)
        blocks = pack(data.samples, LENGTH, seed=self.seed, pad_id=int(self.base.tokenizer.pad_token_id))
        return BlockSampler(blocks, self.seed).next(count)

    def expert(self, domain: str) -> Adapter:
        """The domain's expert, trained if it is not there yet."""
        folder = self.adapter_folder(domain)
        if not folder.is_dir():
            adapter = self._train(domain)
            identity = self.base.identity
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_folder_atomic(folder, peft_files(adapter, identity.name, identity.revision))
        return read_peft({path.name: path.read_bytes() for path in folder.iterdir()})

    def adapter_folder(self, domain: str) -> Path:
        other = "" if self.rank == RANK else f"-rank-{self.rank}"
        return self.folder / f"experts-{self.seed}{other}" / domain

    def moments(self, domain: str, columns: int, tokens: int) -> InputMoments:
        """Input moments on the base model over the first training blocks that hold about `tokens` tokens."""
        file = self.folder / f"experts-{self.seed}" / f"{domain}-q{columns}-{tokens}-weighted.safetensors"
        if not file.exists():
            targets = tuple(module.name for module in self.expert(domain).layout.modules)
            with MomentsCollector(self.base, targets, columns) as collector:
                for block in self.training_blocks(domain)[: round(tokens / LENGTH)]:
                    collector.add(collate([block]))
            write_atomic(file, collector.moments().to_bytes(), 0o644)
        return InputMoments.from_bytes(file.read_bytes())

    def block_losses(self, adapter: Adapter, half: str, domain: str, limit: int) -> list[float]:
        """The mean loss of each held-out block; kept too, so that a run that was stopped goes on."""
        key = hashlib.sha256(adapter.flat.tobytes())
        key.update(f"{adapter.rank} {adapter.scale} {half} {domain} {limit}".encode())
        file = self.folder / "losses" / f"{key.hexdigest()[:32]}.json"
        if not file.exists():
            targets = tuple(module.name for module in adapter.layout.modules)
            model = QwenLoRAExpert(self.base, LoraConfig(adapter.rank, adapter.alpha, target_modules=targets))
            try:
                model.load_adapter(adapter)
                found = model.evaluate(self.held_out(half, domain, limit), 4).block_losses
            finally:
                model.attached.detach()
            file.parent.mkdir(exist_ok=True)
            write_atomic(file, json.dumps(found).encode(), 0o644)
        return [float(loss) for loss in json.loads(file.read_bytes())]

    def _held_out_file(self, domain: str, half: str) -> Path:
        return self.folder / "data" / f"{domain}-{half}.jsonl"

    def _train(self, domain: str) -> Adapter:
        blocks = self.training_blocks(domain)
        model = QwenLoRAExpert(self.base, self.lora, TRAINING)
        try:
            for step in range(STEPS):
                done = model.train_step([collate(blocks[step * BATCH : (step + 1) * BATCH])])
                print(f"{domain} step {step + 1} loss {done.loss:.3f} {done.seconds:.1f} s", flush=True)
            return Adapter(model.attached.layout, float(model.attached.alpha), model.weights())
        finally:
            model.attached.detach()


def _half_of(file: str) -> str:
    return "test" if hashlib.sha1(file.encode(), usedforsecurity=False).digest()[-1] % 2 else "validation"
