"""What is varied, and which combinations are run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlay.errors import ConfigError
from inlay.sweep.space import Space


def test_words_with_several_values_are_axes():
    space = Space.of(
        ["learning_rate=1e-4,2e-4", "model=m", "method.sites=[attn.q,attn.v],linear", "columns={a: b,c: d}"]
    )
    assert space.axes == (("learning_rate", ("1e-4", "2e-4")), ("method.sites", ("[attn.q,attn.v]", "linear")))
    assert space.fixed == ("model=m", "columns={a: b,c: d}")
    assert [point.words for point in space.grid()] == [
        ["learning_rate=1e-4", "method.sites=[attn.q,attn.v]"],
        ["learning_rate=1e-4", "method.sites=linear"],
        ["learning_rate=2e-4", "method.sites=[attn.q,attn.v]"],
        ["learning_rate=2e-4", "method.sites=linear"],
    ]
    assert space.grid()[0].name == "learning_rate=1e-4,method.sites=-attn.q,attn.v-"


@given(count=st.integers(1, 40), seed=st.integers(0, 5))
def test_a_sample_is_a_part_of_the_grid_by_the_seed_alone(count, seed):
    space = Space.of(["a=1,2,3,4", "b=1,2,3", "c=x,y"])
    grid, sample = space.grid(), space.sample(count, seed)
    assert sample == space.sample(count, seed)
    assert len(sample) == min(count, 24)
    assert sample == [point for point in grid if point in sample]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model=m"], "nothing is varied"),
        (["a=1,2", "a=3,4"], "a is varied twice"),
        (["a=1,2,1"], "1 stands there twice"),
    ],
)
def test_what_is_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        Space.of(words)


def test_no_run_is_refused():
    with pytest.raises(ConfigError, match="--random 0 runs nothing"):
        Space.of(["a=1,2"]).sample(0, 0)
