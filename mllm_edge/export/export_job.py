"""One export in progress: building and writing the components, choosing bits, comparing with the source."""

import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from mllm_edge.bundle import CHAT_TEMPLATE, GENERATION, MANIFEST, TOKENIZER, Bundle, file_entries, write_manifest
from mllm_edge.calibration.bits import check_bits, fits, measured, told
from mllm_edge.calibration.half import KEY, keep_in_range
from mllm_edge.calibration.linears import find_layers
from mllm_edge.calibration.recipes import Recipe, attention_of, is_quantized, part_of, recipe
from mllm_edge.compare.cases import Case
from mllm_edge.errors import ExportError
from mllm_edge.export.checkpoint.casts import to_float16
from mllm_edge.export.checkpoint.files import local_path
from mllm_edge.export.checkpoint.safetensors import Weights
from mllm_edge.export.checkpoint.source import Source
from mllm_edge.export.decoders.build import build_cross_kv, build_decoder, build_text_encoder
from mllm_edge.export.judge import Allowance, asked, judged, loss_of
from mllm_edge.export.loss import turns_of
from mllm_edge.export.plan import Plan
from mllm_edge.export.source_model import Reference, Scope
from mllm_edge.export.targets import Form
from mllm_edge.export.trace import lower, trace
from mllm_edge.export.verify import verify
from mllm_edge.graph.builder import save_model, tensor_specs
from mllm_edge.graph.datafile import DataFile, DataSink, DryFile
from mllm_edge.graph.decoder_spec import DecoderSpec
from mllm_edge.graph.gate import check_cuda_graph
from mllm_edge.graph.precision import Precision
from mllm_edge.graph.ranges import TEXT_ENCODER as READING
from mllm_edge.graph.ranges import crossed_range, decoder_ranges
from mllm_edge.json_form import to_json
from mllm_edge.loss import Loss
from mllm_edge.progress import Progress
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.spec import (
    CROSS_KV,
    SCHEMA_VERSION,
    TEXT_ENCODER,
    Component,
    EmbeddingSpec,
    FileEntry,
    Manifest,
    ModelSpec,
    SymbolRange,
    Variant,
)

__all__ = ["ExportJob"]

_PROBE_LAYERS = 2
# Parameters of a model whose float32 graphs are written whole beside a quantized bundle.
_FLOAT_LIMIT = 500_000_000
_FIXED = "leave out --most-bits, or use mllm-edge quantize with questions of your own"
_EVENED = 0.5  # of what rounding costs, evened out columns and searched scales leave on trained decoders
_ROWS = 1024  # of the embeddings at a time


