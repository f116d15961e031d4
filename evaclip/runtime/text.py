"""Embeddings of texts for a search: by the text tower as an ONNX program in the store, without torch, which takes
seconds to import; or by the model itself where there is no such program."""

import copy
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evaclip.atomic import reading, replacing, write_json, writing
from evaclip.errors import UserError
from evaclip.runtime.store import Store

_LOG = logging.getLogger("evaclip.runtime")

if TYPE_CHECKING:
    from evaclip.model.clip import CLIP
    from evaclip.runtime.encoder import Encoder


PROGRAM_FILE = "text.onnx"
TOKENS_FILE = "text.json"
BATCH = 32
"""Texts of about the same length that the program embeds at a time, which bounds its memory."""

TextEncoder = Callable[[Sequence[str]], NDArray[np.float32]]


def save_text_tower(store: Store, model: "CLIP") -> None:
    """Puts the text tower of a model into the store, in float32, so that searches need no torch.

    Raises:
        UserError: the packages that write ONNX are missing (`evakernels[export]`), the store can't be written, or the
            tokenizer is one of transformers.
    """
    from evaclip.export import export

    if (name := model.config.text.hf_tokenizer_name) is not None:
        raise UserError(f"a store's text program supports CLIP's tokenizer only, got {name!r}")
    export(model.eval(), "text", store.folder / PROGRAM_FILE, normalize=True, overwrite=True, external=True)
    text = model.config.text
    # Written last: without it there is no program.
    write_json(store.folder / TOKENS_FILE, {"context_length": text.context_length, "vocab_size": text.vocab_size})


def has_text_tower(store: Store) -> bool:
    """Whether the store holds the text tower of its model."""
    return (store.folder / TOKENS_FILE).is_file()


def copy_text_tower(store: Store, target: Store) -> None:
    """Puts the text tower of a store, if it has one, into another of the same model, if that has none."""
    if has_text_tower(store) and not has_text_tower(target):
        for name in (f"{PROGRAM_FILE}.data", PROGRAM_FILE, TOKENS_FILE):
            with writing(target.folder), replacing(target.folder / name) as temporary:
                shutil.copyfile(store.folder / name, temporary)


def text_encoder(store: Store) -> TextEncoder:
    """A function from texts to embeddings float32 `[n, dim]` of length 1, by the store's model.

    Raises:
        UserError: there is neither a program in the store nor a model that its description names.

    Example:
        `text_encoder(store)(["a red bicycle", "a cat"])`
    """
    if has_text_tower(store) and find_spec("onnxruntime"):
        return _Program(store.folder)
    if not store.model.get("given"):
        raise UserError(
            f"{store.folder} has no text tower ({PROGRAM_FILE}, for onnxruntime) and no model name for its "
            "embeddings; put the tower into it with evaclip.runtime.text.save_text_tower"
        )
    remedy = "install onnxruntime" if has_text_tower(store) else "`evaclip index` adds the text tower to the store"
    _LOG.warning("%s: torch and the whole model are loaded, which takes seconds; %s", store.folder, remedy)
    encoder = encoder_of(store)
    return lambda texts: encoder.texts(list(texts)).numpy()


def encoder_of(store: Store) -> "Encoder":
    """The model of a store's embeddings, in float32 on the CPU.

    Raises:
        UserError: the store doesn't name it, or the named model has other weights by now.
    """
    from evaclip.loading import load_model
    from evaclip.runtime.encoder import PRECISIONS, Encoder
    from evaclip.weights.files import weights_hash

    given, precision = store.model.get("given"), store.model.get("precision")
    if not given:
        raise UserError(f"{store.folder} doesn't name the model that embeds images; search by a TEXT")
    loaded = load_model(given, device="cpu", random=False)
    if "weights" in store.model and precision in PRECISIONS:
        # Of int8's, that only such a processor makes, the hash isn't known here.
        model = copy.deepcopy(loaded.model).to(PRECISIONS[precision])
        store.require_model({**store.model, "weights": weights_hash(model)})
    return Encoder(loaded, device="cpu", precision="fp32", max_patches=store.model.get("max_patches"))


class _Program:
    """The tower in ONNX Runtime. It is loaded while the tokenizer is made."""

    def __init__(self, folder: Path) -> None:
        with reading(folder / TOKENS_FILE):
            sizes = json.loads((folder / TOKENS_FILE).read_text(encoding="utf-8"))
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(_session, folder / PROGRAM_FILE)
            from evaclip.tokenizer import Tokenizer

            self._tokens = Tokenizer(**sizes).array
            self._session = loading.result()

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        tokens = self._tokens(list(texts))
        found = np.empty((len(tokens), self._session.get_outputs()[0].shape[1]), np.float32)
        by_length = tokens.argmax(axis=1).argsort(kind="stable")
        for first in range(0, len(tokens), BATCH):
            rows = by_length[first : first + BATCH]
            (found[rows],) = self._session.run(None, {"inputs": tokens[rows]})
        return found


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # For one text the rest takes longer than it gains, most of all a copy of the weights.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as exc:
        raise UserError(f"{path} can't be read by onnxruntime: {exc}") from exc
