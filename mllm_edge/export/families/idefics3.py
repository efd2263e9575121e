"""SmolVLM and Idefics3: SigLIP tower, pixel-shuffle connector, Llama decoder, images as tiles.

The image processor resizes to a longest edge, stretches to whole tiles and cuts them, row by row, with the whole image
as the last tile; in the prompt each tile is announced by its row and column. Without splitting an image is one tile.
"""

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.chat import chat_template
from mllm_edge.export.checkpoint.config import ConfigReader, load_config, model_readers
from mllm_edge.export.checkpoint.image_settings import resample_name, value_transforms
from mllm_edge.export.checkpoint.processing import (
    processor_class,
    read_image_processor,
    read_processor,
    read_tokenizer,
)
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.texts import read_texts
from mllm_edge.export.checkpoint.vocabulary import check_vocabulary
from mllm_edge.export.decoders.llama import llama_spec
from mllm_edge.export.plan import Plan, TracedComponent
from mllm_edge.spec import (
    EmbeddingSpec,
    ImagePrompt,
    ImageSpec,
    ModelSpec,
    Resize,
    ResizeLongestEdge,
    ResizeToMultiple,
    SplitTiles,
    TensorSpec,
    Transform,
)

__all__ = ["MODEL_TYPES", "SUMMARY", "image_features", "load_processor", "plan"]

MODEL_TYPES = ("idefics3", "smolvlm")
SUMMARY = {
    "decoders": ["llama"],
    "examples": ["HuggingFaceTB/SmolVLM-256M-Instruct", "HuggingFaceM4/Idefics3-8B-Llama3"],
}

_TEXT, _VISION, _CONNECTOR = "model.text_model", "model.vision_model.", "model.connector."
_POSITIONS = f"{_VISION}embeddings.position_embedding.weight"
_SIDE_LIMIT = 4096  # px; the processor's absolute maximum
_PROCESSORS = ("Idefics3ImageProcessor", "SmolVLMImageProcessor")
_CLASS = {"idefics3": "Idefics3Processor", "smolvlm": "SmolVLMProcessor"}
_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{{ 'Assistant:' if add_generation_prompt else '' }}"
)


def plan(source: Source, weights: Weights) -> Plan:
    """Understand the checkpoint; raises ConfigError, WeightsError or SourceError that names what does not fit."""
    config = load_config(source)
    top, text, vision = _readers(source, config)
    image_token_id, scale = top.take("image_token_id"), top.take("scale_factor")
    decoder = llama_spec(text, weights, _TEXT, tied=bool(top.take("tie_word_embeddings", False)))
    context = text.take("max_position_embeddings")
    processor = load_processor(source)
    tower = _tower(vision, _longest_edge(processor.image_processor, "max_image_size"))
    for reader in (top, text, vision):
        reader.finish()
    tokens = _tokens_per_tile(processor, tower.patches, scale)
    image = _image_spec(processor, tower, tokens, image_token_id)
    check_vocabulary(source, {image.prompt.token: image_token_id}, (), decoder.vocab_size)
    model = ModelSpec(
        family="smolvlm" if source.model_type == "smolvlm" else "idefics3",
        model_type=source.model_type,
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        context_length=context,
        parameters=weights.parameters,
        embedding=EmbeddingSpec("embed_tokens.npy", rows=weights.shape(f"{_TEXT}.embed_tokens.weight")[0]),
        positions=decoder.position_spec(),
        cache=decoder.cache_spec(),
        image=image,
    )
    return Plan(
        model=model,
        decoder=decoder,
        traced=_traced(tower, scale, tokens, decoder.hidden_size, weights),
        embedding=f"{_TEXT}.embed_tokens.weight",
        texts=read_texts(source, processor, config.text_config.to_dict()),
        ignored=tuple(n for n in weights if n.endswith("rotary_emb.inv_freq")),
    )


