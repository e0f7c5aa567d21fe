"""Training in several processes: the public names of `ewavit.core.distributed`."""

from ewavit.core.distributed import (
    clip_grad_norm_,
    expert_placement,
    load_stacked_state_dict,
    stacked_state_dict,
)

__all__ = ["clip_grad_norm_", "expert_placement", "load_stacked_state_dict", "stacked_state_dict"]
