"""The transformers side of a comparison."""

import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from mllm_edge.calibration.decide import shipped
from mllm_edge.export.checkpoint.adapters import Skeleton, skeleton
from mllm_edge.export.checkpoint.quantized import without_quantization
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.source_weights import source_weights
from mllm_edge.graph import rtn
from mllm_edge.graph.precision import Precision, block_size

__all__ = [
    "adapted",
    "before",
    "behind",
    "cache_name",
    "encodes",
    "forget_prompts",
    "greedy_answers",
    "linear_layers",
    "load_reference",
    "rounded",
    "scores",
]

_OWN_MERGE = "the reference's adapters were merged by mllm-edge, too: pip install peft lets PEFT do it"
_OWN_NAMES = (
    "the reference's adapters were merged by mllm-edge, too: transformers does not know this checkpoint's names"
)
# A place where no adapter lies: from_pretrained would merge one that is in the checkpoint's folder by itself.
_NO_ADAPTER = {"subfolder": "no-adapter"}
_TOWERS = "embed_tokens_extend."  # Phi-4 multimodal's stand in its language model
_DECODER_LAYERS = ("decoder_layers", "num_decoder_layers")  # of encoder-decoders


def load_reference(source: Source, decoder_layers: int | None = None, cls: Any = None) -> Any:
    """What transformers makes of the checkpoint itself, in float32; only the first `decoder_layers` (None: all).
    `cls`: a class of its own, where transformers' needs one around it."""
    import torch
    from transformers import AutoConfig, AutoModelForMultimodalLM

    config = without_quantization(AutoConfig.from_pretrained(source.folder))  # the weights were found to be float
    if decoder_layers is not None:
        text = config.get_text_config()
        name = next((n for n in _DECODER_LAYERS if hasattr(text, n)), "num_hidden_layers")
        setattr(text, name, min(decoder_layers, getattr(text, name)))
    return (cls or AutoModelForMultimodalLM).from_pretrained(
        source.folder, config=config, dtype=torch.float32, low_cpu_mem_usage=True, adapter_kwargs=_NO_ADAPTER
    )


def forget_prompts(model: Any) -> None:
    """Drop what a model keeps of its last prompt: Qwen-VL's offset of positions would shift one without images."""
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None


def encodes(model: Any) -> bool:
    """Whether it is an encoder-decoder, which InstructBLIP does not say of itself."""
    return bool(model.config.get_text_config().is_encoder_decoder)


def before(model: Any, rows: int = 1) -> dict[str, Any]:
    """The ids [rows, n] that the decoder of an encoder-decoder begins with, as in `generate`, as an input of the model;
    none in other models, whose decoders begin with the prompt."""
    import torch

    if not encodes(model):
        return {}
    own, text = model.generation_config, model.config.get_text_config()
    start = [own.decoder_start_token_id, getattr(text, "decoder_start_token_id", None), own.bos_token_id]
    ids = [next(token for token in start if token is not None), own.forced_bos_token_id]
    return {"decoder_input_ids": torch.tensor([[token for token in ids if token is not None]] * rows)}


def behind(model: Any, inputs: Mapping[str, Any], out: Any, tokens: Any) -> dict[str, Any]:
    """The inputs of a step with `tokens` [rows, 1], behind a run that gave `out` of a prompt with these `inputs`, as in
    `generate`: they see what its last token sees."""
    from transformers.modeling_outputs import BaseModelOutput

    cache = {cache_name(model): out.past_key_values, "use_cache": True}
    if encodes(model):
        read = {"encoder_outputs": BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)}
        return {"decoder_input_ids": tokens, "attention_mask": inputs.get("attention_mask"), **read, **cache}
    seen = {name: inputs[name][:, -1:] for name in ("cross_attention_mask",) if name in inputs}
    if {"image_attention_mask", "pixel_values"} <= set(inputs):  # IDEFICS keeps nothing of the images, and looks again
        mask = inputs["image_attention_mask"][:, -1:]
        seen |= {"image_attention_mask": mask, "pixel_values": inputs["pixel_values"]}
    return {"input_ids": tokens, **seen, **cache}


