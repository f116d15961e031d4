"""Labels of captions, and classification by a model's classifier against timm's `validate`, image by image."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from eval_fakes import evaclip, png, write_tar
from PIL import Image
from safetensors.torch import save_file
from timm.data import RealLabelsImagenet, create_dataset, create_loader, resolve_data_config
from timm.data.imagenet_info import ImageNetInfo
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

from evaclip import create_vision_model
from evaclip.commands.main import main
from evaclip.data import iterate, open_source
from evaclip.errors import UserError
from evaclip.eval.classify import assign_labels, class_space, evaluate, predict
from evaclip.eval.features import FeatureOptions
from evaclip.loading import FoundClassifier, find_classifier, load_model
from evaclip.transforms import OpaqueTransform
from evaclip.weights import load_weights

TINY = "eva02_tiny_patch14_336.mim_in22k_ft_in1k"
QUIET = FeatureOptions(batch_size=4, progress=False)


@pytest.fixture(scope="module")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of each of six ImageNet classes."""
    return write_folders(tmp_path_factory.mktemp("imagenet") / "val")


def random_peer(name: str, root: Path, classes: int, **options: Any) -> nn.Module:
    """A random model of timm that finds some of the pictures."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, num_classes=classes, **options).eval()
    size = options.get("img_size")
    found = validate(model, root, **({} if size is None else {"input_size": (3, *_pair(size))}))
    teach(model, found.inputs, targets(root))
    return model


def _pair(size: Any) -> tuple[int, int]:
    return size if isinstance(size, tuple) else (size, size)


# Crop 1 and the whole side, not square with a crop, squash with the means of CLIP.
MODELS = [
    (TINY, {"depth": 2, "img_size": 70}, {}),
    ("eva02_tiny_patch14_224.mim_in22k", {"depth": 1, "img_size": (56, 112)}, {"crop_pct": 0.8}),
    ("eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", {"depth": 1, "img_size": 70}, {"crop_pct": 0.875}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "args"), MODELS, ids=["whole", "oblong", "squash"])
def test_predictions_match_timm(name: str, options: dict[str, Any], args: dict[str, Any], val: Path) -> None:
    peer = random_peer(name, val, len(WNIDS), **options)
    size = options["img_size"]
    theirs = validate(peer, val, input_size=(3, *_pair(size)), **args)
    model = create_vision_model(name, num_classes=6, image_size=size, layers=options.get("depth", 12)).eval()
    load_weights(model, peer.state_dict())
    preprocess = model.preprocess
    if args:
        preprocess = type(preprocess)(**{**vars(preprocess), "crop": args["crop_pct"]})
    transform, source = OpaqueTransform(size, preprocess), open_source(str(val), caption_template="{}")
    inputs = torch.cat([batch.images for batch in iterate(source, transform, 5)])
    assert torch.equal(inputs, theirs.inputs)
    with torch.no_grad():
        logits = torch.cat([model(part) for part in inputs.split(5)])
    assert (logits - theirs.logits).abs().max() <= 1e-5 * max(1.0, float(theirs.logits.abs().max()))
    space = class_space(6, source)
    found = predict(model, transform, source, space, QUIET)
    assert torch.equal(found.best, theirs.best)
    assert len(found.best[:, 0].unique()) > 2
    result = evaluate(found, space).accuracy
    assert (result.top1, result.top5) == pytest.approx((theirs.top1, theirs.top5), abs=1e-6)
    assert 0 < result.top1 < 1


@pytest.fixture(scope="module")
def tiny(val: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A small model of timm with random weights and 1,000 classes, and a folder with them."""
    peer = random_peer(TINY, val, 1000, depth=2, img_size=56)
    return peer, write_model(tmp_path_factory.mktemp("tiny"), peer.state_dict(), layers=2, image_size=56)


