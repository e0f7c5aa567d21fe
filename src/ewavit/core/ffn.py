"""Which modules of a model are FFNs: found by name and class, then checked by running them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ewavit.core.copying import attachments, duplicate
from ewavit.core.experts import ExpertLeaf, Experts, SeparateExperts, StackedExperts
from ewavit.core.moe import MoE, Unit
from ewavit.errors import first_line

_NAMES = re.compile(r"(mlp|ffn)\d*|mlp_(layer|channels|tokens|in)|channel_mixer|feed_?forward|ff")
_CLASSES = re.compile(r"mlp|ffn|feed_?forward|swiglu|geglu", re.IGNORECASE)
_NOT_FFNS = (  # a part of the module's name, and what such a module is
    (re.compile(r"(self_|cross_)?attn\d*|(self_|cross_)?attention"), "part of attention, not an FFN"),
    (re.compile(r"(shared_)?rel_pos\w*"), "computes a position bias, not an FFN"),
    (re.compile(r"se|mlp_(scale|add)"), "part of channel attention, not an FFN"),
    (re.compile(r"mlp_tokens|mlp_inter|token_mixer"), "mixes tokens by design, not an FFN"),
    (
        re.compile(
            r"(\w+_)?(heads?|pool(er)?|projector|predictors?|classifier|(class|bbox|mask)_embed(der)?)"
        ),
        "part of the head, not an FFN",
    ),
    (re.compile(r"pre_logits"), "part of the head, not an FFN"),
)
_HEAD_CLASSES = re.compile(r"(?<!Multi)Heads?$|(Predictor|Classifier|Projector)$")
_DROPS = {  # layers that draw once for an image, and what they drop
    **dict.fromkeys(("DropPath", "StochasticDepth"), "images"),
    **dict.fromkeys(("Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"), "channels of an image"),
}
_SPLIT = (  # layers of an FFN that are direct children of some blocks
    ("intermediate", "output"),
    ("linear1", "linear2"),
    ("fc1", "fc2"),
    ("in_proj", "mlp_drop"),  # timm's ParallelScalingBlock: fused with attention
)


@dataclass(frozen=True)
class FFN:
    """One candidate: its place, the unit it can be dealt by, or why it cannot become a mixture of experts."""

    name: str
    module: nn.Module
    unit: Unit | None  # "token": tokens are independent; "image": tokens are mixed; None: refused
    reason: str = ""  # why it is refused or needs unit="image"
    channels_first: bool = False
    stackable: bool = False

    @property
    def class_name(self) -> str:
        """The class of the module."""
        return type(self.module).__name__

    @property
    def dim(self) -> int:
        """Channels of its input tokens; 0 if there is no Linear or Conv2d inside."""
        first = _first_layer(self.module)
        return 0 if first is None else first.weight.shape[1]

    @property
    def num_parameters(self) -> int:
        """Parameters of the module."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def find_ffns(model: nn.Module, names: list[str] | None = None) -> list[FFN]:
    """The FFNs of a model and other candidates with a reason, in module order; a shared FFN appears once.

    Candidates are found by attribute and class name. Then a copy with random weights runs on random tokens:
    the FFN is token-wise if replacing one token and reordering all changes no other token's output. The model
    and the random generators stay as they are.

    Args:
        model: any module.
        names: examine these modules instead of searching for candidates.

    Raises:
        KeyError: the model has no module of this name.
    """
    modules = dict(model.named_modules())
    known: dict[str, FFN] = {}  # the blocks of a ViT are alike: examine each kind of FFN once
    result = []
    for name in _candidates(modules) if names is None else names:
        module = modules[name]
        friend = _false_friend(name, modules) if names is None else ""
        if isinstance(module, MoE):
            result.append(FFN(name, module, None, "is already expanded"))
        elif friend:
            result.append(FFN(name, module, None, friend))
        elif any(isinstance(parameter, UninitializedParameter) for parameter in module.parameters()):
            result.append(FFN(name, module, None, "its layers are lazy and empty: run the model once first"))
        else:
            signature = _signature(module)
            if signature not in known:
                known[signature] = _examine(name, module)
            result.append(replace(known[signature], name=name, module=module))
    return result if names is not None else _without_leftovers(result, modules)


def _without_leftovers(found: list[FFN], modules: dict[str, nn.Module]) -> list[FFN]:
    """Refuse what lies outside the blocks where the blocks themselves are refused: it is a head or a stem."""
    blocks = {ffn.name.rpartition(".")[0] for ffn in found if _split(ffn.module)}
    inside = any(ffn.unit and ffn.name.startswith(tuple(f"{name}." for name in blocks)) for ffn in found)
    if not blocks or inside:
        return found

    def leftover(ffn: FFN) -> bool:
        return bool(ffn.unit) and not _attends(modules[ffn.name.rpartition(".")[0]])

    reason = "outside the blocks, which cannot be expanded: a head or a stem"
    return [replace(ffn, unit=None, reason=reason) if leftover(ffn) else ffn for ffn in found]


