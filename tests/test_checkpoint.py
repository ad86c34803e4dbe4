"""A model that is saved and loaded is the same model; files that do not fit are refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from headstart import CheckpointError, HeadSpec, HiddenLayer, SetupError, create_classifier, load, save
from headstart.classifier import Classifier
from tiny import SPEC, TinyNet

HEAD = HeadSpec(pool="avg", hidden=(HiddenLayer(8, batchnorm="after", dropout=0.3),), output="sigmoid", dropout=0.2)


@pytest.fixture
def model() -> Classifier:
    made = create_classifier("test_resnet", ("no", "yes"), weights="none", head=HEAD, image_size=32, fit="letterbox")
    with torch.no_grad():  # statistics and head as training would leave them
        for _ in range(3):
            made.train()(torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8))
    return made.eval()


def test_a_model_of_which_another_would_be_made_is_not_saved(model: Classifier, tmp_path: Path) -> None:
    for change, words in (
        (lambda m: m.head.append(nn.Identity()), r"The head is another .* new_head\(model"),
        (lambda m: setattr(m.backbone, "act1", nn.GELU()), r"The backbone is another .*: act1 is GELU, was ReLU"),
        (lambda m: m.half(), r"The backbone is another .* float16"),
        (lambda m: setattr(m, "class_names", ("a", "b", "c")), r"its head fits it no more"),
        (lambda m: m.backbone.register_buffer("odd", torch.zeros(2, dtype=torch.int16)), r"odd is no tensor of floats"),
    ):
        other = copy.deepcopy(model)
        change(other)
        with pytest.raises(CheckpointError, match=words):
            save(other, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    save(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)), tmp_path / "synced")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "synced")(PICTURES), model(PICTURES))
    save(torch.compile(model, backend="eager"), tmp_path / "compiled")
    assert load(tmp_path / "compiled").head_spec == HEAD
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="No model can be written to"):
        save(model, tmp_path / "file" / "run")
    with pytest.raises(CheckpointError, match="describes the model's head, so head= would change nothing"):
        load(tmp_path / "compiled", head=nn.Linear(8, 2))


def test_a_mask_of_infinite_values_is_no_damage(tmp_path: Path) -> None:
    head = nn.Linear(8, 2)
    head.register_buffer("mask", torch.full((2,), -torch.inf))
    save(create_classifier(TinyNet(), ("a", "b"), head=head, data_spec=SPEC), tmp_path)
    assert torch.isinf(load(tmp_path, backbone=TinyNet(), head=copy.deepcopy(head)).head.mask).all()


PICTURES = torch.randint(0, 255, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_loaded_model_gives_the_same_logits_to_the_bit(model: Classifier, tmp_path: Path) -> None:
    save(model, tmp_path / "run")
    again = load(tmp_path / "run")
    assert not again.training
    with torch.no_grad():
        assert torch.equal(model(PICTURES), again(PICTURES))
    assert again.class_names == ("no", "yes")
    assert again.spec == model.spec
    assert again.head_spec == HEAD
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["model.json", "model.safetensors"]


def test_a_model_of_an_earlier_version_says_nothing_of_its_features(model: Classifier, tmp_path: Path) -> None:
    card = save(model, tmp_path) / "model.json"
    told = json.loads(card.read_text())
    assert told.pop("num_features") == model.num_features
    card.write_text(json.dumps(told))
    again = load(tmp_path)
    assert again.num_features == model.num_features
    with torch.no_grad():
        assert torch.equal(model(PICTURES), again(PICTURES))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_is_not_there_is_told(model: Classifier, tmp_path: Path) -> None:
    save(model, tmp_path)
    with pytest.raises(SetupError, match="'cuda' cannot be used here"):
        load(tmp_path, device="cuda")
    assert next(load(tmp_path, device="auto").parameters()).device.type in ("cpu", "mps")


def test_loading_watches_no_pass_of_the_backbone(tmp_path: Path) -> None:
    model = create_classifier("test_resnet", ("no", "yes"), weights="none", image_size=32)
    save(model, tmp_path)
    passes: list[nn.Module] = []
    with torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: passes.append(module)):
        again = load(tmp_path)
    assert passes == []
    assert again.backbone_trace().output_shape == (1, model.num_features)  # when it is asked for


def test_modules_of_the_users_own_are_asked_for(tmp_path: Path) -> None:
    mine = create_classifier(TinyNet(seed=1), ("a", "b"), head=nn.Linear(8, 2), data_spec=SPEC).eval()
    save(mine, tmp_path)
    with pytest.raises(CheckpointError, match=r"head is a module of the user's own.*head=module"):
        load(tmp_path, backbone=TinyNet())
    with pytest.raises(CheckpointError, match=r"backbone is a module of the user's own"):
        load(tmp_path, head=nn.Linear(8, 2))
    again = load(tmp_path, backbone=TinyNet(seed=2), head=nn.Linear(8, 2))
    x = torch.randint(0, 255, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(mine(x), again(x))


def test_pooling_of_two_modules_of_the_users_own_is_kept(tmp_path: Path) -> None:
    class Map(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :, ::4, ::4]

    mine = create_classifier(Map(), ("a", "b"), head=nn.Linear(3, 2), data_spec=SPEC, pool="max").eval()
    save(mine, tmp_path)
    again = load(tmp_path, backbone=Map(), head=nn.Linear(3, 2))
    x = torch.randint(0, 255, (3, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(mine(x), again(x))


def test_a_missing_extra_or_misshapen_tensor_is_named(model: Classifier, tmp_path: Path) -> None:
    save(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "head.classifier.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"missing: {name}"),
        (tensors | {"head.extra": torch.zeros(1)}, "unexpected: head.extra"),
        (tensors | {name: torch.zeros(3, 3)}, rf"{name}: \(\(3, 3\), 'F32'\) in the file"),
        (tensors | {name: tensors[name].double()}, rf"{name}: .*'F64'\) in the file"),
    ):
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)


def test_a_torn_or_foreign_file_is_refused(model: Classifier, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No model in .*model\.json is missing"):
        load(tmp_path)
    save(model, tmp_path)
    file, card = tmp_path / "model.safetensors", tmp_path / "model.json"
    whole, text = file.read_bytes(), card.read_text()
    for data in (whole[: len(whole) // 2], b"", b"\x80\x04pickle"):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
            load(tmp_path)
    file.write_bytes(whole)
    good = json.loads(text)
    for changed, message in (
        ("{", "it is not JSON"),
        ("[]", "it is no JSON object"),
        (json.dumps(good | {"version": 99}), "not a model description"),
        (json.dumps(good | {"run_this": "os.system"}), "run_this"),
        (json.dumps(good | {"head": {"pool": "middle"}}), "pool is 'middle'"),
        (json.dumps(good | {"backbone": {"name": "os.system", "args": {}}}), "takes a name and args"),
        (json.dumps(good | {"class_names": None}), "takes a list of names"),
    ):
        card.write_text(changed)
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)
    card.write_text(text)
    load(tmp_path)


def test_a_model_with_weights_that_are_no_numbers_is_refused(model: Classifier, tmp_path: Path) -> None:
    path = save(model, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("backbone.") and tensors[name].dim() == 4)
    tensors[name][0] = float("inf")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"NaN or infinite: {name}"):
        load(tmp_path)


def test_a_model_with_variances_below_zero_is_refused(model: Classifier, tmp_path: Path) -> None:
    path = save(model, tmp_path) / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("running_var"))
    tensors[name] = tensors[name] - 2
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"variances below 0: {name}"):
        load(tmp_path)
