"""Plain LoRA here and in Hugging Face's peft: the same rows, start, batches and steps; accuracy, time and memory.

MiniLM-L6 with a new head on RTE, MRPC and 2,000 rows of SST-2, SmolLM2-135M on 500 rows of PIQA, three seeds. What is
drawn is drawn once: our start values, as a PEFT folder, and our batches, as arrays, are what peft trains from. Dropout
is off on both sides, AdamW and its schedule are the same, and neither recomputes blocks. Each run is a process of its
own, so that the peak of its memory, up to the end of training, is its own; the seconds of a step are measured apart, in
one process where the two take turns on the same batches.

    python -m benchmarks.lora.peft_comparison                # what is missing of all runs; table and record
    python -m benchmarks.lora.peft_comparison --cases rte    # some of them
    python -m benchmarks.lora.peft_comparison --parts none   # the table of what there is
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.lora.cases import MINILM, SMOLLM, Case
from methods import tasks
from methods.tasks import Buckets, LabelledBatch, TokenBatch

SIDES = ("ours", "peft")
RECORD = Path(__file__).with_name("peft_comparison.json")


CASES = {
    "rte": Case("rte", *MINILM, 2000, 0, 80, 16, 128, 2e-3),
    "mrpc": Case("mrpc", *MINILM, 2000, 0, 80, 16, 128, 2e-3),
    "sst2": Case("sst2", *MINILM, 2000, 0, 80, 16, 64, 2e-3),
    "piqa": Case("piqa", *SMOLLM, 500, 100, 30, 8, 64, 5e-4),
}
RANK, ALPHA = 8, 16.0


def main(
    cases: tuple[str, ...] = tuple(CASES),
    seeds: tuple[int, ...] = (0, 1, 2),
    parts: tuple[str, ...] = (*SIDES, "time"),
    out: Path = Path("runs/peft-comparison"),
) -> None:
    """Does what is missing of these runs, then prints the table and writes the record.

    Args:
      cases: what to run; the table and the record hold what is there of all.
      seeds: of rows, start and batches.
      parts: what to run, of "ours", "peft" and "time"; "none" only makes the table.
      out: folder of the runs; what is in it is not done again.
    """
    jobs = [(case, seed, side) for seed in seeds for case in cases for side in SIDES]
    jobs += [(case, 0, "time") for case in cases]
    for case, seed, side in jobs:
        file = out / f"{case}-{seed}" / f"{side}.json"
        if side not in parts or file.is_file():
            continue
        print(f"{case}, seed {seed}, {side}", flush=True)
        words = ["--case", case, "--seed", str(seed), "--side", side, "--out", str(out)]
        subprocess.run([sys.executable, "-m", "benchmarks.lora.peft_comparison", "run", *words], check=True)
    found = {}
    for case, settings in CASES.items():
        rows = {side: [_read(out, case, seed, side) for seed in seeds] for side in SIDES}
        rows = {side: [row for row in of if row] for side, of in rows.items()}
        if any(rows.values()):
            found[case] = {"settings": dataclasses.asdict(settings), **rows, "time": _read(out, case, 0, "time")}
    RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(report(found))


def _read(out: Path, case: str, seed: int, side: str) -> Any:
    file = out / f"{case}-{seed}" / f"{side}.json"
    return json.loads(file.read_text()) if file.is_file() else None


def report(found: dict[str, Any]) -> str:
    """The table in Markdown: mean and standard deviation over the seeds, seconds a step, mebibytes."""
    lines = [
        "| task | metric | seeds | ours | peft | s/step ours | s/step peft | ratio | MiB ours | MiB peft |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case, of in found.items():
        for metric in (of["ours"] or of["peft"] or [{"metrics": {}}])[0]["metrics"]:
            cells = [case, metric, str(len(of["ours"]))]
            for side in SIDES:
                values = 100 * np.array([row["metrics"][metric] for row in of[side]])
                spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
                cells.append(f"{values.mean():.1f}{spread}" if len(values) else "")
            seconds = of["time"] or {}
            cells += [f"{seconds[side]:.3f}" if side in seconds else "" for side in SIDES]
            cells.append(f"{seconds['ours'] / seconds['peft']:.2f}" if seconds else "")
            for side in SIDES:
                peaks = [row["mebibytes"] for row in of[side] if "mebibytes" in row]
                cells.append(f"{np.mean(peaks):.0f}" if peaks else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run(case: str, seed: int, side: str, out: Path) -> None:
    """One run, in this process: "ours", "peft" (which needs what ours has written), or "time"."""
    folder = out / f"{case}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    result = {"ours": ours, "peft": peft, "time": timing}[side](CASES[case], seed, folder)
    (folder / f"{side}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def peak() -> float:
    """The most memory that this process has had, in MiB (Linux counts kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- ours ---------------------------------------------------------------------------------------------------------


def prepared(case: Case, seed: int, folder: Path) -> tuple[Any, Any, Any]:
    """Settings, bench and start values; writes rows, batches and start values for the other side."""
    import jax

    from methods import lora
    from methods.bench import prepare, start
    from methods.settings import Settings

    settings = case.settings(Settings, seed, folder / "run", rank=RANK, lora_alpha=ALPHA)
    bench = prepare(settings)
    np.savez(folder / "train.npz", **{k: np.asarray(v) for k, v in bench.train._asdict().items()})
    (folder / "test.json").write_text(json.dumps(bench.splits.test))
    fresh = start(bench, jax.random.key(seed))
    lora.export_adapter(folder / "start", bench, fresh)
    return settings, bench, fresh


def finetuned(settings: Any, bench: Any, start: Any, folder: Any) -> Any:
    """What is trained, by the loop of every method, from `start`."""
    import jax
    import jax.numpy as jnp

    import bilevel
    from methods.bench import recipe
    from methods.training import train

    given = bench.given()

    def inner_loss(weights, params, outer, batch, key):
        return given.loss(weights, given.bind(weights, params), batch) + 0.0 * outer

    loss = jax.tree_util.Partial(inner_loss, bench.pretrained.weights)
    problem = bilevel.Problem(loss, loss, lambda key, outer: start, lambda key: jnp.zeros(()))
    batches = Buckets(bench.train, settings.batch_size, seed=settings.seed)
    key = jax.random.key(settings.seed)
    return train(problem, jnp.zeros(()), batches, recipe(settings), folder, "lora", key=key)


def ours(case: Case, seed: int, folder: Path) -> dict[str, Any]:
    from methods import evaluation
    from methods.runfolder import RunFolder

    settings, bench, start = prepared(case, seed, folder)
    begun = time.perf_counter()
    params = finetuned(settings, bench, start, RunFolder(settings.out, settings))
    seconds, mebibytes = time.perf_counter() - begun, peak()
    given = bench.given()
    found = evaluation.row(evaluation.evaluate(bench, given.bind(given.weights, params)))
    losses = [json.loads(line)["inner_loss"] for line in (settings.out / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": found["metrics"],
        "seconds": seconds,
        "mebibytes": mebibytes,
        "losses": losses[:5] + losses[-5:],
    }


# --- peft ---------------------------------------------------------------------------------------------------------


class Peft:
    """The same training in torch: `step(batch)` returns the loss."""

    def __init__(self, case: Case, folder: Path):
        import torch
        import transformers
        from peft import PeftModel

        self.torch, self.labelled = torch, isinstance(tasks.get(case.task), tasks.Classification)
        path = case.model()
        source = {"pretrained_model_name_or_path": path}
        if path.is_file():
            source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        if self.labelled:
            off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
            base = transformers.AutoModelForSequenceClassification.from_pretrained(**source, **off)
        else:
            base = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(base, folder / "start", is_trainable=True).train()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=case.learning_rate, weight_decay=0.0)
        warmup = max(1, case.steps // 10)

        def factor(step: int) -> float:
            after = (step - warmup) / max(1, case.steps - warmup)
            return step / warmup if step < warmup else 0.5 * (1 + np.cos(np.pi * min(after, 1.0)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def outputs(self, batch: Any) -> Any:
        tensors = {"input_ids": batch.tokens.astype(np.int64), "attention_mask": batch.mask.astype(np.int64)}
        if self.labelled:
            tensors["token_type_ids"] = batch.types.astype(np.int64)
        return self.model(**{name: self.torch.from_numpy(array) for name, array in tensors.items()}).logits

    def log_likelihood(self, batch: TokenBatch) -> Any:
        """log p(answer) of each sequence."""
        torch = self.torch
        log_p = torch.log_softmax(self.outputs(batch)[:, :-1].float(), dim=-1)
        following = torch.from_numpy(batch.tokens[:, 1:].astype(np.int64))
        chosen = log_p.gather(2, following[:, :, None])[:, :, 0]
        return (chosen * torch.from_numpy(batch.answer_mask[:, :-1])).sum(1)

    def step(self, batch: Any) -> float:
        if self.labelled:
            labels = self.torch.from_numpy(np.asarray(batch.labels, np.int64))
            loss = self.torch.nn.functional.cross_entropy(self.outputs(batch), labels)
        else:
            loss = -self.log_likelihood(batch).sum() / int(batch.answer_mask.sum())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def stream(case: Case, seed: int, folder: Path) -> Buckets:
    """The batches of `finetuned`."""
    kind = LabelledBatch if isinstance(tasks.get(case.task), tasks.Classification) else TokenBatch
    with np.load(folder / "train.npz") as arrays:
        return Buckets(kind(**arrays), case.batch_size, seed=seed)


def peft(case: Case, seed: int, folder: Path) -> dict[str, Any]:
    model, batches = Peft(case, folder), stream(case, seed, folder)
    task: Any = tasks.get(case.task)
    begun = time.perf_counter()
    losses = [model.step(next(batches)) for _ in range(case.steps)]
    seconds, mebibytes = time.perf_counter() - begun, peak()
    rows = json.loads((folder / "test.json").read_text())
    model.model.eval()
    with model.torch.no_grad():
        if model.labelled:
            answer = lambda batch: model.outputs(batch).numpy()  # noqa: E731
            metrics = tasks.evaluate_labelled(answer, task, rows, model.tokenizer, max_length=512).metrics
        else:
            score = lambda *arrays: model.log_likelihood(TokenBatch(*arrays)).numpy()  # noqa: E731
            found = tasks.evaluate(score, task, rows, model.tokenizer, batch_size=8)
            metrics = {"accuracy per character": found.accuracy.value, "accuracy per token": found.per_token.value}
    return {"metrics": metrics, "seconds": seconds, "mebibytes": mebibytes, "losses": losses[:5] + losses[-5:]}


# --- time ---------------------------------------------------------------------------------------------------------


def timing(case: Case, seed: int, folder: Path, turns: int = 4, turn: int = 8) -> dict[str, Any]:
    """Seconds a step of each side, which take turns of `turn` batches; medians by length, weighted by their share."""
    from methods.runfolder import RunFolder

    settings, bench, start = prepared(case, seed, folder)
    settings = dataclasses.replace(settings, finetune_steps=turns * turn, out=folder / "timed")
    other, theirs = Peft(case, folder), stream(case, seed, folder)
    same = stream(case, seed, folder)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    log = RunFolder(settings.out, settings)
    resumed = time.perf_counter()

    def callback(step: int, state: Any, metrics: Any) -> None:
        nonlocal resumed
        seconds["ours"].append(time.perf_counter() - resumed)
        if step % turn == 0:
            for _ in range(turn):
                batch, begun = next(theirs), time.perf_counter()
                other.step(batch)
                seconds["peft"].append(time.perf_counter() - begun)
        resumed = time.perf_counter()

    log.log = lambda stage: callback  # type: ignore[method-assign]
    finetuned(settings, bench, start, log)
    lengths = np.array([next(same).tokens.shape[1] for _ in range(turns * turn)])
    result: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    for side in SIDES:
        values = np.array(seconds[side])
        # The first batch of a length compiles here, and warms up there.
        medians = {t: np.median(values[lengths == t][1:]) for t in set(lengths.tolist()) if (lengths == t).sum() > 2}
        kept = [t for t in lengths.tolist() if t in medians]
        result[side] = float(np.mean([medians[t] for t in kept]))
        result[f"{side} by length"] = {t: round(float(m), 4) for t, m in sorted(medians.items())}
    return result


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        tyro.cli(run, args=sys.argv[2:])
    else:
        tyro.cli(main, description=__doc__)
