"""Modules and optimizers with hooks or methods of their own: what a save and a load call, and with what."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardckpt
from shardckpt.errors import CorruptError, MissingKeysError, ShapeMismatchError, StateError
from shardckpt.loading.load import load_place
from shardckpt.run.places import Place
from shardckpt.storage import Storage
from tests.kit.worlds import ThreadRanks, outcomes, run_processes

_jit_is_old = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")


class Plain(nn.Module):
    """Two layers of known weights."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.outer = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.fill_(value + number)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(self.inner(x))


def spoil(place: Storage) -> None:
    """Change a byte of the first chunk."""
    data = bytearray(place.read("rank-00000/data.pack"))
    data[0] ^= 1
    place.delete("rank-00000/data.pack")
    place.write("rank-00000/data.pack", bytes(data))


# -- modules: hooks

Watch = Callable[[nn.Module, list[str]], object]


def _post_hook(module: nn.Module, seen: list[str]) -> None:
    module.register_load_state_dict_post_hook(lambda m, _: seen.append(f"{m.weight[0, 0]}"))


def _pre_hook(module: nn.Module, seen: list[str]) -> None:
    module.register_load_state_dict_pre_hook(
        lambda m, tree, prefix, *_: seen.append(f"{m.weight[0, 0]} {tree[f'{prefix}weight'][0, 0]}")
    )


def _partial_hook(module: nn.Module, seen: list[str]) -> None:
    module.register_load_state_dict_post_hook(
        partial(lambda told, m, _: told.append(f"{m.weight[0, 0]}"), seen)
    )


def _instance_method(module: nn.Module, seen: list[str]) -> None:
    usual = module._load_from_state_dict

    def load(tree: Any, prefix: str, *rest: Any) -> None:
        seen.append(f"{module.weight[0, 0]} {tree[f'{prefix}weight'][0, 0]}")
        usual(tree, prefix, *rest)

    module._load_from_state_dict = load  # type: ignore[method-assign]


@_jit_is_old
@pytest.mark.parametrize("wrap", [lambda m: m, checkpoint_wrapper, torch.compile])
@pytest.mark.parametrize("layer", ["inner", "outer"])
@pytest.mark.parametrize(
    ("watch", "seen"),
    [(_post_hook, "1.0"), (_partial_hook, "1.0"), (_pre_hook, "5.0 1.0"), (_instance_method, "5.0 1.0")],
)
def test_hooks_of_any_submodule_are_called(
    watch: Watch, seen: str, layer: str, wrap: Callable[[nn.Module], nn.Module], place: Storage
) -> None:
    """They see the module before the load, and what is loaded in memory of its own; or the module after it."""
    saved, model = Plain(1.0), Plain(5.0)
    if layer == "outer":
        seen = seen.replace("5.0", "7.0").replace("1.0", "3.0")
    told: list[str] = []
    watch(getattr(model, layer), told)
    shardckpt.save(place, {"model": saved})
    shardckpt.load(place, {"model": wrap(model)})
    assert told == [seen]
    assert all(map(torch.equal, model.parameters(), saved.parameters()))


def test_nothing_is_called_before_all_is_verified(place: Storage) -> None:
    """A corrupt chunk leaves the module as it was, and none of its code has run; so on all ranks."""
    shardckpt.save(place, {"model": Plain(1.0), "other": torch.ones(3)})
    spoil(place)
    models = [Plain(5.0), Plain(5.0)]
    told: list[str] = []
    for model in models:
        for watch in (_post_hook, _pre_hook):
            watch(model.outer, told)

    def load(ranks: ThreadRanks) -> None:
        state = {"model": models[ranks.rank]} if ranks.rank else {"other": torch.zeros(3)}
        load_place(Place(place), state, ranks, strict=True, started=0.0)

    for error in outcomes(2, load):
        assert isinstance(error, CorruptError)
    assert not told
    assert all(map(torch.equal, models[1].parameters(), Plain(5.0).parameters()))


