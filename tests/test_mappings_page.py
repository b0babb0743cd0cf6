"""docs/mappings.md: its examples run, and its table has the mappings that are there."""

import doctest

import pytest

from moe_online.loading.mappings import MAPPINGS


@pytest.fixture
def page(request):
    return request.config.rootpath / "docs" / "mappings.md"


@pytest.mark.smoke
def test_examples(page):
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted >= 3
    assert result.failed == 0


def test_every_mapping_is_in_the_table(page):
    text = page.read_text()
    assert [name for name in MAPPINGS if f"`{name}.toml`" not in text] == []
