"""A weight that was packed as a plain linear before anybody knew that it is also looked up.

A recipe treats a linear that shares the embedding's weight apart (a head), but where a graph break lies between the two
and the linear comes first, its graph is compiled before the lookup is seen. That cannot be mended in compiled code; it
can be said, and the second compile, which knows, leaves no old copy behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from qcompile.errors import warn
from qcompile.ir.scheme import Scheme
from qcompile.passes.base import PassContext
from qcompile.plan.site import Site
from qcompile.runtime.store import Entry


def warn_packed_before(table: Site, tensors: Sequence[torch.Tensor], ctx: PassContext) -> None:
    """Warn about entries that would have another scheme if the lookup had been met first.

    Args:
        table: the lookup.
        tensors: what its weight is made of.
    """
    for entry in ctx.store.made_from(tensors):
        if _outdated(entry, table, ctx):
            wanted = _wanted(entry, table, "head", ctx)[0] or "float"
            message = (
                f"{entry.expression.where} is packed as {entry.scheme}, because a linear layer read it before it was looked "
                f"up as an embedding ({table.path}): for such a layer recipe {ctx.recipe.name!r} asks for {wanted}. Call "
                "torch.compiler.reset() and call the model again."
            )
            ctx.plan.notes.append(message)
            warn(message)


def drop_packed_before(head: Site, tensors: Sequence[torch.Tensor], ctx: PassContext) -> None:
    """Let go of such entries when the linear is compiled again, now as a head."""
    ctx.store.drop([entry for entry in ctx.store.made_from(tensors) if _outdated(entry, head, ctx)])


def _outdated(entry: Entry, site: Site, ctx: PassContext) -> bool:
    """Whether the recipe gives the scheme of an entry to a linear, and to no table or head."""
    if entry.scheme is None or entry.scheme not in _wanted(entry, site, "linear", ctx):
        return False
    return all(entry.scheme not in _wanted(entry, site, kind, ctx) for kind in ("head", "embedding"))


def _wanted(entry: Entry, site: Site, kind: str, ctx: PassContext) -> tuple[Scheme | None, ...]:
    """The schemes that the recipe may choose for the weight of an entry as a site of some kind."""
    return ctx.recipe.asks(replace(site, kind=kind, path=entry.expression.where))