class Renamed(Plain):
    """Loads checkpoints from when `outer` was called `old`, and was of another shape."""

    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.register_load_state_dict_pre_hook(self._migrate)

    @staticmethod
    def _migrate(_module: nn.Module, tree: dict[str, Any], prefix: str, *_: Any) -> None:
        if (old := tree.pop(f"{prefix}old.weight", None)) is not None:
            tree[f"{prefix}outer.weight"] = old.reshape(2, 2)


@_jit_is_old
@pytest.mark.parametrize("wrap", [lambda m: m, checkpoint_wrapper, torch.compile])
@pytest.mark.parametrize("strict", [True, False])
def test_a_hook_may_rename_and_reshape(
    wrap: Callable[[nn.Module], nn.Module], strict: bool, place: Storage
) -> None:
    """The module judges names that are not its own."""
    saved = nn.ModuleDict({"inner": nn.Linear(2, 2), "old": nn.Linear(4, 1, bias=False)})
    shardckpt.save(place, {"model": saved})
    model = Renamed(5.0)
    loaded = shardckpt.load(place, {"model": wrap(model)}, strict=strict)
    assert torch.equal(model.outer.weight, saved["old"].weight.reshape(2, 2))
    assert torch.equal(model.inner.weight, saved["inner"].weight)
    assert not loaded.missing
    assert not loaded.unexpected


@pytest.mark.parametrize(
    ("layers", "error"),
    [
        ({"inner": nn.Linear(2, 2)}, MissingKeysError),
        ({"inner": nn.Linear(2, 2), "outer": nn.Linear(2, 3, bias=False)}, ShapeMismatchError),
    ],
)
def test_what_a_hook_does_not_mend_is_refused(
    layers: dict[str, nn.Module], error: type[StateError], place: Storage
) -> None:
    """The error is the library's, on every rank, and nothing of the state has changed."""
    shardckpt.save(place, {"model": nn.ModuleDict(layers), "t": torch.ones(2)})
    states = [{"model": Renamed(5.0), "t": torch.zeros(2)}, {"t": torch.zeros(2)}]

    def load(ranks: ThreadRanks) -> None:
        load_place(Place(place), states[ranks.rank], ranks, strict=True, started=0.0)

    for found in outcomes(2, load):
        assert isinstance(found, error)
        assert "state['model']" in str(found)
    assert all(map(torch.equal, states[0]["model"].parameters(), Renamed(5.0).parameters()))  # type: ignore[attr-defined]
    assert not any(torch.any(state["t"]) for state in states)  # type: ignore[arg-type]


def test_a_renaming_module_gets_back_what_it_held_if_another_rank_refuses(place: Storage) -> None:
    """It has loaded by then."""
    saved = nn.ModuleDict({"inner": nn.Linear(2, 2), "old": nn.Linear(4, 1, bias=False)})
    shardckpt.save(place, {"model": saved})
    models = [Renamed(5.0), Renamed(5.0)]
    models[1].register_load_state_dict_post_hook(lambda *_: 1 / 0)  # type: ignore[arg-type,return-value]
    kept = list(models[0].parameters())
    models[0].load_state_dict = partial(models[0].load_state_dict, assign=True)  # type: ignore[method-assign]

    def load(ranks: ThreadRanks) -> None:
        load_place(Place(place), {"model": models[ranks.rank]}, ranks, strict=True, started=0.0)

    for found in outcomes(2, load):
        assert isinstance(found, MissingKeysError)
    for model in models:
        assert all(map(torch.equal, model.parameters(), Plain(5.0).parameters()))
    assert all(one is other for one, other in zip(models[0].parameters(), kept, strict=True))


@pytest.mark.parametrize("hook", ["register_load_state_dict_post_hook", "register_state_dict_post_hook"])
def test_hooks_that_see_no_values_do_not_make_other_types_right(hook: str, place: Storage) -> None:
    """A weight of another type is an error, as it is without them: torch would cast it without a word."""
    shardckpt.save(place, {"model": Plain(1.0)})
    model = Plain(5.0).bfloat16()
    getattr(model.inner, hook)(lambda *_: None)
    with pytest.raises(ShapeMismatchError, match="bfloat16"):
        shardckpt.load(place, {"model": model})
    assert all(map(torch.equal, model.parameters(), Plain(5.0).bfloat16().parameters()))


