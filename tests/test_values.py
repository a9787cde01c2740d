"""The codec of frozen values: coercion, refusals, default omission, hashes that stay."""

import dataclasses
import json
import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etastar import values
from etastar.values import at_most_one, canonical_json, decode, digest, encode, exactly_one, value


@value
class Leaf:
    size: int = 1
    share: float = 0.5
    name: str = "oak"
    kind_of: Literal["a", "b"] = "a"
    on: bool = False
    limit: int | None = None
    rest: tuple = ()
    steps: tuple[float, ...] = (1.0,)

    def check(self):
        if self.size < 0:
            raise ValueError(f"Leaf.size must not be negative; got {self.size}")


@value
class Needle(Leaf):
    length: float = 2.0


@value
class Twig:
    leaf: Leaf
    peak: float
    other: Leaf = dataclasses.field(default_factory=Leaf)


def test_fields_are_coerced_to_their_annotation():
    leaf = Leaf(size=np.int64(3), share=2, limit=4.0, rest=[1, "x"], steps=[1, np.float32(0.5)])
    assert (leaf.size, leaf.share, leaf.limit, leaf.rest, leaf.steps) == (3, 2.0, 4, (1, "x"), (1.0, 0.5))
    types = [type(leaf.size), type(leaf.share), type(leaf.limit), *map(type, leaf.steps)]
    assert types == [int, float, int, float, float]


def test_a_tuple_has_one_kind_a_place_where_its_annotation_says_so():
    @value
    class Paired:
        pairs: tuple[tuple[int, float], ...] = ()

    given = Paired(pairs=[[1.0, 2], (np.int64(3), 0.5)])
    assert given.pairs == ((1, 2.0), (3, 0.5)) and [type(part) for pair in given.pairs for part in pair] == [int, float] * 2
    assert canonical_json(given) == '{"kind":"Paired","pairs":[[1,2.0],[3,0.5]]}'
    assert decode(json.loads(canonical_json(given))) == given and encode(Paired(pairs=[])) == {"kind": "Paired"}
    for wrong in (((1,),), ((1, 0.5, 2),), ((0.5, 1),), (1, 0.5), ((),)):
        with pytest.raises(TypeError, match=r"Paired.pairs must be tuple\[tuple\[int, float\], ...\]; got"):
            Paired(pairs=wrong)


def test_equal_values_have_one_json_and_one_hash():
    assert canonical_json(Leaf(share=2)) == canonical_json(Leaf(share=np.float64(2.0)))
    assert canonical_json(Leaf(steps=(2, 3))) == canonical_json(Leaf(steps=[2.0, 3.0]))
    assert Leaf(share=2) == Leaf(share=2.0) and hash(Leaf(share=2)) == hash(Leaf(share=2.0))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"size": "3"}, r"Leaf.size must be int; got '3' \(str\)"),
        ({"size": 2.5}, r"Leaf.size must be int; got 2.5 \(float\)"),
        ({"size": True}, r"Leaf.size must be int; got True \(bool\)"),
        ({"share": None}, "Leaf.share must be float; got None"),
        ({"share": True}, "Leaf.share must be float; got True"),
        ({"on": 1}, "Leaf.on must be bool; got 1"),
        ({"limit": "x"}, "Leaf.limit must be int or None; got 'x'"),
        ({"rest": "xy"}, "Leaf.rest must be tuple; got 'xy'"),
        ({"steps": (1.0, "x")}, r"Leaf.steps must be tuple\[float, ...\]; got \(1.0, 'x'\)"),
        ({"kind_of": 3}, "Leaf.kind_of must be 'a' or 'b'; got 3"),
    ],
)
def test_a_wrong_type_names_its_field(given, message):
    with pytest.raises(TypeError, match=message):
        Leaf(**given)


def test_a_wrong_choice_lists_the_choices():
    with pytest.raises(ValueError, match="Leaf.kind_of must be 'a' or 'b'; got 'c'"):
        Leaf(kind_of="c")


def test_a_nested_value_of_the_wrong_kind_is_refused():
    with pytest.raises(TypeError, match="Twig.leaf must be Leaf; got 3"):
        Twig(leaf=3, peak=1.0)


def test_checks_run_after_coercion_and_are_inherited():
    for kind in (Leaf, Needle):
        with pytest.raises(ValueError, match="must not be negative; got -1"):
            kind(size=-1.0)


