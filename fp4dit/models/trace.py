"""One call of a transformer, watched: which of its parts run, and what each one's call is made of.

Between its parts a transformer computes things without weights: positions, masks, a sequence joined or cut. To make
the call of one part again, the transformer itself is run with all parts before it answered for, up to that part.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from fp4dit.calls import Call, removed
from fp4dit.errors import UserError
from fp4dit.models.check import HELP
from fp4dit.policy import layers
from fp4dit.stream import Rows, State, Unit


def parts(dit: nn.Module) -> list[str]:
    """The children that have layers with weights; of a list of blocks, each block.

    Raises:
        UserError: if there is no list of blocks.
    """
    lists = {name: child for name, child in dit.named_children() if isinstance(child, nn.ModuleList) and layers(child)}
    if not lists:
        children = ", ".join(f"{name} ({type(child).__name__})" for name, child in dit.named_children())
        raise UserError(f"{type(dit).__name__} has no list of blocks, only {children}. {HELP}")
    return [
        part
        for name, child in dit.named_children()
        for part, module in (
            [(f"{name}.{i}", m) for i, m in child.named_children()] if name in lists else [(name, child)]
        )
        if layers(module)
    ]


@dataclass(frozen=True)
class Shape:
    """A column's name in a tree, and what its rows are like."""

    name: str
    row: torch.Size
    dtype: torch.dtype

    def blank(self, count: int, device: torch.device) -> Tensor:
        """In place of an answer that nobody asks for."""
        return torch.zeros((), dtype=self.dtype, device=device).expand(count, *self.row)


@dataclass(frozen=True)
class Tree:
    """Nested arguments or answers: `Shape` where there is a row for each sample, all else as it was."""

    leaves: tuple[Any, ...]
    spec: TreeSpec

    @property
    def shapes(self) -> list[Shape]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Shape)]

    def filled(self, fill: Callable[[Shape], Tensor]) -> Any:
        return tree_unflatten([fill(leaf) if isinstance(leaf, Shape) else leaf for leaf in self.leaves], self.spec)


@dataclass(frozen=True)
class Arguments:
    """What a transformer is called with, and the names of that. A tensor with one number is one for each sample."""

    tree: Tree
    names: tuple[str, ...]

    @classmethod
    def of(cls, dit: nn.Module, call: Call) -> "Arguments":
        named = call.named(dit)
        if "timestep" not in named:
            raise UserError(f"{type(dit).__name__} is not called with a timestep by that name. {HELP}")
        count = len(next(iter(named.values())))
        found, spec = tree_flatten_with_path(named)
        names = [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in found]
        names[0] = "latent"  # as it is in other models
        leaves = tuple(shape(name, leaf, count) for name, (_, leaf) in zip(names, found, strict=True))
        return cls(Tree(leaves, spec), tuple(names))

    def state(self, dit: nn.Module, call: Call) -> State:
        """A row for each sample of another such call.

        Raises:
            UserError: if an argument that has none is not what it was.
        """
        named = call.named(dit)
        given, spec = tree_flatten(named)
        count, state = len(next(iter(named.values()))), {}
        if spec != self.tree.spec:
            raise UserError(f"{type(dit).__name__} is not called with the same arguments at each step. {HELP}")
        for name, leaf, value in zip(self.names, self.tree.leaves, given, strict=True):
            if isinstance(leaf, Shape):
                state[name] = value if leaf.row else value.reshape(-1).expand(count)
            elif not same(leaf, value):
                raise UserError(
                    f"{type(dit).__name__}: {name} differs from call to call, and has no row for each sample. {HELP}"
                )
        return state

    def call(self, fill: Callable[[Shape], Tensor]) -> Call:
        return Call((), self.tree.filled(fill))


