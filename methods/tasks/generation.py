r"""What a model writes: the texts of a task's prompts, and how good they are.

Of the metrics of a text against references, BLEU is sacrebleu's, NIST and METEOR are nltk's, ROUGE-L is rouge-score's:
`pip install 'bilevel[nlg]'`. sacrebleu and nltk are kept up; METEOR's synonyms are WordNet, which nltk downloads
(`python -m nltk.downloader wordnet`) or finds as `corpora/wordnet` in a folder that NLTK_DATA names; rouge-score is
Google's own port, unchanged since 2022, and what others use. CIDEr has no package that is kept up (pycocoevalcap, of
2020, starts a Java program), so it is written here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from methods.tasks.metrics import checked
from methods.tasks.splits import units
from methods.tasks.task import Generation, Row, handed

Write = Callable[[Sequence[str]], Sequence[str]]
"""From prompts to what is written after them."""


@dataclasses.dataclass(frozen=True)
class Written:
    """What `evaluate_written` found.

    Attributes:
      task: its name.
      metrics: `{name: value}`, the task's own, the first being the primary one.
      texts: one for each prompt.
      predictions: what `task.extract` read out of each.
      targets: what each was compared with: all the targets of the rows that share the prompt.
      right: which predictions are among their targets; None where that is no metric of the task.
      cut: how many prompts were cut on the left to fit into the model; set by who wrote the texts.
    """

    task: str
    metrics: dict[str, float]
    texts: list[str]
    predictions: list[Any]
    targets: list[list[Any]]
    right: np.ndarray | None
    cut: int = 0


def evaluate_written(write: Write, task: Generation, rows: Sequence[Row]) -> Written:
    """The task's metrics over `rows`, each prompt written to once; rows that share one are its references.

    Raises:
      ValueError: for no rows, if `write` gives another number of texts, or for a metric that is not finite.
      ModuleNotFoundError: if a metric's package is not installed; says how to install it.
    """
    if not rows:
        raise ValueError(f"There are no rows of {task.name} to write to.")
    groups = units(task, rows)
    found = list(write([task.asked(group[0]).prompt for group in groups]))
    if len(found) != len(groups):
        raise ValueError(f"{len(found)} texts were written to the {len(groups)} prompts of {task.name}.")
    texts = [truncate(text, task.stop) for text in found]
    firsts = [handed(task.extract, group[0]) for group in groups]
    predictions = [task.extract(text, row) for text, row in zip(texts, firsts, strict=True)]
    targets = [[task.target(handed(task.target, row)) for row in group] for group in groups]
    # No answer in a text is an empty one to a metric of texts, and the wrong one to `exact`.
    told = ["" if p is None and isinstance(group[0], str) else p for p, group in zip(predictions, targets, strict=True)]
    metrics = checked(task.name, {name: METRICS[name](told, targets) for name in task.metrics})
    right = None
    if "exact" in metrics:
        right = np.array([same(p, t) for p, t in zip(predictions, targets, strict=True)])
    return Written(task.name, metrics, texts, predictions, targets, right)


def check_metrics(task: Generation) -> None:
    """Makes sure, before anything is trained, that what the task's metrics are made of is there.

    Raises:
      ModuleNotFoundError, FileNotFoundError: what is missing, and how to get it.
    """
    # Nothing in common, so that METEOR looks for synonyms.
    for name in task.metrics:
        METRICS[name](["one"], [["other"]])


def truncate(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the `stop` texts, one at its very start aside."""
    body = text.lstrip()
    ends = [at for mark in stop if (at := body.find(mark)) >= 0]
    return body[: min(ends)] if ends else body


def same(prediction: Any, targets: Sequence[Any]) -> bool:
    """Whether a prediction is one of the targets; numbers up to 1e-4 of the target."""
    if prediction is None:
        return False
    if isinstance(prediction, float):
        return any(math.isclose(prediction, target, rel_tol=1e-4, abs_tol=1e-9) for target in targets)
    return prediction in targets


def exact(predictions: Sequence[Any], targets: Sequence[Sequence[Any]]) -> float:
    """Share of predictions that are right."""
    return float(np.mean([same(p, t) for p, t in zip(predictions, targets, strict=True)]))