class ExportJob:
    """One export in progress."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        weights: Weights,
        chosen: Recipe,
        wanted: Sequence[Form],
        progress: Progress,
    ):
        self._source, self._plan, self._weights = source, plan, weights
        self._recipe, self._forms, self._progress = chosen, wanted, progress
        progress.stage("tracing the vision encoder and connector")
        self._traces: dict[tuple[str, ir.DataType], ir.Model] = {}
        self._trace(wanted)
        self._components = [*(stage.component for stage in plan.model.stages), "decoder"]
        first = next((i for i, layer in enumerate(plan.decoder.stack) if layer.has("cross_attention")), 0)
        self._probe_layers = max(_PROBE_LAYERS, first + 1)
        self._loaded: Reference | None = None
        self._losses: dict[str, Loss] = {}  # of the bundle as it is, by target
        self._hashes: dict[Path, FileEntry] = {}  # of the data files, which are hashed while they are written

    def plan_sizes(self) -> dict[str, int]:
        """Bytes of weights per component, computed without reading more than the small arrays of images; claims every
        weight on the way."""
        sizes = {}
        for form in self._forms:
            for name in self._components:
                sink = DryFile()
                self._build(name, form, sink, self._plan.decoder)
                sizes[form.stem(name)] = sink.nbytes
        embedding = self._plan.model.embedding
        shape = (embedding.rows, self._plan.model.hidden_size)
        self._weights.use(self._plan.embedding, shape)
        sizes["embed_tokens"] = int(np.prod(shape)) * 2
        for file, table in self._plan.tables.items():
            rows = self._weights.shape(table.tensor)
            self._weights.use(table.tensor, rows)
            sizes[Path(file).stem] = int(np.prod(rows)) * 4
        sizes |= {Path(name).stem: read().nbytes for name, read in self._plan.arrays.items()}
        return sizes

    def write(self, folder: Path) -> Manifest:
        """Every file of the bundle but the manifest, which is returned, still without results."""
        components = {
            name: Component(tuple(self._write_form(folder, name, form, self._plan.decoder) for form in self._forms))
            for name in self._components
        }
        model = self._write_embeddings(folder)
        for name, table in self._plan.tables.items():
            np.save(folder / name, self._weights.view(table.tensor)[table.skip :].astype(np.float32))
        for name, read in self._plan.arrays.items():
            np.save(folder / name, read().astype(np.float32))
        self._write_texts(folder)
        return Manifest(
            schema=SCHEMA_VERSION,
            model=model,
            components=components,
            recipe=to_json(self._recipe),
            parity={},
            accuracy={},
            provenance=_provenance(self._source),
            files=file_entries(folder, self._hashes),
        )

    def with_more_bits(self, folder: Path, manifest: Manifest, max_kl: float) -> Manifest:
        """Where the bundle in `folder` loses more than the recipe accepts, or than is allowed, the decoder is written
        again with more bits for the layers that cost most."""
        if self._recipe.more_bits_above is None:
            return manifest
        asked_for = self._recipe.limits_bits
        most = min(self._recipe.more_bits_above, max_kl)
        self._progress.stage("measuring the loss")
        write_manifest(folder, manifest)
        kl = self._largest_loss(folder, most)
        if kl is None or (kl <= most and not asked_for):
            if asked_for:
                raise ExportError("most_bits: what the decoder's layers cost cannot be measured", _FIXED)
            return manifest
        chosen, words = self._measured(folder, manifest, most, kl <= most)
        if chosen == self._recipe:
            return manifest
        self._losses.clear()
        self._recipe = chosen
        self._source.notices.add(f"{self._recipe.name} everywhere costs KL {kl:.2g}: {words}")
        (folder / MANIFEST).unlink()
        return keep_in_range(folder, self._rewritten(folder, manifest), progress=self._progress)

    def _measured(self, folder: Path, manifest: Manifest, most_loss: float, good: bool) -> tuple[Recipe, str]:
        """The recipe whose bits are spread by what the float decoder's parts cost, and that in words; the recipe as it
        is where it is `good` and small enough."""
        references, form = asked(self._reference(Scope(None)), folder), self._forms[0]
        with self._beside(folder, manifest, [form], recipe("fp32"), self._plan.decoder) as floats:
            bundle = Bundle.load(floats)
            layers = find_layers(ir.load(bundle.listed(bundle.variant("decoder", form.target).file)).graph)
            turns = partial(turns_of, references.texts)
            backend = OnnxRuntimeCpu(target=form.target)
            check_bits(self._recipe, layers)
            if good and fits(self._recipe, layers):
                return self._recipe, ""
            chosen = measured(
                bundle, backend, turns, self._recipe, layers, most_loss / _EVENED, floats / "parts", self._counted
            )
            return chosen, told(chosen, layers)

    def _counted(self, stage: str, units: int) -> Callable[[int], None]:
        self._progress.stage(stage, units)
        return self._progress.advance

    def _largest_loss(self, folder: Path, most: float) -> float | None:
        """Mean KL in nats of the target that loses most, or the first above `most`; None where it cannot be measured.
        What was measured is kept."""
        largest = None
        for form in self._forms:
            loss = loss_of(self._reference(Scope(None)), folder, form.target)
            if loss is None:
                return None
            self._losses[form.target] = loss
            largest = loss.kl if largest is None else max(largest, loss.kl)
            if not loss.kl <= most:
                return loss.kl
        return largest

    def _rewritten(self, folder: Path, manifest: Manifest) -> Manifest:
        """The decoder once more, as the recipe is now."""
        decoder = Component(tuple(self._write_form(folder, "decoder", f, self._plan.decoder) for f in self._forms))
        graphs = {variant.file for variant in decoder.variants}
        widened = {file: ops for file, ops in manifest.recipe.get(KEY, {}).items() if file not in graphs}
        return replace(
            manifest,
            components={**manifest.components, "decoder": decoder},
            recipe={**to_json(self._recipe), **({KEY: widened} if widened else {})},
            files=file_entries(folder, self._hashes),
        )

    def _reference(self, scope: Scope) -> Reference:
        """The source model, loaded once."""
        if self._loaded is None or self._loaded.scope != scope:
            self._loaded = Reference(self._source, scope)
        return self._loaded

    def verify(
        self, folder: Path, manifest: Manifest, whole: bool, cases: Sequence[Case], allowance: Allowance
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compare with the source model; a part of the decoder stands for it when the model is large. The errors and,
        of a quantized recipe, the loss: those of the first form, and under `targets` those of the others."""
        proof = self._prove(folder, manifest, whole, cases) if is_quantized(self._recipe) else {}
        self._progress.stage("comparing with the source model")
        if whole:
            write_manifest(folder, manifest)
            results, accuracy = self._verify(folder, Scope(None), cases, allowance)
        else:
            with self._beside(folder, manifest, self._forms, self._recipe, self._short()) as probe:
                results, accuracy = self._verify(probe, Scope(self._probe_layers), cases, allowance)
        return results | proof, accuracy

    def _prove(self, folder: Path, manifest: Manifest, whole: bool, cases: Sequence[Case]) -> dict[str, Any]:
        """Compare the graphs of the first form, written in float32, with the source: what their arithmetic is, apart
        from what rounding the weights costs. Of all but small models a part of the decoder, as float32 takes much room.
        """
        self._progress.stage("comparing the graphs in float32 with the source model")
        form, small = self._float_form(), self._is_proven_whole(whole)
        decoder, scope = (self._plan.decoder, Scope(None)) if small else (self._short(), Scope(self._probe_layers))
        floats = self._beside(folder, manifest, [form], recipe("fp32"), decoder, self._components)
        # A part of a source that is wanted whole, too, is not kept.
        reference = self._reference(scope) if small or not whole else Reference(self._source, scope)
        with floats as probe:
            (parity,) = verify(reference, probe, "fp32", [form.target], cases)
        return {"float32": to_json(parity)}

    def proof_bytes(self, whole: bool) -> int:
        """What the graphs that `verify` compares in float32 take on the disk for a while; 0 for a recipe of floats."""
        if not is_quantized(self._recipe):
            return 0
        form, sink = self._float_form(), DryFile()
        decoder = self._plan.decoder if self._is_proven_whole(whole) else self._short()
        for name in self._components:
            self._build(name, form, sink, decoder, recipe("fp32"))
        return sink.nbytes

    def _float_form(self) -> Form:
        """The first form in float32, and its traces."""
        first = self._forms[0]
        form = Form(first.target if first.target != "cuda" else "cpu", ir.DataType.FLOAT)
        self._trace([form])
        return form

    def _trace(self, wanted: Sequence[Form]) -> None:
        """What is not traced yet for these forms."""
        for component in self._plan.traced:
            for key in dict.fromkeys((component.name, self._float_type(component.name, form)) for form in wanted):
                if key not in self._traces:
                    self._traces[key] = trace(component, key[1])

    def _float_type(self, name: str, form: Form) -> ir.DataType:
        """Of a component that is traced: a choice stays in float32."""
        return ir.DataType.FLOAT if self._plan.model.role(name) == "choice" else form.float_type

    def _is_proven_whole(self, whole: bool) -> bool:
        return whole and self._plan.model.parameters <= _FLOAT_LIMIT

    def _short(self) -> DecoderSpec:
        """The first layers, one that looks at images among them where there is one, and the head."""
        return replace(self._plan.decoder, stack=self._plan.decoder.stack[: self._probe_layers])

    def _verify(
        self, folder: Path, scope: Scope, cases: Sequence[Case], allowance: Allowance
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        targets, reference = [form.target for form in self._forms], self._reference(scope)
        first, *others = verify(reference, folder, self._recipe.name, targets, cases)
        results: dict[str, Any] = to_json(first)
        if others:
            results["targets"] = {parity.target: to_json(parity) for parity in others}
        if not is_quantized(self._recipe):
            return results, {}
        self._progress.stage("measuring the loss")
        return results, judged(reference, folder, self._recipe, targets, allowance, self._losses)

    @contextmanager
    def _beside(
        self,
        folder: Path,
        manifest: Manifest,
        forms: Sequence[Form],
        chosen: Recipe,
        decoder: DecoderSpec,
        names: Sequence[str] = ("decoder",),
    ) -> Iterator[Path]:
        """Within, a bundle in `folder` beside the real one, with another decoder, or other forms of `names`; other
        files are links. Of a whole one in float32 the embeddings are not rounded either."""
        probe = folder / "probe"
        probe.mkdir()
        try:
            for file in folder.iterdir():
                if file.is_file() and file.name.partition(".")[0] not in names and file.name != MANIFEST:
                    (probe / file.name).hardlink_to(file)
            written = {
                name: Component(tuple(self._write_form(probe, name, form, decoder, chosen) for form in forms))
                for name in names
            }
            components, embedding = {**manifest.components, **written}, manifest.model.embedding
            if chosen.name == "fp32" and len(names) > 1 and not self._exact(embedding):
                (probe / embedding.file).unlink()
                embedding = self._write_embeddings(probe, chosen).embedding
            model = replace(manifest.model, state=decoder.state_specs(), embedding=embedding)
            files = file_entries(probe, self._hashes)
            write_manifest(probe, replace(manifest, model=model, components=components, files=files))
            yield probe
        finally:
            shutil.rmtree(probe)
            self._hashes = {path: entry for path, entry in self._hashes.items() if path.parent != probe}

    def _build(
        self, name: str, form: Form, sink: DataSink, decoder: DecoderSpec, chosen: Recipe | None = None
    ) -> ir.Model:
        if name == TEXT_ENCODER and decoder.encoder is not None:
            of = chosen or self._recipe
            return build_text_encoder(decoder.encoder, self._weights, of, sink, form.dialect, form.float_type)
        if name in ("decoder", CROSS_KV):
            build = build_decoder if name == "decoder" else build_cross_kv
            return build(decoder, self._weights, chosen or self._recipe, sink, form.dialect, form.float_type)
        component = next(c for c in self._plan.traced if c.name == name)
        precision, kind = self._precision(name, chosen), self._float_type(name, form)
        attention = attention_of(chosen or self._recipe, self._plan.model.role(name), form.target)
        trace, int8 = self._traces[name, kind], attention == "int8"
        model = lower(component, trace, self._weights, precision, sink, form.dialect, kind, int8)
        if form.target == "cuda" and kind != form.float_type:
            check_cuda_graph(model)  # that a kernel takes float32 alone is nowhere written down
        return model

    def _ranges(self, name: str, form: Form) -> Mapping[str, SymbolRange]:
        if name == TEXT_ENCODER:
            return READING
        if name in ("decoder", CROSS_KV):
            image = self._plan.model.image
            whole = image is not None and image.both_ways == "prompt"
            return decoder_ranges(form.kv_mode, crossed_range(image), whole)
        return next(c for c in self._plan.traced if c.name == name).all_ranges

    def _precision(self, name: str, chosen: Recipe | None = None) -> Precision:
        of = chosen or self._recipe
        return part_of(of, self._plan.model.role(name))

    def _write_form(
        self, folder: Path, name: str, form: Form, decoder: DecoderSpec, chosen: Recipe | None = None
    ) -> Variant:
        """Graph and weights of a component for one target, by another recipe where one is `chosen`."""
        dry, stem = DryFile(), form.stem(name)
        self._build(name, form, dry, decoder, chosen)
        again = "" if chosen is None or chosen == self._recipe else f" as {chosen.name}, for a while"
        self._progress.stage(f"writing {stem}{again}", dry.nbytes)
        try:
            with DataFile(folder / f"{stem}.onnx.data", self._progress.advance) as data:
                model = self._build(name, form, data, decoder, chosen)
        except OverflowError as e:
            raise ExportError(f"recipe {self._recipe.name}: {e}", "use --recipe fp32 or int8") from e
        self._hashes[data.path] = data.entry
        save_model(model, folder / f"{stem}.onnx")
        precision, inputs = self._precision(name, chosen), tensor_specs(model.graph.inputs)
        return Variant(
            target=form.target,
            dialect=form.dialect,
            precision=precision.kind if precision.kind != "blocks" else f"int{precision.bits}_blocks",
            file=f"{stem}.onnx",
            inputs=inputs,
            outputs=tensor_specs(model.graph.outputs),
            kv_mode=form.kv_mode if name == "decoder" else None,
            minimum=form.minimum(decoder if name == "decoder" else None),
            ranges=form.ranges(inputs, self._ranges(name, form)),
        )

    def _exact(self, embedding: EmbeddingSpec) -> bool:
        return embedding.dtype == "float32" or self._fits_half(self._plan.embedding, exactly=True)

    def _write_embeddings(self, folder: Path, chosen: Recipe | None = None) -> ModelSpec:
        """Half precision, unless the float32 recipe or a large value asks for all bits."""
        embedding, name = self._plan.model.embedding, self._plan.embedding
        shape = self._weights.shape(name)
        self._progress.stage("writing embeddings", shape[0])
        half = self._fits_half(name, exactly=(chosen or self._recipe).name == "fp32")
        dtype: Literal["float16", "float32"] = "float16" if half else "float32"
        # Written in pieces: a mapped file would count as memory of this process.
        with (folder / embedding.file).open("wb") as f:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(f, header)
            for rows in self._pieces(name):
                f.write((to_float16(rows) if half else rows).data)
                self._progress.advance(len(rows))
        return replace(self._plan.model, embedding=replace(embedding, dtype=dtype))

    def _fits_half(self, name: str, exactly: bool) -> bool:
        for rows in self._pieces(name):
            half = to_float16(rows)
            if not np.isfinite(half).all() or (exactly and not np.array_equal(half, rows)):
                return False
        return True

    def _pieces(self, name: str) -> Iterator[np.ndarray]:
        """The rows of a matrix in float32, some at a time."""
        rows = self._weights.shape(name)[0]
        for start in range(0, rows, _ROWS):
            yield self._weights.rows(name, start, min(start + _ROWS, rows))

    def _write_texts(self, folder: Path) -> None:
        texts = self._plan.texts
        for name, tokenizer in {TOKENIZER: texts.tokenizer, **texts.further}.items():
            tokenizer.save(str(folder / name))
        (folder / CHAT_TEMPLATE).write_text(texts.chat_template, encoding="utf-8")
        (folder / GENERATION).write_text(json.dumps(to_json(texts.generation), indent=1) + "\n", encoding="utf-8")


def _provenance(source: Source) -> dict[str, Any]:
    tools = {name: version(name) for name in ("onnx-ir", "onnxruntime", "torch", "transformers")}
    local = local_path(source.name).is_dir()
    return {
        "source": source.folder.resolve().name if local else source.name,
        "revision": source.revision,
        "adapters": [adapter.provenance() for adapter in source.adapters],
        "notices": list(source.notices),
        "tools": {"python": platform.python_version(), **tools},
    }