def shape(name: str, leaf: Any, count: int) -> Any:
    """A Shape for what has a row for each sample; all else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.numel() == 1:
        return Shape(name, torch.Size(), leaf.dtype)
    return Shape(name, leaf.shape[1:], leaf.dtype) if len(leaf) == count else leaf


def same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a == b
    return a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a, b.to(a.device)))


class Reached(Exception):
    """The run came to the part that was asked for, with this call."""

    def __init__(self, call: Call) -> None:
        self.call = call


@contextmanager
def answering(dit: nn.Module, names: Collection[str], answer: Callable[..., Any]) -> Iterator[None]:
    """Inside the block these parts do not run: `answer(name, *args, **kwargs)` does."""
    modules = {name: dit.get_submodule(name) for name in names}
    own = {
        name: {key: value for key, value in vars(module).items() if key == "forward"}
        for name, module in modules.items()
    }
    for name, module in modules.items():
        module.forward = partial(answer, name)
    try:
        yield
    finally:
        for name, module in modules.items():
            del module.forward
            vars(module).update(own[name])


@dataclass(frozen=True)
class Trace:
    """A transformer's arguments, and what each of its parts answers, in execution order."""

    arguments: Arguments
    answers: Mapping[str, Tree]

    def units(self, dit: nn.Module) -> list[Unit]:
        reads = self.reads(dit)
        return [
            Unit(name, reads[name], partial(self.call, dit, name), tuple(s.name for s in tree.shapes))
            for name, tree in self.answers.items()
        ]

    def call(self, dit: nn.Module, module: str, rows: Rows) -> Call:
        """The call of one part, made of rows of the columns that it reads. The others count for their shape alone."""
        time = rows["timestep"]
        fill = lambda leaf: rows[leaf.name] if leaf.name in rows else leaf.blank(len(time), time.device)

        def answer(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == module:
                raise Reached(Call(args, kwargs))
            return self.answers[name].filled(fill)

        with answering(dit, self.answers, answer):
            try:
                self.arguments.call(fill)(dit)
            except Reached as reached:
                return reached.call
        raise AssertionError(f"{module} ran when the call was watched, and now it does not")

    @torch.enable_grad()
    def reads(self, dit: nn.Module) -> dict[str, tuple[str, ...]]:
        """For each part the columns that its call is computed from: those that have a gradient there, and all integers.

        Raises:
            UserError: if the transformer itself runs a layer of a part.
        """
        device = next(dit.parameters()).device
        made: dict[str, Tensor] = {}
        found: dict[str, tuple[str, ...]] = {}

        def fill(leaf: Shape) -> Tensor:
            made[leaf.name] = leaf.blank(2, device).clone().requires_grad_(leaf.dtype.is_floating_point)
            return made[leaf.name].clone()  # which may be written to

        def answer(name: str, *args: Any, **kwargs: Any) -> Any:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]
            found[name] = tuple(column for column, x in made.items() if column == "timestep" or reaches(x, given))
            return self.answers[name].filled(fill)

        def stray(name: str) -> None:
            raise UserError(f"{type(dit).__name__} runs {name} itself, outside the block that owns it. {HELP}")

        inside = {name: layer for name, layer in layers(dit).items() if name not in self.answers}
        hooks = [layer.register_forward_pre_hook(lambda *_, name=name: stray(name)) for name, layer in inside.items()]
        with removed(hooks), answering(dit, self.answers, answer):
            self.arguments.call(fill)(dit)
        return found


def reaches(source: Tensor, values: Sequence[Tensor]) -> bool:
    """Whether any of the values is computed from `source`; always, for one that has no gradients."""
    if not source.requires_grad:
        return True
    ones = [torch.ones_like(value) for value in values]
    return (
        bool(values) and torch.autograd.grad(values, source, ones, retain_graph=True, allow_unused=True)[0] is not None
    )


@torch.no_grad()
def watch(dit: nn.Module, call: Call) -> Trace:
    """Runs the call.

    Raises:
        UserError: if a part runs twice, or answers without a row for each sample.
    """
    count, answers = len(next(iter(call.named(dit).values()))), {}

    def hook(name: str, output: Any) -> None:
        leaves, spec = tree_flatten(output)
        if name in answers:
            raise UserError(f"{name} of {type(dit).__name__} runs more than once in a call. {HELP}")
        if any(isinstance(leaf, Tensor) and len(leaf) != count for leaf in leaves):
            raise UserError(f"{name} of {type(dit).__name__} does not answer with a row for each sample. {HELP}")
        answers[name] = Tree(tuple(shape(f"{name}.{i}", leaf, count) for i, leaf in enumerate(leaves)), spec)

    modules = {name: dit.get_submodule(name) for name in parts(dit)}
    hooks = [m.register_forward_hook(lambda _m, _a, output, n=n: hook(n, output)) for n, m in modules.items()]
    with removed(hooks):
        call(dit)
    return Trace(Arguments.of(dit, call), answers)
