"""The method; it imports torch and the standard library only. Here are its types; `ewavit` has the verbs."""

from ewavit.core.averaging import full_share_rate
from ewavit.core.branches import branch_shares, limit_branches_
from ewavit.core.diagnostics import CollapseGap, RoutingStatistics
from ewavit.core.dispatch import Dispatcher
from ewavit.core.experts import Experts, SeparateExperts, StackedExperts
from ewavit.core.ffn import FFN
from ewavit.core.mixing import Fusion, Hybrid
from ewavit.core.moe import MoE, moe_layers
from ewavit.core.partition import RandomPartition
from ewavit.core.replicas import ReplicaExperts
from ewavit.core.routing import TopKRouter
from ewavit.core.steps import set_step
from ewavit.core.surgery import LayerSummary, Summary

__all__ = [
    "FFN",
    "CollapseGap",
    "Dispatcher",
    "Experts",
    "Fusion",
    "Hybrid",
    "LayerSummary",
    "MoE",
    "RandomPartition",
    "ReplicaExperts",
    "RoutingStatistics",
    "SeparateExperts",
    "StackedExperts",
    "Summary",
    "TopKRouter",
    "branch_shares",
    "full_share_rate",
    "limit_branches_",
    "moe_layers",
    "set_step",
]