def load_processor(source: Source) -> Any:
    """What transformers loads from the folder: Idefics3Processor or SmolVLMProcessor, for images and text."""
    from transformers import Idefics3Processor
    from transformers.models.smolvlm import processing_smolvlm

    classes = {cls.__name__: cls for cls in (Idefics3Processor, processing_smolvlm.SmolVLMProcessor)}
    chosen = classes[processor_class(source, _CLASS[source.model_type], classes)]
    image_processor, tokenizer = read_image_processor(source, _PROCESSORS), read_tokenizer(source)
    vision = source.config.get("vision_config") or {}
    patches = image_processor.max_image_size["longest_edge"] // (vision.get("patch_size") or 32)
    tokens = (patches // (source.config.get("scale_factor") or 2)) ** 2
    # The package num2words, which spells the number of a video's frames, is asked for even where there is no video.
    with patch.object(processing_smolvlm, "num2words", processing_smolvlm.num2words or str):
        processor = read_processor(source, chosen, image_processor, tokenizer, image_seq_len=tokens)
    processor.chat_template = chat_template(source, _TEMPLATE, tokenizer)
    return processor


def image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The reference's tensors behind `vision_hidden` [tiles, patches, D] and `image_features` [tokens, H]."""
    import torch

    found = model.model.get_image_features(inputs["pixel_values"], inputs["pixel_attention_mask"], return_dict=True)
    return found.last_hidden_state, torch.cat(list(found.pooler_output))


def _readers(source: Source, config: Any) -> tuple[ConfigReader, ConfigReader, ConfigReader]:
    where = str(source.folder / "config.json")
    if config.text_config.model_type != "llama":
        raise ConfigError(
            f"{where}: text_config.model_type = {config.text_config.model_type!r}",
            "this family is exported with a llama decoder",
        )
    readers = model_readers(source, config)
    # Values that older remote code knew and the reference ignores: they must not promise another model.
    raw = source.config.get("text_config") or {}
    for key in ("qk_layer_norms", "use_resampler", "rope_interleaved"):
        if raw.get(key):
            raise ConfigError(f"{where} text_config: {key} = {raw[key]!r} is not supported", "only false is supported")
    return readers


def _tower(vision: ConfigReader, tile: int) -> Any:
    from mllm_edge.export.vision.siglip import SiglipConfig

    sizes = {key: vision.take(key) for key in ("image_size", "patch_size")}
    for key, value in sizes.items():
        if not isinstance(value, int):
            raise ConfigError(f"vision_config: {key} = {value!r}", "only square images and patches are supported")
    patch = sizes["patch_size"]
    if tile % patch:
        raise ConfigError(
            f"the image processor makes tiles of {tile} px, no multiple of the vision tower's patch of {patch}",
            "use the preprocessor_config.json that belongs to this model",
        )
    hidden, heads = vision.take("hidden_size"), vision.take("num_attention_heads")
    if hidden % heads:
        raise ConfigError(
            f"vision_config: hidden_size {hidden} is no multiple of num_attention_heads {heads}",
            "use the config.json that belongs to these weights",
        )
    return SiglipConfig(
        hidden_size=hidden,
        intermediate_size=vision.take("intermediate_size"),
        layers=vision.take("num_hidden_layers"),
        heads=heads,
        channels=vision.require("num_channels", 3),
        patch=patch,
        tile=tile,
        grid=sizes["image_size"] // patch,
        norm_eps=vision.take("layer_norm_eps"),
        activation=vision.require("hidden_act", "gelu_pytorch_tanh", "gelu"),
    )


def _traced(
    tower: Any, scale: int, tokens: int, text_hidden: int, weights: Weights
) -> tuple[TracedComponent, TracedComponent]:
    from mllm_edge.export.vision.siglip import PixelShuffleConnector, SiglipTower, position_ids

    hidden = TensorSpec("vision_hidden", "float32", ("tiles", tower.patches**2, tower.hidden_size))
    pixels = TensorSpec("pixel_values", "float32", ("tiles", tower.channels, tower.tile, tower.tile))
    features = TensorSpec("image_features", "float32", ("tiles", tokens, text_hidden))
    table = weights.use(_POSITIONS, (tower.grid**2, tower.hidden_size))
    ids = position_ids(tower.patches, tower.grid)
    encoder = TracedComponent(
        "vision_encoder",
        lambda: SiglipTower(tower),
        (pixels,),
        (hidden,),
        _VISION,
        {"embeddings.positions": lambda: table()[ids]},
    )
    connector = TracedComponent(
        "connector",
        lambda: PixelShuffleConnector(tower.patches, scale, tower.hidden_size, text_hidden),
        (hidden,),
        (features,),
        _CONNECTOR,
    )
    return encoder, connector


def _longest_edge(settings: Any, key: str) -> int:
    value = dict(getattr(settings, key) or {})
    if not isinstance(value.get("longest_edge"), int) or value["longest_edge"] <= 0:
        raise ConfigError(f"preprocessor_config.json: {key} = {value!r}", 'expected {"longest_edge": pixels}')
    return value["longest_edge"]


def _tokens_per_tile(processor: Any, patches: int, scale: int) -> int:
    if patches % scale:
        raise ConfigError(
            f"scale_factor {scale} does not divide the {patches} patches of a tile's side",
            "use the config.json that belongs to these weights",
        )
    tokens = (patches // scale) ** 2
    if processor.image_seq_len != tokens:
        raise ConfigError(
            f"processor_config.json: image_seq_len = {processor.image_seq_len}, but the model makes {tokens} tokens of "
            "a tile",
            "use the processor files that belong to this model",
        )
    return tokens


def _image_spec(processor: Any, tower: Any, tokens: int, token_id: int) -> ImageSpec:
    settings = processor.image_processor
    if not settings.do_convert_rgb:
        raise ConfigError("preprocessor_config.json: do_convert_rgb = False", "only true is supported")
    resample = resample_name(settings.resample)
    transforms: list[Transform] = []
    if settings.do_resize:
        transforms.append(ResizeLongestEdge(_longest_edge(settings, "size"), resample, _SIDE_LIMIT))
    if settings.do_image_splitting:
        transforms += [ResizeToMultiple(tower.tile, resample), SplitTiles(tower.tile, resample)]
    else:
        transforms.append(Resize(tower.tile, tower.tile, resample))
    transforms += value_transforms(settings)
    # Words that are not in the vocabulary are text like any other, as in the first Idefics3.
    fake = processor.fake_image_token
    whole = getattr(processor, "global_image_tag", None) or processor.global_image_token
    prompt = ImagePrompt(
        token=processor.image_token,
        token_id=token_id,
        tokens_per_tile=tokens,
        single=f"{fake}{whole}{{image}}{fake}",
        tile=f"{fake}<row_{{row}}_col_{{col}}>{{image}}",
        row_end="\n",
        overview=f"\n{fake}{whole}{{image}}{fake}",
        reserved=tuple(filter(None, [getattr(processor, "video_token", None)])),
    )
    return ImageSpec(tuple(transforms), prompt, tower.tile, tower.tile, tower.channels)