def _leave_out(_module: nn.Module, tree: dict[str, Any], prefix: str, _metadata: Any) -> None:
    del tree[f"{prefix}inner.weight"]


def test_a_lora_model_saves_and_loads_its_adapters_only(place: Storage) -> None:
    """A state_dict hook leaves out what is frozen; a load hook takes it off the missing names."""

    def adapted(value: float) -> Plain:
        model = Plain(value)
        model.register_state_dict_post_hook(_leave_out)
        model.register_load_state_dict_post_hook(lambda _m, keys: keys.missing_keys.remove("inner.weight"))
        return model

    shardckpt.save(place, {"model": adapted(1.0)})
    model = adapted(5.0)
    shardckpt.load(place, {"model": model})
    assert float(model.inner.weight[0, 0].detach()) == 5.0
    assert torch.equal(model.outer.weight, Plain(1.0).outer.weight)
    whole = Plain(5.0)
    whole.register_load_state_dict_post_hook(lambda _m, keys: keys.missing_keys.remove("inner.weight"))
    shardckpt.load(place, {"model": whole})
    assert torch.equal(whole.outer.weight, Plain(1.0).outer.weight)


# -- modules: methods


class Calls(Plain):
    """Has a load_state_dict of its own, as it was usual before there were hooks: without `strict`."""

    def load_state_dict(self, state_dict: Any) -> Any:  # type: ignore[override]
        self.loaded = {key: value.clone() for key, value in state_dict.items()}
        return super().load_state_dict(state_dict, assign=True)


class Doubles(Plain):
    """Stores twice its weights."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        tree = super().state_dict(*args, **kwargs)
        return {key: 2 * value for key, value in tree.items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({k: v / 2 for k, v in state_dict.items()}, strict, assign)


@_jit_is_old
@pytest.mark.parametrize("wrap", [lambda m: m, checkpoint_wrapper, torch.compile])
def test_an_overridden_load_state_dict_is_called(
    wrap: Callable[[nn.Module], nn.Module], place: Storage
) -> None:
    """Also inside a wrapper, with the model's own names, and with tensors that it may keep."""
    shardckpt.save(place, {"model": Plain(1.0)})
    model = Calls(5.0)
    shardckpt.load(place, {"model": wrap(model)})
    assert set(model.loaded) == set(Plain().state_dict())
    assert all(map(torch.equal, model.parameters(), Plain(1.0).parameters()))
    memory = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(memory)) == len(memory)


def test_a_load_state_dict_set_on_the_instance_is_called(place: Storage) -> None:
    """As one of the class is."""
    shardckpt.save(place, {"model": Plain(1.0)})
    model = Plain(5.0)
    told: list[Any] = []
    model.load_state_dict = told.append  # type: ignore[method-assign,assignment]
    shardckpt.load(place, {"model": model})
    assert set(told[0]) == set(model.state_dict())
    assert float(told[0]["inner.weight"][0, 0]) == 1.0


def test_methods_that_undo_each_other(place: Storage) -> None:
    """What state_dict makes of the weights, load_state_dict takes back."""
    shardckpt.save(place, {"model": Doubles(1.0)})
    assert float(shardckpt.open(place).read("model/inner.weight")[0, 0]) == 2.0
    model = Doubles(5.0)
    shardckpt.load(place, {"model": model})
    assert all(map(torch.equal, model.parameters(), Plain(1.0).parameters()))


def test_a_module_in_two_places(place: Storage) -> None:
    """It loads what was one module, and refuses what was two that differ."""
    one, other = Plain(1.0), Plain(2.0)
    shardckpt.save(place, {"a": one, "b": one, "c": other})
    model = Plain(5.0)
    shardckpt.load(place, {"a": model, "b": model})
    assert torch.equal(model.inner.weight, one.inner.weight)
    with pytest.raises(StateError, match="share their memory"):
        shardckpt.load(place, {"a": model, "c": model})
    assert torch.equal(model.inner.weight, one.inner.weight)


