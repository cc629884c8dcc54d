"""What a user can get wrong: one family of exceptions, and the nearest name in their messages."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_jax import errors
from llm_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError, UserError, choose, suggest

NAMES = ["learning_rate", "weight_decay", "multipliers"]


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, NonFiniteError])
def test_each_is_a_user_error_of_its_own(kind):
    assert issubclass(kind, UserError) and kind is not UserError
    assert [
        other for other in (ConfigError, DataError, CheckpointError, NonFiniteError) if issubclass(kind, other)
    ] == [kind]


@settings(deadline=None)
@given(st.sampled_from(NAMES), st.data())
def test_a_slip_of_one_letter_is_told(name, data):
    at = data.draw(st.integers(0, len(name) - 1))
    for slip in (name[:at] + name[at + 1 :], name[:at] + "x" + name[at:], name[:at] + "x" + name[at + 1 :]):
        assert suggest(slip, NAMES) == f"; did you mean {name!r}?"


def test_far_names_get_the_list_in_order():
    assert suggest("qqq", NAMES) == "; known: learning_rate, multipliers, weight_decay"
    assert suggest("qqq", iter(NAMES)) == "; known: learning_rate, multipliers, weight_decay"
    assert suggest("qqq", []) == ""


def test_choose():
    assert choose("optimizer", "adam", ("adam", "lion")) == "adam"
    with pytest.raises(ConfigError, match=r"^unknown optimizer 'adma'; did you mean 'adam'\?$"):
        choose("optimizer", "adma", iter(("adam", "lion")))
    with pytest.raises(DataError, match=r"^unknown asset 'q'; known: brown, sotu$"):
        choose("asset", "q", ("sotu", "brown"), DataError)


def test_every_error_of_the_module_is_documented():
    found = [x for x in vars(errors).values() if isinstance(x, type) and issubclass(x, Exception)]
    assert len(found) == 5 and all(x.__doc__ for x in found)
