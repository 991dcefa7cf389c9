"""What a training step holds beside its weights, counted by taking the step with tensors that have no memory.

The network's own forward and backward passes are run under torch's `FakeTensorMode`, which gives tensors shapes alone,
autograd and autocast included. Whenever an operation has made a tensor, the bytes of all that are alive are added up.
So there is no formula to keep in step with the network: whatever `empirics.model` does is counted, to the byte
(but for LayerNorm of bfloat16, whose mean and deviation torch takes for halves here: 4 bytes a token too few).

A CPU's step is counted as it is. A GPU's is counted on the CPU with three differences:

- attention is fused unless it cannot be: queries, keys, values, outputs and a number a row are kept, as by
  FlashAttention and the memory-efficient kernel (with neither, torch writes it out, and keeps T^2 numbers a head);
- logits are there all at once, since `HeadLoss` is the CPU's;
- autocast normalises and takes softmax in float32.

On either, tokens are spread evenly over experts; how they are spread moves the peak, and not what is kept. Layers that
are alike are counted at two depths (`DEPTHS`), from which more follow exactly.

Left out is what no operation returns: scratch memory inside of one, the blocks that an allocator rounds to and what
is lost between them. A compiled step is another one, which fuses operations and keeps less.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from empirics.model import Kernel, Transformer
from theory.architecture import Architecture

Kind = Literal["activations", "casts", "gradients"]
Moment = Literal["the forward pass", "the backward pass", "the optimizer's step"]
Held = dict[Kind, int]
FORWARD = "forward pass"
NOTHING: Held = {"activations": 0, "casts": 0, "gradients": 0}
# What there is at an operation is linear in the depth, and so is the most of a stage that has the same operations at
# every depth. In the backward pass it is linear in the layer that has been reached too, and so largest near an
# end. Its stages are the head, until a layer has a gradient; the last layer, until the one before has; those between;
# the second; and the first, after which there is no other.
DEPTHS = (4, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes that a pass holds beside the parameters.

    Attributes:
        activations: at the peak: what the backward pass needs still, and what is there for a moment.
        casts: at the peak: weights that autocast has rounded and keeps until the backward pass.
        gradients: at the peak: of parameters, in float32.
        moment: when the peak is.
        kept: activations and casts when the forward pass is over: what autograd has saved, and the loss.
        left: activations when both passes are over: what a probe keeps.
    """

    activations: int
    casts: int
    gradients: int
    moment: Moment
    kept: int
    left: int

    @property
    def total(self) -> int:
        """At the peak."""
        return self.activations + self.casts + self.gradients