def cache_name(model: Any) -> str:
    """The argument that takes the cache: named anew in transformers 5.24; the old name goes in 5.40."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def greedy_answers(
    model: Any, prompts: Sequence[np.ndarray], most: int, stops: Set[int]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The model's own answer [n] to each of `prompts` (ids [S], text alone), with its end if that comes within `most`
    tokens, and the logits [n, vocabulary] float32 that each came from. All run at once, which takes hardly longer than
    one."""
    import torch

    forget_prompts(model)
    ids, mask = _padded(model, prompts)
    tokens, logits = [], []
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    with torch.no_grad():
        types = _token_types(model, ids, [0] * len(prompts))
        first = before(model, len(prompts))
        out = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1, **types, **first)
        while True:
            logits.append(out.logits[:, -1].float())
            tokens.append(logits[-1].argmax(dim=-1, keepdim=True))
            ended |= torch.isin(tokens[-1][:, 0], torch.tensor(sorted(stops), dtype=torch.int64))
            if len(tokens) == most or bool(ended.all()):
                break
            if not first:  # else the mask is that of the prompt alone
                mask = torch.cat([mask, torch.ones_like(tokens[-1])], dim=1)
            step = behind(model, {}, out, tokens[-1])
            out = model(**{**step, "attention_mask": mask}, logits_to_keep=1)
    forget_prompts(model)
    answers = [_ended(answer, stops) for answer in torch.cat(tokens, dim=1).numpy()]
    rows = [np.stack([step[i].numpy() for step in logits[: len(answer)]]) for i, answer in enumerate(answers)]
    return answers, rows