class Versioned(nn.Module):
    """Reads its metadata, as quantized modules and observers do."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.zeros(2))

    def _load_from_state_dict(self, tree: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        self.version = metadata.get("version")
        super()._load_from_state_dict(tree, prefix, metadata, *rest)  # type: ignore[misc]


def test_the_layout_s_version_is_the_module_s(place: Storage) -> None:
    """Without it torch would take the checkpoint for one of a very old version."""
    saved, model = nn.Sequential(Versioned()), nn.Sequential(Versioned())
    shardckpt.save(place, {"model": saved})
    shardckpt.load(place, {"model": model})
    assert model[0].version == 3


def test_an_observer_takes_the_saved_shape(place: Storage) -> None:
    """It resizes its buffers to what is loaded."""
    quantization = pytest.importorskip("torch.ao.quantization")
    saved = quantization.PerChannelMinMaxObserver()
    saved(torch.arange(6.0).reshape(3, 2))
    shardckpt.save(place, {"model": nn.Sequential(saved)})
    observer = quantization.PerChannelMinMaxObserver()
    shardckpt.load(place, {"model": nn.Sequential(observer)})
    assert torch.equal(observer.max_val, saved.max_val)


@pytest.mark.parametrize(
    "parametrize",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        pytest.param(
            lambda m: nn.utils.weight_norm(m),
            marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
        ),
        nn.utils.spectral_norm,
    ],
)
def test_parametrizations(parametrize: Callable[[nn.Module], nn.Module], place: Storage) -> None:
    """The weights that they make are those of the saved module."""
    torch.manual_seed(0)
    saved, model = parametrize(nn.Linear(3, 3)).eval(), parametrize(nn.Linear(3, 3)).eval()
    shardckpt.save(place, {"model": saved})
    shardckpt.load(place, {"model": model})
    assert torch.equal(model(torch.ones(3)), saved(torch.ones(3)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_an_old_weight_norm_loads_into_a_parametrization(place: Storage) -> None:
    """torch's hook renames its parameters."""
    saved = nn.utils.weight_norm(nn.Linear(3, 3))
    shardckpt.save(place, {"model": saved})
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    shardckpt.load(place, {"model": model})
    assert torch.equal(model(torch.ones(3)), saved(torch.ones(3)))


# -- optimizers


