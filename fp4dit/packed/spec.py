from dataclasses import fields, is_dataclass
from types import FunctionType
from typing import Any
from fp4dit import ams, blockscales, choice, formats, observers, policy, quantizer, scales, transforms, hadamard
from fp4dit.packed import layout, numbers

MODULES = (
    ams,
    blockscales,
    choice,
    formats,
    observers,
    policy,
    quantizer,
    scales,
    transforms,
    hadamard,
    layout,
    numbers,
)


def kinds():
    from fp4dit.packed import description

    return {
        n: v for m in (*MODULES, description) for n, v in vars(m).items() if getattr(v, "__module__", "") == m.__name__
    }


def describe(v: Any) -> Any:
    if is_dataclass(v):
        return {"kind": type(v).__name__, **{f.name: describe(getattr(v, f.name)) for f in fields(v)}}
    if isinstance(v, FunctionType):
        return {"function": v.__name__}
    if isinstance(v, (list, tuple)):
        return [describe(x) for x in v]
    if isinstance(v, dict):
        return {k: describe(x) for k, x in v.items()}
    return v


def made(j: Any) -> Any:
    if isinstance(j, dict):
        if "kind" in j:
            return kinds()[j["kind"]](**{k: made(x) for k, x in j.items() if k != "kind"})
        if "function" in j:
            return kinds()[j["function"]]
        return {k: made(x) for k, x in j.items()}
    if isinstance(j, list):
        return tuple(made(x) for x in j)
    return j
