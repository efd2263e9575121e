"""One quantization in progress: recording, calibrating, choosing bits, writing, proving."""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mllm_edge.bundle import Bundle, file_entries, write_manifest
from mllm_edge.calibration.bits import fits, measured, told
from mllm_edge.calibration.calibrate import calibrate
from mllm_edge.calibration.collect import Feeds, is_recorded, mark_recorded, record
from mllm_edge.calibration.data import Sample
from mllm_edge.calibration.evaluate import Proof, prove
from mllm_edge.calibration.findings import Findings
from mllm_edge.calibration.half import KEY, keep_in_range
from mllm_edge.calibration.int8_cache import MINIMUM
from mllm_edge.calibration.linears import Layer, find_groups, find_layers
from mllm_edge.calibration.mixed import (
    Candidate,
    by_loss,
    by_size,
    eight_bits,
    ranked,
    weight_bytes,
)
from mllm_edge.calibration.recipes import Recipe, attention_of, is_quantized, part_of, precision_of
from mllm_edge.calibration.requantize import requantize
from mllm_edge.calibration.sensitivity import Unit, affordable, answered, measure
from mllm_edge.calibration.whole import Losses, against_rounding, of_rounding
from mllm_edge.errors import ExportError, OptionError
from mllm_edge.files import write_whole
from mllm_edge.graph.builder import save_model, tensor_specs
from mllm_edge.graph.datafile import DataFile
from mllm_edge.json_form import to_json
from mllm_edge.loss import WARN_KL, Loss, calibration_costs
from mllm_edge.progress import Progress
from mllm_edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeCpu
from mllm_edge.runtime.machine.cpu import give_back_memory, physical_cores
from mllm_edge.runtime.machine.threads import Threads
from mllm_edge.spec import Component, FileEntry, Manifest, Variant

__all__ = ["FIGURE", "Gate", "QuantizeJob", "layers_of"]

FIGURE = "accuracy.png"
_LEFT = 0.3  # of what rounding costs; seen: 0.2 to 0.4 with some dozens of samples


@dataclass(frozen=True)
class Gate:
    """What the proof must show: the mean KL divergence at most, the part of positions with the same likeliest token at
    least. None: no demand of one's own; a divergence of more than MAX_KL nats is not written unless that is allowed."""

    max_kl: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        """Raises OptionError for what no proof can show."""
        if self.max_kl is not None and not self.max_kl >= 0:
            raise OptionError(f"max_kl = {self.max_kl!r}", "a KL divergence in nats: 0 or more")
        if self.min_agreement is not None and not self.min_agreement >= 0:
            raise OptionError(f"min_agreement = {self.min_agreement!r}", "a part of the positions: 0 or more, to 1")

    def missed(self, proof: Proof) -> str:
        """What the proof does not show; empty when all is met."""
        missed = []
        if self.max_kl is not None and not proof.kl <= self.max_kl:
            missed.append(f"KL divergence {proof.kl:.3g} > {self.max_kl:g}")
        if self.min_agreement is not None and not proof.top1 >= self.min_agreement:
            missed.append(f"the likeliest token agrees in {proof.top1:.2%} < {self.min_agreement:.2%}")
        return "; ".join(missed)