def _candidates(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the innermost modules that look like FFNs, and of blocks that compute their FFN themselves."""
    mixtures = tuple(f"{name}." for name, module in modules.items() if isinstance(module, MoE))
    likely = [
        name
        for name, module in modules.items()
        if name and not name.startswith(mixtures) and (_looks_like_ffn(name, module) or _split(module))
    ]
    return [
        name
        for name in likely
        if _split(modules[name]) or not any(other.startswith(f"{name}.") for other in likely)
    ]


def _looks_like_ffn(name: str, module: nn.Module) -> bool:
    named = _NAMES.fullmatch(name.rpartition(".")[2]) or _CLASSES.search(type(module).__name__)
    return bool(named and module._modules and next(module.parameters(), None) is not None)


def _split(block: nn.Module) -> tuple[str, str] | None:
    """The two FFN layers of a block that computes its FFN itself, besides its attention."""
    children = {name for name, child in block._modules.items() if child is not None}
    if _attends(block):
        return next((pair for pair in _SPLIT if children.issuperset(pair)), None)
    return None


def _attends(block: nn.Module) -> bool:
    """Whether a module holds attention: it is a block, and an FFN in it is no head."""
    held = [name for name, child in block._modules.items() if child is not None]
    return any("attn" in name or "attention" in name for name in held)


def _signature(module: nn.Module) -> str:
    """Everything `_examine` depends on: structure, plain attributes, shapes, dtypes and devices."""
    plain = (bool, int, float, str, tuple)
    parts = [
        (type(part), [(key, value) for key, value in vars(part).items() if isinstance(value, plain)])
        for part in module.modules()
    ]
    tensors = [(name, value.shape, value.dtype, value.device) for name, value in module.named_parameters()]
    return f"{module!r} {parts} {tensors} {[attachments(part) for part in module.modules()]}"


def _false_friend(name: str, modules: dict[str, nn.Module]) -> str:
    for holder in (name, name.rpartition(".")[0]):
        if _HEAD_CLASSES.search(kind := type(modules[holder]).__name__):
            return f"part of the head ({kind}), not an FFN"
    for component in name.split("."):
        for pattern, reason in _NOT_FFNS:
            if pattern.fullmatch(component):
                return f"{reason} (`{component}`)"
    return ""


def _examine(name: str, module: nn.Module) -> FFN:
    """Decide by looking inside, then by running it, which unit a module can be dealt by."""

    def refused(reason: str) -> FFN:
        return FFN(name, module, None, reason)

    if pair := _split(module):
        return refused(f"the block computes its FFN itself ({' and '.join(pair)}): there is no FFN module")
    for inner, part in module.named_modules():
        kind = type(part).__name__
        if "forward" in vars(part):
            where = f"{inner}.forward" if inner else "its forward"
            return refused(f"{where} was replaced and belongs to this one module: replace it after expand")
        if "batchnorm" in kind.lower():
            return refused(f"{kind} inside: its statistics would differ from expert to expert")
        if what := _DROPS.get(kind):
            return FFN(name, module, "image", f'drops whole {what} ({kind} inside): needs unit="image"')
    for parameter in module.parameters():
        if parameter.is_meta:
            return refused("its parameters are on the meta device: give them memory first")
        if not parameter.is_floating_point():
            return refused(f"its weights are {parameter.dtype}: averaging needs floating point")
    inputs = list(_probe_inputs(module))
    if not inputs:
        return refused("no Linear or Conv2d inside")
    spatial = next((m for m in module.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1), None)
    if spatial is not None:
        mixes = f"mixes tokens ({'x'.join(map(str, spatial.kernel_size))} convolution inside)"
        return FFN(name, module, "image", f'{mixes}: needs unit="image"')
    try:
        trial = _with_random_weights(module)
    except Exception as problem:
        return refused(f"cannot be copied: {_short(problem)}")
    errors = []
    for x, channel_dim in inputs:
        try:
            with torch.no_grad():
                moved = _moved_tokens(trial, x, channel_dim)
        except Exception as problem:
            # Any error in someone else's forward means the same here: it cannot be called like this.
            errors.append(f"cannot be run on {tuple(x.shape)}: {_short(problem)}")
            continue
        if moved is None:
            errors.append("does not return one output per token")
        elif moved[1:].any():
            return refused("mixes the images of a batch")
        elif moved.sum() > 1:
            return FFN(name, module, "image", 'mixes tokens or depends on their position: needs unit="image"')
        elif not moved[0, 0]:
            errors.append("its output does not depend on its input")
        elif (width := _width(trial, x, channel_dim)) != x.shape[channel_dim]:
            return refused(f"{x.shape[channel_dim]} channels in, {width} out: a head or a projection")
        else:
            hooked = any(attachments(part) for part in module.modules() if part is not module)
            separate = _different(SeparateExperts(trial, 2))
            if not _deploys(separate, x):
                return refused("does not compute with its mean weights: merge adapters first (peft: LoRA)")
            plain = not hooked and _same_in_training(trial, x)
            return FFN(name, module, "token", "", channel_dim == 1, plain and _stacks(trial, separate, x))
    return refused(errors[0])


def _short(problem: Exception) -> str:
    return f"{type(problem).__name__}: {first_line(problem)}"


def _first_layer(module: nn.Module) -> nn.Linear | nn.Conv2d | None:
    return next((m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)), None)


def _probe_inputs(module: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Random inputs that may fit the module, two images of four tokens, with their channel dimension."""
    generator = torch.Generator().manual_seed(0)
    first = _first_layer(module)
    if first is None:
        return
    dim = first.weight.shape[1]
    shapes = [((2, 4, dim), -1), ((2, 2, 2, dim), -1), ((2, dim, 2, 2), 1)]
    if isinstance(first, nn.Conv2d):
        shapes.reverse()
    for shape, channel_dim in shapes:
        x = torch.randn(shape, generator=generator)
        yield x.to(first.weight.device, first.weight.dtype), channel_dim


def _with_random_weights(module: nn.Module) -> nn.Module:
    """A copy in eval mode with random weights: layers with zero weights would hide what they mix."""
    generator = torch.Generator().manual_seed(1)
    trial = duplicate(module, hooks=False).eval()  # a trial run calls no hook of the user's
    with torch.no_grad():
        for name, parameter in trial.named_parameters():
            if "parametrizations" in name.split("."):
                continue  # its values may have to fit together
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return trial


def _moved_tokens(trial: nn.Module, x: Tensor, channel_dim: int) -> Tensor | None:
    """Which output tokens (images, tokens) change when the tokens of the first image change.

    They are reversed and the first one is replaced; in a token-wise FFN only that one changes. None if the
    output does not have one token per input token.
    """

    def run(rows: Tensor) -> Tensor:
        output: Tensor = trial(rows.view_as(last).movedim(-1, channel_dim)).movedim(channel_dim, -1)
        return output.flatten(1, -2)

    last = x.movedim(channel_dim, -1).contiguous()
    rows = last.flatten(1, -2)
    changed = torch.cat([rows[:1].flip(1), rows[1:]])
    changed[0, -1] = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(2))
    before, after = run(rows), run(changed)
    if before.shape[:2] != rows.shape[:2]:
        return None
    after = torch.cat([after[:1].flip(1), after[1:]])
    return ~((after - before).abs().amax(-1) <= 1e-3 * before.abs().amax())  # so that NaN counts as moved


