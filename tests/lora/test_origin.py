"""An adapter says what it was trained on: another base of its shapes is refused, the same base in another form not."""

import pytest
import torch
from tiny_adapters import base, trained

from lora import LoRAConfig, save_adapter
from lora.merge import merge_folders
from lora.origin import MERGED, TRAINED_ON, check_origin
from model import Transformer
from model.checkpoints.convert import Options
from model.checkpoints.convert import main as convert
from model.support.cli import UserError
from model.support.files import write_json


@pytest.fixture
def folders(tmp_path):
    """A base with norms of its own, and an adapter that was trained on it."""
    model = base()
    move_norms(model, 1)
    model.save_pretrained(tmp_path / "base")
    save_adapter(trained(LoRAConfig(r=2)), tmp_path / "adapter", base=tmp_path / "base")
    return tmp_path


def move_norms(model: Transformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.add_(torch.randn(param.shape, generator=generator) * 0.1)


def test_another_base_of_the_same_shapes_is_refused(folders):
    check_origin(folders / "base", [folders / "adapter"])
    other = base()
    move_norms(other, 2)
    other.save_pretrained(folders / "other")
    with pytest.raises(UserError, match="trained on another base"):
        check_origin(folders / "other", [folders / "adapter"])
    with pytest.raises(UserError, match="trained on another base"):
        merge_folders(str(folders / "other"), str(folders / "adapter"), str(folders / "out"))
    assert not (folders / "out").exists()
    (folders / "adapter" / TRAINED_ON).unlink()  # the remedy that the message names; and adapters from elsewhere
    check_origin(folders / "other", [folders / "adapter"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", ["safetensors", "native"])
def test_the_same_base_in_another_form_is_the_same(folders, to, dtype):
    convert(Options(str(folders / "base"), str(folders / "again"), to=to, dtype=dtype))
    check_origin(folders / "again", [folders / "adapter"])


def test_adapters_that_come_before_are_part_of_what_it_was_trained_on(folders):
    merge_folders(str(folders / "base"), str(folders / "adapter"), str(folders / "merged"))
    save_adapter(trained(LoRAConfig(r=3)), folders / "second", base=folders / "merged")
    check_origin(folders / "merged", [folders / "second"])
    check_origin(folders / "base", [folders / "adapter", folders / "second"])
    convert(Options(str(folders / "merged"), str(folders / "again")))
    check_origin(folders / "again", [folders / "second"])
    for given in (["second"], ["second", "adapter"], ["adapter", "adapter"]):
        with pytest.raises(UserError, match="merged into it"):
            check_origin(folders / "base", [folders / one for one in given])
    with pytest.raises(UserError, match="merged into it"):
        check_origin(folders / "merged", [folders / "adapter", folders / "second"])
    (folders / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no such file; an adapter is a folder"):
        check_origin(folders / "base", [folders / "adapter", folders / "second"])


def test_weights_written_in_place_of_merged_ones_lose_the_mark(folders):
    merge_folders(str(folders / "base"), str(folders / "adapter"), str(folders / "merged"))
    base().save_pretrained(folders / "merged")
    assert not (folders / "merged" / MERGED).exists()


def test_a_mark_of_another_kind_is_named(folders):
    write_json(folders / "adapter" / TRAINED_ON, ["what"])
    with pytest.raises(UserError, match=TRAINED_ON):
        check_origin(folders / "base", [folders / "adapter"])
