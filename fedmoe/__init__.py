"""FedMoE: LoRA experts trained where the data lives, without rounds, and one gateway made of all of them."""

__version__ = "0.1.0"
