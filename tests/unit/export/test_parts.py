"""A right program passes part by part, whatever its layout and weights; no wrong part passes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from tests.unit.export.test_lower import CHUNK, LAYOUTS, quantized_decoder

from cloister.backend import KV
from cloister.bundle import Golden
from cloister.errors import ExportMismatch
from cloister.export import parts, write
from cloister.export.backends.cloister import program as own
from cloister.export.backends.xnnpack import program as xnnpack
from cloister.export.backends.xnnpack_graph import Subgraph
from cloister.export.constants import prove_constants
from cloister.export.instrument import instrument
from cloister.model import quantized, rope
from cloister.model.cache import KVCache
from cloister.model.config import Activation
from cloister.model.quantized import QuantizedLinear
from cloister.model.transformer import Decoder, RMSNorm
from cloister.progress import silent
from cloister.runtime import phone
from cloister.runtime.program import Operators, load, own_operators
from cloister_kernels import reference

pytestmark = pytest.mark.slow

Rounding = Callable[[torch.Tensor], torch.Tensor]
IDS = torch.randint(0, 97, (64,), generator=torch.Generator().manual_seed(3)).tolist()


@dataclass
class Exported:
    """A decoder, and what the parts of its program gave."""

    backend: str
    kv: KV
    decoder: Decoder
    path: Path
    program: Any  # as loaded, not instrumented
    runs: list[parts.Recording]
    calls: list[list[int]]

    def wrong(self, decoder: Decoder) -> set[str]:
        """Names of the parts in which the program is not `decoder`."""
        return {
            gap.part for gap in self.gaps(decoder) if not gap.size <= parts.BOUND}

    def gaps(self, decoder: Decoder) -> list[parts.Gap]:
        return [gap for run in self.runs for gap in self.gaps_in(run, decoder)]

    def gaps_in(self, run: parts.Recording, decoder: Decoder) -> list[parts.Gap]:
        return parts.gaps(decoder, run, self.calls, self.kv)

    def constants(self, decoder: Decoder) -> int:
        """Prove that the program holds the tensors of `decoder`."""
        return prove_constants(self.path, write.stored(
            self.backend, self.decoder, decoder.state_dict().__getitem__, None))


def export(
    decoder: Decoder, folder: Path, backend: str = "xnnpack", recipe: str = "8da4w-g32",
    kv: KV = KV.FLOAT32
) -> Exported:
    path, copied = folder / "program.pte", folder / "instrumented.pte"
    context = decoder.config.shape.context
    if backend == "xnnpack":
        with path.open("wb") as file:
            xnnpack(decoder, CHUNK, context, {}).write_to_file(file)
    else:
        assert isinstance(own_operators(), Operators)
        for module in decoder.modules():
            if isinstance(module, QuantizedLinear):
                module.rounded = reference.round_groups
        own(decoder, decoder.state_dict().__getitem__,
            {"forward": context, "score": CHUNK}, {}, path, kv, silent)
    calls = instrument(path, copied)
    shape = decoder.config.shape
    runs = parts.record(load(copied, shape.layers, first="score"), IDS, CHUNK, shape.context)
    program = load(path, shape.layers, first="score")
    return Exported(backend, kv, decoder, path, program, runs, calls)


@pytest.fixture(scope="module", params=[
    (*case, backend, kv)
    for backend, kv in (
        ("xnnpack", KV.FLOAT32), ("cloister", KV.FLOAT16), ("cloister", KV.INT8))
    for case in (
        *((layout, "8da4w-g32") for layout in LAYOUTS), ("llama", "8da4w-g128-e4"),
        ("llama", "8da8w"))
], ids="-".join)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    layout, recipe, backend, kv = request.param
    return export(quantized_decoder(LAYOUTS[layout], recipe), tmp_path_factory.mktemp(layout),
                  backend, recipe, kv)


class Fault(NamedTuple):
    """A way to make one layer of a decoder wrong."""

    kind: str
    place: str
    plant: Callable[[Decoder], None]


def nibbles(q: torch.Tensor) -> torch.Tensor:
    return q.view(*q.shape[:-1], -1, 2).flip(-1).reshape(q.shape)


def faults(decoder: Decoder, layer: int) -> Iterator[Fault]:
    """Yield every fault that the layer of `decoder` can have."""
    block = decoder.layers[layer]
    for name, module in block.named_modules():
        if isinstance(module, QuantizedLinear):
            changes = {"nibble order": all_nibbles, "nibble order of a group": one_group,
                       "scale of a group": one_scale}
            if module.bias is not None:
                changes["bias"] = no_bias
        elif isinstance(module, RMSNorm):
            changes = {"norm offset": other_offset, "norm weight": other_feature}
        else:
            continue
        for kind, change in changes.items():
            yield Fault(kind, name, functools.partial(altered, layer, name, change))
    if layer not in decoder.config.no_rope_layers:
        yield Fault("rotation", "base", functools.partial(other_rope, layer))
    yield Fault("rotation", "on or off", functools.partial(altered, layer, "attn", other_rotary))
    yield Fault("activation", "mlp", functools.partial(altered, layer, "mlp", other_activation))
    yield Fault("keys for values", "qkv", functools.partial(altered, layer, "attn.qkv", swapped))
    if layer in decoder.config.windowed_layers:
        yield Fault("window", "attn", functools.partial(no_window, layer))


def altered(layer: int, name: str, change: Callable[[Any], None], wrong: Any) -> None:
    change(wrong.layers[layer].get_submodule(name))


def all_nibbles(matrix: Any) -> None:
    matrix.weight.q = nibbles(matrix.weight.q)


def one_group(matrix: Any) -> None:
    matrix.weight.q[7, :32] = nibbles(matrix.weight.q[7, :32])


def one_scale(matrix: Any) -> None:
    matrix.weight.scale[7, -1] *= 1.25


def no_bias(matrix: Any) -> None:
    matrix.bias = torch.zeros_like(matrix.bias)


def other_offset(norm: Any) -> None:
    norm.offset = not norm.offset


def other_feature(norm: Any) -> None:
    norm.weight.data[5] += 0.2


def other_rotary(attention: Any) -> None:
    attention.rotary = not attention.rotary


def other_activation(mlp: Any) -> None:
    mlp.activation = (
        Activation.SILU if mlp.activation is Activation.GELU_TANH else Activation.GELU_TANH)


def swapped(projection: Any) -> None:
    projection.k, projection.v = projection.v, projection.k


def other_rope(layer: int, wrong: Any) -> None:
    right, config = wrong.cos_sin, wrong.config
    other = rope.table(
        config.shape.head_size, config.shape.context, 2 * config.rope_theta, None)
    wrong.cos_sin = lambda at, start, length: tuple(
        table.narrow(0, start, length) for table in other
    ) if at == layer else right(at, start, length)


def no_window(layer: int, wrong: Any) -> None:
    windowed = set(wrong.config.windowed_layers) - {layer}
    wrong.config = replace(wrong.config, windowed_layers=tuple(windowed))


def test_every_part_of_a_right_program_passes(exported: Exported) -> None:
    assert exported.wrong(exported.decoder) == set()
    found, config = exported.gaps(exported.decoder), exported.decoder.config
    parts_ = 6 if exported.backend == "xnnpack" else 8 + 2 * config.post_norms
    parts_ += 2 * (exported.kv is not KV.FLOAT32)  # the caches
    assert len({gap.part for gap in found}) == parts_ * config.shape.layers + 3
    assert parts.prove_parts(found).size == max(gap.size for gap in found)
    assert exported.constants(exported.decoder) > 100_000


def test_every_fault_of_every_layer_is_found_and_named(exported: Exported) -> None:
    """The decoder is altered and not the program: what they differ by is the same."""
    for layer in range(len(exported.decoder.layers)):
        for fault in faults(exported.decoder, layer):
            wrong = copy.deepcopy(exported.decoder)
            fault.plant(wrong)
            found = exported.wrong(wrong)
            assert found or "of a group" in fault.kind, (layer, fault)
            assert all(part.startswith(f"layers.{layer}.") for part in found), (fault, found)
            if fault.kind.startswith(("nibble", "scale", "bias", "norm weight")):
                with pytest.raises(ExportMismatch, match=f"Tensor layers.{layer}."):
                    exported.constants(wrong)


@pytest.mark.parametrize("fault", ["entry", "scale"])
def test_a_wrong_cache_is_found_and_named(exported: Exported, fault: str) -> None:
    size = exported.decoder.config.shape.head_size
    for run, name in [(each, name) for each in exported.runs for name in each.rounded]:
        wrong = run.rounded[name].clone()
        head = wrong[-1, 0]
        if exported.kv is KV.FLOAT16:
            head[1] *= 1.01
        elif fault == "entry":  # one that stays within int8
            place = int(head[:size].to(torch.int64).abs().argmin())
            head[place] += 2
        else:
            head[size:] = (head[size:].view(torch.float32) * 1.01).view(torch.int8)
        altered = replace(run, rounded={**run.rounded, name: wrong})
        found = {gap.part for gap in exported.gaps_in(altered, exported.decoder)
                 if not gap.size <= parts.BOUND}
        assert name in found
    assert bool(exported.runs[0].rounded) == (exported.kv is not KV.FLOAT32)


@pytest.mark.parametrize("fault", ["embedding", "norm", "head", "softcap"])
def test_faults_outside_the_layers_are_found_and_named(exported: Exported, fault: str) -> None:
    wrong: Any = copy.deepcopy(exported.decoder)
    if fault == "embedding":
        wrong.embed.weight.scale[IDS[0]] *= 1.01
    elif fault == "norm":
        wrong.norm.offset = not wrong.norm.offset
    elif fault == "head":
        wrong.head.weight.scale[3] *= 1.01
    else:
        cap = wrong.config.final_softcap
        wrong.config = replace(wrong.config, final_softcap=3.0 if cap is None else None)
    assert exported.wrong(wrong) == {
        "embedding": {"layers.0.input"}, "softcap": {"logits"}}.get(fault, {"head"})


def other_config(wrong: Any) -> None:
    wrong.config = replace(wrong.config, rope_theta=2 * wrong.config.rope_theta)


@pytest.mark.parametrize(("plant", "parts_"), [
    (functools.partial(altered, 1, "mlp.down", one_group), {"layers.1.mlp"}),
    (functools.partial(altered, 0, "mlp_norm", other_offset), {"layers.0.mlp"}),
    (other_config, {"layers.0.attn", "layers.1.attn"}),
], ids=["nibble order", "norm offset", "rotation"])
def test_a_fault_of_the_program_itself_is_found(
    plant: Callable[[Decoder], None], parts_: set[str], tmp_path: Path
) -> None:
    right = quantized_decoder(LAYOUTS["llama"], "8da4w-g32")
    wrong = copy.deepcopy(right)
    plant(wrong)
    assert export(wrong, tmp_path).wrong(right) == parts_


def in_another_order(
    x_MK: torch.Tensor, q_NK: torch.Tensor, scale_NC: torch.Tensor, bias_N: torch.Tensor | None,
    rounded: Rounding
) -> torch.Tensor:
    """Multiply like `linear_8da`, summed from the last input to the first."""
    x_MK, w_NK = rounded(x_MK), reference.dequantize(q_NK, scale_NC)
    return torch.nn.functional.linear(x_MK.flip(1), w_NK.flip(1), bias_N)


def in_double_precision(
    x_MK: torch.Tensor, q_NK: torch.Tensor, scale_NC: torch.Tensor, bias_N: torch.Tensor | None,
    rounded: Rounding
) -> torch.Tensor:
    x_MK, w_NK = rounded(x_MK), reference.dequantize(q_NK, scale_NC)
    out_MN = x_MK.double() @ w_NK.double().T
    return (out_MN if bias_N is None else out_MN + bias_N).float()


def of_jittered_inputs(
    x_MK: torch.Tensor, q_NK: torch.Tensor, scale_NC: torch.Tensor, bias_N: torch.Tensor | None,
    rounded: Rounding, seed: int = 0,
) -> torch.Tensor:
    """Multiply inputs off by up to one part in four million."""
    rng = torch.Generator().manual_seed(seed)
    x_MK = x_MK * (1 + 2.0**-22 * torch.empty_like(x_MK).uniform_(-1, 1, generator=rng))
    return reference.linear_8da(x_MK, q_NK, scale_NC, bias_N, rounded)


@pytest.mark.parametrize("other", [in_another_order, in_double_precision, of_jittered_inputs])
def test_another_rounding_is_no_fault(
    exported: Exported, other: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        dequantize = reference.dequantize
        linear_8da = other
        fake_quantize_rows = reference.fake_quantize_rows

    monkeypatch.setattr(quantized, "reference", Other)
    assert exported.wrong(exported.decoder) == set()


def test_the_instrumented_copy_computes_what_the_program_computes_to_the_bit(
    exported: Exported,
) -> None:
    again = parts.record(exported.program, IDS, CHUNK, exported.decoder.config.shape.context)
    parts.prove_same(again, exported.runs)
    outputs = again[1].outputs
    other = outputs[0].clone()
    other[0, -1, -1] = torch.nextafter(other[0, -1, -1], torch.tensor(torch.inf))
    with pytest.raises(ExportMismatch, match="not the program of the bundle"):
        parts.prove_same([again[0], replace(again[1], outputs=(other,))], exported.runs)


def test_the_method_that_answers_gives_the_last_row_of_the_one_that_was_proved(
    exported: Exported,
) -> None:
    run = exported.runs[1]
    parts.prove_forward(exported.program.forward, run)
    with pytest.raises(ExportMismatch, match="two methods"):
        parts.prove_forward(lambda *call: exported.program.forward(*call).roll(1, -1), run)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_no_number_is_no_agreement(exported: Exported, value: float) -> None:
    for place in range(len(exported.runs[1].outputs)):
        outputs = list(exported.runs[1].outputs)
        outputs[place] = outputs[place].clone()
        outputs[place][0, 0, 0] = value
        gaps = exported.gaps_in(
            replace(exported.runs[1], outputs=tuple(outputs)), exported.decoder)
        with pytest.raises(ExportMismatch, match="Part "):
            parts.prove_parts(gaps)


def golden(exported: Exported) -> list[Golden]:
    """What the program itself answers, in calls of all sizes."""
    ids, first = list(IDS[:21]), 21
    program = load(exported.path, exported.decoder.config.shape.layers)
    logits_V = program.forward(torch.tensor([ids]), 0)
    tokens = [int(logits_V.argmax())]
    for start in range(first, first + 6):
        logits_V = program.forward(torch.tensor([tokens[-1:]]), start)
        tokens.append(int(logits_V.argmax()))
    return [Golden(prompt=tuple(ids), tokens=tuple(tokens), margin=0.1)]


def test_forward_reads_in_one_call_what_score_reads_in_several(exported: Exported) -> None:
    ids_T = torch.tensor([IDS[:40]])
    config = exported.decoder.config
    program = load(exported.path, config.shape.layers)
    with torch.no_grad():
        expected_V = exported.decoder(ids_T, KVCache(config))[0, -1]
    got_V = program.forward(ids_T, 0)[0]
    assert float((got_V - expected_V).norm() / expected_V.norm()) < 0.02


def test_it_runs_as_on_phones_whose_weights_cache_frees_what_it_packed(exported: Exported) -> None:
    if exported.backend != "xnnpack":
        return
    layers, rows = exported.decoder.config.shape.layers, golden(exported)
    assert phone.complaint(exported.path, layers, rows, CHUNK) is None


def test_a_constant_that_is_read_in_place_is_found_out_by_the_weights_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all exports were before."""
    exported = export(quantized_decoder(LAYOUTS["llama"], "8da4w-g32"), tmp_path)
    layers, rows = exported.decoder.config.shape.layers, golden(exported)
    other = [msgspec.structs.replace(rows[0], tokens=tuple(id_ ^ 1 for id_ in rows[0].tokens))]
    assert "1 of 1" in str(phone.complaint(exported.path, layers, other, CHUNK))
    monkeypatch.setattr(Subgraph, "argument", Subgraph.constant)
    with exported.path.open("wb") as file:
        xnnpack(exported.decoder, CHUNK, CHUNK, {}).write_to_file(file)
    assert phone.complaint(exported.path, layers, rows, CHUNK)
