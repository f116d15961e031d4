"""Text towers of transformers with their tokenizers, under the names and options of open_clip's `HFTextEncoder`."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from evaclip.errors import UserError
from evaclip.extras import import_extra
from evaclip.model.config import Savings, TextConfig
from evaclip.model.text import check_tokens
from evaclip.model.tower import Tower
from evaclip.tokenizer import clean
from evakernels import Packing, accelerate

_LAYER = re.compile(r"\blayers?\.(\d+)\.")


class HFTokenizer:
    """A tokenizer of transformers. Texts are repaired as by `Tokenizer`, but keep their case.

    Args:
        name: folder, or name on the Hugging Face hub.
        context_length: default length of rows.

    Raises:
        UserError: transformers is missing, or there is no such tokenizer.
    """

    def __init__(self, name: str, context_length: int = 77) -> None:
        self.context_length = context_length
        self._tokenizer = _load("AutoTokenizer", "hf_tokenizer_name", name)
        self._tokenizer.padding_side = "right"

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Token ids of each text with padding behind it, int64 `[n, context_length]`; long texts are truncated."""
        texts = [texts] if isinstance(texts, str) else texts
        length = self.context_length if context_length is None else context_length
        cleaned = [clean(text, lower=False) for text in texts]
        options = {"max_length": length, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids: Tensor = self._tokenizer(cleaned, **options).input_ids
        return ids

    def files(self) -> dict[str, bytes]:
        """The files of a folder from which the same tokenizer can be loaded, by name."""
        with TemporaryDirectory() as folder:
            self._tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

    def decode(self, ids: Tensor) -> str:
        """The text of a row of token ids, without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class HFTextTower(Tower):
    """An encoder of transformers, a pooler and a projection. Token ids -> one embedding per text.

    Args:
        config: with `hf_model_name`.
        embed_dim: width of the embeddings.
        savings: `pack_text` leaves out columns of padding alone; `recompute` other than none is transformers'
            gradient checkpointing.

    Attributes:
        config: with vocabulary, width, layers and heads of the encoder.

    Raises:
        UserError: transformers is missing, there is no such encoder, or it doesn't fit the options.
    """

    projection = "proj"

    def __init__(self, config: TextConfig, embed_dim: int, savings: Savings) -> None:
        assert config.hf_model_name is not None
        encoder = _load("AutoConfig", "hf_model_name", config.hf_folder or config.hf_model_name)
        width, longest = encoder.hidden_size, getattr(encoder, "max_position_embeddings", config.context_length)
        if encoder.is_encoder_decoder or encoder.pad_token_id is None:
            kind = "an encoder-decoder" if encoder.is_encoder_decoder else "one without pad_token_id"
            raise UserError(f"text.hf_model_name must be an encoder with padding, got {config.hf_model_name!r}, {kind}")
        if "roberta" in encoder.model_type:
            longest -= encoder.pad_token_id + 1  # RoBERTa numbers positions from pad_token_id + 1
        if config.context_length > longest:
            raise UserError(f"text.context_length must be at most {longest}, got {config.context_length}")
        if config.hf_proj_type is None and width != embed_dim:
            raise UserError(
                f"text.hf_proj_type must be linear or mlp, got None for width {width} and embed_dim {embed_dim}"
            )
        super().__init__(encoder.num_hidden_layers, savings)
        self.pad_id: int = encoder.pad_token_id
        self.config = replace(
            config,
            vocab_size=encoder.vocab_size,
            width=width,
            layers=encoder.num_hidden_layers,
            heads=encoder.num_attention_heads,
            mlp_ratio=getattr(encoder, "intermediate_size", 4 * width) / width,
        )
        from transformers import AutoModel

        self.transformer: Any = AutoModel.from_config(encoder, dtype=torch.float32)
        if config.hf_pooler_type != "cls_pooler" and getattr(self.transformer, "pooler", None) is not None:
            self.transformer.pooler = None
        self._recomputes = False
        self.proj: nn.Module
        if config.hf_proj_type == "mlp":
            hidden = (width + embed_dim) // 2
            linear = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, embed_dim, bias=False)
            self.proj = nn.Sequential(linear[0], nn.GELU(), linear[1])
        else:
            self.proj = nn.Identity() if config.hf_proj_type is None else nn.Linear(width, embed_dim, bias=False)
        accelerate(self.transformer)
        self.register_load_state_dict_post_hook(_set_buffers)  # type: ignore[no-untyped-call]
        if not self._is_meta:
            self.reset_parameters()

    @property
    def _is_meta(self) -> bool:
        return any(parameter.is_meta for parameter in self.transformer.parameters())

    def reset_parameters(self) -> None:
        """Start from the weights of `hf_model_name`, or from random values if `hf_model_pretrained` is false."""
        self._initialize(random=not self.config.hf_model_pretrained)
        if self.config.hf_model_pretrained:
            source = _load("AutoModel", "hf_model_name", self.config.hf_model_name, dtype=torch.float32).state_dict()
            self.transformer.load_state_dict({name: source[name] for name in self.transformer.state_dict()})
        for module in self.proj.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()

    def _initialize(self, random: bool) -> None:
        """Compute buffers outside the state dict, and random parameters if asked, by transformers' rules."""
        device = next(self.transformer.parameters()).device
        for module in self.transformer.modules():
            module._is_hf_initialized = False
            for name in module._non_persistent_buffers_set:
                if module._buffers[name] is not None:
                    module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = not random
        self.transformer.initialize_weights()

    def layer_id(self, name: str) -> int:
        """As of any tower; everything of the encoder outside its layers and its pooler counts as embeddings."""
        if match := _LAYER.search(name):
            return int(match[1]) + 1
        return self.layers + 1 if name.startswith(("proj", "transformer.pooler")) else 0

    def lock(self, unlocked_groups: int = 0) -> None:
        """Freeze the encoder except its last layers; the projection, which has start values, is always trained."""
        super().lock(unlocked_groups + 1)

    def forward(self, tokens: Tensor, packing: Packing | None = None) -> Tensor:
        """Embeddings `[B, embed_dim]` of token ids `[B, N]`, N at most the context length.

        Args:
            tokens: int64 or int32; padding has the encoder's `pad_token_id` and no influence.
            packing: of these tokens; None computes it.

        Raises:
            TypeError: for ids that aren't integers.
            ValueError: for a wrong shape.
        """
        check_tokens(tokens, self.config.context_length)
        packing = self.pack_tokens(tokens) if packing is None else packing
        self._set_recompute(self.savings.recompute != "none")
        tokens = tokens[:, : packing.length]
        mask = tokens != self.pad_id
        output = self.transformer(input_ids=tokens, attention_mask=mask.long())
        embeddings: Tensor = self.proj(self._pool(output, mask, packing.lengths - 1))
        return embeddings

    def pack_tokens(self, tokens: Tensor) -> Packing:
        """All rows of token ids `[B, N]` up to the longest text's length; may synchronize with their device."""
        last = self.end_positions(tokens)
        readable = not torch.compiler.is_compiling() and not tokens.is_meta and len(tokens) > 0
        length = int(last.max()) + 1 if readable and self.savings.pack_text else tokens.shape[1]
        return Packing.padded(last + 1, length)

    def end_positions(self, tokens: Tensor) -> Tensor:
        """Position of each text's last token, int64 `[B]`."""
        return torch.where(tokens != self.pad_id, torch.arange(tokens.shape[1], device=tokens.device), 0).amax(1)

    def _set_recompute(self, recompute: bool) -> None:
        if recompute != self._recomputes:
            # The name has changed within transformers 5.
            kind = "activation" if hasattr(self.transformer, "activation_checkpointing_enable") else "gradient"
            getattr(self.transformer, f"{kind}_checkpointing_{'enable' if recompute else 'disable'}")()
            self._recomputes = recompute

    def _pool(self, output: Any, mask: Tensor, last: Tensor) -> Tensor:
        hidden: Tensor = output.last_hidden_state
        match self.config.hf_pooler_type:
            case "mean_pooler":
                return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            case "max_pooler":
                return hidden.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1)
            case "last_pooler":
                return hidden[torch.arange(len(hidden), device=hidden.device), last]
            case "cls_pooler" if getattr(output, "pooler_output", None) is not None:
                pooled: Tensor = output.pooler_output
                return pooled
        return hidden[:, 0]


def _set_buffers(tower: nn.Module, _: Any) -> None:
    # `load_state_dict(assign=True)` gives a tower on the meta device real parameters, but no buffers.
    assert isinstance(tower, HFTextTower)
    if not tower._is_meta and any(buffer.is_meta for buffer in tower.transformer.buffers()):
        tower._initialize(random=False)


def _load(kind: str, option: str, name: str | None, **options: Any) -> Any:
    """`KIND.from_pretrained(name)` of transformers."""
    transformers = import_extra("transformers")
    try:
        return getattr(transformers, kind).from_pretrained(name, **options)
    except (KeyError, OSError, ValueError) as exc:
        reason = str(exc).strip().partition("\n")[0]
        raise UserError(
            f"text.{option} must be the path of a local folder with a config.json, or a name on the Hugging Face hub, "
            f"got {name!r}, which is not one; asking the hub failed: {reason}"
        ) from exc
