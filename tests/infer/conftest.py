import pytest
from answering_models import tiny_tokenizer, write_model  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "tiny")