def write_model(folder: Path, weights: dict[str, Tensor], num_classes: int = 1000, **options: Any) -> Path:
    save_file(weights, folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps({"name": TINY, "num_classes": num_classes, **options}))
    return folder


def classify(out: Path, *words: object) -> dict[str, Any]:
    evaclip("eval", "classify", *words, "--workers", 0, "--json", out)
    content: dict[str, Any] = json.loads(out.read_text())
    return content


def in1k_file(folder: Path) -> Path:
    """All 1,000 classes by their folders' names."""
    file = folder / "wnids.txt"
    file.write_text("\n".join(ImageNetInfo().label_names()))
    return file


def in1k_map() -> dict[str, int]:
    return {name: label for label, name in enumerate(ImageNetInfo().label_names())}


def test_class_names_in_another_order(val: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = create_vision_model(TINY, num_classes=6, image_size=56, layers=1)
    folder = write_model(tmp_path, model.state_dict(), 6, layers=1, image_size=56)
    (folder / "classes.json").write_text(json.dumps(WNIDS))
    expected = classify(tmp_path / "own.json", folder, "--data", val)["metrics"]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(name.upper() for name in reversed(WNIDS)))
    metrics = classify(tmp_path / "named.json", folder, "--data", val, "--classes", names)["metrics"]
    assert (metrics["top1"], metrics["mean_per_class"]) == (expected["top1"], expected["mean_per_class"])
    names.write_text("\n".join((*WNIDS[:5], "no class")))
    assert main(["eval", "classify", str(folder), "--data", str(val), "--classes", str(names)]) == 2
    assert "'no class'" in capsys.readouterr().err


@pytest.mark.slow
def test_other_size_and_crop_match_timm(val: Path, tmp_path: Path) -> None:
    """A file of weights of 336 pixels, used at 112: with `--antialias` as timm does, which resizes positions so."""
    torch.manual_seed(0)
    native, file = timm.create_model(TINY).eval(), tmp_path / "weights.safetensors"
    teach(native, torch.zeros(6, 3, 336, 336) + torch.arange(6)[:, None, None, None], torch.arange(6))
    save_file(native.state_dict(), file)
    peer = timm.create_model(TINY, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, img_size=112)
    theirs = validate(peer, val, img_size=112, crop_pct=0.8, columns=list(range(6)))
    given = f"{TINY}:{file}"
    found = find_classifier(given).load(image_size=112, crop=0.8, antialias=True)
    assert torch.equal(found.model.pos_embed, peer.pos_embed)
    source = open_source(str(val), caption_template="{}")
    subset = numbers(tmp_path, range(6))
    space = class_space(1000, source, subset=subset)
    assert torch.equal(predict(found.model, found.transform, source, space, QUIET).best, theirs.best)
    words = ("--data", val, "--subset", subset, "--image-size", 112, "--crop-pct", 0.8, "--antialias")
    metrics = classify(tmp_path / "out.json", given, *words)["metrics"]
    assert (metrics["top1"], metrics["top5"]) == pytest.approx((theirs.top1, theirs.top5), abs=1e-6)
    assert not torch.equal(find_classifier(given).load(image_size=112).model.pos_embed, peer.pos_embed)
    oblong = find_classifier(given).load(image_size=(56, 112))
    assert oblong.transform.size == oblong.model.config.image_size == (56, 112)


def test_image_size_of_released_classifier(tmp_path: Path) -> None:
    """Larger than the grid of the positions; weights of a training have their own."""
    name, file = "naflexvit_base_patch16_gap.e300_s576_in1k", tmp_path / "model.safetensors"
    save_file({"head.weight": torch.zeros(6, 1)}, file)
    for source in (name, f"{name}:{file}"):
        assert find_classifier(source).eval_size == 384
    (tmp_path / "model.json").write_text(json.dumps({"name": name, "image_size": 256}))
    assert find_classifier(f"{name}:{file}").eval_size is None
    assert find_classifier(name).load().model.config.image_size == 256  # the grid that packed images resize