def test_values_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Leaf().size = 2


def test_defaults_are_left_out():
    assert encode(Leaf()) == {"kind": "Leaf"}
    assert encode(Leaf(size=1, share=0.25)) == {"kind": "Leaf", "share": 0.25}
    assert encode(Twig(leaf=Leaf(), peak=1)) == {"kind": "Twig", "leaf": {"kind": "Leaf"}, "peak": 1.0}


def test_true_is_not_left_out_where_the_default_is_one():
    @value
    class Flagged:
        count: int | bool = 1

    assert encode(Flagged(count=True)) == {"kind": "Flagged", "count": True}
    assert encode(Flagged(count=1)) == {"kind": "Flagged"}


def test_a_new_field_with_a_default_keeps_the_hash(monkeypatch):
    def leaf(**fields):
        monkeypatch.delitem(values._KINDS, "Acorn", raising=False)
        made = type("Acorn", (), {"__annotations__": {name: kind for name, (kind, _) in fields.items()}})
        for name, (_, default) in fields.items():
            setattr(made, name, default)
        return value(made)

    before = leaf(size=(int, 1))
    after = leaf(size=(int, 1), colour=(str, "green"))
    assert digest(before(size=7)) == digest(after(size=7)) != digest(after(size=7, colour="brown"))


def test_golden_json_and_hash():
    twig = Twig(leaf=Leaf(size=3, name="oak é", rest=(("a", 1), ("b", None))), peak=0.1)
    text = '{"kind":"Twig","leaf":{"kind":"Leaf","name":"oak \\u00e9","rest":[["a",1],["b",null]],"size":3},"peak":0.1}'
    assert canonical_json(twig) == text
    assert digest(twig) == "41f7974198e7b6e8"
    assert digest(twig, "corpus", 3, length=24) == "813b15e052aac805339aa861"


def test_parts_of_a_digest_do_not_run_together():
    assert digest("a", "b") != digest("ab") and digest(1, 2) != digest(2, 1)


leaves = st.builds(
    Leaf,
    size=st.integers(0, 2**70),
    share=st.floats(allow_nan=False, allow_infinity=False),
    name=st.text(),
    kind_of=st.sampled_from("ab"),
    on=st.booleans(),
    limit=st.none() | st.integers(),
    rest=st.lists(st.integers() | st.text() | st.none() | st.tuples(st.text(), st.booleans())),
    steps=st.lists(st.floats(allow_nan=False, allow_infinity=False)),
)


@given(st.builds(Twig, leaf=leaves, peak=st.floats(0, 1), other=leaves))
def test_decode_undoes_encode(twig):
    assert decode(encode(twig)) == twig
    assert decode(json.loads(canonical_json(twig))) == twig


def test_unknown_keys_and_kinds_are_refused():
    with pytest.raises(ValueError, match="unknown key 'colour', 'sizes' for Leaf; it takes: kind_of, limit, name"):
        decode({"kind": "Leaf", "sizes": 3, "colour": 1})
    with pytest.raises(ValueError, match="unknown kind 'Blatt'; known kinds: .*Leaf"):
        decode({"kind": "Blatt"})
    with pytest.raises(ValueError, match="unknown kind None"):
        decode({"size": 3})
    with pytest.raises(ValueError, match="unknown key 'x' for Leaf"):
        decode({"kind": "Twig", "peak": 1, "leaf": {"kind": "Leaf", "x": 1}})


def test_not_a_number_has_no_json():
    with pytest.raises(ValueError):
        canonical_json(Leaf(share=math.nan))


def test_two_modules_cannot_share_a_kind():
    with pytest.raises(TypeError, match="has a value Leaf; give that of elsewhere another name"):
        value(type("Leaf", (), {"__module__": "elsewhere"}))
    assert decode({"kind": "Leaf"}) == Leaf()


def test_exclusive_fields():
    assert exactly_one("X", a=None, b=0) == "b"
    with pytest.raises(ValueError, match="X: give exactly one of a, b; got a=None, b=None"):
        exactly_one("X", a=None, b=None)
    with pytest.raises(ValueError, match="got a=1, b=2"):
        exactly_one("X", a=1, b=2)
    at_most_one("X", a=None, b=None)
    with pytest.raises(ValueError, match="X: give at most one of a, b, c; got a=1, c=3"):
        at_most_one("X", a=1, b=None, c=3)
