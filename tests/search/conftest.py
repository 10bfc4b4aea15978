import pytest

from adasearch import config
from tests.search.synthetic import FAKES


@pytest.fixture
def fakes(monkeypatch):
    """The fake open sets in the place of the real ones: no model, no torch."""
    for name, registry in FAKES.items():
        monkeypatch.setitem(config.COMPONENTS, name, registry)