class Alive(TorchDispatchMode):
    """Adds up the bytes of the tensors that operations have made and nobody has let go, by kind, views once.

    Args:
        layers: parameters layer by layer.

    Attributes:
        stage: what is being done.
        now, peaks: bytes at present, and in every stage when they were most.
    """

    def __init__(
        self, parameters: Sequence[Tensor], layers: Sequence[Sequence[Tensor]], *, devices: int, n_experts: int
    ) -> None:
        super().__init__()
        self._parameters = {_key(p) for p in parameters}
        names = {len(layers) - 1: "last layer", 1: "second layer", 0: "first layer"}
        self._layers = {_key(p): names.get(n, "layers") for n, layer in enumerate(layers) for p in layer}
        self._known: dict[int, tuple[Kind, int, Any]] = {}
        self._devices, self._n_experts, self._routed = devices, n_experts, 0
        self.stage = FORWARD
        self.now, self.peaks = dict(NOTHING), dict[str, Held]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.stage == "probe" and func is torch.ops.aten.clone.default:
            self.stage = "probe's copies"
        found = self._by_value(func, args)
        if found is None:
            found = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and _key(args[0]) in self._parameters
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, Tensor):
                self._see(each, "casts" if cast else "activations")
        peak = self.peaks.setdefault(self.stage, dict(NOTHING))
        if _on_one(self.now, self._devices) > _on_one(peak, self._devices):
            peak.update(self.now)
        return found

    def is_gradient(self, parameter: Tensor) -> None:
        """Take what a parameter has in `grad` for that, in float32 whatever the weight was gathered in."""
        assert parameter.grad is not None
        self._see(parameter.grad, "gradients")
        kind, size, reference = self._known[_key(parameter.grad)]
        wide = 4 * parameter.numel()
        self._known[_key(parameter.grad)] = ("gradients", wide, reference)
        self.now[kind] -= size
        self.now["gradients"] += wide
        if self.stage != FORWARD:
            self.stage = self._layers.get(_key(parameter), self.stage)

    def _by_value(self, func: Any, args: Any) -> Any:
        """What depends on numbers, which nobody has: as many tokens an expert, and no target that does not count."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if func is not torch.ops.aten.nonzero.default:
            return None
        n, chosen = 0, args[0].numel()
        if args[0].ndim == 2:
            expert = self._routed % self._n_experts
            self._routed += 1
            n = (expert + 1) * chosen // self._n_experts - expert * chosen // self._n_experts
        return args[0].new_empty((n, args[0].ndim), dtype=torch.int64)

    def _see(self, tensor: Tensor, kind: Kind) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._parameters or key in self._known:
            return

        def gone(_: object) -> None:
            last, size, _ = self._known.pop(key)
            self.now[last] -= size

        self._known[key] = (kind, storage.nbytes(), weakref.ref(storage, gone))
        self.now[kind] += storage.nbytes()


class Shortened(TorchFunctionMode):
    """Has `HeadLoss` take two parts of its tokens, however many there are: those after the second are like it."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self._n_tokens = n_tokens

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.split or len(args[0]) != self._n_tokens:
            return func(*args, **(kwargs or {}))
        x, size = args
        return [x[start : start + size] for start in (0, size) if start < len(x)]


