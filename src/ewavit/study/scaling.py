"""What training asks of each of many devices: memory, FLOPs and bytes sent, in closed form.

Mixed precision as usual: weights, gradients and AdamW's moments in float32, computing in bfloat16. What the
forms leave out, and what they were held against, is in docs/scaling.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from ewavit.errors import EwavitError

STATE = 4 + 4 + 8  # bytes of a parameter: weight, gradient, AdamW's two moments
HALF, FULL = 2, 4  # bytes of a bfloat16 and a float32
LAYOUTS = (
    "dense, DDP",
    "stacked, DDP",
    "replicas, DDP",
    "dense, FSDP2",
    "stacked, FSDP2",
    "dense, HSDP",
    "stacked, HSDP",
    "replicas, HSDP",
)


def check_devices(devices: int, router: str) -> None:
    """Check what the forms cannot tell.

    Raises:
        EwavitError: no number of devices, or a learned router.
    """
    if devices < 1:
        raise EwavitError(f"--devices {devices} is no number of devices: choose 1 or more")
    if router != "random":
        raise EwavitError(f"--router {router} has no closed form for --devices: leave one out")


@dataclass(frozen=True)
class Work:
    """What a dense model costs, whoever trains it.

    Attributes:
        parameters: of the model.
        ffn_parameters: those of the FFNs that become mixtures.
        mixtures: how many FFNs that are.
        block_parameters: of a block with such an FFN, the piece that FSDP2 gathers at a time.
        forward_flops: of one image, a multiply-add counted as two.
        activation_bytes: kept for the backward pass of one image.
        checkpointed_bytes: the same at its largest when each block is computed again.
    """

    parameters: int
    ffn_parameters: int
    mixtures: int
    block_parameters: int
    forward_flops: int
    activation_bytes: int
    checkpointed_bytes: int


@dataclass(frozen=True)
class Cost:
    """Of one training step, for one device; bytes and FLOPs."""

    state_bytes: int  # weights, gradients, moments
    working_bytes: int  # half-precision weights, buffers of the communication
    activation_bytes: int
    flops: int
    sent_bytes: int

    @property
    def memory_bytes(self) -> int:
        """All that the forms know of."""
        return self.state_bytes + self.working_bytes + self.activation_bytes


@dataclass(frozen=True)
class ViT:
    """Sizes of timm's VisionTransformer (arXiv 2010.11929): class token, biases, LayerNorm, GELU.

    Attributes:
        depth: blocks.
        dim: width of a token.
        heads: heads of the attention.
        patch: side of a patch, pixels.
        hidden: width of the FFNs' hidden layer; 4 dim unless given.
        img_size, num_classes, in_chans: of the data.
    """

    depth: int
    dim: int
    heads: int
    patch: int
    hidden: int | None = None
    img_size: int = 224
    num_classes: int = 1000
    in_chans: int = 3

    def work(self, every: int = 2, half: bool = True) -> Work:
        """What the model costs.

        Args:
            every: every so-many-th FFN becomes a mixture.
            half: keep activations as bfloat16 autocast does, else float32.
        """
        depth, dim, patch = self.depth, self.dim, self.patch
        hidden = self.hidden or 4 * dim
        patches, pixels = (self.img_size // patch) ** 2, patch * patch * self.in_chans
        tokens, mixtures = patches + 1, -(-depth // every)
        # Parameters: matrices and biases of qkv, projection and FFN, two norms; patches, positions, norm,
        # head.
        ffn = 2 * dim * hidden + hidden + dim
        block = 4 * dim * dim + 4 * dim + 4 * dim + ffn
        parameters = (
            depth * block + (pixels + 1) * dim + (tokens + 1) * dim + 2 * dim + (dim + 1) * self.num_classes
        )
        # Two FLOPs for each entry of a matrix and token; scores and weighted sum take tokens x tokens x dim
        # each.
        per_token = 2 * (4 * dim * dim + 2 * dim * hidden)
        flops = depth * (tokens * per_token + 4 * tokens * tokens * dim)
        flops += 2 * patches * pixels * dim + 2 * dim * self.num_classes
        # Kept for backward, for each token of a block: what enters the norms (float32, with two statistics
        # each) and the log-sum-exp of each head; what enters qkv, the attention (3 dim), the projection, and
        # the FFN's two matrices and activation. Beside the blocks: the image, the last norm, the head.
        low = HALF if half else FULL
        kept = FULL * (2 * dim + 4 + self.heads) + low * (dim + 3 * dim + dim + dim + 2 * hidden)
        # That takes the class token: of a float32 norm a view, which keeps all tokens; in bfloat16 a copy.
        head = HALF * dim if half else FULL * tokens * dim
        ends = low * self.in_chans * self.img_size**2 + FULL * tokens * (dim + 2) + head
        one_block = tokens * kept
        activations = depth * one_block + ends
        checkpointed = depth * FULL * tokens * dim + one_block + ends
        return Work(parameters, mixtures * ffn, mixtures, block, flops, activations, checkpointed)


def cost(
    work: Work,
    layout: str,
    devices: int,
    *,
    num_experts: int = 4,
    batch_size: int = 32,
    checkpointing: bool = True,
    shard: int = 8,
) -> Cost:
    """The cost of a training step on each device.

    Args:
        work: of the dense model.
        layout: one of `LAYOUTS`. Replicas have one expert on each device, or on each group of HSDP.
        devices: in all.
        num_experts: N of stacked experts.
        batch_size: images for each device.
        checkpointing: compute each block's activations again in the backward pass.
        shard: devices that HSDP cuts a model over; each such group has the whole of it.

    Raises:
        EwavitError: an unknown layout, or devices that the groups of HSDP do not divide.
    """
    if layout not in LAYOUTS:
        raise EwavitError(f"layout {layout!r} is unknown: choose one of {'; '.join(LAYOUTS)}")
    kind, wrapper = layout.split(", ")
    if devices < 1 or (wrapper == "HSDP" and devices % shard):
        raise EwavitError(
            f"devices={devices} cannot be cut in groups of {shard}: choose a multiple of {shard}"
        )
    more = num_experts - 1 if kind == "stacked" else 0
    parameters = work.parameters + more * work.ffn_parameters
    ffn = work.ffn_parameters // max(work.mixtures, 1)
    block = work.block_parameters + more * ffn
    averaged = FULL * ffn if kind == "replicas" else 0  # one FFN at a time, flat, for its all-reduce
    if wrapper == "DDP":
        parts, groups = 1, devices
        # autocast's weights in half precision; DDP's buckets, where an expert of one's own has no gradient
        reduced = parameters - (work.ffn_parameters if kind == "replicas" else 0)
        working = HALF * parameters + FULL * reduced + averaged
        sent = 0.0
    else:
        parts = devices if wrapper == "FSDP2" else shard
        groups = devices // parts
        # Two blocks gathered (in use, and on its way), the gradient of one, and its float32 copy on its way.
        working = (2 * HALF + HALF + FULL) * block + averaged // parts
        # A ring sends (n - 1) / n of what it gathers or scatters: weights forward and backward, gradients.
        sent = (parts - 1) / parts * (2 * HALF + FULL) * parameters
    # A ring's all-reduce sends twice that: gradients, or of experts of one's own the weights in their stead.
    sent += 2 * (groups - 1) / groups * FULL * parameters / parts
    kept = work.checkpointed_bytes if checkpointing else work.activation_bytes
    return Cost(
        state_bytes=STATE * parameters // parts,
        working_bytes=working,
        activation_bytes=batch_size * kept,
        flops=(4 if checkpointing else 3) * work.forward_flops * batch_size,  # backward is two forwards
        sent_bytes=round(sent),
    )


def layouts(devices: int, shard: int = 8) -> tuple[str, ...]:
    """The layouts that so many devices allow."""
    hybrid = devices > shard and devices % shard == 0
    return tuple(layout for layout in LAYOUTS if hybrid or "HSDP" not in layout)


def table(
    work: Work, devices: int, num_experts: int = 4, batch_size: int = 32, checkpointing: bool = True
) -> list[tuple[str, ...]]:
    """One row for each layout that the devices allow, in words, under a row of titles."""
    rows: list[tuple[str, ...]] = [
        ("layout", "memory GiB", "state", "working", "activations", "TFLOPs a step", "sent GB a step")
    ]
    for layout in layouts(devices):
        found = cost(
            work, layout, devices, num_experts=num_experts, batch_size=batch_size, checkpointing=checkpointing
        )
        parts = (found.memory_bytes, found.state_bytes, found.working_bytes, found.activation_bytes)
        memory = (f"{each / 2**30:,.2f}" for each in parts)
        rows.append((layout, *memory, f"{found.flops / 1e12:,.1f}", f"{found.sent_bytes / 1e9:,.2f}"))
    return rows
