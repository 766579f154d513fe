"""Which tests run in one process: those of a file, and where a file tests every method, of a method."""

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        method = values.get("method", "") if item.path.stem == "test_end_to_end" else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{method}".rstrip("-")))
