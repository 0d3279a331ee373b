"""AReaL's client for an unmodified vLLM server. Needs AReaL, not vLLM.

AReaL 1.0.4 brings a server wrapper of its own (`areal.engine.vllm_ext`) that current vLLM releases cannot load, and its
client pauses generation by routes that only this wrapper has. Start a plain server instead:

    VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve BASE --enable-lora --max-lora-rank R \\
        --max-loras S --generation-config vllm --logprobs-mode processed_logprobs

with S at least the largest staleness + 2, and give its address to `StockVllmEngine(config).initialize(addr=...)`. Any
other inference server is connected the same way: a class with the methods of `RemoteInfBackendProtocol`, passed to
`RemoteInfEngine(config, backend)`.
"""

from __future__ import annotations

from areal.api import ParamSpec, WeightUpdateMeta
from areal.api.cli_args import InferenceEngineConfig
from areal.api.io_struct import HttpRequest, WeightUpdateRequests, get_versioned_lora_name
from areal.engine.vllm_remote import RemotevLLMEngine, VLLMBackend
from areal.infra import RemoteInfEngine

from fedmoe.areal.config import ArealError

_ONLY_ADAPTERS = (
    "an unmodified vLLM server takes LoRA adapters from disk only; set use_lora=True and weight_update_mode='disk'"
)


class StockVllmBackend(VLLMBackend):  # type: ignore[misc]
    """The requests of AReaL's vLLM client, in the routes that vLLM itself has.

    Adapters are loaded under a new name and folder each version (`NAME-vN`). What only AReaL's own server can do is
    refused with `ArealError`.
    """

    def build_disk_weight_update_requests(self, meta: WeightUpdateMeta) -> WeightUpdateRequests:
        """Load the new version of an adapter, and let the one `lora_keep_versions` before it go (0: keep them all)."""
        if not meta.use_lora:
            raise ArealError(_ONLY_ADAPTERS)
        update = super().build_disk_weight_update_requests(meta)
        old = meta.version - meta.lora_keep_versions
        if meta.lora_keep_versions > 0 and old >= 0:
            payload = {"lora_name": get_versioned_lora_name(meta.lora_name, old)}
            update.requests.append(HttpRequest("/v1/unload_lora_adapter", payload, best_effort=True))
        return update

    def build_distributed_weight_update_requests(
        self, meta: WeightUpdateMeta, param_specs: list[ParamSpec]
    ) -> WeightUpdateRequests:
        """Refused: needs AReaL's own server."""
        raise ArealError(_ONLY_ADAPTERS)

    def build_init_weights_group_request(self, addr: str, server_idx: int, meta: WeightUpdateMeta) -> HttpRequest:
        """Refused: needs AReaL's own server."""
        raise ArealError(_ONLY_ADAPTERS)

    def get_pause_request(self) -> HttpRequest:
        """Hold running requests where they are, and keep what they have."""
        return HttpRequest(endpoint="/pause?mode=keep", payload={})

    def get_resume_request(self) -> HttpRequest:
        """Let them go on."""
        return HttpRequest(endpoint="/resume", payload={})


class StockVllmEngine(RemotevLLMEngine):  # type: ignore[misc]
    """AReaL's inference engine over unmodified vLLM servers."""

    def __init__(self, config: InferenceEngineConfig) -> None:
        self.config = config
        self._engine = RemoteInfEngine(config, StockVllmBackend())