def bleu(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU with up to four words, sacrebleu's (lower-cased, 13a tokens), 0 to 1. Papineni et al., 2002."""
    score = _package("sacrebleu").corpus_bleu(list(predictions), _streams(targets), lowercase=True)
    return score.score / 100


def nist(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> float:
    """Corpus NIST with up to five words, nltk's; fewer where no prediction has as many. Doddington, 2002."""
    corpus_nist = _package("nltk.translate.nist_score").corpus_nist
    written = [words(p) for p in predictions]
    most = min(5, max(map(len, written)))
    return float(corpus_nist([[words(t) for t in group] for group in targets], written, most)) if most else 0.0


def meteor(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> float:
    """Mean METEOR, nltk's, best of the references. Banerjee and Lavie, 2005.

    nltk looks up the synonyms of stems: those of a word that is not its own stem ("automobile") count for nothing, so
    that values are a little below those of the authors' program.

    Raises:
      FileNotFoundError: if WordNet is not there.
    """
    score = _package("nltk.translate.meteor_score").meteor_score
    pairs = zip(predictions, targets, strict=True)
    try:
        return float(np.mean([score([words(t) for t in group], words(p)) for p, group in pairs]))
    except LookupError as error:
        raise FileNotFoundError(
            "METEOR needs WordNet, once: run python -m nltk.downloader wordnet, or name a folder that holds "
            "corpora/wordnet by NLTK_DATA."
        ) from error


def rouge_l(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L, the F of the longest common subsequence, best of the references; rouge-score's. Lin, 2004."""
    scorer = _package("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    pairs = zip(predictions, targets, strict=True)
    return float(np.mean([scorer.score_multi(list(group), p)["rougeL"].fmeasure for p, group in pairs]))


def cider(predictions: Sequence[str], targets: Sequence[Sequence[str]], longest: int = 4, sigma: float = 6.0) -> float:
    r"""Mean CIDEr-D.

    $$
    \frac{10}{N R} \sum_{n=1}^{N} \sum_{r} e^{-(l_p - l_r)^2 / 2 \sigma^2}
      \frac{\min(g_n(p), g_n(r)) \cdot g_n(r)}{|g_n(p)| |g_n(r)|}
    $$

    with g_n(s) the counts of the n-word sequences of s, each times log(M / in how many of the M reference sets it is).
    Vedantam, Zitnick, Parikh, 2015. arXiv:1411.5726.
    """
    references = [[_sequences(t, longest) for t in group] for group in targets]
    found_in = Counter(key for group in references for key in set().union(*group))
    total = math.log(max(len(targets), 1))

    def weighted(counts: Counter) -> list[dict[Any, float]]:
        by_length: list[dict[Any, float]] = [{} for _ in range(longest)]
        for key, count in counts.items():
            by_length[len(key) - 1][key] = count * (total - math.log(max(found_in[key], 1)))
        return by_length

    def similarity(p: dict[Any, float], r: dict[Any, float]) -> float:
        norms = math.sqrt(sum(v * v for v in p.values())) * math.sqrt(sum(v * v for v in r.values()))
        return sum(min(v, r[key]) * r[key] for key, v in p.items() if key in r) / norms if norms else 0.0

    scores = []
    for text, group, texts in zip(predictions, references, targets, strict=True):
        own = weighted(_sequences(text, longest))
        values = []
        for counts, reference in zip(group, texts, strict=True):
            gap = len(words(text)) - len(words(reference))
            pairs = zip(own, weighted(counts), strict=True)
            values.append(math.exp(-(gap**2) / (2 * sigma**2)) * sum(similarity(p, r) for p, r in pairs) / longest)
        scores.append(10 * float(np.mean(values)))
    return float(np.mean(scores))


def words(text: str) -> list[str]:
    """Lower-cased words and marks."""
    return re.findall(r"\w+(?:'\w+)?|[^\w\s]", text.lower())


def _sequences(text: str, longest: int) -> Counter:
    tokens = words(text)
    return Counter(tuple(tokens[i : i + n]) for n in range(1, longest + 1) for i in range(len(tokens) - n + 1))


def _streams(targets: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu wants them: the first of each, the second of each, ..."""
    most = max(len(group) for group in targets)
    return [[group[i] if i < len(group) else None for group in targets] for i in range(most)]


def _package(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0].replace("_", "-")
        raise ModuleNotFoundError(
            f"{name} is not installed, which this metric is of: pip install 'bilevel[nlg]'."
        ) from error


METRICS: dict[str, Callable[[Sequence[Any], Sequence[Sequence[Any]]], float]] = {
    "exact": exact,
    "bleu": bleu,
    "nist": nist,
    "meteor": meteor,
    "rouge_l": rouge_l,
    "cider": cider,
}
