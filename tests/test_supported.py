"""The table of docs/supported.md is what the registry and the rows say."""

from __future__ import annotations

import supported


def test_the_table_of_the_page_is_the_one_of_now() -> None:
    assert supported.table_of_page() == supported.table(), f"run: {supported.COMMAND}"


def test_every_function_has_rows() -> None:
    """The functions of `cnnops.functional` that no row calls would be promises."""
    import cnnops.functional as C

    called = set().union(*(entry.functions for entry in supported.supported().values()))
    # Batch and group norm are called in their fused forms, with and without what these have more.
    plain = {"batch_norm", "group_norm"}
    assert {f"{name}_act" for name in plain} <= called
    assert set(C.__all__) == called | plain
