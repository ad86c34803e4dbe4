"""Backbones by name: preprocessing, strict weights from every source, features from where they are asked for."""

from __future__ import annotations

import collections
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from headstart.backbones import backbone_features, backbone_map, block_aliases, create_backbone, override_spec, spec_of
from headstart.checkpoint import save
from headstart.classifier import create_classifier
from headstart.dataspec import DataSpec
from headstart.errors import CheckpointError, ModelError, RecipeError, SetupError
from headstart.freezing import count_statistics
from headstart.recipe import HeadSpec
from headstart.tracing import evaluation_mode

SMALL = "mobilenetv3_small_050"  # 1.0 M parameters without its classifier
SIZES = (224, 240, 260, 300, 380, 456, 528, 600)  # EfficientNet B0-B7 (Tan and Le 2019, arXiv 1905.11946)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def create(name: str, **options: Any) -> nn.Module:
    return create_backbone(name, **{"weights": "none", "seed": 0, **options})[0]


def on_meta(name: str, **options: Any) -> tuple[nn.Module, DataSpec]:
    """The architecture alone: large networks in no time."""
    with torch.device("meta"):
        return create_backbone(name, weights="none", **options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Random weights of the small network, with their classifier of 1000 classes."""
    torch.manual_seed(1)
    path = tmp_path / "small.safetensors"
    save_file(timm.create_model(SMALL).state_dict(), path)
    return path


# ---------------------------------------------------------------- names and preprocessing


def test_unknown_name_lists_near_matches() -> None:
    with pytest.raises(ModelError, match=r"'mobilenetv2_10'.* Did you mean: .*mobilenetv2_100"):
        create("mobilenetv2_10")


def test_unknown_tag_lists_the_tags() -> None:
    with pytest.raises(
        ModelError, match=r"no weights 'a1_in2k' for resnet18. It has: a1_in1k, .*Did you mean: a1_in1k"
    ):
        create("resnet18.a1_in2k")


@pytest.mark.parametrize(("index", "size"), list(enumerate(SIZES)))
def test_efficientnet_resolutions(index: int, size: int) -> None:
    """timm's `tf_` names bring the paper's sizes; its own retrained B2-B5 bring other ones, which can be overridden."""
    net, spec = on_meta(f"tf_efficientnet_b{index}")
    assert spec.image_size == size
    other, overridden = on_meta(f"efficientnet_b{index}", image_size=size)
    assert overridden.image_size == size
    assert count(net) == count(other)


KNOWN_SPECS = {
    "vgg16": (224, "bilinear", 0.875, "crop"),
    "resnet18": (224, "bicubic", 0.95, "crop"),  # timm's test size, 288, is not the size it was trained at
    "resnet50": (224, "bicubic", 0.95, "crop"),
    "mobilenetv2_100": (224, "bicubic", 0.875, "crop"),
    "convnext_atto": (224, "bicubic", 0.875, "crop"),
    "vit_tiny_patch16_224": (224, "bicubic", 0.9, "crop"),
    "swin_tiny_patch4_window7_224": (224, "bicubic", 0.9, "crop"),
    "densenet121": (224, "bicubic", 0.875, "crop"),
    "efficientnet_b5": (448, "bicubic", 1.0, "squash"),
    "volo_d4_448": (448, "bicubic", 1.0, "crop"),  # timm crops 1.15 there, more than the picture
}


@pytest.mark.parametrize("name", KNOWN_SPECS)
def test_native_preprocessing(name: str) -> None:
    _, spec = on_meta(name)
    assert (spec.image_size, spec.interpolation, spec.crop_pct, spec.fit) == KNOWN_SPECS[name]


def test_mean_and_std_are_the_weights_own() -> None:
    assert on_meta("vit_tiny_patch16_224")[1].mean == (0.5, 0.5, 0.5)
    assert on_meta("resnet18")[1].mean == (0.485, 0.456, 0.406)


def test_override_spec() -> None:
    spec = DataSpec(224)
    assert override_spec(spec) == spec
    changed = override_spec(spec, image_size=180, mean=(0.5, 0.5, 0.5), interpolation="bilinear", fit="squash")
    assert changed == DataSpec(180, mean=(0.5, 0.5, 0.5), interpolation="bilinear", fit="squash")
    with pytest.raises(ModelError, match="crop_pct is 2"):
        override_spec(spec, crop_pct=2)
    assert spec_of("resnet18", "none", image_size=96).image_size == 96
    with pytest.raises(RecipeError, match=r"spec_overrides: unknown key 'size'.*Did you mean: image_size"):
        spec_of("resnet18", "none", size=96)


# ---------------------------------------------------------------- options


def test_drop_rates_reach_the_network() -> None:
    net = create("efficientnet_b0", drop_rate=0.3, drop_path_rate=0.2)
    assert net.drop_rate == 0.3
    assert max(m.drop_prob for m in net.modules() if type(m).__name__ == "DropPath") > 0.15
    assert not [m for m in create("efficientnet_b0").modules() if type(m).__name__ == "DropPath"]


@pytest.mark.parametrize("name", ["densenet121", "vgg11"])
def test_drop_path_where_there_is_none(name: str) -> None:
    with pytest.raises(ModelError, match=rf"{name} takes no drop_path_rate \(0.1 was given\)"):
        on_meta(name, drop_path_rate=0.1)


def test_unknown_pool() -> None:
    with pytest.raises(ModelError, match=r"pool is 'average'; allowed: backbone, avg"):
        create(SMALL, pool="average")


def test_seed_decides_the_random_weights_and_nothing_else() -> None:
    torch.manual_seed(5)
    first = create(SMALL, seed=1)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    weight = first.conv_stem.weight
    assert torch.equal(weight, create(SMALL, seed=1).conv_stem.weight)
    assert not torch.equal(weight, create(SMALL, seed=2).conv_stem.weight)


# ---------------------------------------------------------------- pooling


@pytest.mark.parametrize(("name", "pool", "parameters"), [
    ("vgg16", "backbone", 134_260_544),  # up to the last fully connected layer
    ("vgg16", "avg", 14_714_688),  # Keras's VGG16(include_top=False)
    ("mobilenetv3_small_100", "backbone", 1_517_856),
    ("mobilenetv3_small_100", "avg", 927_008),  # without conv_head, 576 -> 1024 with bias
    ("convnext_atto", "backbone", 3_374_520),
    ("convnext_atto", "max", 3_374_520 - 640),  # without the norm behind the pooling
])  # fmt: skip
def test_what_stands_behind_the_map_is_removed(name: str, pool: str, parameters: int) -> None:
    net, _ = on_meta(name, pool=pool)
    assert count(net) == parameters


MAPS = {
    "resnet18": (512, 2),
    "swin_tiny_patch4_window7_224": (768, 2),
    "vit_tiny_patch16_224": (192, 4),
    "densenet121": (1024, 2),
}


@pytest.mark.parametrize("name", MAPS)
def test_pooling_acts_on_the_map(name: str) -> None:
    channels, side = MAPS[name]
    net = create(name, pool="avg", image_size=64)
    x = torch.randn(2, 3, 64, 64)
    with evaluation_mode(net), torch.no_grad():
        feature_map = backbone_map(net, x)
        raw = net.forward_features(x)
        features = {pool: backbone_features(net, x, pool) for pool in ("avg", "max", "flatten")}
    assert feature_map.shape == (2, channels, side, side)
    if name.startswith("vit"):  # the class token is no part of the picture
        places = raw[:, 1:]
    else:
        places = raw.flatten(1, 2) if name.startswith("swin") else raw.flatten(2).transpose(1, 2)
    torch.testing.assert_close(features["avg"], places.mean(1))
    torch.testing.assert_close(features["max"], places.amax(1))
    assert torch.equal(features["flatten"].reshape(2, channels, -1), places.transpose(1, 2))


@pytest.mark.parametrize("name", [SMALL, "convnext_atto", "vit_tiny_patch16_224"])
def test_pool_backbone_is_what_the_network_does(name: str) -> None:
    """Its classifier on our features gives its own logits."""
    torch.manual_seed(0)
    args = {"img_size": 64} if name.startswith("vit") else {}
    whole = timm.create_model(name, num_classes=10, **args).eval()
    net = create(name, image_size=64).eval()
    net.load_state_dict({k: v for k, v in whole.state_dict().items() if k in net.state_dict()})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = whole.get_classifier()(backbone_features(net, x, "backbone"))
        assert torch.equal(logits, whole(x))


def test_a_module_of_ones_own() -> None:
    net = nn.Conv2d(3, 5, 3)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(backbone_features(net, x, "avg"), net(x).mean((2, 3)))
    with pytest.raises(ModelError, match=r"Conv2d gives \(2, 5, 6, 6\), not features .*pool='avg'"):
        backbone_features(net, x, "backbone")
    with pytest.raises(ModelError, match="not a feature map"):
        backbone_features(nn.Sequential(net, nn.Flatten()), x, "avg")


# ---------------------------------------------------------------- features from an earlier block


def output_of(net: nn.Module, block: str, x: torch.Tensor) -> torch.Tensor:
    seen = []
    hook = net.get_submodule(block).register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
    with evaluation_mode(net), torch.no_grad():
        net.forward_features(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(("name", "block", "gone"), [
    ("resnet18", "layer3", "layer4.0.conv1"),
    ("resnet18", "layer2.0", "layer2.1.conv1"),
    (SMALL, "blocks.3", "conv_head"),
    ("convnext_atto", "stages.1", "head.norm"),
    ("vit_tiny_patch16_224", "blocks.5", "norm"),
    ("densenet121", "features.transition2", "features.norm5"),
])  # fmt: skip
def test_features_from_a_block(name: str, block: str, gone: str) -> None:
    whole = create(name, image_size=64)
    cut = create(name, image_size=64, features_from=block)
    x = torch.randn(1, 3, 64, 64)
    expected = output_of(whole, block, x)
    with evaluation_mode(cut), torch.no_grad():
        assert torch.equal(cut.forward_features(x), expected)
    assert count(whole.get_submodule(gone)) > 0
    names = {n for n, _ in cut.named_parameters()}
    assert names < {n for n, _ in whole.named_parameters()}
    assert not [n for n in names if n.startswith(f"{gone}.")]


def test_features_from_vgg_block_by_its_tutorial_name() -> None:
    net, _ = on_meta("vgg16", features_from="block4")
    assert count(net) == 14_714_688 - 3 * 2_359_808
    assert backbone_map(net, torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 512, 4, 4)


def test_features_from_inside_a_residual_block() -> None:
    with pytest.raises(ModelError, match=r"'layer3.0.conv1' of resnet18.*whole block, for example layer3.0, layer3"):
        create("resnet18", image_size=64, features_from="layer3.0.conv1")


def test_features_from_nowhere() -> None:
    with pytest.raises(ModelError, match=r"no block 'layer33'. Did you mean: layer3"):
        create("resnet18", image_size=64, features_from="layer33")


def test_vgg_aliases() -> None:
    aliases = block_aliases(on_meta("vgg16", pool="avg")[0])
    assert list(aliases) == ["block1", "block2", "block3", "block4", "block5"]
    assert aliases["block1"] == tuple(f"features.{i}" for i in range(5))
    assert aliases["block5"] == tuple(f"features.{i}" for i in range(24, 31))
    assert block_aliases(create("resnet18")) == {}


# ---------------------------------------------------------------- weights from files


def assert_same_weights(net: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    state = net.state_dict()
    assert len(state) > 50
    assert all(torch.equal(t, tensors[n]) for n, t in state.items())


def test_file_is_loaded_without_its_classifier(file: Path) -> None:
    net = create(SMALL, weights=file)
    assert_same_weights(net, load_file(file))
    assert isinstance(net.classifier, nn.Identity)


@pytest.mark.parametrize("classes", [0, 3])
def test_any_classifier_in_the_file_will_do(tmp_path: Path, classes: int) -> None:
    state = timm.create_model(SMALL, num_classes=classes).state_dict()
    save_file(state, tmp_path / "x.safetensors")
    assert_same_weights(create(SMALL, weights=tmp_path / "x.safetensors"), state)


WRAPPED: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model of DDP": lambda s: {"model": {f"module.{k}": v for k, v in s.items()}, "lr": 0.1},
    "compiled DDP": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "with averaged weights": lambda s: {"state_dict_ema": {k: v + 1 for k, v in s.items()}, "state_dict": s},
    "ordered": lambda s: collections.OrderedDict(s),
}


@pytest.mark.parametrize("form", WRAPPED)
def test_pth_nestings(tmp_path: Path, file: Path, form: str) -> None:
    tensors = load_file(file)
    torch.save(WRAPPED[form](tensors), tmp_path / "x.pth")
    assert_same_weights(create(SMALL, weights=tmp_path / "x.pth"), tensors)


class Harmful:
    """Pickled objects can run code when they are read: this one would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "extra": Harmful(trap)}, tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match=r"x.pth: refused by PyTorch's weights-only reader \(.*\).*\.safetensors"
    ) as e:
        create(SMALL, weights=tmp_path / "x.pth")
    assert "safe_globals" not in str(e.value)  # PyTorch's advice on how to run it all the same
    assert not trap.exists()
    with (tmp_path / "x.pth").open("rb") as stream:  # and the trap works: an open reader would have run it
        torch.load(stream, weights_only=False)
    assert trap.exists()