def test_classify_takes_size_of_release(val: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, sizes = "naflexvit_base_patch16_gap", []

    def load(self: FoundClassifier, **options: Any) -> None:
        sizes.append(options["image_size"])
        raise UserError("not loaded")

    monkeypatch.setattr(FoundClassifier, "load", load)
    for words in ((), ("--image-size", 256)):
        with pytest.raises(UserError, match="not loaded"):
            evaclip("eval", "classify", name, "--data", val, "--classes", in1k_file(tmp_path), *words)
    assert sizes == [384, 256]


def numbers(folder: Path, values: Any) -> Path:
    file = folder / "numbers.txt"
    file.write_text("".join(f"{value}\n" for value in values))
    return file


@pytest.mark.parametrize("outputs", [21841, 21842])
def test_subset_of_larger_head_matches_timm(outputs: int, val: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    peer = timm.create_model(TINY, num_classes=outputs, depth=1, img_size=56).eval()
    head = ImageNetInfo("imagenet-22k" if outputs == 21841 else "imagenet-22k-ms").label_names()
    column_of = {wnid: column for column, wnid in enumerate(head)}
    present = [wnid for wnid in ImageNetInfo().label_names() if wnid in column_of]
    columns, class_map = [column_of[wnid] for wnid in present], {wnid: i for i, wnid in enumerate(present)}
    inputs = validate(peer, val, img_size=56).inputs
    teach(peer, inputs, torch.tensor([column_of.get(wnid, 0) for wnid in WNIDS for _ in range(2)]))
    theirs = validate(peer, val, img_size=56, columns=columns, class_map=class_map)
    model = write_model(tmp_path, peer.state_dict(), outputs, layers=1, image_size=56)
    metrics = classify(tmp_path / "out.json", model, "--data", val, "--subset", "in1k")["metrics"]
    assert (metrics["top1"], metrics["top5"]) == pytest.approx((theirs.top1, theirs.top5), abs=1e-6)
    assert 0 < metrics["top1"] < 1
    assert len(theirs.best) == metrics["samples"] == 12 - metrics["left_out"]
    # The list of 21,841 classes has all of the thousand but the teddy bear.
    assert metrics["lacking"] == (["n04399382"] if outputs == 21841 else [])
    assert metrics["classes"] == len(present) == 1000 - len(metrics["lacking"])


def test_real_labels_match_timm(val: Path, tiny: tuple[nn.Module, Path], tmp_path: Path) -> None:
    peer, model = tiny
    best = validate(peer, val, img_size=56, class_map=in1k_map()).best
    first, third = int(best[0, 0]), int(best[3, 2])
    real = [[first, 7], [third, first], [], [999], *([third], [], [5, 6]) * 2, [0], [1]]
    (tmp_path / "real.json").write_text(json.dumps(real))
    theirs = validate(peer, val, img_size=56, real=tmp_path / "real.json", class_map=in1k_map())
    words = (model, "--classes", in1k_file(tmp_path), "--real-labels", tmp_path / "real.json")
    ours = classify(tmp_path / "out.json", *words, "--data", val)["metrics"]["real"]
    assert (ours["top1"], ours["top5"]) == pytest.approx((theirs.top1, theirs.top5), abs=1e-6)
    assert ours["samples"] == sum(map(bool, real)) == 9
    assert 0 < ours["top1"] < ours["top5"] < 1


def test_shards_match_folders(val: Path, tiny: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, model = tiny
    label_of = in1k_map()
    samples = {
        path.stem: {"jpg": path.read_bytes(), "cls": str(label_of[path.parent.name]).encode()}
        for path in sorted(val.rglob("*.JPEG"), key=lambda path: path.name)
    }
    shard = write_tar(tmp_path / "val.tar", samples)
    (tmp_path / "real.json").write_text(json.dumps([[number] for number in range(12)]))
    common = (model, "--real-labels", tmp_path / "real.json", "--data")
    folders = classify(tmp_path / "a.json", *common, val, "--classes", in1k_file(tmp_path))["metrics"]
    shards = classify(tmp_path / "b.json", *common, shard, "--caption-key", "cls")["metrics"]
    for metrics in (folders, shards):
        for entry in metrics["per_class"]:
            del entry["name"], entry["mistaken_for"]
    assert folders == shards
    (tmp_path / "b.json").unlink()
    bad = write_tar(tmp_path / "bad.tar", {"a": {"png": png((0, 0, 0)), "cls": b"1000"}})
    with pytest.raises(UserError, match=r"sample 'a' has label 1000"):
        classify(tmp_path / "b.json", model, "--data", bad, "--caption-key", "cls")


def test_classify_prints_and_writes(val: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"layers": 1, "image_size": 28}
    weights = create_vision_model(TINY, num_classes=6, **options).state_dict()
    model = write_model(tmp_path, weights, 6, **options)
    (model / "preprocess.json").write_text(json.dumps({"image_size": 28, "resize": "squash", "crop": 0.5}))
    save_file({**weights, "head.bias": 1 + weights["head.bias"]}, model / "ema.safetensors")
    found = find_classifier(str(model))
    assert found.weights == model / "ema.safetensors"
    assert find_classifier(str(model), average=False).weights == model / "model.safetensors"
    transform = found.load().transform
    assert (transform.preprocess.resize, transform.preprocess.crop) == ("squash", 0.5)
    classify(tmp_path / "out.json", model, "--data", val, "--show-classes", "--title", "Six classes")
    printed = capsys.readouterr().out
    assert "classify: Six classes, 12 images, 6 classes" in printed
    assert "most often taken for" in printed
    with pytest.raises(UserError, match="`evaclip eval classify`, `linear-probe` and `knn` measure it"):
        load_model(str(model))


SIX = (TINY, "--subset", "six.txt")
WRONG: list[tuple[list[object], str]] = [
    (["EVA02-CLIP-B-16"], "'EVA02-CLIP-B-16' is a CLIP model, which has no classifier: `evaclip eval zero-shot`"),
    (["eva02_tiny_patch14_335"], "unknown vision model 'eva02_tiny_patch14_335'; did you mean"),
    (["eva02_tiny_patch14_224.mim_in22k"], "the model has no classifier"),
    ([TINY], "the classifier has 1,000 classes, but the data has 6 class folders, such as 'n01440764'"),
    ([TINY, "--subset", "in1k"], "--subset in1k is for classifiers of 21,841, .* got one of 1,000"),
    ([TINY, "--subset", "two.txt"], r"two.txt holds 'a'; expected numbers of the classifier's classes, 0\.\.999"),
    ([TINY, "--subset", "five.txt"], "the classifier has 5 classes in five.txt, but the data has 6 class folders"),
    ([*SIX, "--real-labels", "short.json"], "short.json has labels of 2 images, but .* has 12"),
    ([*SIX, "--real-labels", "high.json"], r"high.json has label 6, but the 6 classes are 0\.\.5"),
    ([TINY, "--crop-pct", "1.5"], "preprocess.crop"),
    ([*SIX, "--image-size", "100"], "image_size 100"),
]


@pytest.mark.parametrize(("words", "message"), WRONG)
def test_classify_wrong_arguments(words, message, val, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "two.txt": "a\nb\n", "five.txt": "1\n2\n3\n4\n5\n", "six.txt": "1\n2\n3\n4\n5\n6\n",
        "short.json": "[[1], [2]]", "high.json": json.dumps([[6]] * 12),
    }  # fmt: skip
    for name, text in files.items():
        Path(name).write_text(text)
    monkeypatch.setattr("evaclip.loading.create_vision_model", _unless_config_is_wrong)
    with pytest.raises(UserError, match=message):
        evaclip("eval", "classify", *words, "--data", val, "--workers", 0)


def _unless_config_is_wrong(name: str, weights: object, **options: Any) -> None:
    create_vision_model(name, **{**options, "device": "meta"})
    pytest.fail("the model was made")


def test_real_labels_of_other_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("0", "1"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "x.png").write_bytes(png((0, 0, 0)))
    (tmp_path / "real.json").write_text("[[0], [1]]")
    words = ["eval", "classify", TINY, "--data", str(tmp_path / "val"), "--real-labels", str(tmp_path / "real.json")]
    assert main(words) == 2
    assert "x.png has no labels in" in (error := capsys.readouterr().err)
    assert "images called ILSVRC2012_val_00000001 to ILSVRC2012_val_00000002" in error


CRANES = ["crane", "jay", "crane"]


@pytest.mark.parametrize(
    ("captions", "classnames", "folders", "indices"),
    [
        (["dog", "cat", "dog"], ["cat", "dog", "eel"], [], [1, 0, 1]),
        (["2", "0"], ["cat", "dog", "eel"], [], [2, 0]),
        (["10", "9"], None, [], [1, 0]),
        (["1", "0"], ["1", "0"], [], [0, 1]),
        (["b"], None, ["a", "b"], [1]),
        # Folders of other names than the classes are renamed in order; numeric folders are labels.
        (["n02", "n01"], ["tench", "goldfish"], ["n01", "n02"], [1, 0]),
        (["10", "2"], [f"class {number}" for number in range(12)], sorted(map(str, range(12))), [10, 2]),
        # Two classes of one name are told apart by number or folder.
        (["2", "0"], CRANES, [], [2, 0]),
        (["n3", "n1"], CRANES, ["n1", "n2", "n3"], [2, 0]),
        # Names match whatever their order, case and underscores; a set may lack classes.
        (["new jay"], ["Crane", "new_jay"], ["crane", "new jay"], [1]),
        (["eel", "cat"], ["eel", "dog", "cat"], ["cat", "eel"], [0, 2]),
        (["a", "A"], ["A", "a"], [], [1, 0]),
    ],
)
@pytest.mark.filterwarnings("ignore:no class folder")
def test_assign_labels(captions, classnames, folders, indices) -> None:
    labels = assign_labels(captions, captions, classnames, folders)
    assert labels.indices.tolist() == indices
    distinct = sorted(set(captions), key=lambda name: (len(name), name))
    assert labels.classnames == tuple(classnames or folders or distinct)


@pytest.mark.parametrize(
    ("caption", "classnames", "folders", "message"),
    [
        ("3", ["cat", "dog", "eel"], [], r"sample 'k7' has label 3, but the 3 classes are 0\.\.2"),
        ("dgo", ["cat", "dog", "eel"], [], r"sample 'k7'.*'dgo'; did you mean 'dog'"),
        ("1", ["0", "2", "5"], [], "class of sample 'k7': '1'"),
        ("n01", ["a", "b", "c"], ["n01", "n02"], "3 class names for 2 folders"),
        ("crane", CRANES, [], "several classes are called 'crane'"),
        ("crAne", ["crane", "Crane"], [], "several classes are called 'crAne'"),
        ("cat", ["cat", "dgo", "eel"], ["cat", "dog", "eel"], "1 of 3 that are none: 'dog'"),
    ],
)
def test_assign_labels_wrong_caption(caption, classnames, folders, message) -> None:
    with pytest.raises(UserError, match=message):
        assign_labels([caption], ["k7"], classnames, folders)


def test_assign_labels_by_position_warns() -> None:
    with pytest.warns(UserWarning, match="'n01', is 'tench', the last one, 'n02', is 'goldfish'"):
        assign_labels(["n02"], ["k"], ["tench", "goldfish"], ["n01", "n02"])


MODES = ("RGB", "L", "P", "RGBA", "CMYK", "LA", "1", "tRNS")
WNIDS = ("n01440764", "n01443537", "n02085782", "n03126707", "n04399382", "n15075141")


def picture(mode: str, size: tuple[int, int], seed: int) -> bytes:
    """A file of smooth noise; JPEG where its modes allow, else PNG."""
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(draws.integers(0, 256, (5, 4, 4), np.uint8), "RGBA").resize(size, Image.Resampling.BICUBIC)
    image = coarse.convert("RGB") if mode == "tRNS" else coarse if mode == "RGBA" else coarse.convert(mode)
    if mode == "LA":
        image = Image.merge("LA", (coarse.convert("L"), coarse.getchannel("A")))
    options: dict[str, Any] = {"transparency": 7} if mode == "P" else {}
    if mode == "tRNS":
        options["transparency"] = coarse.convert("RGB").getpixel((0, 0))
    file = io.BytesIO()
    image.save(file, "JPEG" if mode in ("L", "CMYK") else "PNG", **options)
    return file.getvalue()


def write_folders(root: Path, classes: Sequence[str] = WNIDS, each: int = 2) -> Path:
    """Write `each` images per class, named as in ImageNet's validation set, in another order than the classes."""
    for number in range(each * len(classes)):
        folder = root / classes[number % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        size = [(70, 50), (33, 91), (64, 64), (300, 20), (150, 151)][number % 5]
        data = picture(MODES[number % len(MODES)], size, number)
        (folder / f"ILSVRC2012_val_{number + 1:08d}.JPEG").write_bytes(data)
    return root


def teach(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """Gives a random model of timm a head under which some pictures are found and others are not."""
    with torch.no_grad():
        features = model.forward_head(model.forward_features(inputs), pre_logits=True)
        directions = features - features.mean(0)
        noise = torch.Generator().manual_seed(3)
        weight = 0.3 * directions.std() * torch.randn(model.head.weight.shape, generator=noise)
        weight.index_add_(0, labels, directions)
        model.head.weight.copy_(weight / weight.norm(dim=1, keepdim=True).mean())
        model.head.bias.copy_(-model.head.weight @ features.mean(0))


@dataclass
class Validated:
    """What timm's `validate` has of a data set: accuracies as shares, and every picture, logits and top-5."""

    top1: float
    top5: float
    inputs: Tensor
    logits: Tensor
    best: Tensor


def validate(model, root, *, real=None, columns=None, class_map=None, **args):
    """The loop of timm's script of that name, of the same parts; `args` are its options of the same names."""
    config = resolve_data_config(args, model=model, use_test_size=True)
    dataset = create_dataset("", str(root), split="validation", class_map=class_map or "")
    loader = create_loader(
        dataset,
        batch_size=5,
        use_prefetcher=False,
        num_workers=0,
        device=torch.device("cpu"),
        **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )
    labels = RealLabelsImagenet(dataset.filenames(basename=True), real_json=real) if real else None
    meters = (AverageMeter(), AverageMeter())
    inputs, logits = [], []
    model.eval()
    with torch.no_grad():
        for images, targets in loader:
            output = model(images)
            if columns is not None:
                output = output[:, columns]
            if labels:
                labels.add_result(output)
            for meter, share in zip(meters, accuracy(output, targets, topk=(1, 5)), strict=True):
                meter.update(share.item(), images.size(0))
            inputs.append(images)
            logits.append(output)
    both = torch.cat(logits)
    top1, top5 = (labels.get_accuracy(k) for k in (1, 5)) if labels else (meter.avg for meter in meters)
    return Validated(top1 / 100, top5 / 100, torch.cat(inputs), both, both.topk(min(5, both.shape[1]), 1).indices)


def targets(root: Path) -> Tensor:
    """Labels in the order of the files, by sorted folders."""
    folders = sorted(root.iterdir())
    return torch.tensor([label for label, folder in enumerate(folders) for _ in folder.iterdir()])
