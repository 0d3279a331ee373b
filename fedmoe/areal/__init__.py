"""AReaL as a back end of the arena: its PPO actor as a learner, and our tasks as a workflow on an AReaL cluster.

AReaL is needed by `process`, `actor`, `workflow` and `stock_vllm` only; everything else imports without it. It wants
other versions of its libraries than FedMoE does, so it has an environment of its own (`scripts/setup_areal.sh`), and
the learner runs as a process there.
"""
