"""The model in shards (FSDP2): a rank holds its part of every weight, gradient and moment.

Layers are gathered one by one where they run; tables, the last norm and the head stay gathered within a step.
Parameters are drawn one at a time, the same numbers as in one process, and each rank keeps its part.

In bfloat16 the matrices of layers are gathered in bfloat16, at half the traffic, and everything else in float32.
Autocast runs as in one process: it would have rounded the same matrices, and kept a copy of each until the backward
pass, which undoes the sharding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from empirics.distributed import Ranks, local
from empirics.model import Transformer
from theory.architecture import Architecture


def shard(model: Transformer, ranks: Ranks, *, device: str, halved: bool = False) -> None:
    """Replace every parameter by this rank's part, in place: the layers' one layer at a time, then the rest.

    Gradients are summed over ranks, in the parameters' precision. Parameters on the meta device stay there.

    Args:
        halved: matrices of layers are gathered in bfloat16.
    """
    mesh = mesh_of(ranks, device)
    policy = MixedPrecisionPolicy()
    if halved:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        norms = [module for module in model.layers.modules() if isinstance(module, nn.LayerNorm | nn.RMSNorm)]
        for norm in norms:
            fully_shard(norm, mesh=mesh, reshard_after_forward=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A plain sum: each rank's loss has its share of the batch's weight already.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def mesh_of(ranks: Ranks, device: str) -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh(device.split(":")[0], (ranks.size,))


def build_sharded(
    architecture: Architecture,
    ranks: Ranks,
    *,
    seed: int | None,
    device: str,
    dtype: torch.dtype = torch.float32,
    halved: bool = False,
    compiled: bool = False,
) -> Transformer:
    """`model.build` in shards: the same numbers, with one whole matrix at a time in a rank's memory.

    Args:
        seed: numbers are left undefined if None.
        halved: as in `shard`.
        compiled: torch.compile every layer.
    """
    with torch.device("meta"):
        model = Transformer(architecture).to(dtype)
    if compiled:
        for layer in model.layers:
            layer.compile()
    shard(model, ranks, device=device, halved=halved)
    model.to_empty(device=device.split(":")[0])
    if seed is not None:
        model.initialise(torch.Generator().manual_seed(seed), assign=_assign)
    return model


def twin(model: Transformer, ranks: Ranks, *, device: str) -> Transformer:
    """A model in shards that has the same weights, and the same end of a document, gathers all of them as they are and
    compiles nothing, to be evaluated as one process does; for as long as it is used it takes the memory of this rank's
    weights again."""
    dtype = next(model.parameters()).dtype
    same = build_sharded(model.architecture, ranks, seed=None, device=device, dtype=dtype)
    same.end_of_document = model.end_of_document
    with torch.no_grad():
        for parameter, original in zip(same.parameters(), model.parameters(), strict=True):
            local(parameter.detach()).copy_(local(original.detach()))
    return same


def _assign(parameter: Tensor, matrix: Tensor) -> None:
    assert isinstance(parameter, DTensor)
    on_device = matrix.to(parameter.device, parameter.dtype)
    # Every rank has the same matrix: nothing has to be sent.
    part = distribute_tensor(on_device, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(part.to_local())
