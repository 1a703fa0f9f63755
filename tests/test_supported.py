"""The README's table of what is supported is what the registry and the rows say."""

from __future__ import annotations

import supported


def test_the_table_in_the_readme_is_the_one_of_now() -> None:
    assert supported.table_of_readme() == supported.table(), f"run: {supported.COMMAND}"


def test_every_function_has_rows() -> None:
    """The functions of `cnnops.functional` that no row calls would be promises."""
    import cnnops.functional as C

    called = set().union(*(entry.functions for entry in supported.supported().values()))
    # Batch and group norm are called in their fused forms, with and without what these have more.
    plain = {"batch_norm", "group_norm"}
    assert {f"{name}_act" for name in plain} <= called
    assert set(C.__all__) == called | plain