def stepped(
    make: Callable[[Any], torch.optim.Optimizer], value: float
) -> tuple[Plain, torch.optim.Optimizer]:
    """A model and its optimizer after a step."""
    model = Plain(value)
    optimizer = make(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    return model, optimizer


def test_hooks_of_an_optimizer(place: Storage) -> None:
    """All are called; what a pre-hook changes is what is loaded, and live state is no part of it."""
    model, optimizer = stepped(torch.optim.AdamW, 1.0)
    shardckpt.save(place, {"model": model, "optimizer": optimizer})
    other, target = stepped(torch.optim.AdamW, 5.0)
    live = target.state[other.inner.weight]["exp_avg"]
    before = live.clone()
    told: list[Any] = []

    def change(_optimizer: torch.optim.Optimizer, tree: dict[str, Any]) -> dict[str, Any]:
        told.append(torch.equal(live, before))
        state = {
            number: {**entry, "exp_avg": 2 * entry["exp_avg"]} for number, entry in tree["state"].items()
        }
        return {**tree, "state": state}

    target.register_load_state_dict_pre_hook(change)
    target.register_load_state_dict_post_hook(lambda _: told.append("post"))
    shardckpt.load(place, {"model": other, "optimizer": target})
    assert told == [True, "post"]
    assert torch.equal(
        target.state[other.inner.weight]["exp_avg"], 2 * optimizer.state[model.inner.weight]["exp_avg"]
    )


class Scaled(torch.optim.SGD):
    """Stores its momentum times ten."""

    def state_dict(self) -> Any:
        tree = super().state_dict()
        return {**tree, "state": self._times(tree["state"], 10)}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict({**state_dict, "state": self._times(state_dict["state"], 0.1)})

    @staticmethod
    def _times(state: Any, factor: float) -> Any:
        return {n: {k: factor * v for k, v in entry.items()} for n, entry in state.items()}


class Wrapper(torch.optim.Optimizer):
    """Another optimizer behind an Optimizer's interface, as accelerate has it: without a state of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.inner.param_groups

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Opaque(torch.optim.SGD):
    """Has a state_dict in a form of its own."""

    def state_dict(self) -> Any:
        return {"momentum": [self.state[p]["momentum_buffer"] for p in self.param_groups[0]["params"]]}

    def load_state_dict(self, state_dict: Any) -> None:
        for p, value in zip(self.param_groups[0]["params"], state_dict["momentum"], strict=True):
            self.state[p]["momentum_buffer"] = value


class Shared(torch.optim.SGD):
    """Has state of no parameter, too."""

    def step(self, closure: Any = None) -> Any:
        self.state["shared"] = {"steps": 3, "scale": torch.ones(2)}  # type: ignore[index]
        return super().step(closure)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Scaled(p, lr=0.1, momentum=0.9),
        lambda p: Opaque(p, lr=0.1, momentum=0.9),
        lambda p: Shared(p, lr=0.1, momentum=0.9),
        lambda p: Wrapper(torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ],
    ids=["scaled", "opaque", "shared", "wrapper"],
)
def test_optimizers_with_methods_of_their_own(
    make: Callable[[Any], torch.optim.Optimizer], place: Storage
) -> None:
    """Their state goes through them, both ways."""
    model, optimizer = stepped(make, 1.0)
    shardckpt.save(place, {"model": model, "optimizer": optimizer})
    other, target = stepped(make, 5.0)
    shardckpt.load(place, {"model": other, "optimizer": target})
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(target.state[two]["momentum_buffer"], optimizer.state[one]["momentum_buffer"])
    assert str(target.state.get("shared")) == str(optimizer.state.get("shared"))  # type: ignore[call-overload]


def test_an_optimizer_whose_parameters_were_replaced(place: Storage) -> None:
    """Its state has no name any more: the error says so, on save and on load."""
    model, optimizer = stepped(torch.optim.Adagrad, 1.0)
    shardckpt.save(place, {"model": model, "optimizer": optimizer})
    optimizer.param_groups[0]["params"] = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    state = {"model": model, "optimizer": optimizer}
    for act, where in ((shardckpt.save, place.at("other")), (shardckpt.load, place)):
        with pytest.raises(StateError, match=r"state\['optimizer'\].*in none of its groups"):
            act(where, state)


def test_named_parameters_keep_their_order(place: Storage) -> None:
    """`param_names` is the optimizer's own, as `params` is."""
    saved, model = Plain(1.0), Plain(5.0)
    optimizer = torch.optim.AdamW(saved.named_parameters())
    shardckpt.save(place, {"model": saved, "optimizer": optimizer})
    target = torch.optim.AdamW(reversed(list(model.named_parameters())))
    names = list(target.param_groups[0]["param_names"])
    shardckpt.load(place, {"model": model, "optimizer": target})
    assert target.param_groups[0]["param_names"] == names


def test_an_object_whose_state_dict_raises(place: Storage) -> None:
    """The error names its place in the state."""

    class Raises:
        def state_dict(self) -> Any:
            raise AttributeError("no such thing")

        def load_state_dict(self, state_dict: Any) -> None:
            """Never called."""

    with pytest.raises(StateError, match=r"state\['a/b'\], a .*Raises.*AttributeError: no such thing"):
        shardckpt.save(place, {"a": {"b": Raises()}})


# -- sharded


@pytest.mark.parametrize("returned", [None, {0: 1}, [1]], ids=repr)
def test_a_module_whose_state_dict_is_none_of_a_module(returned: Any, place: Storage) -> None:
    """It is refused by path, saved and loaded."""
    shardckpt.save(place, {"m": nn.Linear(2, 2)})
    module = nn.Linear(2, 2)
    module.state_dict = lambda: returned  # type: ignore[method-assign, assignment, misc]
    message = r"state\['m'\], a Linear, has a state_dict\(\) that does not return a dict"
    with pytest.raises(StateError, match=message):
        shardckpt.load(place, {"m": module})
    with pytest.raises(StateError, match=message):
        shardckpt.save(place.at("other"), {"m": module})


class Holder:
    """An object of one's own around an optimizer, which it keeps where it can be seen, or where it cannot."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, hidden: bool = False) -> None:
        self.inner = (lambda: optimizer) if hidden else {"one": optimizer}

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.inner() if callable(self.inner) else self.inner["one"]

    def state_dict(self) -> Any:
        return {"wrapped": self._optimizer().state_dict()}

    def load_state_dict(self, state_dict: Any) -> None:
        self._optimizer().load_state_dict(state_dict["wrapped"])


def _sharded(value: float, steps: int, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Renamed(value)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, **options)
    for _ in range(steps):
        model(torch.ones(2, 2)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _local(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """All that this rank holds, with how it is laid out."""
    tensors = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
    return [
        (t.placements, t.to_local().tolist()) if isinstance(t, DTensor) else t.tolist() for t in tensors
    ]


def _sharded_loads(_rank: int, folder: str) -> dict[str, str]:
    """What became of each load on this rank: "right", or the error."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of what it imports of torch itself

    model, optimizer = _sharded(1.0, 2, amsgrad=True)
    wanted = _local(model, optimizer)
    shardckpt.save(f"{folder}/plain", {"model": model, "optimizer": optimizer})
    shardckpt.save(f"{folder}/held", {"model": model, "optimizer": Holder(optimizer)})
    cases: dict[str, tuple[int, str, Callable[[Any], Any]]] = {
        "fresh": (0, "plain", lambda o: o),
        "live, without amsgrad": (1, "plain", lambda o: o),
        "held, fresh": (0, "held", Holder),
        "held, live": (1, "held", Holder),
        "hidden, fresh": (0, "held", partial(Holder, hidden=True)),
        "hidden, live": (2, "held", partial(Holder, hidden=True)),
    }
    told = {}
    for name, (steps, url, wrap) in cases.items():
        other, target = _sharded(5.0, steps, amsgrad=name == "hidden, live")
        try:
            shardckpt.load(f"{folder}/{url}", {"model": other, "optimizer": wrap(target)})
            told[name] = "right" if _local(other, target) == wanted else "wrong"
        except shardckpt.ShardckptError as error:
            told[name] = f"{type(error).__name__}: {error}"
    old = nn.ModuleDict({"inner": nn.Linear(2, 2), "old": nn.Linear(2, 2, bias=False)})
    for layer in old.values():
        fully_shard(layer)
    shardckpt.save(f"{folder}/old", {"model": old, "more": torch.ones(2)})
    renamed, _ = _sharded(5.0, 0)
    shardckpt.load(f"{folder}/old", {"model": renamed})
    is_right = torch.equal(renamed.outer.weight.to_local(), old["old"].weight.to_local())  # type: ignore[union-attr,operator]
    told["renamed"] = "right" if is_right else "wrong"
    missing = nn.ModuleDict({"inner": nn.Linear(2, 2), "third": nn.Linear(4, 4)})
    for layer in missing.values():
        fully_shard(layer)
    shardckpt.save(f"{folder}/missing", {"model": missing})
    try:
        shardckpt.load(f"{folder}/missing", {"model": renamed})
    except shardckpt.ShardckptError as error:
        told["missing"] = f"{type(error).__name__}: {error}"
    zero = ZeroRedundancyOptimizer(nn.Linear(2, 2).parameters(), torch.optim.AdamW)
    try:
        shardckpt.save(f"{folder}/zero", {"model": model, "optimizer": zero})
    except shardckpt.ShardckptError as error:
        told["zero"] = f"{type(error).__name__}: {error}"
    return told


def test_sharded(tmp_path: Path) -> None:
    """State is laid out as its parameter is, in every way in which it comes; or it is refused by its place."""
    for told in run_processes(2, _sharded_loads, str(tmp_path)):
        assert re.match(
            r"StateError: .*state\['optimizer/wrapped/state/0/exp_avg'\]", told.pop("hidden, fresh")
        )
        assert re.match(r"UnsupportedValueError: .*state\['optimizer'\].*fully_shard", told.pop("zero"))
        assert re.match(r"MissingKeysError: .*state\['model'\].*third", told.pop("missing"), re.DOTALL)
        assert set(told.values()) == {"right"}, told
