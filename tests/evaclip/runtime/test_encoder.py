"""Embeddings by `Encoder` are those of the model, whatever comes, in whatever batches."""

import threading

import numpy as np
import pytest
import torch
from image_files import as_file
from PIL import Image
from torch import nn

import evaclip
from evaclip.data.samples import BadSample, FaultKind
from evaclip.errors import UserError
from evaclip.loading import LoadedModel
from evaclip.runtime import encoder as runtime
from evaclip.runtime.encoder import Encoder
from evakernels.nn import FrozenWeight
from evakernels.nn.frozen import int8_unsupported_reason

needs_int8 = pytest.mark.skipif(int8_unsupported_reason() is not None, reason=f"int8 {int8_unsupported_reason()}")


@pytest.fixture
def encoder(loaded):
    return Encoder(loaded, device="cpu", precision="fp32", batch_size=4, threads=2)


def _expected(loaded, pictures):
    with torch.no_grad():
        return loaded.model.encode_image(torch.stack([loaded.transform(p) for p in pictures]), normalize=True)


def test_encoder_accepts_all_image_types(encoder, loaded, pictures, tmp_path):
    for number, picture in enumerate(pictures):
        picture.save(tmp_path / f"{number}.png")
    forms = {
        "paths": [tmp_path / f"{number}.png" for number in range(len(pictures))],
        "names": [str(tmp_path / f"{number}.png") for number in range(len(pictures))],
        "pictures": pictures,
        "bytes": [as_file(picture) for picture in pictures],
        "arrays": [np.asarray(picture) for picture in pictures],
        "tensors": [loaded.transform(picture) for picture in pictures],
    }
    expected = _expected(loaded, pictures)
    for name, given in forms.items():
        found = encoder.images(given)
        assert found.dtype == torch.float32, name
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5, msg=name)
        torch.testing.assert_close(encoder.images(given[0]), expected[:1], rtol=0, atol=1e-5, msg=name)


def test_encoder_applies_exif_orientation(encoder, pictures, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    pictures[0].save(tmp_path / "a.png", exif=exif)
    upright = pictures[0].transpose(Image.Transpose.ROTATE_270)
    # One picture is no sequence of them, neither are the letters of its path.
    for one in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(), upright):
        torch.testing.assert_close(encoder.images(one), encoder.images([upright]))


def test_encoder_texts_keep_order(encoder, loaded, monkeypatch):
    texts = ["a", "a red bicycle in front of a blue wall", "", "two cats", "a " * 30, "dog"]
    with torch.no_grad():
        expected = loaded.model.encode_text(loaded.tokenizer(texts), normalize=True)
    for budget in (1, 8, 40, 10_000):
        monkeypatch.setattr(runtime, "TEXT_TOKENS", budget)
        torch.testing.assert_close(encoder.texts(texts), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.texts("dog"), expected[-1:], rtol=0, atol=1e-5)


def test_stream_reports_faults_and_skips_none(encoder, loaded, pictures):
    def picture(number):
        if number == 2:
            raise BadSample(FaultKind.CORRUPT_IMAGE, "the third")
        return None if number == 4 else pictures[number]

    parts = list(encoder.stream(range(7), picture))
    assert [number for part in parts for number in part.items] == [0, 1, 3, 5, 6]
    assert [fault.name for part in parts for fault in part.faults] == ["the third"]
    expected = _expected(loaded, [pictures[number] for number in (0, 1, 3, 5, 6)])
    torch.testing.assert_close(torch.cat([part.embeddings for part in parts]), expected, rtol=0, atol=1e-5)


def test_stream_of_endless_items(encoder, pictures):
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield pictures[0]

    stream = encoder.stream(endless())
    assert len(next(stream).items) == 4
    stream.close()
    assert len(taken) < 100
    assert not [
        thread for thread in threading.enumerate() if thread.name.startswith(("evaclip-stream", "evaclip-feed"))
    ]


