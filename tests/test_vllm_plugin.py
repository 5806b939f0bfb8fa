"""The vLLM plugin over stand-ins for vLLM's classes: whatever vLLM fuses and cuts, the outputs are the linears' own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fake_vllm
from fake_vllm import LinearBase, ParallelLMHead, UnquantizedLinearMethod, VocabParallelEmbedding
from halfweight.serving.errors import InputError
from halfweight.serving.scheme import ArtifactConfig, LinearScheme, SelectionScheme
from halfweight.serving.storage import effective_weight, pack_weight
from halfweight.serving.vllm_plugin import register
from stored_linears import SCHEMES, SELECTED, TOPK, WIDE, K, N, integers, packed, random_codes, run, selected

BLOCK = "model.layers.0"
QKV = [f"{BLOCK}.self_attn.{part}_proj" for part in "qkv"]
DOWN = f"{BLOCK}.mlp.down_proj"
X = torch.randn(5, K, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_vllm.install(monkeypatch)


@pytest.fixture
def configure(registry: Any) -> Any:
    """A factory of plugin configs, made as vLLM makes them from config.json."""
    register()

    def make(linears: dict[str, LinearScheme], **settings: Any) -> Any:
        data = ArtifactConfig(linears=linears, **settings).to_json()
        config = registry.configs["halfweight"].from_config(data)
        config.packed_modules_mapping["qkv_proj"] = ["q_proj", "k_proj", "v_proj"]
        return config

    return make


def load(layer: nn.Module, tensors: dict[str, Tensor], *shard: Any) -> None:
    """As vLLM's loaders do: by parameter name, with the shard of a fused layer."""
    parameters = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].weight_loader(parameters[name], tensor, *shard)  # type: ignore[union-attr]


