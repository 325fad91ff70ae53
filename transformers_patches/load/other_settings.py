"""Other settings for a loaded model, where all its neurons are in memory: no weight is read again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from transformers_patches.errors import PartInferError
from transformers_patches.load.ffn_swap import selection_for
from transformers_patches.load.input_swap import set_layer_choices
from transformers_patches.load.loaded_model import LoadedModel
from transformers_patches.neurons.byte_ladder import ByteLadder, LayerChoice
from transformers_patches.neurons.loss_curve import LossCurve
from transformers_patches.plan.block_bytes import predicted_share
from transformers_patches.plan.load_plan import LayerPlan
from transformers_patches.plan.resolve import RunFiles
from transformers_patches.plan.run import ResolvedRun, resolve_run
from transformers_patches.sparse.prompt_selection import PromptSelection
from transformers_patches.sparse.selection import Selection

MOST_KEPT = 8  # settings whose selections are kept


@dataclass(frozen=True)
class Setting:
    """What one answer asks for; without either, what the model was loaded with."""

    max_loss: float | None = None  # nats per token
    dense: bool = False  # compute every neuron

    def __post_init__(self) -> None:
        if self.dense and self.max_loss is not None:
            raise PartInferError("max_loss belongs to method partinfer, got method dense: leave one of them out")


@dataclass
class _Prepared:
    run: ResolvedRun
    selections: list[Selection]  # in the order of the sparse layers
    choices: list[LayerChoice] | None = None  # of layers stored by input; the selections then stay


class OtherSettings:
    """Switches a loaded model between a bound on the loss and another, and to dense and back.

    The answers are those of a model loaded with the other bound: where that would store its neurons in another order,
    or would load other ones, it is refused. Dense answers equal those of `--method dense` up to the order of sums.
    """

    def __init__(self, loaded: LoadedModel, files: RunFiles) -> None:
        """files: those that the model was loaded with."""
        self.loaded, self.files = loaded, files
        selections = [layer.selection for layer in loaded.state.layers]
        self._own = _Prepared(loaded.run, selections, loaded.run.layer_choices)
        self._now, self._kept = self._own, {}

    def use(self, setting: Setting) -> object:
        """Switch to a setting. Returns what tells it from others: equal for settings that compute the same.

        Raises PartInferError for a setting that would need other weights.
        """
        key, prepared = self._prepared(setting)
        if prepared is not self._now:
            if prepared.choices is not None:
                set_layer_choices(self.loaded, prepared.choices)
            for layer, selection in zip(self.loaded.state.layers, prepared.selections, strict=True):
                layer.select_by(selection)
            self.loaded.state.reset()
            self.loaded.run, self._now = prepared.run, prepared
        return key

    def check(self, setting: Setting) -> None:
        """Raise PartInferError for a setting that would need other weights. Changes nothing."""
        if setting.dense and (error := self._whole_error()) is not None:
            raise error
        if setting.max_loss is not None:
            self._check_bounded()

    def described(self) -> dict:
        """What the model was loaded with, and what answers may ask for instead."""
        own = self._own.run
        return {
            "method": own.settings.method,
            "max_loss": own.settings.max_loss,
            "sparsity": own.settings.sparsity,
            "predicted_loss": own.predicted_loss,
            "bounds": self.bounds,
            "dense": self._whole_error() is None,
        }

    @cached_property
    def bounds(self) -> list[dict[str, float]]:
        """What each bound on the loss would read; empty if it can't change.

        `max_loss`; `sparsity`, the share of the bytes that is read; `of`, whose bytes these are: "ffn" or "layers";
        `predicted_loss`.
        """
        fixed = self._own.run.settings.max_loss is None and self._ladder is None
        if fixed or self.loaded.state.experts or (self._ladder is None and self._curve is None):
            return []
        found = {}
        for bound in (0.0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5):
            share = self._share(bound)
            of, loss = (
                ("layers", predicted_share(share, self._ladder)) if self._ladder else ("ffn", self._predict(share))
            )
            found[share] = {"max_loss": bound, "sparsity": share, "of": of, "predicted_loss": loss}
        return list(found.values())

    @cached_property
    def _ladder(self) -> ByteLadder | None:
        """What a model whose layers are stored by input goes by."""
        return None if self._own.choices is None else self.files.base(self._own.run.settings).ladder

    @cached_property
    def _curve(self) -> LossCurve | None:
        """What the others go by."""
        base = self.files.base(self._own.run.settings)
        return None if base is None else base.loss

    def _share(self, max_loss: float) -> float:
        return self._curve.sparsity_for(max_loss) if self._ladder is None else self._ladder.bytes_for(max_loss)

    def _predict(self, sparsity: float) -> float | None:
        return self._curve.predict("up", "all", 1.0, sparsity)

    def _prepared(self, setting: Setting) -> tuple[object, _Prepared]:
        self.check(setting)
        own = self._own.run.settings
        if setting == Setting() or setting.dense and own.method == "dense":
            return "own", self._own
        if setting.dense:
            return "dense", self._kept.get("dense") or self._keep("dense", self._dense())
        sparsity = self._share(setting.max_loss)
        if own.max_loss is not None and sparsity == own.sparsity:
            return "own", self._own
        return sparsity, self._kept.get(sparsity) or self._keep(sparsity, self._bounded(setting.max_loss))

    def _keep(self, key: object, prepared: _Prepared) -> _Prepared:
        self._kept[key] = prepared
        if len(self._kept) > MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        return prepared

    def _whole_error(self) -> PartInferError | None:
        """Why answers can't be dense; None if they can."""
        run = self._own.run
        if self.loaded.state.experts:
            return PartInferError("sparse experts are computed as the server was started: leave method out")
        if run.plan.loaded_fraction == 1 and run.settings.compensation != "refit":
            return None
        return PartInferError(
            f"method dense needs every neuron, but {run.plan.loaded_fraction:.0%} are loaded: start the server with "
            "--max_loss, or with --loaded_neurons_percent 1"
        )

    def _check_bounded(self) -> None:
        if not self.bounds:
            raise PartInferError(
                "max_loss can't be changed for this model: start the server with --max_loss, which loads every neuron "
                "and needs a neuron file with a loss curve"
            )

    def _by_choices(self, run: ResolvedRun, share: float) -> _Prepared:
        """For layers stored by input: another share of their bytes."""
        choices = [self._ladder.layer(share, number) for number in range(len(self._own.choices))]
        return _Prepared(run, self._own.selections, choices)

    def _dense(self) -> _Prepared:
        run, selections = self._own.run, []
        if self._own.choices is not None:
            settings = replace(run.settings, method="dense", use_partial_loading=False, max_loss=None, block_bytes=None)
            return self._by_choices(replace(run, settings=settings, predicted_loss=0.0), 1.0)
        for number, layer in zip(run.plan.layers, self.loaded.state.layers, strict=True):
            plan, prior = run.plan.layers[number], layer.selection.prior
            whole = LayerPlan(plan.neurons, plan.loaded_count, plan.loaded_count, plan.priority)
            selections.append(PromptSelection(layer.rows, whole, prior, "core", token_sparsity=0.0))
        # still the loaded model's plan: which neurons are stored has not changed
        settings = replace(run.settings, method="dense", use_partial_loading=False, max_loss=None)
        return _Prepared(replace(run, settings=settings, predicted_loss=0.0), selections)

    def _bounded(self, max_loss: float) -> _Prepared:
        own = self._own.run
        if self._own.choices is not None:
            share = self._share(max_loss)
            settings = replace(own.settings, max_loss=max_loss, sparsity=share, block_bytes=share)
            return self._by_choices(
                replace(own, settings=settings, predicted_loss=predicted_share(share, self._ladder)), share
            )
        run = resolve_run(replace(own.settings, max_loss=max_loss), own.config, self.files)
        same = [run.plan.layers[number].neurons.equal(plan.neurons) for number, plan in own.plan.layers.items()]
        if not all(same) or run.plan.layers.keys() != own.plan.layers.keys():
            raise PartInferError(
                f"max_loss {max_loss:g} stores neurons in another order than the server's --max_loss "
                f"{own.settings.max_loss:g}: start another server for it"
            )
        selections = [
            selection_for(run, number, layer.rows, layer.selection.prior)
            for number, layer in zip(run.plan.layers, self.loaded.state.layers, strict=True)
        ]
        return _Prepared(run.without_files(), selections)
