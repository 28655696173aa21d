"""What works with what: a cell for each method and feature that names its test. ``make matrix`` writes docs/support-matrix.md.

A cell is a test that shows it, or a refusal with its line and the test that asserts it. What is not here was not tried.
"""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support-matrix.md"
METHODS = (
    "lora", "prelora", "galore", "lte", "mhlora", "lte_galore", "prelora_lte", "prelora_galore", "prelora_lte_galore",
    "prelora_factorize", "diloco", "muloco",
)  # fmt: skip
FEATURES = (
    "one device", "DDP", "FSDP2", "DeepSpeed", "bf16-mixed", "16-mixed", "bf16-true", "accumulation", "clipping", "compile",
    "activation checkpointing", "EMA", "resume", "elastic", "export to timm", "export to hf", "export to peft", "HF Trainer",
    "Accelerate", "Fabric", "frozen_dtype",
)  # fmt: skip


class Works(NamedTuple):
    """A test that shows it: file::function, with its parameters where only some of its cases do."""

    test: str


class Refused(NamedTuple):
    """The line that says so, and the test that asserts it. ``…`` is what differs."""

    line: str
    test: str


Cell = Works | Refused
MERGED = ("diloco", "muloco")  # whole weights
FIRST = tuple(method for method in METHODS if method not in (*MERGED, "prelora_factorize"))
WITH_HEADS = ("lte", "mhlora", "lte_galore", "prelora_lte", "prelora_lte_galore")
WITH_LTE = (*WITH_HEADS, *MERGED)
WITH_CALLBACK = ("lora", "prelora", "prelora_galore", "prelora_factorize")  # and no strategy of its own


def row(feature: str, methods: tuple[str, ...], test: str, line: str | None = None) -> dict[tuple[str, str], Cell]:
    """Return the cells of some methods; ``{}`` in the test's name is the method."""
    names = {method: test.replace("{}", method) for method in methods}
    return {(m, feature): Works(name) if line is None else Refused(line, name) for m, name in names.items()}


OWN = "trainer.strategy=…: must be auto: the method brings its own strategy"
SHARDED = "strategy=…: … changes the model in mid-run, which sharded parameters cannot follow: use ddp"
FLAT = "params=…: is flat now (FSDP1, DeepSpeed): use FSDP2 (ModelParallelStrategy)"
AVERAGED = "callbacks=…: pairs weights by position and would average heads, or one worker's weights: …"
HEADS_ONLY = "frozen_dtype=…: is for a frozen W next to heads, and update=… trains W: leave it out"
ADAPTERS_ONLY = "frozen_dtype=…: is for the callback's own adapters, and … takes the targets over: leave it out"
NOT_FACTORS = 'frozen_dtype=…: is for a frozen W next to adapters, and then="…" has none: leave it out'
NO_ADAPTERS = "format='peft': … holds no adapters; leave format= out for its merged weights"
PRELORA_2 = "test_prelora_distributed.py"
GALORE_2 = "test_galore_distributed.py::test_two_processes"
ACTS = "test_support.py::test_a_feature_acts_and_a_resume_under_it_is_exact"
EMA = "test_support.py::test_an_average_of_the_weights_resumes_or_is_refused[{}]"
NO_PEFT = tuple(method for method in METHODS if method not in ("lora", "prelora"))
EXPORTS = "test_support.py::test_what_a_run_exports_is_the_trained_model"