def dense(scheme: LinearScheme, tensors: dict[str, Tensor], rows: int = N) -> Tensor:
    return effective_weight(scheme, tensors, (rows, K), torch.float32)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_registration_is_idempotent(registry: Any) -> None:
    register()
    register()
    assert registry.QUANTIZATION_METHODS == ["halfweight"]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_fused_projections_give_each_parts_outputs(name: str, ranks: int, configure: Any) -> None:
    scheme, parts = SCHEMES[name], [packed(SCHEMES[name], seed) for seed in range(3)]
    outputs = []
    for rank in range(ranks):
        config = configure(dict.fromkeys(QKV, scheme))
        layer = LinearBase(rank, ranks, (N, N, N), K)
        method = config.get_quant_method(layer, f"{BLOCK}.self_attn.qkv_proj")
        layer.create(method, by_rows=False)
        for shard, tensors in zip("qkv", parts, strict=True):
            load(layer, tensors, shard)
        method.process_weights_after_loading(layer)
        assert not list(layer.parameters())
        assert len(layer.halfweight) == (1 if scheme.low_rank is None else 3)
        outputs.append(method.apply(layer, X).split(N // ranks, -1))
    for part, tensors in enumerate(parts):
        close(torch.cat([output[part] for output in outputs], -1), X @ dense(scheme, tensors).T)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_row_parallel_parts_sum_to_the_linear(name: str, ranks: int, configure: Any) -> None:
    scheme, tensors = SCHEMES[name], packed(SCHEMES[name])
    bias = torch.arange(N, dtype=torch.float32)
    total = torch.zeros(len(X), N)
    for rank in range(ranks):
        layer = LinearBase(rank, ranks, (N,), K)
        method = configure({DOWN: scheme}).get_quant_method(layer, DOWN)
        layer.create(method, by_rows=True)
        load(layer, tensors)
        method.process_weights_after_loading(layer)
        width = K // ranks
        total += method.apply(layer, X[:, rank * width : (rank + 1) * width], None if rank else bias)
    close(total, X @ dense(scheme, tensors).T + bias)


@pytest.mark.parametrize("name", SELECTED | TOPK)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fused_projections_select_inputs_apart(name: str, ranks: int, configure: Any) -> None:
    scheme = (SELECTED | TOPK)[name]
    parts = [selected(scheme, seed) for seed in range(3)]
    outputs = []
    for rank in range(ranks):
        layer = LinearBase(rank, ranks, (WIDE, WIDE, WIDE), K)
        method = configure(dict.fromkeys(QKV, scheme)).get_quant_method(layer, f"{BLOCK}.self_attn.qkv_proj")
        layer.create(method, by_rows=False)
        for shard, tensors in zip("qkv", parts, strict=True):
            load(layer, tensors, shard)
        method.process_weights_after_loading(layer)
        assert len(layer.halfweight) == 3
        outputs.append(method.apply(layer, X).split(WIDE // ranks, -1))
    for part, tensors in enumerate(parts):
        close(torch.cat([output[part] for output in outputs], -1), run(scheme, tensors, X))


@pytest.mark.parametrize("name", SELECTED)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_row_parallel_parts_select_their_own_inputs(name: str, ranks: int, configure: Any) -> None:
    scheme, tensors = SELECTED[name], selected(SELECTED[name])
    total = torch.zeros(len(X), WIDE)
    for rank in range(ranks):
        layer = LinearBase(rank, ranks, (WIDE,), K)
        method = configure({DOWN: scheme}).get_quant_method(layer, DOWN)
        layer.create(method, by_rows=True)
        load(layer, tensors)
        method.process_weights_after_loading(layer)
        width = K // ranks
        total += method.apply(layer, X[:, rank * width : (rank + 1) * width])
    close(total, run(scheme, tensors, X))


def test_key_and_value_heads_that_are_fewer_than_ranks_are_copied(configure: Any) -> None:
    scheme = SCHEMES["2:4"]
    parts = [packed(scheme, seed) for seed in range(3)]
    for rank in range(4):  # q in four parts of 6, k and v in two of 12 that two ranks share
        layer = LinearBase(rank, 4, (N, 2 * N, 2 * N), K)
        method = configure(dict.fromkeys(QKV, scheme)).get_quant_method(layer, f"{BLOCK}.self_attn.qkv_proj")
        layer.create(method, by_rows=False, local=(6, 12, 12))
        for shard, tensors in zip("qkv", parts, strict=True):
            load(layer, tensors, shard)
        method.process_weights_after_loading(layer)
        q, k, v = (X @ dense(scheme, tensors).T for tensors in parts)
        half = 12 * (rank // 2)
        close(
            method.apply(layer, X), torch.cat([q[:, 6 * rank :][:, :6], k[:, half:][:, :12], v[:, half:][:, :12]], -1)
        )


@pytest.mark.parametrize("ranks", [1, 2])
def test_linears_that_the_checkpoint_fuses_are_cut_part_by_part(ranks: int, configure: Any) -> None:
    scheme, name = SCHEMES["int4"], f"{BLOCK}.mlp.gate_up_proj"
    tensors = packed(scheme)
    outputs = []
    for rank in range(ranks):
        layer = LinearBase(rank, ranks, (N // 2, N // 2), K)
        config = configure({name: scheme})
        config.packed_modules_mapping["gate_up_proj"] = ["gate_proj", "up_proj"]
        method = config.get_quant_method(layer, name)
        layer.create(method, by_rows=False)
        load(layer, tensors)
        method.process_weights_after_loading(layer)
        outputs.append(method.apply(layer, X).split(N // 2 // ranks, -1))
    got = torch.cat([output[part] for part in range(2) for output in outputs], -1)
    close(got, X @ dense(scheme, tensors).T)


@pytest.mark.parametrize("name", ["2:4", "int4"])
def test_queries_keys_and_values_fused_on_disk_for_more_ranks_than_heads(name: str, configure: Any) -> None:
    scheme, fused, ranks, copies = SCHEMES[name], f"{BLOCK}.self_attn.qkv_proj", 4, 2
    tensors, (queries, keys) = packed(scheme), (N // 2, N // 4)
    own = keys * copies // ranks
    want = (X @ dense(scheme, tensors).T).split([queries, keys, keys], -1)
    for rank in range(ranks):
        layer = LinearBase(rank, ranks, (queries, own * ranks, own * ranks), K)
        layer.num_kv_head_replicas = copies  # type: ignore[assignment]  # a name of vLLM's
        method = configure({fused: scheme}).get_quant_method(layer, fused)
        layer.create(method, by_rows=False)
        load(layer, tensors)
        method.process_weights_after_loading(layer)
        ours = [
            part[:, at * width :][:, :width]
            for part, at, width in zip(
                want, (rank, rank // copies, rank // copies), (queries // ranks, own, own), strict=True
            )
        ]
        close(method.apply(layer, X), torch.cat(ours, -1))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["16-bit norms rank 5", "int4 rank 5", "groups norms"])
def test_a_selected_linear_that_the_checkpoint_fuses(ranks: int, name: str, configure: Any) -> None:
    scheme, tensors, fused = SELECTED[name], selected(SELECTED[name]), f"{BLOCK}.mlp.gate_up_proj"
    outputs = []
    for rank in range(ranks):
        layer = LinearBase(rank, ranks, (WIDE // 2, WIDE // 2), K)
        method = configure({fused: scheme}).get_quant_method(layer, fused)
        layer.create(method, by_rows=False)
        load(layer, tensors)
        method.process_weights_after_loading(layer)
        outputs.append(method.apply(layer, X).split(WIDE // 2 // ranks, -1))
    close(torch.cat([output[part] for part in range(2) for output in outputs], -1), run(scheme, tensors, X))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_padded_embedding_and_its_tied_head(ranks: int, configure: Any) -> None:
    rows, table = 27, integers(8, 32)
    codes = random_codes(table, rows, K, torch.Generator().manual_seed(0))
    tensors = pack_weight(torch.empty(0), table.dense, codes)
    want = dense(table.dense, tensors, rows)
    for rank in range(ranks):
        config = configure({}, embedding=table)
        layer, head = (kind(rows, K, rank, ranks) for kind in (VocabParallelEmbedding, ParallelLMHead))
        method, head_method = config.get_quant_method(layer, ""), config.get_quant_method(head, "lm_head")
        layer.create(method)
        head.create(head_method)
        assert head_method.tie_weights(head, layer) is head
        load(layer, tensors)
        method.process_weights_after_loading(layer)
        own = want[rank * layer.share :][: layer.share]
        close(method.embedding(layer, torch.arange(len(own))[None]), own[None])
        logits = head_method.apply(head, X)
        assert logits.shape == (len(X), layer.share)
        close(logits[:, : len(own)], X @ own.T)
        assert not logits[:, len(own) :].any()


def test_an_untied_head_of_integers_is_padded(configure: Any) -> None:
    rows, table = 27, integers(8, 32)
    tensors = pack_weight(torch.empty(0), table.dense, random_codes(table, rows, K, torch.Generator().manual_seed(0)))
    head = ParallelLMHead(rows, K)
    method = configure({"lm_head": table.dense}, embedding=table).get_quant_method(head, "lm_head")
    head.create(method)
    load(head, tensors)
    method.process_weights_after_loading(head)
    close(method.apply(head, X)[:, :rows], X @ dense(table.dense, tensors, rows).T)


def test_what_is_not_compressed_stays_vllms_own(configure: Any) -> None:
    config = configure({DOWN: LinearScheme(pattern="4:8", density=0.5)})
    assert isinstance(config.get_quant_method(LinearBase(), DOWN), UnquantizedLinearMethod)
    assert isinstance(config.get_quant_method(LinearBase(), f"{BLOCK}.mlp.gate_proj"), UnquantizedLinearMethod)
    assert config.get_quant_method(VocabParallelEmbedding(4, 4), "model.embed_tokens") is None
    assert config.get_quant_method(ParallelLMHead(4, 4), "lm_head") is None


def test_a_dense_prefill_is_served_with_a_warning(configure: Any, caplog: pytest.LogCaptureFixture) -> None:
    configure({DOWN: SELECTED["16-bit"]})
    assert not caplog.text
    configure({DOWN: SELECTED["16-bit"]}, prefill="dense")
    assert "prompts select their inputs, too" in caplog.text


def test_refusals_name_the_linear(configure: Any) -> None:
    mixed = configure({QKV[0]: SCHEMES["2:4"]})
    with pytest.raises(InputError, match=r"k_proj is dense but .*qkv_proj fuses it"):
        mixed.get_quant_method(LinearBase(), f"{BLOCK}.self_attn.qkv_proj")
    layer = LinearBase(0, 8, (N,), K)
    with pytest.raises(InputError, match=r"down_proj: rows of 4 segments"):
        layer.create(configure({DOWN: SCHEMES["groups"]}).get_quant_method(layer, DOWN), by_rows=True)
    experts = configure({f"{BLOCK}.mlp.experts.0.up_proj": SCHEMES["2:4"]})
    with pytest.raises(InputError, match="is an expert"):
        experts.get_quant_method(nn.Module(), f"{BLOCK}.mlp")


def test_what_selected_schemes_cannot_do_is_refused(registry: Any, configure: Any) -> None:
    config = configure({DOWN: SELECTED["int4"], "lm_head": SELECTED["int4"]})
    layer = LinearBase(0, 8, (WIDE,), K)
    with pytest.raises(InputError, match=r"down_proj: parts of 8 outputs are no whole pairs of groups"):
        layer.create(config.get_quant_method(layer, DOWN), by_rows=False)
    with pytest.raises(InputError, match=r"lm_head is a head stored input by input"):
        config.get_quant_method(ParallelLMHead(WIDE, K), "lm_head")
    copied = LinearBase(0, 2, (WIDE,), K)
    copied.num_kv_head_replicas = 2  # type: ignore[assignment]  # a name of vLLM's
    with pytest.raises(InputError, match=r"down_proj: its groups are not cut for more ranks than key"):
        copied.create(configure({DOWN: SELECTED["groups"]}).get_quant_method(copied, DOWN), by_rows=False)
    core = SELECTED["16-bit"].model_copy(update={"selection": SelectionScheme(threshold="prompt")})
    with pytest.raises(InputError, match=r"threshold: prompt, but in vLLM .* compress with threshold: topk"):
        registry.configs["halfweight"].from_config(ArtifactConfig(linears={DOWN: core}).to_json())


def test_damaged_groups_are_refused_before_they_are_cut(configure: Any) -> None:
    scheme = SELECTED["groups"]
    layer = LinearBase(0, 2, (WIDE,), K)
    method = configure({DOWN: scheme}).get_quant_method(layer, DOWN)
    layer.create(method, by_rows=False)
    tensors = selected(scheme)
    load(layer, {**tensors, "index": tensors["index"] | 0xFFF})
    with pytest.raises(InputError, match=r"down_proj: index .*damaged"):
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize("damage", ["missing", "pattern", "shape"])
def test_damaged_tensors_are_refused_by_name(damage: str, configure: Any) -> None:
    scheme, tensors = SCHEMES["2:4"], packed(SCHEMES["2:4"])
    if damage == "missing":
        del tensors["meta"]
    elif damage == "pattern":
        tensors["meta"] = torch.full_like(tensors["meta"], 0xFF)
    else:
        tensors["values"] = tensors["values"][:, :-2]
    layer = LinearBase(0, 1, (N,), K)
    method = configure({DOWN: scheme}).get_quant_method(layer, DOWN)
    layer.create(method, by_rows=True)
    load(layer, tensors)
    with pytest.raises(InputError, match=r"down_proj.*(missing|damaged)"):
        method.process_weights_after_loading(layer)


def test_a_truncated_folder_is_refused_before_any_worker_starts(artifact: Path, configure: Any, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(artifact, folder)
    config = configure({DOWN: SCHEMES["2:4"]})
    config.maybe_update_config(str(folder), hf_config=None, revision=None)
    shard = next(folder.glob("halfweight-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        config.maybe_update_config(str(folder), hf_config=None, revision=None)