class QuantizeJob:
    """One quantization in progress."""

    def __init__(
        self,
        source: Bundle,
        recipe: Recipe,
        samples: list[Sample],
        work: Path,
        threads: int | None,
        progress: Progress,
    ):
        self._source, self._recipe, self._base, self._samples = source, recipe, recipe, samples
        self.notices: tuple[str, ...] = ()  # what the user should know of the bits
        self._order: list[Candidate] = []
        self._loss_left, self._threads = 0.0, threads
        self._work, self._progress = work, progress
        target = next(iter(source.manifest.components.values())).variants[0].target
        # Asked for: of graphs with few weights, such as pieces of a decoder, a run of many tokens is long all the same.
        self._backend = OnnxRuntimeCpu(Threads.of(threads or physical_cores()), target)

    def choose_bits(self, gate: Gate) -> None:
        """Where plain rounding costs so much that calibration will not make up for it, or takes too much room, let
        those layers keep more bits that cost most. What was measured is kept for another attempt."""
        recipe, layers = self._recipe, layers_of(self._source, "decoder")
        if recipe.more_bits_above is None or not recipe.decoder.fewer_than_8:
            return
        kl = self._rounding(layers)
        accepted = recipe.more_bits_above if gate.max_kl is None else min(recipe.more_bits_above, gate.max_kl)
        if fits(recipe, layers) and (kl is None or _LEFT * kl <= accepted):
            return self._begin_with(recipe)
        asked, folder = (lambda count: answered(self._samples[:count])), self._work / "bits"
        most = accepted / _LEFT
        chosen = measured(self._source, self._backend, asked, recipe, layers, most, folder, self._counted)
        self._begin_with(chosen)
        self._recipe = self._base = chosen
        why = f"rounding to {recipe.decoder.bits} bits costs KL {kl:.2g}: " if kl is not None else ""
        self.notices = (f"{why}{told(chosen, layers)}",)
        self._progress.notice(*self.notices)

    def _rounding(self, layers: Sequence[Layer]) -> float | None:
        """What plain rounding of the decoder costs, in nats; None of models too large for that."""
        note = self._work / "rounding.json"
        kl = _kept_number(note)
        if kl is None:
            self._progress.stage("measuring what rounding costs")
            precision = partial(precision_of, self._recipe, "decoder")
            found = of_rounding(self._source, self._backend, self._samples, layers, precision, self._work / "rounding")
            kl = found and found[0]
            write_whole(note, json.dumps(kl))
        return kl

    def _counted(self, stage: str, units: int) -> Callable[[int], None]:
        self._progress.stage(stage, units)
        return self._progress.advance

    def calibrate(self) -> dict[str, Findings]:
        """What calibration finds for each component, or found before it was interrupted."""
        feeds, names = self._work / "feeds", self._source.manifest.components
        if not is_recorded(self._work / "recorded", feeds):
            for folder in (feeds, *(self._work / name for name in names)):
                shutil.rmtree(folder, ignore_errors=True)
            self._progress.stage("recording the samples", len(self._samples))
            record(self._source, self._backend, self._samples, feeds, self._progress.advance)
            mark_recorded(self._work / "recorded", feeds)
            give_back_memory()
        return {n: self._calibrate(n, Feeds(feeds / n)) for n in names}

    def against_rounding(self, findings: dict[str, Findings]) -> tuple[dict[str, Findings], Losses | None]:
        """See `whole.against_rounding`: the decoder is rounded where that does clearly better on samples held apart."""
        if "decoder" not in findings:
            return findings, None
        self._progress.stage("comparing with plain rounding")
        folder, layers = self._work / "against_rounding", layers_of(self._source, "decoder")
        feeds, found = Feeds(self._work / "feeds" / "decoder"), findings["decoder"]
        losses = against_rounding(self._source, self._backend, feeds, self._recipe, layers, found, folder)
        if losses is not None and calibration_costs(losses):
            findings = {**findings, "decoder": Findings(findings["decoder"].folder, ignored=True)}
        return findings, losses

    def raise_worst(self, findings: Mapping[str, Findings], gate: Gate) -> None:
        """Give a recipe's `raised` precision to the layers that cost most: as many as the gate seems to want or, where
        there is none, as the recipe's size allows."""
        if self._base.raised is None:
            return
        losses, measured = self._losses(findings)
        self._order = ranked(self._base, self._candidates(findings, losses))
        if gate == Gate():
            self._recipe = by_size(self._base, self._room(), self._order)
        else:
            most = gate.max_kl if measured and gate.max_kl is not None else math.inf
            self._recipe, self._loss_left = by_loss(self._base, most, self._order)

    def raise_more(self) -> bool:
        """Raise as many layers more as halve the loss that is left; False when there are none."""
        if not self._loss_left:
            return False
        self._recipe, self._loss_left = by_loss(self._base, self._loss_left / 2, self._order)
        return True

    def prove(self, folder: Path, findings: Mapping[str, Findings], kept: list[Sample]) -> tuple[Manifest, Proof]:
        """Write the bundle and compare it with the float one."""
        manifest = keep_in_range(folder, self.write(folder, findings), self._samples, self._progress)
        write_manifest(folder, manifest)
        give_back_memory()
        self._progress.stage("comparing with the float bundle", len(kept))
        return manifest, prove(self._source.path, folder, kept, self._threads, self._progress.advance)

    def loss(self, proof: Proof, kept: list[Sample]) -> Loss:
        """The proof in words for people; beside it, where they will notice, what 8 bits would cost."""
        eight = None
        if is_quantized(self._recipe) and not proof.kl < WARN_KL:
            self._progress.stage("measuring what 8 bits would cost")
            layers, folder = layers_of(self._source, "decoder"), self._work / "eight_bits"
            eight = of_rounding(self._source, self._backend, kept, layers, eight_bits, folder)
        return Loss(
            kl=proof.kl,
            agreement=proof.top1,
            positions=proof.positions,
            kl_8_bits=eight and eight[0],
            agreement_8_bits=eight and eight[1],
            question=proof.question,
            answer_before=proof.answer_before,
            answer_after=proof.answer_after,
        )

    def write(self, folder: Path, findings: Mapping[str, Findings]) -> Manifest:
        """Every file of the new bundle but the manifest, which is returned, still without the proof."""
        manifest = self._source.manifest
        rewritten = {v.file for c in manifest.components.values() for v in c.variants}
        for name in manifest.files:
            if name.removesuffix(".data") not in rewritten and not name.startswith("engines/") and name != FIGURE:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._source.listed(name), folder / name)
        hashes: dict[Path, FileEntry] = {}
        components = {
            name: Component(tuple(self._write(folder, name, v, findings[name], hashes) for v in component.variants))
            for name, component in manifest.components.items()
        }
        return replace(
            manifest,
            components=components,
            recipe={**to_json(self._recipe), **_carried(manifest)},
            files=file_entries(folder, hashes),
        )

    def errors(self, component: str, findings: Findings) -> dict[str, tuple[float, float]]:
        """Layer → (error, error of rounding to nearest) of the layers that kept the precision they were measured in."""
        role = self._source.manifest.model.role(component)
        precision = partial(precision_of, self._recipe, component, role=role)
        return {n: errors for n, errors in findings.errors().items() if precision(n) != self._recipe.raised}

    def _begin_with(self, recipe: Recipe) -> None:
        """Of an earlier attempt whose gate asked for other bits, the decoder's findings are of no use."""
        note, now = self._work / "bits.json", json.dumps(to_json(recipe))
        if note.is_file() and note.read_text(encoding="utf-8", errors="replace") == now:
            return
        shutil.rmtree(self._work / "decoder", ignore_errors=True)
        write_whole(note, now)

    def _calibrate(self, component: str, feeds: Feeds) -> Findings:
        variant = self._source.variant(component, self._backend.target)
        role = self._source.manifest.model.role(component)
        precision = partial(precision_of, self._recipe, component, role=role)
        folder, cache = self._work / component, component == "decoder" and self._recipe.kv == "int8"
        if not cache and not any(precision(layer.name).needs_data for layer in layers_of(self._source, component)):
            return Findings(folder / "layers")
        if not len(feeds):  # of images that no sample has
            return Findings(folder / "layers", ignored=True)
        path = self._source.listed(variant.file)
        begin = partial(self._progress.stage, f"calibrating the {component.replace('_', ' ')}")
        advance = self._progress.advance
        # Layers that are raised later would leave those behind them tuned to errors that are gone.
        sequential = self._recipe.raised is None
        return calibrate(path, variant, self._backend, feeds, precision, folder, begin, advance, cache, sequential)

    def _losses(self, findings: Mapping[str, Findings]) -> tuple[dict[str, float], bool]:
        """What rounding each unit alone costs, by its key; and whether that is a divergence in nats. Of a model too
        large to measure it is the squared relative errors of the layers' own outputs."""
        units = self._units(findings)
        count = affordable(len(units), sum(math.prod(layer.shape) for _, layer in self._all_layers()))
        if not count:
            errors = {name: found.errors() for name, found in findings.items()}
            return {u.key: sum(errors[u.component][layer][0] ** 2 for layer in u.layers) for u in units}, False

        def rounded(component: str, layer: str) -> np.ndarray:
            found = findings[component].layer(layer)
            weight = None if found is None else found.replaced()
            assert weight is not None
            return weight

        self._progress.stage("measuring what each layer costs", len(units))
        samples = [s for s in self._samples if s.images][:count] or self._samples[:count]
        folder = self._work / "sensitivity"
        asked = answered(samples)
        return measure(self._source, self._backend, asked, units, rounded, folder, self._progress.advance), True

    def _units(self, findings: Mapping[str, Findings]) -> list[Unit]:
        """The layers that calibration decided about; those with the same input together."""
        units = []
        for component, found in findings.items():
            decided = set(found.errors())
            for group in find_groups(layers_of(self._source, component)):
                names = tuple(layer.name for layer in group.layers if layer.name in decided)
                if names:
                    units.append(Unit(component, names))
        return units

    def _candidates(self, findings: Mapping[str, Findings], losses: Mapping[str, float]) -> list[Candidate]:
        shapes = {(component, layer.name): layer.shape for component, layer in self._all_layers()}
        found = []
        for unit in self._units(findings):
            layers = tuple((name, shapes[unit.component, name]) for name in unit.layers)
            role = self._source.manifest.model.role(unit.component)
            found.append(Candidate(unit.component, layers, losses[unit.key], role))
        return found

    def _all_layers(self) -> list[tuple[str, Layer]]:
        return [(name, layer) for name in self._source.manifest.components for layer in layers_of(self._source, name)]

    def _room(self) -> float:
        """Bytes that the linear layers may take, for the part of the half-precision size that the recipe allows. Of
        several targets the first one's size counts."""
        manifest = self._source.manifest
        graphs = {v.file for c in manifest.components.values() for v in c.variants}
        own = {c.variants[0].file for c in manifest.components.values()}
        counted = {n: e.nbytes for n, e in manifest.files.items() if n.removesuffix(".data") not in graphs - own}
        layers = self._all_layers()
        # Graphs, norms, embeddings and the tokenizer stay as they are.
        others = sum(counted.values()) - sum(layer.stored_bytes for _, layer in layers)
        half = sum(2 * math.prod(layer.shape) for _, layer in layers)
        role = manifest.model.role
        chosen = [(layer.shape, precision_of(self._recipe, name, layer.name, role(name))) for name, layer in layers]
        fixed = sum(weight_bytes(shape, precision) for shape, precision in chosen if not precision.needs_data)
        return self._recipe.size * (others + half) - others - fixed

    def _write(
        self, folder: Path, component: str, variant: Variant, findings: Findings, hashes: dict[Path, FileEntry]
    ) -> Variant:
        path = self._source.listed(variant.file)
        self._progress.stage(f"writing {path.stem}", self._source.manifest.files[variant.file].nbytes)
        model = ir.load(path)
        role = self._source.manifest.model.role(component)
        precision = partial(precision_of, self._recipe, component, role=role)
        attention = attention_of(self._recipe, role, variant.target)
        data = folder / f"{variant.file}.data"
        try:
            with DataFile(data, self._progress.advance) as sink:
                requantize(model, variant.dialect, precision, findings, sink, attention == "int8")
        except OverflowError as e:
            raise ExportError(f"recipe {self._recipe.name}: {e}", "export the float bundle with --recipe fp32") from e
        hashes[data] = sink.entry
        save_model(model, folder / variant.file)
        chosen = part_of(self._recipe, role)
        newer = variant.dialect == "contrib" and component == "decoder" and self._recipe.kv == "int8"
        return replace(
            variant,
            precision=f"int{chosen.bits}_blocks" if chosen.kind == "blocks" else chosen.kind,
            inputs=tensor_specs(model.graph.inputs),
            outputs=tensor_specs(model.graph.outputs),
            minimum={**variant.minimum, **MINIMUM} if newer else variant.minimum,
        )


def _carried(manifest: Manifest) -> dict[str, Any]:
    """What stays true of the float graphs after their layers are quantized."""
    return {KEY: manifest.recipe[KEY]} if KEY in manifest.recipe else {}


def _kept_number(note: Path) -> float | None:
    """What an earlier attempt measured; None where that cannot be read."""
    try:
        return float(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def layers_of(bundle: Bundle, component: str) -> list[Layer]:
    """The linear layers of a component's first graph."""
    variant = bundle.manifest.components[component].variants[0]
    return find_layers(ir.load(bundle.listed(variant.file)).graph)