@torch.no_grad()
def _width(trial: nn.Module, x: Tensor, channel_dim: int) -> int:
    output: Tensor = trial(x)
    return output.shape[channel_dim]


@torch.no_grad()
def _different(experts: SeparateExperts) -> SeparateExperts:
    for parameter in experts.copies[1].parameters():
        parameter.mul_(0.5)
    return experts


@torch.no_grad()
def _deploys(experts: Experts, x: Tensor) -> bool:
    """Whether experts in eval mode compute what their collapse does, also when called again."""
    try:
        outputs = [experts.eval().merged(x) for _ in range(2)]
        plain = experts.collapse().eval()(x)
    except Exception:
        # Any error in someone else's forward means the same here: it needs weights of its own.
        return False
    return all(_close(output, plain) for output in outputs)


@torch.no_grad()
def _same_in_training(trial: nn.Module, x: Tensor) -> bool:
    """Whether a module computes the same in training mode, apart from its layers of dropout."""
    expected = trial(x)
    for part in trial.modules():
        part.training = not isinstance(part, nn.Dropout)
    try:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            return _close(trial(x), expected)
    except Exception:
        return False  # its forward fails in training; separate copies fail as the plain FFN does
    finally:
        trial.eval()


def _close(output: Tensor, expected: Tensor) -> bool:
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((output - expected).norm() <= tolerance * expected.norm())


@torch.no_grad()
def _stacks(trial: nn.Module, separate: SeparateExperts, x: Tensor) -> bool:
    """Whether stacked experts compute the same as two different separate copies on (E, ...) inputs."""
    try:
        stacked = StackedExperts(trial, 2)
        for (_, into), (_, values) in zip(
            stacked.values_by_parameter(), separate.values_by_parameter(), strict=True
        ):
            for target, value in zip(into, values, strict=True):
                target.copy_(value)
        if not _deploys(stacked, x):
            return False
        for part in stacked.modules():
            part.training = isinstance(part, ExpertLeaf)
        inputs = torch.stack([x, -x])
        return _close(stacked(inputs), separate(inputs))
    except Exception:
        # Separate copies accept what the stacked layers or the FFN's forward do not.
        return False
