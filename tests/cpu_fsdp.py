"""FSDP2 on processors, for tests alone: accelerate takes a plugin for it on accelerators only."""

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    """Let every Accelerator made from now on take its FSDP plugin where several CPU processes run."""
    made = AcceleratorState.__init__

    def make(state: AcceleratorState, *args: object, fsdp_plugin: object = None, **kwargs: object) -> None:
        made(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and state.distributed_type == DistributedType.MULTI_CPU:
            # states that are made later are copies of the shared one
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = make
