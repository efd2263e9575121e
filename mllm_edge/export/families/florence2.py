"""Florence-2: a DaViT tower, its projection, and a BART that reads image and question and writes the answer.

A question may be a task, such as "<OD>" or "<CAPTION>": the chat template writes the words that transformers' processor
has for it. Places in the image, "<loc_0>" to "<loc_999>", are text of answers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mllm_edge.errors import ConfigError
from mllm_edge.export.checkpoint.image_settings import made_size, single_transforms
from mllm_edge.export.checkpoint.processor import load_processor, require_tokens
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.checkpoint.texts import Texts, read_texts
from mllm_edge.export.family import Checkpoint, Family, Parts
from mllm_edge.export.plan import tile_components
from mllm_edge.spec import ImagePrompt, ImageSpec, Transform

__all__ = ["FAMILY"]

_VISION, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
# A processor's words for tasks, alone and with an input, then how a question with images is written.
_TEMPLATE = (
    "{%- set alone = ALONE -%}{%- set about = ABOUT -%}"
    "{%- if messages | length != 1 -%}{{ raise_exception('this model takes one message') }}{%- endif -%}"
    "{%- set asked = namespace(images='', text='') -%}"
    "{%- if messages[0]['content'] is string -%}{%- set asked.text = messages[0]['content'] -%}"
    "{%- else -%}{%- for part in messages[0]['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set asked.images = asked.images + 'IMAGE' -%}"
    "{%- else -%}{%- set asked.text = asked.text + part['text'] -%}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{%- for task, words in alone.items() -%}{%- if task in asked.text -%}{%- if asked.text != task -%}"
    "{{ raise_exception(task + ' has to be the whole question') }}"
    "{%- endif -%}{%- set asked.text = words -%}{%- endif -%}{%- endfor -%}"
    "{%- for task, words in about.items() -%}{%- if task in asked.text -%}"
    "{%- set asked.text = words | replace('{input}', asked.text | replace(task, '') | trim) -%}"
    "{%- endif -%}{%- endfor -%}"
    "{{- asked.images + bos_token + asked.text + eos_token if asked.images else asked.text -}}"
)


def _describe(checkpoint: Checkpoint) -> Parts:
    from mllm_edge.export.vision.davit import DavitConfig, DavitProjector, DavitTower, projector_derived

    source, hidden = checkpoint.source, checkpoint.decoder.hidden_size
    kind = checkpoint.config.text_config.model_type
    if kind != "bart":
        raise ConfigError(f"{source.folder / 'config.json'}: text_config.model_type = {kind!r}", "supported: bart")
    tower = DavitConfig.read(checkpoint.vision)
    if tower.outputs != hidden:
        raise ConfigError(
            f"{source.folder / 'config.json'}: projection_dim = {tower.outputs}, the text model's d_model is {hidden}",
            "use the config.json that belongs to these weights",
        )
    transforms = single_transforms(source, checkpoint.processor.image_processor)
    tile = _tile(source, transforms)
    side = tower.sides(tile)[-1]
    stated, tokens = checkpoint.processor.num_image_tokens, 1 + side**2
    require_tokens(source, f"image_seq_length = {stated}", stated, tokens)
    traced = tile_components(
        lambda: DavitTower(tower, tile),
        lambda: DavitProjector(tower.width, hidden, side**2),
        (tower.channels, tile, tile),
        (side**2, tower.width),
        (tokens, hidden),
        (_VISION, _PROJECTOR),
        {},
    )
    encoder, projector = traced
    derived = projector_derived(tower, side, checkpoint.weights, _PROJECTOR)
    prompt = ImagePrompt(checkpoint.processor.image_token, checkpoint.token_id, "{image}")
    image = ImageSpec(transforms, prompt, tile, tile, tokens)
    return Parts((encoder, replace(projector, derived=derived)), image)


def _tile(source: Source, transforms: Sequence[Transform]) -> int:
    """The side in px of the images that the processor makes, for which the tower is: it has no size of its own."""
    made = made_size(transforms)
    if made is None or made[0] != made[1]:
        shown = "images of any size" if made is None else f"images of {made[0]}×{made[1]} px"
        raise ConfigError(f"{source.folder}: the image processor makes {shown}", "only square images are supported")
    return made[0]


def _image_features(model: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    found = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    return found.last_hidden_state.flatten(2).transpose(1, 2), found.pooler_output.flatten(0, 1)


def _texts(checkpoint: Checkpoint) -> Texts:
    """Its processor adds no special tokens to a text. Those without a name, such as places, belong to answers."""
    import tokenizers

    texts = read_texts(checkpoint.source, checkpoint.processor, checkpoint.config.text_config.to_dict())
    named = {*texts.generation.special_tokens.values(), checkpoint.processor.image_token}
    state = json.loads(texts.tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["special"] and token["content"] in named
    return replace(
        texts,
        tokenizer=tokenizers.Tokenizer.from_str(json.dumps(state)),
        generation=replace(texts.generation, add_special_tokens=False),
    )


# ---------------------------------------------------------------- the reference
def _load_processor(source: Source) -> Any:
    """transformers' own; a text that the template has rendered, it leaves as it is."""
    from transformers import Florence2Processor, ProcessorMixin

    base: Any = Florence2Processor

    class Rendered(base):
        def prepare_inputs_layout(self, images: Any = None, text: Any = None, **options: Any) -> Any:
            texts = [text] if isinstance(text, str) else text
            if texts and all(part.startswith(self.image_token) for part in texts):
                return ProcessorMixin.prepare_inputs_layout(self, images=images, text=text, **options)
            return super().prepare_inputs_layout(images=images, text=text, **options)

    processor = load_processor(source, "Florence2Processor", ("CLIPImageProcessor",), "", cls=Rendered)
    words = {"ALONE": processor.task_prompts_without_inputs, "ABOUT": processor.task_prompts_with_input}
    template = _TEMPLATE.replace("IMAGE", processor.image_token)
    for name, tasks in words.items():
        template = template.replace(name, json.dumps(tasks))
    processor.chat_template = template  # transformers' processor renders tasks whatever template there is
    return processor


FAMILY = Family(
    name="florence2",
    model_types=("florence2",),
    decoders=("bart",),
    examples=("florence-community/Florence-2-base",),
    describe=_describe,
    load_processor=_load_processor,
    image_features=_image_features,
    texts=_texts,
)