CELLS: dict[tuple[str, str], Cell] = {
    **row("one device", FIRST, "test_composition.py::test_what_comes_out_is_a_plain_model[{}]"),
    **row("DDP", ("prelora",), f"{PRELORA_2}::test_two_processes_are_one_through_all_phases_and_send_what_trains"),
    **row("DDP", ("galore",), f"{GALORE_2}[hook_in_lightning]"),
    **row("DDP", ("lte",), "test_lte_distributed.py::test_any_layout_of_four_heads_is_the_same_run"),
    **row("DDP", ("lora", "mhlora", "lte_galore", "prelora_lte", "prelora_galore", "prelora_lte_galore"),
          "test_composition.py::test_two_ranks_end_equal_and_resume"),
    **row("FSDP2", ("galore",), f"{GALORE_2}[fsdp2_in_lightning]"),
    **row("FSDP2", WITH_CALLBACK,
          "test_support.py::test_who_changes_the_model_refuses_sharded_weights[ModelParallelStrategy-{}]", SHARDED),
    **row("FSDP2", WITH_LTE, "test_support.py::test_a_method_with_a_strategy_refuses_another[fsdp-{}]", OWN),
    **row("DeepSpeed", ("galore",), "test_galore.py::test_parameters_that_were_flattened_after_construction", FLAT),
    **row("DeepSpeed", WITH_CALLBACK,
          "test_support.py::test_who_changes_the_model_refuses_sharded_weights[DeepSpeedStrategy-{}]", SHARDED),
    **row("DeepSpeed", WITH_LTE, "test_support.py::test_a_method_with_a_strategy_refuses_another[deepspeed-{}]", OWN),
    **row("bf16-mixed", METHODS, f"{ACTS}[bf16-mixed-{{}}]"),
    **row("16-mixed", METHODS, f"{ACTS}[16-mixed-{{}}]"),
    **row("bf16-true", METHODS, f"{ACTS}[bf16-true-{{}}]"),
    **row("accumulation", METHODS, f"{ACTS}[accumulation-{{}}]"),
    **row("clipping", METHODS, f"{ACTS}[clipping-{{}}]"),
    **row("compile", METHODS, "test_support.py::test_a_compiled_model_is_the_eager_one[{}]"),
    **row("activation checkpointing", METHODS, "test_support.py::test_checkpointed_activations_change_nothing[{}]"),
    **row("EMA", ("lora", "prelora", "galore", "prelora_galore", "prelora_factorize"), EMA),
    **row("EMA", WITH_LTE, EMA, AVERAGED),
    **row("resume", ("lora",), "test_resume.py::test_lora_resumes"),
    **row("resume", ("prelora",), "test_resume.py::test_resume_from_every_phase_is_bit_exact"),
    **row("resume", ("galore",), "test_galore_lightning.py::test_resume_through_the_trainer_is_bit_exact"),
    **row("resume", ("lte",), "test_lte_resume.py::test_resume_is_exact_on_one_device"),
    **row("resume", ("mhlora",), f"{ACTS}[accumulation-mhlora]"),
    **row("resume", ("lte_galore", "prelora_lte", "prelora_galore", "prelora_lte_galore"),
          "test_composition.py::test_resume_is_exact[{}]"),
    **row("elastic", ("prelora",), f"{PRELORA_2}::test_one_process_goes_on_where_two_were_and_two_where_one_was"),
    **row("elastic", ("lte",), "test_lte_resume.py::test_two_to_three_to_one_worker"),
    **row("elastic", ("lte_galore",), "test_lte_galore.py::test_other_numbers_of_workers_go_on_from_the_merged_model"),
    **row("elastic", ("prelora_lte", "prelora_lte_galore"), "test_lte_before.py::test_two_to_three_to_one_worker"),
    **row("one device", ("prelora_factorize",), "test_factorize_fit.py::test_everything_shrinks_and_the_end_is_plain"),
    **row("DDP", ("prelora_factorize",), "test_factorize_fit.py::test_two_processes_are_one_and_resume_exactly"),
    **row("resume", ("prelora_factorize",), "test_factorize_fit.py::test_resume_from_every_phase_is_bit_exact"),
    **row("elastic", ("diloco",), "test_lte_full.py::test_two_to_three_to_one_worker_loses_no_error_feedback"),
    **row("one device", ("diloco",), "test_lte_full.py::test_it_is_algorithm_1"),
    **row("DDP", ("diloco",), "test_lte_full.py::test_it_is_algorithm_1"),
    **row("resume", ("diloco",), "test_lte_full.py::test_resume_is_exact_at_and_between_merges"),
    **row("one device", ("muloco",), "test_lte_muloco.py::test_with_muon_inside_it_is_algorithm_1_for_a_few_merges"),
    **row("DDP", ("muloco",), "test_lte_muloco.py::test_with_muon_inside_it_is_algorithm_1_for_a_few_merges"),
    **row("resume", ("muloco",), "test_lte_muloco.py::test_muloco_resumes_to_the_bit"),
    **row("export to timm", METHODS, f"{EXPORTS}[vit-timm-{{}}]"),
    **row("export to hf", METHODS, f"{EXPORTS}[gpt2-hf-{{}}]"),
    **row("export to peft", ("lora", "prelora"), f"{EXPORTS}[vit-timm-{{}}]"),
    **row("export to peft", NO_PEFT, f"{EXPORTS}[vit-timm-{{}}]", NO_ADAPTERS),
    **row("HF Trainer", ("galore",), "test_other_trainers.py::test_hf_trainer_equals_the_plain_loop"),
    **row("Accelerate", ("galore",), "test_other_trainers.py::test_accelerate_equals_the_plain_loop_and_resumes"),
    **row("Fabric", ("galore",), "test_other_trainers.py::test_fabric_equals_the_plain_loop"),
    **row("frozen_dtype", ("lora",), "test_frozen.py::test_lora_resumes_and_says_what_it_merges"),
    **row("frozen_dtype", ("prelora",), "test_frozen.py::test_two_processes_are_equal_and_resume"),
    **row("frozen_dtype", ("lte", "mhlora"), "test_frozen.py::test_heads_multiply_in_it_and_merge_into_w_itself"),
    **row("frozen_dtype", ("prelora_lte",), "test_frozen.py::test_prelora_hands_it_on_to_heads"),
    **row("frozen_dtype", ("lte_galore", "prelora_lte_galore", *MERGED),
          "test_frozen.py::test_a_wrong_value_is_one_line", HEADS_ONLY),
    **row("frozen_dtype", ("prelora_factorize",), "test_frozen.py::test_a_wrong_value_is_one_line", NOT_FACTORS),
    **row("frozen_dtype", ("prelora_galore",), "test_frozen.py::test_an_optimizer_that_takes_the_plan_has_no_frozen_weight",
          ADAPTERS_ONLY),
}  # fmt: skip

