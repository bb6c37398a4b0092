"""Inductor as a whole: its settings, its cache folder, its entry points and the key of its caches.

Inductor's disk caches know nothing of what a backend does to a graph before it; `Fingerprint` is how they learn it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from torch import fx


@functools.cache
def inductor_options() -> Mapping[str, object]:
    """Inductor's settings: dotted name -> declared type (a class, a union or a generic alias)."""
    from torch._inductor import config

    return {name: config.get_type(name) for name in config.get_config_copy()}  # type: ignore[attr-defined]


@functools.cache
def inductor_modes() -> Mapping[str, Mapping[str, object]]:
    """`mode=` of `torch.compile`: name -> the settings it stands for."""
    from torch._inductor import list_mode_options

    return list_mode_options()


def inductor_cache_dir() -> Path:
    """The folder under which Inductor keeps generated code; the folder is made if it is missing."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


class Fingerprint:
    """Makes Inductor's and AOTAutograd's disk caches see our passes, recipe and kernels.

    Both caches key on Inductor's configuration, so the fingerprint rides there as a post-grad pass that does
    nothing but carry a `uuid`.
    """

    @staticmethod
    def patch(text: str, config: Mapping[str, object]) -> dict[str, object]:
        """`config` with an entry that carries `text`; a pass of the user's in that place still runs and still
        counts."""
        from torch._inductor import config as defaults
        from torch._inductor.custom_graph_pass import CustomGraphPass

        class Carrier(CustomGraphPass):
            def __init__(self, text: str) -> None:
                self.text = text

            def __call__(self, graph: fx.Graph) -> None:
                if theirs is not None:
                    theirs(graph)

            def uuid(self) -> Any:
                if theirs is None:
                    return self.text
                own = getattr(theirs, "uuid", lambda: None)()
                # None: not cacheable, as for the user's pass alone.
                return None if own is None else f"{self.text} {own}"

        name = "post_grad_custom_post_pass"
        theirs = cast("Any", config.get(name, getattr(defaults, name)))
        return {**config, name: Carrier(text)}


def compile_fx(
    gm: fx.GraphModule,
    inputs: Sequence[object],
    *,
    inner_compile: Callable[..., Any] | None = None,
    config: Mapping[str, object] = MappingProxyType({}),
) -> Callable[..., Any]:
    """Inductor on a Dynamo graph; `config` holds for forward and (lazily compiled) backward."""
    from torch._inductor import compile_fx as module

    values: Any = list(inputs)
    compiled = module.compile_fx(
        gm, values, inner_compile=inner_compile or module.compile_fx_inner, config_patches=dict(config)
    )
    return cast("Callable[..., Any]", compiled)


def inner_compile() -> Callable[..., Any]:
    """Inductor's compiler of one functional graph."""
    from torch._inductor.compile_fx import compile_fx_inner

    return cast("Callable[..., Any]", compile_fx_inner)
