"""Every command on a tiny model, once: what it is given, and what it leaves."""

from typing import NamedTuple

from tests.methods.small import arguments


class Row(NamedTuple):
    """A command.

    Attributes:
      words: its options, beside `small.arguments`.
      files: what it leaves in its folder, beside the files of every run.
      arms: its rows of results, the first that is trained first.
      task: "piqa" answers by the model's own head, "rte" by a new one.
    """

    words: str
    files: tuple[str, ...]
    arms: tuple[str, ...]
    task: str = "piqa"


TABLE = {
    "lora": Row(
        "--adapter dora --validate-every 1",
        ("figures/training.png", "validation/dora.json", "adapter/adapter_config.json"),
        ("dora",),
        "rte",
    ),
    "flexora": Row(
        "--inner-steps 2 --outer-steps 3",
        ("selection.json", "figures/alpha.png", "figures/selection.png", "adapter/adapter_config.json"),
        ("flexora", "all-layers", "random-0", "pretrained"),
    ),
    "allocate": Row(
        "--budget-params 400 --inner-steps 2 --outer-steps 3 --warmup-steps 2",
        (
            "selection.json",
            "peft/adapter_config.json",
            "adapter/adapter_config.json",
            "figures/ranks.png",
        ),
        ("allocate", "uniform", "random-0", "pretrained"),
    ),
    "heterolora": Row(
        "--reallocations 2 --interval 2 --normalised",
        ("selection.json", "adapter-shortcuts.safetensors", "figures/side_by_side.png"),
        ("heterolora", "random-0"),
        "rte",
    ),
    "baseline": Row("random-k --share 0.5", ("figures/side_by_side.png",), ("random-k",), "rte"),
    "hiddenkey": Row(
        "--inner-steps 2 --outer-steps 2 --grid 0.1 0.3",
        ("selection.json", "figures/rates.png", "adapter/adapter_config.json", "tried/grid-3.json"),
        ("hiddenkey", "start-rates", "no-dropout", "grid"),
    ),
    "finegates": Row(
        "--inner-steps 2 --outer-steps 2 --outer sparsity --target-sparsity 0.5 --gate-lr 0.8 --finetune-steps 8",
        ("figures/sparsity.png", "figures/gates-sparsity-0.5.png", "sliced-0.5/config.json"),
        ("lora", "sparsity-0.5"),
    ),
    "loratrf": Row(
        "--inner-steps 2 --outer-steps 2 --edit-rank 2",
        ("figures/training.png", "adapter/loratrf_config.json"),
        ("loratrf", "lora"),
    ),
    "attribute": Row(
        "--questions 3 --subsets 4 --baselines cheap",
        ("influences.jsonl", "figures/influences.png", "datamodeling.json", "scores/unrolled.json", "subsets/3.json"),
        ("trained",),
        "rte",
    ),
    "select-data": Row(
        "--inner-steps 2 --outer-steps 2 --layers",
        ("selection.json", "figures/weights.png", "adapter/adapter_config.json"),
        ("select-data", "all-rows", "random-0", "pretrained"),
    ),
}


def words(name, model, data, out):
    """The command line of a row."""
    given = TABLE[name].words.split()
    first = [] if given[0].startswith("--") else given[:1]
    return [name, *first, *arguments(model, data, out), "--task", TABLE[name].task, *given[len(first) :]]