HEAD = """# What works with what

<!-- Written by `make matrix` from tests/matrix.py; a test fails while this page is another. -->

`yes`: a test shows it. `no`: refused in one line. `-`: nobody has tried. The names of tests and the lines are below.

"""
NOTES = """
- These tests run on CPUs, with one or two processes; `tests/test_gpu.py` tries PreLoRA and LTE in each precision on a GPU.
- DDP is several processes. The methods with LTE bring a strategy of their own that is derived from it: `trainer.devices=N`.
- Elastic is a resume with another number of processes.
- The callbacks (LoRA, PreLoRA) and the strategy (LTE) are Lightning's, so HF's Trainer, Accelerate and Fabric cannot take them.
- `galore_layerwise` steps within the backward pass: no clipping, no 16-mixed, no DDP; each is refused in one line.
- Export to peft is of adapters. What has none is exported merged, to timm or hf.
"""


def page() -> str:
    """Return the page."""
    words = {Works: "yes", Refused: "no", type(None): "-"}
    lines = [f"| | {' | '.join(f'`{method}`' for method in METHODS)} |", f"|---|{'---|' * len(METHODS)}"]
    for feature in FEATURES:
        cells = [words[type(CELLS.get((method, feature)))] for method in METHODS]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    return HEAD + "\n".join(lines) + "\n" + NOTES + "\n## The tests and the lines\n" + "".join(map(details, FEATURES))


def details(feature: str) -> str:
    """Return the section of a feature: methods with the same test, and with the same line, stand together."""
    groups: dict[tuple[str | None, str], list[str]] = {}
    for method in METHODS:
        cell = CELLS.get((method, feature))
        if cell is not None:
            test = cell.test.replace(f"{method}]", "…]").replace("[…]", "")
            groups.setdefault((cell.line if isinstance(cell, Refused) else None, test), []).append(f"`{method}`")
    text = f"\n### {feature}\n\n"
    for (line, test), methods in groups.items():
        said = "" if line is None else f" refused: `{line}`;"
        text += f"- {', '.join(methods)}:{said} `tests/{test}`\n"
    left = [f"`{method}`" for method in METHODS if (method, feature) not in CELLS]
    return text + (f"- {', '.join(left)}: not tried\n" if left else "")


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE.relative_to(ROOT)}")