class AsOnGPU(TorchFunctionMode):
    """What a CUDA device does otherwise than a CPU: its autocast normalises and takes softmax in float32, and its fused
    attention has room for a mask of every head."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (F.layer_norm, torch.softmax, Tensor.softmax) and torch.is_autocast_enabled("cpu"):
            args = (args[0].float(), *args[1:])
        elif func is F.scaled_dot_product_attention and (mask := kwargs.get("attn_mask")) is not None:
            kwargs["attn_mask"] = mask.view(1, -1, *mask.shape[-2:])  # the CPU's wants four axes
        return func(*args, **kwargs)


@lru_cache
def footprint(
    architecture: Architecture,
    *,
    batch_size: int,
    seq_len: int,
    precision: str = "float32",
    gpu: bool = False,
    devices: int = 1,
    attention: Kernel | Literal["auto"] = "auto",
    z_loss: float = 0.0,
    all_logits: bool = False,
    probed: bool = False,
    accumulated: bool = False,
) -> Footprint:
    """Count one pass of `batch_size` sequences at once, forwards and backwards.

    Args:
        gpu: as a GPU takes it, else as a CPU does.
        devices: over which weights and gradients are spread (FSDP): in bfloat16 the layers' weights come in bfloat16
            and nothing is cast. What is gathered is not in the count; the peak is of one device's share.
        attention, z_loss: as a training has them.
        all_logits: the loss is taken of all at once, as it always is on a GPU.
        probed: a probe looks at the residual stream, which then keeps its gradients.
        accumulated: gradients of other passes, and what a probe has kept of them, are there already.
    """
    a = architecture

    def count(n_layers: int) -> dict[tuple[str, str], int]:
        return _count(
            replace(a, n_layers=n_layers), (batch_size, seq_len), halved=precision == "bfloat16", gpu=gpu,
            devices=devices, attention=attention, z_loss=z_loss, all_logits=all_logits or gpu, probed=probed,
            accumulated=accumulated,
        )  # fmt: skip

    def kind(layer: int) -> tuple[int, bool]:
        return a.window_at(layer), a.rope_base_at(layer) is None

    if a.n_layers > max(DEPTHS) and len(set(map(kind, range(a.n_layers)))) == 1:
        less, found = map(count, DEPTHS)
        found = {key: n + (a.n_layers - max(DEPTHS)) * (n - less[key]) for key, n in found.items()}
    else:
        found = count(a.n_layers)
    stages = {stage for stage, _ in found if stage != "all"}
    peaks: dict[str, Held] = {stage: {kind: found[stage, kind] for kind in NOTHING} for stage in stages}
    stage = max(stages, key=lambda stage: _on_one(peaks[stage], devices))
    peak, kept, left = peaks[stage], found["all", "kept"], found["all", "left"]
    return Footprint(
        activations=peak["activations"] + (left if accumulated else 0),
        casts=peak["casts"],
        gradients=peak["gradients"],
        moment="the forward pass" if stage == FORWARD else "the backward pass",
        kept=kept,
        left=left,
    )


def _count(
    architecture: Architecture,
    shape: tuple[int, int],
    *,
    halved: bool,
    gpu: bool,
    devices: int,
    attention: Kernel | Literal["auto"],
    z_loss: float,
    all_logits: bool,
    probed: bool,
    accumulated: bool,
) -> dict[tuple[str, str], int]:
    """Bytes by stage and kind, each stage at its most; of all, those kept between the passes and left after them."""
    with FakeTensorMode():
        model = Transformer(architecture)
        if halved and devices > 1:
            _halve(model.layers)
        parameters, layers = list(model.parameters()), [list(layer.parameters()) for layer in model.layers]
        alive = Alive(parameters, layers, devices=devices, n_experts=architecture.n_experts)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(alive.is_gradient)
            if accumulated:
                parameter.grad = torch.empty_like(parameter)
                alive.is_gradient(parameter)
        products = torch.bfloat16 if halved else torch.float32
        how = model.attend(attention, device="cuda" if gpu else "cpu", dtype=products, n_tokens=shape[1])
        model.attend(how, device="cpu", dtype=products, n_tokens=shape[1])
        if all_logits:
            model.head.register_forward_hook(lambda *_: None)  # a head with a hook is called, and gives all logits
        with AsOnGPU() if gpu else Shortened(shape[0] * shape[1]), alive:
            kept, left = _pass(model, alive, shape, halved=halved, z_loss=z_loss, probed=probed)
    found: dict[tuple[str, str], int] = {("all", "kept"): kept, ("all", "left"): left}
    return found | {(stage, kind): n for stage, held in alive.peaks.items() for kind, n in held.items()}


def _pass(
    model: Transformer, alive: Alive, shape: tuple[int, int], *, halved: bool, z_loss: float, probed: bool
) -> tuple[int, int]:
    """Run both passes; what is kept between them, and what is left of activations after them."""
    tokens, targets = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    places: list[Tensor] | None = [] if probed else None
    with torch.autocast("cpu", torch.bfloat16, enabled=halved):
        if z_loss:
            from empirics.train import objective  # a second to import, as is the next

            loss, _ = objective(model, z_loss, tokens, targets, places)
            del _
        else:
            loss = model.loss(tokens, targets, places)
    kept = alive.now["activations"] + alive.now["casts"]
    alive.stage = "head"
    loss.backward()
    subject = None
    if places is not None:
        from empirics.subject import Subject

        alive.stage, subject = "probe", Subject(model, tokens, targets)
        subject.see(places)
    del loss, places
    left = alive.now["activations"] - tokens.nbytes - targets.nbytes
    del subject
    return kept, left


def _on_one(held: Held, devices: int) -> float:
    """Of several devices, which share the gradients."""
    return held["activations"] + held["casts"] + held["gradients"] / devices


def _halve(layers: nn.ModuleList) -> None:
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            for name, parameter in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(parameter.detach().bfloat16()))


def _key(tensor: Tensor) -> int:
    """Of the memory that a tensor is in, views the same."""
    return tensor.untyped_storage()._cdata
