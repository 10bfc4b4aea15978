import pytest

from adasearch import config
from tests.search.synthetic import FAKES, make_study, search, table


@pytest.fixture
def fakes(monkeypatch):
    """The fake open sets in the place of the real ones: no model, no torch."""
    for name, registry in FAKES.items():
        monkeypatch.setitem(config.COMPONENTS, name, registry)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """What the synthetic study finds without any interruption."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, registry in FAKES.items():
            monkeypatch.setitem(config.COMPONENTS, name, registry)
        return table(search(make_study(), tmp_path_factory.mktemp("reference")))