@pytest.mark.parametrize(("name", "content", "message"), [
    ("x.safetensors", b"nonsense", "not a readable safetensors file"),
    ("x.pth", b"nonsense", "weights-only reader"),
    ("x.pt", pickle.dumps({"a": 1}), "weights-only reader"),
    ("x.h5", b"", r"files of type .h5 are not read. Allowed: .safetensors"),
    ("x", b"", "files without a suffix"),
])  # fmt: skip
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        create(SMALL, weights=tmp_path / name)


def test_file_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no named tensors in it"):
        create(SMALL, weights=tmp_path / "x.pth")


def test_no_such_file() -> None:
    with pytest.raises(
        CheckpointError, match=r"'nome': no such file or folder. Allowed: hub, none.* Did you mean: none"
    ):
        create(SMALL, weights="nome")


def spoiled(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return file


def test_missing_and_unexpected_keys_are_listed(file: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["bn1.wait"] = tensors.pop("bn1.weight")
        tensors["blocks.0.0.conv_pw.weight"] = torch.zeros(3, 3)

    with pytest.raises(CheckpointError) as caught:
        create(SMALL, weights=spoiled(file, change))
    message = str(caught.value)
    assert "1 missing: bn1.weight;" in message
    assert "1 unexpected: bn1.wait;" in message
    assert "1 of another shape: blocks.0.0.conv_pw.weight ((3, 3), expected (8, 16, 1, 1))" in message


def test_missing_running_statistics_are_an_error_but_not_their_counter(file: Path) -> None:
    def without(ending: str) -> Path:
        return spoiled(file, lambda tensors: [tensors.pop(k) for k in list(tensors) if k.endswith(ending)])

    assert count_statistics(create(SMALL, weights=without("num_batches_tracked"))) > 0
    with pytest.raises(CheckpointError, match=r"1 missing: blocks.0.0.bn1.running_var"):
        create(SMALL, weights=without("blocks.0.0.bn1.running_var"))


def test_weights_that_are_no_numbers_are_refused_by_name(file: Path) -> None:
    bad = spoiled(file, lambda tensors: tensors["blocks.0.0.conv_pw.weight"][0].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"NaN or infinite: blocks\.0\.0\.conv_pw\.weight"):
        create(SMALL, weights=bad)


def test_weights_of_another_network(file: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"do not fit resnet18. Outside the classifier, 9\d missing: conv1.weight"
    ):
        create("resnet18", weights=file)


def test_removed_parts_may_be_in_the_file_or_not(tmp_path: Path, file: Path) -> None:
    tensors = load_file(file)
    net = create(SMALL, weights=file, pool="avg")
    assert_same_weights(net, tensors)
    assert "conv_head.weight" not in net.state_dict()
    save_file({k: v for k, v in tensors.items() if not k.startswith("conv_head")}, tmp_path / "x.safetensors")
    assert_same_weights(create(SMALL, weights=tmp_path / "x.safetensors", pool="avg"), tensors)
    with pytest.raises(CheckpointError, match=r"2 missing: conv_head.weight, conv_head.bias"):
        create(SMALL, weights=tmp_path / "x.safetensors")


def test_names_of_other_programs_are_adapted_by_timm(tmp_path: Path) -> None:
    """torchvision's published DenseNet files say `norm.1` where the network has `norm1`."""
    torch.manual_seed(0)
    state = timm.create_model("densenet121").state_dict()
    other = {
        re.sub(r"(norm|conv)([12])\.", r"\1.\2.", k): v
        for k, v in state.items()
        if not k.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in other
    torch.save(other, tmp_path / "densenet.pth")
    assert_same_weights(create("densenet121", weights=tmp_path / "densenet.pth"), state)


@pytest.mark.filterwarnings("ignore::UserWarning")  # from where timm interpolates, in the peer
@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)]
)
def test_another_size_resamples_positions_as_timm_does(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    native = timm.create_model(name)
    with torch.no_grad():
        for key, parameter in native.named_parameters():
            if "pos" in key:
                parameter.normal_()
    save_file(native.state_dict(), tmp_path / "x.safetensors")
    theirs = timm.create_model(
        name, pretrained=True, img_size=96, pretrained_cfg_overlay={"file": str(tmp_path / "x.safetensors")}
    ).eval()
    ours, spec = create_backbone(name, weights=tmp_path / "x.safetensors", image_size=96)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(
            backbone_features(ours.eval(), x, "backbone"),
            theirs.forward_head(theirs.forward_features(x), pre_logits=True),
        )
    assert spec.image_size == 96


# ---------------------------------------------------------------- weights from the hub


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def no_network(*_args: object, **_options: object) -> None:
    raise OSError("Name or service not known")


def test_hub_without_network_is_one_error(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_session", lambda: type("Session", (), {"head": no_network}))
    with pytest.raises(
        SetupError, match=r"resnet18 .*Name or service not known.*--weights FILE .*RUN .*none .*HF_HOME"
    ):
        create_backbone("resnet18")


def test_hub_offline_is_honoured(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked the network"))
    with pytest.raises(SetupError, match="not in the Hugging Face cache"):
        create_backbone("resnet18")


def test_hub_weights_come_from_its_cache(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    state = timm.create_model("resnet18").state_dict()
    repository = empty_cache / "models--timm--resnet18.a1_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    save_file(state, repository / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked the network"))
    assert_same_weights(create_backbone("resnet18")[0], state)


def test_hub_has_none_for_this_name() -> None:
    with pytest.raises(ModelError, match="no pretrained weights for efficientnet_b6"):
        create_backbone("efficientnet_b6")


# ---------------------------------------------------------------- weights from a run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    model = create_classifier(
        SMALL, ["cat", "dog"], head=HeadSpec(pool="avg"), weights="none", image_size=64, interpolation="bilinear"
    )
    save(model, tmp_path / "run")
    return tmp_path / "run"


def test_run_brings_its_weights_and_preprocessing(run: Path) -> None:
    net, spec = create_backbone(SMALL, weights=run, pool="avg")
    stored = load_file(run / "model.safetensors")
    assert_same_weights(net, {k.removeprefix("backbone."): v for k, v in stored.items()})
    assert (spec.image_size, spec.interpolation) == (64, "bilinear")
    assert create_backbone(SMALL, weights=run, pool="avg", image_size=96)[1].image_size == 96


def test_run_of_a_network_that_timm_would_take_for_another_programs(tmp_path: Path) -> None:
    """timm takes ConvNeXt weights without its head's norm, as average pooling leaves them, for Facebook's own files."""
    model = create_classifier("convnext_atto", ["a", "b"], head=HeadSpec(pool="avg"), weights="none", image_size=64)
    save(model, tmp_path / "run")
    net = create("convnext_atto", weights=tmp_path / "run", pool="avg")
    assert_same_weights(net, model.backbone.state_dict())
    net = create("convnext_atto", weights=tmp_path / "run", features_from="stages.1")
    own = model.backbone.state_dict()
    assert all(torch.equal(t, own[n]) for n, t in net.state_dict().items())


def test_run_without_what_is_asked_for(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"2 missing: conv_head.weight, conv_head.bias"):
        create_backbone(SMALL, weights=run)


def test_run_of_another_backbone(run: Path) -> None:
    with pytest.raises(CheckpointError, match=f"the run's backbone is {SMALL}, not resnet18. Ask for {SMALL}"):
        create_backbone("resnet18", weights=run)


def test_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run of headstart"):
        create_backbone(SMALL, weights=tmp_path)


def test_run_with_a_damaged_description(run: Path) -> None:
    (run / "model.json").write_text('{"backbone": {"name": "resnet18"}}')
    with pytest.raises(CheckpointError, match=r"model.json does not describe a model \(KeyError\('preprocessing'\)\)"):
        create_backbone(SMALL, weights=run)


# ---------------------------------------------------------------- real weights


def test_real_weights_give_what_timm_gives(shared: Path) -> None:
    path = shared / "weights" / "mobilenetv2_100.safetensors"
    theirs = timm.create_model("mobilenetv2_100", pretrained=True, pretrained_cfg_overlay={"file": str(path)}).eval()
    net = create("mobilenetv2_100", weights=path).eval()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        features = backbone_features(net, x, "backbone")
        assert torch.equal(theirs.classifier(features), theirs(x))
    assert features.std() > 0.1
