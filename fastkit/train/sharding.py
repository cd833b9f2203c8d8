"""FSDP2 (`torch.distributed.fsdp.fully_shard`) for a QLoRA model: each process holds a part of every weight.

A decoder layer's parameters are gathered for its forward, freed, and gathered again for its backward; adapters, their
gradients and the optimizer's state are never whole anywhere. What stays whole in each process are the scales of the
4-bit weights, a thirty-second of their size.

torch's function is called here, and not through accelerate, which would leave 4-bit weights in bytes unsharded and on
the CPU shard nothing. What goes to disk is whole and has the form of a run of one process, so a run goes on from it
with another number of processes, or without sharding.
"""

import warnings

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastkit.models.bnb import bnb
from fastkit.models.fused_layer import is_decoder_layer
from fastkit.models.projection import forget

STORAGE = torch.bfloat16  # of 4-bit weights: torch 2.11 shards no integers. Bits are moved, never computed with


def shard(model: nn.Module) -> None:
    """Shard a peft model over all processes, in place; each must hold all of it, on its own device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(model.device.type, (torch.distributed.get_world_size(),))
    for module in four_bit(model):
        module.quant_state = module.weight.quant_state
        module.weight = nn.Parameter(module.weight.data.view(-1).view(STORAGE)[:, None], requires_grad=False)
        module.quant_storage = STORAGE
        forget(module)  # else the whole weight stays until the first step reads the gathered one
    layers = [module for module in model.modules() if is_decoder_layer(module)]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
        _keep_name(layer)
    fully_shard(model, mesh=mesh)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # none is changed in place
    register_fsdp_forward_method(model, "generate")
    for layer in layers:  # a gathered weight is one object for good: it takes what bitsandbytes and we look for
        layer.unshard()
        for module in four_bit(layer):
            module.weight.quant_state = module.quant_state
        layer.reshard()


def four_bit(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def _keep_name(layer: nn.Module) -> None:
    """FSDP2 gives a sharded module a class of its own; let it be known by the name of the one it extends."""
    cls = type(layer)
    original = cls.__bases__[-1]
    cls.__module__, cls.__name__, cls.__qualname__ = original.__module__, original.__name__, original.__qualname__


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained parameters by name, whole, on the CPU; to be called by all processes."""
    return {name: _whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}


def load_adapters(model: nn.Module, file) -> None:
    """Take the trained parameters from peft's `adapter_model.safetensors`."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    stored = load_file(file)
    adapter = model.active_adapters[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(_part(stored[name.replace(f".{adapter}.", ".")], parameter))


def whole_state(optimizer: torch.optim.Optimizer) -> dict:
    """The state_dict that the optimizer would have of one flat parameter (see `flat.Flat`), whole, on the CPU; to be
    called by all processes."""
    found = optimizer.state_dict()
    state, (group,) = found["state"], found["param_groups"]
    flat = {
        name: torch.cat([_whole(state[i][name]).flatten() for i in group["params"]]) if value.dim() else _whole(value)
        for name, value in state[0].items()  # without a dimension: how many steps there were
    }
    return {"state": {0: flat}, "param_groups": [{**group, "params": [0]}]}


def load_state(optimizer: torch.optim.Optimizer, stored: dict) -> None:
    """Take this process's part of a whole state_dict, of one flat parameter or of each."""
    parameters, (group,) = optimizer.param_groups[0]["params"], stored["param_groups"]
    states = stored["state"]
    if len(group["params"]) == 1:
        sizes = [p.numel() for p in parameters]
        split = {name: value.split(sizes) if value.dim() else [value] * len(sizes) for name, value in states[0].items()}
        states = {i: {name: pieces[i] for name, pieces in split.items()} for i in range(len(sizes))}
    parts = {
        i: {
            name: _part(value.view(parameters[i].shape), parameters[i]) if value.dim() else value.clone()
            for name, value in state.items()
        }
        for i, state in states.items()
    }
    group = {**group, "params": list(range(len(parameters)))}
    optimizer.load_state_dict({"state": parts, "param_groups": [group]})


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def _part(tensor: torch.Tensor, like: DTensor) -> DTensor:
    tensor = tensor.to(like.device, like.dtype)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # all have it: none is sent
