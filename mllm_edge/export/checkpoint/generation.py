"""Stop ids and generation settings of a checkpoint, as transformers' `generate` would apply them."""

from collections.abc import Mapping
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.processing import read_tokenizer
from mllm_edge.export.checkpoint.quiet import quiet_transformers
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.spec import GenerationDefaults, GenerationSpec

__all__ = ["decoder_start", "generation_spec"]

FILE = "generation_config.json"
# What transformers applies to the logits of a greedy answer and no runtime here does; the value that is the same as
# none (generation/utils.py: _get_logits_processor, _get_stopping_criteria, get_generation_mode).
_NOT_CARRIED: Mapping[str, Any] = {
    "constraints": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "num_beam_groups": 1,
    "num_beams": 1,
    "penalty_alpha": None,
    "sequence_bias": None,
    "token_healing": False,
    "watermarking_config": None,
}
# Of drawn answers.
_SAMPLING: Mapping[str, Any] = {
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "typical_p": 1.0,
}


def generation_spec(source: Source, text_config: Mapping[str, Any], tokenizer: Any = None) -> GenerationSpec:
    """Stop ids as transformers finds them (generation_config.json, else config.json; if that says nothing,
    `text_config`), the tokens that templates may write, and the settings that change an answer.

    Notices tell of files that contradict each other, and of settings that no runtime here applies. Raises ConfigError
    when transformers refuses the settings, or when a value is of no use.
    """
    tokenizer = tokenizer or read_tokenizer(source)
    config = _read(source)
    stops = _ids(config.eos_token_id)
    if not stops:
        stops = _ids(text_config.get("eos_token_id"))
        if stops:
            source.notices.add(
                f"{source.folder / FILE}: no stop id, with which transformers' answers do not end; text_config's is "
                f"used here ({_shown(stops)})"
            )
    _tell_contradictions(source, stops, tokenizer)
    _tell_not_carried(source, config, bool(text_config.get("is_encoder_decoder")))
    return GenerationSpec(
        eos_token_ids=stops,
        bos_token_id=_first(config.bos_token_id, text_config.get("bos_token_id")),
        pad_token_id=_first(config.pad_token_id, text_config.get("pad_token_id")),
        special_tokens=dict(tokenizer.special_tokens_map),
        defaults=_defaults(source, config),
    )


def decoder_start(source: Source, text_config: Mapping[str, Any]) -> tuple[int, ...]:
    """What the decoder of an encoder-decoder begins with: its start token, and the one that transformers forces to be
    the first of an answer. Raises ConfigError where no start token is stated."""
    config = _read(source)
    start = _first(config.decoder_start_token_id, text_config.get("decoder_start_token_id"), config.bos_token_id)
    if not isinstance(start, int):
        raise ConfigError(
            f"{source.folder / FILE}: decoder_start_token_id = {start!r}", "the token that answers begin behind"
        )
    return (start, *_ids(_first(config.forced_bos_token_id, text_config.get("forced_bos_token_id"))))


def _read(source: Source) -> Any:
    """transformers' GenerationConfig: of its own file, else of what config.json says at its top."""
    from transformers import GenerationConfig

    own = (source.folder / FILE).is_file()
    options: dict[str, Any] = {} if own else {"config_file_name": "config.json", "_from_model_config": True}
    try:
        with quiet_transformers():
            return GenerationConfig.from_pretrained(source.folder, **options)
    except (OSError, TypeError, ValueError) as e:
        name = FILE if own else "config.json"
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ConfigError(
            f"{source.folder / name}: the generation settings cannot be read ({reason})", f"correct {name}"
        ) from None


def _defaults(source: Source, config: Any) -> GenerationDefaults:
    """The settings that the runtime applies where a call does not say otherwise."""
    try:
        return GenerationDefaults(
            repetition_penalty=float(_first(config.repetition_penalty, 1.0)),
            no_repeat_ngram_size=int(_first(config.no_repeat_ngram_size, 0)),
            suppress_tokens=_ids(config.suppress_tokens),
            begin_suppress_tokens=_ids(config.begin_suppress_tokens),
            bad_words_ids=tuple(_ids(word) for word in _first(config.bad_words_ids, ())),
            min_new_tokens=int(_first(config.min_new_tokens, 0)),
            min_length=int(_first(config.min_length, 0)),
            max_new_tokens=_first(config.max_new_tokens, None),
            stop_strings=_strings(config.stop_strings),
            top_k=_first(config.top_k, None) if config.do_sample else None,
            top_p=_first(config.top_p, None) if config.do_sample else None,
            min_p=_first(config.min_p, None) if config.do_sample else None,
        )
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{source.folder / FILE}: a setting is of the wrong type ({e})", f"correct {FILE}") from None


def _tell_not_carried(source: Source, config: Any, encodes: bool) -> None:
    names = {**_NOT_CARRIED, **(_SAMPLING if config.do_sample else {})}
    if encodes:
        del names["forced_bos_token_id"]  # which the decoder begins with
    said = [
        f"{name} = {value!r}"
        for name, none in names.items()
        if (value := getattr(config, name, None)) not in (None, none)
    ]
    if said:
        source.notices.add(
            f"{source.folder / FILE}: {', '.join(said)} is applied by transformers and not by "
            "this runtime: answers may differ"
        )
    if config.do_sample:
        source.notices.add(
            f"{source.folder / FILE}: do_sample = True, temperature = {_first(config.temperature, 1.0)}: transformers "
            "draws its answers; this runtime takes the likeliest token unless it is given a temperature"
        )


def _tell_contradictions(source: Source, stops: tuple[int, ...], tokenizer: Any) -> None:
    stated = {
        FILE: _ids(source.json(FILE).get("eos_token_id")),
        "config.json": _ids(source.config.get("eos_token_id")),
    }
    if not (source.folder / FILE).is_file():  # beside it, text_config often holds a class's default
        stated["config.json text_config"] = _ids((source.config.get("text_config") or {}).get("eos_token_id"))
    others = [f"{name} ({_shown(ids)})" for name, ids in stated.items() if ids and not set(ids) <= set(stops)]
    if others:
        source.notices.add(
            f"{source.folder}: answers end at {_shown(stops)}, as transformers reads it; {' and '.join(others)} "
            "says otherwise"
        )
    end = tokenizer.eos_token_id
    if end is not None and end not in stops:
        source.notices.add(
            f"{source.folder}: the tokenizer's eos_token {tokenizer.eos_token!r} ({end}) is no stop id of {FILE} "
            f"({_shown(stops)}): answers do not end there, neither in transformers nor here"
        )


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(i) for i in (value if isinstance(value, (list, tuple)) else [value]))


def _strings(value: Any) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(str(v) for v in value)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _shown(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids)) or "no id"