def scores(model: Any, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits [n, vocabulary] float32 that the model gives each token of an answer [n], behind its prompt [S] of text
    and the tokens before it; all at once."""
    import torch

    forget_prompts(model)
    if encodes(model):
        return _decoded_scores(model, prompts, answers)
    ids, mask = _padded(model, [np.concatenate([p, a[:-1]]) for p, a in zip(prompts, answers, strict=True)])
    types = _token_types(model, ids, [len(answer) - 1 for answer in answers])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=max(map(len, answers)), **types)
    forget_prompts(model)
    return [out.logits[row, -len(answer) :].float().numpy() for row, answer in enumerate(answers)]


def _decoded_scores(model: Any, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> list[np.ndarray]:
    """As `scores`, of an encoder-decoder, which reads the prompts and begins the answers with tokens of its own."""
    import torch

    ids, mask = _padded(model, prompts)
    start = before(model)["decoder_input_ids"][0].numpy()
    begun, _ = _padded(model, [np.concatenate([start, answer[:-1]]) for answer in answers])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=begun, use_cache=False)
    rows = [slice(len(start) - 1, len(start) - 1 + len(answer)) for answer in answers]
    return [out.logits[i, part].float().numpy() for i, part in enumerate(rows)]


def _token_types(model: Any, ids: Any, answered: Sequence[int]) -> dict[str, Any]:
    """Where a prompt's tokens see each other both ways (PaliGemma), what tells these, 0, from so many `answered` ones
    behind them, 1; `ids` [rows, longest]."""
    import torch

    if not getattr(model.config.get_text_config(), "use_bidirectional_attention", False):
        return {}
    behind = torch.arange(ids.shape[1])[None] >= ids.shape[1] - torch.tensor(answered)[:, None]
    return {"token_type_ids": behind.long()}


def linear_layers(model: Any) -> list[Any]:
    """Those of the language model, but for its head."""
    import torch

    sides = (model.get_encoder(), model.get_decoder()) if encodes(model) else (model.get_decoder(),)
    modules = (named for side in sides for named in side.named_modules())
    return [m for name, m in modules if isinstance(m, torch.nn.Linear) and not name.startswith(_TOWERS)]


@contextmanager
def rounded(
    model: Any, layers: Precision, head: Precision, activations: bool = False, positive_scales: bool = False
) -> Iterator[None]:
    """Within, the language model's linear layers compute with weights rounded to nearest, each only while it runs; with
    `activations`, their inputs are rounded to 8 bits for each token, too; with `positive_scales`, blocks as for
    TensorRT."""
    import torch

    chosen = dict.fromkeys(linear_layers(model), layers)
    chosen[model.get_output_embeddings()] = head

    def forward(module: Any, precision: Precision, x: Any) -> Any:
        weight = module.weight.detach().numpy()
        if positive_scales and precision.in_blocks:
            weight = _positive_blocks(weight, precision)
        else:
            weight = shipped(weight, precision)
        if activations:
            step = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / 127
            x = torch.round(x / step) * step
        kept, module.weight = module.weight, torch.nn.Parameter(torch.from_numpy(weight), requires_grad=False)
        try:
            return type(module).forward(module, x)
        finally:
            module.weight = kept

    for module, precision in chosen.items():
        setattr(module, "forward", partial(forward, module, precision))  # noqa: B010 # a method, mypy says
    try:
        yield
    finally:
        for module in chosen:
            del module.forward


def _positive_blocks(weight: np.ndarray, precision: Precision) -> np.ndarray:
    rows, row = weight.shape
    block = block_size(row, precision.largest_block)
    codes, scales = rtn.quantize_blocks(weight, precision.bits, block, positive_scales=True)
    values = (codes.astype(np.float32) - (1 << (precision.bits - 1))) * scales[..., None]
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :row])


def _padded(model: Any, rows: Sequence[np.ndarray]) -> tuple[Any, Any]:
    """Ids [rows, longest] with zeros before the shorter ones, and where they are not; in an encoder-decoder, where
    nothing comes behind them, they stand behind."""
    import torch

    longest = max(map(len, rows))
    ids, mask = (np.zeros((len(rows), longest), np.int64) for _ in range(2))
    for i, row in enumerate(rows):
        first = 0 if encodes(model) else longest - len(row)
        ids[i, first : first + len(row)], mask[i, first : first + len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _ended(answer: np.ndarray, stops: Set[int]) -> np.ndarray:
    """The answer up to the first token that ends it, that one included."""
    ends = np.flatnonzero(np.isin(answer, sorted(stops)))
    return answer[: ends[0] + 1] if len(ends) else answer


def adapted(model: Any, source: Source) -> tuple[Any, tuple[str, ...]]:
    """The reference model in float32 with the source's adapters, merged by PEFT where it can, and notes."""
    if not source.adapters:
        return model, ()
    if not source.in_transformers:  # its weights were read through the adapters
        return model, (_OWN_NAMES,)
    names = skeleton(model)
    if importlib.util.find_spec("peft") is None:
        return _with_our_weights(model, source, names), (_OWN_MERGE,)
    from mllm_edge.export.checkpoint.peft_merge import merged_by_peft

    notes = []
    for adapter in source.adapters:
        model, left = merged_by_peft(model, adapter, names)
        if left:
            notes.append(f"PEFT has no place for all of {adapter.name} ({left}): the reference was merged by mllm-edge")
            source.notices.add(notes[-1])
    return (_with_our_weights(model, source, names) if notes else model).eval(), tuple(notes)


def _with_our_weights(model: Any, source: Source, names: Skeleton) -> Any:
    """Every changed weight as the export reads it; `names` are those of the model before anything was merged."""
    import torch

    weights, parameters = source_weights(source), dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in weights.altered:
            live = names.rename(name)
            for parameter in (parameters.get(live), parameters.get(names.tied.get(live, ""))):
                if parameter is not None:  # else of a layer that this shorter model lacks
                    parameter.copy_(torch.from_numpy(weights.read(name)))
    return model