@pytest.mark.parametrize(("precision", "cosine"), [("bf16", 0.999), pytest.param("int8", 0.99, marks=needs_int8)])
def test_encoder_bf16_and_int8_are_close(precision, cosine, loaded, pictures):
    # Its own model: the encoder changes the dtype of what it is given.
    model = evaclip.create_model("tiny").eval()
    model.load_state_dict(loaded.model.state_dict())
    texts = ["a dog", "two cats on a red bicycle"]
    with torch.no_grad():
        expected = loaded.model.encode_text(loaded.tokenizer(texts), normalize=True)
    rough = Encoder(
        LoadedModel("tiny", "", model, loaded.tokenizer, loaded.transform), precision=precision, device="cpu"
    )
    assert (rough.images(pictures) * _expected(loaded, pictures)).sum(1).min() > cosine
    assert (rough.texts(texts) * expected).sum(1).min() > cosine
    if precision == "int8":
        frozen = {name: weight.is_int8 for name, weight in model.named_parameters() if isinstance(weight, FrozenWeight)}
        assert frozen
        assert all(is_int8 != ("blocks.0." in name) for name, is_int8 in frozen.items())


def test_int8_without_vnni_is_refused(monkeypatch):
    monkeypatch.setattr(runtime, "int8_unsupported_reason", lambda: "needs a processor with VNNI")
    for device, says in (
        ("cpu", "precision int8 needs a processor with VNNI"),
        ("cuda", "precision int8 is for a CPU"),
    ):
        with pytest.raises(UserError, match=says):
            Encoder("tiny", device=device, precision="int8")


def test_compiled_tower_pads_batches(loaded, pictures, monkeypatch):
    sizes = []

    def compiled(tower, mode):
        return lambda images: (sizes.append(len(images)), tower(images))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    encoder = Encoder(loaded, device="cpu", precision="fp32", batch_size=6, compile=True)
    for count in (1, 3, 7):
        found = encoder.images(pictures[:count])
        torch.testing.assert_close(found, _expected(loaded, pictures[:count]), rtol=0, atol=1e-5)
    assert sizes == [1, 4, 6, 1]


def test_encoder_keeps_aspect_ratios(loaded, pictures):
    encoder = Encoder(loaded, device="cpu", precision="fp32", batch_size=4, threads=2, max_patches=12)
    packed = [encoder.transform(picture) for picture in pictures]
    assert len({tuple(image.sizes[0].tolist()) for image in packed}) > 2
    assert all(image.max_length <= 12 for image in packed)
    with torch.no_grad():
        expected = torch.cat([loaded.model.encode_image(image, normalize=True) for image in packed])
    for given in (pictures, packed, [encoder.transform.transform(picture) for picture in pictures]):
        torch.testing.assert_close(encoder.images(given), expected, rtol=0, atol=1e-5)
    for options, name in (({"max_patches": 0}, "max_patches"), ({"max_patches": 9, "compile": True}, "compile")):
        with pytest.raises(UserError, match=name):
            Encoder(loaded, device="cpu", precision="fp32", **options)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (["nowhere.jpg"], UserError, "missing image: nowhere.jpg"),
        ([b"no picture"], UserError, "corrupt image: an image of 10 bytes"),
        ([3], TypeError, "image must be a path.* got int"),
        ([np.zeros((4, 4, 3))], TypeError, "image must be .* got float64 array"),
        ([np.zeros((0, 4, 3), np.uint8)], TypeError, r"image must be .* got uint8 array \[0, 4, 3\]"),
        ([torch.zeros(3, 5, 5)], TypeError, r"image tensor must be .*\[3, 32, 32\]"),
    ],
)
def test_encoder_refuses_other_inputs(encoder, given, error, says):
    with pytest.raises(error, match=says):
        encoder.images(given)


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("tiny:nowhere.safetensors", {"precision": "int4"}, "int4"),
        ("tiny:nowhere.safetensors", {"batch_size": 0}, "batch_size"),
        ("tiny:nowhere.safetensors", {"device": "nowhere"}, "nowhere"),
        ("tiny", {}, "'tiny' has random weights .* give NAME:WEIGHTS or a run"),
    ],
)
def test_encoder_wrong_options(model, options, says):
    with pytest.raises(UserError, match=says):
        Encoder(model, **{"device": "cpu", **options})


def test_encoder_nan_weights(loaded, pictures):
    model = evaclip.create_model("tiny").eval()
    nn.init.constant_(model.visual.pos_embed, float("nan"))
    broken = Encoder(LoadedModel("tiny", "", model, loaded.tokenizer, loaded.transform), precision="fp32", device="cpu")
    with pytest.raises(UserError, match="NaN or infinity for 7 of 7 images"):
        broken.images(pictures)
