"""Errors carry five fields and survive a process boundary."""

import copy
import pickle

from qcompile.errors import QCError, suggest


def test_message_shows_every_field_that_is_set() -> None:
    error = QCError("area.problem", "it broke", where="model.fc", next="mend it")
    assert str(error) == "it broke [area.problem]\n  where: model.fc\n  next: mend it"


def test_errors_pickle_and_copy() -> None:
    error = QCError("area.problem", "it broke", where="here", why="because", next="mend it")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (twin.code, twin.what, twin.where, twin.why, twin.next) == error.args


def test_a_place_is_added_in_front() -> None:
    assert QCError("a.b", "x", where="index [0, 1]").at("fc.weight").where == "fc.weight: index [0, 1]"
    assert QCError("a.b", "x").at("fc.weight").where == "fc.weight"


def test_suggestions() -> None:
    assert suggest("INT4", ["int4", "int8"]) == "; did you mean 'int4'?"
    assert suggest("zzz", ["int4", "int8"]) == ""
