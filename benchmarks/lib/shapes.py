"""The linear modules of the base models that the benchmarks use."""

from __future__ import annotations

from fedmoe.lora.adapter import Layout, ModuleShape

RANK = 16
_SMOLLM2_135M = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}


def smollm2_layout() -> Layout:
    """SmolLM2-135M's 210 modules at rank 16: 4.88 M numbers, 19.5 MB in float32."""
    modules = tuple(
        ModuleShape(f"model.layers.{layer}.{name}", n_in, n_out)
        for layer in range(30)
        for name, (n_out, n_in) in _SMOLLM2_135M.items()
    )
    return Layout(modules, RANK)
